"""Tensors derived from a head and a base: computed once, outside of compiled graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from penult._row_blocks import readable, same_values, state_of
from penult.special import outside_transforms

if TYPE_CHECKING:
    from penult.bases import Base
    from penult.head import Head

__all__ = ["DerivedTensors"]

# Prefix of the attributes that compiled code reads: each tensor is an attribute, so that it is an input of the graph.
_PREFIX = "_table_"


class DerivedTensors(nn.Module):
    """Module with a head and a base, which caches tensors that are computed from both.

    A derived tensor is computed at its first use and again after a buffer of the base was replaced or changed.
    The head must not change: `_check_current` raises once its weights did. Changes are seen by version counters, by a
    digest of at most 4096 values of each tensor and, where a tensor of the head was replaced, by all values. A move to
    another device or dtype, a state dict that is loaded, a copy and a pickle all forget the derived tensors.

    Under ``torch.compile`` they are computed while the graph is traced and become inputs of the graph. Inside of
    ``torch.func`` transforms they are computed outside of the transform, unless it replaced buffers of head or base.

    A subclass sets ``head`` and ``base``, then calls `_remember`.
    """

    head: Head
    base: Base

    def derived(self, name: str, make: Callable[[Any], Tensor]) -> Tensor:
        """Return a tensor that is derived from head and base; it is computed again only after these changed.

        A compiled graph reads the tensor that was computed last. It does not see a change of the base until code that
        is not compiled asks for the tensor again.

        Args:
            name: Name of the tensor, unique in this pair.
            make: Function that computes the tensor from this pair. For torch.compile it must belong to a module or a
                class.

        Raises:
            RuntimeError: The head's weights changed after the pair was made.
        """
        self._check_current()
        if torch.compiler.is_compiling():
            self._compute_while_tracing(name, make)
            tensor: Tensor = getattr(self, _attribute(name))
            return tensor
        return self._computed_once(name, make)

    def _compute(self, make: Callable[[Any], Tensor]) -> Tensor:
        """Compute a derived tensor; a subclass sets the precision here and leaves transforms of torch.func."""
        return make(self)

    def _computed_once(self, name: str, make: Callable[[Any], Tensor]) -> Tensor:
        buffers = list(self.base.buffers())
        if any(torch._C._functorch.is_functorch_wrapped_tensor(b) for b in (*buffers, *self.head.buffers())):
            # A transform replaced these buffers for the time of one call, so the result is not kept.
            return make(self)
        with outside_transforms():
            states = [state_of(b) for b in buffers]
        entry = self._derived.get(name)
        if entry is None or not _unchanged(entry[0], buffers, states):
            with torch.no_grad():
                tensor = self._compute(make)
            # The buffers themselves are kept, since the id of one that is gone may be given to another.
            entry = self._derived[name] = list(zip(buffers, states, strict=True)), tensor
            setattr(self, _attribute(name), tensor)
        return entry[1]

    def _compute_while_tracing(self, name: str, make: Callable[[Any], Tensor]) -> None:
        """Compute a derived tensor unless it is cached; torch.compile runs this and does not trace it."""
        self._computed_once(name, make)

    # The public torch.compiler.assume_constant_result sets the same flag, but imports torch._dynamo.
    _compute_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # --- changes of head and base ---------------------------------------------------------------------------

    def _remember(self) -> None:
        """Record the present version of the head, and forget all derived tensors."""
        self._head_version: tuple[int, ...] | None = self.head.version
        self._head_tensors = [tensor for tensor in (self.head.weight, self.head.bias) if tensor is not None]
        self._forget()

    def _forget(self) -> None:
        self._derived: dict[str, tuple[list[tuple[Tensor, tuple[int, int]]], Tensor]] = {}
        for name in [name for name in self.__dict__ if name.startswith(_PREFIX)]:
            delattr(self, name)

    def _check_current(self) -> None:
        """Raise a RuntimeError if the head's weights changed since `_remember`.

        Compiled code and a call in which a transform replaced the weights do not check.
        """
        if not readable(self.head.weight):
            return
        if self._head_version is None:
            self._remember()
        elif self.head.version != self._head_version or not self._same_tensors():
            raise RuntimeError(
                "the head's weights changed after this pair was made, so its prior and densities no longer belong to "
                "them. Make a new GenerativePair (and fit its base again if it was fitted), or build the pair on "
                "head.clone() to keep the old weights"
            )

    def _same_tensors(self) -> bool:
        """Whether W and b are those of `_remember`, or others with the same values, as after a move of the model."""
        tensors = [tensor for tensor in (self.head.weight, self.head.bias) if tensor is not None]
        if len(tensors) != len(self._head_tensors):
            return False
        if not all(map(operator.is_, tensors, self._head_tensors)):
            with outside_transforms():
                if not all(map(same_values, tensors, self._head_tensors)):
                    return False
            self._head_tensors = tensors
        return True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Tensors of a copy count their changes from 0, so the head's version is read at the first use.
        self._head_version = None
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> DerivedTensors:
        self._check_current()
        super()._apply(fn, recurse)
        self._remember()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Head and base are loaded after this, so the head's version is read at the first use.
        self._head_version = None
        self._forget()


def _attribute(name: str) -> str:
    return _PREFIX + name.replace(" ", "_")


def _unchanged(
    seen: list[tuple[Tensor, tuple[int, int]]], buffers: list[Tensor], states: list[tuple[int, int]]
) -> bool:
    """Whether the buffers are the tensors recorded earlier, in the same states.

    Inference tensors have no version counter (-1), so they never match.
    """
    if len(seen) != len(buffers):
        return False
    pairs = zip(seen, buffers, states, strict=True)
    return all(b is old and state == old_state and state[0] >= 0 for (old, old_state), b, state in pairs)
