"""Folders of activations: their files, their records, and the locks of their writers."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from penult import io
from penult._checks import with_remedy
from penult.activations._blocks import KIND, Facts, Shard
from penult.processes import Processes

__all__ = ["Part", "Stored", "finished", "name_of", "record_of", "shards_in", "unfinished", "writing"]

_SHARD_NAME = re.compile(r"activations-(?:(\d{5,})-of-(\d{5,})-)?(\d{5,})\.safetensors")
_LOCK_NAME = re.compile(r"\.activations(?:-\d{5,}-of-\d{5,})?\.lock")
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class Part(NamedTuple):
    """One of the processes that write to a folder: its number, and the number of processes."""

    rank: int = 0
    size: int = 1

    def shard_name(self, number: int) -> str:
        """Return the file name of a shard."""
        return f"activations-{self._prefix}{number:05}.safetensors"

    @property
    def lock(self) -> str:
        """Name of the file that the writer locks."""
        return f".activations{self._prefix and '-' + self._prefix[:-1]}.lock"

    @property
    def _prefix(self) -> str:
        return "" if self.size == 1 else f"{self.rank:05}-of-{self.size:05}-"


class Stored(NamedTuple):
    """Shards of a folder, or of one writer.

    Attributes:
        shards: The shards in order.
        record: Facts about the rows from `record_of`; empty if there is no shard.
        batches: Number of batches of the loader that the shards contain.
        hashes: Sum of `rows_digest` of the activations; None if unknown, or in a complete folder.
        digest: Digest of the whole set of rows, see `ActivationSource`, as the index of a complete folder has it.
    """

    shards: list[Shard]
    record: dict[str, Any]
    batches: int
    hashes: int | None = None
    digest: str | None = None

    @property
    def rows(self) -> int:
        return sum(map(len, self.shards))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.record["class_names"]
        return None if names is None else tuple(names)

    @property
    def pre_activation(self) -> bool:
        stored: bool = self.record.get("pre_activation", False)
        return stored

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        stored: dict[str, Any] | None = self.record.get("preprocessing")
        return stored

    def first_batch(self) -> Shard:
        return self.shards[0].narrow(0, _batches_in(self.shards[0].path)[0])

    def last_batch(self) -> Shard:
        shard = self.shards[-1]
        return shard.narrow(len(shard) - _batches_in(shard.path)[-1], len(shard))


def record_of(
    facts: Facts,
    class_names: Sequence[str] | None,
    *,
    pre_activation: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the facts about rows that a file stores, as JSON."""
    if class_names is not None and not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names is {class_names}; expected strings, which a file can store")
    # These two entries are written only where they say something, so that folders of older versions can be resumed.
    return {
        "in_features": facts.in_features,
        "num_classes": facts.num_classes,
        "dtype": name_of(facts.dtype),
        "logits_dtype": name_of(facts.logits_dtype),
        "labels": facts.labels,
        "class_names": None if class_names is None else list(class_names),
        **({"pre_activation": True} if pre_activation else {}),
        **({} if preprocessing is None else {"preprocessing": preprocessing}),
        **more,
    }


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a file."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"dtype is {dtype}, which cannot be stored; convert to one of {', '.join(_DTYPES)}")
    return name


def finished(folder: Path) -> Stored:
    """Read the index of a complete folder.

    Raises:
        FileNotFoundError: There is no such folder.
        FileFormatError: The folder has no index; the index is damaged, or written by another program or a newer penult;
            or a shard is smaller than the index says.
    """
    folder = folder.absolute()
    if folder.is_dir() and not (folder / io.INDEX_NAME).exists():
        count = len(shards_in(folder))
        if not count:
            raise io.FileFormatError(f"{folder} contains no activations: it has neither an {io.INDEX_NAME} nor a shard")
        error = io.FileFormatError(
            f"{folder} is incomplete: it has {count} whole shards but no {io.INDEX_NAME}, so its writer was killed or "
            "is still running. Run the same penult.extract into this folder, which then resumes"
        )
        raise with_remedy(error, "overwrite", "start again")
    index = io.read_index(folder, KIND)
    with _as_format_error(folder / io.INDEX_NAME):
        counts = {name: facts["rows"] for name, facts in index.shards.items()}
        digest = index.metadata.get("digest")
        if not isinstance(digest, str | None):
            raise TypeError("digest is no text")
        return _stored(folder, index.metadata["facts"], counts, index.metadata["batches"])._replace(digest=digest)


def unfinished(folder: Path, part: Part) -> Stored:
    """Read the whole shards of one writer; the index of the folder is ignored.

    Raises:
        FileFormatError: A shard is damaged, or the numbers of the shards are not consecutive.
    """
    folder = folder.absolute()
    names = shards_in(folder, part)
    record: dict[str, Any] = {}
    counts: dict[str, int] = {}
    batches, hashes = 0, 0
    unhashed = False
    for number, name in enumerate(names):
        with _as_format_error(folder / name, writing=True):
            metadata = io.read(folder / name, KIND).metadata
            facts = metadata["facts"]
            if name != part.shard_name(number) or facts != (record or facts):
                raise ValueError(f"it does not follow {names[number - 1]}" if number else "it is not the first shard")
            rows = _batches_in(folder / name)
            record, counts[name], batches = facts, sum(rows), batches + len(rows)
            unhashed = unhashed or "hashes" not in metadata
            hashes += int(metadata.get("hashes", "0"), 16)
    if not names:
        return Stored([], {}, 0, 0)
    with _as_format_error(folder, writing=True):
        return _stored(folder, record, counts, batches)._replace(hashes=None if unhashed else hashes)


@contextmanager
def _as_format_error(path: Path, writing: bool = False) -> Iterator[None]:
    """Turn errors about the contents of a file into a FileFormatError that names the file and a remedy."""
    try:
        yield
    except io.FileFormatError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{path} is not a record of activations by penult ({type(error).__name__}: {error}); "
        if not writing:
            raise io.FileFormatError(reason + "write the folder again") from error
        refused = io.FileFormatError(reason + "choose another folder")
        raise with_remedy(refused, "overwrite", "start again") from error


def _batches_in(path: Path) -> list[int]:
    """Return the number of rows of each batch in a shard."""
    rows = io.read(path, KIND).metadata.get("batches")
    if not isinstance(rows, list) or not rows or not all(isinstance(count, int) and count >= 0 for count in rows):
        refused = io.FileFormatError(f"{path} does not say which batches it contains; choose another folder")
        raise with_remedy(refused, "overwrite", "start again")
    return rows


def _stored(folder: Path, record: dict[str, Any], counts: dict[str, int], batches: int) -> Stored:
    """Build the contents of a folder from a record; raise a KeyError, TypeError or ValueError if it is not valid."""
    dtypes = _DTYPES[record["dtype"]], _DTYPES[record["logits_dtype"]]
    facts = Facts(record["in_features"], record["num_classes"], *dtypes, record["labels"], torch.device("cpu"))
    for count in (facts.in_features, facts.num_classes, batches, *counts.values()):
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{count!r} is not a count")
    if not isinstance(facts.labels, bool):
        raise TypeError("labels is neither true nor false")
    if not isinstance(record.get("pre_activation", False), bool):
        raise TypeError("pre_activation is neither true nor false")
    if not isinstance(record.get("preprocessing", {}), dict):
        raise TypeError("preprocessing is no mapping")
    names = record["class_names"]
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not (texts and len(names) == facts.num_classes):
        raise ValueError(f"class_names is not a list of {facts.num_classes} strings")
    if not counts:
        raise ValueError("there is no shard")
    # A record that claims more rows than its files can contain would make readers allocate memory for them.
    shards = [Shard(folder / name, facts, n, range(n), io._identity(folder / name)) for name, n in counts.items()]
    for shard in shards:
        assert shard.identity is not None
        if shard.count * max(facts.row_bytes, 1) > (size := shard.identity.size):
            raise ValueError(f"{shard.path.name} has {size} bytes, too few for {shard.count} rows of {facts.row_bytes}")
    return Stored(shards, record, batches)


@contextmanager
def writing(folder: Path, processes: Processes, overwrite: bool) -> Iterator[Part]:
    """Create a folder and lock it for these processes, and remove half-written files of killed processes.

    Args:
        folder: The folder.
        processes: Processes that write to it, including this one.
        overwrite: Whether to remove the activations that it contains.

    Yields:
        The part that this process writes.

    Raises:
        FileExistsError: The folder contains other files and no activations.
        NotADirectoryError: The folder is a file.
        RuntimeError: Another process is writing the part.
        ValueError: The folder contains shards that another number of processes wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    has_activations = any(_LOCK_NAME.fullmatch(name) for name in names) or shards_in(folder) or _has_index(folder)
    if names and not has_activations:
        raise FileExistsError(
            f"{folder} contains other files and no activations ({', '.join(names[:3])}{', ...' * (len(names) > 3)}); "
            "choose a new or empty folder"
        )
    part = Part(processes.rank, processes.count)
    with _locking(folder, folder / part.lock):
        # Once all processes hold their locks, no other run can be writing a part.
        processes.wait()
        if part.rank == 0:
            _clear(folder, part, overwrite)
        processes.wait()
        yield part


@contextmanager
def _locking(folder: Path, path: Path) -> Iterator[None]:
    with open(path, "a+") as file:
        # A file without a link belonged to a writer that finished between our open and our lock.
        if not _locked(file) or not os.fstat(file.fileno()).st_nlink:
            file.seek(0)
            raise RuntimeError(
                f"process {file.read() or 'unknown'} is writing to {folder}; wait for it, or choose another folder"
            )
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
        finally:
            # Windows does not remove an open file, so it stays there.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


def _clear(folder: Path, part: Part, overwrite: bool) -> None:
    """Remove half-written files, or all activations with `overwrite`; raise if the shards cannot be resumed."""
    for temporary, name in io.leftovers(folder).items():
        if name == io.INDEX_NAME or _SHARD_NAME.fullmatch(name):
            temporary.unlink()
    if overwrite:
        # In this order the folder can be resumed if this process is killed after any of the removals.
        for name in [io.INDEX_NAME, *reversed(shards_in(folder))]:
            (folder / name).unlink(missing_ok=True)
    for name in [] if (folder / io.INDEX_NAME).exists() else shards_in(folder):
        if (count := _part_of(name).size) != part.size:
            refused = ValueError(
                f"{folder} contains shards of a run of {count} processes that was stopped; expected {part.size} "
                f"processes. Resume with {count} processes"
            )
            raise with_remedy(refused, "overwrite", "start again")


def shards_in(folder: Path, part: Part | None = None) -> list[str]:
    """Return the names of the whole shards of one writer, or of all writers, in order."""
    matches = [match for path in folder.iterdir() if (match := _SHARD_NAME.fullmatch(path.name))]
    matches.sort(key=lambda match: (int(match[1] or 0), int(match[3])))
    return [match[0] for match in matches if part in (None, _part_of(match[0]))]


def _part_of(name: str) -> Part:
    match = _SHARD_NAME.fullmatch(name)
    assert match is not None
    return Part() if match[1] is None else Part(int(match[1]), int(match[2]))


def _has_index(folder: Path) -> bool:
    try:
        io.read_index(folder, KIND)
    except (FileNotFoundError, io.FileFormatError):
        return False
    return True


def _locked(file: IO[str]) -> bool:
    """Lock a file for this process and return whether that succeeded."""
    # The lock ends with the process, and child processes do not inherit it. Windows has no such lock.
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # The file system has no locks.
        return True
    return True
