"""Activations, in memory or on disk, some at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from penult.activations import Activations

__all__ = ["blocks_of", "check_integers", "labelled_blocks"]

_ROWS = 1 << 13


def blocks_of(activations: Tensor | Activations) -> Iterator[Tensor]:
    """Rows (n, d) as the head reads them, in at least float32.

    Raises:
        TypeError: They are neither a floating tensor nor `Activations`.
        ValueError: A wrong shape, none at all, NaN or infinity.
    """
    yield from (rows for rows, _ in labelled_blocks(activations, None))


def labelled_blocks(activations: Tensor | Activations, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, each with its labels (n,), of zeros where there are none.

    Raises:
        TypeError: As `blocks_of`.
        ValueError: As `blocks_of`, or there is not one label for each row.
    """
    if isinstance(activations, Activations):
        count = len(activations)
        parts: Iterator[Tensor] = (
            part.activations.clamp_min(0) if part.pre_activation else part.activations
            for part in activations.batches(_ROWS)
        )
    elif isinstance(activations, Tensor) and activations.is_floating_point():
        if activations.dim() != 2:
            raise ValueError(f"activations has shape {tuple(activations.shape)}; expected (N, d)")
        count = len(activations)
        parts = iter(activations.detach().split(_ROWS))
    else:
        what = activations.dtype if isinstance(activations, Tensor) else type(activations).__name__
        raise TypeError(f"activations must be a floating tensor (N, d) or Activations, got {what}")
    if not count:
        raise ValueError("there are no activations at all")
    if labels is not None and labels.shape != (count,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected one for each of {count} activations")
    start = 0
    for rows in parts:
        if not bool(rows.isfinite().all()):
            raise ValueError("activations hold NaN or infinity; leave such rows out first")
        own = None if labels is None else labels[start : start + len(rows)].to(rows.device)
        start += len(rows)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        yield wide, own if own is not None else torch.zeros(len(rows), dtype=torch.long, device=rows.device)


def check_integers(labels: Tensor) -> None:
    """Refuse labels that are no integers, by a TypeError."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
