"""Folders of shards with a JSON index."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penult.io._atomic import write_bytes
from penult.io._file import FileFormatError, decode, encode
from penult.io._paths import user_path

__all__ = ["INDEX_NAME", "Index", "read_index", "write_index"]

INDEX_NAME = "index.json"
"""Name of the index file in a folder of shards."""

_RESERVED = ("name", "bytes")


@dataclass(frozen=True, eq=False)
class Index:
    """Contents of a folder of shards.

    Attributes:
        shards: Facts about each shard by its file name, in order.
        kind: Kind of the folder, for example ``"activations"``.
        metadata: The writer's metadata after a round trip through JSON (tuples have become lists).
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
    """Write the index of the shards in a folder, atomically. A folder that has an index is complete.

    Args:
        folder: Folder of the shards.
        shards: JSON-able facts about each shard by its file name, in order; the names ``name`` and ``bytes`` are
            reserved. The size of the file is recorded with them.
        kind: Kind of the folder; `read_index` can require it.
        metadata: JSON-able entries; the names ``schema``, ``kind``, ``versions`` and ``shards`` are reserved.

    Returns:
        The path of the index.

    Raises:
        FileNotFoundError: A shard does not exist.
        TypeError: Facts or metadata cannot be written as JSON.
        ValueError: The name of a shard is not a plain file name, or facts or metadata use a reserved name or hold NaN
            or infinity.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = penult.io.write(f"{folder}/x-0.safetensors", {"x": torch.ones(2)}, "x", {})
        ...     _ = write_index(folder, {"x-0.safetensors": {"rows": 2}}, "x", {"by": "me"})
        ...     read_index(folder).shards["x-0.safetensors"]["rows"]
        2
    """
    folder = user_path(folder)
    entries = []
    for name, facts in shards.items():
        if not _is_plain(name):
            raise ValueError(f"{name!r} is not a plain file name; the shards of {folder} must be directly in it")
        if reserved := sorted(set(_RESERVED) & set(facts)):
            raise ValueError(f"facts of {name} may not use the names {', '.join(reserved)}: penult writes them itself")
        entries.append({"name": name, "bytes": (folder / name).stat().st_size, **facts})
    text = encode(kind, metadata, indent=1, shards=entries)
    return write_bytes(folder / INDEX_NAME, text.encode())


def read_index(folder: str | os.PathLike[str], kind: str | Collection[str] | None = None) -> Index:
    """Read the index that `write_index` wrote, and check that each shard exists with its recorded size.

    Shards are not opened. Only plain file names are accepted, so that an index cannot refer to files outside of its
    folder.

    Args:
        folder: The folder.
        kind: The kind, or kinds, to accept. Default: any.

    Returns:
        The shards, kind and metadata.

    Raises:
        FileNotFoundError: There is no such folder, or no index in it.
        FileFormatError: The index is damaged, was not written by penult or was written by a newer penult, is of
            another kind, or holds a name that is not a plain file name; or a shard is missing or has another size.

    Example:
        >>> read_index("missing")
        Traceback (most recent call last):
        FileNotFoundError: missing does not exist
    """
    folder = user_path(folder)
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
            raise FileFormatError(f"{path}: shard {number} has no unique name or no size; write the folder again")
        if not _is_plain(name):
            raise FileFormatError(
                f"{path} names {name!r}, which is not a plain file name; shards must be directly in the folder"
            )
        # os.path.isfile is False, not an error, for names that are too long for the file system.
        if not os.path.isfile(folder / name):
            raise FileFormatError(f"{folder} is incomplete: {name} is missing; copy or write the folder again")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise FileFormatError(
                f"{folder / name} is a link that leads out of the folder, and files outside of it are not opened. Copy "
                "the file itself (huggingface_hub's snapshot_download does so with local_dir=)"
            )
        if (num_bytes := (folder / name).stat().st_size) != size:
            raise FileFormatError(
                f"{folder / name} has {num_bytes} bytes, but {size} in the index: it is truncated or another file. "
                "Copy or write the folder again"
            )
        shards[name] = {key: value for key, value in entry.items() if key not in _RESERVED}
    return Index(shards, *record)


def _is_plain(name: str) -> bool:
    """Whether a name has no folder part on any operating system, and is printable."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:") and name.isprintable()
