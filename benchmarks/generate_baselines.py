"""The usual conditional variational autoencoder on one-hot labels, and the training and filtering of all generators.

The networks are those of `penult.generate.ActivationVAE`, slightly wider, so that no baseline has fewer parameters:
their condition is a label of ten numbers instead of an activation of 64.

Example:
    >>> from generate_baselines import OneHotVAE, fit
    >>> width = matched((1, 28, 28), features=64, classes=10)
    >>> vae, seconds = fit(lambda: OneHotVAE((1, 28, 28), 10, width), images, labels, steps=1500, seed=0)
    >>> vae.generate(torch.arange(10), torch.Generator().manual_seed(0))
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from penult.generate._networks import MLPDecoder, MLPEncoder

__all__ = ["OneHotVAE", "confident", "fit", "matched", "parameters"]

BATCH = 100
LATENT = 16
RATE = 1e-3
GAIN = 2.0  # chosen among several by the selection pictures
ROUNDS = {1: 400, 3: 0}  # tries for a picture that a classifier is sure of, by channels: ResNets are too slow


@final
class OneHotVAE(LightningModule):
    """p(x|z, y) with one-hot y, trained by the evidence lower bound; unconditional with ``classes=0``.

    The label enters in deviations from its mean, as activations do, times a gain. That matters: with plain zeros and
    ones the code carries the class, and the decoder half ignores the label.

    Args:
        image_shape: (C, H, W).
        classes: K, or 0.
        width: Units of a hidden layer.
        latent: Numbers of a code.
        gain: How loud the label is, in deviations; None for plain zeros and ones.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        width: int,
        latent: int = LATENT,
        gain: float | None = GAIN,
    ) -> None:
        super().__init__()
        self.classes, self.latent, self.gain = classes, latent, gain
        self.encoder = MLPEncoder(image_shape, classes, latent, width)
        self.decoder = MLPDecoder(image_shape, classes, latent, width)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of pixels and divergence, in nats a picture."""
        images, labels = batch
        condition = self._condition(labels)
        mean, log_variance = self.encoder(images, condition).chunk(2, dim=1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        pixels = self.decoder(z, condition)
        reconstruction = F.binary_cross_entropy_with_logits(pixels, images, reduction="none").flatten(1).sum(1).mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return reconstruction + divergence

    def configure_optimizers(self) -> Any:
        """Adam, its rate falling to zero over the second half."""
        optimizer = torch.optim.Adam(self.parameters(), lr=RATE)
        steps = self.trainer.estimated_stepping_batches
        fall = LambdaLR(optimizer, lambda step: min(1.0, max(0.0, 2 - 2 * step / steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": fall, "interval": "step"}}

    @torch.no_grad()
    def generate(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures (N, C, H, W) of labels (N,)."""
        z = torch.randn(len(y), self.latent, generator=generator)
        return self.decoder(z, self._condition(y)).sigmoid()

    def _condition(self, y: Tensor) -> Tensor:
        if not self.classes:
            return torch.empty(len(y), 0)
        plain = F.one_hot(y, self.classes).float()
        if self.gain is None:
            return plain
        share = 1 / self.classes
        return self.gain * (plain - share) / (share * (1 - share)) ** 0.5


def parameters(module: nn.Module) -> int:
    """Number of trained parameters of encoder and decoder."""
    return sum(p.numel() for part in (module.encoder, module.decoder) for p in part.parameters())


def matched(image_shape: tuple[int, int, int], features: int, classes: int, width: int = 400) -> int:
    """The least width at which the networks for `classes` have no fewer parameters than those for `features`."""

    def size(inputs: int, units: int) -> int:
        nets = (make(image_shape, inputs, LATENT, units) for make in (MLPEncoder, MLPDecoder))
        return sum(p.numel() for net in nets for p in net.parameters())

    with torch.random.fork_rng(devices=[]):
        asked = size(features, width)
        while size(classes, width) < asked:
            width += 1
    return width


class _Batches:
    """Pictures and what is told of them in batches, in a new order each time."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, size: int) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)
        self.size = min(size, len(images))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for rows in order[: len(self) * self.size].split(self.size):
            yield self.images[rows], self.labels[rows]

    def __len__(self) -> int:
        return len(self.images) // self.size


def fit(
    build: Callable[[], LightningModule], images: Tensor, labels: Tensor, steps: int, seed: int, batch: int = BATCH
) -> Any:
    """Make a generator and train it by Lightning, first weights and noise from the seed.

    Args:
        build: Makes the generator.
        images: (N, C, H, W).
        labels: (N,), or activations (N, d); those who need none do not look at them.
        steps: Batches.
        seed: Of first weights, order and noise.
        batch: Pictures of a batch.

    Returns:
        The generator in eval mode, and how many seconds the training took.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        made = build()
        trainer = Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        start = time.perf_counter()
        trainer.fit(made, _Batches(images, labels, seed, batch))
        took = time.perf_counter() - start
    return made.eval(), took


@torch.no_grad()
def confident(
    draw: Callable[[Tensor], Tensor], classifier: nn.Module, y: Tensor, least: float = 0.95
) -> tuple[Tensor | None, float]:
    """Pictures that a classifier puts into their class with a probability above `least`, drawn again until it does.

    None where some are not after `ROUNDS` draws: a generator may hardly have a picture of a class that it is sure of.

    Args:
        draw: Pictures of labels (N,).
        classifier: (N, C, H, W) to logits.
        y: Labels (N,).
        least: The probability.

    Returns:
        Pictures (N, C, H, W), and the share of the first draw that was kept.
    """
    images = draw(y)
    left = _unsure(images, classifier, y, least).nonzero().flatten()
    kept = 1 - len(left) / len(y)
    for _ in range(ROUNDS[images.shape[1]]):
        if not len(left):
            return images, kept
        images[left] = draw(y[left])
        left = left[_unsure(images[left], classifier, y[left], least)]
    return None, kept


def _unsure(images: Tensor, classifier: nn.Module, y: Tensor, least: float) -> Tensor:
    p = torch.cat([classifier(part).softmax(-1) for part in images.split(1000)])
    return p.gather(1, y[:, None])[:, 0] <= least
