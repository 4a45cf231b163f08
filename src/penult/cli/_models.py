"""What the commands are given: models, heads, data sets, seeds."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from penult.head import Head
    from penult.pair import GenerativePair

__all__ = [
    "device_of",
    "folder_path",
    "is_file",
    "load_head",
    "load_model",
    "load_pair",
    "pair_path",
    "running",
    "users_code",
]


def is_file(model: str) -> bool:
    """Whether a MODEL is a file rather than a factory."""
    return model.endswith(".safetensors") or Path(model).exists()


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """The model that ``package.module:factory`` gives; the current folder is looked in as well.

    Raises:
        ValueError: The name has another form, there is no such module or factory, or it makes no nn.Module.
    """
    from torch import nn

    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        module, _, last = name.rpartition(".")
        guess = f"; did you mean {module}:{last}?" if not colon and module and last.isidentifier() else ""
        raise ValueError(f"MODEL {name!r} is neither a .safetensors file nor of the form package.module:factory{guess}")
    if module_name.startswith(".") or "/" in module_name or module_name.endswith(".py"):
        raise ValueError(
            f"MODEL {name!r}: {module_name!r} is a path; name the module as Python imports it, such as mynets:factory "
            "for mynets.py in the current folder"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with users_code(f"MODEL {name!r}"):
            factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"MODEL {name!r}: there is no module {error.name!r} on the Python path or in {os.getcwd()}"
        ) from error
    except AttributeError as error:
        held = getattr(factory, "__dict__", {})  # of a module or a class; a number has none
        its = [each for each, value in held.items() if getattr(value, "__module__", None) == module_name]
        raise ValueError(f"MODEL {name!r}: {error}" + (f"; it has {', '.join(its[:8])}" if its else "")) from error
    if not callable(factory):
        raise ValueError(f"MODEL {name!r} is a {type(factory).__name__}, not a factory that takes no arguments")
    with users_code(f"the factory of MODEL {name!r} (it is called without arguments)"):
        model = factory if isinstance(factory, nn.Module) else factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL {name!r} gave {type(model).__name__}, which is no nn.Module")
    if weights is not None:
        _load_weights(model, weights)
    return model


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Say whose error it was, in one line, where something of the user's own runs."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a model or a factory raises
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and frame.f_globals.get("__name__", "").partition(".")[0] == "penult":
            raise  # which says it all
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{what} raised {type(error).__name__}: {first}") from error


@contextmanager
def running(shape: tuple[int, ...]) -> Iterator[None]:
    """Say which input a model did not take."""
    hint = "batch, channels, height, width; see --size, --mode, --mean and --shape"
    with users_code(f"the model, given images of shape {shape} ({hint}),"):
        yield


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise ValueError(f"--weights {path} does not exist")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"--weights {path} is no safetensors file, and penult reads no pickles. Convert a .pt or .pth file once: "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), "
            f"{path.with_suffix('.safetensors').name!r}); or load it in a factory of your own"
        ) from error
    found = model.load_state_dict(state, strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise ValueError(
            f"--weights {path} does not fit the model: missing {found.missing_keys[:5]}, unexpected "
            f"{found.unexpected_keys[:5]}"
        )


def load_pair(path: str | Path, weight_key: str | None = None, bias_key: str | None = None) -> GenerativePair:
    """A pair that penult wrote, or the data-free pair of a head among the tensors of another safetensors file.

    Raises:
        ValueError: No such file, a damaged one, or no unambiguous head in it.
    """
    from penult.pair import GenerativePair, load

    if weight_key is None and bias_key is None and _is_penults(path):
        return load(path)
    head = load_head(path, weight_key, bias_key)
    try:
        return GenerativePair(head)
    except ValueError as error:  # such as of two equal rows
        raise ValueError(f"the head in {path} makes no pair without data: {error}") from error


def load_head(path: str | Path, weight_key: str | None = None, bias_key: str | None = None) -> Head:
    """The head of a pair that penult wrote, or one among the tensors of another safetensors file.

    Raises:
        ValueError: No such file, a damaged one, or no unambiguous head in it.
    """
    from penult.head import Head
    from penult.pair import load

    if weight_key is None and bias_key is None and _is_penults(path):
        return load(path).head
    tensors = _head_tensors(Path(path), weight_key, bias_key)
    try:
        return Head(*tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no head there: {error}") from error


def _is_penults(path: str | Path) -> bool:
    """Whether penult wrote a safetensors file; what is none, or is not there, is an error."""
    from safetensors import SafetensorError, safe_open

    from penult import io

    if not Path(path).exists():
        raise ValueError(f"{path} does not exist")
    if Path(path).is_dir():
        if (Path(path) / "config.json").exists():
            raise ValueError(
                f"{path} is a folder of a Hugging Face model: name a factory that loads it, package.module:factory; or "
                f"give {Path(path) / 'model.safetensors'} for the head alone"
            )
        raise ValueError(f"{path} is a folder; a pair is a file, which penult fit makes of a folder of activations")
    if not Path(path).is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is a device or pipe; write it to a file first")
    try:
        with safe_open(path, framework="pt") as file:
            return "penult" in (file.metadata() or {})
    except SafetensorError:
        io.read(path)  # which says what it is instead
        raise


def _head_tensors(path: Path, weight_key: str | None, bias_key: str | None) -> tuple[Tensor, Tensor | None]:
    """W and b of a state dict: as named, or its only matrix with a bias."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # no mapping
        if weight_key is None:
            matrices = [name for name, shape in shapes.items() if len(shape) == 2 and name.endswith("weight")]
            heads = [name for name in matrices if shapes.get(_bias_of(name)) == shapes[name][:1]]
            if len(matrices) != 1 and len(heads) != 1:
                shown = ", ".join(f"{name} {shapes[name]}" for name in matrices[-6:]) or "none"
                raise ValueError(
                    f"{path} holds no unambiguous head; name it with --weight-key and --bias-key. Its matrices: {shown}"
                )
            weight_key = heads[0] if len(heads) == 1 else matrices[0]
        if bias_key is None and shapes.get(_bias_of(weight_key)) == shapes.get(weight_key, ())[:1]:
            bias_key = _bias_of(weight_key)
        for key in (weight_key, bias_key):
            if key is not None and key not in shapes:
                raise ValueError(f"{path} holds no tensor {key!r}; it holds {', '.join(list(shapes)[-8:])}")
        try:
            return file.get_tensor(weight_key), None if bias_key is None else file.get_tensor(bias_key)
        except (OverflowError, TypeError, ValueError) as error:  # of a shape that torch cannot have
            raise ValueError(f"{path} is damaged: {weight_key!r} or {bias_key!r} cannot be read: {error}") from error


def _bias_of(weight_key: str) -> str:
    return weight_key.removesuffix("weight") + "bias"


def pair_path(out: Path) -> Path:
    """Where a pair is to be written, under a name that says what it is, before anything is computed."""
    if out.suffix != ".safetensors":
        raise ValueError(
            f"--out {out} is a safetensors file, so name it such as {out.with_suffix('')}.penult.safetensors"
        )
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    return out


def folder_path(out: Path) -> Path:
    """Where activations are to be written: a folder."""
    if out.suffix in (".npz", ".npy", ".pt", ".pth", ".safetensors", ".parquet"):
        raise ValueError(f"--out {out} becomes a folder of shards; give it a name without {out.suffix}")
    return out


def device_of(name: str) -> torch.device:
    """The device of that name, if there is one.

    Raises:
        ValueError: There is none.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
