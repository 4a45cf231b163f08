"""Batches of a loader: their inputs and labels, their activations, and the batches that each process reads."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from penult._checks import check_labels, described
from penult.activations._activations import Activations
from penult.activations._blocks import Memory
from penult.activations._fields import IGNORED, FieldReader, Fields, check_mask, check_not_row_numbers, labels_among
from penult.activations._tap import Tap
from penult.processes import Processes

__all__ = ["Reader", "check_loader", "length_of", "share_of"]


class Reader:
    """Reader that runs batches through a tap, one after the other.

    Args:
        tap: The model with its head.
        dtype: Dtype of activations and logits, or None for that of the model.
        target: Device of the rows.
        pre_activation: Whether to return the inputs of the ReLU before the head as activations.
    """

    def __init__(
        self, tap: Tap, dtype: torch.dtype | None, target: torch.device, *, pre_activation: bool = False
    ) -> None:
        self._tap, self._dtype, self._target, self._pre_activation = tap, dtype, target, pre_activation
        self._device = next(chain(tap.model.parameters(), tap.model.buffers()), tap.head.weight).device
        self._fields = FieldReader(tap.model)
        self._batches = self._seen = 0
        self._labelled = self._checked = False
        # Which entry of a tuple holds the labels, where that has to be found out.
        self._label_entry: int | None = None

    def skip(self, batch: Any) -> None:
        """Count a batch without running the model."""
        labels = self._next(batch).labels
        self._seen += labels.numel() if isinstance(labels, Tensor) else 0

    def rows(self, batch: Any) -> Memory:
        """Run the model on a batch and return its rows."""
        parts = self._next(batch)
        # Inference mode is off, since tensors that the model stores in this forward could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            args = [x.to(self._device) for x in parts.args]
            run = self._tap.pre_activation if self._pre_activation else self._tap
            h, logits = run(*args, **{name: x.to(self._device) for name, x in parts.kwargs.items()})
            if logits.ndim != len(self._tap.axes) + 1:
                raise ValueError(
                    f"the logits of batch {self._batches - 1} (counted from 0) have shape {tuple(logits.shape)}; "
                    f"expected ({', '.join(self._tap.axes)}, class), as when the head was found. A sample without a "
                    "batch axis gives such logits: pass torch.utils.data.DataLoader(dataset, batch_size=64)"
                )
            self._check_head(h.clamp(min=0) if self._pre_activation else h, logits)
            labels, keep = self._wanted(parts, logits)
            h, logits = h.flatten(end_dim=-2), logits.flatten(end_dim=-2)
            if not keep.all():
                labels = None if labels is None else labels[keep]
                h, logits = (x[keep.to(x.device)] for x in (h, logits))
            h, logits = _cast("activations", h, self._dtype), _cast("logits", logits, self._dtype)
            return Memory(self._own(h), self._own(logits), None if labels is None else self._own(labels))

    def _check_head(self, h: Tensor, logits: Tensor) -> None:
        """Raise a ValueError unless the head reproduces the model's softmax; only the first batch is checked."""
        if self._checked or not h.numel():
            return
        head, self._checked = self._tap.head, True
        wide = torch.promote_types(logits.dtype, torch.float32)
        expected = (logits.to(wide) / head.temperature).softmax(-1)
        errors = (head(h.to(head.weight.dtype)).to(wide).softmax(-1) - expected).abs()
        error = float(errors[errors.isfinite()].max()) if errors.isfinite().any() else 0.0
        if error > max(1e-2, 8 * torch.finfo(logits.dtype).eps):
            raise ValueError(
                f"the head does not give the model's logits: their softmaxes differ by up to {error:.2g}. The model "
                "may have been trained or loaded since the head was found, or be another model. Find the head again"
            )

    def _own(self, x: Tensor) -> Tensor:
        """Copy a tensor of the model, which may be a part of a much larger one or be overwritten later."""
        return x.to(self._target, copy=True)

    def _next(self, batch: Any) -> Fields:
        parts = self._fields(batch)
        labelled = parts.labels is not None
        if self._batches and labelled != self._labelled:
            difference = "labels, but none before it" if labelled else "no labels, but those before it have"
            raise ValueError(f"batch {self._batches} (counted from 0) has {difference}")
        self._batches, self._labelled = self._batches + 1, labelled
        return parts

    def _labels(self, parts: Fields, logits: Tensor) -> Any:
        """Return the labels of a batch, of which several entries may be the labels."""
        if self._label_entry is None:
            if not parts.choices:
                return parts.labels
            self._label_entry = labels_among(parts.choices, logits)
        if self._label_entry not in parts.choices:
            raise ValueError(
                f"batch {self._batches - 1} (counted from 0) has no integers in entry {self._label_entry}; expected "
                "labels there, as in the batches before it"
            )
        return parts.choices[self._label_entry]

    def _wanted(self, parts: Fields, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the labels (M,) and a mask of the rows to keep (M,), on the CPU."""
        shape = logits.shape
        keep = torch.ones(shape[:-1], dtype=torch.bool, device="cpu")
        if parts.mask is not None and parts.mask.shape == keep.shape:
            keep = parts.mask.cpu() != 0
        labels = self._labels(parts, logits)
        if labels is None:
            if parts.mask is not None:
                check_mask(parts.mask, shape)
            return None, keep.flatten()
        check_labels(torch.zeros_like(labels) if isinstance(labels, Tensor) else labels, shape)
        labels = labels.to("cpu", torch.int64)
        has_class = labels != IGNORED
        if parts.ids is not None and has_class.any() and _agree(labels, parts.ids, has_class):
            raise ValueError(
                "labels are the input_ids of the batch, as for language models that shift labels by themselves; "
                "expected the class that each position predicts: labels shifted by one with -100 at the end, "
                "torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], dim=1)"
            )
        keep = keep & has_class
        remedy = f"Samples to leave out have the label {IGNORED}"
        check_labels(labels.masked_fill(~keep, 0), shape, offset=self._seen, remedy=remedy)
        if not self._seen:
            check_not_row_numbers(labels.flatten(), logits)
        self._seen += labels.numel()
        return labels.flatten(), keep.flatten()


def _agree(labels: Tensor, ids: Tensor, where: Tensor) -> bool:
    return ids.shape == labels.shape and torch.equal(labels[where], ids.to(labels)[where])


def _cast(name: str, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert to another dtype; raise a ValueError if a finite value would become infinite."""
    if dtype is None or x.dtype == dtype:
        return x
    cast = x.to(dtype)
    overflow = cast.isinf() & x.isfinite()
    if overflow.any():
        raise ValueError(
            f"{name} holds {float(x[overflow][0]):.6g}, but the largest {dtype} is {torch.finfo(dtype).max:.6g}. Use "
            f"dtype={torch.bfloat16 if dtype == torch.float16 else x.dtype}"
        )
    return cast


def check_loader(loader: Any) -> None:
    """Raise a TypeError for a data set, one batch, or something else that gives no batches."""
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"loader is {described(loader)}, a data set, whose items are samples; expected an iterable of batches. "
            "Pass torch.utils.data.DataLoader(dataset, batch_size=64), or batch_size=None if its items are batches"
        )
    tensors = [x for x in loader if isinstance(x, Tensor)] if isinstance(loader, tuple | list) else []
    # The batches of a loader have one dtype; inputs and labels have two.
    pair = len(tensors) > 1 and len({x.is_floating_point() for x in tensors}) > 1
    if pair or isinstance(loader, Tensor | Mapping | str | bytes | Activations) or hasattr(loader, "__array__"):
        kind = "one batch" if pair or isinstance(loader, Mapping) else described(loader)
        raise TypeError(
            f"loader is {kind}; expected an iterable of batches. Pass [batch], or for inputs that are too many for one "
            "batch torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs), batch_size=64)"
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"loader is {described(loader)}; expected an iterable of batches, such as a torch.utils.data.DataLoader"
        )


# --- The share of a process ---------------------------------------------------------------------------------


def share_of(loader: Iterable[Any], processes: Processes) -> tuple[int, Iterable[Any]]:
    """Return the index of the first batch that this process reads, and the batches that it reads.

    Raises:
        TypeError: Several processes share the work, and the loader has no length.
        ValueError: The order of the loader differs between processes, or the loader reads only a part of the data.
    """
    if processes.count == 1:
        return 0, loader
    total = length_of(loader)
    if total is None:
        raise TypeError(
            f"loader is a {type(loader).__name__} without a length, so processes cannot share its batches; expected a "
            "DataLoader of a data set with a length, or a list"
        )
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler | DistributedSampler):
        raise ValueError(
            f"loader has a {type(sampler).__name__}, so its batches differ between processes; expected the same loader "
            "in each process, with shuffle=False. The processes then share its batches"
        )
    own = processes.share(total)
    return own.start, _narrow(loader, own.start, own.stop)


def length_of(loader: Iterable[Any]) -> int | None:
    """Return the number of batches of a loader, or None if it does not know it."""
    try:
        length = operator.length_hint(loader, -1)
    except (NotImplementedError, AttributeError):
        # Streams raise these where they have no length; torch advises NotImplementedError for samplers.
        return None
    return length if length >= 0 else None


def _narrow(loader: Iterable[Any], start: int, stop: int) -> Iterable[Any]:
    """Return batches start to stop; a DataLoader does not load the others."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return _Part(loader, start, stop)
    # A copy keeps the class and all options of the loader.
    part = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    # DataLoader.__setattr__ refuses to set a sampler.
    vars(part)[name] = _Part(getattr(loader, name), start, stop)
    # The iterator of persistent workers belongs to the original loader.
    vars(part)["_iterator"] = None
    return part


class _Part:
    """Items start to stop of an iterable."""

    def __init__(self, whole: Iterable[Any], start: int, stop: int) -> None:
        self._whole, self._start, self._stop = whole, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._whole), self._start, self._stop)
