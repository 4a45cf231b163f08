"""Atomic writing of files: a reader sees a complete file or none."""

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
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give a temporary file in the folder of ``path``; rename it to ``path`` at the end, or remove it on an error.

    A reader sees the old file or the new one, never a part of either. A writer that was killed leaves its temporary
    file behind; the next writer of the same ``path`` removes it.

    Raises:
        OSError: The disk is full or not writable; the error names ``path``.

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
        # safetensors may create files that only their owner can read.
        os.chmod(temporary, mode)
        # Without fsync, a power cut could leave the new name on an empty file.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}") from error
    finally:
        # The file system may have become read-only. The first error is then the informative one.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def leftovers(folder: str | os.PathLike[str]) -> dict[Path, str]:
    """Return the temporary files of `aside` in a folder, whose writers were killed or are still running.

    Args:
        folder: Folder to search.

    Returns:
        For each temporary file, the name that it would have been renamed to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with aside(Path(folder) / "note.txt"):
        ...         list(leftovers(folder).values())
        ['note.txt']
    """
    matches = {path: _TEMPORARY.fullmatch(path.name) for path in sorted(Path(folder).iterdir())}
    return {path: match[1] for path, match in matches.items() if match}


def sweep(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove the temporary files of `aside` whose writer was killed, and keep those of running processes.

    Args:
        folder: Folder to search; it need not exist.
        name: Remove only files that would have been renamed to this name. Default: all.

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
        if match and name in (None, match[1]) and not _is_running(int(match[2])):
            # Another process may have removed the file first, or the folder may be read-only.
            with suppress(OSError):
                os.unlink(os.path.join(folder, entry))


def _is_running(pid: int) -> bool:
    """Whether a process runs on this machine; True if that is unknown."""
    # On Windows, os.kill would kill the process.
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> Path:
    """Write a file of any kind, such as a page or a picture, atomically; create missing folders.

    Args:
        path: Path of the file; an existing file is replaced.
        data: Contents of the file.

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
