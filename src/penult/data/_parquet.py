"""Reader of parquet files in the image layout of Hugging Face data sets."""

from __future__ import annotations

import bisect
import glob
import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penult._checks import class_names_tuple, with_remedy
from penult._extras import extra
from penult.data._dataset import ImageDataset, RowNames, Size, Transform
from penult.data._decode import PerChannel, suffixes
from penult.data._splits import files_below, in_order, matches, names_within, one_set, warn_of_others
from penult.io import _check_unchanged, _Identity, _identity, _other_kind, _user_path

__all__ = ["Rows", "is_parquet", "open_parquet", "parquet", "reading"]


def parquet(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    image: str | None = None,
    label: str | None = None,
    mode: str | None = None,
    size: Size = None,
    mean: PerChannel = None,
    std: PerChannel = None,
    transform: Transform = None,
) -> ImageDataset:
    """Read images from parquet files in the layout of Hugging Face data sets.

    Images are a column of structs of ``bytes`` and ``path``, or of bytes alone. If the bytes are null, the file at the
    path is read; the path is relative to the folder of the parquet file and must not leave it. Labels are a column of
    integers. -1 and null mean no label, and a data set in which no row has a label has no labels. Names of classes come
    from the metadata of the schema.

    Files of one data set agree in the columns that are read, and in the names of classes; other columns, and the width
    of integers, may differ. A folder or glob with several splits (``train.parquet`` and ``test.parquet``) is refused.

    Files are read by row group. Each process keeps the last row groups, up to 64 MiB: a small data set is read once, a
    large one is best read in order. A file that is written or changed after this call raises an error when it is read.

    Args:
        source: File, glob, folder with ``.parquet`` files in it or in one of its subfolders, or list of files; they
            are sorted. A path that exists is no glob.
        image: Column of images. Default: the column with the type Image in the metadata, otherwise ``image`` or
            ``img``, otherwise the only column of a type for images.
        label: Column of labels. Default: the column with the type ClassLabel in the metadata, otherwise ``label`` or
            ``labels``, otherwise none.
        mode: As in `ImageDataset`.
        size: As in `ImageDataset`.
        mean: As in `ImageDataset`.
        std: As in `ImageDataset`.
        transform: As in `ImageDataset`.

    Returns:
        The images in the order of files and rows.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: pyarrow is not installed.
        ValueError: A file is not a parquet file; a folder contains several splits, or files in several folders; files
            differ in the columns of images and labels or in class names; a column is missing, ambiguous or of a wrong
            type; or a label is out of range or missing for some rows.

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
    paths = _paths(source)
    first = _read_shard(paths[0], image, label)
    shards = [first, *(_read_shard(path, first.image, first.label or label, first) for path in paths[1:])]
    name = str(first.path) if len(shards) == 1 else f"{first.path.parent} ({len(shards)} files)"
    rows = Rows(name, first.image, [(shard.path, shard.counts, shard.identity) for shard in shards])
    labels = [shard.labels for shard in shards if shard.labels is not None]
    return ImageDataset(
        rows,
        torch.cat(labels) if labels else None,
        first.names,
        mode=mode,
        size=size,
        mean=mean,
        std=std,
        transform=transform,
    )


def is_parquet(path: Path) -> bool:
    """Whether the name of a file is that of a parquet file."""
    return path.suffix.lower() == ".parquet"


def _paths(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files of a source, sorted."""
    if not isinstance(source, str | os.PathLike):
        paths = in_order(map(_user_path, source))
        if not paths:
            raise ValueError("source is an empty list; expected at least one parquet file")
        return paths
    path = _user_path(source)
    if path.is_dir():
        files = files_below(path)
        paths = [file for file in files if is_parquet(file)]
        if not paths:
            raise FileNotFoundError(f"there is no .parquet file in {path}")
        if len(folders := sorted({file.parent for file in paths})) > 1:
            names = ", ".join(str(folder.relative_to(path)) for folder in folders[:4])
            raise ValueError(
                f"{path} contains parquet files in {len(folders)} folders ({names}{', ...' * (len(folders) > 4)}), "
                f"which may be splits; read one of them: {folders[0]}"
            )
        one_set(paths, folders[0])
        # Rows may refer to image files.
        known = suffixes()
        others = [file for file in files if not is_parquet(file) and file.suffix.lower() not in known]
        warn_of_others(others, path, ".parquet files")
        return paths
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    paths = matches(path)
    if not paths:
        raise FileNotFoundError(f"no file matches {path}")
    one_set(paths, Path(os.path.commonpath([file.parent for file in paths])))
    return paths


class _Shard(NamedTuple):
    """Columns, class names and labels of one file.

    Attributes:
        path: The file.
        image: Name of the column of images.
        label: Name of the column of labels, or None.
        names: Names of the classes.
        counts: Number of rows of each row group.
        labels: Labels of all rows.
        identity: _Identity of the file before it was read.
    """

    path: Path
    image: str
    label: str | None
    names: tuple[str, ...] | None
    counts: list[int]
    labels: Tensor | None
    identity: _Identity


def _read_shard(path: Path, image: str | None, label: str | None, first: _Shard | None = None) -> _Shard:
    """Read the columns of a file; raise if it does not belong to the first one."""
    _require_file(path)
    opened = _identity(path)
    with open_parquet(path) as file:
        with reading(f"the schema of {path} cannot be read"):
            schema, metadata = file.schema_arrow, file.metadata
        types = {field.name: field.type for field in schema}
        columns = {name: str(kind) for name, kind in types.items()}
        features = _features(schema.metadata or {})
        if first is not None:
            # Columns that are not read may differ: writers add some, and infer the types of each file by itself.
            for name in filter(None, (first.image, first.label)):
                _check_same(first, path, f"column {name!r}", "present", "present" if name in columns else "missing")
        images = _choose("images", image, ("image", "img"), "Image", features, columns, path)
        if images is None:
            candidates = [name for name, kind in types.items() if _is_image_type(kind)]
            if len(candidates) != 1:
                fault = ValueError(f"{path} has no column image; its columns are {_listed(columns)}")
                raise with_remedy(fault, "image")
            images = candidates[0]
        if not _is_image_type(types[images]):
            raise ValueError(
                f"the column {images!r} of {path} is {columns[images]}; expected struct<bytes: binary, path: string> "
                f"or binary. Its columns are {_listed(columns)}"
            )
        target = _choose("labels", label, ("label", "labels"), "ClassLabel", features, columns, path)
        labels = None
        if target is not None:
            import pyarrow as pa

            # Where no row has a label, writers infer the type null.
            if not (pa.types.is_integer(types[target]) or pa.types.is_null(types[target])):
                raise ValueError(f"the column {target!r} of {path} is {columns[target]}; expected integer labels")
            with reading(f"the column {target!r} of {path} cannot be read"):
                column = file.read(columns=[target], use_threads=False).column(0).cast(pa.int64()).fill_null(-1)
            labels = torch.tensor(column.to_numpy(), device="cpu")
        names = _class_names(features.get(target, {}).get("names") if target is not None else None, path)
        if first is not None:
            _check_same(first, path, "column of labels", first.label, target)
            _check_same(first, path, "class names", first.names, names)
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return _Shard(path, images, target, names, counts, labels, opened)


def _class_names(names: Any, path: Path) -> tuple[str, ...] | None:
    """Return the class names of metadata."""
    try:
        return class_names_tuple(names) if names else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the class names in the metadata of {path} cannot be used: {error}") from error


def _choose(
    content: str,
    wanted: str | None,
    usual: tuple[str, ...],
    feature: str,
    features: dict[str, dict[str, Any]],
    columns: dict[str, str],
    path: Path,
) -> str | None:
    """Return the requested column, else the column with the right type in the metadata, else one of a usual name."""
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{path} has no column {wanted!r}; its columns are {_listed(columns)}")
        return wanted
    declared = [name for name in columns if features.get(name, {}).get("_type") == feature]
    named = [name for name in usual if name in columns]
    for choice in (declared, named):
        if len(choice) == 1:
            return choice[0]
    if declared or named:
        several = ", ".join(declared or named)
        raise with_remedy(ValueError(f"several columns of {path} may be the {content}: {several}"), usual[0])
    return None


def _is_image_type(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    # The oldest supported pyarrow does not know views.
    tests = (getattr(pa.types, f"is_{name}", None) for name in ("binary", "large_binary", "binary_view"))
    return kind is not None and any(test(kind) for test in tests if test is not None)


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's metadata of each column; an empty dict if there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        # Another program wrote this file.
        return {}


def _listed(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def _check_same(first: _Shard, other: Path, name: str, in_first: Any, in_other: Any) -> None:
    """Raise unless two files agree."""
    if in_first != in_other:
        raise ValueError(
            f"{first.path} and {other} do not belong together: {name} is {reprlib.repr(in_first)} in the first and "
            f"{reprlib.repr(in_other)} in the second"
        )


# --- Encoded images in the row groups of parquet files ------------------------------------------------------


# Bytes of encoded images that one process keeps.
_KEPT = 64 * 2**20


def _require_file(path: Path) -> None:
    """Raise unless the path is that of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")


def open_parquet(path: Path) -> Any:
    """Open a parquet file; the result is a context manager.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: pyarrow is not installed.
        ValueError: It is not a parquet file.
    """
    parquet = extra("pyarrow.parquet", "parquet files are read by pyarrow")
    _require_file(path)
    try:
        return parquet.ParquetFile(path)
    except _errors() as error:
        message = _other_kind(path, "a parquet file") or f"{path} is not a parquet file, or a damaged one: {error}"
        raise ValueError(message) from error


@contextmanager
def reading(message: str) -> Iterator[None]:
    """Turn errors of pyarrow into a ValueError with a message."""
    try:
        yield
    except _errors() as error:
        raise ValueError(f"{message}: {error}") from error


def _errors() -> tuple[type[Exception], ...]:
    """Return the types of the errors of pyarrow; some are classes of its own, and none of them names a file."""
    return extra("pyarrow", "parquet files are read by pyarrow").ArrowException, ValueError, OSError


class _Group(NamedTuple):
    """Row group of a file.

    Attributes:
        path: The file.
        number: Number of the group in the file.
        row: First row of the group in the file.
        start: Index of that row in the data set.
        identity: _Identity of the file when its labels were read; None in pickles of earlier versions.
    """

    path: Path
    number: int
    row: int
    start: int
    identity: _Identity | None = None


class Rows:
    """Encoded images, accessed by index.

    A file is open only while a row group is read, so that processes share nothing. The last row groups are kept up to a
    number of bytes, and the very last one in any case.

    Args:
        name: Name of the data set in messages.
        column: Column of the images: bytes, or structs of bytes and path.
        files: All files, with the number of rows of each of their row groups and their identity.
    """

    def __init__(self, name: str, column: str, files: Iterable[tuple[Path, list[int], _Identity]]) -> None:
        self._name, self._column = name, column
        self._groups: list[_Group] = []
        self._length = 0
        for path, counts, opened in files:
            row = 0
            for number, count in enumerate(counts):
                self._groups.append(_Group(path, number, row, self._length, opened))
                row += count
                self._length += count
        self._starts = [group.start for group in self._groups]
        # In order of use; the last group is the latest.
        self._kept: dict[_Group, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def __len__(self) -> int:
        return self._length

    def __str__(self) -> str:
        return self._name

    def where(self, index: int) -> str:
        group = self._group(index)
        return f"row {group.row + index - group.start} of {group.path}"

    def row_names(self) -> RowNames:
        counts: dict[Path, int] = {}
        for group, end in zip(self._groups, [*self._starts[1:], self._length], strict=True):
            counts[group.path] = counts.get(group.path, 0) + end - group.start
        return RowNames(names_within(counts), list(counts.values()))

    def image(self, index: int) -> bytes:
        group = self._group(index)
        images, position = self._read(group), index - group.start
        if position >= len(images):
            raise ValueError(
                f"{self.where(index)} is missing, although the metadata of the file count it: the file is damaged, or "
                "was written again since it was opened. Read the data set again"
            )
        with reading(f"{self.where(index)} cannot be read"):
            value = images[position].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes):
            return data
        if path is None:
            raise ValueError(f"{self.where(index)} has no image; bytes and path are null")
        folder = os.path.abspath(group.path.parent)
        file = Path(os.path.abspath(os.path.join(folder, str(path))))
        if not file.is_relative_to(folder):
            raise ValueError(
                f"{self.where(index)} has no bytes but the path {path!r}, which leads out of {folder}; expected a path "
                "below this folder. Write the images into the parquet file"
            )
        # Unlike Path.is_file, this returns False for a name that is too long for the system.
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{self.where(index)} has no bytes but the path {path!r}; there is no file {file}")
        return file.read_bytes()

    def _group(self, index: int) -> _Group:
        return self._groups[bisect.bisect_right(self._starts, index) - 1]

    def _read(self, group: _Group) -> Any:
        """Return the images of a row group as an array of pyarrow."""
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
    # The rows of a file that was written again would get the labels of others.
    _check_unchanged(group.path, group.identity)
    with open_parquet(group.path) as file:
        with reading(f"row group {group.number} of {group.path} cannot be read"):
            # Threads of pyarrow must not run while a process is forked.
            return file.read_row_group(group.number, columns=[column], use_threads=False).column(0)
