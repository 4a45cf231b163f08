"""Figures of how close pairs come to real activations: what `penult.realism` measured, in the house style."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from penult.realism import Ranking, Realism, Spread
from penult.report import plots
from penult.report.figures import legend, new_figure, style
from penult.report.markup import seen
from penult.report.palette import LIGHT, SERIES

__all__ = ["aucs", "cosines", "norms", "ranking"]

_PAIR, _REAL = "pair against real", "real against real"


def aucs(result: Realism, size: tuple[float, float] | None = None) -> Figure:
    """Draw the AUC of each classifier test, the pair's beside that of real activations against other real ones.

    Args:
        result: from `penult.realism.compare`; class by class where it has that, else all classes together.
        size: width and height in CSS pixels.

    Example:
        >>> head = penult.Head(3 * torch.eye(3))
        >>> h, y = penult.GenerativePair(head, penult.Sphere(2.0)).sample((400,))
        >>> figure = aucs(penult.realism.compare(penult.GenerativePair(head, penult.Sphere(2.0)), h, y))
    """
    both = {_PAIR: result.comparison, _REAL: result.real_comparison}
    values = {test: {name: found.auc[test] for name, found in both.items()} for test in result.auc}
    errors = {test: {name: found.auc_error[test] for name, found in both.items()} for test in result.auc}
    figure = plots.bars(values, errors, xlabel="AUC, 0.5 where they can't be told apart", number=".3f", size=size)
    (axes,) = figure.axes
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.axvline(0.5, color=LIGHT["ink"], linewidth=1.25, linestyle=(0, (4, 3)), zorder=3)
    return figure


def cosines(result: Realism, size: tuple[float, float] | None = None) -> Figure:
    """Draw the law of the cosine of activations to the row of their class, real and drawn.

    Args:
        result: from `penult.realism.compare`; in the chart of the base where that is a sphere.
        size: width and height in CSS pixels.

    Raises:
        ValueError: the result bears no histogram.
    """
    if result.chart_cosine is not None:
        return _histogram(result.chart_cosine, "cosine of h to w_y, in the sphere's chart", size)
    return _histogram(result.cosine, "cosine of h to w_y", size)


def norms(result: Realism, size: tuple[float, float] | None = None) -> Figure:
    """Draw the law of the norm of activations, real and drawn.

    Args:
        result: from `penult.realism.compare`.
        size: width and height in CSS pixels.

    Raises:
        ValueError: the result bears no histogram.
    """
    return _histogram(result.norm, "norm of h", size)


def ranking(found: Ranking, size: tuple[float, float] | None = None) -> Figure:
    """Draw what each candidate costs, in floats, against how well it is told apart; low and left is best.

    The recommended one is filled; the line is what real activations get against other real ones. Candidates that
    failed are left out.

    Args:
        found: from `penult.realism.choose`.
        size: width and height in CSS pixels.
    """
    rows = [row for row in found.rows if row.error is None and row.floats]
    figure, (axes,) = new_figure(size=size or (600, 400))
    with style():
        floor = max(found.real.auc[found.real.worst], 0.5)
        line = axes.axhline(floor, color=LIGHT["muted"], linewidth=1.5, linestyle=(0, (4, 3)))
        for row in rows:
            best = row.name == found.best
            axes.plot(
                float(row.floats or 1),
                0.5 + row.distance,
                marker="o",
                markersize=11,
                linestyle="none",
                color=SERIES[0] if best else LIGHT["paper"],
                markeredgecolor=SERIES[0],
                markeredgewidth=2,
                clip_on=False,
                zorder=3,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda floats, _: f"{floats:,.0f}"))  # and no formula
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="floats that the base keeps", ylabel="AUC of the best test")
        costs = [float(row.floats or 1) for row in rows]
        axes.set_xlim(min(costs) / 2.5, max(costs) * 4)
        axes.set_ylim(0.47, 1.03)
        _names(axes, {row.name: (float(row.floats or 1), 0.5 + row.distance) for row in rows}, floor)
        legend(figure, {_REAL: line})
    return figure


def _names(axes: Axes, points: dict[str, tuple[float, float]], floor: float) -> None:
    """Write names beside points: to the right, or above or below where another point or the line is near."""
    span = np.log10(axes.get_xlim()[1] / axes.get_xlim()[0])
    for name, (x, y) in points.items():
        others = [(np.log10(a / x) / span, b - y) for other, (a, b) in points.items() if other != name]
        crowded = any(0 <= dx < 0.05 + 0.02 * len(name) and abs(dy) < 0.05 for dx, dy in others)
        up = y < 0.75
        place: dict[str, Any] = {"xytext": (12, 0), "ha": "left", "va": "center"}
        if crowded or y - floor < 0.03:
            place = {"xytext": (0, 12 if up else -12), "ha": "center", "va": "bottom" if up else "top"}
        axes.annotate(seen(name), (x, y), textcoords="offset points", fontsize=13, **place)


def _histogram(spread: Spread, xlabel: str, size: tuple[float, float] | None) -> Figure:
    if spread.histogram is None:
        raise ValueError("this result bears no histogram; compare again")
    edges = np.asarray(spread.histogram.edges)
    figure, (axes,) = new_figure(size=size)
    with style():
        handles: dict[str, Artist] = {}
        for colour, (name, counts) in zip(SERIES, spread.histogram.counts.items(), strict=False):
            heights = np.asarray(counts) / (np.sum(counts) * np.diff(edges))
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.3)
            axes.stairs(heights, edges, color=colour, alpha=0.55, linewidth=1)
            handles[name] = Patch(facecolor=colour, edgecolor=colour, alpha=0.4)
        axes.set(xlabel=xlabel, ylabel="density", xlim=(edges[0], edges[-1]))
        axes.set_ylim(bottom=0)
        if spread.law_mean is not None:
            handles["mean of the exact law"] = axes.axvline(spread.law_mean, color=LIGHT["muted"], linewidth=1.5)
        legend(figure, handles)
    return figure
