"""Atomic writing of files: a reader sees a complete file or none."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from penult.io._paths import user_path

__all__ = ["aside", "leftovers", "sweep", "write_bytes"]

_TEMPORARY = re.compile(r"\.(.+)\.(\d+)-[0-9a-f]{8}\.tmp")
# Longest name in bytes that temporary files repeat; their own names are at most 25 bytes longer.
_LONGEST = 100
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file in the folder of ``path``; at the end rename it to ``path``.

    If the block raises an error, the temporary file is removed.

    A reader sees the old file or the new one, never a part of either. The new file has the mode of the old one. A
    writer that was killed leaves its temporary file behind; the next writer of the same ``path`` removes it. If
    ``path`` is a symbolic link, the file to which it leads is replaced and the link stays; the temporary file is then
    in the folder of that file.

    Raises:
        OSError: The disk is full or not writable, or ``path`` cannot be a file: it is a device, or a symbolic link to
            itself or into a folder that does not exist. The error names ``path``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with aside(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['note.txt']
    """
    path = user_path(path)
    target = _target(path)
    temporary = target.with_name(f".{_short(target.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        sweep(target.parent, target.name)
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        # A file that its owner made private stays private, also while it is written.
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(os.stat(target).st_mode)
            os.chmod(temporary, mode | stat.S_IRUSR | stat.S_IWUSR)
        yield temporary
        # Without fsync, a power cut could leave the new name on an empty file.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # safetensors may create files that only their owner can read.
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}") from error
    finally:
        # The file system may have become read-only. The first error is then the informative one.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """Return the path without symbolic links, which is the file to write; it need not exist."""
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise OSError(errno.ELOOP, f"cannot write {path}: it is a symbolic link that leads back to itself")
    if target != path and not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {path}: it is a link to {target}, and the folder {target.parent} does not exist; create it "
            "first"
        )
    # Renaming a file to a device would replace the device.
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, f"cannot write {path}: it is a device or pipe; expected a file")
    return target


def _short(name: str) -> str:
    """Return a file name, or its beginning and a digest if it is long: the file system limits temporary names, too."""
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST:
        return name
    digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    # The cut may be inside of a character.
    return f"{encoded[: _LONGEST - 17].decode('utf-8', 'ignore')}~{digest}"


def leftovers(folder: str | os.PathLike[str]) -> dict[Path, str]:
    """Return the temporary files of `aside` in a folder. Their writers were killed or are still running.

    Args:
        folder: Folder to search.

    Returns:
        For each temporary file, the name that it would have been renamed to; names of more than 100 bytes are
        shortened.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with aside(Path(folder) / "note.txt"):
        ...         list(leftovers(folder).values())
        ['note.txt']
    """
    matches = {path: _TEMPORARY.fullmatch(path.name) for path in sorted(user_path(folder).iterdir())}
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
    folder = user_path(folder)
    if not folder.is_dir():
        return
    for entry in os.listdir(folder):
        match = _TEMPORARY.fullmatch(entry)
        if match and (name is None or _short(name) == match[1]) and not _is_running(int(match[2])):
            # Another process may have removed the file first, or the folder may be read-only.
            with suppress(OSError):
                os.unlink(folder / entry)


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
        path: Path of the file; an existing file is replaced, and a symbolic link is followed.
        data: Contents of the file.

    Returns:
        The path written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(f"{folder}/new/page.html", b"<p>").read_bytes()
        b'<p>'
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as temporary:
        temporary.write_bytes(data)
    return path
