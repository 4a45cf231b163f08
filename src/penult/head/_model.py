"""Running a user's model without changing it, and finding the logits in its output."""

from __future__ import annotations

import dataclasses
import random
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from penult.head._foreign import attribute, in_memory

__all__ = [
    "compiled_parts_eager",
    "evaluating",
    "first_input",
    "has_compiled_parts",
    "is_scripted",
    "logits_of",
    "parameter_name",
    "submodule",
    "tensor_at",
    "tensors_at",
    "untouched",
    "unwrap",
]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel and torch.compile.

    Raises:
        TypeError: The model is not a module, or its calls or weights cannot be watched: TorchScript, FSDP, DTensor.
    """
    _refuse_exported("the model", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        # A wrapper may pass attributes on to a compiled model inside, but its own forward must run.
        elif not is_scripted(model) and isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            break
    if is_scripted(model):
        raise TypeError("the model is TorchScript, whose calls cannot be watched; pass the model it was scripted from")
    for name, module in model.named_modules():
        _refuse_exported(repr(name) if name else "the model", module)
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"the weights of {name or 'the model'!r} are sharded (FSDP), and the gathered weights that a head "
                "would refer to are freed after each forward; gather them into a plain copy of the model first"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise TypeError(f"parameter {name!r} is a DTensor; gather it (full_tensor()) in a plain copy of the model")
    return model


def _refuse_exported(name: str, model: Any) -> None:
    """Raise a TypeError for a program of torch.export and for the module of one."""
    # Importing torch.export takes time, and its classes are told by their module.
    if any(kind.__module__.startswith("torch.export") for kind in type(model).__mro__):
        raise TypeError(
            f"{name} is a program of torch.export ({type(model).__name__}), whose layers and modes are gone; pass the "
            "model that it was exported from"
        )


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is TorchScript."""
    return isinstance(module, torch.jit.ScriptModule)


def tensor_at(model: nn.Module, name: str) -> Tensor | None:
    """Return the parameter or buffer of that name, or None."""
    path, _, last = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(path), last, None)
    except AttributeError:
        return None
    return tensor if isinstance(tensor, Tensor) else None


def parameter_name(module: nn.Module, tensor: Tensor) -> str | None:
    """Return the name of the parameter or buffer that a tensor is a view of, as a whole; None if there is none."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if in_memory(value) and value.numel() == tensor.numel() and value.device == tensor.device:
            if value.data_ptr() == tensor.data_ptr():
                return name
    return None


def tensors_at(model: nn.Module, path: str) -> dict[int, Tensor]:
    """Return the parameters and buffers in memory of a module, by identity; of the model itself only its own."""
    module, recurse = model.get_submodule(path), path != ""
    tensors = (*module.parameters(recurse=recurse), *module.buffers(recurse=recurse))
    return {id(x): x for x in tensors if in_memory(x)}


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module of that name; raise a ValueError that lists the last modules if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, module in model.named_modules() if name and next(module.children(), None) is None]
        shown = ", ".join(map(repr, names[-8:])) or "none"
        raise ValueError(f"the model has no module at path {path!r}; its last modules: {shown}") from None


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether torch.compile was applied to a module of the model."""
    return any(
        "_orig_mod" in name.split(".") or getattr(module, "_compiled_call_impl", None) is not None
        for name, module in model.named_modules()
    )


def compiled_parts_eager(model: nn.Module, path: str | None = None) -> AbstractContextManager[Any]:
    """Return a context that runs compiled modules without compilation.

    Args:
        model: The model.
        path: If given, do so only if a compiled module contains the module at that path.
    """
    if path is not None and "_orig_mod" not in path.split("."):
        return nullcontext()
    # Nothing is compiled before torch._dynamo is loaded, and loading it takes seconds. Older versions of torch have no
    # set_stance.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


# Training flags belong to the model and random states to the process, so that two threads would restore each other's.
_one_at_a_time = threading.RLock()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode without gradients; at the end restore training flags, buffers and random states.

    The random states of torch, Python and NumPy are restored, but not those of a generator that the model owns. Other
    threads wait until the first one leaves this context.
    """
    with _one_at_a_time:
        yield from _untouched(model)


def _untouched(model: nn.Module) -> Iterator[None]:
    buffers = [(module, dict(module._buffers)) for module in model.modules() if not is_scripted(module)]
    values = [value for _, named in buffers for value in named.values() if value is not None]
    copies = [(value, value.clone()) for value in values if in_memory(value)]
    tensors = [tensor for tensor in chain(model.parameters(), values) if in_memory(tensor)]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    # A model with inference tensors runs in inference mode only.
    inference = any(tensor.is_inference() for tensor in tensors)
    with (
        evaluating(model),
        torch.random.fork_rng(devices=devices),
        _random_states_restored(),
        nullcontext() if inference else torch.inference_mode(False),
        torch.no_grad(),
    ):
        try:
            yield
        finally:
            for value, copy in copies:
                if value.shape != copy.shape or not torch.equal(value, copy):
                    value.resize_(copy.shape).copy_(copy)
            for module, named in buffers:
                module._buffers.clear()
                module._buffers.update(named)


@contextmanager
def _random_states_restored() -> Iterator[None]:
    """Restore the random states of Python and, if it is loaded, NumPy at the end."""
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
    """Switch to eval mode; at the end restore the training flag of every module."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            # An overridden `train` may do more than set the flag, for example merge weights.
            if type(module).train is not nn.Module.train:
                module.train(training)
        for module, training in flags:
            module.training = training


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output, as `find_head` and `Tap` use it.

    They are the tensor itself, ``.logits``, ``["logits"]``, ``["out"]``, the first tensor of a tuple or list that is
    not a scalar (such as a loss), or the only such tensor of a mapping or dataclass.
    """
    candidates = [output, attribute(output, "logits")]
    names = ""
    if isinstance(output, Mapping):
        values = list(output.values())
        candidates += [output.get("logits"), output.get("out")]
        names = f" with keys {list(output)}"
    elif isinstance(output, tuple | list):
        values = list(output)
        candidates += [value for value in values if isinstance(value, Tensor) and value.ndim][:1]
    elif dataclasses.is_dataclass(output):
        values = [attribute(output, field.name) for field in dataclasses.fields(output)]
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
    """Return the first argument of a call if it is a tensor, or None."""
    value = next(iter([*args, *kwargs.values()]), None)
    return value if isinstance(value, Tensor) else None
