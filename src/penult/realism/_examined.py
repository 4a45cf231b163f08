"""Real activations, and all that is known of them without any pair."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penult._checks import as_by_guessing
from penult.activations import Activations
from penult.realism._collapse import collapse
from penult.realism._distances import energy_coefficient, expected_calibration_error
from penult.realism._result import Collapse, Comparison, TiltIdentity
from penult.realism._rows import Labelled, LabelSource, Matched, matched
from penult.realism._tests import FOLDS, TESTS, auc_standard_error, two_sample_auc

__all__ = ["FEWEST", "Examined", "Sides", "examine", "told_apart"]

FEWEST = 50  # rows of a class, for tests of its own

_CLASSES = 24  # that are tested one by one, at most
_POOL = 2000  # rows of all classes together, at most


@dataclass
class Examined:
    """Real activations, and all that is known of them without any pair.

    The real-against-real columns are measured once, on first use, for all pairs that are compared.
    """

    held: Labelled
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
    held: Labelled,
    source: LabelSource,
    reference: Labelled | None,
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
    for h, y in held:
        p = head(h.to(head.weight.dtype)).float().softmax(-1)
        top = p.max(-1)
        confidence.append(top.values.cpu())
        correct.append((top.indices == y).cpu())
        posterior += p.cpu().double().sum(0)
    trust, right = torch.cat(confidence), torch.cat(correct)
    known, answered = source != "drawn", float(right.double().mean())
    if known and as_by_guessing(answered, len(right), head.num_classes):
        warnings.warn(
            f"the head gives {answered:.1%} of the labels, as by guessing: are they numbers of its own "
            f"{head.num_classes} classes, and is it trained? If not, draws of each class are set beside real ones of "
            "another; pass the activations without labels (activations.activations), which believes the head",
            UserWarning,
            stacklevel=4,  # the caller of compare or choose, which torch.no_grad wraps
        )
    names = held.source.class_names if isinstance(held.source, Activations) else None
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
