"""Figures of outlier scores: histograms with a threshold, and ROC curves."""

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

# Fraction of all scores that is clipped into the outermost bar at either end of a histogram.
_EDGE = 0.005
_BINS = 50


@dataclass(frozen=True)
class Separation:
    """How well a score separates outliers from familiar inputs.

    Attributes:
        auroc: Probability that an outlier has a higher score than a familiar input; 0.5 is chance.
        fpr95: Fraction of outliers below the threshold that 95 % of familiar inputs are below.
        alarms: Fractions of familiar inputs above the threshold (false-alarm rates), along the ROC curve.
        hits: Fractions of outliers above the threshold (detection rates), along the ROC curve.
    """

    auroc: float
    fpr95: float
    alarms: npt.NDArray[np.float64]
    hits: npt.NDArray[np.float64]


def separation(familiar: Any, strange: Any) -> Separation:
    """Measure how well a score separates outliers from familiar inputs, with scikit-learn (extra ``data``).

    Args:
        familiar: Scores (N,) of familiar inputs; higher means more unusual. Infinite scores are allowed.
        strange: Scores (M,) of outliers.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: One of the two is empty or contains NaN.

    Example:
        >>> measured = separation([0.1, 0.2, 0.3, 0.4], [0.35, 0.8])
        >>> measured.auroc, measured.fpr95
        (0.875, 0.5)
    """
    metrics = extra("sklearn.metrics", "areas under ROC curves are measured by scikit-learn")
    sides = {name: np.asarray(s, dtype=float).ravel() for name, s in (("familiar", familiar), ("strange", strange))}
    for name, values in sides.items():
        num_nan = int(np.isnan(values).sum())
        if not len(values) or num_nan:
            raise ValueError(
                f"there are {len(values)} scores of {name} inputs, {num_nan} of them NaN; expected at least one score "
                "and no NaN"
            )
    truth = np.repeat([0, 1], [len(values) for values in sides.values()])
    # Infinite scores become the largest finite numbers, which scikit-learn accepts.
    scores = np.nan_to_num(np.concatenate(list(sides.values())))
    alarms, hits, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    kept = 1 - alarms >= 0.95 - 1e-12
    return Separation(float(metrics.roc_auc_score(truth, scores)), float(1 - hits[kept].max()), alarms, hits)


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
