"""Real activations to compare with: what is accepted, their labels, and which rows stand side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from penult._checks import check_labels
from penult.activations import Activations
from penult.head import Head

__all__ = ["LabelSource", "Labelled", "Matched", "halves", "matched", "read_labels"]

LabelSource = Literal["given", "stored", "drawn"]

_BATCH = 1 << 13  # rows read at a time
_LOGITS = 1 << 24  # and logits


@final
class Labelled:
    """Activations (N, d) that a head reads, each with a label; looked at some at a time.

    Args:
        head: The head.
        activations: A floating tensor, or `Activations`; pre-activations are read as max(u, 0), which is what the
            head reads.
        labels: (N,), kept on the CPU.
    """

    def __init__(self, head: Head, activations: Tensor | Activations, labels: Tensor) -> None:
        self.head, self.source, self.labels = head, activations, labels.cpu()
        self.rectify = isinstance(activations, Activations) and activations.pre_activation

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows (n, d) in the head's precision and on its device, and their labels (n,), in order."""
        start = 0
        for rows in read(self.head, self.source):
            yield rows, self.labels[start : start + len(rows)].to(rows.device)
            start += len(rows)

    def take(self, index: Tensor) -> Tensor:
        """Rows (M, d) of an index (M,), on the CPU."""
        if isinstance(self.source, Tensor):
            return _converted(self.head, self.source[index.to(self.source.device)], False).cpu()
        return _converted(self.head, self.source[index].activations, self.rectify).cpu()


def read(head: Head, activations: Tensor | Activations) -> Iterator[Tensor]:
    """All rows in order, (n, d) at a time, as the head reads them: on its device, in its precision, rectified."""
    size = max(1, min(_BATCH, _LOGITS // head.num_classes))
    if isinstance(activations, Tensor):
        yield from (_converted(head, rows, False) for rows in activations.split(size))
    else:
        rectify = activations.pre_activation
        yield from (_converted(head, part.activations, rectify) for part in activations.batches(size))


def _converted(head: Head, rows: Tensor, rectify: bool) -> Tensor:
    weight = head.weight
    rows = rows.detach().to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return rows.clamp_min(0) if rectify else rows


def check(head: Head, activations: Tensor | Activations, name: str) -> None:
    """Raise unless they are finite rows (N, d) for the head.

    Raises:
        TypeError: They are neither a floating tensor nor `Activations`.
        ValueError: A wrong shape, NaN or infinity.
    """
    if isinstance(activations, Activations):
        shape: tuple[int, ...] = (len(activations), activations.in_features)
    elif isinstance(activations, Tensor) and activations.is_floating_point():
        shape = tuple(activations.shape)
    else:
        what = activations.dtype if isinstance(activations, Tensor) else type(activations).__name__
        raise TypeError(f"{name} must be a floating tensor (N, d) or penult.Activations, got {what}")
    if len(shape) != 2 or shape[1] != head.in_features or shape[0] < 1:
        raise ValueError(f"{name} has shape {shape}; this head reads (N, {head.in_features}), N >= 1")
    bad = sum(int((~rows.isfinite().all(-1)).sum()) for rows in read(head, activations))
    if bad:
        raise ValueError(f"{bad} of {shape[0]} rows of {name} hold NaN or infinity; leave them out first")


def read_labels(
    head: Head,
    activations: Tensor | Activations,
    labels: Tensor | Sequence[int] | None,
    generator: torch.Generator,
    drawn: bool = False,
    name: str = "activations",
) -> tuple[Labelled, LabelSource]:
    """Activations with their labels: those given, else those stored with them, else y ~ softmax(head(h)).

    Args:
        head: The head.
        activations: What it reads, checked here.
        labels: Labels (N,) or None.
        generator: Source of drawn labels, on the head's device.
        drawn: Draw them in any case.
        name: What errors call the activations.
    """
    check(head, activations, name)
    if labels is not None and not drawn:
        y = torch.as_tensor(labels)
        if y.shape != (len(activations),):
            raise ValueError(f"labels have shape {tuple(y.shape)}; {name} need one for each row: ({len(activations)},)")
        check_labels(y, torch.Size((len(activations), head.num_classes)))
        return Labelled(head, activations, y.long()), "given"
    stored = activations.labels if isinstance(activations, Activations) else None
    if stored is not None and not drawn:
        check_labels(stored, torch.Size((len(activations), head.num_classes)))
        return Labelled(head, activations, stored.long()), "stored"
    parts = []
    for rows in read(head, activations):
        p = head(rows.to(head.weight.dtype)).float().softmax(-1)
        parts.append(torch.multinomial(p, 1, generator=generator).squeeze(-1))
    return Labelled(head, activations, torch.cat(parts)), "drawn"


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
    held: Labelled,
    reference: Labelled | None,
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
    real, other = (side.take(index[kept]) for (side, _), index in zip(sides, chosen, strict=True))
    return Matched(real, other, labels[kept], pooled[kept], tuple(tested.tolist()), per_class[kept])


def _places(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """For sorted labels (N,): each row's place within its class, and the size of that class."""
    _, which, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(ordered)) - starts[which], counts[which]
