"""One file of tensors and metadata."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penult.io._aside import aside
from penult.io._record import FileFormatError, decode, encode
from penult.io._tensors import save_file

__all__ = ["File", "read", "write"]

_METADATA_KEY = "penult"


@dataclass(frozen=True, eq=False)
class File:
    """What one penult file holds.

    Attributes:
        tensors: The tensors by name.
        kind: What the file is, for example ``"pair"``.
        metadata: The writer's metadata, as JSON gives it back (tuples have become lists).
        versions: The versions of penult and torch that wrote the file.

    Example:
        >>> File({}, "empty", {}, {}).kind
        'empty'
    """

    tensors: dict[str, Tensor]
    kind: str
    metadata: dict[str, Any]
    versions: dict[str, str]


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], kind: str, metadata: Mapping[str, Any]) -> Path:
    """Write tensors and metadata to one file, atomically.

    Everything goes to a temporary file in the same folder, which takes the name ``path`` only once it is
    whole and on disk: a reader sees the old file or the new one, never a part of either.

    Args:
        path: Where to write; the folder must exist, a file of that name is replaced.
        tensors: Tensors of any shape by name; what several of them share is written several times.
        kind: What the file is; `read` can insist on it.
        metadata: JSON-able entries; the names ``schema``, ``kind`` and ``versions`` are taken.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: `path` is a folder.
        OSError: The disk is full, or nothing may be written there; what was there before is as it was.
        TypeError: A value of `tensors` is no tensor, or `metadata` cannot be written as JSON.
        ValueError: `metadata` uses a taken name, or holds NaN or infinity.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write(f"{folder}/a.safetensors", {"x": torch.ones(2)}, "note", {"by": "me"})
        ...     file = read(path, kind="note")
        >>> file.tensors["x"], file.metadata
        (tensor([1., 1.]), {'by': 'me'})
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give a file name inside it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    header = {_METADATA_KEY: encode(kind, metadata)}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"tensors[{name!r}] is a {type(value).__name__}, not a tensor; put it in metadata")
    with aside(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return path


def read(
    path: str | os.PathLike[str],
    kind: str | Collection[str] | None = None,
    device: str | torch.device = "cpu",
) -> File:
    """Read a file that `write` made. Nothing in the file is ever executed.

    On the CPU the tensors are the file itself, mapped into memory: what is never looked at is never read, and writing
    to them leaves the file as it is.

    Args:
        path: The file.
        kind: The kind, or kinds, that will do; None takes any.
        device: Where the tensors shall live.

    Returns:
        The file's tensors, kind and metadata.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is truncated, no safetensors file, one that penult did not write, written
            by a newer penult, or of another kind.

    Example:
        >>> read("missing.penult.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: missing.penult.safetensors does not exist
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():  # a pipe would be waited for, a device never end
        raise FileFormatError(f"{path} is {'a folder' if path.is_dir() else 'a device or pipe'}, not a penult file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if _METADATA_KEY not in header:
                raise FileFormatError(_foreign(path, list(file.keys())))
            record = decode(path, header[_METADATA_KEY], kind)
            return File({name: _tensor(path, file, name) for name in file.keys()}, *record)
    except SafetensorError as error:
        raise FileFormatError(_damaged(path, error)) from error


def _tensor(path: Path, file: Any, name: str) -> Tensor:
    """A tensor of an open file. A size beyond 64 bits passes safetensors where another one is 0, but not torch."""
    try:
        tensor: Tensor = file.get_tensor(name)
    except (OverflowError, TypeError, ValueError) as error:
        shape = file.get_slice(name).get_shape()
        raise FileFormatError(
            f"{path} is damaged: no tensor is of the shape {shape} that {name!r} claims; copy or write it again"
        ) from error
    return tensor


def _foreign(path: Path, keys: list[str]) -> str:
    shown = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
    return (
        f"{path} is a safetensors file that penult did not write (it holds {shown or 'nothing'}). "
        "A head can be built from a weight (K, d) and a bias (K,) among them: penult.Head(weight, bias)"
    )


def _damaged(path: Path, error: SafetensorError) -> str:
    with open(path, "rb") as file:
        start = file.read(9)
    # A safetensors file begins with an eight-byte length and then "{"; torch.save writes a zip or a pickle.
    if start[8:9] == b"{":
        return f"{path} is truncated or damaged ({error}): copy or write it again"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return (
            f"{path} is not a safetensors file but a pickle or zip (torch.save writes such files). penult "
            "never unpickles, because that can run any code: load it yourself, then penult.Head(weight, bias)"
        )
    if start[:1] == b"{":
        return (
            f"{path} is JSON, not a safetensors file; where it is the index of a model in shards, give the shard that "
            "holds the head, which it names"
        )
    return f"{path} is not a safetensors file, or only the first bytes of one ({error})"
