"""What became of products on the way to the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from penult.head._origin import Key, key_of

__all__ = ["Lineage"]

_SQUASHING = frozenset(
    "softmax softmin sigmoid logsigmoid tanh relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus "
    "softsign hardtanh hardsigmoid hardswish threshold glu sin cos tan atan arctan sinh cosh asinh arcsinh erf exp "
    "expm1 log log1p sqrt rsqrt pow square abs layer_norm rms_norm group_norm instance_norm normalize".split()
)


class Lineage:
    """Follows tensors that came of a product, and remembers a function, not affine, that they went through.

    Where values are small even a soft cap looks affine, so that their numbers alone do not tell.
    """

    def __init__(self) -> None:
        self._squashed_by: dict[Key, str | None] = {}  # of what came of a product

    def function(self, func: Any, operands: Sequence[Key | None], made: Sequence[Tensor], *, product: bool) -> None:
        """A torch function made, or changed in place, some tensors, of operands that had these keys before."""
        known = [self._squashed_by[key] for key in operands if key is not None and key in self._squashed_by]
        if product:
            status = None
        elif not known:
            return
        else:
            name = getattr(func, "__name__", "").strip("_")
            status = next((squash for squash in known if squash is not None), None)
            if name == "log" and status == "softmax":
                status = None  # log-probabilities
            elif status is None and name in _SQUASHING:
                status = name
        for tensor in made:
            key = key_of(tensor)
            if key is not None and (product or key not in operands):
                self._squashed_by[key] = status

    def squashed_by(self, output: Tensor) -> str | None:
        """The function that an output went through after its last product, if it is not affine."""
        key = key_of(output)
        return None if key is None else self._squashed_by.get(key)
