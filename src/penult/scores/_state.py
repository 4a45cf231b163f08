"""Loading of state whose sizes a fit decided on, into modules that were fitted to other data."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["drop_missing", "resize"]


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
