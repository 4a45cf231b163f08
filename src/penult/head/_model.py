"""Running someone else's model without leaving a trace, and reading what it returns."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "compiled_parts_eager",
    "evaluating",
    "first_input",
    "has_compiled_parts",
    "is_scripted",
    "logits_of",
    "submodule",
    "tensor_at",
    "untouched",
    "unwrap",
]


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
    if is_scripted(model):
        raise TypeError("the model is TorchScript, whose calls cannot be watched; give the model it was made from")
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"the weights of {name or 'the model'!r} are sharded (FSDP), and a head that refers to them would soon "
                "refer to nothing; gather them into a plain copy of the model first"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise TypeError(f"parameter {name!r} is a DTensor; gather it (full_tensor()) in a plain copy of the model")
    return model


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is TorchScript."""
    return isinstance(module, torch.jit.ScriptModule)


def tensor_at(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name, or None."""
    path, _, last = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(path), last, None)
    except AttributeError:
        return None
    return tensor if isinstance(tensor, Tensor) else None


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module of that name, or a ValueError that lists those there are."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, module in model.named_modules() if name and next(module.children(), None) is None]
        shown = ", ".join(map(repr, names[-8:])) or "none"
        raise ValueError(f"the model has no module at path {path!r}; its last modules: {shown}") from None


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether torch.compile has taken a module of the model."""
    return any(
        "_orig_mod" in name.split(".") or getattr(module, "_compiled_call_impl", None) is not None
        for name, module in model.named_modules()
    )


def compiled_parts_eager(model: nn.Module, path: str | None = None) -> AbstractContextManager[Any]:
    """Run what torch.compile has taken as it was written: anywhere, or if it holds the module at a path."""
    if path is not None and "_orig_mod" not in path.split("."):
        return nullcontext()
    # Before it is loaded, which takes seconds, nothing can be compiled; older versions of torch have no stances.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for a while; afterwards training flags, buffers and random states are as before.

    Random states are torch's, Python's and NumPy's; a generator of the model's own cannot be seen.
    """
    buffers = [(module, dict(module._buffers)) for module in model.modules() if not is_scripted(module)]
    copies = [(value, value.clone()) for _, held in buffers for value in held.values() if value is not None]
    tensors = list(chain(model.parameters(), (value for value, _ in copies)))
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    born = any(tensor.is_inference() for tensor in tensors)  # such a model runs in inference mode only
    with (
        evaluating(model),
        torch.random.fork_rng(devices=devices),
        _kept_random(),
        nullcontext() if born else torch.inference_mode(False),
        torch.no_grad(),
    ):
        try:
            yield
        finally:
            for value, copy in copies:
                if value.shape != copy.shape or not torch.equal(value, copy):
                    value.resize_(copy.shape).copy_(copy)
            for module, held in buffers:
                module._buffers.clear()
                module._buffers.update(held)


@contextmanager
def _kept_random() -> Iterator[None]:
    """The random states of Python and, if it is loaded, NumPy."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module has its own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            if type(module).train is not nn.Module.train:  # which may do more than set the flag, as merging weights
                module.train(training)
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
