"""Figures of outlier scores: how they are spread, and how well they part strange inputs from familiar ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from penult._extras import extra
from penult.report import plots
from penult.report.figures import legend, new_figure, style
from penult.report.palette import LIGHT, SERIES

__all__ = ["Separation", "roc", "separation", "spread"]

_EDGE = 0.005  # share of all scores beyond either end of a histogram, which its outermost bars hold
_BINS = 50


@dataclass(frozen=True)
class Separation:
    """How well a score parts one set of strange inputs from familiar ones.

    Attributes:
        auroc: The probability that a strange input has a higher score than a familiar one; 0.5 is chance.
        fpr95: The share of strange inputs that pass for familiar where 95 % of familiar ones do.
        alarms: Shares of familiar inputs that are called strange, along the ROC curve.
        hits: Shares of strange inputs that are called so there.
    """

    auroc: float
    fpr95: float
    alarms: npt.NDArray[np.float64]
    hits: npt.NDArray[np.float64]


def separation(familiar: Any, strange: Any) -> Separation:
    """Measure how well scores part strange inputs from familiar ones, with scikit-learn (extra ``data``).

    Args:
        familiar: (N,) scores, higher for stranger inputs; infinite ones count as beyond all others.
        strange: (M,) scores.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: There are none of either kind, or some are NaN.

    Example:
        >>> found = separation([0.1, 0.2, 0.3, 0.4], [0.35, 0.8])
        >>> found.auroc, found.fpr95
        (0.875, 0.5)
    """
    metrics = extra("sklearn.metrics", "areas under ROC curves are measured by scikit-learn")
    sides = [np.asarray(each, dtype=float).ravel() for each in (familiar, strange)]
    for name, each in zip(("familiar", "strange"), sides, strict=True):
        if not len(each) or np.isnan(each).any():
            raise ValueError(f"there are {len(each)} scores of {name} inputs, {int(np.isnan(each).sum())} of them NaN")
    truth = np.repeat([0, 1], [len(each) for each in sides])
    scores = np.nan_to_num(np.concatenate(sides))  # infinite ones become the largest numbers
    alarms, hits, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    kept = 1 - alarms >= 0.95 - 1e-12
    return Separation(float(metrics.roc_auc_score(truth, scores)), float(1 - hits[kept].max()), alarms, hits)


def roc(found: Mapping[str, Separation], size: tuple[float, float] | None = None) -> Figure:
    """Draw ROC curves: what a threshold finds of strange inputs, over what it costs in false alarms.

    Args:
        found: name of a set to its `separation`.
        size: width and height in CSS pixels.

    Example:
        >>> figure = roc({"noise": separation([0.1, 0.2, 0.3], [0.25, 0.8])})
    """
    figure, (axes,) = new_figure(size=size or (520, 460))
    with style():
        handles: dict[str, Artist] = {}
        for position, (name, each) in enumerate(found.items(), start=1):  # familiar inputs have the first colour
            (handles[name],) = axes.plot(each.alarms, each.hits, color=SERIES[position % len(SERIES)], clip_on=False)
        chance = axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=1.25, linestyle=(0, (4, 3)))
        handles["chance"] = chance[0]
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="familiar inputs called strange", ylabel="strange inputs found")
        axes.grid(True)
        legend(figure, handles)
    return figure


def spread(
    values: Mapping[str, Any], threshold: float | None, xlabel: str, size: tuple[float, float] | None = None
) -> Figure:
    """Draw how scores of several sets are spread, and the threshold above which an input is called strange.

    Few scores that lie far out are counted in the outermost bars.

    Args:
        values: name of a set to its (N,) scores.
        threshold: where the line stands, or None for no line.
        xlabel: what the score is.
        size: width and height in CSS pixels.

    Example:
        >>> figure = spread({"familiar": [0.1, 0.2, 0.2], "noise": [0.6, 0.8]}, 0.4, "energy")
    """
    samples = {name: np.asarray(each, dtype=float).ravel() for name, each in values.items()}
    together = np.concatenate(list(samples.values()))
    finite = together[np.isfinite(together)]
    low, high = np.quantile(finite, [_EDGE, 1 - _EDGE]) if len(finite) else (0.0, 1.0)
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # too close for bins between them
        low, high = low - 1e-6 * max(abs(low), 1), high + 1e-6 * max(abs(high), 1)
    clipped = {name: np.clip(np.nan_to_num(each), low, high) for name, each in samples.items()}
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
