"""Abstract class of fitted outlier scores, and helpers that load buffers of another size."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from penult._checks import as_activations
from penult.activations import _ActivationSource
from penult.special import in_range

__all__ = ["KINDS", "Score", "Shape", "as_score", "drop_missing", "resize"]

_S = TypeVar("_S", bound="Score")

# Axes of a buffer: a number, "d" for the dimension of activations, or another letter for a size that follows from data.
Shape = tuple[str | int, ...]

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

    # Shapes of the buffers that are stored.
    _shapes: ClassVar[dict[str, Shape]] = {}

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
