"""What outlier scores that are fitted share: `score`, and a state that outlives the data it was fitted to."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Score", "drop_missing", "resize"]


class Score(nn.Module, abc.ABC):
    """An outlier score with a fit of its own: `score`, which calling it does as well.

    Scores are computed in at least float32, under torch.autocast as well. A state dict is loaded by a score of the same
    kind and dimension, however many rows or classes the two were fitted to.
    """

    _sizes: ClassVar[dict[str, int]] = {}  # buffers, and the axis along which a fit decides on their size

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, axis in self._sizes.items():
            found, own = state.get(prefix + name), getattr(self, name)
            if found is not None and found.dim() == own.dim() and found.shape[1 - axis] == own.shape[1 - axis]:
                resize(self, name, found, like=own)
        super()._load_from_state_dict(state, prefix, *args)
        drop_missing(args, f"{prefix}_extra_state")

    @abc.abstractmethod
    def score(self, h: Tensor) -> Tensor:
        """How strange activations (B, d) are, (B,): higher is stranger."""

    @property
    @abc.abstractmethod
    def in_features(self) -> int:
        """The dimension d of activations."""

    def forward(self, h: Tensor) -> Tensor:
        """As `score`."""
        return self.score(h)

    def _read(self, h: Tensor) -> Tensor:
        """Activations in at least float32, or an error."""
        if not h.is_floating_point() or h.dim() != 2 or h.shape[1] != self.in_features:
            raise ValueError(
                f"h is {h.dtype} of shape {tuple(h.shape)}; expected floating activations (B, {self.in_features})"
            )
        return h.to(torch.promote_types(h.dtype, torch.float32))


# --- Loading of state whose sizes a fit decided on, into modules that were fitted to other data -------------


def resize(module: nn.Module, name: str, found: Tensor, *, like: Tensor) -> None:
    """Give a buffer the shape of what is to be loaded into it, and the dtype of ``like``; on its own device."""
    own: Tensor = getattr(module, name)
    if own.shape != found.shape or own.dtype != like.dtype:
        setattr(module, name, own.new_empty(found.shape, dtype=like.dtype))


def drop_missing(arguments: tuple[Any, ...], key: str) -> None:
    """Forget that a key is missing; of what nn.Module._load_from_state_dict takes after the prefix."""
    missing: list[str] = arguments[2]
    if key in missing:
        missing.remove(key)
