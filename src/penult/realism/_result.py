"""What a comparison of a pair with real activations found."""

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
    "realism_table",
]


def jsonable(value: Any) -> Any:
    """Dataclasses as dictionaries, numbers that are not finite as None; fields without ``repr`` are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(key): jsonable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Comparison:
    """Two sets of activations told apart; once for each of some classes and averaged, or all classes together.

    Attributes:
        auc: AUC of each classifier test, see :func:`two_sample_auc`; 0.5 is a perfect match.
        auc_error: Their standard errors: over classes, or that of one AUC where there is but one.
        energy: The energy coefficient, see :func:`energy_coefficient`; 0 is a perfect match.
        energy_error: Its standard error over classes; None where there is but one.
        rows: Rows of each set, for all classes together.
        classes: How many classes were looked at one by one; 0 where all were looked at together.
    """

    auc: Mapping[str, float]
    auc_error: Mapping[str, float]
    energy: float
    energy_error: float | None
    rows: int
    classes: int

    @property
    def worst(self) -> str:
        """The test of the largest AUC; one below 0.5 tells nothing apart, it comes of cross-validation of few rows."""
        return max(self.auc, key=lambda name: self.auc[name])


@dataclass(frozen=True)
class ClassRealism:
    """One class: draws of the pair against real activations, and real ones against others."""

    name: str
    label: int
    rows: int
    auc: Mapping[str, float]
    energy: float
    real_auc: Mapping[str, float]
    real_energy: float


@dataclass(frozen=True)
class Histogram:
    """Counts over common bins, for figures: B + 1 edges, and B counts a name."""

    edges: tuple[float, ...]
    counts: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Spread:
    """The law of a number in real activations and in draws of the same labels.

    Attributes:
        real_mean: Mean in real activations.
        real_sd: Standard deviation there.
        drawn_mean: Mean in draws.
        drawn_sd: Standard deviation there.
        distance: Between the two samples: Kolmogorov-Smirnov for cosines, Wasserstein-1 in units of ``real_sd`` for
            norms.
        real_distance: The same between two real samples of that size.
        law_mean: Mean of the base's exact law, where it is known.
        law_sd: Standard deviation of that law.
        histogram: Binned counts of both, not part of ``to_dict``.
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
    """Is the head right as often as it is confident: on the pair's joint draws, and on real activations.

    On joint draws it must be, to the noise of the draws, whatever the base: that checks the pair, not its realism.
    Real accuracy and calibration error are None where labels were drawn from the head.
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
        min: Its smallest probability.
        max: Its largest.
        effective_classes: exp(entropy), K for the uniform prior.
        total_variation: To the mean posterior of the real activations, ½ Σ_y of absolute differences.
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
        weight_norm_max: Largest.
        weight_norm_cv: Standard deviation of ‖w_y‖ over their mean.
        bias_max: Largest ‖b − mean b‖_∞.
        mean_weight_norm: ‖w̄‖, the norm of the mean row that centring takes away.
        weight_cosine_mean: Mean cosine between different rows.
        weight_cosine_sd: Their standard deviation, 0 at collapse.
        weight_cosine_ideal: −1/(K − 1), that of a simplex.
        mean_alignment_raw: Mean over classes of cos(mean_y, w_y).
        mean_alignment_centered: The same with the mean of class means taken away, 1 at collapse.
        class_norm_min: Smallest mean norm ‖h‖ of a class.
        class_norm_max: Largest.
        trace_within: Trace of the within-class covariance, 0 at collapse; None where no class has two rows.
        trace_between: Trace of the covariance of class means.
        classes: How many classes have rows.
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
    r"""Does mean_y = m + Σ w_y hold in real activations, as a Gaussian base says?

    Attributes:
        offset: How far class means go along their rows, Σ_y (mean_y − mean)·w_y / Σ_y ‖w_y‖².
        variance: The within-class variance along the rows, Σ_y w_y' S w_y / Σ_y ‖w_y‖².
        ratio: offset / variance: 1 where it holds. Above, classes lie farther apart than a head so little confident
            gives reason for.
    """

    offset: float | None
    variance: float | None
    ratio: float | None


@dataclass(frozen=True)
class Realism:
    """How close a pair comes to real activations; ``print`` shows a table.

    Attributes:
        base: Name of the base.
        labels: Where labels came from: ``"given"``, ``"stored"`` with the activations, or ``"drawn"`` from the head.
        in_features: d.
        num_classes: K.
        rows: Real activations N.
        by_class: Draws against real activations class by class; None where no class has enough rows.
        pooled: The same with all classes together, at the real shares of the classes.
        real_by_class: Real activations against other real ones of that number, class by class.
        real_pooled: The same with all classes together.
        classes: The classes one by one.
        cosine: Law of the cosine of h to its row w_y.
        chart_cosine: The same in the chart of a :class:`penult.Sphere`, beside the exact law; None for other bases.
        norm: Law of ‖h‖.
        calibration: Of joint draws, and of real activations.
        prior: The implied class prior.
        collapse: Neural collapse of head and real activations.
        tilt_identity: Whether mean_y = m + Σ w_y holds.
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
        """Class by class, where classes have enough rows, else all together."""
        return self.pooled if self.by_class is None else self.by_class

    @property
    def real_comparison(self) -> Comparison:
        """The same of real activations against other real ones: what a perfect pair would get."""
        return self.real_pooled if self.real_by_class is None else self.real_by_class

    @property
    def auc(self) -> Mapping[str, float]:
        """AUC of each classifier test, 0.5 for a perfect pair."""
        return self.comparison.auc

    @property
    def real_auc(self) -> Mapping[str, float]:
        """The same of real activations against other real ones."""
        return self.real_comparison.auc

    @property
    def energy(self) -> float:
        """Energy coefficient, 0 for a perfect pair."""
        return self.comparison.energy

    @property
    def real_energy(self) -> float:
        """The same of real activations against other real ones."""
        return self.real_comparison.energy

    @property
    def worst_auc(self) -> float:
        """The largest AUC."""
        return self.auc[self.comparison.worst]

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, without histograms; numbers that are not finite are None."""
        result: dict[str, Any] = jsonable(self)
        return result

    def __str__(self) -> str:
        from penult.realism._result import realism_table

        return realism_table(self)


# --- Results as tables of text ------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A number as tables show it; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def realism_table(result: Realism) -> str:
    """The text of a `Realism`."""
    words = {"given": "labels as given", "stored": "labels as stored", "drawn": "labels drawn from the head"}
    lines = [
        f"{result.base} base against {result.rows} real activations "
        f"(d = {result.in_features}, K = {result.num_classes}, {words[result.labels]})"
    ]
    table = [["two-sample tests", "pair", "s.e.", "real", "s.e.", "perfect"]]
    for found, real in ((result.by_class, result.real_by_class), (result.pooled, result.real_pooled)):
        if found is None or real is None:
            continue
        where = f"each of {found.classes} classes" if found.classes else "all classes together"
        table += _tests(where, found, real)
    lines += columns(table)
    table = [["", "real", "drawn", "exact law", "distance", "real", "measured by"]]
    table.append(_spread("cosine of h to w_y", result.cosine, "Kolmogorov-Smirnov"))
    if result.chart_cosine is not None:
        table.append(_spread("the same in the chart", result.chart_cosine, "Kolmogorov-Smirnov"))
    table.append(_spread("norm of h", result.norm, "Wasserstein / sd"))
    lines += ["", *columns(table)]
    c = result.calibration
    drawn, real_row = (c.drawn_accuracy, c.drawn_confidence, c.drawn_ece), (c.real_accuracy, c.real_confidence)
    table = [["head", "accuracy", "confidence", "ECE"]]
    table.append(["joint draws of the pair", *(number(v) for v in drawn)])
    table.append(["real activations", *(number(v) for v in (*real_row, c.real_ece))])
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


def _tests(where: str, found: Comparison, real: Comparison) -> list[list[str]]:
    rows = [
        [
            f"  AUC {name}, {where}",
            number(found.auc[name]),
            number(found.auc_error[name]),
            number(real.auc[name]),
            number(real.auc_error[name]),
            "0.5",
        ]
        for name in found.auc
    ]
    energies = (found.energy, found.energy_error, real.energy, real.energy_error)
    return [*rows, [f"  energy, {where}", *(number(v, 4) for v in energies), "0"]]


def _spread(name: str, s: Spread, measure: str) -> list[str]:
    law = "-" if s.law_mean is None or s.law_sd is None else f"{s.law_mean:.3f} ± {s.law_sd:.3f}"
    both = (f"{s.real_mean:.3f} ± {s.real_sd:.3f}", f"{s.drawn_mean:.3f} ± {s.drawn_sd:.3f}")
    return [name, *both, law, number(s.distance), number(s.real_distance), measure]
