"""Results of a comparison of a pair with real activations, and their tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

__all__ = [
    "Calibration",
    "ClassRealism",
    "Collapse",
    "Comparison",
    "Histogram",
    "Prior",
    "Realism",
    "Spread",
    "TiltIdentity",
    "columns",
    "jsonable",
    "number",
]


def jsonable(value: Any) -> Any:
    """Convert dataclasses to dictionaries and numbers that are not finite to None; omit fields without ``repr``."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Comparison:
    """Two-sample tests of two sets of activations: averaged over classes, or of all classes together.

    Attributes:
        auc: AUC of each classifier test, see :func:`two_sample_auc`; 0.5 is a perfect match.
        auc_error: Standard errors of the AUCs: over classes, or of a single AUC if there is only one.
        energy: The energy coefficient, see :func:`energy_coefficient`; 0 is a perfect match.
        energy_error: Standard error of the energy coefficient over classes; None if there is only one.
        rows: Rows of each set, for all classes together.
        classes: Number of classes in the average; 0 for one test of all classes together.
    """

    auc: Mapping[str, float]
    auc_error: Mapping[str, float]
    energy: float
    energy_error: float | None
    rows: int
    classes: int

    @property
    def worst(self) -> str:
        """Name of the test with the largest AUC."""
        # An AUC below 0.5 is noise of cross-validation with few rows, so its distance to 0.5 does not count.
        return max(self.auc, key=lambda name: self.auc[name])


@dataclass(frozen=True)
class ClassRealism:
    """One class: samples of the pair against real activations, and real activations against other real ones."""

    name: str
    label: int
    rows: int
    auc: Mapping[str, float]
    energy: float
    real_auc: Mapping[str, float]
    real_energy: float


@dataclass(frozen=True)
class Histogram:
    """Histograms over common bins, for figures: B + 1 edges, and B counts for each name."""

    edges: tuple[float, ...]
    counts: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Spread:
    """Distribution of a cosine or norm for real activations, and for samples with the same labels.

    Attributes:
        real_mean: Mean for real activations.
        real_sd: Standard deviation for real activations.
        drawn_mean: Mean for samples.
        drawn_sd: Standard deviation for samples.
        distance: Distance between the two distributions: Kolmogorov-Smirnov for cosines, Wasserstein-1 in units of
            ``real_sd`` for norms.
        real_distance: The same between real activations and as many other real ones.
        law_mean: Exact mean for the base; None if it is not known.
        law_sd: Exact standard deviation for the base; None if it is not known.
        histogram: Histograms of both, not part of ``to_dict``.
    """

    real_mean: float
    real_sd: float
    drawn_mean: float
    drawn_sd: float
    distance: float
    real_distance: float
    law_mean: float | None = None
    law_sd: float | None = None
    histogram: Histogram | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Calibration:
    """Accuracy, confidence and calibration error of the head, on joint samples of the pair and on real activations.

    On joint samples accuracy and confidence agree up to sampling noise, with any base: this checks the pair, not its
    realism. Real accuracy and calibration error are None if labels were sampled from the head.
    """

    drawn_accuracy: float
    drawn_confidence: float
    drawn_ece: float
    real_accuracy: float | None
    real_confidence: float
    real_ece: float | None


@dataclass(frozen=True)
class Prior:
    """The class prior that head and base imply.

    Attributes:
        min: Smallest class probability.
        max: Largest class probability.
        effective_classes: exp(entropy of the prior), which is K for the uniform prior.
        total_variation: Total variation distance from the prior to the mean posterior of the real activations.
    """

    min: float
    max: float
    effective_classes: float
    total_variation: float


@dataclass(frozen=True)
class Collapse:
    """Neural collapse of the head's centered rows w_y and of the class means of real activations.

    Attributes:
        weight_norm_min: Smallest ‖w_y‖.
        weight_norm_max: Largest ‖w_y‖.
        weight_norm_cv: Standard deviation of the norms ‖w_y‖ divided by their mean.
        bias_max: ‖b − mean b‖_∞.
        mean_weight_norm: ‖w̄‖, the norm of the mean row that centering subtracts.
        weight_cosine_mean: Mean cosine between different rows.
        weight_cosine_sd: Standard deviation of these cosines, 0 at collapse.
        weight_cosine_ideal: −1/(K − 1), the cosine in a simplex.
        mean_alignment_raw: Mean over classes of cos(mean_y, w_y).
        mean_alignment_centered: The same after subtracting the mean of class means, 1 at collapse.
        class_norm_min: Smallest mean norm ‖h‖ of a class.
        class_norm_max: Largest mean norm ‖h‖ of a class.
        trace_within: Trace of the within-class covariance, 0 at collapse; None if no class has two rows.
        trace_between: Trace of the covariance of class means.
        classes: Number of classes that have rows.
    """

    weight_norm_min: float
    weight_norm_max: float
    weight_norm_cv: float
    bias_max: float
    mean_weight_norm: float
    weight_cosine_mean: float
    weight_cosine_sd: float
    weight_cosine_ideal: float
    mean_alignment_raw: float
    mean_alignment_centered: float
    class_norm_min: float
    class_norm_max: float
    trace_within: float | None
    trace_between: float
    classes: int


@dataclass(frozen=True)
class TiltIdentity:
    r"""Test of an identity that holds for a Gaussian base: the mean of class y is m + Σ w_y.

    Here m is the mean of the base, Σ the covariance that all classes share, and w_y the centered row of class y. S is
    the covariance of real activations within classes.

    Attributes:
        offset: Offset of class means along their rows, Σ_y (mean_y − mean)·w_y / Σ_y ‖w_y‖².
        variance: Within-class variance along the rows, Σ_y w_y' S w_y / Σ_y ‖w_y‖².
        ratio: offset / variance: 1 if the identity holds. If it is larger, classes are farther apart than the
            confidence of the head implies.
    """

    offset: float | None
    variance: float | None
    ratio: float | None


@dataclass(frozen=True)
class Realism:
    """Result of comparing a pair with real activations; ``print`` shows a table.

    Attributes:
        base: Name of the base.
        labels: Origin of the labels: ``"given"``, ``"stored"`` with the activations, or ``"drawn"`` from the head.
        in_features: d.
        num_classes: K.
        rows: Number N of real activations.
        by_class: Samples against real activations, averaged over classes; None if no class has enough rows.
        pooled: The same with all classes together, in their natural proportions.
        real_by_class: Real activations against as many other real ones, averaged over classes.
        real_pooled: The same with all classes together.
        classes: Results for single classes.
        cosine: Distribution of the cosine between h and its row w_y.
        chart_cosine: The same in the chart of a :class:`penult.Sphere`, with exact moments; None for other bases.
        norm: Distribution of ‖h‖.
        calibration: Calibration of the head on joint samples and on real activations.
        prior: The implied class prior.
        collapse: Neural collapse of head and real activations.
        tilt_identity: Whether class means are where a Gaussian base would have them, see `TiltIdentity`.
    """

    base: str
    labels: str
    in_features: int
    num_classes: int
    rows: int
    by_class: Comparison | None
    pooled: Comparison
    real_by_class: Comparison | None
    real_pooled: Comparison
    classes: tuple[ClassRealism, ...]
    cosine: Spread
    chart_cosine: Spread | None
    norm: Spread
    calibration: Calibration
    prior: Prior
    collapse: Collapse
    tilt_identity: TiltIdentity

    @property
    def comparison(self) -> Comparison:
        """`by_class` if classes have enough rows, else `pooled`."""
        return self.pooled if self.by_class is None else self.by_class

    @property
    def real_comparison(self) -> Comparison:
        """The same for real activations against other real ones, the result of a perfect pair."""
        return self.real_pooled if self.real_by_class is None else self.real_by_class

    @property
    def auc(self) -> Mapping[str, float]:
        """AUC of each classifier test, 0.5 for a perfect pair."""
        return self.comparison.auc

    @property
    def real_auc(self) -> Mapping[str, float]:
        """AUC of each classifier test for real activations against other real ones."""
        return self.real_comparison.auc

    @property
    def energy(self) -> float:
        """Energy coefficient, 0 for a perfect pair."""
        return self.comparison.energy

    @property
    def real_energy(self) -> float:
        """Energy coefficient of real activations against other real ones."""
        return self.real_comparison.energy

    @property
    def worst_auc(self) -> float:
        """The largest AUC."""
        return self.auc[self.comparison.worst]

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON, without histograms; numbers that are not finite are None."""
        result: dict[str, Any] = jsonable(self)
        return result

    def __str__(self) -> str:
        return _realism_table(self)


# --- tables of text -----------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Format a number for a table; None is a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of cells as lines, with the first column left-aligned and the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _realism_table(result: Realism) -> str:
    """Format a `Realism` as text."""
    labels = {"given": "labels as given", "stored": "labels as stored", "drawn": "labels drawn from the head"}
    lines = [
        f"{result.base} base against {result.rows} real activations "
        f"(d = {result.in_features}, K = {result.num_classes}, {labels[result.labels]})"
    ]
    table = [["two-sample tests", "pair", "s.e.", "real", "s.e.", "perfect"]]
    for pair, real in ((result.by_class, result.real_by_class), (result.pooled, result.real_pooled)):
        if pair is None or real is None:
            continue
        classes = f"each of {pair.classes} classes" if pair.classes else "all classes together"
        table += _test_rows(classes, pair, real)
    lines += columns(table)
    table = [["", "real", "drawn", "exact law", "distance", "real", "measured by"]]
    table.append(_spread_row("cosine of h to w_y", result.cosine, "Kolmogorov-Smirnov"))
    if result.chart_cosine is not None:
        table.append(_spread_row("the same in the chart", result.chart_cosine, "Kolmogorov-Smirnov"))
    table.append(_spread_row("norm of h", result.norm, "Wasserstein / sd"))
    lines += ["", *columns(table)]
    c = result.calibration
    table = [["head", "accuracy", "confidence", "ECE"]]
    for name, figures in (
        ("joint draws of the pair", (c.drawn_accuracy, c.drawn_confidence, c.drawn_ece)),
        ("real activations", (c.real_accuracy, c.real_confidence, c.real_ece)),
    ):
        table.append([name, *map(number, figures)])
    lines += ["", *columns(table)]
    p, n, t = result.prior, result.collapse, result.tilt_identity
    table = [
        [
            "implied prior",
            f"min {p.min:.3g}, max {p.max:.3g}, effective classes {p.effective_classes:.4g} of {result.num_classes}, "
            f"total variation to the real mean posterior {p.total_variation:.3f}",
        ],
        [
            "rows of W, centered",
            f"norms {n.weight_norm_min:.3g} to {n.weight_norm_max:.3g} (cv {n.weight_norm_cv:.2f}), cosines "
            f"{n.weight_cosine_mean:.3f} ± {n.weight_cosine_sd:.3f} (simplex {n.weight_cosine_ideal:.3f}), mean row "
            f"{n.mean_weight_norm:.3g}, largest bias {n.bias_max:.3g}",
        ],
        [
            "class means",
            f"cosine to w_y {n.mean_alignment_raw:.3f}, centered {n.mean_alignment_centered:.3f}; mean norms "
            f"{n.class_norm_min:.3g} to {n.class_norm_max:.3g}; trace within {number(n.trace_within)}, between "
            f"{n.trace_between:.3f}",
        ],
        [
            "mean_y = m + S w_y",
            f"offset {number(t.offset)} against variance {number(t.variance)}: ratio {number(t.ratio)} (1 holds)",
        ],
    ]
    width = max(len(row[0]) for row in table)
    return "\n".join([*lines, "", *(f"{name.ljust(width)}  {text}" for name, text in table)])


def _test_rows(classes: str, pair: Comparison, real: Comparison) -> list[list[str]]:
    rows = [
        [
            f"  AUC {name}, {classes}",
            number(pair.auc[name]),
            number(pair.auc_error[name]),
            number(real.auc[name]),
            number(real.auc_error[name]),
            "0.5",
        ]
        for name in pair.auc
    ]
    energies = (pair.energy, pair.energy_error, real.energy, real.energy_error)
    return [*rows, [f"  energy, {classes}", *(number(v, 4) for v in energies), "0"]]


def _spread_row(name: str, s: Spread, measure: str) -> list[str]:
    exact = "-" if s.law_mean is None or s.law_sd is None else f"{s.law_mean:.3f} ± {s.law_sd:.3f}"
    both = (f"{s.real_mean:.3f} ± {s.real_sd:.3f}", f"{s.drawn_mean:.3f} ± {s.drawn_sd:.3f}")
    return [name, *both, exact, number(s.distance), number(s.real_distance), measure]
