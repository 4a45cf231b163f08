"""House style of figures, and their output as inline SVG for a page or as PNG and SVG files.

Sizes are CSS pixels: a figure of size (600, 360) is 600 pixels wide if the screen has room for it.
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
from penult.io import _user_path
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

# The gid of figures that keep their layout on a narrow screen and scroll there.
FIXED = "fixed"

_HOUSE: dict[str, Any] = {
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 6 / 72,
    "figure.constrained_layout.w_pad": 6 / 72,
    "figure.constrained_layout.wspace": 0.05,
    "font.size": 14,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # Names of classes may contain a dollar sign.
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
    """Use the house style inside the `with` block instead of the user's rcParams, and restore these after it."""
    with matplotlib.style.context(["default", _HOUSE]):
        yield


def new_figure(
    rows: int = 1, cols: int = 1, size: tuple[float, float] | None = None, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure in the house style and its axes, row by row.

    Matplotlib's constrained layout keeps all labels inside the figure. Draw inside `with style():`, because titles and
    legends read the style when they are created.

    Args:
        rows: Number of rows of axes.
        cols: Number of columns of axes.
        size: Width and height in CSS pixels. Default: 600 x 360, or 310 x 300 for each of several axes.
        subplots: Options of `Figure.subplots`, such as `sharey=True`.

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
    """Return the width of the widest text at a font size, in CSS pixels.

    Example:
        >>> text_width(["a", "aaaa"]) == text_width(["aaaa"]) > 4 * text_width(["i"])
        True
    """
    font = FontProperties(family="DejaVu Sans", size=size)
    return max(float(text_to_path.get_text_width_height_descent(seen(text), font, False)[0]) for text in texts)


def legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """Add a legend above the axes, with as many columns as fit into the width of the figure.

    Args:
        figure: Figure made by `new_figure`.
        handles: Artists by name.
    """
    columns = max(1, int(figure.get_figwidth() * 72 / (text_width(handles, 13.5) + 50)))
    lines = -(-len(handles) // columns)
    with style():
        box = figure.legend(
            list(handles.values()), list(map(seen, handles)), loc="outside upper left", ncols=-(-len(handles) // lines)
        )
    box.set_gid("above")


def compact(figure: Figure, width: float = 400) -> Figure | None:
    """Return a copy of a figure that is laid out for a narrow screen, with text at full size.

    Returns:
        The copy, or None if the figure is narrow enough already, has no constrained layout, has several columns of
        axes, or has the gid `FIXED`, such as a heat map with numbers in its cells.
    """
    free = isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine) and figure.get_gid() != FIXED
    if not free or is_narrow(figure, width):
        return None
    figure = _copied(figure)
    figure.set_figwidth(width / 72)
    for box in [box for box in figure.legends if box.get_gid() == "above"]:
        figure.legends.remove(box)
        pairs = zip(box.get_texts(), box.legend_handles, strict=True)
        legend(figure, {text.get_text(): handle for text, handle in pairs if handle is not None})
    return figure


def is_narrow(figure: Figure, width: float = 400) -> bool:
    """Return whether a figure is at most 15 % wider than `width`, so that it stays readable when scaled down."""
    return bool(figure.get_figwidth() * 72 <= 1.15 * width)


def svg(figure: Figure | str, alt: str, prefix: str = "figure") -> str:
    """Convert a figure to an SVG element for an HTML page, in the colours of the page's theme.

    Colours of the house style become CSS variables such as `var(--series-1)`, with the colour of the light theme as
    the fallback. Text stays text, in the font of the page. The same figure gives the same bytes.

    Args:
        figure: A matplotlib figure, or an SVG document as text.
        alt: One sentence that describes the picture to readers who cannot see it.
        prefix: Prefix of all ids, so that two pictures can share a page.

    Raises:
        ValueError: `alt` is empty, or the document contains anything but drawing elements.

    Example:
        >>> figure, (axes,) = new_figure()
        >>> svg(figure, alt="An empty plot")[:56]
        '<svg class="chart" role="img" aria-label="An empty plot"'
    """
    return inline.clean(figure if isinstance(figure, str) else _document(figure), alt, prefix)


def save(figure: Figure, path: str | Path, theme: Theme = "light", scale: float = 2) -> Path:
    """Write a figure to a `.png` or `.svg` file in one theme, with a solid background, and return its path.

    Args:
        figure: Figure in the house style.
        path: Path of the file; its suffix selects the format.
        theme: "light" or "dark".
        scale: Pixels of a PNG for each CSS pixel of the figure.

    Raises:
        ValueError: The suffix is neither `.png` nor `.svg`.
    """
    path = _user_path(path)
    if path.suffix.lower() == ".svg":
        data = inline.clean(_document(figure), alt=path.stem, prefix="figure", theme=theme).encode()
    elif path.suffix.lower() == ".png":
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
        raise ValueError(f"the suffix of {path.name!r} is {path.suffix!r}; expected .png or .svg")
    return io.write_bytes(path, data)


def _document(figure: Figure) -> str:
    buffer = StringIO()
    with style():
        # The constrained layout settles only at the second drawing.
        figure.draw_without_rendering()
        figure.savefig(buffer, format="svg", dpi=72, transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _copied(figure: Figure) -> Figure:
    """Return a deep copy of a figure."""
    canvas = figure.canvas
    # A canvas without a window: the copy of a canvas with a window would open another window.
    FigureCanvasBase(figure)
    try:
        return copy.deepcopy(figure)
    finally:
        figure.set_canvas(canvas)


def _recoloured(figure: Figure, theme: Theme) -> Figure:
    """Return a copy of a figure with all colours in a theme."""
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
    """Return a colour or rows of colours of an artist in a theme, with the same opacity."""
    if isinstance(colour, str) and colour in ("none", "auto", "face"):
        return colour
    rows: list[tuple[float, float, float, float]] = to_rgba_array(colour).tolist()
    themed = [(recolour(to_hex(row), theme), row[3]) for row in rows]
    return themed[0] if isinstance(colour, (str, tuple)) else to_rgba_array(themed)


def _map_in_theme(colormap: Colormap, theme: Theme) -> Colormap:
    if not isinstance(colormap, ListedColormap):
        return colormap
    return ListedColormap(_in_theme(to_rgba_array(colormap.colors), theme), name=colormap.name)
