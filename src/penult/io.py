"""Files: tensors in safetensors with JSON metadata, written atomically and read without running any code."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["SCHEMA_VERSION", "File", "FileFormatError", "aside", "read", "write", "write_bytes"]

SCHEMA_VERSION = 1
"""Version of the metadata layout that this penult writes, and the newest that it reads."""

_METADATA_KEY = "penult"
_RESERVED = ("schema", "kind", "versions")


class FileFormatError(ValueError):
    """A file is not what it should be: damaged, foreign, of another kind or from a newer penult."""


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
        tensors: Tensors of any shape by name; copies on the CPU are written, shared memory is written twice.
        kind: What the file is; `read` can insist on it.
        metadata: JSON-able entries; the names ``schema``, ``kind`` and ``versions`` are taken.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: `path` is a folder.
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
    header = {_METADATA_KEY: _encode(kind, metadata)}
    copies = _owned(tensors)
    with aside(path) as temporary:
        save_file(copies, temporary, metadata=header)
    return path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name when the block ends well, and else goes.

    A reader sees the old file or the new one, never a part of either.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with aside(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['note.txt']
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)  # safetensors leaves files that their owner alone may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after a successful replace there is none


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file of any kind, such as a page or a picture, atomically; missing folders are made.

    Args:
        path: Where to write; a file of that name is replaced.
        data: All that the file is to hold.

    Returns:
        The path written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(f"{folder}/new/page.html", b"<p>").read_bytes()
        b'<p>'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as temporary:
        temporary.write_bytes(data)
    return path


def read(
    path: str | os.PathLike[str],
    kind: str | Collection[str] | None = None,
    device: str | torch.device = "cpu",
) -> File:
    """Read a file that `write` made. Nothing in the file is ever executed.

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
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder, not a penult file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if _METADATA_KEY not in header:
                raise FileFormatError(_foreign(path, list(file.keys())))
            found, metadata, versions = _decode(path, header[_METADATA_KEY])
            wanted = (kind,) if isinstance(kind, str) else kind
            if wanted is not None and found not in wanted:
                names = " or ".join(repr(name) for name in sorted(wanted))
                raise FileFormatError(f"{path} holds a {found!r}, but {names} was wanted")
            return File({name: file.get_tensor(name) for name in file.keys()}, found, metadata, versions)
    except SafetensorError as error:
        raise FileFormatError(_damaged(path, error)) from error


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two in one storage (safetensors refuses shared memory)."""
    copies: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"tensors[{name!r}] is a {type(value).__name__}, not a tensor; put it in metadata")
        copy = value.detach().cpu().contiguous()
        if copy.untyped_storage().data_ptr() in storages:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        copies[name] = copy
    return copies


def _encode(kind: str, metadata: Mapping[str, Any]) -> str:
    from penult import __version__  # here, because penult imports this module while it is itself loading

    taken = sorted(set(_RESERVED) & set(metadata))
    if taken:
        raise ValueError(f"metadata may not use the names {', '.join(taken)}: penult writes them itself")
    versions = {"penult": __version__, "torch": torch.__version__}
    record = {"schema": SCHEMA_VERSION, "kind": kind, **metadata, "versions": versions}
    try:
        return json.dumps(record, allow_nan=False)
    except TypeError as error:
        raise TypeError(
            f"metadata must be made of JSON values (dict, list, str, number, bool, None): {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"metadata must be plain JSON without NaN, infinity or cycles: {error}") from error


def _decode(path: Path, text: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileFormatError(
            f"{path}: the penult metadata is not valid JSON ({error}); write the file again"
        ) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if not isinstance(schema, int):
        raise FileFormatError(f"{path}: the penult metadata has no schema number; write the file again")
    if schema > SCHEMA_VERSION:
        raise FileFormatError(
            f"{path} was written by schema {schema}, this penult reads up to {SCHEMA_VERSION}: "
            "upgrade penult with pip install -U penult"
        )
    kind, versions = record.get("kind"), record.get("versions", {})
    if not isinstance(kind, str) or not isinstance(versions, dict):
        raise FileFormatError(f"{path}: the penult metadata has no kind or no versions; write the file again")
    return kind, {name: value for name, value in record.items() if name not in _RESERVED}, versions


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
    return f"{path} is not a safetensors file, or only the first bytes of one ({error})"
