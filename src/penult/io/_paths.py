"""Paths as users write them, and the kind of a file by its first bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["Contents", "contents", "other_kind", "user_path"]

# Enough for the signature of a tar archive, which begins at byte 257.
_START = 512


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path, with the home folder in place of a leading ``~`` or ``~name``, as shells do."""
    return Path(os.path.expanduser(path))


class Contents(NamedTuple):
    """Kind of a file.

    Attributes:
        name: The kind as it follows "is" in a message, such as "a zip archive".
        remedy: Advice how to get the right file, as a sentence; empty if there is none.
    """

    name: str
    remedy: str = ""


_UNPACK = "Unpack it, and give the file inside"
_DOWNLOAD = "Download the file itself: a web server sends such a page for an error, a login or a preview"
_SIGNATURES = (
    (
        b"version https://git-lfs",
        Contents("a Git LFS pointer, which stands for a file that was not downloaded", "Run git lfs pull"),
    ),
    (b"\x1f\x8b\x08", Contents("compressed by gzip", _UNPACK)),
    (b"BZh", Contents("compressed by bzip2", _UNPACK)),
    (b"\xfd7zXZ\0", Contents("compressed by xz", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Contents("compressed by Zstandard", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Contents("a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Contents("a RAR archive", _UNPACK)),
    (b"PK\x03\x04", Contents("a zip archive")),
    (b"PK\x05\x06", Contents("an empty zip archive")),
    *((b"\x80" + bytes([protocol]), Contents("a pickle")) for protocol in range(2, 6)),
    (b"\x93NUMPY", Contents("a NumPy array (.npy)")),
    (b"\x89HDF\r\n\x1a\n", Contents("an HDF5 file")),
    (b"PAR1", Contents("a parquet file")),
    (b"ARROW1", Contents("an Arrow file")),
    (b"SQLite format 3\0", Contents("an SQLite database")),
    (b"%PDF", Contents("a PDF")),
    (b"\x89PNG\r\n\x1a\n", Contents("a PNG image")),
    (b"\xff\xd8\xff", Contents("a JPEG image")),
    (b"GIF8", Contents("a GIF image")),
)
_PAGES = (b"<!doctype html", b"<html", b"<head")


def contents(start: bytes) -> Contents | None:
    """Return the kind of a file by its first bytes, or None if it is unknown."""
    if not start:
        return Contents("empty", "It was truncated, or not written yet: copy or write it again")
    # Eight bytes are the length of the header, which is below 4 GiB and begins with a brace.
    if start[4:9] == b"\0\0\0\0{":
        return Contents("a safetensors file")
    for signature, kind in _SIGNATURES:
        if start.startswith(signature):
            return kind
    if start[257:262] == b"ustar":
        return Contents("a tar archive", _UNPACK)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_PAGES):
        return Contents("an HTML page", _DOWNLOAD)
    if text.startswith(b"<?xml"):
        return Contents("an XML document", _DOWNLOAD if b"<error>" in text else "")
    return Contents("JSON") if text.startswith(b"{") else None


def other_kind(
    path: str | os.PathLike[str], expected: str, remedies: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """Return the message for a file of a known kind that is not the expected one; None if the kind is unknown.

    Args:
        path: The file.
        expected: The expected kind: one of the names that `contents` gives to kinds.
        remedies: Advice for the message, by the name of the file's kind. It replaces the advice of `contents`.
    """
    with open(path, "rb") as file:
        kind = contents(file.read(_START))
    if kind is None or kind.name == expected:
        return None
    remedy = remedies.get(kind.name, kind.remedy)
    return f"{os.fspath(path)} is {kind.name}; expected {expected}" + (f". {remedy}" if remedy else "")
