"""The classifier as a generator uses it: to see images, and to be left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from penult.activations import Tap
from penult.head import Head, _evaluating, _untouched

__all__ = ["Sight", "frozen", "moving"]

_AT_ONCE = 500


@final
class Sight(nn.Module):
    """A classifier that images in [0, 1] are shown to, or none, which is an error once an image has to be seen.

    It always runs in eval mode, in its own precision. Its flags, buffers, gradients and the random states are left as
    they were; no `train` and no cast reaches it, but a move to another device does.

    Args:
        tap: The classifier, or None.
        preprocess: What brings images in [0, 1] to what it takes.
        head: The head of the pair, which activations are for.

    Raises:
        TypeError: `tap` is no `Tap`, or `preprocess` cannot be called.
        ValueError: The classifier has another head, or not one row of activations an image.
    """

    def __init__(self, tap: Tap | None, preprocess: Callable[[Tensor], Tensor] | None, head: Head) -> None:
        super().__init__()
        if preprocess is not None and not callable(preprocess):
            raise TypeError(f"preprocess is a {type(preprocess).__name__}; it is called with images in [0, 1]")
        if tap is not None:
            if not isinstance(tap, Tap):
                raise TypeError(f"tap is a {type(tap).__name__}, not a penult.Tap; make one: penult.Tap(model, head)")
            if tap.axes != ("batch",):
                raise ValueError(f"the classifier has the axes {tap.axes}; generators need one activation an image")
            if tap.head.weight.shape != head.weight.shape:
                raise ValueError(
                    f"the classifier's head is {tuple(tap.head.weight.shape)}, but the pair's "
                    f"{tuple(head.weight.shape)}: make the pair from this classifier"
                )
        self.tap, self.preprocess = tap, preprocess
        self._features = head.in_features

    def train(self, mode: bool = True) -> Sight:
        """Leave all flags as they are."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sight:
        super()._apply(moving(fn), recurse)
        return self

    @torch.no_grad()
    def activations(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to h (B, d)."""
        self.needed("to see images with")
        with _untouched(self._models()):
            return torch.cat([self._see(part)[0] for part in x.split(_AT_ONCE)])

    @torch.no_grad()
    def answers(self, x: Tensor) -> Tensor:
        """The classes that images (B, C, H, W) are put into, (B,)."""
        self.needed("to reject images by")
        with _untouched(self._models()):
            return torch.cat([self._see(part)[1] for part in x.split(_AT_ONCE)]).argmax(-1)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to h (B, d), with gradients for the images and none for the classifier."""
        self.needed("for feature consistency")
        models = self._models()
        with _evaluating(models), frozen(models):
            return self._see(x)[0]

    def needed(self, why: str) -> Tap:
        """The classifier.

        Raises:
            ValueError: There is none.
        """
        if self.tap is None:
            raise ValueError(
                f"there is no classifier {why}: give a tap, penult.Tap(model, head), when the generator is made or "
                "loaded"
            )
        return self.tap

    def _models(self) -> nn.Module:
        """All that images pass through."""
        assert self.tap is not None
        return nn.ModuleList([part for part in (self.tap.model, self.preprocess) if isinstance(part, nn.Module)])

    def _see(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.tap is not None
        dtype = next((p.dtype for p in self.tap.model.parameters() if p.is_floating_point()), x.dtype)
        wide = x.to(torch.promote_types(dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            h, logits = self.tap((wide if self.preprocess is None else self.preprocess(wide)).to(dtype))
        if h.shape != (len(x), self._features):
            raise ValueError(
                f"the classifier gives activations of shape {tuple(h.shape)} for {len(x)} images; expected "
                f"({len(x)}, {self._features}), one row each"
            )
        return h, logits


def moving(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of a module's tensors without what it does to their precision."""

    def move(tensor: Tensor) -> Tensor:
        done = fn(tensor)
        return done if done.dtype == tensor.dtype else tensor.to(done.device)

    return move


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient from what is computed meanwhile."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
