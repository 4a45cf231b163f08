"""Networks, heads, pairs, folders and devices that commands are given."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penult.cli._console import tell

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from penult.head import Head
    from penult.pair import GenerativePair
    from penult.scores import Score

__all__ = [
    "device_of",
    "folder_path",
    "is_file",
    "load_head",
    "load_model",
    "load_pair",
    "load_pair_and_score",
    "pair_path",
    "running",
    "same_source",
    "users_code",
]


def is_file(model: str) -> bool:
    """Return whether a MODEL is a file rather than a factory."""
    return model.lower().endswith(".safetensors") or Path(model).exists()


def load_model(
    name: str, weights: Path | None = None, argument: str = "MODEL", weights_option: str = "--weights"
) -> nn.Module:
    """Call the factory ``package.module:factory``; the current folder is searched as well.

    Args:
        name: The factory.
        weights: State dict for the model, or None.
        argument: Argument or option that gives the name, for messages.
        weights_option: Option that gives the weights, for messages.

    Raises:
        ValueError: The name has another form, there is no such module or factory, or it returns no nn.Module.
    """
    from torch import nn

    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        module, _, last = name.rpartition(".")
        guess = f"; did you mean {module}:{last}?" if not colon and module and last.isidentifier() else ""
        raise ValueError(
            f"{argument} {name!r} is neither a .safetensors file nor of the form package.module:factory{guess}"
        )
    # The colon of a Windows path follows the drive, so the whole name is searched for separators.
    if module_name.startswith(".") or module_name.endswith(".py") or "/" in name or "\\" in name:
        raise ValueError(
            f"{argument} {name!r} is a path; name the module as Python imports it, such as mynets:factory for "
            "mynets.py in the current folder"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with users_code(f"{argument} {name!r}"):
            factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{argument} {name!r}: there is no module {error.name!r} on the Python path or in {os.getcwd()}"
        ) from error
    except AttributeError as error:
        # Modules and classes have a __dict__; a number, for example, has none.
        attributes = getattr(factory, "__dict__", {})
        own = [key for key, value in attributes.items() if getattr(value, "__module__", None) == module_name]
        raise ValueError(f"{argument} {name!r}: {error}" + (f"; it has {', '.join(own[:8])}" if own else "")) from error
    if not callable(factory):
        raise ValueError(
            f"{argument} {name!r} is a {type(factory).__name__}; expected a factory that takes no arguments"
        )
    with users_code(f"the factory of {argument} {name!r} (it is called without arguments)"):
        model = factory if isinstance(factory, nn.Module) else factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{argument} {name!r} returns a {type(model).__name__}; expected a torch.nn.Module")
    if weights is not None:
        _load_weights(model, weights, weights_option)
    return model


@contextmanager
def users_code(subject: str) -> Iterator[None]:
    """Report an error in the user's own code in one line that names the code."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and frame.f_globals.get("__name__", "").partition(".")[0] == "penult":
            # Errors of penult's own need no explanation.
            raise
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{subject} raised {type(error).__name__}: {first}") from error


@contextmanager
def running(shape: tuple[int, ...], network: str) -> Iterator[None]:
    """Report an error of a network in one line that names the network and the shape of its inputs."""
    hint = "batch, channels, height, width; see --size, --mode, --mean and --shape"
    with users_code(f"{network}, given images of shape {shape} ({hint}),"):
        yield


def _load_weights(model: nn.Module, path: Path, option: str = "--weights") -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from penult.io import _other_kind

    if not path.is_file():
        raise ValueError(f"{option} {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        state = load_file(path)
    except SafetensorError as error:
        convert = (
            "penult reads no pickles. Convert a .pt or .pth file once: "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), "
            f"{path.with_suffix('.safetensors').name!r}); or load it in a factory of your own"
        )
        message = _other_kind(path, "a safetensors file", {"a pickle": convert, "a zip archive": convert})
        raise ValueError(f"{option} {message or f'{path} is no safetensors file, and {convert}'}") from error
    own = model.state_dict()
    state, change = _renamed(state, own)
    missing, unexpected = _misfits(state, own)
    if missing or unexpected:
        raise ValueError(
            f"{option} {path} does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}; expected the "
            "names of the model's state_dict()"
        )
    for names in _shared(own).values():
        stored = [name for name in names if name in state]
        if any(not torch.equal(state[name], state[stored[0]]) for name in stored[1:]):
            raise ValueError(
                f"{option} {path} holds different tensors for {' and '.join(stored)}, which are one tensor in the "
                "model; give a factory whose model does not share them"
            )
    if change:
        tell(f"{option} {path}: {change}")
    model.load_state_dict(state, strict=False)


def _shared(own: Mapping[str, Tensor]) -> dict[Any, list[str]]:
    """Return the names of each tensor of a state dict; tied weights have several."""
    from torch import Tensor

    names: dict[Any, list[str]] = {}
    for name, value in own.items():
        # Tensors without values or storage all have the same address, and modules may add other objects.
        address = value.data_ptr() if isinstance(value, Tensor) and value.numel() else 0
        key = (address, value.shape, value.stride()) if address else name
        names.setdefault(key, []).append(name)
    return names


def _misfits(state: Collection[str], own: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return names that are missing from a file for a model, and names that the model does not have.

    Of tied weights, one name is enough: `safetensors.torch.save_model` writes one.
    """
    missing = [name for names in _shared(own).values() if not any(n in state for n in names) for name in names]
    return missing, [name for name in state if name not in own]


def _renamed(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return a state dict under the names of a model, and what was changed.

    Wrappers such as DataParallel and torch.compile put one prefix before all names, in the file or in the model.
    """
    if any(_misfits(state, own)):
        for prefix in _prefixes(state):
            renamed = {name.removeprefix(prefix): value for name, value in state.items()}
            if not any(_misfits(renamed, own)):
                return renamed, f"the prefix {prefix!r} of all names is left out"
        for prefix in _prefixes(own):
            renamed = {prefix + name: value for name, value in state.items()}
            if not any(_misfits(renamed, own)):
                return renamed, f"the prefix {prefix!r} of the model is put before all names"
    return state, ""


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the beginnings, up to a dot, that all names share, the shortest first."""
    ordered = sorted(names)
    if not ordered:
        return []
    # What the first and the last name share, those between them share as well.
    *first, _ = ordered[0].split(".")
    *last, _ = ordered[-1].split(".")
    common = len([*takewhile(lambda parts: parts[0] == parts[1], zip(first, last, strict=False))])
    return [".".join(first[: i + 1]) + "." for i in range(common)]


def load_pair(path: str | Path, weight_key: str | None = None, bias_key: str | None = None) -> GenerativePair:
    """Load a pair that penult wrote, or make a pair without data from the head in another safetensors file.

    Raises:
        ValueError: There is no such file, it is damaged, or it is unclear which of its tensors are the head.
    """
    from penult.pair import GenerativePair, load

    if weight_key is None and bias_key is None and _is_penults(path):
        return load(path)
    head = load_head(path, weight_key, bias_key)
    try:
        return GenerativePair(head)
    except ValueError as error:
        # Two equal rows of W are one reason.
        raise ValueError(f"no pair can be made without data from the head in {path}: {error}") from error


def load_pair_and_score(
    path: str | Path, weight_key: str | None, bias_key: str | None, device: torch.device
) -> tuple[GenerativePair, Score | None]:
    """Load a pair as `load_pair` does, and the outlier score that its file holds, if any."""
    from penult.scores import _stored_score

    pair = load_pair(path, weight_key, bias_key).to(device)
    foreign = weight_key is not None or bias_key is not None or not _is_penults(path)
    return pair, None if foreign else _stored_score(path, pair)


def load_head(path: str | Path, weight_key: str | None = None, bias_key: str | None = None) -> Head:
    """Load the head of a pair that penult wrote, or a head among the tensors of another safetensors file.

    Raises:
        ValueError: There is no such file, it is damaged, or it is unclear which of its tensors are the head.
    """
    from penult.head import Head
    from penult.pair import load

    if weight_key is None and bias_key is None and _is_penults(path):
        return load(path).head
    tensors = _head_tensors(Path(path), weight_key, bias_key)
    try:
        return Head(*tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the tensors of {path} are no head: {error}") from error


def _is_penults(path: str | Path) -> bool:
    """Return whether penult wrote a safetensors file; raise if it is not such a file or does not exist."""
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
        raise ValueError(f"{path} is a folder; a pair is a file, which penult fit writes for a folder of activations")
    # Reading a pipe would wait for its writer.
    if not Path(path).is_file():
        raise ValueError(f"{path} is a device or pipe; write it to a file first")
    try:
        with safe_open(path, framework="pt") as file:
            return "penult" in (file.metadata() or {})
    except SafetensorError:
        # This names the actual format of the file.
        io.read(path)
        raise


def _head_tensors(path: Path, weight_key: str | None, bias_key: str | None) -> tuple[Tensor, Tensor | None]:
    """Return W and b of a state dict: as named, or its only matrix."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        # A safetensors file is no mapping, so it has no items().
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        if weight_key is None:
            # A head may have no bias, and its matrix another name or a second part, as with weight normalisation.
            # Nothing in the file tells it from a hidden layer then, so that one of several matrices is not chosen.
            matrices = [name for name, shape in shapes.items() if len(shape) == 2]
            if len(matrices) != 1 or not matrices[0].endswith("weight"):
                shown = ", ".join(f"{name} {shapes[name]}" for name in matrices[-6:]) or "none"
                raise ValueError(
                    f"{path}: cannot tell which matrix is the head; name it with --weight-key and --bias-key. "
                    f"Matrices in the file: {shown}"
                )
            weight_key = matrices[0]
        if bias_key is None and shapes.get(_bias_of(weight_key)) == shapes.get(weight_key, ())[:1]:
            bias_key = _bias_of(weight_key)
        for key in (weight_key, bias_key):
            if key is not None and key not in shapes:
                raise ValueError(f"{path} holds no tensor {key!r}; it holds {', '.join(list(shapes)[-8:])}")
        try:
            return file.get_tensor(weight_key), None if bias_key is None else file.get_tensor(bias_key)
        except (OverflowError, TypeError, ValueError) as error:
            # The header may state a shape that torch cannot have.
            raise ValueError(f"{path} is damaged: {weight_key!r} or {bias_key!r} cannot be read: {error}") from error


def _bias_of(weight_key: str) -> str:
    return weight_key.removesuffix("weight") + "bias"


def pair_path(out: Path) -> Path:
    """Check the path that a pair is to be written to, before anything is computed."""
    if out.suffix.lower() != ".safetensors":
        raise ValueError(
            f"--out is {out}; expected a .safetensors file, for example {out.with_suffix('')}.penult.safetensors"
        )
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    return out


def folder_path(out: Path) -> Path:
    """Check the path of a folder that is to be written."""
    if out.suffix.lower() in (".npz", ".npy", ".pt", ".pth", ".safetensors", ".parquet"):
        raise ValueError(f"--out is {out}; expected a folder, a name without {out.suffix}")
    return out


def same_source(one: str, other: str) -> bool:
    """Return whether two sources of inputs are the same."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def device_of(name: str) -> torch.device:
    """Return a device.

    Raises:
        ValueError: There is no such device here.
    """
    from penult._checks import usable_device

    return usable_device("--device", name)
