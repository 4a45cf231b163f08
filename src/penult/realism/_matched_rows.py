"""Real activations to compare with: what is accepted, their labels, and which rows stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penult._checks import integer_labels
from penult.activations import Activations, _ActivationSource
from penult.head import Head

__all__ = ["LabelSource", "Matched", "halves", "labelled_source", "matched", "read_labels"]

LabelSource = Literal["given", "stored", "drawn"]


def labelled_source(
    activations: Tensor | Activations,
    head: Head,
    labels: Tensor | Sequence[int] | None = None,
    *,
    name: str = "activations",
) -> _ActivationSource:
    """The rows that a head reads, with labels (N,), in the head's precision, float32 or wider."""
    return _ActivationSource(
        activations, head, labels=labels, name=name, dtype=torch.promote_types(head.weight.dtype, torch.float32)
    )


def read_labels(
    head: Head,
    activations: Tensor | Activations,
    labels: Tensor | Sequence[int] | None,
    generator: torch.Generator,
    drawn: bool = False,
    name: str = "activations",
) -> tuple[_ActivationSource, LabelSource]:
    """Activations with their labels: those given, else those stored with them, else y ~ softmax(head(h)).

    Args:
        head: The head.
        activations: Activations (N, d) that it reads.
        labels: Labels (N,) or None.
        generator: Source of drawn labels, on the head's device.
        drawn: Draw the labels even where there are some.
        name: What messages call the activations.

    Raises:
        TypeError: Activations or labels of a wrong type.
        ValueError: A wrong shape, NaN or infinity, or a label out of range.
    """
    origin: LabelSource = "given"
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
class Matched:
    """Real rows, and as many other real rows of the same classes.

    Attributes:
        real: Rows (M, d).
        other: Rows (M, d), of the same labels in the same order.
        labels: (M,), ascending.
        pooled: Which of them (M,) stand for all classes together, in their natural shares.
        tested: The classes that are looked at one by one, with at most ``max_per_class`` rows.
        per_class: Which rows (M,) stand for these.
    """

    real: Tensor
    other: Tensor
    labels: Tensor
    pooled: Tensor
    tested: tuple[int, ...]
    per_class: Tensor


def halves(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of rows that hold each class in the shares ``share`` and 1 − ``share``, ascending."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    # Row by row along the classes, so that what a small class cannot give to one side the next one does.
    place = torch.arange(len(order), dtype=torch.float64)
    first = ((place + 1) * share + 1e-9).floor() > (place * share + 1e-9).floor()
    return order[first].sort().values, order[~first].sort().values


def matched(
    held: _ActivationSource,
    reference: _ActivationSource | None,
    generator: torch.Generator,
    *,
    pool: int,
    fewest: int,
    most: int,
    classes: int,
    limit: Tensor | None = None,
) -> Matched:
    """Choose rows at random so that both sides hold each class equally often.

    Args:
        held: Real rows.
        reference: Other real rows; where None, ``held`` is split in two, class by class.
        generator: Source of the choice, on the CPU.
        pool: Rows for all classes together, at most.
        fewest: Rows of a class that is looked at on its own, at least; none is where such classes hold less than half
            of the rows.
        most: The same, at most.
        classes: How many classes are looked at on their own, at most; chosen at random where there are more.
        limit: How many rows of each class (K,) are set side by side, at most.

    Raises:
        ValueError: If fewer than ``fewest`` rows can be set side by side.
    """
    if reference is None:
        one, two = halves(held.labels, 0.5, generator)
        sides = [(held, one), (held, two)]
    else:
        sides = [(held, torch.arange(len(held))), (reference, torch.arange(len(reference)))]
    k = 1 + max(int(side.labels.max()) for side, _ in sides)
    counts = [torch.bincount(side.labels[index], minlength=k) for side, index in sides]
    size = torch.minimum(*counts)
    if limit is not None:
        size = torch.minimum(size, limit[:k])
    total = int(size.sum())
    if total < fewest:
        raise ValueError(
            f"{total} rows can be set beside as many real ones of the same classes ({len(held)} activations"
            + (", split in two" if reference is None else f" and {len(reference)} of the reference")
            + f"); pass more: at least {fewest} are needed"
        )
    chosen = []
    for side, index in sides:
        index = index[torch.randperm(len(index), generator=generator)]
        index = index[side.labels[index].argsort(stable=True)]
        place, _ = _places(side.labels[index])
        chosen.append(index[place < size[side.labels[index]]])
    labels = held.labels[chosen[0]]
    pooled = torch.zeros(total, dtype=torch.bool)
    pooled[torch.randperm(total, generator=generator)[:pool]] = True
    enough = (size >= fewest).nonzero().flatten()
    if 2 * int(size[enough].sum()) < total:
        enough = enough[:0]  # a few large classes do not stand for all
    tested = enough[torch.randperm(len(enough), generator=generator)[:classes]].sort().values
    per_class = (_places(labels)[0] < most) & torch.isin(labels, tested)
    kept = pooled | per_class
    real, other = (side.rows_at(index[kept]) for (side, _), index in zip(sides, chosen, strict=True))
    return Matched(real, other, labels[kept], pooled[kept], tuple(tested.tolist()), per_class[kept])


def _places(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """For sorted labels (N,): each row's place within its class, and the size of that class."""
    _, which, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(ordered)) - starts[which], counts[which]
