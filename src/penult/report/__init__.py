"""Self-contained HTML pages and their figures: the one place in penult where either is made.

`Page` gathers sections of text, headline facts, tables, figures and terminal output into one file that
loads nothing from elsewhere. `penult.report.plots` draws the figures, and `penult.report.realism` those of what
`penult.realism` measured; `penult.report.figures` is their house style and turns them into inline SVG that follows
the reader's light or dark theme.
"""

try:
    import jinja2 as jinja2
    import matplotlib as matplotlib
except ImportError as error:
    raise ImportError(
        'pages and figures need matplotlib and jinja2: pip install "penult[report]"', name=error.name
    ) from error

from penult.report import figures, pair, plots, realism
from penult.report.page import Page, Section

__all__ = ["Page", "Section", "figures", "pair", "plots", "realism"]
