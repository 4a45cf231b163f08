"""What a loader gives, and the rows of activations that come of it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from penult._checks import check_labels
from penult.activations._blocks import Memory
from penult.activations._tap import Tap
from penult.processes import Processes

__all__ = ["Reader", "share_of"]

_LABEL_KEYS = ("labels", "label", "y")
_IGNORED = -100  # as in torch.nn.functional.cross_entropy


class _Parts(NamedTuple):
    """A batch."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Any = None
    mask: Tensor | None = None
    ids: Tensor | None = None


class Reader:
    """Runs batches through a tap, one after the other.

    Args:
        tap: The model with its head.
        dtype: What activations and logits become, or None for what they are.
        target: Where the rows go.
        pre_activation: Whether activations are what the ReLU before the head reads.
    """

    def __init__(
        self, tap: Tap, dtype: torch.dtype | None, target: torch.device, *, pre_activation: bool = False
    ) -> None:
        self._tap, self._dtype, self._target, self._pre_activation = tap, dtype, target, pre_activation
        self._device = next(chain(tap.model.parameters(), tap.model.buffers()), tap.head.weight).device
        self._batches = self._seen = 0
        self._labelled = self._checked = False

    def skip(self, batch: Any) -> None:
        """Count a batch whose rows are known."""
        labels = self._next(batch).labels
        self._seen += labels.numel() if isinstance(labels, Tensor) else 0

    def rows(self, batch: Any) -> Memory:
        """The rows of a batch."""
        parts = self._next(batch)
        # Not in inference mode: what the model keeps of this forward could not be trained on afterwards.
        with torch.inference_mode(False), torch.no_grad():
            args = [x.to(self._device) for x in parts.args]
            run = self._tap.pre_activation if self._pre_activation else self._tap
            h, logits = run(*args, **{name: x.to(self._device) for name, x in parts.kwargs.items()})
            self._check_head(h.clamp(min=0) if self._pre_activation else h, logits)
            labels, keep = self._wanted(parts, logits.shape)
            h, logits = h.flatten(end_dim=-2), logits.flatten(end_dim=-2)
            if not keep.all():
                labels = None if labels is None else labels[keep]
                h, logits = (x[keep.to(x.device)] for x in (h, logits))
            h, logits = _cast("activations", h, self._dtype), _cast("logits", logits, self._dtype)
            return Memory(self._own(h), self._own(logits), None if labels is None else self._own(labels))

    def _check_head(self, h: Tensor, logits: Tensor) -> None:
        """Raise, at the first batch, unless the head gives the model's softmax."""
        if self._checked or not h.numel():
            return
        head, self._checked = self._tap.head, True
        wide = torch.promote_types(logits.dtype, torch.float32)
        theirs = (logits.to(wide) / head.temperature).softmax(-1)
        off = (head(h.to(head.weight.dtype)).to(wide).softmax(-1) - theirs).abs()
        error = float(off[off.isfinite()].max()) if off.isfinite().any() else 0.0
        if error > max(1e-2, 8 * torch.finfo(logits.dtype).eps):
            raise ValueError(
                f"the head does not make the model's logits: their softmaxes differ by up to {error:.2g}. The model "
                "may have been trained or loaded since the head was found, or be another one: find the head again"
            )

    def _own(self, x: Tensor) -> Tensor:
        """A copy: the model's tensor may be a part of a much larger one, or one that it writes to again."""
        return x.to(self._target, copy=True)

    def _next(self, batch: Any) -> _Parts:
        parts = _parts(batch)
        labelled = parts.labels is not None
        if self._batches and labelled != self._labelled:
            what = "labels, but none before it" if labelled else "no labels, but those before it have"
            raise ValueError(f"batch {self._batches} (counted from 0) has {what}")
        self._batches, self._labelled = self._batches + 1, labelled
        return parts

    def _wanted(self, parts: _Parts, shape: torch.Size) -> tuple[Tensor | None, Tensor]:
        """The labels (M,) and which rows to keep (M,), on the CPU."""
        keep = torch.ones(shape[:-1], dtype=torch.bool)
        if parts.mask is not None and parts.mask.shape == keep.shape:
            keep = parts.mask.cpu() != 0
        labels = parts.labels
        if labels is None:
            return None, keep.flatten()
        check_labels(torch.zeros_like(labels) if isinstance(labels, Tensor) else labels, shape)
        labels = labels.to("cpu", torch.int64)
        counted = labels != _IGNORED
        if parts.ids is not None and counted.any() and _same(labels, parts.ids, counted):
            raise ValueError(
                "the labels of the batch are its input_ids, the convention of language models that shift them "
                "themselves; penult takes the class that each position predicts: labels shifted by one with -100 at "
                "the end, torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], dim=1)"
            )
        keep = keep & counted
        check_labels(labels.masked_fill(~keep, 0), shape, offset=self._seen)
        self._seen += labels.numel()
        return labels.flatten(), keep.flatten()


def _same(labels: Tensor, ids: Tensor, where: Tensor) -> bool:
    return ids.shape == labels.shape and torch.equal(labels[where], ids.to(labels)[where])


def _cast(name: str, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In another dtype, unless a value would become infinite."""
    if dtype is None or x.dtype == dtype:
        return x
    cast = x.to(dtype)
    lost = cast.isinf() & x.isfinite()
    if lost.any():
        raise ValueError(
            f"{name} hold {float(x[lost][0]):.6g}, but the largest {dtype} is {torch.finfo(dtype).max:.6g}; use "
            f"dtype={torch.bfloat16 if dtype == torch.float16 else x.dtype}"
        )
    return cast


def _parts(batch: Any) -> _Parts:
    """What the model takes by position and by keyword, the labels, and what says which rows count."""
    if isinstance(batch, Tensor):
        return _Parts((batch,), {})
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return _Parts((batch[0],), {}, batch[1] if len(batch) > 1 else None)
    if isinstance(batch, Mapping):
        label = next((key for key in _LABEL_KEYS if key in batch), None)
        inputs = {key: value for key, value in batch.items() if key != label and isinstance(value, Tensor)}
        facts = None if label is None else batch[label], inputs.get("attention_mask"), inputs.get("input_ids")
        if len(inputs) == 1:
            return _Parts(tuple(inputs.values()), {}, *facts)
        if inputs:
            return _Parts((), inputs, *facts)
    what = f"{type(batch).__name__}"
    if isinstance(batch, Mapping):
        what += f" with keys {list(batch)}, of which none holds an input tensor"
    elif isinstance(batch, tuple | list) and batch:
        what += f" that begins with a {type(batch[0]).__name__}"
    raise TypeError(f"a batch is a {what}; it must be a tensor, (tensor, labels), or a dict of tensors and labels")


# --- The part of a loader that is one process's own ---------------------------------------------------------


def share_of(loader: Iterable[Any], processes: Processes) -> tuple[int, Iterable[Any]]:
    """The number of a process's first batch, and its batches.

    Raises:
        TypeError: Processes share the work, and the loader does not say how many batches it has.
        ValueError: Its order is not the same in all of them, or it is a part of the data already.
    """
    if processes.count == 1:
        return 0, loader
    total = operator.length_hint(loader, -1)
    if total < 0:
        raise TypeError(
            f"the loader, a {type(loader).__name__}, does not say how many batches it has, so processes cannot share "
            "them: give a DataLoader of a data set with a length, or a list"
        )
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler | DistributedSampler):
        raise ValueError(
            f"the loader has a {type(sampler).__name__}, so that its batches are not the same in all processes; give "
            "each process the whole loader with shuffle=False, which is then shared out"
        )
    own = processes.share(total)
    return own.start, _narrow(loader, own.start, own.stop)


def _narrow(loader: Iterable[Any], start: int, stop: int) -> Iterable[Any]:
    """Batches start to stop; a DataLoader loads no others."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return _Part(loader, start, stop)
    part = copy.copy(loader)  # of whatever class, with all that it was given
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    vars(part)[name] = _Part(getattr(loader, name), start, stop)  # DataLoader forbids to set it
    vars(part)["_iterator"] = None  # of persistent workers
    return part


class _Part:
    """Items start to stop of what can be iterated."""

    def __init__(self, whole: Iterable[Any], start: int, stop: int) -> None:
        self._whole, self._start, self._stop = whole, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._whole), self._start, self._stop)
