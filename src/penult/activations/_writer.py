"""Writer of shards, and checks that a stored folder belongs to a model and a loader."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from penult import io
from penult._checks import with_remedy
from penult._row_blocks import blocks, digest_of, rows_digest
from penult.activations._blocks import KIND, Block, Memory, load
from penult.activations._folder import Part, Stored, record_of
from penult.head import Head

__all__ = ["SHARD_SIZE", "Writer", "Written", "check_batch", "check_record", "checksum", "refusal", "write_index"]

SHARD_SIZE = 16 * 2**20
"""Default size of a shard in bytes."""


class Written(NamedTuple):
    """Result of one writer.

    Attributes:
        counts: Number of rows by shard.
        record: Facts about the rows; empty without a shard.
        batches: Number of batches.
        hashes: Sum of `rows_digest` of the activations; None if an older version wrote some of the shards.
    """

    counts: dict[str, int]
    record: dict[str, Any]
    batches: int
    hashes: int | None = None


def write_index(folder: Path, parts: Sequence[Written]) -> None:
    """Write the index of the shards of all writers, in order; the folder is then complete.

    Raises:
        ValueError: The records of the writers differ.
    """
    records = [part.record for part in parts if part.record]
    for record in records:
        if differing := [name for name in record if record[name] != records[0][name]]:
            differences = ", ".join(f"{name} is {records[0][name]} and {record[name]}" for name in differing)
            raise ValueError(f"the batches of different processes differ: {differences}")
    shards = {name: {"rows": rows} for part in parts for name, rows in part.counts.items()}
    batches = sum(part.batches for part in parts)
    metadata = {"facts": records[0], "batches": batches}
    hashes = [part.hashes for part in parts]
    if None not in hashes:
        metadata["digest"] = digest_of(sum(facts["rows"] for facts in shards.values()), filter(None, hashes))
    io.write_index(folder, shards, KIND, metadata)


class Writer:
    """Writer that collects batches until they fill a shard, so that a killed process leaves whole shards.

    Args:
        folder: Folder that `writing` locked.
        part: Part that this process writes.
        stored: Shards of that part that exist already.
        shard_size: Bytes after which a shard ends.
        more: Further entries of the record.
    """

    def __init__(self, folder: Path, part: Part, stored: Stored, shard_size: int, **more: Any) -> None:
        self._folder, self._part, self._shard_size, self._more = folder, part, shard_size, more
        self._record, self._batches, self._hashes = stored.record, stored.batches, stored.hashes
        self._counts = {shard.path.name: len(shard) for shard in stored.shards}
        # Tensors that the batches are collected in, used again for each shard, and the rows of each batch in them.
        self._buffers: dict[str, Tensor] = {}
        self._pending: list[int] = []

    def add(self, rows: Memory) -> None:
        """Add the rows of the next batch."""
        facts, start = rows.facts, sum(self._pending)
        self._record = record_of(facts, shard_size=self._shard_size, **self._more)
        self._reserve(rows, start + len(rows))
        for name, part in zip(facts.names, rows.read(*facts.names), strict=True):
            self._buffers[name][start : start + len(rows)] = part
        self._pending.append(len(rows))
        if (start + len(rows)) * facts.row_bytes >= self._shard_size:
            self._flush()

    def finish(self) -> Written:
        """Write the last shard and return the numbers of rows of all shards."""
        if sum(self._pending) or (self._pending and not self._counts):
            self._flush()
        return Written(self._counts, self._record, self._batches + len(self._pending), self._hashes)

    def _reserve(self, rows: Memory, needed: int) -> None:
        """Grow the buffers to `needed` rows: by a factor of two, up to the size of a shard."""
        capacity = len(self._buffers["activations"]) if self._buffers else 0
        if self._buffers and capacity >= needed:
            return
        facts = rows.facts
        shard_rows = self._shard_size // facts.row_bytes + 1 + len(rows)
        for name, part in zip(facts.names, rows.read(*facts.names), strict=True):
            dtype = torch.int64 if name == "labels" else part.dtype
            larger = torch.empty(max(needed, min(2 * capacity, shard_rows)), *part.shape[1:], dtype=dtype, device="cpu")
            larger[:capacity] = self._buffers.get(name, larger[:0])
            self._buffers[name] = larger

    def _flush(self) -> None:
        name, count = self._part.shard_name(len(self._counts)), sum(self._pending)
        hashes = rows_digest(self._buffers["activations"][:count])
        metadata = {"facts": self._record, "batches": self._pending, "hashes": f"{hashes:016x}"}
        io.write(self._folder / name, {key: rows[:count] for key, rows in self._buffers.items()}, KIND, metadata)
        self._counts[name] = count
        self._hashes = None if self._hashes is None else self._hashes + hashes
        self._batches += len(self._pending)
        self._pending = []


# --- Whether a folder of activations was made from the model and loader at hand -----------------------------


def checksum(head: Head) -> str:
    """Return the SHA-256 of W and b."""
    digest = hashlib.sha256()
    for tensor in (head.weight, head.full_bias):
        for rows in blocks(tensor):
            digest.update(save({"rows": rows.cpu().contiguous()}))
    return digest.hexdigest()


def refusal(folder: Path, reason: str) -> ValueError:
    """Return the error for a folder with activations of another call."""
    error = ValueError(
        f"{folder} contains activations that this call would not give: {reason}. To resume, use the same model, "
        "arguments and loader (shuffle=False). Otherwise choose another folder"
    )
    return with_remedy(error, "overwrite", "start again")


def check_record(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise unless the record of a folder agrees with all entries of `now`."""
    # These entries are written only where they say something.
    stored = {"pre_activation": False, "preprocessing": None, **stored}
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
    """Raise unless a batch equals its stored rows, up to the rounding of another machine."""
    old = load(stored)
    tolerance = max(1e-3, 8 * max(torch.finfo(x.dtype).eps for x in (old.activations, old.logits)))
    same = (
        len(old) == len(now)
        and (old.labels is None or now.labels is None or torch.equal(old.labels, now.labels))
        and _close(old.activations, now.activations, tolerance)
        and _close(old.logits, now.logits, tolerance)
    )
    if not same:
        raise refusal(folder, f"batch {number} (counted from 0) has other activations, logits or labels")


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.double(), b.double()
    scale = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_zeros(())
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * float(scale), equal_nan=True)
