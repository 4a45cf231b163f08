"""A whole loader through a tap."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from penult.activations._activations import Activations
from penult.activations._tap import Tap
from penult.head._checks import check_labels
from penult.head._model import evaluating

__all__ = ["extract"]

_LABEL_KEYS = ("labels", "label", "y")


def extract(
    tap: Tap,
    loader: Iterable[Any],
    *,
    device: str | torch.device | None = None,
    progress: Callable[[int, int | None], object] | None = None,
) -> Activations:
    """Run a whole loader through a tap, in eval mode and without gradients.

    A batch may be

    - a tensor: what the model takes;
    - a tuple or list: what the model takes, and the labels if there is a second entry (None for no labels);
      further entries are left out;
    - a mapping: the labels are under ``"labels"``, ``"label"`` or ``"y"``, if any; of the rest, what is no
      tensor is left out. One tensor goes to the model by position, several go by keyword.

    Models that give logits (B, T, K) for tokens are read as B * T samples, with labels (B, T).

    Args:
        tap: The model with its head.
        loader: Batches; a DataLoader or any iterable. They are moved to the model's device.
        device: Where to gather; None means the CPU.
        progress: Called after each batch with the number of batches done and their total (None if unknown).

    Returns:
        All activations and logits, and all labels if the batches have them.

    Raises:
        TypeError: A batch of another kind, or labels that are no integers.
        ValueError: No batch at all, labels in some batches only, of a wrong shape or out of range.

    Example:
        >>> from penult.head import find_head
        >>> model = nn.Linear(4, 3)
        >>> batches = [(torch.randn(2, 4), torch.tensor([0, 2])), (torch.randn(1, 4), torch.tensor([1]))]
        >>> extract(Tap(model, find_head(model, torch.randn(2, 4))), batches).labels
        tensor([0, 2, 1])
    """
    there = next(chain(tap.model.parameters(), tap.model.buffers()), tap.head.weight).device
    here = torch.device("cpu" if device is None else device)
    total = operator.length_hint(loader, -1)
    features: list[Tensor] = []
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    count = 0
    with evaluating(tap), torch.no_grad():
        for done, batch in enumerate(loader, start=1):
            args, kwargs, labels = _parts(batch)
            if done > 1 and (labels is None) != (not targets):
                what = "no labels, but those before it have" if labels is None else "labels, but none before it"
                raise ValueError(f"batch {done - 1} (counted from 0) has {what}")
            h, logits = tap(*(x.to(there) for x in args), **{name: x.to(there) for name, x in kwargs.items()})
            if labels is not None:
                check_labels(labels, logits.shape, offset=count)
                targets.append(labels.flatten().to(here, torch.int64))
            features.append(h.flatten(end_dim=-2).to(here))
            outputs.append(logits.flatten(end_dim=-2).to(here))
            count += len(outputs[-1])
            if progress is not None:
                progress(done, total if total >= 0 else None)
    if not features:
        raise ValueError("the loader gave no batch at all; is the data set empty, or a generator used up?")
    return Activations(torch.cat(features), torch.cat(outputs), torch.cat(targets) if targets else None)


def _parts(batch: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor | None]:
    """What the model takes by position and by keyword, and the labels."""
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return (batch[0],), {}, batch[1] if len(batch) > 1 else None
    if isinstance(batch, Mapping):
        label = next((key for key in _LABEL_KEYS if key in batch), None)
        inputs = {key: value for key, value in batch.items() if key != label and isinstance(value, Tensor)}
        labels = None if label is None else batch[label]
        if len(inputs) == 1:
            return tuple(inputs.values()), {}, labels
        if inputs:
            return (), inputs, labels
    what = f"{type(batch).__name__}"
    if isinstance(batch, Mapping):
        what += f" with keys {list(batch)}, of which none holds an input tensor"
    elif isinstance(batch, tuple | list) and batch:
        what += f" that begins with a {type(batch[0]).__name__}"
    raise TypeError(f"a batch is a {what}; it must be a tensor, (tensor, labels), or a dict of tensors and labels")
