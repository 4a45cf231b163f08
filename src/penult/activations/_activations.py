"""Activations of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from penult._checks import check_labels
from penult.activations._blocks import Block, Memory, Shard, load, one
from penult.activations._folder import finished, shards_in, unfinished, writing
from penult.activations._writer import SHARD_SIZE, Writer, write_index
from penult.processes import Processes

__all__ = ["Activations"]


@final
@dataclass(frozen=True, init=False, eq=False, repr=False)
class Activations:
    """Penultimate activations of a data set, with the logits and, where known, the labels.

    They are in memory, where they were made from tensors, or on disk, where `open` or `penult.extract` to a folder
    gave them. On disk nothing is read before it is asked for: slices, the parts of `split` and what `concatenate`
    gives refer to rows of files, and only ``acts.activations``, ``acts.logits`` and ``acts.labels`` read them.

    - Where the rows lie in one shard, these tensors are the file itself, mapped into memory (writing to them leaves
      the file as it is).
    - Where they lie in several, or are chosen rows of some, these tensors are copies, made at each access. `batches`
      is for what does not fit in memory.

    Any index of rows works: ``acts[slice]``, ``acts[indices]``, ``acts[mask]``. Other than contiguous slices of what
    is on disk, it copies the rows that it picks, and these alone. Nothing of a set can be changed.

    Args:
        activations: (N, d).
        logits: (N, K).
        labels: (N,) integers in 0..K-1, or None.
        class_names: K names, or None.
        pre_activation: Whether `activations` are the inputs u of the ReLU right before the head, which itself reads
            max(u, 0).

    Attributes:
        activations: (N, d); the inputs u of that ReLU where ``pre_activation``.
        logits: (N, K).
        labels: (N,) integers in 0..K-1, or None; reads no activations.
        class_names: K names, or None.
        pre_activation: As given.

    Raises:
        TypeError: Activations or logits are not floating, or labels are no integers.
        ValueError: Shapes or devices that do not fit each other, or a label out of range.

    Example:
        >>> acts = Activations(torch.randn(5, 8), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]))
        >>> acts
        Activations(N=5, d=8, K=3, labels=True, dtype=torch.float32, device=cpu)
        >>> len(acts[acts.labels == 0])
        2
    """

    class_names: tuple[str, ...] | None
    _rows: Block
    pre_activation: bool = False  # also of what an older version pickled

    def __init__(
        self,
        activations: Tensor,
        logits: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] | None = None,
        *,
        pre_activation: bool = False,
    ) -> None:
        for name, value in (("activations", activations), ("logits", logits)):
            if not value.is_floating_point():
                raise TypeError(f"{name} are {value.dtype}; they must be floating")
        if activations.ndim != 2 or logits.ndim != 2 or len(activations) != len(logits):
            raise ValueError(
                f"activations have shape {tuple(activations.shape)} and logits {tuple(logits.shape)}; they must be "
                "(N, d) and (N, K)"
            )
        if labels is not None:
            check_labels(labels, logits.shape)
        devices = {value.device for value in (activations, logits, labels) if value is not None}
        if len(devices) > 1:
            raise ValueError(f"activations, logits and labels must be on one device, not {sorted(map(str, devices))}")
        if class_names is not None and len(class_names) != logits.shape[1]:
            raise ValueError(f"there are {len(class_names)} class_names for {logits.shape[1]} classes")
        object.__setattr__(self, "class_names", None if class_names is None else tuple(class_names))
        object.__setattr__(self, "_rows", Memory(activations, logits, labels))
        object.__setattr__(self, "pre_activation", bool(pre_activation))

    @classmethod
    def _of(cls, rows: Block, class_names: tuple[str, ...] | None, pre_activation: bool = False) -> Activations:
        acts = cls.__new__(cls)
        object.__setattr__(acts, "class_names", class_names)
        object.__setattr__(acts, "_rows", rows)
        object.__setattr__(acts, "pre_activation", pre_activation)
        return acts

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Activations:
        """What lies in a folder that `penult.extract` or `save` wrote.

        The index is read, and the shards are looked for; they are not opened. Nothing in the folder is ever executed.

        Args:
            folder: The folder.

        Raises:
            FileNotFoundError: There is no such folder.
            penult.io.FileFormatError: The folder is incomplete (its writer was killed), damaged, of something else or
                of a newer penult.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = Activations(torch.zeros(2, 3), torch.zeros(2, 2)).save(folder)
            ...     Activations.open(folder)
            Activations(N=2, d=3, K=2, labels=False, dtype=torch.float32, device=cpu, shards=1)
        """
        stored = finished(Path(folder))
        return cls._of(one(stored.shards), stored.class_names, stored.pre_activation)

    @classmethod
    def concatenate(cls, parts: Iterable[Activations]) -> Activations:
        """Several sets as one, in their order. What is on disk stays there.

        Args:
            parts: At least one set; all with the same d, K, dtypes, device and class names, all with labels or none,
                all pre-activations or none.

        Raises:
            ValueError: There is no part, or one does not fit the first.

        Example:
            >>> acts = Activations(torch.zeros(2, 3), torch.zeros(2, 2))
            >>> len(Activations.concatenate([acts, acts[:1]]))
            3
        """
        parts = list(parts)
        if not parts:
            raise ValueError("there are no parts to concatenate")
        first = parts[0]
        for number, part in enumerate(parts):
            mine, theirs = _comparable(part), _comparable(first)
            if differing := [name for name in mine if mine[name] != theirs[name]]:
                what = "; ".join(f"{name} is {mine[name]} there and {theirs[name]} in part 0" for name in differing)
                raise ValueError(f"part {number} (counted from 0) cannot be joined to part 0: {what}")
        rows = one([part._rows for part in parts])
        if len(rows.leaves) > 1 and all(isinstance(leaf, Memory) for leaf in rows.leaves):
            rows = load(rows)
        return cls._of(rows, first.class_names, first.pre_activation)

    @property
    def activations(self) -> Tensor:
        return self._rows.read("activations")[0]

    @property
    def logits(self) -> Tensor:
        return self._rows.read("logits")[0]

    @property
    def labels(self) -> Tensor | None:
        return self._rows.read("labels")[0] if self._rows.facts.labels else None

    @property
    def in_features(self) -> int:
        """The dimension d of h; reads nothing."""
        return self._rows.facts.in_features

    @property
    def num_classes(self) -> int:
        """K, the number of classes; reads nothing."""
        return self._rows.facts.num_classes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations; reads nothing."""
        return self._rows.facts.dtype

    @property
    def predicted(self) -> Tensor:
        """The class of the largest logit, (N,); what is on disk is read shard by shard."""
        return torch.cat([leaf.read("logits")[0].argmax(dim=1) for leaf in self._rows.leaves])

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # What a tensor has is asked for where one is wanted, so that the answer is for who gave this in its place.
            raise AttributeError(
                f"Activations has no {name!r}; where a tensor is wanted give acts.activations, (N, d)",
                name=name,
                obj=self,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        facts, shards = self._rows.facts, sum(isinstance(leaf, Shard) for leaf in self._rows.leaves)
        return (
            f"Activations(N={len(self)}, d={facts.in_features}, K={facts.num_classes}, labels={facts.labels}, "
            f"dtype={facts.dtype}, device={facts.device}{', pre_activation=True' * self.pre_activation}"
            f"{f', shards={shards}' if shards else ''})"
        )

    def __getitem__(self, index: Any) -> Activations:  # a slice, indices (M,) or a mask (N,)
        if isinstance(index, int):
            start = index % len(self) if -len(self) <= index < len(self) else index
            raise TypeError(
                f"acts[{index}] would be one row and no set; acts[{start} : {start + 1}] is a set of one, and "
                "acts.batches(size) goes through all"
            )
        if isinstance(self._rows, Memory):
            return self._checked(self._rows[index])
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            return self._like(self._rows.narrow(start, max(start, stop)))
        numbers = torch.arange(len(self))[index]
        if numbers.ndim != 1:
            raise ValueError(f"the index picks rows of shape {tuple(numbers.shape)}; it must be (M,) or a mask (N,)")
        ascending, order = numbers.sort()
        rows = load(self._rows.take(ascending))
        return self._checked(rows if torch.equal(ascending, numbers) else rows[order.argsort()])

    def _checked(self, rows: Memory) -> Activations:
        return Activations(
            rows.activations, rows.logits, rows.labels, self.class_names, pre_activation=self.pre_activation
        )

    def _like(self, rows: Block) -> Activations:
        return self._of(rows, self.class_names, self.pre_activation)

    def batches(self, size: int) -> Iterator[Activations]:
        """The rows in order, some at a time, so that what is on disk need not fit in memory.

        A batch may begin in one shard and end in another. One file is open at a time.

        Args:
            size: Rows in a batch; the last may have fewer.

        Yields:
            Sets in memory, of at most `size` rows.

        Raises:
            ValueError: `size` is less than 1.

        Example:
            >>> acts = Activations(torch.zeros(5, 3), torch.zeros(5, 2))
            >>> [len(part) for part in acts.batches(2)]
            [2, 2, 1]
        """
        if size < 1:
            raise ValueError(f"size is {size}; a batch has at least one row")
        return (self._checked(load(self[start : start + size]._rows)) for start in range(0, len(self), size))

    def split(self, *shares: float, seed: int = 0) -> list[Activations]:
        """Disjoint random parts, each in the order of the set. What is on disk stays there.

        Args:
            shares: Positive shares of the whole, which sum to at most 1.
            seed: Seed of the choice; torch's own random state is left alone.

        Returns:
            One part a share; the last takes what rounding leaves when the shares sum to 1.

        Raises:
            ValueError: If a share is not positive or they sum to more than 1.

        Example:
            >>> acts = Activations(torch.zeros(5, 3), torch.zeros(5, 2))
            >>> fitting, held_out = acts.split(0.8, 0.2)
            >>> len(fitting), len(held_out)
            (4, 1)
        """
        if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(f"shares must be positive and sum to at most 1; got {shares}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        ends = [round(sum(shares[: i + 1]) * len(order)) for i in range(len(shares))]
        return [
            self._like(self._rows.take(order[start:end].sort().values))
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Activations:
        """The same on another device or in another precision, in memory.

        Args:
            device: Where to; a dtype will do here as well.
            dtype: A floating dtype for activations and logits; labels stay integers.

        Example:
            >>> Activations(torch.zeros(2, 3), torch.zeros(2, 2)).to(torch.float64).logits.dtype
            torch.float64
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        rows = load(self._rows)
        labels = None if rows.labels is None else rows.labels.to(device)
        return self._checked(Memory(rows.activations.to(device, dtype), rows.logits.to(device, dtype), labels))

    def save(
        self, folder: str | os.PathLike[str], *, shard_size: int = SHARD_SIZE, overwrite: bool = False
    ) -> Activations:
        """Write the set to a folder, in the format of `penult.extract`.

        The index is written last: a folder whose writer was killed is incomplete, and `open` says so.

        Args:
            folder: A folder that is new or empty; missing ones are made.
            shard_size: Bytes after which a shard ends; what is on disk already is copied shard by shard.
            overwrite: Replace activations that the folder holds. Other files are never touched.

        Returns:
            What `open` gives for the folder.

        Raises:
            FileExistsError: The folder holds activations and `overwrite` is not set, or holds something else.
            RuntimeError: Another process writes to it.
            TypeError: A dtype other than float16, bfloat16, float32 and float64.
            ValueError: The folder holds rows of this very set, or `shard_size` is not positive.

        Example:
            >>> import tempfile
            >>> acts = Activations(torch.zeros(5, 3), torch.zeros(5, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     acts.save(folder, shard_size=50)
            Activations(N=5, d=3, K=2, labels=False, dtype=torch.float32, device=cpu, shards=2)
        """
        folder = Path(folder)
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}; it is a positive number of bytes")
        sources = {leaf.path.parent.resolve() for leaf in self._rows.leaves if isinstance(leaf, Shard)}
        if folder.resolve() in sources:
            raise ValueError(f"{folder} holds rows of this very set; choose another folder")
        facts = self._rows.facts
        with writing(folder, Processes(), overwrite) as place:
            if shards_in(folder):
                raise FileExistsError(
                    f"{folder} holds activations already; choose another folder, or overwrite=True to replace them"
                )
            more = {"class_names": self.class_names, "pre_activation": self.pre_activation}
            writer = Writer(folder, place, unfinished(folder, place), shard_size, **more)
            for part in self.batches(-(-shard_size // facts.row_bytes)) if len(self) else [self]:
                writer.add(load(part._rows))
            write_index(folder, [writer.finish()])
        return self.open(folder)


def _comparable(part: Activations) -> dict[str, Any]:
    return {**vars(part._rows.facts), "class_names": part.class_names, "pre_activation": part.pre_activation}
