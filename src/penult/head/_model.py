"""Running someone else's model without leaving a trace, and reading what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "evaluating",
    "first_input",
    "is_view",
    "linear_at",
    "logits_of",
    "normalized",
    "same_view",
    "unwrap",
]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The nn.Linear of that name, or a ValueError that lists those there are."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if isinstance(module, nn.Linear):
        return module
    what = "no module" if module is None else f"a {type(module).__name__}, not an nn.Linear,"
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    shown = ", ".join(map(repr, names[-8:])) or "none"
    raise ValueError(f"the model has {what} at path {path!r}; its last nn.Linear modules: {shown}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module has its own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output, as `find_head` and `Tap` understand it.

    That is the tensor itself, ``.logits``, ``["logits"]``, ``["out"]``, or a tuple's or list's first tensor.
    """
    candidates = [output, getattr(output, "logits", None)]
    if isinstance(output, Mapping):
        candidates += [output.get("logits"), output.get("out")]
    elif isinstance(output, tuple | list):
        candidates += output
    for candidate in candidates:
        if isinstance(candidate, Tensor):
            return candidate
    names = f" with keys {list(output)}" if isinstance(output, Mapping) else ""
    raise TypeError(
        f"the model's output is a {type(output).__name__}{names}, which holds no logits; wrap the model "
        "so that it returns a tensor, an object with .logits, a dict with 'logits' or 'out', or a tuple"
    )


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a layer that takes one tensor, as its forward hook sees it."""
    value = next(iter([*args, *kwargs.values()]), None)
    return value if isinstance(value, Tensor) else None


def normalized(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """What the norm layer makes of x (..., d) before its affine part."""
    shape = list(norm.normalized_shape)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(x, shape, None, norm.eps)
    return F.layer_norm(x, shape, None, None, norm.eps)


def is_view(view: Tensor, base: Tensor) -> bool:
    """Whether `view` is `base` or a view of it, such as the class token among all tokens."""
    if view is base:
        return True
    if view.dtype != base.dtype or not base.is_contiguous():
        return False
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def same_view(view: Tensor, base: Tensor, other: Tensor) -> Tensor:
    """The view of `other` that `view` is of `base`; both have one shape."""
    if view is base:
        return other
    other = other.contiguous()
    offset = view.storage_offset() - base.storage_offset() + other.storage_offset()
    return other.as_strided(view.size(), view.stride(), offset)
