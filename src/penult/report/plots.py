"""General figures in the house style, from arrays or tensors.

Each function returns a matplotlib Figure, whose `axes` can be adjusted. Colours follow the order of the names. Legends
are above the axes and never cover data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from penult.report.figures import FIXED, legend, new_figure, style, text_width
from penult.report.markup import number as formatted
from penult.report.markup import seen
from penult.report.palette import DIVERGING, LEVELS, LIGHT, SEQUENTIAL, SERIES, STRONG

__all__ = ["bars", "curves", "heatmap", "histogram_panels", "histograms", "image_grid", "scatter"]

# Marker shapes, with the scale at which each looks as large as a disc.
_MARKERS = {"o": 1, "s": 0.9, "^": 1.1, "D": 0.82, "v": 1.1, "P": 1.2, "X": 1.2, "<": 1.1, ">": 1.1, "h": 1.1}


def curves(
    x: Any,
    ys: Mapping[str, Any],
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, tuple[Any, Any]] | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw curves over a common x.

    Args:
        x: Positions (N,).
        ys: Values (N,) by name. Lines are dashed from the sixth on.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.
        bands: Lower and upper curve (N,) by name; the area between them is shaded in the colour of that name.
        size: Width and height in CSS pixels.

    Example:
        >>> figure = curves([1, 2, 3], {"student": [.7, .8, .85]}, "epoch", "accuracy")
        >>> figure.axes[0].set_ylim(0, 1)
        (0.0, 1.0)
    """
    figure, (axes,) = new_figure(size=size)
    with style():
        handles: dict[str, Artist] = {}
        for position, (name, y) in enumerate(ys.items()):
            dashes = "-" if position % 10 < 5 else (0, (4, 1.6))
            (handles[name],) = axes.plot(_array(x), _array(y), color=_colour(position), linestyle=dashes)
            if bands and name in bands:
                low, high = bands[name]
                axes.fill_between(
                    _array(x), _array(low), _array(high), color=_colour(position), alpha=0.16, linewidth=0
                )
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.margins(x=0.01)
        legend(figure, handles)
    return figure


def histograms(
    values: Mapping[str, Any],
    densities: Mapping[str, tuple[Any, Any]] | None = None,
    xlabel: str = "",
    density_label: str = "exact density",
    bins: int | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw normalized histograms of samples over common bins, with the density curves that they should follow.

    Args:
        values: Samples (N,) by name.
        densities: Positions (M,) and densities (M,) by name. A curve with the name of a histogram has its colour; any
            other curve has a colour and a legend entry of its own.
        xlabel: Label of the x axis.
        density_label: Legend entry of all curves that have the name of a histogram.
        bins: Number of bins. Default: chosen from the data, at most 80.
        size: Width and height in CSS pixels.

    Example:
        >>> figure = histograms({"draws": [0.1, 0.4, 0.5, 0.9]}, {"draws": ([0, 1], [1, 1])}, "u", bins=4)
    """
    samples = {name: _array(sample).ravel() for name, sample in values.items()}
    densities = densities or {}
    together = np.concatenate(list(samples.values()))
    natural = len(np.histogram_bin_edges(together, "auto")) - 1
    edges = np.histogram_bin_edges(together, bins or min(natural, 80))
    figure, (axes,) = new_figure(size=size)
    with style():
        handles: dict[str, Artist] = {}
        for position, (name, sample) in enumerate(samples.items()):
            colour = _colour(position)
            heights, _ = np.histogram(sample, edges, density=True)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.3)
            axes.stairs(heights, edges, color=colour, alpha=0.55, linewidth=1)
            handles[name] = Patch(facecolor=colour, edgecolor=colour, alpha=0.4)
        for name, (x, y) in densities.items():
            position = list(dict.fromkeys([*samples, *densities])).index(name)
            (line,) = axes.plot(_array(x), _array(y), color=_colour(position))
            if name in samples:
                handles[density_label] = Line2D([], [], color=LIGHT["muted"])
            else:
                handles[name] = line
        axes.set(xlabel=xlabel, ylabel="density", xlim=(edges[0], edges[-1]))
        axes.set_ylim(bottom=0)
        legend(figure, handles)
    return figure


def histogram_panels(
    panels: Mapping[str, tuple[Any, tuple[Any, Any]]],
    xlabel: str,
    names: tuple[str, str],
    bins: int = 40,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw panels side by side, each with the histogram of a sample and the density that it should follow.

    Args:
        panels: For each title a sample (N,), and the positions (M,) and values (M,) of a density.
        xlabel: Label of the x axes.
        names: Legend entries of the histograms and of the densities.
        bins: Number of bins.
        size: Width and height in CSS pixels.

    Example:
        >>> uniform = [0, 1], [1, 1]
        >>> panels = {"few": ([0.2, 0.9], uniform), "more": ([0.1, 0.4, 0.5, 0.9], uniform)}
        >>> figure = histogram_panels(panels, "u", ("sample", "density"))
    """
    figure, all_axes = new_figure(1, len(panels), size=size or (470 * len(panels), 340))
    with style():
        handles: dict[str, Artist] = {}
        for axes, (title, (sample, (x, y))) in zip(all_axes, panels.items(), strict=True):
            axes.hist(_array(sample).ravel(), bins, density=True, color=_colour(0), alpha=0.55)
            (line,) = axes.plot(_array(x), _array(y), color=_colour(1))
            axes.set_title(title)
            axes.set_xlabel(xlabel)
            handles = {names[0]: axes.patches[0], names[1]: line}
        all_axes[0].set_ylabel("density")
        legend(figure, handles)
    return figure


def bars(
    values: Mapping[str, float | Mapping[str, float]],
    errors: Mapping[str, float | Mapping[str, float]] | None = None,
    xlabel: str = "",
    number: str = ".3g",
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw horizontal bars or groups of bars, with their values as numbers.

    Args:
        values: Value by name, or for groups of bars a mapping of series to value by name.
        errors: Half the lengths of error bars, in the same form.
        xlabel: Label of the x axis.
        number: Format of the numbers.
        size: Width and height in CSS pixels.

    Example:
        >>> figure = bars({"Sphere": .91, "Marginal": .98}, errors={"Sphere": .01}, xlabel="AUROC")
        >>> figure = bars({"MNIST": {"ours": .93, "Hinton": .92}, "USPS": {"ours": .88, "Hinton": .81}})
    """
    groups, spreads = _grouped(values), _grouped(errors or {})
    series = list(dict.fromkeys(key for group in groups.values() for key in group))
    size = size or (600, 70 + len(groups) * (14 + 24 * len(series)) + 30 * (len(series) > 1))
    thick = 0.72 / len(series)
    ends = [0.0]
    figure, (axes,) = new_figure(size=size)
    with style():
        for row, (name, group) in enumerate(groups.items()):
            for key, value in group.items():
                position, spread = series.index(key), spreads.get(name, {}).get(key, 0.0)
                y = row + (position - (len(series) - 1) / 2) * thick
                axes.barh(y, value, height=thick * 0.86, color=_colour(position))
                if spread:
                    axes.errorbar(value, y, xerr=spread, color=LIGHT["ink"], elinewidth=1.4, capsize=3)
                ends += [value - spread, value + spread]
                axes.annotate(
                    formatted(value, number),
                    (max(value + spread, 0), y),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=13,
                )
        axes.set_xlim(1.04 * min(ends), max(ends) or None)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_yticks(range(len(groups)), [fill(seen(name), 22) for name in groups])
        axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.axvline(0, color=LIGHT["muted"], linewidth=1)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(xlabel)
        if len(series) > 1:
            legend(figure, {key: Patch(facecolor=_colour(position)) for position, key in enumerate(series)})
    return figure


def _grouped(values: Mapping[str, float | Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return values as groups: a single value becomes a group with one series."""
    groups = {name: value if isinstance(value, Mapping) else {"": value} for name, value in values.items()}
    return {name: {series: float(value) for series, value in group.items()} for name, group in groups.items()}


def heatmap(
    matrix: Any,
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    annotate: bool = True,
    number: str = ".2f",
    diverging: bool = False,
    xlabel: str = "",
    ylabel: str = "",
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw a matrix as coloured cells, with numbers in the cells or with a colour bar.

    Args:
        matrix: Values (R, C).
        row_labels: R names.
        col_labels: C names.
        annotate: Whether numbers are written into the cells.
        number: Format of the numbers.
        diverging: Whether zero is neutral, with blue below and orange above. Default: from light to dark.
        xlabel: Label of the columns.
        ylabel: Label of the rows.
        size: Width and height in CSS pixels. Default: from the number of cells.

    Raises:
        ValueError: The number of labels differs from the number of rows or columns.

    Example:
        >>> figure = heatmap([[0.9, 0.1], [0.2, 0.8]], ["cat", "dog"], ["cat", "dog"], xlabel="predicted")
    """
    cells = _array(matrix)
    rows, columns = len(row_labels), len(col_labels)
    if cells.shape != (rows, columns):
        raise ValueError(f"{rows} row labels and {columns} column labels don't fit a matrix {cells.shape}")
    colours = DIVERGING if diverging else SEQUENTIAL
    high = float(np.nanmax(np.abs(cells) if diverging else cells))
    low = -high if diverging else float(np.nanmin(cells))
    wide, tall = (52.0, 38.0) if annotate else (max(4.0, 420 / columns),) * 2
    across = text_width(col_labels)
    steep = across + 8 > columns * wide / max(1, sum(map(bool, col_labels)))
    right, below = (0 if annotate else 70), (across * 0.75 if steep else 20)
    figure, (axes,) = new_figure(
        size=size or (60 + columns * wide + text_width(row_labels) + right, 60 + rows * tall + below)
    )
    if annotate:
        figure.set_gid(FIXED)
    with style():
        mesh = axes.pcolormesh(cells, cmap=colours, vmin=low, vmax=high, edgecolor="face", linewidth=1)
        if max(rows, columns) <= 24:
            mesh.set(edgecolor=LIGHT["paper"], linewidth=1.5)
        axes.set_xticks(np.arange(columns) + 0.5, list(map(seen, col_labels)))
        axes.set_yticks(np.arange(rows) + 0.5, list(map(seen, row_labels)))
        if steep:
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="right", rotation_mode="anchor")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if annotate:
            for (row, column), value in np.ndenumerate(cells):
                if np.isfinite(value):
                    level = min(int((value - low) / (high - low or 1) * LEVELS), LEVELS - 1)
                    ink = LIGHT["on-high" if level in STRONG[colours.name] else "on-low"]
                    text = formatted(value, number)
                    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=13, color=ink)
        else:
            bar = figure.colorbar(mesh, shrink=0.8, aspect=24, pad=0.02)
            bar.outline.set_visible(False)
            bar.ax.grid(False)
    return figure


def scatter(
    points: Any,
    labels: Any,
    names: Sequence[str],
    second: tuple[Any, Any] | None = None,
    titles: tuple[str, str] = ("real", "synthetic"),
    size: tuple[float, float] | None = None,
    rest: str = "",
) -> Figure:
    """Draw labelled points in the plane, optionally next to a second set of points with the same axis limits.

    Args:
        points: Positions (N, 2).
        labels: Classes (N,) from 0 to K-1; with `rest`, also -1.
        names: K names.
        second: Positions and labels of a second set of points.
        titles: Titles of the two panels.
        rest: Legend entry of the points with label -1, which are drawn small and pale behind the others.
        size: Width and height in CSS pixels.

    Example:
        >>> figure = scatter([[0, 0], [1, 1]], [0, 1], ["cat", "dog"], second=([[0, 1]], [0]))
    """
    sets = [(points, labels)] if second is None else [(points, labels), second]
    pairs = [(_array(positions), _array(classes)) for positions, classes in sets]
    figure, panels = new_figure(1, len(pairs), size=size or ((560, 520) if second is None else (940, 520)))
    together = np.concatenate([positions for positions, _ in pairs])
    middle, half = (together.max(0) + together.min(0)) / 2, np.ptp(together, axis=0).max() * 0.54
    limits = [(centre - half, centre + half) for centre in middle]
    with style():
        handles: dict[str, Artist] = {}
        for axes, title, (positions, classes) in zip(panels, titles, pairs, strict=False):
            if rest:
                x, y = positions[classes == -1].T
                axes.plot(x, y, color=LIGHT["muted"], marker="o", linestyle="none", markersize=3, markeredgewidth=0)
                axes.get_lines()[-1].set_alpha(0.35)
            for class_index, name in enumerate(names):
                x, y = positions[classes == class_index].T
                marker, scale = list(_MARKERS.items())[class_index % len(_MARKERS)]
                handles[name] = Line2D([], [], color=_colour(class_index), marker=marker, linestyle="none")
                handles[name].set(markersize=8 * scale, markeredgewidth=0)
                (dots,) = axes.plot(x, y, color=_colour(class_index), marker=marker, linestyle="none")
                dots.set(markersize=5 * scale, markeredgewidth=0, alpha=0.6)
            axes.set(aspect="equal", anchor="NW", xticks=[], yticks=[], xlim=limits[0], ylim=limits[1])
            axes.spines[:].set(visible=True, color=LIGHT["line"])
            if second is not None:
                axes.set_title(title)
        if rest:
            handles[rest] = Line2D([], [], color=LIGHT["muted"], marker="o", linestyle="none", markeredgewidth=0)
            handles[rest].set(markersize=5, alpha=0.5)
        legend(figure, handles)
    return figure


def image_grid(
    images: Any,
    columns: int,
    captions: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    cell: float = 64,
) -> Figure:
    """Draw images in rows, without interpolation between pixels.

    Args:
        images: (N, H, W) or (N, H, W, 3); floats from 0 to 1, or uint8.
        columns: Number of images in a row.
        captions: N short texts below the images.
        row_labels: Texts to the left of the rows.
        cell: Width of an image in CSS pixels.

    Raises:
        ValueError: The array has another shape.

    Example:
        >>> figure = image_grid([[[0.0, 1.0], [1.0, 0.0]]] * 3, columns=3, captions=["a", "b", "c"])
    """
    pixels = _array(images)
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] != 3) or not len(pixels):
        raise ValueError(f"image_grid needs images of shape (N, H, W) or (N, H, W, 3) with N >= 1, not {pixels.shape}")
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.dtype.kind == "f":
        pixels = np.clip(pixels, 0, 1)
    rows = -(-len(pixels) // columns)
    tall = cell * pixels.shape[1] / pixels.shape[2]
    across, down = cell + 8, tall + (26 if captions else 8)
    left = text_width(row_labels) + 14 if row_labels else 0
    width, height = left + columns * across, rows * down
    figure, (axes,) = new_figure(size=(width, height))
    with style():
        figure.set_layout_engine(None)
        axes.set_position((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        for position, image in enumerate(pixels):
            x, y = left + position % columns * across, position // columns * down
            axes.imshow(image, extent=(x, x + cell, y + tall, y), interpolation="none", aspect="auto")
            if captions:
                axes.text(x + cell / 2, y + tall + 5, seen(captions[position]), ha="center", va="top", fontsize=13)
        for row, label in enumerate(row_labels or ()):
            axes.text(left - 12, row * down + tall / 2, seen(label), ha="right", va="center", fontsize=13)
        axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def _array(values: Any) -> npt.NDArray[Any]:
    """Return values as a numpy array; tensors are detached, moved to the CPU and converted to a dtype of numpy."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _colour(position: int) -> str:
    """Return the series colour of a position."""
    return SERIES[position % len(SERIES)]
