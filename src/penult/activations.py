"""Activations: tap them out of a model, one forward at a time or over a whole loader."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from penult.head import Head
from penult.head._checks import check_labels
from penult.head._model import (
    evaluating,
    first_input,
    is_view,
    linear_at,
    logits_of,
    normalized,
    same_view,
    unwrap,
)

__all__ = ["Activations", "Tap", "extract"]

_LABEL_KEYS = ("labels", "label", "y")


@final
class Tap(nn.Module):
    """A model with its penultimate activations laid open: x -> (h, logits) in one differentiable forward.

    The model runs as it is, in whatever mode it is in; a hook listens at the head for the time of one call
    and is removed again, also when the model raises. For a head with a folded norm layer, h is the
    normalised vector before that layer's affine part, so that ``head(h)`` gives the logits (in training
    mode, dropout between the two makes them differ).

    Args:
        model: The classifier; DataParallel, DistributedDataParallel and torch.compile wrappers are opened,
            because hooks do not work in them.
        head: Its head, from `find_head`. The logits of the tap are the model's own; those of a head at another
            temperature differ from them by that factor.

    Raises:
        ValueError: The head has no certificate, or the model has no linear layer where that says.

    Example:
        >>> from penult.head import find_head
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> tap = Tap(model, find_head(model, x))
        >>> h, logits = tap(x)
        >>> h.shape, torch.allclose(tap.head(h), logits)
        (torch.Size([5, 8]), True)
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        if head.certificate is None:
            raise ValueError(
                "this head has no certificate, so nothing says where it sits in the model: use the head that "
                "penult.find_head(model, batch) gives (a rescaled head reads scaled activations and has none)"
            )
        self.model = unwrap(model)
        self.head = head
        self._linear()

    def _linear(self) -> nn.Linear:
        assert self.head.certificate is not None
        path, shape = self.head.certificate.path, self.head.certificate.shape
        linear = linear_at(self.model, path)
        if (linear.out_features, linear.in_features) != shape:
            raise ValueError(
                f"the model's layer at {path!r} is {(linear.out_features, linear.in_features)}, but the head "
                f"was found as {shape}: it belongs to another model"
            )
        return linear

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes by keyword.

        Returns:
            h (..., d) and the model's logits (..., K), both part of the autograd graph.

        Raises:
            RuntimeError: The head did not run in this forward, or reads no view of the folded norm layer.
            TypeError: The model's output holds no logits.
        """
        certificate = self.head.certificate
        assert certificate is not None
        features: list[Tensor] = []
        norms: list[tuple[Tensor, Tensor]] = []

        def at_norm(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = first_input(args, kwargs)
            assert x is not None
            norms.append((output, normalized(module, x.to(torch.promote_types(x.dtype, torch.float32)))))

        def at_head(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            h = first_input(args, kwargs)
            assert h is not None
            features.append(h.clone() if certificate.folded is None else _unfolded(h, norms))

        with ExitStack() as hooks:
            hooks.callback(self._linear().register_forward_hook(at_head, with_kwargs=True).remove)
            if certificate.norm_path is not None:
                norm = self.model.get_submodule(certificate.norm_path)
                hooks.callback(norm.register_forward_hook(at_norm, with_kwargs=True).remove)
            logits = logits_of(self.model(*args, **kwargs))
        if len(features) <= certificate.call:
            raise RuntimeError(
                f"the head at {certificate.path!r} ran {len(features)} times in this forward, but its call "
                f"number {certificate.call} (from 0) made the logits when the head was found: the model has "
                "taken another path"
            )
        return features[certificate.call], logits

    def _apply(self, fn: Any, recurse: bool = True) -> Tap:
        linear = self._linear()
        shared = self.head.weight.data_ptr() == linear.weight.data_ptr()
        super()._apply(fn, recurse)
        if shared:  # moved apart by now, but W shall take memory once
            self.head.weight = linear.weight.detach()
            self.head.bias = None if linear.bias is None else linear.bias.detach()
        return self


def _unfolded(h: Tensor, norms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What h would be without the norm layer's affine part; `norms` holds its outputs with and without."""
    for output, z in reversed(norms):
        if is_view(h, output):
            return same_view(h, output, z)
    if norms and norms[-1][1].shape == h.shape:
        return norms[-1][1]  # dropout in training mode has made a copy
    raise RuntimeError(
        f"the head reads a tensor of shape {tuple(h.shape)} that is no view of what the folded norm layer "
        "gave; in training mode dropout may stand between: call tap.eval(), or find the head with fold=False"
    )


@final
@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """Penultimate activations of a data set, with the logits and, where known, the labels.

    Attributes:
        activations: (N, d).
        logits: (N, K).
        labels: (N,) integers in 0..K-1, or None.
        class_names: K names, or None.

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

    activations: Tensor
    logits: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        h, logits = self.activations, self.logits
        for name, value in (("activations", h), ("logits", logits)):
            if not value.is_floating_point():
                raise TypeError(f"{name} are {value.dtype}; they must be floating")
        if h.ndim != 2 or logits.ndim != 2 or len(h) != len(logits):
            raise ValueError(
                f"activations have shape {tuple(h.shape)} and logits {tuple(logits.shape)}; they must be "
                "(N, d) and (N, K)"
            )
        if self.labels is not None:
            check_labels(self.labels, logits.shape)
        devices = {value.device for value in (h, logits, self.labels) if value is not None}
        if len(devices) > 1:
            raise ValueError(f"activations, logits and labels must be on one device, not {sorted(map(str, devices))}")
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
            if len(self.class_names) != logits.shape[1]:
                raise ValueError(f"there are {len(self.class_names)} class_names for {logits.shape[1]} classes")

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, index: Any) -> Activations:  # a slice, indices (M,) or a mask (N,)
        if isinstance(index, int):
            raise TypeError(f"acts[{index}] would be no set; use acts[{index} : {index + 1}]")
        labels = None if self.labels is None else self.labels[index]
        return Activations(self.activations[index], self.logits[index], labels, self.class_names)

    def __repr__(self) -> str:
        (count, features), classes = self.activations.shape, self.logits.shape[1]
        return (
            f"Activations(N={count}, d={features}, K={classes}, labels={self.labels is not None}, "
            f"dtype={self.activations.dtype}, device={self.activations.device})"
        )

    @property
    def predicted(self) -> Tensor:
        """The class of the largest logit, (N,)."""
        return self.logits.argmax(dim=1)

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Activations:
        """The same on another device or in another precision.

        Args:
            device: Where to; a dtype will do here as well.
            dtype: A floating dtype for activations and logits; labels stay integers.

        Example:
            >>> Activations(torch.zeros(2, 3), torch.zeros(2, 2)).to(torch.float64).logits.dtype
            torch.float64
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        labels = None if self.labels is None else self.labels.to(device)
        return Activations(self.activations.to(device, dtype), self.logits.to(device, dtype), labels, self.class_names)


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
