"""Origins of tensors: the module or function that returned them, and whether it is a norm layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from penult._row_blocks import version_of
from penult.head._foreign import attribute, in_memory, is_real, name_of, tensor_attribute, tensors_in

__all__ = [
    "PASS_THROUGH",
    "Key",
    "Norm",
    "Origin",
    "Origins",
    "gain_and_offset",
    "invertible",
    "key_of",
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
# For functions with these words in their names, the function says more than the name of the module around it.
_INFORMATIVE = ("relu", "tanh", "sigmoid", "softsign", "elu", "silu", "swish", "norm", *_POOLING)


@dataclass(frozen=True)
class Norm:
    """A norm layer, recognised by its input and output.

    Attributes:
        path: Name of its module.
        kind: ``"layer"`` if the mean is subtracted, ``"rms"`` if not.
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
    """The module or function that returned a tensor.

    Attributes:
        name: Class name of the module or name of the function.
        norm: The norm layer, if it is one.
        source: Origin of its (largest) input tensor.
        inner: The last function that it ran, if it is a module.
    """

    name: str
    norm: Norm | None
    source: Origin | None
    inner: Origin | None = None

    @property
    def pooled(self) -> Origin | None:
        """Origin of the tensor that was averaged, if this is an average."""
        if self.inner is not None:
            return self.inner.pooled
        return self.source if any(word in self.name.lower() for word in _POOLING) else None

    @property
    def scaled(self) -> bool:
        """Whether the function is a multiplication or division."""
        return self.name.strip("_") in ("mul", "rmul", "div", "truediv")

    @property
    def normalized(self) -> bool:
        """Whether the function divided vectors by their norms, or multiplied such vectors by a number."""
        return "normalize" in self.name or (self.scaled and self.source is not None and self.source.normalized)


class Origins:
    """Remembers which call returned each tensor, by storage and version.

    A view therefore has the origin of its base, and an in-place operation gives a tensor a new origin.
    """

    def __init__(self) -> None:
        # The keys hold weak references to storages, which free the memory but keep the address from being used again.
        self._origins: dict[Key, tuple[Origin, int]] = {}

    def get(self, key: Key | None) -> Origin | None:
        """Return the origin of a tensor; None for the model's inputs and parameters."""
        entry = None if key is None else self._origins.get(key)
        return None if entry is None else entry[0]

    def record_function(self, func: Any, source: Origin | None, output: Any) -> None:
        """Record that a torch function returned `output` for a tensor of origin `source`."""
        name = name_of(func)
        if name in PASS_THROUGH:
            self._record(output, source, rank=0, replaced_rank=-1)
        else:
            informative = any(word in name for word in _INFORMATIVE)
            self._record(output, Origin(name, None, source), rank=1 if informative else 0, replaced_rank=-1)

    def record_module(self, module: nn.Module, path: str, x: Tensor | None, key: Key | None, output: Any) -> None:
        """Record that a module returned `output` for x, whose key was `key` before the call."""
        source = self.get(key)
        if isinstance(module, _PASS_THROUGH_MODULES):
            self._record(output, source, rank=2, replaced_rank=-1)
            return
        leaf = next(module.children(), None) is None
        norm = None if x is None or not isinstance(output, Tensor) else _detect_norm(module, path, x, output)
        origin = Origin(type(module).__name__, norm, source)
        self._record(output, origin, rank=2, replaced_rank=1 if leaf or norm is not None else 0, input_key=key)

    def _record(
        self, output: Any, origin: Origin | None, *, rank: int, replaced_rank: int, input_key: Key | None = None
    ) -> None:
        """Store an origin, unless one of a rank above `replaced_rank` is stored, or the output is the input."""
        # A container returns the tensor of its last layer, and the origin stays that layer. A layer replaces the
        # functions that it called.
        for tensor in tensors_in([output]):
            key = key_of(tensor)
            if origin is None or key is None or key == input_key:
                continue
            known = self._origins.get(key)
            if known is None or known[1] <= replaced_rank:
                self._origins[key] = (origin if known is None else replace(origin, inner=known[0])), rank


def gain_and_offset(module: nn.Module, unit_offset: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the current gain and offset of a norm layer, in at least float32; None for those that it lacks."""
    gain, offset = tensor_attribute(module, "weight"), tensor_attribute(module, "bias")
    gain = None if gain is None else gain.to(torch.promote_types(gain.dtype, torch.float32))
    if gain is not None and unit_offset:
        gain = gain + 1
    return gain, None if offset is None else offset.to(torch.promote_types(offset.dtype, torch.float32))


def without_gain(h: Tensor, gain: Tensor | None, offset: Tensor | None) -> Tensor:
    """Return z (..., d) with h = gain * z + offset, in at least float32."""
    z = h.to(torch.promote_types(h.dtype, torch.float32))
    z = z if offset is None else z - offset
    return z if gain is None else z / gain


def invertible(gain: Tensor | None, offset: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `without_gain` is well defined, and rounding of h in this dtype changes every z by less than 1."""
    if gain is None:
        return True
    loss = torch.zeros_like(gain) if offset is None else torch.finfo(dtype).eps * offset.abs()
    return bool(((gain != 0) & (loss <= gain.abs())).all())


def _detect_norm(module: nn.Module, path: str, x: Tensor, output: Tensor) -> Norm | None:
    """Return the norm over the last axis, or over the channels of maps, that maps x to the output; None if none does.

    The class of the module is not used.
    """
    if not (is_real(x) and is_real(output)) or x.shape != output.shape or x.numel() == 0:
        return None
    affine = [part for name in ("weight", "bias") if (part := tensor_attribute(module, name)) is not None]
    plain = next(module.parameters(), None) is None and "norm" in type(module).__name__.lower()
    if not plain and (tensor_attribute(module, "weight") is None or not all(map(is_real, affine))):
        return None
    for axis in (-1, 1) if x.ndim == 4 else (-1,):
        if plain or all(part.shape == output.movedim(axis, -1).shape[-1:] for part in affine):
            kind = _norm_kind(module, plain, x.movedim(axis, -1), output.movedim(axis, -1))
            if kind is not None:
                return Norm(path, *kind, output.shape[axis], output.stride(axis))
    return None


def _norm_kind(
    module: nn.Module, plain: bool, x: Tensor, output: Tensor
) -> tuple[Literal["layer", "rms"], bool] | None:
    """Return the kind of norm over the last axis that maps x to the output, and whether its gain is 1 + weight."""
    given_eps = (attribute(module, name) for name in ("eps", "variance_epsilon", "epsilon"))
    eps = next((value for value in given_eps if _is_number(value)), 0.0)
    x, target = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (x, output))
    bound = max(1e-4, 4 * torch.finfo(output.dtype).eps) * float(target.abs().max())
    for kind in _KINDS:
        centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        z = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        for unit_offset in (False,) if plain else (False, True):
            factor, offset = (None, None) if plain else gain_and_offset(module, unit_offset)
            expected = z if factor is None else z * factor
            expected = expected if offset is None else expected + offset
            if bool(((expected - target).abs() <= bound).all()):
                return kind, unit_offset
    return None


def _is_number(value: Any) -> bool:
    """Whether a value is a number or a tensor of one number."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and is_real(value) and value.numel() == 1)


def key_of(tensor: Tensor) -> Key | None:
    """Return the storage and version of a tensor; None if it is not in memory."""
    if not in_memory(tensor):
        return None
    return StorageWeakRef(tensor.untyped_storage()), version_of(tensor)
