"""Heads that run in several calls, on parts of the batch or of the positions, whose rows are then concatenated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from penult.head._certificate import Positions
from penult.head._match import class_axes
from penult.head._record import Candidate

__all__ = ["joined_candidates", "joined_rows"]


def joined_rows(pieces: Sequence[Tensor], positions: Positions, shape: Sequence[int]) -> Tensor | None:
    """Concatenate or stack the vectors of several calls.

    Args:
        pieces: Tensors (*P, d), or (d,) for calls on single vectors.
        positions: ``"pieces"`` along the first axis, or ``"pieces along axis 1"``.
        shape: Shape *S of the joined positions.

    Returns:
        (*S, d), or None if the pieces do not have that many vectors.
    """
    width, ndim = pieces[0].shape[-1], pieces[0].ndim
    if any(piece.ndim != ndim or piece.shape[-1] != width for piece in pieces):
        return None
    if positions == "pieces":
        # In this order of rows, stacking and concatenating are the same.
        rows = torch.cat([piece.reshape(-1, width) for piece in pieces])
        return rows.reshape(*shape, width) if len(rows) == torch.Size(shape).numel() else None
    if ndim == len(shape):
        pieces = [piece.unsqueeze(1) for piece in pieces]
    if pieces[0].ndim != len(shape) + 1 or len({(piece.shape[0], *piece.shape[2:]) for piece in pieces}) != 1:
        return None
    rows = torch.cat(list(pieces), dim=1)
    return rows if rows.shape[:-1] == torch.Size(shape) else None


def joined_candidates(candidates: Iterable[Candidate], logits: Tensor) -> Iterator[Candidate]:
    """Yield, as one candidate each, the last calls with the same W that together have as many rows as the logits.

    Args:
        candidates: Products with one row of W for each class, in any order.
        logits: The model's output.
    """
    groups: defaultdict[tuple[object, ...], list[Candidate]] = defaultdict(list)
    for candidate in sorted(candidates, key=lambda candidate: candidate.number):
        groups[candidate.product.signature, candidate.path, candidate.product.h.ndim].append(candidate)
    for group in groups.values():
        last = group[-1]
        for axis in class_axes(logits, last.product.weight.shape[0]):
            shape = logits.movedim(axis, -1).shape[:-1]
            parts = _last_calls(group, shape.numel())
            if len(parts) < 2 or not all(_same_head(part, last) for part in parts):
                continue
            for positions in ("pieces", "pieces along axis 1") if len(shape) > 1 else ("pieces",):
                h = joined_rows([part.product.h for part in parts], positions, shape)
                if h is not None:
                    yield replace(
                        parts[0],
                        product=parts[0].product._replace(h=h),
                        rectified=all(part.rectified for part in parts),
                        pieces=positions,
                    )


def _last_calls(group: Sequence[Candidate], num_rows: int) -> list[Candidate]:
    """Return the last calls that have this number of rows in total, or none."""
    parts: list[Candidate] = []
    for candidate in reversed(group):
        num_rows -= candidate.product.h.shape[:-1].numel()
        parts.append(candidate)
        if num_rows <= 0:
            break
    return parts[::-1] if num_rows == 0 else []


def _same_head(one: Candidate, other: Candidate) -> bool:
    """Whether two products have the same W and b."""
    pairs = [(one.product.weight, other.product.weight), (one.product.bias, other.product.bias)]
    return all(
        a is b or (a is not None and b is not None and (_same_memory(a, b) or torch.equal(a, b))) for a, b in pairs
    )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
