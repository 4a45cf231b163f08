"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["aside", "leftovers", "write_bytes"]

_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp")


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


def leftovers(folder: str | os.PathLike[str]) -> dict[Path, str]:
    """Temporary files of `aside` that lie in a folder: their writer was killed, or is still at work.

    Args:
        folder: Where to look.

    Returns:
        The name that each of them was to take.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with aside(Path(folder) / "note.txt"):
        ...         list(leftovers(folder).values())
        ['note.txt']
    """
    found = {path: _TEMPORARY.fullmatch(path.name) for path in sorted(Path(folder).iterdir())}
    return {path: match[1] for path, match in found.items() if match}


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
