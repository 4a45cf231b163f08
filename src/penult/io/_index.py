"""A folder of shards with an index of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penult.io._atomic import write_bytes
from penult.io._file import FileFormatError, decode, encode

__all__ = ["INDEX_NAME", "Index", "read_index", "write_index"]

INDEX_NAME = "index.json"
"""The file in a folder of shards that says what the folder holds."""

_TAKEN = ("name", "bytes")


@dataclass(frozen=True, eq=False)
class Index:
    """What a folder of shards holds.

    Attributes:
        shards: Facts about each shard by its file name, in order.
        kind: What the folder is, for example ``"activations"``.
        metadata: The writer's metadata, as JSON gives it back (tuples have become lists).
        versions: The versions of penult and torch that wrote the index.

    Example:
        >>> Index({}, "empty", {}, {}).kind
        'empty'
    """

    shards: dict[str, dict[str, Any]]
    kind: str
    metadata: dict[str, Any]
    versions: dict[str, str]


def write_index(
    folder: str | os.PathLike[str], shards: Mapping[str, Mapping[str, Any]], kind: str, metadata: Mapping[str, Any]
) -> Path:
    """Write the index of shards that lie in a folder, atomically: once it is there, the folder is complete.

    Args:
        folder: Where the shards are.
        shards: JSON-able facts about each shard by its file name, in order; the names ``name`` and ``bytes`` are
            taken. The size of the file is recorded with them.
        kind: What the folder is; `read_index` can insist on it.
        metadata: JSON-able entries; the names ``schema``, ``kind``, ``versions`` and ``shards`` are taken.

    Returns:
        The path of the index.

    Raises:
        FileNotFoundError: A shard does not exist.
        TypeError: Facts or metadata cannot be written as JSON.
        ValueError: The name of a shard is no plain file name, facts or metadata use a taken name, or hold NaN or
            infinity.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = penult.io.write(f"{folder}/x-0.safetensors", {"x": torch.ones(2)}, "x", {})
        ...     _ = write_index(folder, {"x-0.safetensors": {"rows": 2}}, "x", {"by": "me"})
        ...     read_index(folder).shards["x-0.safetensors"]["rows"]
        2
    """
    folder = Path(folder)
    entries = []
    for name, facts in shards.items():
        if not _plain(name):
            raise ValueError(f"{name!r} is no plain file name; the shards of {folder} must lie in it")
        if taken := sorted(set(_TAKEN) & set(facts)):
            raise ValueError(f"facts of {name} may not use the names {', '.join(taken)}: penult writes them itself")
        entries.append({"name": name, "bytes": (folder / name).stat().st_size, **facts})
    text = encode(kind, metadata, indent=1, shards=entries)
    return write_bytes(folder / INDEX_NAME, text.encode())


def read_index(folder: str | os.PathLike[str], kind: str | Collection[str] | None = None) -> Index:
    """Read the index that `write_index` made, and see that each shard is there with the size it had.

    Shards are not opened. Their names are plain file names, so that nothing outside of the folder can be meant.

    Args:
        folder: The folder.
        kind: The kind, or kinds, that will do; None takes any.

    Returns:
        The shards, kind and metadata.

    Raises:
        FileNotFoundError: There is no such folder, or no index in it.
        FileFormatError: The index is damaged, was not written by penult or by a newer one, is of another kind or
            names what is no plain file; or a shard is missing or has another size.

    Example:
        >>> read_index("missing")
        Traceback (most recent call last):
        FileNotFoundError: missing does not exist
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
    if not folder.is_dir():
        raise FileFormatError(f"{folder} is a file, not a folder of shards")
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {INDEX_NAME} in {folder}")
    record = decode(path, path.read_bytes(), kind)
    entries = record.metadata.pop("shards", None)
    if not isinstance(entries, list):
        raise FileFormatError(f"{path} has no list of shards; write the folder again")
    shards: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        name, size = (entry.get("name"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(size, int) or name in shards:
            raise FileFormatError(f"{path}: shard {number} has no name of its own or no size; write the folder again")
        if not _plain(name):
            raise FileFormatError(f"{path} names {name!r}, which is no plain file name: a shard must lie in the folder")
        if not os.path.isfile(folder / name):  # also where the name is too long for the system to look
            raise FileFormatError(f"{folder} is incomplete: {name} is missing; copy or write the folder again")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise FileFormatError(
                f"{folder / name} is a link that leads out of the folder, where nothing is opened; copy the file "
                "itself (huggingface_hub's snapshot_download does with local_dir=)"
            )
        if (found := (folder / name).stat().st_size) != size:
            raise FileFormatError(
                f"{folder / name} has {found} bytes, but {size} in the index: it is truncated or another file; "
                "copy or write the folder again"
            )
        shards[name] = {key: value for key, value in entry.items() if key not in _TAKEN}
    return Index(shards, *record)


def _plain(name: str) -> bool:
    """Whether it names a file in the folder it is looked for in, on every system, and can be printed."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:") and name.isprintable()
