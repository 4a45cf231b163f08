"""Folders of activations: what lies in them, and who may write there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from penult import io
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
    """What one of several processes writes into a folder."""

    rank: int = 0
    size: int = 1

    def shard_name(self, number: int) -> str:
        """The file of a shard."""
        return f"activations-{self._prefix}{number:05}.safetensors"

    @property
    def lock(self) -> str:
        """The file that its writer locks."""
        return f".activations{self._prefix and '-' + self._prefix[:-1]}.lock"

    @property
    def _prefix(self) -> str:
        return "" if self.size == 1 else f"{self.rank:05}-of-{self.size:05}-"


class Stored(NamedTuple):
    """What a folder holds, or one part of it."""

    shards: list[Shard]
    record: dict[str, Any]  # from `record_of`; empty where there is no shard
    batches: int  # of the loader, that the shards cover

    @property
    def rows(self) -> int:
        return sum(map(len, self.shards))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.record["class_names"]
        return None if names is None else tuple(names)

    @property
    def pre_activation(self) -> bool:
        found: bool = self.record.get("pre_activation", False)
        return found

    def first_batch(self) -> Shard:
        return self.shards[0].narrow(0, _batches_in(self.shards[0].path)[0])

    def last_batch(self) -> Shard:
        shard = self.shards[-1]
        return shard.narrow(len(shard) - _batches_in(shard.path)[-1], len(shard))


def record_of(
    facts: Facts, class_names: Sequence[str] | None, *, pre_activation: bool = False, **more: Any
) -> dict[str, Any]:
    """What is written about rows, as JSON.

    Only what are pre-activations says so: folders of versions that knew none read on, and are resumed.
    """
    if class_names is not None and not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names must be text to be stored, not {class_names}")
    return {
        "in_features": facts.in_features,
        "num_classes": facts.num_classes,
        "dtype": name_of(facts.dtype),
        "logits_dtype": name_of(facts.logits_dtype),
        "labels": facts.labels,
        "class_names": None if class_names is None else list(class_names),
        **({"pre_activation": True} if pre_activation else {}),
        **more,
    }


def name_of(dtype: torch.dtype) -> str:
    """How a dtype is called in a file."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"{dtype} cannot be stored; convert to one of {', '.join(_DTYPES)}")
    return name


def finished(folder: Path) -> Stored:
    """A folder with an index.

    Raises:
        FileNotFoundError: There is no such folder.
        FileFormatError: It has no index, or one that is damaged, foreign or newer; or a shard is not as it was.
    """
    folder = folder.absolute()
    if folder.is_dir() and not (folder / io.INDEX_NAME).exists():
        count = len(shards_in(folder))
        if not count:
            raise io.FileFormatError(f"{folder} holds no activations: there is neither an {io.INDEX_NAME} nor a shard")
        raise io.FileFormatError(
            f"{folder} is incomplete: it has {count} whole shards but no {io.INDEX_NAME}, so its writer was killed or "
            "is still at work. The same penult.extract into this folder resumes; save(..., overwrite=True) starts anew"
        )
    index = io.read_index(folder, KIND)
    with _complaining(folder / io.INDEX_NAME, "write the folder again"):
        counts = {name: facts["rows"] for name, facts in index.shards.items()}
        return _stored(folder, index.metadata["facts"], counts, index.metadata["batches"])


def unfinished(folder: Path, part: Part) -> Stored:
    """The whole shards of one writer, whatever the index of the folder says.

    Raises:
        FileFormatError: A shard is damaged, or they do not follow each other.
    """
    folder = folder.absolute()
    names = shards_in(folder, part)
    record: dict[str, Any] = {}
    counts: dict[str, int] = {}
    batches = 0
    for number, name in enumerate(names):
        with _complaining(folder / name, "overwrite=True starts anew"):
            facts = io.read(folder / name, KIND).metadata["facts"]
            if name != part.shard_name(number) or facts != (record or facts):
                raise ValueError(f"it does not follow {names[number - 1]}" if number else "it is not the first shard")
            rows = _batches_in(folder / name)
            record, counts[name], batches = facts, sum(rows), batches + len(rows)
    if not names:
        return Stored([], {}, 0)
    with _complaining(folder, "overwrite=True starts anew"):
        return _stored(folder, record, counts, batches)


@contextmanager
def _complaining(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except io.FileFormatError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise io.FileFormatError(
            f"{path} is not what penult writes about activations ({type(error).__name__}: {error}); {remedy}"
        ) from error


def _batches_in(path: Path) -> list[int]:
    """Rows of each batch in a shard."""
    rows = io.read(path, KIND).metadata.get("batches")
    if not isinstance(rows, list) or not rows or not all(isinstance(count, int) and count >= 0 for count in rows):
        raise io.FileFormatError(f"{path} does not say which batches it holds; overwrite=True starts anew")
    return rows


def _stored(folder: Path, record: dict[str, Any], counts: dict[str, int], batches: int) -> Stored:
    """What a record and shards say; KeyError, TypeError or ValueError where they are not what they should be."""
    dtypes = _DTYPES[record["dtype"]], _DTYPES[record["logits_dtype"]]
    facts = Facts(record["in_features"], record["num_classes"], *dtypes, record["labels"], torch.device("cpu"))
    for count in (facts.in_features, facts.num_classes, batches, *counts.values()):
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{count!r} is no count")
    if not isinstance(facts.labels, bool):
        raise TypeError("labels must be true or false")
    if not isinstance(record.get("pre_activation", False), bool):
        raise TypeError("pre_activation must be true or false")
    names = record["class_names"]
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not (texts and len(names) == facts.num_classes):
        raise ValueError(f"there are not {facts.num_classes} class_names")
    if not counts:
        raise ValueError("there is no shard")
    for name, count in counts.items():  # so that nothing is allocated for rows that no file holds
        if count * max(facts.row_bytes, 1) > (size := (folder / name).stat().st_size):
            raise ValueError(f"{name} has {size} bytes, too few for {count} rows of {facts.row_bytes}")
    return Stored([Shard(folder / name, facts, n, range(n)) for name, n in counts.items()], record, batches)


@contextmanager
def writing(folder: Path, processes: Processes, overwrite: bool) -> Iterator[Part]:
    """The folder, made if need be, for these processes alone; what killed ones left half-written goes.

    Args:
        folder: The folder.
        processes: Those that write to it, this one among them.
        overwrite: Whether to remove what it holds of activations.

    Yields:
        The part that this process writes.

    Raises:
        FileExistsError: The folder holds other files and no activations.
        RuntimeError: Another process writes the part.
        ValueError: It holds shards of another number of processes.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; activations need a folder")
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir())
    ours = any(_LOCK_NAME.fullmatch(name) for name in others) or shards_in(folder) or _has_index(folder)
    if others and not ours:
        raise FileExistsError(
            f"{folder} holds other files and no activations ({', '.join(others[:3])}{', ...' * (len(others) > 3)}); "
            "choose a new or empty folder"
        )
    part = Part(processes.rank, processes.count)
    with _locking(folder, folder / part.lock):
        processes.wait()  # until all have locked theirs, so that no other run has a part
        if part.rank == 0:
            _clear(folder, part, overwrite)
        processes.wait()
        yield part


@contextmanager
def _locking(folder: Path, path: Path) -> Iterator[None]:
    with open(path, "a+") as file:
        # A file without a link is that of a writer that finished between our open and our lock.
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
            with suppress(PermissionError):  # on Windows, where it is open; there it stays
                path.unlink(missing_ok=True)


def _clear(folder: Path, part: Part, overwrite: bool) -> None:
    """Remove what killed writers left half-written, and all if asked to; see that the rest can be gone on with."""
    for temporary, name in io.leftovers(folder).items():
        if name == io.INDEX_NAME or _SHARD_NAME.fullmatch(name):
            temporary.unlink()
    if overwrite:
        for name in [io.INDEX_NAME, *reversed(shards_in(folder))]:  # at each moment, what is left can be resumed
            (folder / name).unlink(missing_ok=True)
    for name in [] if (folder / io.INDEX_NAME).exists() else shards_in(folder):
        if (count := _part_of(name).size) != part.size:
            raise ValueError(
                f"{folder} holds shards of a run of {count} processes that was stopped, and there are {part.size} "
                f"now: resume with {count}, or start anew with overwrite=True"
            )


def shards_in(folder: Path, part: Part | None = None) -> list[str]:
    """The whole shards of one writer, or of all, in order."""
    found = [match for path in folder.iterdir() if (match := _SHARD_NAME.fullmatch(path.name))]
    found.sort(key=lambda match: (int(match[1] or 0), int(match[3])))
    return [match[0] for match in found if part in (None, _part_of(match[0]))]


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
    """Whether the file is now this process's own; the lock dies with the process, and workers do not inherit it."""
    if sys.platform == "win32":  # which has no such lock
        return True
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True
