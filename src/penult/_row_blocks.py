"""Functions of W that are computed block by block, because W may fill most of the memory and a copy may not fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "blocks",
    "digest_of",
    "mean_row_of",
    "readable",
    "rounding",
    "row_hashes",
    "rows_digest",
    "rows_in_double",
    "same_values",
    "span_of",
    "state_of",
    "states_of",
    "version_of",
    "wide_mean_row",
]

# Most values of a tensor that its state depends on.
_SAMPLE = 4096
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version_of(tensor: Tensor) -> int:
    """Return the version counter of a tensor, or -1 if it has none."""
    # Inference tensors have no version counter, and torch.compile cannot trace it.
    return -1 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read now: not in a compiler, a tracer, a CUDA graph or a transform."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or tensor.is_meta:
        return False
    # Fake tensors have no values, and modes that count operations should not count these.
    if torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Return the version counter of a tensor and a digest of at most 4096 of its values, at a cost that is constant.

    The counter does not see writes through ``.data`` or a NumPy view; the digest sees those that change a value of the
    sample. Call it outside of transforms of torch.func.
    """
    return states_of([tensor])[0]


@torch.no_grad()
def states_of(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return `state_of` of several tensors.

    Values that several of them share are read once, and the host waits for each device once.
    """
    sums: dict[tuple[object, ...], Tensor] = {}
    keys: list[tuple[object, ...] | None] = []
    for tensor in tensors:
        key = None
        if readable(tensor) and tensor.layout == torch.strided and tensor.numel():
            key = tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()
            if key not in sums:
                sums[key] = _digest(tensor)
        keys.append(key)
    digests: dict[tuple[object, ...], int] = {}
    for device in {total.device for total in sums.values()}:
        own = [key for key, total in sums.items() if total.device == device]
        values = [sums[own[0]].item()] if len(own) == 1 else torch.stack([sums[key] for key in own]).tolist()
        digests.update(zip(own, map(int, values), strict=True))
    return [(version_of(x), 0 if key is None else digests[key]) for x, key in zip(tensors, keys, strict=True)]


def _digest(tensor: Tensor) -> Tensor:
    """Return a digest of a tensor with values, as an integer tensor () on its device."""
    step = max(1, tensor.numel() // _SAMPLE)
    # A step without a common divisor with the number of columns visits all of them.
    while step > 1 and math.gcd(step, tensor.shape[-1]) > 1:
        step += 1
    if step == 1:
        sample = tensor.reshape(-1)
    elif tensor.is_contiguous():
        sample = tensor.view(-1)[::step].contiguous()
    else:
        flat = torch.arange(0, tensor.numel(), step, device=tensor.device)
        sample = tensor[torch.unravel_index(flat, tensor.shape)]
    integers = _SAME_SIZE.get(sample.element_size())
    bits = torch.view_as_real(sample).view(torch.int64) if integers is None else sample.view(integers)
    bits = bits.reshape(-1)
    odd = _odd_numbers(bits.numel(), bits.device)
    # Products with different odd numbers, modulo 2^64, tell values that have changed places. On the CPU, dot is much
    # faster for few values; other devices do not have it for integers.
    return bits.to(torch.int64).dot(odd) if bits.device.type == "cpu" else (bits * odd).sum()


@functools.lru_cache(maxsize=64)
def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * count, 2, device=device) * 0x1E3779B97F4A7C15


@torch.no_grad()
def rows_digest(rows: Tensor) -> int:
    """Return the sum of 64-bit hashes of rows (N, d), rounded to float32, modulo 2^64: it depends on no order."""
    return sum(int(row_hashes(block).sum()) for block in blocks(rows)) % 2**64


@torch.no_grad()
def row_hashes(rows: Tensor) -> Tensor:
    """Return 64-bit hashes (n,), int64, of the rows (n, d) of a block, rounded to float32."""
    # The sum with 0 makes one zero of both.
    bits = (rows.to(torch.float32) + 0.0).contiguous().view(torch.int32)
    hashes = (bits * _odd_numbers(bits.shape[1], bits.device)).sum(-1)
    # Without these steps the sum of hashes would be a function of the sum of the rows.
    for shift, factor in ((33, -0x00AE502812AA7333), (29, -0x3B314601E57A13AD)):
        hashes = (hashes ^ (hashes >> shift)) * factor
    return hashes ^ (hashes >> 32)


def digest_of(count: int, hashes: Iterable[int]) -> str:
    """Return the digest of a set of `count` rows as text, from the values of `rows_digest` of its parts."""
    return f"{count}-{sum(hashes) % 2**64:016x}"


@torch.no_grad()
def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype, on any devices, hold the same values; one storage is not read."""
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return all(torch.equal(a.to(b.device), b) for a, b in zip(blocks(one), blocks(other), strict=True))


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
