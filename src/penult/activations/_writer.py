"""Rows to shards, so that a writer that is killed leaves whole ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from penult import io
from penult._row_blocks import blocks
from penult.activations._blocks import KIND, Block, Memory, load
from penult.activations._folder import Part, Stored, record_of
from penult.head import Head

__all__ = ["SHARD_SIZE", "Writer", "Written", "check_batch", "check_record", "checksum", "refusal", "write_index"]

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


# --- Whether a folder of activations was made from the model and loader at hand -----------------------------


def checksum(head: Head) -> str:
    """SHA-256 of W and b."""
    digest = hashlib.sha256()
    for tensor in (head.weight, head.full_bias):
        for rows in blocks(tensor):
            digest.update(save({"rows": rows.cpu().contiguous()}))
    return digest.hexdigest()


def refusal(folder: Path, reason: str) -> ValueError:
    """The error where a folder holds what is not asked for."""
    return ValueError(
        f"{folder} holds activations that this call would not give: {reason}. To resume, use the same model, arguments "
        "and loader (shuffle=False); else give another folder, or overwrite=True to start anew"
    )


def check_record(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise unless what is known now was so when the folder was written."""
    stored = {"pre_activation": False, **stored}  # which is not written where it is so
    differing = [name for name in now if stored.get(name) != now[name]]
    if differing:
        reason = ", ".join(
            "the head has other weights"
            if name == "head"
            else f"{name} is {stored.get(name)} there and {now[name]} now"
            for name in differing
        )
        raise refusal(folder, reason)


def check_batch(folder: Path, number: int, stored: Block, now: Memory) -> None:
    """Raise unless a batch has come out as it was stored, up to the rounding of another machine."""
    was = load(stored)
    eps = max(torch.finfo(x.dtype).eps for x in (was.activations, was.logits))
    same = (
        len(was) == len(now)
        and (was.labels is None or now.labels is None or torch.equal(was.labels, now.labels))
        and all(
            _close(*pair, max(1e-3, 8 * eps)) for pair in ((was.activations, now.activations), (was.logits, now.logits))
        )
    )
    if not same:
        raise refusal(folder, f"batch {number} (counted from 0) has other activations, logits or labels")


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.double(), b.double()
    scale = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_zeros(())
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * float(scale), equal_nan=True)
