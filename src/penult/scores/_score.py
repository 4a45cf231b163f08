"""Abstract class of fitted outlier scores, and helpers that load buffers of another size."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from penult._checks import as_activations, check_finite, check_floating
from penult.activations import _ActivationSource
from penult.head import Head
from penult.special import in_range

__all__ = ["KINDS", "Score", "Shape", "as_score", "drop_missing", "resize"]

_S = TypeVar("_S", bound="Score")

# Axes of a buffer: a number, "d" for the dimension of activations, or another letter for a size that follows from data.
Shape = tuple[str | int, ...]

# Names of stored tensors that are no buffers.
_EXTRA, _REFERENCE = "_extra_state", "reference"

# Classes of scores by their kind.
KINDS: dict[str, type[Score]] = {}


class Score(nn.Module, abc.ABC):
    """An outlier score that is fitted to reference activations. Calling it is the same as calling `score`.

    Scores are computed in at least float32, also under torch.autocast. A score loads the state dict of any other score
    of its kind and dimension, even if the two were fitted to different numbers of rows or classes.

    Attributes:
        reference: Digest of the whole set of activations that the score was fitted to, None if it is not known. State
            dicts do not hold it.
    """

    reference: str | None = None

    kind: ClassVar[str] = ""
    """Name of the kind of score in files. A score without one cannot be stored."""

    # Shapes of the buffers that are stored, and whether there are also a head and an extra state.
    _shapes: ClassVar[dict[str, Shape]] = {}
    _has_head: ClassVar[bool] = False
    _needs_extra: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__ and cls.__module__.startswith("penult."):
            KINDS[cls.kind] = cls

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.reference = None
        for name, axes in self._shapes.items():
            loaded, own = state.get(prefix + name), getattr(self, name)
            free = [isinstance(axis, str) and axis != "d" for axis in axes]
            if loaded is None or loaded.dim() != own.dim() or not any(free):
                continue
            if all(f or size == n for f, size, n in zip(free, loaded.shape, own.shape, strict=True)):
                resize(self, name, loaded.shape, own.dtype)
        super()._load_from_state_dict(state, prefix, *args)
        drop_missing(args, f"{prefix}_extra_state")

    @abc.abstractmethod
    def score(self, h: Tensor) -> Tensor:
        """Return the scores (B,) of activations (B, d); higher means more unusual."""

    @property
    @abc.abstractmethod
    def in_features(self) -> int:
        """The dimension d of activations."""

    def forward(self, h: Tensor) -> Tensor:
        """Return `score(h)`."""
        return self.score(h)

    @property
    def _fitted_digest(self) -> str | None:
        """Digest of the activations that the score depends on."""
        return self.reference

    def _stored(self) -> dict[str, Tensor]:
        """Return all tensors of the score but its head, and its digest as bytes."""
        state: dict[str, Tensor] = self.state_dict()
        tensors = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        if self.reference is not None:
            tensors[_REFERENCE] = torch.tensor(list(self.reference.encode()), dtype=torch.uint8, device="cpu")
        return tensors

    @classmethod
    def _restored(cls: type[_S], tensors: Mapping[str, Tensor], head: Head) -> _S:
        """Return the score of `_stored`, for activations of a head; raise a ValueError for tensors that do not fit."""
        score = cls.__new__(cls)
        nn.Module.__init__(score)
        if cls._has_head:
            score.head = head
        sizes = {"d": head.in_features}
        for name, axes in cls._shapes.items():
            tensor = tensors.get(name)
            shape = None if tensor is None else tuple(tensor.shape)
            if tensor is None or shape is None or len(shape) != len(axes):
                raise ValueError(f"{name} has shape {shape}; expected {axes}")
            expected = tuple(
                sizes.setdefault(a, n) if isinstance(a, str) else a for n, a in zip(shape, axes, strict=True)
            )
            if shape != expected or 0 in shape:
                raise ValueError(f"{name} has shape {shape}; expected {expected}")
            check_floating(name, tensor, str(axes))
            check_finite(name, tensor.reshape(-1))
            score.register_buffer(name, tensor.to(head.weight.device))
        if unknown := sorted(set(tensors) - {*cls._shapes, _EXTRA, _REFERENCE}):
            raise ValueError(f"{cls.kind} has no {', '.join(unknown)}")
        if cls._needs_extra and _EXTRA not in tensors:
            raise ValueError(f"{_EXTRA} is missing; expected it for {cls.kind}")
        if _EXTRA in tensors:
            score.set_extra_state(tensors[_EXTRA])
        if _REFERENCE in tensors:
            score.reference = bytes(tensors[_REFERENCE].tolist()).decode()
        return score

    def _fitted_to(self: _S, source: _ActivationSource) -> _S:
        """Remember the reference activations."""
        self.reference = source.digest
        return self

    def _read(self, h: Tensor) -> Tensor:
        """Check activations and convert them to float32 or wider, and to float64 where float32 would overflow."""
        h = as_activations(h, shape=f"(B, {self.in_features})")
        if h.dim() != 2 or h.shape[1] != self.in_features:
            raise ValueError(f"h has shape {tuple(h.shape)}; expected activations (B, {self.in_features})")
        return in_range(h)


def as_score(scores: Tensor, h: Tensor) -> Tensor:
    """Return scores in the dtype of activations, but at least float32."""
    return scores.to(torch.promote_types(as_activations(h).dtype, torch.float32))


# --- loading buffers whose size depends on the data ---------------------------------------------------------


def resize(module: nn.Module, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    """Give a buffer another shape and dtype before its values are loaded; it stays on its device."""
    own: Tensor = getattr(module, name)
    if own.shape != shape or own.dtype != dtype:
        setattr(module, name, own.new_empty(shape, dtype=dtype))


def drop_missing(arguments: tuple[Any, ...], key: str) -> None:
    """Remove a key from the missing keys, given the arguments of ``_load_from_state_dict`` after the prefix."""
    missing: list[str] = arguments[2]
    if key in missing:
        missing.remove(key)
