"""A pair against real activations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from penult._checks import is_chance_level
from penult._progress import Progress, reporting
from penult.activations import Activations, _ActivationSource
from penult.bases import Base, Marginal, Sphere
from penult.distributions import Bank
from penult.head import Head
from penult.pair import GenerativePair
from penult.realism._matched_rows import LabelSource, Matched, matched, read_labels
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

__all__ = ["FEWEST", "Examined", "Reference", "Sides", "compare", "examine", "measure", "told_apart"]

Reference: TypeAlias = Tensor | Activations | tuple[Tensor | Activations, Tensor]

_JOINT = 10_000  # joint draws of the pair


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
    """Measure how close the activations that a pair draws come to real ones.

    The pair is exact whatever it says here: this is about its base. As many activations of each class are drawn as
    there are real ones, and the two sets are told apart by three classifiers, class by class (classes of at least 50
    rows, 24 at most, chosen at random) and all classes together (2000 rows at most). Next to each figure stands what
    real activations get against other real ones, at the same number of rows.

    Args:
        pair: The pair.
        activations: Real activations (N, d) that its base was not fitted to. Those with ``pre_activation`` are compared
            as what the head reads, max(u, 0).
        labels: Their classes (N,). Where None, the labels stored with the activations; where there are none, they are
            drawn from softmax(head(h)), which asks whether p(h) is right and believes the head about p(y|h).
        reference: Other real activations from the same source, as a tensor, `Activations` or a pair of one and its
            labels; those that the base was fitted to will do. Where None, ``activations`` is split in two, class by
            class, and all is compared at half the rows.
        seed: Seed of all choices and draws. No global random state is touched.
        max_per_class: Rows of a class, at most.
        progress: True for a bar on stderr, or what to call with the number of steps done and of all.

    Warns:
        UserWarning: If the head gives the labels no more often than by guessing.

    Raises:
        ImportError: If scikit-learn is not installed (``pip install "penult[data]"``).
        TypeError: If an argument is of a wrong kind.
        ValueError: If shapes, labels or values do not fit the head, or there are too few rows.

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
        raise TypeError(f"pair must be a penult.GenerativePair, got {type(pair).__name__}")
    head = pair.head
    generator = torch.Generator(head.weight.device).manual_seed(seed)
    held, source = read_labels(head, activations, labels, generator)
    other = None if reference is None else _reference(head, reference, source == "drawn", generator)
    real = examine(held, source, other, seed, max_per_class)
    steps = 2 * (len(TESTS) + 1) * (len(real.rows.tested) + 1)
    with reporting(progress or False, streams=False, unit="tests") as report:
        done = iter(range(1, steps + 1))
        real.tell_apart(seed, lambda: report(next(done), steps))
        return measure(pair, real, seed, lambda: report(next(done), steps))


def _reference(head: Head, reference: Reference, drawn: bool, generator: torch.Generator) -> _ActivationSource:
    activations, labels = reference if isinstance(reference, tuple) else (reference, None)
    result, source = read_labels(head, activations, labels, generator, drawn, "reference")
    if source == "drawn" and not drawn:
        raise ValueError(
            "the activations have labels and the reference has none; pass it as Activations with labels, or as a "
            "tuple (reference, labels)"
        )
    return result


def measure(pair: GenerativePair, real: Examined, seed: int, step: Callable[[], object] | None = None) -> Realism:
    """The pair's side of a comparison."""
    head, rows = pair.head, real.rows
    prior = pair.prior.probs.detach().cpu().double()
    generator = torch.Generator(head.weight.device).manual_seed(seed + 1)
    classes, index = rows.labels.to(head.weight.device).unique(return_inverse=True)
    weight = head.centered_weight(classes)
    drawn = pair.base.draw(weight, index, generator).to(rows.real.dtype).cpu()  # all in one call: a bank repeats none
    if not bool(drawn.isfinite().all()):
        raise ValueError(f"the {pair.base.info.name} base draws activations that are NaN or infinite")
    sides, reals = told_apart(rows, drawn, seed, step), real.tell_apart(seed)
    one_by_one = tuple(
        ClassRealism(real.names[y], y, int((rows.per_class & (rows.labels == y)).sum()), *found, *other)
        for y, found, other in zip(rows.tested, sides.by_class, reals.by_class, strict=True)
    )
    pooled = rows.pooled
    three = [each[pooled] for each in (rows.real, drawn, rows.other)]
    targets = weight.cpu()[index.cpu()[pooled]]
    cosines = [torch.cosine_similarity(h.double(), targets.double(), dim=-1) for h in three]
    positive = prior.clamp_min(1e-300)
    return Realism(
        base=pair.base.info.name,
        labels=real.source,
        in_features=head.in_features,
        num_classes=head.num_classes,
        rows=len(real.held),
        by_class=sides.average,
        pooled=sides.pooled,
        real_by_class=reals.average,
        real_pooled=reals.pooled,
        classes=one_by_one,
        cosine=cosine_spread(*cosines),
        chart_cosine=_chart(pair.base, three, weight, index[pooled.to(index.device)]),
        norm=norm_spread(*three),
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


def _chart(base: Base, three: Sequence[Tensor], weight: Tensor, index: Tensor) -> Spread | None:
    if not isinstance(base, Sphere):
        return None
    targets = weight[index]
    cosines = [base.cosine(h.to(targets.device), targets).cpu() for h in three]
    counts = index.bincount(minlength=len(weight))
    return exact_cosine(base, weight, counts, cosine_spread(*cosines))


def _calibration(pair: GenerativePair, real: Examined, seed: int) -> Calibration:
    base = pair.base
    if isinstance(base, Marginal) and isinstance(base.distribution, Bank) and not base.distribution.replacement:
        pair = GenerativePair(pair.head, Marginal(pair.head, Bank(base.distribution.rows)))  # enough for each class
    h, y = pair.sample((_JOINT,), generator=torch.Generator(pair.head.weight.device).manual_seed(seed + 2))
    top = pair.head(h).float().softmax(-1).max(-1)
    right = top.indices == y
    return Calibration(
        drawn_accuracy=float(right.double().mean()),
        drawn_confidence=float(top.values.double().mean()),
        drawn_ece=expected_calibration_error(top.values, right),
        real_accuracy=real.accuracy,
        real_confidence=real.confidence,
        real_ece=real.ece,
    )


# --- Real activations, and all that is known of them without any pair ---------------------------------------


FEWEST = 50  # rows of a class, for tests of its own

_CLASSES = 24  # that are tested one by one, at most
_POOL = 2000  # rows of all classes together, at most


@dataclass
class Examined:
    """Real activations, and all that is known of them without any pair.

    The real-against-real columns are measured once, on first use, for all pairs that are compared.
    """

    held: _ActivationSource
    source: LabelSource
    names: tuple[str, ...]
    rows: Matched
    accuracy: float | None
    confidence: float
    ece: float | None
    posterior: Tensor
    collapse: Collapse
    tilt_identity: TiltIdentity
    real: Sides | None = None

    def tell_apart(self, seed: int, step: Callable[[], object] | None = None) -> Sides:
        if self.real is None:
            self.real = told_apart(self.rows, self.rows.other, seed, step)
        return self.real


@dataclass(frozen=True)
class Sides:
    """Two-sample tests of one set of rows, class by class and together."""

    by_class: tuple[tuple[dict[str, float], float], ...]
    average: Comparison | None
    pooled: Comparison


def examine(
    held: _ActivationSource,
    source: LabelSource,
    reference: _ActivationSource | None,
    seed: int,
    max_per_class: int,
    limit: Tensor | None = None,
) -> Examined:
    """Choose the rows to compare, and look at what needs no pair.

    Raises:
        ValueError: If there are too few rows, or fewer than `FEWEST` are allowed of a class.
    """
    if max_per_class < FEWEST:
        raise ValueError(f"max_per_class is {max_per_class}; it must be at least {FEWEST}, as many as a test needs")
    head = held.head
    rows = matched(
        held,
        reference,
        torch.Generator().manual_seed(seed),
        pool=_POOL,
        fewest=FEWEST,
        most=max_per_class,
        classes=_CLASSES,
        limit=limit,
    )
    confidence, correct, posterior = [], [], torch.zeros(head.num_classes, dtype=torch.float64)
    for h, y in held.labelled():
        p = head(h.to(head.weight.dtype)).float().softmax(-1)
        top = p.max(-1)
        confidence.append(top.values.cpu())
        correct.append((top.indices == y).cpu())
        posterior += p.cpu().double().sum(0)
    trust, right = torch.cat(confidence), torch.cat(correct)
    known, answered = source != "drawn", float(right.double().mean())
    if known and is_chance_level(answered, len(right), head.num_classes):
        warnings.warn(
            f"the head gives {answered:.1%} of the labels, as by guessing: are they numbers of its own "
            f"{head.num_classes} classes, and is it trained? If not, draws of each class are set beside real ones of "
            "another; pass the activations without labels (activations.activations), which believes the head",
            UserWarning,
            stacklevel=4,  # the caller of compare or choose, which torch.no_grad wraps
        )
    names = held.class_names
    return Examined(
        held,
        source,
        names or tuple(map(str, range(head.num_classes))),
        rows,
        answered if known else None,
        float(trust.double().mean()),
        expected_calibration_error(trust, right) if known else None,
        posterior / len(held),
        *collapse(head, held),
    )


def told_apart(rows: Matched, other: Tensor, seed: int, step: Callable[[], object] | None) -> Sides:
    found = []
    for y in rows.tested:
        mine = rows.per_class & (rows.labels == y)
        found.append(_one(rows.real[mine], other[mine], seed, step))
    auc, energy = _one(rows.real[rows.pooled], other[rows.pooled], seed, step)
    n, count = int(rows.pooled.sum()), len(found)
    pooled = Comparison(auc, {name: auc_standard_error(a, n // FOLDS) for name, a in auc.items()}, energy, None, n, 0)
    if not found:
        return Sides((), None, pooled)
    values = {name: [each[0][name] for each in found] for name in TESTS}
    energies = [each[1] for each in found]
    sizes = [int((rows.per_class & (rows.labels == y)).sum()) for y in rows.tested]
    single = {name: auc_standard_error(v[0], sizes[0] // FOLDS) for name, v in values.items()}
    average = Comparison(
        {name: sum(v) / count for name, v in values.items()},
        single if count == 1 else {name: _error(v) for name, v in values.items()},
        sum(energies) / count,
        None if count == 1 else _error(energies),
        sum(sizes),
        count,
    )
    return Sides(tuple(found), average, pooled)


def _one(x: Tensor, y: Tensor, seed: int, step: Callable[[], object] | None) -> tuple[dict[str, float], float]:
    auc, energy = two_sample_auc(x, y, seed=seed, step=step), energy_coefficient(x, y)
    if step is not None:
        step()
    return auc, energy


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean, from the spread of what it averages."""
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))
