"""Encoded images in the row groups of parquet files."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from penult._extras import extra

__all__ = ["Rows", "open_parquet", "reading"]

_KEPT = 64 * 2**20  # bytes of encoded images that one process keeps


def open_parquet(path: Path) -> Any:
    """A parquet file, to be used as a context.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: pyarrow is not installed.
        ValueError: It is no parquet file.
    """
    parquet = extra("pyarrow.parquet", "parquet files are read by pyarrow")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with reading(f"{path} is no parquet file"):
        return parquet.ParquetFile(path)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Say what it means where pyarrow stumbles; some of its errors are of no usual class, and none names a file."""
    arrow = extra("pyarrow", "parquet files are read by pyarrow")
    try:
        yield
    except (arrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{what}: {error}") from error


class _Group(NamedTuple):
    """A row group of a file."""

    path: Path
    number: int
    row: int  # of the file, where the group begins
    start: int  # index in the data set, where the group begins


class Rows:
    """Encoded images by number.

    A file is open only while a row group is read: nothing is shared between processes. The row groups used last are
    kept up to a number of bytes, and the very last one in any case.

    Args:
        name: What the set is called in errors.
        column: Where the images are: bytes, or structs of bytes and path.
        files: Each file, with the rows of each of its row groups.
    """

    def __init__(self, name: str, column: str, files: Iterable[tuple[Path, list[int]]]) -> None:
        self._name, self._column = name, column
        self._groups: list[_Group] = []
        self._length = 0
        for path, counts in files:
            row = 0
            for number, count in enumerate(counts):
                self._groups.append(_Group(path, number, row, self._length))
                row += count
                self._length += count
        self._starts = [group.start for group in self._groups]
        self._kept: dict[_Group, Any] = {}  # the one used last stands at the end

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def __len__(self) -> int:
        return self._length

    def __str__(self) -> str:
        return self._name

    def where(self, index: int) -> str:
        group = self._group(index)
        return f"row {group.row + index - group.start} of {group.path}"

    def image(self, index: int) -> bytes:
        group = self._group(index)
        images, place = self._read(group), index - group.start
        if place >= len(images):
            raise ValueError(
                f"{self.where(index)} is not there, although the file said so: it is damaged, or was written anew "
                "since; read it again"
            )
        with reading(f"{self.where(index)} cannot be read"):
            value = images[place].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes):
            return data
        if path is None:
            raise ValueError(f"{self.where(index)} has no image: it is null")
        folder = os.path.abspath(group.path.parent)
        file = Path(os.path.abspath(os.path.join(folder, str(path))))
        if not file.is_relative_to(folder):
            raise ValueError(
                f"{self.where(index)} has no bytes but the path {path!r}, which leads out of {folder}, where nothing "
                "is read; write the images into the parquet file"
            )
        if not os.path.isfile(file):  # also where the name is too long for the system to look
            raise FileNotFoundError(f"{self.where(index)} has no bytes but the path {path!r}; there is no file {file}")
        return file.read_bytes()

    def _group(self, index: int) -> _Group:
        return self._groups[bisect.bisect_right(self._starts, index) - 1]

    def _read(self, group: _Group) -> Any:
        """The images of a row group, as an array of pyarrow."""
        images = self._kept.pop(group, None)
        if images is None:
            images = _fetch(group, self._column)
            room = _KEPT - images.nbytes
            for other in reversed([*self._kept]):
                room -= self._kept[other].nbytes
                if room < 0:
                    del self._kept[other]
        self._kept[group] = images
        return images


def _fetch(group: _Group, column: str) -> Any:
    with open_parquet(group.path) as file:
        with reading(f"row group {group.number} of {group.path} cannot be read"):
            # without threads: none of pyarrow's may be at work when a process is forked
            return file.read_row_group(group.number, columns=[column], use_threads=False).column(0)
