"""Labels of real activations, and the choice of rows of the same classes to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penult._checks import integer_labels
from penult.activations import Activations, _ActivationSource
from penult.head import Head

__all__ = ["LabelOrigin", "MatchedRows", "labelled_source", "match_rows", "source_with_labels", "split_by_class"]

LabelOrigin = Literal["given", "stored", "drawn"]


def labelled_source(
    activations: Tensor | Activations,
    head: Head,
    labels: Tensor | Sequence[int] | None = None,
    *,
    name: str = "activations",
) -> _ActivationSource:
    """Return the rows that a head reads, with labels (N,), in the head's precision, float32 or wider."""
    return _ActivationSource(
        activations, head, labels=labels, name=name, dtype=torch.promote_types(head.weight.dtype, torch.float32)
    )


def source_with_labels(
    head: Head,
    activations: Tensor | Activations,
    labels: Tensor | Sequence[int] | None,
    generator: torch.Generator,
    drawn: bool = False,
    name: str = "activations",
) -> tuple[_ActivationSource, LabelOrigin]:
    """Return activations with labels: the given ones, else the stored ones, else y ~ softmax(head(h)).

    Args:
        head: The head.
        activations: Activations (N, d) that it reads.
        labels: Labels (N,) or None.
        generator: Generator for sampled labels, on the head's device.
        drawn: Sample the labels even if there are given or stored ones.
        name: Name of the activations in messages.

    Raises:
        TypeError: Activations or labels have a wrong type or dtype.
        ValueError: A shape is wrong, values are NaN or infinite, or a label is out of range.
    """
    origin: LabelOrigin = "given"
    if labels is None and isinstance(activations, Activations):
        labels, origin = activations.labels, "stored"
    source = labelled_source(activations, head, None if drawn else labels, name=name)
    if labels is not None and not drawn:
        integer_labels(source.labels, num_classes=head.num_classes)
        return source, origin
    parts = []
    for rows in source:
        p = head(rows.to(head.weight.dtype)).float().softmax(-1)
        parts.append(torch.multinomial(p, 1, generator=generator).squeeze(-1))
    return source.with_labels(torch.cat(parts)), "drawn"


@dataclass(frozen=True)
class MatchedRows:
    """Real rows, and as many other real rows of the same classes.

    Attributes:
        real: Rows (M, d).
        other: Rows (M, d), with the same labels in the same order.
        labels: (M,), ascending.
        pooled: Mask (M,) of the rows for the test of all classes together, in their natural proportions.
        tested: The classes that are tested separately.
        per_class: Mask (M,) of the rows for these tests.
    """

    real: Tensor
    other: Tensor
    labels: Tensor
    pooled: Tensor
    tested: tuple[int, ...]
    per_class: Tensor


def split_by_class(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split row numbers at random into a `fraction` of each class and its complement, both ascending."""
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    order = order[labels[order].argsort(stable=True)]
    # Fractions of a row are carried from class to class, so that the totals are right even where classes are small.
    position = torch.arange(len(order), dtype=torch.float64, device="cpu")
    is_first = ((position + 1) * fraction + 1e-9).floor() > (position * fraction + 1e-9).floor()
    return order[is_first].sort().values, order[~is_first].sort().values


def match_rows(
    source: _ActivationSource,
    reference: _ActivationSource | None,
    generator: torch.Generator,
    *,
    max_pooled: int,
    min_per_class: int,
    max_per_class: int,
    max_classes: int,
    limits: Tensor | None = None,
) -> MatchedRows:
    """Choose rows at random so that both sets have equally many rows of each class.

    Args:
        source: Real rows.
        reference: Other real rows; where None, ``source`` is split in two, class by class.
        generator: Generator for the choice, on the CPU.
        max_pooled: Most rows of all classes together.
        min_per_class: Smallest number of rows for which a class is tested separately. No class is, if such classes hold
            less than half of the rows.
        max_per_class: Largest number of rows of a class that is tested separately.
        max_classes: Largest number of classes that are tested separately; a random subset if there are more.
        limits: Largest number of rows of each class (K,), in both sets.

    Raises:
        ValueError: Fewer than ``min_per_class`` rows can be matched.
    """
    if reference is None:
        one, two = split_by_class(source.labels, 0.5, generator)
        sides = [(source, one), (source, two)]
    else:
        sides = [
            (source, torch.arange(len(source), device="cpu")),
            (reference, torch.arange(len(reference), device="cpu")),
        ]
    k = 1 + max(int(side.labels.max()) for side, _ in sides)
    counts = [torch.bincount(side.labels[index], minlength=k) for side, index in sides]
    size = torch.minimum(*counts)
    if limits is not None:
        size = torch.minimum(size, limits[:k])
    total = int(size.sum())
    if total < min_per_class:
        raise ValueError(
            f"{total} rows can be compared with as many real ones of the same classes ({len(source)} activations"
            + (", split in two" if reference is None else f" and {len(reference)} of the reference")
            + f"); pass more: at least {min_per_class} are needed"
        )
    chosen = []
    for side, index in sides:
        index = index[torch.randperm(len(index), generator=generator, device="cpu")]
        index = index[side.labels[index].argsort(stable=True)]
        chosen.append(index[_rank_within_class(side.labels[index]) < size[side.labels[index]]])
    labels = source.labels[chosen[0]]
    pooled = torch.zeros(total, dtype=torch.bool, device="cpu")
    pooled[torch.randperm(total, generator=generator, device="cpu")[:max_pooled]] = True
    large = (size >= min_per_class).nonzero().flatten()
    # A few large classes do not represent all of them.
    if 2 * int(size[large].sum()) < total:
        large = large[:0]
    tested = large[torch.randperm(len(large), generator=generator, device="cpu")[:max_classes]].sort().values
    per_class = (_rank_within_class(labels) < max_per_class) & torch.isin(labels, tested)
    kept = pooled | per_class
    real, other = (side.rows_at(index[kept]) for (side, _), index in zip(sides, chosen, strict=True))
    return MatchedRows(real, other, labels[kept], pooled[kept], tuple(tested.tolist()), per_class[kept])


def _rank_within_class(sorted_labels: Tensor) -> Tensor:
    """Return the number (N,) of earlier rows with the same label, for sorted labels (N,)."""
    _, class_index, counts = sorted_labels.unique_consecutive(return_inverse=True, return_counts=True)
    starts: Tensor = counts.cumsum(0) - counts
    return torch.arange(len(sorted_labels), device="cpu") - starts[class_index]
