"""Activations of a data set, in memory or in a folder."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from penult._checks import (
    as_activations,
    check_integer,
    check_seed,
    check_shares,
    class_names_tuple,
    index_of,
    integer_labels,
    with_remedy,
)
from penult.activations._blocks import Block, Memory, Shard, load, one
from penult.activations._folder import finished, shards_in, unfinished, writing
from penult.activations._writer import SHARD_SIZE, Writer, write_index
from penult.io import _as_json, _user_path
from penult.processes import Processes

__all__ = ["Activations"]


@final
@dataclass(frozen=True, init=False, eq=False, repr=False)
class Activations:
    """Penultimate activations of a data set, with the logits and, where known, the labels.

    A set made from tensors is in memory. A set from `open` or from `penult.extract` to a folder stays on disk: slices
    and the results of `split` and `concatenate` refer to rows of files, and only ``acts.activations``, ``acts.logits``
    and ``acts.labels`` read them.

    - If the rows lie in one shard, these tensors are the file, mapped into memory. Writing to them does not change
      the file.
    - If they lie in several shards, or are selected rows, these tensors are copies, made at each access. Use `batches`
      for sets that do not fit in memory.
    - Files that are written or changed after the set was opened raise a `penult.io.FileFormatError` when they are read.

    A set is indexed by rows: ``acts[slice]``, ``acts[indices]``, ``acts[mask]``. Contiguous slices of a set on disk
    copy nothing, all other indices copy the selected rows. A set is immutable.

    Args:
        activations: (N, d), a tensor or an array of NumPy or of another library, which is not copied.
        logits: (N, K), likewise.
        labels: (N,) integers in 0..K-1 of any integer dtype, or None.
        class_names: K names, or a mapping of class numbers to names such as ``model.config.id2label``, or None.
        pre_activation: Whether `activations` are the inputs u of the ReLU right before the head, so that the head reads
            max(u, 0).
        preprocessing: How the network's inputs were prepared, a mapping of JSON values, see `penult.Head`; or None.

    Attributes:
        activations: (N, d); the inputs u of that ReLU if ``pre_activation``.
        logits: (N, K).
        labels: (N,) int64 in 0..K-1, or None. Reading them reads no activations.
        class_names: K names, or None.
        pre_activation: The argument.
        preprocessing: The argument.

    Raises:
        TypeError: Activations or logits are not floating, labels are not integers, names are not strings, or
            `preprocessing` is no mapping of JSON values.
        ValueError: Shapes or devices do not agree, a label is out of range, or there is not one name for each class.

    Example:
        >>> acts = Activations(torch.randn(5, 8), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]))
        >>> acts
        Activations(N=5, d=8, K=3, labels=True, dtype=torch.float32, device=cpu)
        >>> len(acts[acts.labels == 0])
        2
    """

    class_names: tuple[str, ...] | None
    _rows: Block
    # The defaults also serve objects pickled by versions without these fields.
    pre_activation: bool = False
    preprocessing: dict[str, Any] | None = None

    def __init__(
        self,
        activations: Tensor,
        logits: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] | Mapping[int, str] | Mapping[str, str] | None = None,
        *,
        pre_activation: bool = False,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        activations = as_activations(activations, "activations", "(N, d)")
        logits = as_activations(logits, "logits", "(N, K)", activations.device)
        if activations.ndim != 2 or logits.ndim != 2 or len(activations) != len(logits):
            raise ValueError(
                f"activations has shape {tuple(activations.shape)} and logits {tuple(logits.shape)}; expected (N, d) "
                "and (N, K)"
            )
        if labels is not None:
            labels = integer_labels(labels, logits.shape[:1], logits.shape[1])
        devices = {value.device for value in (activations, logits, labels) if value is not None}
        if len(devices) > 1:
            raise ValueError(
                f"activations, logits and labels are on {' and '.join(sorted(map(str, devices)))}; expected one device"
            )
        names = None if class_names is None else class_names_tuple(class_names, logits.shape[1])
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "_rows", Memory(activations, logits, labels))
        object.__setattr__(self, "pre_activation", bool(pre_activation))
        object.__setattr__(self, "preprocessing", _as_json("preprocessing", preprocessing))

    @classmethod
    def _of(
        cls,
        rows: Block,
        class_names: tuple[str, ...] | None,
        pre_activation: bool = False,
        preprocessing: dict[str, Any] | None = None,
    ) -> Activations:
        acts = cls.__new__(cls)
        object.__setattr__(acts, "class_names", class_names)
        object.__setattr__(acts, "_rows", rows)
        object.__setattr__(acts, "pre_activation", pre_activation)
        object.__setattr__(acts, "preprocessing", preprocessing)
        return acts

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Activations:
        """Open a folder that `penult.extract` or `save` wrote.

        The index is read. The shards must exist and are not opened. Nothing in the folder is ever executed.

        Args:
            folder: Folder.

        Raises:
            FileNotFoundError: There is no such folder.
            penult.io.FileFormatError: The folder is incomplete (its writer was killed) or damaged, or was written by
                another program or a newer penult.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = Activations(torch.zeros(2, 3), torch.zeros(2, 2)).save(folder)
            ...     Activations.open(folder)
            Activations(N=2, d=3, K=2, labels=False, dtype=torch.float32, device=cpu, shards=1)
        """
        stored = finished(_user_path(folder))
        return cls._of(one(stored.shards), stored.class_names, stored.pre_activation, stored.preprocessing)

    @classmethod
    def concatenate(cls, parts: Iterable[Activations]) -> Activations:
        """Join sets in their order. Rows on disk stay there.

        Args:
            parts: At least one set. All have the same d, K, dtypes, device, class names and preprocessing; all or none
                have labels, and all or none are pre-activations.

        Raises:
            ValueError: `parts` is empty, or a part does not have the same properties as the first.

        Example:
            >>> acts = Activations(torch.zeros(2, 3), torch.zeros(2, 2))
            >>> len(Activations.concatenate([acts, acts[:1]]))
            3
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts is empty; expected at least one set")
        first = parts[0]
        expected = _comparable(first)
        for number, part in enumerate(parts):
            properties = _comparable(part)
            if differing := [name for name in expected if properties[name] != expected[name]]:
                differences = "; ".join(
                    f"{name} is {properties[name]} there and {expected[name]} in part 0" for name in differing
                )
                raise ValueError(f"part {number} (counted from 0) cannot be joined to part 0: {differences}")
        rows = one([part._rows for part in parts])
        if len(rows.leaves) > 1 and all(isinstance(leaf, Memory) for leaf in rows.leaves):
            rows = load(rows)
        return first._like(rows)

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
        """Dimension d of the activations; reads nothing."""
        return self._rows.facts.in_features

    @property
    def num_classes(self) -> int:
        """Number of classes K; reads nothing."""
        return self._rows.facts.num_classes

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations; reads nothing."""
        return self._rows.facts.dtype

    @property
    def predicted(self) -> Tensor:
        """Class of the largest logit (N,); a set on disk is read shard by shard."""
        return torch.cat([leaf.read("logits")[0].argmax(dim=1) for leaf in self._rows.leaves])

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Code that expects a tensor asks for attributes of tensors; the message helps whoever passed a set to it.
            raise AttributeError(
                f"Activations has no attribute {name!r}. Where a tensor is expected, pass acts.activations, (N, d)",
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

    def __getitem__(self, index: Any) -> Activations:
        """Rows by a slice, by indices (M,) of any integer dtype, or by a mask (N,) of bool."""
        if (number := _integer(index)) is not None:
            start = number % len(self) if -len(self) <= number < len(self) else number
            raise TypeError(
                f"the index is the integer {number}; expected a slice, indices (M,) or a mask (N,). "
                f"acts[{start} : {start + 1}] is a set of one row, and acts.batches(size) iterates over all rows"
            )
        index = index_of(index)
        if isinstance(self._rows, Memory):
            return self._checked(self._rows[index])
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            return self._like(self._rows.narrow(start, max(start, stop)))
        numbers = torch.arange(len(self), device="cpu")[index]
        if numbers.ndim != 1:
            raise ValueError(
                f"the index selects rows of shape {tuple(numbers.shape)}; expected indices (M,) or a mask (N,)"
            )
        ascending, order = numbers.sort()
        rows = load(self._rows.take(ascending))
        return self._checked(rows if torch.equal(ascending, numbers) else rows[order.argsort()])

    def _checked(self, rows: Memory) -> Activations:
        more: dict[str, Any] = {"pre_activation": self.pre_activation, "preprocessing": self.preprocessing}
        return Activations(rows.activations, rows.logits, rows.labels, self.class_names, **more)

    def _like(self, rows: Block) -> Activations:
        return self._of(rows, self.class_names, self.pre_activation, self.preprocessing)

    def batches(self, size: int) -> Iterator[Activations]:
        """Iterate over the rows in order, in batches that are in memory.

        A batch may begin in one shard and end in another. One file is open at a time.

        Args:
            size: Rows of a batch; the last may have fewer.

        Yields:
            Sets in memory, of at most `size` rows.

        Raises:
            TypeError: `size` is not an integer.
            ValueError: `size` is less than 1.

        Example:
            >>> acts = Activations(torch.zeros(5, 3), torch.zeros(5, 2))
            >>> [len(part) for part in acts.batches(2)]
            [2, 2, 1]
        """
        size = check_integer("size", size)
        return (self._checked(load(self[start : start + size]._rows)) for start in range(0, len(self), size))

    def split(self, *shares: float, seed: int = 0) -> list[Activations]:
        """Split the rows at random into disjoint parts, each in the order of the set. Rows on disk stay there.

        Args:
            shares: Positive fractions of the rows, which sum to at most 1.
            seed: Seed of the split; the global random state of torch is not changed.

        Returns:
            One part for each share. If the shares sum to 1, the parts contain all rows.

        Raises:
            ValueError: A share is not positive, or they sum to more than 1.

        Example:
            >>> acts = Activations(torch.zeros(5, 3), torch.zeros(5, 2))
            >>> fitting, held_out = acts.split(0.8, 0.2)
            >>> len(fitting), len(held_out)
            (4, 1)
        """
        shares = check_shares(shares)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(check_seed(seed)), device="cpu")
        ends = [round(sum(shares[: i + 1]) * len(order)) for i in range(len(shares))]
        return [
            self._like(self._rows.take(order[start:end].sort().values))
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Activations:
        """Return the set in memory, on another device or in another dtype.

        Args:
            device: Device. A dtype may be passed in its place.
            dtype: Floating dtype of activations and logits; labels stay integers.

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

        The index is written last: if the writer is killed, the folder is incomplete and `open` raises an error.

        Args:
            folder: New or empty folder; missing parents are created.
            shard_size: Bytes after which a shard ends; a set on disk is copied shard by shard.
            overwrite: Replace activations in the folder. Other files are never touched.

        Returns:
            The set of the folder, as `open` returns it.

        Raises:
            FileExistsError: The folder contains activations and `overwrite` is False, or contains other files.
            RuntimeError: Another process is writing to it.
            TypeError: A dtype other than float16, bfloat16, float32 and float64.
            ValueError: The folder contains rows of this set, or `shard_size` is not positive.

        Example:
            >>> import tempfile
            >>> acts = Activations(torch.zeros(5, 3), torch.zeros(5, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     acts.save(folder, shard_size=50)
            Activations(N=5, d=3, K=2, labels=False, dtype=torch.float32, device=cpu, shards=2)
        """
        folder = _user_path(folder)
        shard_size = check_integer("shard_size", shard_size)
        sources = {leaf.path.parent.resolve() for leaf in self._rows.leaves if isinstance(leaf, Shard)}
        if folder.resolve() in sources:
            raise ValueError(f"{folder} contains rows of this set; choose another folder")
        facts = self._rows.facts
        with writing(folder, Processes(), overwrite) as own_part:
            if shards_in(folder):
                error = FileExistsError(f"{folder} already contains activations; choose another folder")
                raise with_remedy(error, "overwrite", "replace them")
            more = {name: getattr(self, name) for name in ("class_names", "pre_activation", "preprocessing")}
            writer = Writer(folder, own_part, unfinished(folder, own_part), shard_size, **more)
            for part in self.batches(-(-shard_size // facts.row_bytes)) if len(self) else [self]:
                writer.add(load(part._rows))
            write_index(folder, [writer.finish()])
        return self.open(folder)


def _integer(index: Any) -> int | None:
    """Return an index that is one integer of any kind, such as a tensor (), or None."""
    # Tensors (1,) can be converted, too, but they are indices of rows.
    if getattr(index, "ndim", 0):
        return None
    try:
        return operator.index(index)
    except TypeError:
        return None


def _comparable(part: Activations) -> dict[str, Any]:
    """Properties that sets must share to be joined."""
    names = "class_names", "pre_activation", "preprocessing"
    return {**vars(part._rows.facts), **{name: getattr(part, name) for name in names}}
