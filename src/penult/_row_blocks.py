"""Functions of W that are computed block by block, because W may fill most of the memory and a copy may not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["blocks", "mean_row_of", "rounding", "rows_in_double", "span_of", "version_of", "wide_mean_row"]


def version_of(tensor: Tensor) -> int:
    """Return the version counter of a tensor, or -1 if it has none."""
    # Inference tensors have no version counter, and torch.compile cannot trace it.
    return -1 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def blocks(tensor: Tensor, rows: int | None = None) -> tuple[Tensor, ...]:
    """Split a tensor into blocks of `rows` rows. Default: as many rows as hold about 4 million values."""
    parts: tuple[Tensor, ...] = tensor.detach().split(rows or max(1, 2**22 // max(1, tensor[:1].numel())))
    return parts


def rows_in_double(weight: Tensor, rows: int | None = None) -> Iterator[Tensor]:
    """Yield the blocks in float64, on the CPU if the device has no float64."""
    for block in blocks(weight, rows):
        yield block.cpu().double() if block.device.type == "mps" else block.double()


def mean_row_of(weight: Tensor) -> Tensor:
    """Return the mean of the rows, (d,), in float64."""
    total: Tensor | None = None
    for rows in rows_in_double(weight):
        total = rows.sum(0) if total is None else total.add_(rows.sum(0))
    assert total is not None
    return total.div_(weight.shape[0])


def wide_mean_row(weight: Tensor) -> Tensor:
    """Return the mean row in at least float32; rounding to half precision would change all logits."""
    return mean_row_of(weight).to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def rounding(weight: Tensor) -> float:
    """Return the relative accuracy of the entries of W; half-precision entries count as exact, as in `Head.span`."""
    return min(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)


def span_of(weight: Tensor) -> Tensor:
    """Return orthonormal rows (q, d) that span the centered rows, see `Head.span`."""
    mean = mean_row_of(weight)
    triangle = mean.new_empty(0, weight.shape[1])
    squares = 0.0
    for rows in rows_in_double(weight, max(weight.shape[1], 1024)):
        squares += float(rows.square().sum())
        # The factor R of a QR decomposition has the singular values and right singular vectors of all rows so far.
        triangle = torch.cat([triangle, rows - mean])
        if triangle.shape[0] > triangle.shape[1]:
            triangle = torch.linalg.qr(triangle, mode="r").R
    _, values, vectors = torch.linalg.svd(triangle, full_matrices=False)
    rank = min(int((values > 8 * rounding(weight) * math.sqrt(squares)).sum()), weight.shape[0] - 1)
    basis = vectors[:rank]
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    return torch.mul(basis, largest.sign()).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
