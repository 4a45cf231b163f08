"""Rows to shards, so that a writer that is killed leaves whole ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penult import io
from penult.activations._blocks import KIND, Memory
from penult.activations._folder import Part, Stored, record_of

__all__ = ["SHARD_SIZE", "Writer", "Written", "write_index"]

SHARD_SIZE = 16 * 2**20
"""Bytes of a shard, if nothing else is asked for."""


class Written(NamedTuple):
    """What one writer has written: rows by shard, their record (empty where there are none), and batches."""

    counts: dict[str, int]
    record: dict[str, Any]
    batches: int


def write_index(folder: Path, parts: Sequence[Written]) -> None:
    """The index of what one writer after the other has written, which makes the folder complete.

    Raises:
        ValueError: Their rows are not of one kind.
    """
    records = [part.record for part in parts if part.record]
    for record in records:
        if differing := [name for name in record if record[name] != records[0][name]]:
            what = ", ".join(f"{name} is {records[0][name]} and {record[name]}" for name in differing)
            raise ValueError(f"the batches of different processes differ: {what}")
    shards = {name: {"rows": rows} for part in parts for name, rows in part.counts.items()}
    batches = sum(part.batches for part in parts)
    io.write_index(folder, shards, KIND, {"facts": records[0], "batches": batches})


class Writer:
    """Batches gather until they are a shard.

    Args:
        folder: Where to, inside `writing`.
        part: What is written there.
        stored: What there is of it already.
        shard_size: Bytes after which a shard ends.
        more: Further entries of the record.
    """

    def __init__(self, folder: Path, part: Part, stored: Stored, shard_size: int, **more: Any) -> None:
        self._folder, self._part, self._shard_size, self._more = folder, part, shard_size, more
        self._record, self._batches = stored.record, stored.batches
        self._counts = {shard.path.name: len(shard) for shard in stored.shards}
        self._room: dict[str, Tensor] = {}  # used again for each shard
        self._waiting: list[int] = []  # rows of each batch in it

    def add(self, rows: Memory) -> None:
        """The rows of the next batch."""
        facts, start = rows.facts, sum(self._waiting)
        self._record = record_of(facts, shard_size=self._shard_size, **self._more)
        self._make_room(rows, start + len(rows))
        for name, part in zip(facts.names, rows.read(*facts.names), strict=True):
            self._room[name][start : start + len(rows)] = part
        self._waiting.append(len(rows))
        if (start + len(rows)) * facts.row_bytes >= self._shard_size:
            self._flush()

    def finish(self) -> Written:
        """Write the last shard."""
        if sum(self._waiting) or (self._waiting and not self._counts):
            self._flush()
        return Written(self._counts, self._record, self._batches + len(self._waiting))

    def _make_room(self, rows: Memory, needed: int) -> None:
        """Room for so many rows: twice what there was, but no more than a shard takes."""
        there = len(self._room["activations"]) if self._room else 0
        if self._room and there >= needed:
            return
        facts = rows.facts
        most = self._shard_size // facts.row_bytes + 1 + len(rows)
        for name, part in zip(facts.names, rows.read(*facts.names), strict=True):
            dtype = torch.int64 if name == "labels" else part.dtype
            wider = torch.empty(max(needed, min(2 * there, most)), *part.shape[1:], dtype=dtype)
            wider[:there] = self._room.get(name, wider[:0])
            self._room[name] = wider

    def _flush(self) -> None:
        name, count = self._part.shard_name(len(self._counts)), sum(self._waiting)
        metadata = {"facts": self._record, "batches": self._waiting}
        io.write(self._folder / name, {key: room[:count] for key, room in self._room.items()}, KIND, metadata)
        self._counts[name] = count
        self._batches += len(self._waiting)
        self._waiting = []
