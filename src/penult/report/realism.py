"""Figures and tables of the results of `penult.realism`, and of real and sampled activations in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from penult._checks import integer_labels
from penult.realism import Ranking, Realism, Spread
from penult.report import plots
from penult.report.figures import legend, new_figure, style
from penult.report.markup import number, seen, shorten
from penult.report.palette import LIGHT, SERIES

__all__ = ["aucs", "cosines", "norms", "principal_components", "ranking", "ranking_table"]

_PAIR, _REAL = "pair against real", "real against real"
# With more classes than `ALL_COLOURED`, only the `MOST_COLOURED` most frequent ones have a colour.
ALL_COLOURED, MOST_COLOURED = 10, 8
_LETTERS = 14


def aucs(result: Realism, size: tuple[float, float] | None = None) -> Figure:
    """Draw the AUC of each classifier test: pair against real activations, and real against other real activations.

    Args:
        result: Result of `penult.realism.compare`. Values of separate classes are averaged if the result has them.
        size: Width and height in CSS pixels.

    Example:
        >>> head = penult.Head(3 * torch.eye(3))
        >>> h, y = penult.GenerativePair(head, penult.Sphere(2.0)).sample((400,))
        >>> figure = aucs(penult.realism.compare(penult.GenerativePair(head, penult.Sphere(2.0)), h, y))
    """
    both = {_PAIR: result.comparison, _REAL: result.real_comparison}
    values = {test: {name: comparison.auc[test] for name, comparison in both.items()} for test in result.auc}
    errors = {test: {name: comparison.auc_error[test] for name, comparison in both.items()} for test in result.auc}
    figure = plots.bars(values, errors, xlabel="AUC (0.5: cannot be told apart)", number=".3f", size=size)
    (axes,) = figure.axes
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.axvline(0.5, color=LIGHT["ink"], linewidth=1.25, linestyle=(0, (4, 3)), zorder=3)
    return figure


def cosines(result: Realism, size: tuple[float, float] | None = None) -> Figure:
    """Draw histograms of the cosine between activations and the row of their class, real and sampled.

    Args:
        result: Result of `penult.realism.compare`. For a sphere, cosines are in its coordinates.
        size: Width and height in CSS pixels.

    Raises:
        ValueError: The result has no histogram.
    """
    if result.chart_cosine is not None:
        return _histogram(result.chart_cosine, "cosine of h and w_y, in the coordinates of the sphere", size)
    return _histogram(result.cosine, "cosine of h and w_y", size)


def norms(result: Realism, size: tuple[float, float] | None = None) -> Figure:
    """Draw histograms of the norm of activations, real and sampled.

    Args:
        result: Result of `penult.realism.compare`.
        size: Width and height in CSS pixels.

    Raises:
        ValueError: The result has no histogram.
    """
    return _histogram(result.norm, "norm of h", size)


def principal_components(
    real: Tensor,
    labels: Tensor,
    sampled: Tensor,
    sampled_labels: Tensor,
    names: Sequence[str],
    titles: tuple[str, str] = ("real", "sampled"),
) -> Figure:
    """Draw real and sampled activations along the two leading principal components of the real ones.

    With more than 10 classes, only the 8 that are most frequent in `labels` have a colour.

    Args:
        real: Real activations (N, d).
        labels: Classes (N,) of the real activations.
        sampled: Sampled activations (M, d).
        sampled_labels: Classes (M,) of the sampled activations.
        names: K names of classes.
        titles: Titles of the two panels.

    Example:
        >>> h, y = penult.GenerativePair(penult.Head(3 * torch.eye(3))).sample((40,))
        >>> figure = principal_components(h[:20], y[:20], h[20:], y[20:], ["cat", "dog", "bird"])
    """
    real, sampled = real.detach().cpu().double(), sampled.detach().cpu().double()
    centre = real.mean(0)
    axes = torch.linalg.svd(real - centre, full_matrices=False).Vh[:2].T
    # One-dimensional activations have one component only; the second coordinate is zero.
    planes = [F.pad((h - centre) @ axes, (0, 2 - axes.shape[1])) for h in (real, sampled)]
    all_coloured = len(names) <= ALL_COLOURED
    classes, sampled_classes = (integer_labels(y, num_classes=len(names)).cpu() for y in (labels, sampled_labels))
    counts = torch.bincount(classes, minlength=len(names))
    num_coloured = len(names) if all_coloured else MOST_COLOURED
    coloured = counts.argsort(descending=True, stable=True)[:num_coloured].sort().values
    colour_index = torch.full((len(names),), -1, device="cpu")
    colour_index[coloured] = torch.arange(len(coloured), device="cpu")
    return plots.scatter(
        planes[0],
        colour_index[classes],
        [shorten(names[y], _LETTERS) for y in coloured.tolist()],
        second=(planes[1], colour_index[sampled_classes]),
        titles=titles,
        rest="" if all_coloured else "other classes",
    )


def ranking(found: Ranking, size: tuple[float, float] | None = None) -> Figure:
    """Draw the AUC of each candidate base over the number of values that it stores; low and left is best.

    The marker of the recommended candidate is filled. The line is the AUC of real activations against other real ones.
    Candidates that failed are left out.

    Args:
        found: Result of `penult.realism.choose`.
        size: Width and height in CSS pixels.
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
        # Plain numbers: matplotlib's default for log scales is a formula.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda floats, _: f"{floats:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="numbers stored by the base", ylabel="AUC of the best classifier")
        costs = [float(row.floats or 1) for row in rows]
        axes.set_xlim(min(costs) / 2.5, max(costs) * 4)
        axes.set_ylim(0.47, 1.03)
        _write_names(axes, {row.name: (float(row.floats or 1), 0.5 + row.distance) for row in rows}, floor)
        legend(figure, {_REAL: line})
    return figure


def ranking_table(result: Ranking) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table of candidates; the last row is real against other real activations.

    Candidates that failed are left out.

    Args:
        result: Result of `penult.realism.choose`.
    """
    tests = list(result.real.auc)
    rows = [
        [row.name, *(f"{row.auc[test]:.3f}" for test in tests), number(row.energy, ".4f"), f"{row.floats:,}"]
        for row in result.rows
        if row.error is None and row.energy is not None
    ]
    rows.append([_REAL, *(f"{result.real.auc[test]:.3f}" for test in tests), number(result.real.energy, ".4f"), ""])
    return ["base", *(f"AUC {test}" for test in tests), "energy coefficient", "numbers stored"], rows


def _write_names(axes: Axes, points: dict[str, tuple[float, float]], floor: float) -> None:
    """Write names next to points: to the right, or above or below if another point or the line is near."""
    span = np.log10(axes.get_xlim()[1] / axes.get_xlim()[0])
    for name, (x, y) in points.items():
        others = [(np.log10(a / x) / span, b - y) for other, (a, b) in points.items() if other != name]
        crowded = any(0 <= dx < 0.05 + 0.02 * len(name) and abs(dy) < 0.05 for dx, dy in others)
        up = y < 0.75
        position: dict[str, Any] = {"xytext": (12, 0), "ha": "left", "va": "center"}
        if crowded or y - floor < 0.03:
            position = {"xytext": (0, 12 if up else -12), "ha": "center", "va": "bottom" if up else "top"}
        axes.annotate(seen(name), (x, y), textcoords="offset points", fontsize=13, **position)


def _histogram(spread: Spread, xlabel: str, size: tuple[float, float] | None) -> Figure:
    if spread.histogram is None:
        raise ValueError("the result has no histogram; run penult.realism.compare again")
    edges = np.asarray(spread.histogram.edges)
    figure, (axes,) = new_figure(size=size)
    with style():
        handles: dict[str, Artist] = {}
        for colour, (name, counts) in zip(SERIES, spread.histogram.counts.items(), strict=False):
            heights = np.asarray(counts) / (np.sum(counts) * np.diff(edges))
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.3)
            axes.stairs(heights, edges, color=colour, alpha=0.55, linewidth=1)
            label = "sampled" if name == "drawn" else name
            handles[label] = Patch(facecolor=colour, edgecolor=colour, alpha=0.4)
        axes.set(xlabel=xlabel, ylabel="density", xlim=(edges[0], edges[-1]))
        axes.set_ylim(bottom=0)
        if spread.law_mean is not None:
            mean_line = axes.axvline(spread.law_mean, color=LIGHT["muted"], linewidth=1.5)
            handles["exact mean under the pair"] = mean_line
        legend(figure, handles)
    return figure
