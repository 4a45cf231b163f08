"""Blocks of rows of activations: in memory, in a shard on disk, or a concatenation of these."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from penult import io

__all__ = ["KIND", "Block", "Facts", "Memory", "Shard", "load", "one"]

KIND = "activations"


@dataclass(frozen=True)
class Facts:
    """Dimensions, dtypes and device of the rows of one set."""

    in_features: int
    num_classes: int
    dtype: torch.dtype
    logits_dtype: torch.dtype
    labels: bool
    device: torch.device

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that hold the rows."""
        return ("activations", "logits", "labels") if self.labels else ("activations", "logits")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        h, logits = self.in_features * self.dtype.itemsize, self.num_classes * self.logits_dtype.itemsize
        return h + logits + (8 if self.labels else 0)


class Block(Protocol):
    """Rows of activations in a fixed order, wherever they are stored."""

    @property
    def facts(self) -> Facts:
        """Dimensions, dtypes and device of the rows."""

    @property
    def leaves(self) -> Sequence[Block]:
        """Blocks that make up this one, each in memory or in one shard."""

    def __len__(self) -> int:
        """Number of rows."""

    def read(self, *names: str) -> tuple[Tensor, ...]:
        """Read tensors of the rows; those of one shard are the file, mapped into memory."""

    def narrow(self, start: int, stop: int) -> Block:
        """Return rows start to stop; reads nothing."""

    def take(self, rows: Tensor) -> Block:
        """Return rows by ascending number (M,); reads nothing from disk."""


@dataclass(frozen=True, eq=False)
class Memory:
    """Rows that are tensors in memory."""

    activations: Tensor
    logits: Tensor
    labels: Tensor | None = None

    @property
    def facts(self) -> Facts:
        h, logits = self.activations, self.logits
        return Facts(h.shape[1], logits.shape[1], h.dtype, logits.dtype, self.labels is not None, h.device)

    @property
    def leaves(self) -> Sequence[Block]:
        return (self,)

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, index: Any) -> Memory:
        labels = None if self.labels is None else self.labels[index]
        return Memory(self.activations[index], self.logits[index], labels)

    def read(self, *names: str) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in names)

    def narrow(self, start: int, stop: int) -> Memory:
        return self[start:stop]

    def take(self, rows: Tensor) -> Memory:
        return self[rows.to(self.activations.device)]


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows of one file; the file is open only while it is read."""

    path: Path
    facts: Facts
    count: int  # number of rows of the file
    rows: range | Tensor  # ascending numbers of the rows in this block
    # Identity of the file when it was opened. The default serves objects pickled by versions without this field.
    identity: io._Identity | None = None

    @property
    def leaves(self) -> Sequence[Block]:
        return (self,)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, *names: str) -> tuple[Tensor, ...]:
        io._check_unchanged(self.path, self.identity)
        tensors = io.read(self.path, kind=KIND).tensors
        facts = self.facts
        expected = {
            "activations": ((self.count, facts.in_features), facts.dtype),
            "logits": ((self.count, facts.num_classes), facts.logits_dtype),
            "labels": ((self.count,), torch.int64),
        }
        for name in names:
            tensor = tensors.get(name)
            if tensor is None or (tuple(tensor.shape), tensor.dtype) != expected[name]:
                stored = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                shape, dtype = expected[name]
                raise io.FileFormatError(
                    f"{name} in {self.path} is {stored}; expected {dtype} of shape {shape}, as its index says. Copy or "
                    "write the folder again"
                )
        index = slice(self.rows.start, self.rows.stop) if isinstance(self.rows, range) else self.rows
        return tuple(tensors[name][index] for name in names)

    def narrow(self, start: int, stop: int) -> Shard:
        return replace(self, rows=self.rows[start:stop])

    def take(self, rows: Tensor) -> Shard:
        rows = rows + self.rows.start if isinstance(self.rows, range) else self.rows[rows]
        return replace(self, rows=rows)


class _Several:
    """Rows of several blocks, concatenated.

    Args:
        blocks: At least one block; all with the same facts.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)
        self._ends = list(accumulate(map(len, self._blocks)))

    @property
    def facts(self) -> Facts:
        return self._blocks[0].facts

    @property
    def leaves(self) -> Sequence[Block]:
        return self._blocks

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, *names: str) -> tuple[Tensor, ...]:
        whole: tuple[Tensor, ...] = ()
        for block, end in zip(self._blocks, self._ends, strict=True):
            # Only one file is mapped into memory at a time.
            parts = block.read(*names)
            whole = whole or tuple(part.new_empty(len(self), *part.shape[1:]) for part in parts)
            for all_rows, part in zip(whole, parts, strict=True):
                all_rows[end - len(block) : end] = part
        return whole

    def narrow(self, start: int, stop: int) -> Block:
        first, last = bisect_right(self._ends, start), bisect_left(self._ends, stop)
        parts = []
        for block, end in zip(self._blocks[first : last + 1], self._ends[first : last + 1], strict=True):
            begin = end - len(block)
            parts.append(block.narrow(max(start - begin, 0), min(stop - begin, len(block))))
        return one(parts or [self._blocks[0].narrow(0, 0)])

    def take(self, rows: Tensor) -> Block:
        cuts = [0, *torch.searchsorted(rows, torch.tensor(self._ends, device="cpu")).tolist()]
        parts = [
            block.take(rows[first:last] - (end - len(block)))
            for block, end, first, last in zip(self._blocks, self._ends, cuts, cuts[1:], strict=False)
            if last > first
        ]
        return one(parts or [self._blocks[0].narrow(0, 0)])


def load(block: Block) -> Memory:
    """Return a block in memory; tensors of one shard are the file, mapped into memory."""
    return block if isinstance(block, Memory) else Memory(*block.read(*block.facts.names))


def one(blocks: Sequence[Block]) -> Block:
    """Concatenate one or more blocks."""
    if len(blocks) == 1:
        return blocks[0]
    leaves = [leaf for block in blocks for leaf in block.leaves]
    kept = [leaf for leaf in leaves if len(leaf)] or leaves[:1]
    return kept[0] if len(kept) == 1 else _Several(kept)
