"""Figures of outlier scores: histograms with a threshold, ROC curves, and comparisons of scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from penult.report import plots
from penult.report.figures import legend, new_figure, style
from penult.report.palette import LIGHT, SERIES
from penult.scores import Comparison

# Earlier versions defined these here.
from penult.scores import Separation as Separation
from penult.scores import separation as separation

__all__ = ["comparison", "roc", "spread"]

# Fraction of all scores that is clipped into the outermost bar at either end of a histogram.
_EDGE = 0.005
_BINS = 50


def roc(found: Mapping[str, Separation], size: tuple[float, float] | None = None) -> Figure:
    """Draw ROC curves: the detection rate of outliers over the false-alarm rate.

    Args:
        found: `separation` by name of the set of outliers.
        size: Width and height in CSS pixels.

    Example:
        >>> figure = roc({"noise": separation([0.1, 0.2, 0.3], [0.25, 0.8])})
    """
    figure, (axes,) = new_figure(size=size or (520, 460))
    with style():
        handles: dict[str, Artist] = {}
        # The first colour is that of familiar inputs in `spread`.
        for position, (name, measured) in enumerate(found.items(), start=1):
            colour = SERIES[position % len(SERIES)]
            (handles[name],) = axes.plot(measured.alarms, measured.hits, color=colour, clip_on=False)
        chance = axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=1.25, linestyle=(0, (4, 3)))
        handles["chance"] = chance[0]
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="false-alarm rate", ylabel="detection rate")
        axes.grid(True)
        legend(figure, handles)
    return figure


def spread(
    values: Mapping[str, Any], threshold: float | None, xlabel: str, size: tuple[float, float] | None = None
) -> Figure:
    """Draw histograms of the scores of several sets of inputs, and a threshold.

    The few most extreme scores are counted in the outermost bars.

    Args:
        values: Scores (N,) by name of the set.
        threshold: Position of a vertical line, or None for no line.
        xlabel: Label of the x axis, such as the name of the score.
        size: Width and height in CSS pixels.

    Example:
        >>> figure = spread({"familiar": [0.1, 0.2, 0.2], "noise": [0.6, 0.8]}, 0.4, "energy")
    """
    samples = {name: np.asarray(sample, dtype=float).ravel() for name, sample in values.items()}
    together = np.concatenate(list(samples.values()))
    finite = together[np.isfinite(together)]
    low, high = np.quantile(finite, [_EDGE, 1 - _EDGE]) if len(finite) else (0.0, 1.0)
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        # The limits are too close for bins between them.
        low, high = low - 1e-6 * max(abs(low), 1), high + 1e-6 * max(abs(high), 1)
    clipped = {name: np.clip(np.nan_to_num(sample), low, high) for name, sample in samples.items()}
    figure = plots.histograms(clipped, xlabel=xlabel, bins=_BINS, size=size or (680, 380))
    if threshold is not None:
        (axes,) = figure.axes
        with style():
            axes.axvline(threshold, color=LIGHT["ink"], linewidth=1.5, linestyle=(0, (4, 3)))
            shown = dict(zip((text.get_text() for text in figure.legends[0].get_texts()),
                             figure.legends[0].legend_handles, strict=True))  # fmt: skip
            shown["threshold"] = Line2D([], [], color=LIGHT["ink"], linewidth=1.5, linestyle=(0, (4, 3)))
        figure.legends.clear()
        legend(figure, {name: handle for name, handle in shown.items() if handle is not None})
    return figure


def comparison(compared: Comparison, size: tuple[float, float] | None = None) -> Figure:
    """Draw the AUROC of several scores on several sets of outliers, with two standard errors on either side.

    Args:
        compared: From `penult.scores.compare`.
        size: Width and height in CSS pixels.

    Example:
        >>> import torch, penult
        >>> h = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> compared = penult.scores.compare({"norm": lambda h: h.norm(dim=-1)}, h, {"far": 3 * h, "near": 1.5 * h})
        >>> figure = comparison(compared)
    """
    num_scores, num_sets = len(compared.separations), len(compared.sets)
    figure, (axes,) = new_figure(size=size or (680, 90 + num_sets * (24 + 16 * num_scores)))
    with style():
        handles: dict[str, Artist] = {}
        for position, (name, by_set) in enumerate(compared.separations.items()):
            height = np.arange(num_sets) + ((position + 0.5) / num_scores - 0.5) * 0.7
            areas = np.array([one.auroc for one in by_set.values()])
            errors = np.nan_to_num([2 * one.standard_error for one in by_set.values()])
            colour = SERIES[position % len(SERIES)]
            axes.hlines(height, areas - errors, areas + errors, color=colour, linewidth=1.5)
            (handles[name],) = axes.plot(areas, height, "o", color=colour, markersize=8)
        axes.axvline(0.5, color=LIGHT["muted"], linewidth=1.25, linestyle=(0, (4, 3)))
        axes.set(yticks=range(num_sets), yticklabels=compared.sets, ylim=(num_sets - 0.5, -0.5), xlabel="AUROC")
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        legend(figure, handles)
    return figure
