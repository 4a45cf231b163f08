"""Identity of a file, by which a reader notices that the file was written again."""

from __future__ import annotations

import os
from typing import NamedTuple

from penult.io._file import FileFormatError

__all__ = ["Identity", "check_unchanged", "identity"]


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
