"""The house style of figures, and their way out: inline SVG for a page, PNG or SVG files for a README.

Sizes are CSS pixels: a figure of size (600, 360) is 600 pixels wide where there is room.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.collections import Collection
from matplotlib.colors import Colormap, ListedColormap, to_hex, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path

from penult import io
from penult.report import inline
from penult.report.markup import seen
from penult.report.palette import DIVERGING, LIGHT, SEQUENTIAL, SERIES, THEMES, Theme, recolour

__all__ = [
    "DIVERGING",
    "FIXED",
    "SEQUENTIAL",
    "SERIES",
    "compact",
    "legend",
    "new_figure",
    "save",
    "style",
    "svg",
    "text_width",
]

# the gid of a figure that is not laid out anew for a narrow screen, but scrolls there
FIXED = "fixed"

_HOUSE: dict[str, Any] = {
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 6 / 72,
    "figure.constrained_layout.w_pad": 6 / 72,
    "figure.constrained_layout.wspace": 0.05,
    "font.size": 14,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a class may be called $x
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 13.5,
    "axes.labelpad": 6,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.prop_cycle": cycler("color", SERIES),
    "grid.color": LIGHT["line"],
    "grid.linewidth": 1,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "lines.linewidth": 2.25,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 13.5,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.6,
    "image.composite_image": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "penult",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the house style inside the `with`, whatever the user's rcParams, which come back after it."""
    with matplotlib.style.context(["default", _HOUSE]):
        yield


def new_figure(
    rows: int = 1, cols: int = 1, size: tuple[float, float] | None = None, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure in the house style and its axes, row by row.

    Labels are never cut: matplotlib's constrained layout makes room for them inside the size. Draw inside
    `with style():`, since titles and legends ask for their looks when they are made.

    Args:
        rows: rows of axes.
        cols: columns of axes.
        size: width and height in CSS pixels; by default 600 x 360, or 310 x 300 for each of several axes.
        subplots: passed on to `Figure.subplots`, such as `sharey=True`.

    Example:
        >>> figure, (left, right) = new_figure(1, 2)
        >>> with style():
        ...     lines = left.plot([0, 1], [0, 1])
        ...     title = left.set_title("before")
    """
    width, height = size or ((600, 360) if rows * cols == 1 else (310 * cols, 300 * rows))
    with style():
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        every = list(figure.subplots(rows, cols, squeeze=False, **subplots).flat)
        for axes in every:
            axes.locator_params(nbins=6 if cols == 1 else 4)
    if cols > 1:
        figure.set_gid(FIXED)
    return figure, every


def text_width(texts: Iterable[str], size: float = 13) -> float:
    """Return the width of the widest of some texts, set in a size, in CSS pixels.

    Example:
        >>> text_width(["a", "aaaa"]) == text_width(["aaaa"]) > 4 * text_width(["i"])
        True
    """
    font = FontProperties(family="DejaVu Sans", size=size)
    return max(float(text_to_path.get_text_width_height_descent(seen(text), font, False)[0]) for text in texts)


def legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """Put a legend above the axes, where no data is, in as many columns as the figure is wide.

    Args:
        figure: made by `new_figure`.
        handles: name to what was drawn under it, or an artist that looks like it.
    """
    columns = max(1, int(figure.get_figwidth() * 72 / (text_width(handles, 13.5) + 50)))
    lines = -(-len(handles) // columns)
    with style():
        box = figure.legend(
            list(handles.values()), list(map(seen, handles)), loc="outside upper left", ncols=-(-len(handles) // lines)
        )
    box.set_gid("above")


def compact(figure: Figure, width: float = 400) -> Figure | None:
    """Lay a figure out anew for a narrow screen, with its text at full size.

    Returns:
        A copy of the figure, or None for one that is narrow enough, was laid out by hand, has several columns
        of axes, or bears `FIXED` as its gid, such as a heatmap with numbers in its cells.
    """
    free = isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine) and figure.get_gid() != FIXED
    if not free or is_narrow(figure, width):
        return None
    figure = _copied(figure)
    figure.set_figwidth(width / 72)
    for box in [each for each in figure.legends if each.get_gid() == "above"]:
        figure.legends.remove(box)
        pairs = zip(box.get_texts(), box.legend_handles, strict=True)
        legend(figure, {text.get_text(): handle for text, handle in pairs if handle is not None})
    return figure


def is_narrow(figure: Figure, width: float = 400) -> bool:
    """Say whether a figure can be read where there is but a `width`, being little wider."""
    return bool(figure.get_figwidth() * 72 <= 1.15 * width)


def svg(figure: Figure | str, alt: str, prefix: str = "figure") -> str:
    """Turn a figure into an SVG element that stands inside an HTML page and follows its theme.

    Colours of the house style become CSS variables such as `var(--series-1)`, with the light theme's colour
    as the fallback. Text stays text, in the page's font. The same figure gives the same bytes.

    Args:
        figure: a matplotlib figure, or an SVG document as text.
        alt: what the picture shows, for those who don't see it.
        prefix: begins every id inside, so that two pictures can share a page.

    Raises:
        ValueError: `alt` is empty, or a given document holds more than drawing.

    Example:
        >>> figure, (axes,) = new_figure()
        >>> svg(figure, alt="An empty plot")[:56]
        '<svg class="chart" role="img" aria-label="An empty plot"'
    """
    return inline.clean(figure if isinstance(figure, str) else _document(figure), alt, prefix)


def save(figure: Figure, path: str | Path, theme: Theme = "light", scale: float = 2) -> Path:
    """Write a figure to a `.png` or `.svg` file of its own, in one theme and on its solid paper.

    Args:
        figure: drawn in the house style.
        path: where; the ending decides what is written.
        theme: "light" or "dark".
        scale: pixels of a PNG for each CSS pixel of the figure.

    Raises:
        ValueError: the ending is neither `.png` nor `.svg`.
    """
    path = Path(path)
    if path.suffix == ".svg":
        data = inline.clean(_document(figure), alt=path.stem, prefix="figure", theme=theme).encode()
    elif path.suffix == ".png":
        buffer = BytesIO()
        with style():
            _recoloured(figure, theme).savefig(
                buffer,
                format="png",
                dpi=72 * scale,
                facecolor=THEMES[theme]["paper"],
                metadata={"Software": None},
            )
        data = buffer.getvalue()
    else:
        raise ValueError(f"a figure is saved as .png or .svg, not {path.suffix or path.name!r}")
    return io.write_bytes(path, data)


def _document(figure: Figure) -> str:
    buffer = StringIO()
    with style():
        figure.draw_without_rendering()  # the layout settles at the second drawing
        figure.savefig(buffer, format="svg", dpi=72, transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _copied(figure: Figure) -> Figure:
    canvas = figure.canvas
    FigureCanvasBase(figure)  # without a window, of which the copy would open a second one
    try:
        return copy.deepcopy(figure)
    finally:
        figure.set_canvas(canvas)


def _recoloured(figure: Figure, theme: Theme) -> Figure:
    """Return a copy of a figure in which every artist has its colour in a theme."""
    figure = _copied(figure)
    for artist in figure.findobj():
        if isinstance(artist, (AxesImage, Collection)) and artist.get_array() is not None:
            artist.set_cmap(_map_in_theme(artist.get_cmap(), theme))
            if isinstance(artist, Collection) and np.array_equal(artist.get_edgecolor(), artist.get_facecolor()):
                artist.set_edgecolor("face")
                continue
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            getter, setter = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if getter is not None and setter is not None:
                setter(_in_theme(getter(), theme))
    return figure


def _in_theme(colour: Any, theme: Theme) -> Any:
    """Return a colour, or rows of colours, of an artist in a theme; how opaque each is stays."""
    if isinstance(colour, str) and colour in ("none", "auto", "face"):
        return colour
    rows: list[tuple[float, float, float, float]] = to_rgba_array(colour).tolist()
    themed = [(recolour(to_hex(row), theme), row[3]) for row in rows]
    return themed[0] if isinstance(colour, (str, tuple)) else to_rgba_array(themed)


def _map_in_theme(colormap: Colormap, theme: Theme) -> Colormap:
    if not isinstance(colormap, ListedColormap):
        return colormap
    return ListedColormap(_in_theme(to_rgba_array(colormap.colors), theme), name=colormap.name)
