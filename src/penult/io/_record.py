"""The JSON record that says what a file or a folder is."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["SCHEMA_VERSION", "FileFormatError", "Record", "decode", "encode"]

SCHEMA_VERSION = 1
"""Version of the metadata layout that this penult writes, and the newest that it reads."""

_RESERVED = ("schema", "kind", "versions")


class FileFormatError(ValueError):
    """A file is not what it should be: damaged, foreign, of another kind or from a newer penult."""


class Record(NamedTuple):
    """What a record says."""

    kind: str
    metadata: dict[str, Any]
    versions: dict[str, str]


def encode(kind: str, metadata: Mapping[str, Any], indent: int | None = None, **own: Any) -> str:
    """The record as JSON. `own` are further entries of penult's, whose names `metadata` may not use."""
    from penult import __version__  # here, because penult imports this module while it is itself loading

    taken = sorted({*_RESERVED, *own} & set(metadata))
    if taken:
        raise ValueError(f"metadata may not use the names {', '.join(taken)}: penult writes them itself")
    versions = {"penult": __version__, "torch": torch.__version__}
    record = {"schema": SCHEMA_VERSION, "kind": kind, **metadata, **own, "versions": versions}
    try:
        return json.dumps(record, allow_nan=False, indent=indent)
    except TypeError as error:
        raise TypeError(
            f"metadata must be made of JSON values (dict, list, str, number, bool, None): {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"metadata must be plain JSON without NaN, infinity or cycles: {error}") from error


def decode(path: Path, text: str | bytes, kind: str | Collection[str] | None) -> Record:
    """The record of a file, which is of that kind or one of those kinds."""
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
    found, versions = record.get("kind"), record.get("versions", {})
    if not isinstance(found, str) or not isinstance(versions, dict):
        raise FileFormatError(f"{path}: the penult metadata has no kind or no versions; write the file again")
    wanted = (kind,) if isinstance(kind, str) else kind
    if wanted is not None and found not in wanted:
        names = " or ".join(repr(name) for name in sorted(wanted))
        raise FileFormatError(f"{path} holds a {found!r}, but {names} was wanted")
    return Record(found, {name: value for name, value in record.items() if name not in _RESERVED}, versions)
