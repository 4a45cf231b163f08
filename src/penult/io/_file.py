"""One file of tensors and metadata: reading and writing, its JSON record, and its bytes."""

from __future__ import annotations

import json
import numbers
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penult._checks import described, usable_device
from penult._version import __version__
from penult.io._atomic import aside
from penult.io._paths import other_kind, user_path

__all__ = [
    "SCHEMA_VERSION",
    "File",
    "FileFormatError",
    "Identity",
    "Record",
    "as_json",
    "check_unchanged",
    "decode",
    "encode",
    "identity",
    "read",
    "save_file",
    "write",
]

_METADATA_KEY = "penult"
_PICKLE = (
    "penult never unpickles, because that can run any code. Load it yourself, then build penult.Head(weight, bias)"
)
_REMEDIES = {
    "a pickle": _PICKLE,
    "a zip archive": f"If torch.save wrote it, it holds a pickle: {_PICKLE}",
    "JSON": "If it is the index of a sharded model, give the shard that it names for the head",
}


@dataclass(frozen=True, eq=False)
class File:
    """Contents of one penult file.

    Attributes:
        tensors: The tensors by name.
        kind: Kind of the file, for example ``"pair"``.
        metadata: The writer's metadata after a round trip through JSON (tuples have become lists).
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

    The data is written to a temporary file in the same folder, which is renamed to ``path`` once it is complete and on
    disk: a reader sees the old file or the new one, never a part of either. The new file has the mode of the old one.

    Args:
        path: Path of the file; the folder must exist, an existing file is replaced. If it is a symbolic link, the
            file to which it leads is replaced and the link stays.
        tensors: Tensors of any shape by name; storage that several tensors share is written several times.
        kind: Kind of the file; `read` can require it.
        metadata: JSON-able entries, whose numbers may also be NumPy's or tensors (); the names ``schema``, ``kind``
            and ``versions`` are reserved.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: `path` is a folder.
        OSError: The disk is full or not writable; an existing file stays as it was.
        TypeError: A value of `tensors` is not a tensor, or `metadata` cannot be written as JSON.
        ValueError: `metadata` uses a reserved name, or holds NaN or infinity.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write(f"{folder}/a.safetensors", {"x": torch.ones(2)}, "note", {"by": "me"})
        ...     file = read(path, kind="note")
        >>> file.tensors["x"], file.metadata
        (tensor([1., 1.]), {'by': 'me'})
    """
    path = user_path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give a file name inside it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    header = {_METADATA_KEY: encode(kind, metadata)}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"tensors[{name!r}] is a {type(value).__name__}; expected a tensor. Put it in metadata")
    with aside(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return path


def read(
    path: str | os.PathLike[str],
    kind: str | Collection[str] | None = None,
    device: str | torch.device = "cpu",
) -> File:
    """Read a file that `write` wrote. Nothing in the file is ever executed.

    On the CPU the tensors are memory-mapped: parts that are not accessed are not read from disk, and writing to a
    tensor does not change the file. A program that writes into the file in place changes them; penult replaces files.

    Args:
        path: The file.
        kind: The kind, or kinds, to accept. Default: any.
        device: Device of the tensors.

    Returns:
        The file's tensors, kind and metadata.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is truncated, is not a safetensors file, was not written by penult or was written by
            a newer penult, or is of another kind.
        TypeError, ValueError: `device` is no device, or cannot be used here.

    Example:
        >>> read("missing.penult.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: missing.penult.safetensors does not exist
    """
    path, device = user_path(path), usable_device("device", device)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    # Reading a pipe would block, and reading a device would never end.
    if not path.is_file():
        raise FileFormatError(f"{path} is {'a folder' if path.is_dir() else 'a device or pipe'}, not a penult file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if _METADATA_KEY not in header:
                raise FileFormatError(_foreign(path, list(file.keys())))
            record = decode(path, header[_METADATA_KEY], kind)
            # safetensors knows fewer devices than torch, and calls others a fault of the file.
            return File({name: _tensor(path, file, name).to(device) for name in file.keys()}, *record)
    except SafetensorError as error:
        raise FileFormatError(_damaged(path, error)) from error


def _tensor(path: Path, file: Any, name: str) -> Tensor:
    """Return a tensor of an open file."""
    # safetensors accepts a size beyond 64 bits if another size is 0; torch does not.
    try:
        tensor: Tensor = file.get_tensor(name)
    except (OverflowError, TypeError, ValueError) as error:
        shape = file.get_slice(name).get_shape()
        raise FileFormatError(
            f"{path} is damaged: {name!r} has the impossible shape {shape}; copy or write the file again"
        ) from error
    return tensor


def _foreign(path: Path, keys: list[str]) -> str:
    """Return the message for a safetensors file that penult did not write."""
    shown = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
    return (
        f"{path} is a safetensors file that penult did not write (it holds {shown or 'nothing'}). "
        "If it holds the weight (K, d) and bias (K,) of a head, build penult.Head(weight, bias)"
    )


def _damaged(path: Path, error: SafetensorError) -> str:
    """Return the message for a file that safetensors cannot read; the first bytes of the file show its kind."""
    message = other_kind(path, "a safetensors file", _REMEDIES)
    if message is not None:
        return message
    with open(path, "rb") as file:
        start = file.read(9)
    # A safetensors file begins with an eight-byte length and then "{".
    if start[8:9] == b"{":
        return f"{path} is truncated or damaged ({error}); copy or write it again"
    return f"{path} is not a safetensors file, or only the first bytes of one ({error})"


# --- The JSON record of a file or folder: its schema, kind, versions and metadata ----------------------------


SCHEMA_VERSION = 1
"""Version of the metadata layout that this penult writes, and the newest that it reads."""

_RESERVED = ("schema", "kind", "versions")


class FileFormatError(ValueError):
    """A file cannot be used: it is damaged, of another kind, or written by another program or a newer penult."""


class Record(NamedTuple):
    """Contents of a JSON record."""

    kind: str
    metadata: dict[str, Any]
    versions: dict[str, str]


def encode(kind: str, metadata: Mapping[str, Any], indent: int | None = None, **own: Any) -> str:
    """Return the record as JSON; `own` are further entries by penult, with names that `metadata` may not use."""
    reserved = sorted({*_RESERVED, *own} & set(metadata))
    if reserved:
        raise ValueError(f"metadata may not use the names {', '.join(reserved)}: penult writes them itself")
    versions = {"penult": __version__, "torch": torch.__version__}
    record = {"schema": SCHEMA_VERSION, "kind": kind, **metadata, **own, "versions": versions}
    try:
        return json.dumps(record, allow_nan=False, indent=indent, default=_plain)
    except TypeError as error:
        raise TypeError(
            f"metadata must be made of JSON values (dict, list, str, number, bool, None): {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"metadata must be plain JSON without NaN, infinity or cycles: {error}") from error


def _plain(value: Any) -> Any:
    """Return a number of another kind, such as NumPy's, or a tensor () as a number that JSON has."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise TypeError(f"a {type(value).__name__} is no such value")


def as_json(name: str, value: Any) -> dict[str, Any] | None:
    """Return a copy of a mapping after a round trip through JSON (tuples become lists), or None for None.

    Args:
        name: Name of the argument in messages.
        value: The mapping, or None.

    Raises:
        TypeError: `value` is no mapping, or holds a value that JSON does not have.
        ValueError: It holds NaN or infinity.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {described(value)}; expected a mapping of JSON values, or None")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False, default=_plain))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} is {value!r}; expected a mapping of JSON values: {error}") from error
    return copy


def decode(path: Path, text: str | bytes, kind: str | Collection[str] | None) -> Record:
    """Return the JSON record of a file; raise if it is damaged, or if the file is not of the expected kind(s)."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: the penult metadata is not valid JSON ({error}); write the file again"
        ) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise FileFormatError(f"{path}: the penult metadata has no schema number; write the file again")
    if schema > SCHEMA_VERSION:
        raise FileFormatError(
            f"{path} was written by schema {schema}, this penult reads up to {SCHEMA_VERSION}: "
            "upgrade penult with pip install -U penult"
        )
    own_kind, versions = record.get("kind"), record.get("versions", {})
    if not isinstance(own_kind, str) or not isinstance(versions, dict):
        raise FileFormatError(f"{path}: the penult metadata has no kind or no versions; write the file again")
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds is not None and own_kind not in kinds:
        raise FileFormatError(f"{path} is of kind {own_kind!r}; expected {' or '.join(map(repr, sorted(kinds)))}")
    return Record(own_kind, {name: value for name, value in record.items() if name not in _RESERVED}, versions)


# --- The bytes of a safetensors file ------------------------------------------------------------------------


# Names of dtypes in safetensors files, in the order in which safetensors sorts them.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def save_file(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, directly to its path and without copying them.

    Args:
        tensors: Tensors by name, on any device.
        path: Path of the file; an existing file is overwritten, not atomically (see :func:`aside`).
        metadata: Text by name.

    Raises:
        OSError: The file cannot be written.
        TypeError: A dtype is not supported by safetensors files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"x": torch.ones(2)}, f"{folder}/x.safetensors")
        ...     safetensors.torch.load_file(f"{folder}/x.safetensors")
        {'x': tensor([1., 1.])}
    """
    # safetensors.torch.save_file is not used, because it writes to a temporary file of its own first, which a killed
    # writer leaves behind under a name that `sweep` cannot recognise, and because it hides OSErrors of a full disk.
    for name, value in tensors.items():
        if value.dtype not in _NAMES:
            raise TypeError(f"tensors[{name!r}] has dtype {value.dtype}, which safetensors files do not support")
    # Files are little-endian; safetensors swaps the bytes.
    if sys.byteorder == "big":
        copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with open(path, "wb") as file:
            file.write(safetensors.torch.save(copies, None if metadata is None else dict(metadata)))
        return
    # As in safetensors, wide numbers come first, so that each number is aligned to its own size.
    names = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        value = tensors[name]
        start, end = end, end + value.numel() * value.dtype.itemsize
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            plain = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            file.write(plain.view(-1).view(torch.uint8).numpy().data)


class Identity(NamedTuple):
    """Number of a file on its disk, time of its last change in nanoseconds, and size in bytes."""

    number: int
    changed: int
    size: int


def identity(path: str | os.PathLike[str]) -> Identity:
    """Return the identity of a file."""
    status = os.stat(path)
    return Identity(status.st_ino, status.st_mtime_ns, status.st_size)


def check_unchanged(path: str | os.PathLike[str], opened: Identity | None) -> None:
    """Raise a FileFormatError if a file has another identity than when it was opened; None for an unknown one."""
    # Whoever opens a file that is missing has a message of their own.
    if opened is not None and os.path.exists(path) and identity(path) != opened:
        raise FileFormatError(
            f"{os.fspath(path)} was written or changed after it was opened, so that its rows may no longer be those "
            "that were opened. Open it again"
        )
