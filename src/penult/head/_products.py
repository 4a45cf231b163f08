"""Calls of linear algebra, read as products of activations h (..., d) with rows W (K, d)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from penult._row_blocks import version_of
from penult.head._certificate import Kind
from penult.head._foreign import is_real, tensors_in

__all__ = ["ElementwiseProducts", "Product", "Signature", "products", "signature_of"]

# K, d, whether W is the first operand, and the kind of call if it is one of _OWN_KINDS.
Signature = tuple[int, int, bool, str]

# Whether a batch of matrices is one matrix, and what is summed, depends on more than the shapes of two operands. A
# signature of their own keeps such calls from being counted among the others.
_OWN_KINDS: frozenset[Kind] = frozenset({"bmm", "sum"})


def signature_of(kind: Kind, shape: tuple[int, int], first: bool) -> Signature:
    """Return what tells a reading from others of the same call, and calls from others, for any batch size."""
    return (*shape, first, kind if kind in _OWN_KINDS else "")


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
    def signature(self) -> Signature:
        """That of `signature_of`."""
        classes, features = self.weight.shape
        return signature_of(self.kind, (classes, features), self.first)


def products(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Product]:
    """Yield every reading of a call; none if it is not a product of activations with one matrix.

    Where both operands are matrices, either could be W, so there are two readings. Their values decide which of them
    gives the logits.
    """
    reader = _READERS.get(func) or _ATEN_READERS.get(_aten_name(func))
    # Whatever is not read here is no candidate, so nothing else has to know of tensors without values.
    if reader is not None and all(map(is_real, tensors_in((*args, *kwargs.values())))):
        yield from reader(*args, **kwargs)


# A function with its positional and keyword arguments.
Call = tuple[Any, tuple[Any, ...], Mapping[str, Any]]


class ElementwiseProducts:
    """Recognises an elementwise product whose sum is the next step, in one forward.

    ``(h.unsqueeze(1) * W).sum(-1)`` is W h. The last elementwise product is kept until the next one.
    """

    def __init__(self) -> None:
        # The output of the last multiplication, its version, and its two operands.
        self._last: tuple[Tensor, int, Tensor, Tensor] | None = None

    def joined(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return a call itself, or, if it sums or averages the last product, one call that does both steps."""
        if self._last is not None and (func in _SUMS or _aten_name(func) in ("sum", "mean")):
            output, version, a, b = self._last
            if len(args) > 0 and args[0] is output and version_of(output) == version:
                dim = _only_dim(*args[1:], **kwargs)
                if dim is not None:
                    return torch.linalg.vecdot, (a, b), {"dim": dim - output.ndim if dim >= 0 else dim}
        return func, args, kwargs

    def remember(self, func: Any, args: tuple[Any, ...], output: Any) -> None:
        """Keep the operands of a call if it is an elementwise product."""
        if func in _MULTIPLICATIONS or _aten_name(func) == "mul":
            a, b = (*args, None, None)[:2]
            self._last = None
            if isinstance(a, Tensor) and isinstance(b, Tensor) and is_real(a) and is_real(b):
                self._last = output, version_of(output), a, b


def _only_dim(dim: Any = None, keepdim: bool = False, **_: Any) -> int | None:
    """Return the dimension that a call reduces and removes; None if these are several, or it is kept."""
    dims = [dim] if isinstance(dim, int) else dim
    return dims[0] if isinstance(dims, tuple | list) and len(dims) == 1 and not keepdim else None


def _aten_name(func: Any) -> str:
    """Return the name of an operator such as torch.ops.aten.mm or its overload torch.ops.aten.mm.default, or ""."""
    if not isinstance(func, OpOverload | OpOverloadPacket):
        return ""
    namespace, name = str(func).split(".")[:2]
    return name if namespace == "aten" else ""


def _contract(kind: Kind, a: Tensor, i: int, b: Tensor, j: int, bias: Tensor | None = None) -> Iterator[Product]:
    """Read a product over axis i of `a` and axis j of `b`, whose output has the axes of `a`, then those of `b`."""
    if b.ndim == 2:
        yield Product(kind, a.movedim(i, -1), b.movedim(j, -1), bias, -1, b)
    if a.ndim == 2:
        yield Product(kind, b.movedim(j, -1), a.movedim(i, -1), None, 0, a, first=True)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Iterator[Product]:
    if weight.ndim == 2:
        yield Product("linear", input, weight, bias, -1, weight)


def _operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the two operands of a product; torch has several names for them."""
    named = {"self": 0, "input": 0, "mat": 0, "other": 1, "mat2": 1, "vec": 1}
    given = dict(enumerate(args)) | {named[name]: value for name, value in kwargs.items() if name in named}
    return given[0], given[1]


def _matmul(*args: Any, **kwargs: Any) -> Iterator[Product]:
    input, other = _operands(args, kwargs)
    if input.ndim == 0 or other.ndim == 0:
        return
    # The batch of matrices that both operands are broadcast to.
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    if other.ndim >= 2 and (matrix := _one_matrix(other)) is not None:
        h = input if other.ndim == 2 else input.expand(*batch, *input.shape[-2:])
        yield Product(_batched(other), h, matrix.mT, None, -1, other)
    if input.ndim >= 2 and (matrix := _one_matrix(input)) is not None:
        h = other if input.ndim == 2 else other.expand(*batch, *other.shape[-2:])
        h, axis = (h.mT, -2) if other.ndim > 1 else (h, -1)
        yield Product(_batched(input), h, matrix, None, axis, input, first=True)


def _batched(operand: Tensor) -> Kind:
    return "matmul" if operand.ndim == 2 else "bmm"


def _one_matrix(operand: Tensor) -> Tensor | None:
    """Return the matrix that a batch of matrices (..., m, n) repeats, or None."""
    matrix: Tensor = operand[(0,) * (operand.ndim - 2)]
    if all(_is_repeated(operand, axis) for axis in range(operand.ndim - 2)):
        return matrix
    # Tensor.repeat copies W for each sample. While a graph is traced there are no values to compare.
    if torch.compiler.is_compiling() or 0 in operand.shape:
        return None
    # Most batches of matrices differ in the first two already.
    last = operand[(-1,) * (operand.ndim - 2)]
    return matrix if torch.equal(matrix, last) and torch.equal(operand, matrix.expand_as(operand)) else None


def _is_repeated(tensor: Tensor, axis: int) -> bool:
    """Whether a tensor is the same along an axis by its shape and strides."""
    return tensor.shape[axis] == 1 or tensor.stride(axis) == 0


def _bias_of(added: Tensor, classes: int, beta: float, alpha: float) -> Tensor | None:
    """Return the bias (K,) that a call adds to a product with K columns; None if it adds anything else."""
    if beta != 1 or alpha != 1 or added.ndim == 0 or added.shape[-1] != classes:
        return None
    return added[(0,) * (added.ndim - 1)] if all(_is_repeated(added, i) for i in range(added.ndim - 1)) else None


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any
) -> Iterator[Product]:
    for product in _matmul(mat1, mat2):
        bias = None if product.first else _bias_of(input, mat2.shape[-1], beta, alpha)
        yield product._replace(bias=bias)


def _baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any
) -> Iterator[Product]:
    yield from _addmm(input, batch1, batch2, beta=beta, alpha=alpha)


def _in_place(added: Tensor, first: Tensor, second: Tensor, **_: Any) -> Iterator[Product]:
    """Read a product that was added in place, so that the added tensor is gone."""
    yield from _matmul(first, second)


def _addmv(
    input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any
) -> Iterator[Product]:
    for product in _matmul(mat, vec):
        yield product._replace(bias=_bias_of(input, mat.shape[0], beta, alpha))


def _multi_dot(tensors: Any, **_: Any) -> Iterator[Product]:
    """Read a chain of matrices with h or W at one of its ends."""
    if len(tensors) < 2 or any(tensor.ndim == 0 for tensor in tensors):
        return
    first, *middle, last = tensors
    if not middle:
        yield from _matmul(first, last)
        return
    # The h of a reading is one of the operands, so that its origin is known.
    yield from (p for p in _matmul(first, torch.linalg.multi_dot([*middle, last])) if not p.first)
    yield from (p for p in _matmul(torch.linalg.multi_dot([first, *middle]), last) if p.first)


def _vecdot(x: Tensor, y: Tensor, *, dim: int = -1, **_: Any) -> Iterator[Product]:
    """Read the sum over one axis of the elementwise product of two tensors."""
    shape = torch.broadcast_shapes(x.shape, y.shape)
    if not shape:
        return
    d = dim % len(shape)
    x, y = (part[(None,) * (len(shape) - part.ndim)] for part in (x, y))
    for h, rows, first in ((x, y, False), (y, x, True)):
        # W has the axis that is summed and that of the classes, along which h is repeated.
        others = [axis for axis in range(len(shape)) if axis != d and not _is_repeated(rows, axis)]
        if len(others) != 1 or h.shape[d] != rows.shape[d] or not _is_repeated(h, others[0]):
            continue
        k = others[0]
        weight = rows[tuple(slice(None) if axis in (d, k) else 0 for axis in range(len(shape)))]
        positions = [1 if axis == k else size for axis, size in enumerate(shape)]
        axis = k if k < d else k - 1
        h = h.narrow(k, 0, 1).expand(positions).movedim(d, -1).squeeze(axis)
        yield Product("sum", h, weight if k < d else weight.mT, None, axis, rows, first)


def _inner(*args: Any, **kwargs: Any) -> Iterator[Product]:
    input, other = _operands(args, kwargs)
    if input.ndim and other.ndim:
        yield from _contract("matmul", input, -1, other, -1)


def _tensordot(a: Tensor, b: Tensor, dims: Any = 2, **_: Any) -> Iterator[Product]:
    if dims == 1:
        dims = ([-1], [0])
    if isinstance(dims, tuple | list) and len(dims) == 2:
        i, j = ([axis] if isinstance(axis, int) else list(axis) for axis in dims)
        if len(i) == len(j) == 1:
            yield from _contract("matmul", a, i[0], b, j[0])


def _aten_tensordot(self: Tensor, other: Tensor, dims_self: Any, dims_other: Any) -> Iterator[Product]:
    yield from _tensordot(self, other, (dims_self, dims_other))


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


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Iterator[Product]:
    if not transposed:
        yield from _conv(input, weight, bias, stride, padding, dilation, groups)


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
    torch.bmm: _matmul,
    torch.mv: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _matmul,
    Tensor.bmm: _matmul,
    Tensor.mv: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    torch.addmv: _addmv,
    Tensor.addmv: _addmv,
    Tensor.addmm_: _in_place,
    Tensor.baddbmm_: _in_place,
    Tensor.addmv_: _in_place,
    torch.linalg.multi_dot: _multi_dot,
    torch.linalg.vecdot: _vecdot,
    torch.inner: _inner,
    Tensor.inner: _inner,
    torch.tensordot: _tensordot,
    torch.einsum: _einsum,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.cosine_similarity: _cosine,
}

# By the names of the operators torch.ops.aten.
_ATEN_READERS: dict[str, Callable[..., Iterator[Product]]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "addmv": _addmv,
    "linalg_multi_dot": _multi_dot,
    "linalg_vecdot": _vecdot,
    "inner": _inner,
    "tensordot": _aten_tensordot,
    "einsum": lambda equation, tensors, **_: _einsum(equation, *tensors),
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _convolution,
    "cosine_similarity": _cosine,
}

_MULTIPLICATIONS = frozenset({torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__})
_SUMS = frozenset({torch.sum, torch.mean, Tensor.sum, Tensor.mean})
