"""Files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["aside", "leftovers", "sweep", "write_bytes"]

_TEMPORARY = re.compile(r"\.(.+)\.(\d+)-[0-9a-f]{8}\.tmp")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name when the block ends well, and else goes.

    A reader sees the old file or the new one, never a part of either. A writer that was killed leaves its temporary
    file behind; the next one of the same ``path`` removes it.

    Raises:
        OSError: The disk is full, or nothing may be written there; the error names ``path``.

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
        sweep(path.parent, path.name)
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)  # safetensors leaves files that their owner alone may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}") from error
    finally:
        with suppress(OSError):  # of a file system that has become read-only; the first error tells more
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


def sweep(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove temporary files of `aside` whose writer was killed; those of processes that live are left alone.

    Args:
        folder: Where to look; it need not exist.
        name: Only those that were to take this name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with aside(Path(folder) / "note.txt") as temporary:
        ...         sweep(folder)
        ...         temporary.exists()
        True
    """
    if not os.path.isdir(folder):
        return
    for entry in os.listdir(folder):
        match = _TEMPORARY.fullmatch(entry)
        if match and name in (None, match[1]) and not _lives(int(match[2])):
            with suppress(OSError):  # another process was faster, or nothing may be removed there
                os.unlink(os.path.join(folder, entry))


def _lives(pid: int) -> bool:
    """Whether there is such a process on this machine; there may be, where that cannot be asked."""
    if sys.platform == "win32":  # where the question would kill it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> Path:
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
