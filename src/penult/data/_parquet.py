"""Parquet files in the image layout of Hugging Face data sets."""

from __future__ import annotations

import bisect
import glob
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penult._extras import extra
from penult.data._dataset import ImageDataset, Size, Transform

__all__ = ["Rows", "open_parquet", "parquet", "reading"]

_SHARD = re.compile(r"(.+)-\d+-of-\d+")  # train-00000-of-00004.parquet


def parquet(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    image: str | None = None,
    label: str | None = None,
    mode: str | None = None,
    size: Size = None,
    transform: Transform = None,
) -> ImageDataset:
    """Read images from parquet files in the layout of Hugging Face data sets.

    Images are a column of structs of ``bytes`` and ``path``, or of bytes alone. Where the bytes are null, the file at
    the path is read, seen from the folder of the parquet file and never outside of it. Labels are a column of integers;
    -1 and null are no label, and where no row has one, the set has none. Names of classes come from the schema's
    metadata.

    Files are read by row group. Those used last are kept, up to 64 MiB a process: a small set is read once, a large
    one is best read in order.

    Args:
        source: A file, a glob, a folder with ``.parquet`` files in it, or a list of files; they are sorted.
        image: Column of images. By default the one that the metadata calls an Image, else ``image`` or ``img``, else
            the only one that can hold images.
        label: Column of labels. By default the one that the metadata calls a ClassLabel, else ``label`` or
            ``labels``, else none.
        mode: As in `ImageDataset`.
        size: As in `ImageDataset`.
        transform: As in `ImageDataset`.

    Returns:
        The images in the order of files and rows.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: pyarrow is not installed.
        ValueError: A file is no parquet, a folder holds several splits, files differ in columns or class names,
            a column is missing, cannot be told or is of a wrong type, or a label is out of range or missing in part.

    Example:
        >>> import io, pyarrow, pyarrow.parquet, tempfile
        >>> from PIL import Image
        >>> Image.new("L", (6, 4)).save(png := io.BytesIO(), "png")
        >>> table = pyarrow.table({"image": [{"bytes": png.getvalue()}] * 3, "label": [0, 2, 1]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pyarrow.parquet.write_table(table, f"{folder}/train.parquet")
        ...     images, labels, names = parquet(f"{folder}/train*.parquet").load()
        >>> images.shape, labels, names
        (torch.Size([3, 1, 4, 6]), tensor([0, 2, 1]), ('0', '1', '2'))
    """
    shards = [_look(path, image, label) for path in _paths(source)]
    first = shards[0]
    for other in shards[1:]:
        _check_alike(first, other)
    name = str(first.path) if len(shards) == 1 else f"{first.path.parent} ({len(shards)} files)"
    rows = Rows(name, first.image, [(each.path, each.counts) for each in shards])
    labels = [each.labels for each in shards if each.labels is not None]
    return ImageDataset(
        rows, torch.cat(labels) if labels else None, first.names, mode=mode, size=size, transform=transform
    )


def _paths(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files, sorted."""
    if not isinstance(source, str | os.PathLike):
        paths = sorted(map(Path, source))
        if not paths:
            raise ValueError("the list of parquet files is empty")
        return paths
    path = Path(source)
    if path.is_dir():
        paths = sorted(path.glob("[!.]*.parquet"))
        splits = sorted({match[1] for each in paths if (match := _SHARD.match(each.stem))})
        if len(splits) > 1:
            raise ValueError(
                f"{path} holds splits ({', '.join(splits)}); read one of them: {path / splits[0]}-*.parquet"
            )
        if not paths:
            raise FileNotFoundError(f"there is no .parquet file in {path}")
        return paths
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    paths = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not paths:
        raise FileNotFoundError(f"no file matches {path}")
    return paths


class _Shard(NamedTuple):
    """What one file says of itself."""

    path: Path
    columns: dict[str, str]  # name to type
    image: str
    names: tuple[str, ...] | None
    counts: list[int]  # rows of each row group
    labels: Tensor | None


def _look(path: Path, image: str | None, label: str | None) -> _Shard:
    with open_parquet(path) as file:
        with reading(f"the schema of {path} cannot be read"):
            schema, metadata = file.schema_arrow, file.metadata
        types = {field.name: field.type for field in schema}
        columns = {name: str(kind) for name, kind in types.items()}
        features = _features(schema.metadata or {})
        images = _choose("images", image, ("image", "img"), "Image", features, columns, path)
        if images is None:
            able = [name for name, kind in types.items() if _holds_images(kind)]
            if len(able) != 1:
                raise ValueError(f"{path} has no column image; name one of its columns with image=: {_listed(columns)}")
            images = able[0]
        if not _holds_images(types[images]):
            raise ValueError(
                f"the column {images!r} of {path} is {columns[images]}; images are struct<bytes: binary, path: string> "
                f"or binary. Its columns are {_listed(columns)}"
            )
        target = _choose("labels", label, ("label", "labels"), "ClassLabel", features, columns, path)
        labels = None
        if target is not None:
            import pyarrow as pa

            if not pa.types.is_integer(types[target]):
                raise ValueError(f"the column {target!r} of {path} is {columns[target]}; labels are integers")
            with reading(f"the column {target!r} of {path} cannot be read"):
                column = file.read(columns=[target], use_threads=False).column(0).cast(pa.int64()).fill_null(-1)
            labels = torch.tensor(column.to_numpy())
        names = features.get(target, {}).get("names") if target is not None else None
        if not isinstance(names, list | None):
            raise ValueError(f"the metadata of {path} call the classes {names!r}; expected a list of names")
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return _Shard(path, columns, images, tuple(map(str, names)) if names else None, counts, labels)


def _choose(
    what: str,
    wanted: str | None,
    usual: tuple[str, ...],
    kind: str,
    features: dict[str, dict[str, Any]],
    columns: dict[str, str],
    path: Path,
) -> str | None:
    """The column that is wanted, or else declared of a kind, or else of a usual name."""
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{path} has no column {wanted!r}; it has {_listed(columns)}")
        return wanted
    declared = [name for name in columns if features.get(name, {}).get("_type") == kind]
    named = [name for name in usual if name in columns]
    for choice in (declared, named):
        if len(choice) == 1:
            return choice[0]
    if declared or named:
        several = ", ".join(declared or named)
        raise ValueError(f"several columns of {path} may be the {what}: {several}; name one with {usual[0]}=")
    return None


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What Hugging Face's metadata say of each column; nothing if there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}  # written by someone else


def _listed(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def _check_alike(first: _Shard, other: _Shard) -> None:
    """Refuse files of different data sets."""
    facts = [
        {f"column {k!r}": v for k, v in each.columns.items()} | {"class names": each.names} for each in (first, other)
    ]
    for what in facts[0] | facts[1]:
        one, two = (each.get(what, "missing") for each in facts)
        if one != two:
            raise ValueError(
                f"{first.path} and {other.path} do not belong together: {what} {reprlib.repr(one)} in the first, "
                f"{reprlib.repr(two)} in the second"
            )


# --- Encoded images in the row groups of parquet files ------------------------------------------------------


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
