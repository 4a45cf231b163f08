"""Running someone else's model without leaving a trace, and reading what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compiled_parts_eager", "evaluating", "first_input", "logits_of", "submodule", "untouched", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile.

    Raises:
        TypeError: The model is no module, or one whose calls or weights cannot be seen: TorchScript, FSDP, DTensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nn.Module")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    for name, module in model.named_modules():
        where = f"{type(module).__name__} at {name!r}" if name else f"the model is a {type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{where}: what TorchScript computes cannot be watched; give the model it was made from")
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"{where}: its weights are sharded, and a head that refers to them would soon refer to nothing; "
                "gather them into a plain copy of the model first"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise TypeError(f"parameter {name!r} is a DTensor; gather it (full_tensor()) in a plain copy of the model")
    return model


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module of that name, or a ValueError that lists those there are."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, module in model.named_modules() if name and next(module.children(), None) is None]
        shown = ", ".join(map(repr, names[-8:])) or "none"
        raise ValueError(f"the model has no module at path {path!r}; its last modules: {shown}") from None


def compiled_parts_eager(model: nn.Module, path: str | None = None) -> AbstractContextManager[Any]:
    """Run parts that torch.compile has taken as they were written, where the path (or any) leads into one."""
    names = [path] if path is not None else [name for name, _ in model.named_modules()]
    inside = any("_orig_mod" in name.split(".") for name in names)
    return torch.compiler.set_stance("force_eager") if inside else nullcontext()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for a while; afterwards training flags, buffers and random states are as before."""
    buffers = [
        (module, name, value, value.clone())
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None
    ]
    tensors = chain(model.parameters(), (value for _, _, value, _ in buffers))
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with evaluating(model), torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
        try:
            yield
        finally:
            for module, name, value, copy in buffers:
                if not torch.equal(value, copy):
                    value.copy_(copy)
                module._buffers[name] = value


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

    That is the tensor itself, ``.logits``, ``["logits"]``, ``["out"]``, a tuple's or list's first tensor that is
    no scalar (a loss, say), or the one such tensor of a mapping or dataclass.
    """
    candidates = [output, getattr(output, "logits", None)]
    names = ""
    if isinstance(output, Mapping):
        values = list(output.values())
        candidates += [output.get("logits"), output.get("out")]
        names = f" with keys {list(output)}"
    elif isinstance(output, tuple | list):
        values = list(output)
        candidates += [value for value in values if isinstance(value, Tensor) and value.ndim][:1]
    elif dataclasses.is_dataclass(output):
        values = [getattr(output, field.name) for field in dataclasses.fields(output)]
        names = f" with fields {[field.name for field in dataclasses.fields(output)]}"
    else:
        values = []
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
    candidates += tensors if len(tensors) == 1 else []
    for candidate in candidates:
        if isinstance(candidate, Tensor):
            return candidate
    raise TypeError(
        f"the model's output is a {type(output).__name__}{names}, which holds no logits; wrap the model "
        "so that it returns a tensor, an object with .logits, a dict with 'logits' or 'out', or a tuple"
    )


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a layer that takes one tensor, as its forward hook sees it."""
    value = next(iter([*args, *kwargs.values()]), None)
    return value if isinstance(value, Tensor) else None
