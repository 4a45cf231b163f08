"""Comparison of samples of a pair with real activations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from penult._checks import check_integer, check_seed, described, is_chance_level
from penult._progress import Progress, reporting
from penult.activations import Activations, _ActivationSource
from penult.bases import Base, Marginal, Sphere
from penult.distributions import Bank
from penult.head import Head
from penult.pair import GenerativePair
from penult.realism._matched_rows import LabelOrigin, MatchedRows, match_rows, source_with_labels
from penult.realism._result import Calibration, ClassRealism, Collapse, Comparison, Prior, Realism, Spread, TiltIdentity
from penult.realism._statistics import (
    collapse,
    cosine_spread,
    energy_coefficient,
    exact_cosine,
    expected_calibration_error,
    norm_spread,
)
from penult.realism._two_sample import FOLDS, TESTS, auc_standard_error, require_sklearn, two_sample_auc

__all__ = ["RealStatistics", "Reference", "compare", "measure", "measure_real"]

Reference: TypeAlias = Tensor | Activations | tuple[Tensor | Activations, Tensor]

# Number of joint samples (h, y) of the pair.
_JOINT = 10_000


@torch.no_grad()
def compare(
    pair: GenerativePair,
    activations: Tensor | Activations,
    labels: Tensor | Sequence[int] | None = None,
    *,
    reference: Reference | None = None,
    seed: int = 0,
    max_per_class: int = 400,
    progress: Progress | bool | None = None,
) -> Realism:
    """Measure how closely samples of a pair resemble real activations.

    This measures the base: the posterior of the pair is exact with any base. The number of samples of each class is
    that of the real activations. Three classifiers try to separate the two sets, class by class (classes of at least 50
    rows; of more than 24 such classes, a random subset) and for all classes together (at most 2000 rows). All figures
    are also computed for real activations against other real ones, with the same number of rows.

    Args:
        pair: The pair.
        activations: Real activations (N, d) that its base was not fitted to. Of those with ``pre_activation``, the
            positive part max(u, 0) is compared.
        labels: Their classes (N,). Default: the labels stored with the activations. Without stored ones, labels are
            sampled from softmax(head(h)): then p(h) is tested, and p(y|h) of the head is assumed to be right.
        reference: Other real activations from the same source, as a tensor, `Activations` or a tuple of one and its
            labels; the activations that the base was fitted to are suitable. Default: ``activations`` is split in two,
            class by class, and all comparisons have half the rows.
        seed: Seed of all random choices and samples. No global random state is touched.
        max_per_class: Most rows of a class.
        progress: True for a bar on stderr, or a function of the number of finished steps and of all steps.

    Warns:
        UserWarning: The accuracy of the head is at chance level.

    Raises:
        ImportError: scikit-learn is not installed (``pip install "penult[data]"``).
        TypeError: An argument has a wrong type.
        ValueError: Shapes, labels or values do not fit the head, or there are too few rows.

    Example:
        >>> head = penult.Head(3 * torch.eye(3))
        >>> h = torch.randn(800, 3, generator=torch.Generator().manual_seed(0))
        >>> pair = penult.GenerativePair(head, penult.Gaussian.fit(head, h[:400]))
        >>> result = compare(pair, h[400:], reference=h[:400])
        >>> result.labels, sorted(result.auc)
        ('drawn', ['knn', 'logistic', 'mlp'])
    """
    require_sklearn()
    if not isinstance(pair, GenerativePair):
        raise TypeError(f"pair is {described(pair)}; expected a penult.GenerativePair")
    head, seed = pair.head, check_seed(seed)
    generator = torch.Generator(head.weight.device).manual_seed(seed)
    source, label_origin = source_with_labels(head, activations, labels, generator)
    other = None if reference is None else _reference_source(head, reference, label_origin == "drawn", generator)
    real = measure_real(source, label_origin, other, seed, max_per_class)
    steps = 2 * (len(TESTS) + 1) * (len(real.rows.tested) + 1)
    with reporting(progress or False, streams=False, unit="tests") as report:
        done = iter(range(1, steps + 1))
        real.two_sample_tests(seed, lambda: report(next(done), steps))
        return measure(pair, real, seed, lambda: report(next(done), steps))


def _reference_source(head: Head, reference: Reference, drawn: bool, generator: torch.Generator) -> _ActivationSource:
    activations, labels = reference if isinstance(reference, tuple) else (reference, None)
    source, label_origin = source_with_labels(head, activations, labels, generator, drawn, "reference")
    if label_origin == "drawn" and not drawn:
        raise ValueError(
            "the activations have labels and the reference has none; pass it as Activations with labels, or as a "
            "tuple (reference, labels)"
        )
    return source


def measure(pair: GenerativePair, real: RealStatistics, seed: int, step: Callable[[], object] | None = None) -> Realism:
    """Compare samples of a pair with real activations; `step` is called after each test."""
    head, rows = pair.head, real.rows
    prior = pair.prior.probs.detach().cpu().double()
    generator = torch.Generator(head.weight.device).manual_seed(seed + 1)
    classes, index = rows.labels.to(head.weight.device).unique(return_inverse=True)
    weight = head.centered_weight(classes)
    # One call for all rows, so that a bank without replacement repeats no row.
    samples = pair.base.draw(weight, index, generator).to(rows.real.dtype).cpu()
    if not bool(samples.isfinite().all()):
        raise ValueError(f"samples of the {pair.base.info.name} base hold NaN or infinity; expected finite values")
    tests, real_tests = _two_sample_tests(rows, samples, seed, step), real.two_sample_tests(seed)
    by_class = tuple(
        ClassRealism(real.names[y], y, int((rows.per_class & (rows.labels == y)).sum()), *test, *real_test)
        for y, test, real_test in zip(rows.tested, tests.by_class, real_tests.by_class, strict=True)
    )
    pooled = rows.pooled
    # Real activations, samples and other real activations.
    sets = [activations[pooled] for activations in (rows.real, samples, rows.other)]
    targets = weight.cpu()[index.cpu()[pooled]]
    cosines = [torch.cosine_similarity(h.double(), targets.double(), dim=-1) for h in sets]
    positive = prior.clamp_min(1e-300)
    return Realism(
        base=pair.base.info.name,
        labels=real.label_origin,
        in_features=head.in_features,
        num_classes=head.num_classes,
        rows=len(real.source),
        by_class=tests.average,
        pooled=tests.pooled,
        real_by_class=real_tests.average,
        real_pooled=real_tests.pooled,
        classes=by_class,
        cosine=cosine_spread(*cosines),
        chart_cosine=_chart_cosine(pair.base, sets, weight, index[pooled.to(index.device)]),
        norm=norm_spread(*sets),
        calibration=_calibration(pair, real, seed),
        prior=Prior(
            min=float(prior.min()),
            max=float(prior.max()),
            effective_classes=math.exp(-float((prior * positive.log()).sum())),
            total_variation=float((prior - real.posterior).abs().sum()) / 2,
        ),
        collapse=real.collapse,
        tilt_identity=real.tilt_identity,
    )


def _chart_cosine(base: Base, sets: Sequence[Tensor], weight: Tensor, index: Tensor) -> Spread | None:
    """Summarize cosines in the chart of a sphere; None for other bases."""
    if not isinstance(base, Sphere):
        return None
    targets = weight[index]
    cosines = [base.cosine(h.to(targets.device), targets).cpu() for h in sets]
    counts = index.bincount(minlength=len(weight))
    return exact_cosine(base, weight, counts, cosine_spread(*cosines))


def _calibration(pair: GenerativePair, real: RealStatistics, seed: int) -> Calibration:
    base = pair.base
    if isinstance(base, Marginal) and isinstance(base.distribution, Bank) and not base.distribution.replacement:
        # A bank without replacement may have too few rows of a class for so many samples.
        pair = GenerativePair(pair.head, Marginal(pair.head, Bank(base.distribution.rows)))
    h, y = pair.sample((_JOINT,), generator=torch.Generator(pair.head.weight.device).manual_seed(seed + 2))
    top = pair.head(h).float().softmax(-1).max(-1)
    correct = top.indices == y
    return Calibration(
        drawn_accuracy=float(correct.double().mean()),
        drawn_confidence=float(top.values.double().mean()),
        drawn_ece=expected_calibration_error(top.values, correct),
        real_accuracy=real.accuracy,
        real_confidence=real.confidence,
        real_ece=real.ece,
    )


# --- statistics that need no pair ---------------------------------------------------------------------------


# Fewest rows of a class with a test of its own, most such classes, and most rows of all classes together.
_MIN_PER_CLASS = 50
_CLASSES = 24
_POOL = 2000


@dataclass
class RealStatistics:
    """Statistics of the real activations, computed once and shared by all candidate pairs.

    Attributes:
        source: The real activations.
        label_origin: Where their labels come from.
        names: Class names.
        rows: Real activations that samples are compared with, and other real ones of the same classes.
        accuracy: Accuracy of the head; None for sampled labels.
        confidence: Mean confidence of the head.
        ece: Expected calibration error of the head; None for sampled labels.
        posterior: Mean class probabilities (K,) of the head.
        collapse: Figures of neural collapse, see `Collapse`.
        tilt_identity: Whether class means are where a Gaussian base would have them, see `TiltIdentity`.
    """

    source: _ActivationSource
    label_origin: LabelOrigin
    names: tuple[str, ...]
    rows: MatchedRows
    accuracy: float | None
    confidence: float
    ece: float | None
    posterior: Tensor
    collapse: Collapse
    tilt_identity: TiltIdentity
    _tests: TwoSampleTests | None = None

    def two_sample_tests(self, seed: int, step: Callable[[], object] | None = None) -> TwoSampleTests:
        """Test real activations against other real ones, at the first call."""
        if self._tests is None:
            self._tests = _two_sample_tests(self.rows, self.rows.other, seed, step)
        return self._tests


@dataclass(frozen=True)
class TwoSampleTests:
    """Two-sample tests of two sets of rows.

    Attributes:
        by_class: AUC by test and energy coefficient, for each tested class.
        average: Their average over the classes; None if no class was tested.
        pooled: The tests of all classes together.
    """

    by_class: tuple[tuple[dict[str, float], float], ...]
    average: Comparison | None
    pooled: Comparison


def measure_real(
    source: _ActivationSource,
    label_origin: LabelOrigin,
    reference: _ActivationSource | None,
    seed: int,
    max_per_class: int,
    limits: Tensor | None = None,
) -> RealStatistics:
    """Choose the rows to compare, and compute the statistics that need no pair.

    Raises:
        TypeError: `max_per_class` is not an integer.
        ValueError: There are too few rows, or `max_per_class` is below 50.
    """
    max_per_class = check_integer("max_per_class", max_per_class, _MIN_PER_CLASS)
    head = source.head
    rows = match_rows(
        source,
        reference,
        torch.Generator().manual_seed(seed),
        max_pooled=_POOL,
        min_per_class=_MIN_PER_CLASS,
        max_per_class=max_per_class,
        max_classes=_CLASSES,
        limits=limits,
    )
    confidences, hits, posterior = [], [], torch.zeros(head.num_classes, dtype=torch.float64, device="cpu")
    for h, y in source.labelled():
        p = head(h.to(head.weight.dtype)).float().softmax(-1)
        top = p.max(-1)
        confidences.append(top.values.cpu())
        hits.append((top.indices == y).cpu())
        posterior += p.cpu().double().sum(0)
    confidence, correct = torch.cat(confidences), torch.cat(hits)
    has_labels, accuracy = label_origin != "drawn", float(correct.double().mean())
    if has_labels and is_chance_level(accuracy, len(correct), head.num_classes):
        # The stack level is that of the caller of compare or choose, which torch.no_grad wraps.
        warnings.warn(
            f"the head predicts {accuracy:.1%} of the labels, as by guessing. Check that they are indices of its "
            f"{head.num_classes} classes and that it is trained. Otherwise samples of each class are compared with "
            "real activations of another; without labels (activations.activations) those of the head are used",
            UserWarning,
            stacklevel=4,
        )
    return RealStatistics(
        source,
        label_origin,
        source.class_names or tuple(map(str, range(head.num_classes))),
        rows,
        accuracy if has_labels else None,
        float(confidence.double().mean()),
        expected_calibration_error(confidence, correct) if has_labels else None,
        posterior / len(source),
        *collapse(head, source),
    )


def _two_sample_tests(rows: MatchedRows, other: Tensor, seed: int, step: Callable[[], object] | None) -> TwoSampleTests:
    """Test the real rows against others (M, d) of the same labels, class by class and for all classes together."""
    by_class = []
    for y in rows.tested:
        of_class = rows.per_class & (rows.labels == y)
        by_class.append(_two_sample_test(rows.real[of_class], other[of_class], seed, step))
    auc, energy = _two_sample_test(rows.real[rows.pooled], other[rows.pooled], seed, step)
    n, count = int(rows.pooled.sum()), len(by_class)
    pooled = Comparison(auc, {name: auc_standard_error(a, n // FOLDS) for name, a in auc.items()}, energy, None, n, 0)
    if not by_class:
        return TwoSampleTests((), None, pooled)
    aucs = {name: [class_auc[name] for class_auc, _ in by_class] for name in TESTS}
    energies = [class_energy for _, class_energy in by_class]
    sizes = [int((rows.per_class & (rows.labels == y)).sum()) for y in rows.tested]
    single_error = {name: auc_standard_error(values[0], sizes[0] // FOLDS) for name, values in aucs.items()}
    average = Comparison(
        {name: sum(values) / count for name, values in aucs.items()},
        single_error if count == 1 else {name: _standard_error(values) for name, values in aucs.items()},
        sum(energies) / count,
        None if count == 1 else _standard_error(energies),
        sum(sizes),
        count,
    )
    return TwoSampleTests(tuple(by_class), average, pooled)


def _two_sample_test(
    x: Tensor, y: Tensor, seed: int, step: Callable[[], object] | None
) -> tuple[dict[str, float], float]:
    """Return the AUC of each test and the energy coefficient."""
    auc, energy = two_sample_auc(x, y, seed=seed, step=step), energy_coefficient(x, y)
    if step is not None:
        step()
    return auc, energy


def _standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of values."""
    return float(torch.tensor(values, dtype=torch.float64, device="cpu").std()) / math.sqrt(len(values))
