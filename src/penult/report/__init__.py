"""Self-contained HTML pages and their figures.

`Page` collects sections of text, headline numbers, tables, figures and terminal output in one file that loads nothing
from elsewhere. `penult.report.plots` has general figures; `penult.report.realism`, `scores`, `distill` and `generate`
have the figures of the results of these rooms. `penult.report.figures` is the house style of figures and converts them
to inline SVG in the reader's light or dark theme. `penult.report.pair` makes a whole page on a pair.
"""

try:
    import jinja2 as jinja2
    import matplotlib as matplotlib
except ImportError as error:
    raise ImportError(
        'penult.report needs matplotlib and jinja2: pip install "penult[report]"', name=error.name
    ) from error

from penult.report import figures, pair, plots, realism
from penult.report.page import Page, Section

__all__ = ["Page", "Section", "figures", "pair", "plots", "realism"]
