"""Calls of linear algebra, read as products of activations h (..., d) with rows W (K, d)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from penult.head._certificate import Kind
from penult.head._foreign import is_real, tensors_in

__all__ = ["Product", "products"]


class Product(NamedTuple):
    """One reading of a call as W h + b.

    Attributes:
        kind: Kind of the called function.
        h: (..., d), the activations that the call reads, with d moved last.
        weight: (K, d), a view of the operand.
        bias: (K,) if the call adds one.
        axis: Axis of the K classes in the call's output.
        operand: The tensor that the call was given as W, often a parameter; ``weight`` is a view of it.
        first: Whether W is the first of the two operands.
    """

    kind: Kind
    h: Tensor
    weight: Tensor
    bias: Tensor | None
    axis: int
    operand: Tensor
    first: bool = False

    @property
    def signature(self) -> tuple[int, int, bool]:
        """K, d and `first`, which tell this reading from others of the same call for any batch size."""
        return (*self.weight.shape, self.first)


def products(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Product]:
    """Yield every reading of a call; none if it is not a product of activations with one matrix.

    Where both operands are matrices, either could be W, so there are two readings. Their values decide which of them
    gives the logits.
    """
    reader = _READERS.get(func)
    # Whatever is not read here is no candidate, so nothing else has to know of tensors without values.
    if reader is not None and all(map(is_real, tensors_in((*args, *kwargs.values())))):
        yield from reader(*args, **kwargs)


def _contract(kind: Kind, a: Tensor, i: int, b: Tensor, j: int, bias: Tensor | None = None) -> Iterator[Product]:
    """Read a product over axis i of `a` and axis j of `b`, whose output has the axes of `a`, then those of `b`."""
    if b.ndim == 2:
        yield Product(kind, a.movedim(i, -1), b.movedim(j, -1), bias, -1, b)
    if a.ndim == 2:
        yield Product(kind, b.movedim(j, -1), a.movedim(i, -1), None, 0, a, first=True)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Product]:
    if weight.ndim == 2:
        yield Product("linear", input, weight, bias, -1, weight)


def _matmul(*args: Any, **kwargs: Any) -> Iterator[Product]:
    # torch has several names for the second argument.
    input, other = [*args, *kwargs.values()][:2]
    if other.ndim == 2 and input.ndim >= 1:
        yield Product("matmul", input, other.mT, None, -1, other)
    if input.ndim == 2 and other.ndim >= 1:
        h, axis = (other.mT, -2) if other.ndim > 1 else (other, -1)
        yield Product("matmul", h, input, None, axis, input, first=True)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any
) -> Iterator[Product]:
    plain = beta == 1 and alpha == 1 and input.shape in ((mat2.shape[1],), (1, mat2.shape[1]))
    yield Product("matmul", mat1, mat2.mT, input.flatten() if plain else None, -1, mat2)
    yield Product("matmul", mat2.mT, mat1, None, 0, mat1, first=True)


def _inner(*args: Any, **kwargs: Any) -> Iterator[Product]:
    input, other = [*args, *kwargs.values()][:2]
    if input.ndim and other.ndim:
        yield from _contract("matmul", input, -1, other, -1)


def _tensordot(a: Tensor, b: Tensor, dims: Any = 2, **_: Any) -> Iterator[Product]:
    if dims == 1:
        dims = ([-1], [0])
    if isinstance(dims, tuple | list) and len(dims) == 2:
        i, j = ([axis] if isinstance(axis, int) else list(axis) for axis in dims)
        if len(i) == len(j) == 1:
            yield from _contract("matmul", a, i[0], b, j[0])


def _einsum(equation: Any, *operands: Any) -> Iterator[Product]:
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return
    inputs, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    axes = inputs.split(",")
    # Without an arrow, the output has the axes that occur once, in alphabetical order.
    if not arrow:
        output = "." * ("." in inputs) + "".join(sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1))
    for swapped in (False, True):
        (h, h_axes), (weight, w_axes) = (operands[swapped], axes[swapped]), (operands[not swapped], axes[not swapped])
        summed, classes = set(w_axes) - set(output), set(w_axes) & set(output)
        if len(w_axes) != 2 or "." in w_axes or len(summed) != 1 or len(classes) != 1:
            continue
        d, k = summed.pop(), classes.pop()
        positions = h_axes.replace(d, "")
        # The other axes of h must be in the output in the same order: no further sum, no diagonal.
        if h_axes.count(d) == 1 and k not in positions and output.replace(k, "") == positions and output.count(k) == 1:
            oriented = weight if w_axes.index(d) == 1 else weight.mT
            h_axis, class_axis = _axis(d, h_axes), _axis(k, output)
            yield Product("einsum", h.movedim(h_axis, -1), oriented, None, class_axis, weight, first=swapped)


def _axis(name: str, names: str) -> int:
    """Return the index of an axis, counted from the end if an ellipsis comes before it."""
    index = names.index(name)
    return index - len(names) if "." in names[:index] else index


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Product]:
    def all_equal(value: Any, number: int) -> bool:
        return all(v == number for v in value) if isinstance(value, tuple | list) else value == number

    pointwise = all(size == 1 for size in weight.shape[2:]) and groups == 1 and all_equal(stride, 1)
    if pointwise and (padding in ("valid", "same") or all_equal(padding, 0)) and input.ndim == weight.ndim:
        yield Product("conv", input.movedim(1, -1), weight.flatten(1), bias, 1, weight)


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Iterator[Product]:
    """Read the cosines of (..., 1, d) with (K, d)."""
    width = max(x1.ndim, x2.ndim)
    if dim not in (-1, width - 1):
        return
    for x, rows, first in ((x1, x2, False), (x2, x1, True)):
        if rows.ndim >= 2 and rows.shape[:-2].numel() == 1 and x.ndim >= 2 and x.shape[-2] == 1:
            weight = F.normalize(rows.reshape(rows.shape[-2:]), dim=-1, eps=eps)
            yield Product("cosine", F.normalize(x.squeeze(-2), dim=-1, eps=eps), weight, None, -1, rows, first)


_READERS: dict[Any, Callable[..., Iterator[Product]]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.linalg.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.inner: _inner,
    Tensor.inner: _inner,
    torch.tensordot: _tensordot,
    torch.einsum: _einsum,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.cosine_similarity: _cosine,
}
