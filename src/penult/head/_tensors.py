"""Tensors of a head, the mean row of W, and their changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from penult._checks import class_names_tuple
from penult._row_blocks import readable, state_of, states_of, wide_mean_row
from penult.head._certificate import HeadCertificate
from penult.io import _as_json
from penult.special import outside_transforms

__all__ = ["HeadTensors"]


class HeadTensors(nn.Module):
    """Buffers W (K, d), b (K,) or None and the mean row (d,), which follows the changes of W."""

    weight: Tensor
    bias: Tensor | None
    mean_row: Tensor
    certificate: HeadCertificate | None
    temperature: float
    # State of W that the mean row belongs to, None in a copy and in older pickles.
    _mean_state: tuple[int, int] | None = None
    # How often a tap has found another W in its model; counted in ``version``.
    _disagreements = 0
    # What is known of classes and inputs; the defaults serve older pickles.
    _class_names: tuple[str, ...] | None = None
    _preprocessing: dict[str, Any] | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """K names of the classes, or None; they are stored with the head.

        Set them to a sequence, or to a mapping of class numbers to names such as ``model.config.id2label``.
        """
        return self._class_names

    @class_names.setter
    def class_names(self, names: Any) -> None:
        self._class_names = None if names is None else class_names_tuple(names, len(self.weight))

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """How the inputs of the network are prepared, as JSON values, or None; it is stored with the head.

        For images that penult read, it has the entries ``inputs`` (``"images"``), ``size`` (height and width),
        ``mode``, ``mean`` and ``std``; for text ``inputs`` (``"text"``), ``tokenizer`` (the SHA-256 of its file) and
        ``max_length``. Commands use the entries, and refuse options that differ.
        """
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, value: Any) -> None:
        self._preprocessing = _as_json("preprocessing", value)

    def _describe_like(self, other: HeadTensors) -> None:
        """Take class names and preprocessing from a head of the same classes."""
        self._class_names, self._preprocessing = other._class_names, other._preprocessing

    def _descriptions(self) -> dict[str, Any]:
        """Return class names and preprocessing as far as they are known, as JSON values."""
        names = None if self._class_names is None else list(self._class_names)
        known = {"class_names": names, "preprocessing": self._preprocessing}
        return {name: value for name, value in known.items() if value is not None}

    def _set_tensors(self, weight: Tensor, bias: Tensor | None) -> None:
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("mean_row", None, persistent=False)
        self._renew_mean_row()
        self._span: tuple[Tensor, tuple[int, int], Tensor] | None = None
        self._sources: list[weakref.ref[Tensor]] = []
        # The last known state of each source, which may be deleted before the head. Pickles hold it by this name.
        self._seen: list[tuple[int, int]] = []

    def _states(self) -> tuple[int, ...]:
        """Return the states of W, b and the tensors that they were computed from, see `state_of`."""
        # A compiler knows no states, and does not trace this context.
        with nullcontext() if torch.compiler.is_compiling() else outside_transforms():
            own_tensors = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
            # No assignment inside of the comprehension, which a compiler does not trace.
            alive = [(i, source()) for i, source in enumerate(self._sources)]
            sources = [(i, tensor) for i, tensor in alive if tensor is not None]
            # A source often shares its memory with W or b, which is then read once.
            states = states_of([*own_tensors, *(tensor for _, tensor in sources)])
            own = states[: len(own_tensors)]
            for (i, _), state in zip(sources, states[len(own) :], strict=True):
                self._seen[i] = state
            self._follow(own[0])
        return (*(number for state in (*own, *self._seen) for number in state), self._disagreements)

    def _follow(self, state: tuple[int, int] | None = None) -> None:
        """Compute the mean row again if W, in a given state, has changed since the last time."""
        if readable(self.weight):
            with outside_transforms():
                state = state_of(self.weight) if state is None else state
                if self._mean_state != state:
                    self._renew_mean_row(state)

    def _renew_mean_row(self, state: tuple[int, int] | None = None) -> None:
        self.mean_row = wide_mean_row(self.weight)
        self._mean_state = state_of(self.weight) if state is None else state

    def _apply(self, fn: Any, recurse: bool = True) -> HeadTensors:
        if self.certificate is not None and self.certificate.folded is not None:
            # Half precision is too coarse for a folded weight.
            fn = _at_least_single(fn)
        super()._apply(fn, recurse)
        # The cached span refers to the old weight, and conversion to half precision would round the mean row.
        self._span = None
        self._renew_mean_row()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not belong to the model, and its tensors count their changes from 0.
        return {**self.__dict__, "_sources": [], "_seen": [], "_mean_state": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._renew_mean_row()


def _at_least_single(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a conversion that keeps floating tensors in at least float32."""

    def converted(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        narrow = new.is_floating_point() and torch.finfo(new.dtype).bits < 32
        return tensor.to(new.device, torch.promote_types(tensor.dtype, torch.float32)) if narrow else new

    return converted
