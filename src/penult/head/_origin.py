"""Where a tensor came from: which module or function made it, and whether that was a norm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from penult._row_blocks import version_of

__all__ = [
    "PASS_THROUGH",
    "Key",
    "Norm",
    "Origin",
    "Origins",
    "gains",
    "invertible",
    "key_of",
    "tensors_in",
    "without_gain",
]

Key = tuple[StorageWeakRef, int]

PASS_THROUGH = frozenset(
    "dropout feature_dropout alpha_dropout dropout1d dropout2d dropout3d flatten reshape view view_as contiguous clone "
    "to float half bfloat16 double type type_as detach squeeze unsqueeze transpose permute movedim moveaxis swapaxes "
    "expand expand_as t __getitem__ __get__ select index_select narrow gather take_along_dim ravel unflatten".split()
)
_PASS_THROUGH_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip
_KINDS: tuple[Literal["layer", "rms"], ...] = ("layer", "rms")
_POOLING = ("mean", "avg_pool", "avgpool")
# What such a function does to a tensor is worth more to know than the name of the module around it.
_TELLING = ("relu", "tanh", "sigmoid", "softsign", "elu", "silu", "swish", "norm", *_POOLING)


@dataclass(frozen=True)
class Norm:
    """A norm layer, by the evidence of what it read and gave.

    Attributes:
        path: Its module's name.
        kind: ``"layer"`` if the mean is taken off, ``"rms"`` if not.
        unit_offset: Whether its gain is 1 + weight.
        width: Length of the normalised axis.
        stride: Its stride in the output.
    """

    path: str
    kind: Literal["layer", "rms"]
    unit_offset: bool
    width: int
    stride: int


@dataclass(frozen=True)
class Origin:
    """What made a tensor.

    Attributes:
        name: Class name of the module or name of the function.
        norm: Facts, if it is a norm layer.
        behind: What made the (largest) tensor that it read.
        inner: The last function that it ran, if it is a module.
    """

    name: str
    norm: Norm | None
    behind: Origin | None
    inner: Origin | None = None

    @property
    def pooled(self) -> Origin | None:
        """What an average was taken of, if this is one."""
        if self.inner is not None:
            return self.inner.pooled
        return self.behind if any(word in self.name.lower() for word in _POOLING) else None

    @property
    def scaled(self) -> bool:
        """Whether something was multiplied or divided."""
        return self.name.strip("_") in ("mul", "rmul", "div", "truediv")

    @property
    def normalized(self) -> bool:
        """Whether vectors were divided by their norms, and at most multiplied by a number since."""
        return "normalize" in self.name or (self.scaled and self.behind is not None and self.behind.normalized)


class Origins:
    """Remembers which call made each tensor, by storage and version.

    Views so count as the tensor that they show, and what an in-place operation made of it does not. A weak reference
    frees the memory but keeps the address.
    """

    def __init__(self) -> None:
        self._of: dict[Key, tuple[Origin, int]] = {}

    def of(self, key: Key | None) -> Origin | None:
        """What made a tensor; None for what the model was given, or its parameters."""
        found = None if key is None else self._of.get(key)
        return None if found is None else found[0]

    def function(self, func: Any, source: Origin | None, output: Any) -> None:
        """A torch function made `output` of a tensor that came from `source`."""
        name = getattr(func, "__name__", "")
        if name in PASS_THROUGH:
            self._made(output, source, rank=0, over=-1)
        else:
            telling = any(word in name for word in _TELLING)
            self._made(output, Origin(name, None, source), rank=1 if telling else 0, over=-1)

    def module(self, module: nn.Module, path: str, x: Tensor | None, key: Key | None, output: Any) -> None:
        """A module made `output` of x, whose key was `key` before."""
        source = self.of(key)
        if isinstance(module, _PASS_THROUGH_MODULES):
            self._made(output, source, rank=2, over=-1)
            return
        leaf = next(module.children(), None) is None
        norm = None if x is None or not isinstance(output, Tensor) else _norm_of(module, path, x, output)
        origin = Origin(type(module).__name__, norm, source)
        self._made(output, origin, rank=2, over=1 if leaf or norm is not None else 0, unless=key)

    def _made(self, output: Any, origin: Origin | None, *, rank: int, over: int, unless: Key | None = None) -> None:
        """Note an origin, unless one of a rank above `over` is known, or the output is the input.

        A container ends after its last layer and gives the same tensor: the layer stays. A layer replaces the
        functions that it called.
        """
        for tensor in tensors_in([output]):
            key = key_of(tensor)
            known = None if key is None else self._of.get(key)
            if origin is not None and key is not None and key != unless and (known is None or known[1] <= over):
                self._of[key] = (origin if known is None else replace(origin, inner=known[0])), rank


def gains(module: nn.Module, unit_offset: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gain and offset of a norm layer as they are now, in at least float32; None where it has none."""
    gain, offset = getattr(module, "weight", None), getattr(module, "bias", None)
    gain = None if gain is None else gain.to(torch.promote_types(gain.dtype, torch.float32))
    if gain is not None and unit_offset:
        gain = gain + 1
    return gain, None if offset is None else offset.to(torch.promote_types(offset.dtype, torch.float32))


def without_gain(h: Tensor, gain: Tensor | None, offset: Tensor | None) -> Tensor:
    """The z (..., d) of h = gain * z + offset, in at least float32."""
    z = h.to(torch.promote_types(h.dtype, torch.float32))
    z = z if offset is None else z - offset
    return z if gain is None else z / gain


def invertible(gain: Tensor | None, offset: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `without_gain` is well defined, and the rounding of an h of this dtype stays below 1 in every z."""
    if gain is None:
        return True
    loss = torch.zeros_like(gain) if offset is None else torch.finfo(dtype).eps * offset.abs()
    return bool(((gain != 0) & (loss <= gain.abs())).all())


def _norm_of(module: nn.Module, path: str, x: Tensor, output: Tensor) -> Norm | None:
    """The norm over the last axis, or over the channels of maps, that this call proves a module to be.

    Its class plays no part; None if it is none.
    """
    gain = getattr(module, "weight", None)
    plain = next(module.parameters(), None) is None and "norm" in type(module).__name__.lower()
    if x.shape != output.shape or not (x.is_floating_point() and output.is_floating_point()) or x.numel() == 0:
        return None
    for axis in (-1, 1) if x.ndim == 4 else (-1,):
        if plain or (isinstance(gain, Tensor) and gain.shape == output.movedim(axis, -1).shape[-1:]):
            found = _kind_of(module, plain, x.movedim(axis, -1), output.movedim(axis, -1))
            if found is not None:
                return Norm(path, *found, output.shape[axis], output.stride(axis))
    return None


def _kind_of(module: nn.Module, plain: bool, x: Tensor, output: Tensor) -> tuple[Literal["layer", "rms"], bool] | None:
    """Which norm over the last axis makes this output of x, and whether its gain is 1 + weight."""
    given_eps = (getattr(module, name, None) for name in ("eps", "variance_epsilon", "epsilon"))
    eps = next((value for value in given_eps if value is not None), 0.0)
    x, given = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (x, output))
    bound = max(1e-4, 4 * torch.finfo(output.dtype).eps) * float(given.abs().max())
    for kind in _KINDS:
        centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        z = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        for unit_offset in (False,) if plain else (False, True):
            factor, offset = (None, None) if plain else gains(module, unit_offset)
            expected = z if factor is None else z * factor
            expected = expected if offset is None else expected + offset
            if bool(((expected - given).abs() <= bound).all()):
                return kind, unit_offset
    return None


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values, and those directly inside containers among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from (each for each in value.values() if isinstance(each, Tensor))
        elif isinstance(value, tuple | list):
            yield from (each for each in value if isinstance(each, Tensor))


def key_of(tensor: Tensor) -> Key | None:
    """Storage and version of a tensor; None for one without storage."""
    if tensor.layout != torch.strided:
        return None  # a sparse one
    return StorageWeakRef(tensor.untyped_storage()), version_of(tensor)
