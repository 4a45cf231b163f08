"""The frozen classifier of a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from penult._checks import described
from penult.activations import Tap, _tap_in
from penult.head import Head, _evaluating, _untouched

__all__ = ["FrozenClassifier", "device_only", "frozen"]

# Images of a batch.
_BATCH = 500


@final
class FrozenClassifier(nn.Module):
    """A classifier of images in [0, 1] that training leaves unchanged. Without a classifier, its methods raise errors.

    It always runs in eval mode, in its own precision. Its flags, buffers, gradients and the random states are restored.
    `train` and casts have no effect on it, but it moves to other devices.

    Args:
        tap: The classifier, or None.
        preprocess: Function from images in [0, 1] to inputs of the classifier.
        head: The head of the pair.

    Raises:
        TypeError: `tap` is not a `Tap`, or `preprocess` cannot be called.
        ValueError: The classifier has a head of another shape, or not one row of activations for each image.
    """

    def __init__(self, tap: Tap | None, preprocess: Callable[[Tensor], Tensor] | None, head: Head) -> None:
        super().__init__()
        if preprocess is not None and not callable(preprocess):
            raise TypeError(f"preprocess is {described(preprocess)}; expected a function of images in [0, 1]")
        if tap is not None:
            inner = _tap_in(tap)
            if inner is None:
                raise TypeError(f"tap is {described(tap)}; expected a penult.Tap. Make one: penult.Tap(model, head)")
            tap = inner
            if tap.axes != ("batch",):
                raise ValueError(f"the classifier has the axes {tap.axes}; expected one row of activations per image")
            if tap.head.weight.shape != head.weight.shape:
                raise ValueError(
                    f"the weight of the classifier's head has shape {tuple(tap.head.weight.shape)}; expected "
                    f"{tuple(head.weight.shape)}, as in the pair: make the pair from this classifier"
                )
        self.tap, self.preprocess = tap, preprocess
        self._features = head.in_features

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Leave all flags unchanged."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenClassifier:
        super()._apply(device_only(fn), recurse)
        return self

    @torch.no_grad()
    def activations(self, x: Tensor) -> Tensor:
        """Return the activations (B, d) of images (B, C, H, W)."""
        self.check_present("for the activations of images")
        with _untouched(self._modules_in_use()):
            return torch.cat([self._run(part)[0] for part in x.split(_BATCH)])

    @torch.no_grad()
    def predictions(self, x: Tensor) -> Tensor:
        """Return the predicted classes (B,) of images (B, C, H, W)."""
        self.check_present("to reject images")
        with _untouched(self._modules_in_use()):
            return torch.cat([self._run(part)[1] for part in x.split(_BATCH)]).argmax(-1)

    def features(self, x: Tensor) -> Tensor:
        """Return the activations (B, d) of images (B, C, H, W), with gradients for the images only."""
        self.check_present("for feature consistency")
        modules = self._modules_in_use()
        with _evaluating(modules), frozen(modules):
            return self._run(x)[0]

    def check_present(self, purpose: str) -> None:
        """Raise a ValueError if there is no classifier."""
        if self.tap is None:
            raise ValueError(
                f"there is no classifier {purpose}: give a tap, penult.Tap(model, head), when the generator is made or "
                "loaded"
            )

    def _modules_in_use(self) -> nn.Module:
        assert self.tap is not None
        return nn.ModuleList([part for part in (self.tap.model, self.preprocess) if isinstance(part, nn.Module)])

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activations and logits of images."""
        assert self.tap is not None
        dtype = next((p.dtype for p in self.tap.model.parameters() if p.is_floating_point()), x.dtype)
        wide = x.to(torch.promote_types(dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            h, logits = self.tap((wide if self.preprocess is None else self.preprocess(wide)).to(dtype))
        if h.shape != (len(x), self._features):
            raise ValueError(
                f"activations of the classifier have shape {tuple(h.shape)} for {len(x)} images; expected "
                f"({len(x)}, {self._features}), one row for each"
            )
        return h, logits


def device_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function of a module's tensors that moves them like `fn` but keeps their dtype."""

    def move(tensor: Tensor) -> Tensor:
        converted = fn(tensor)
        return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

    return move


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Compute without gradients for the parameters of a module."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


# Pickles of version 0.1 have this name.
Sight = FrozenClassifier
