"""The classification accuracy score: what a fresh network learns from images that it will not meet again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult.head._model import logits_of

__all__ = ["classification_accuracy"]

_EPOCHS = 4
_STEPS = 200  # of its optimiser at least, so that it also learns what there is to learn in a few hundred images
_BATCH = 100
_RATE = 2e-3
_AT_ONCE = 500


def classification_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    order: Tensor,
    classes: int,
    make: Callable[[], nn.Module] | None,
    seed: int,
    device: torch.device,
) -> float:
    """The accuracy on some images of a network that was trained on others.

    References:
        Ravuri and Vinyals, "Classification accuracy score for conditional generative models", 2019.

    Args:
        train: Images (N, C, H, W) and labels (N,) on the CPU, to learn from.
        test: The same, to be judged by.
        order: Order (N,) in which the training images are first taken.
        classes: K.
        make: Makes the network; None for two convolutions and two linear layers.
        seed: Of first weights, batches and dropout. The global random state is restored.
        device: Where to train.
    """
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    devices = [device.index or 0] if device.type == "cuda" else []
    # Layers draw first weights from the global state, and dropout more of it. It is restored, on this device too.
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        network = _small_network(images.shape[1:], classes) if make is None else make()
        network = network.to(device, torch.float32).train()
        batch = min(_BATCH, len(order))
        epochs = max(_EPOCHS, math.ceil(_STEPS / (len(order) // batch)))
        optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(order) // batch))
        for _ in range(epochs):
            order = order[torch.randperm(len(order), generator=generator)]
            for places in order[: len(order) // batch * batch].split(batch):
                logits = _logits(network, images[places.to(images.device)].to(device), classes)
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[places].to(device)).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            network.eval()
            answers = [_logits(network, x.to(device), classes).argmax(-1).cpu() for x in test[0].split(_AT_ONCE)]
    return float((torch.cat(answers) == test[1]).double().mean())


def _logits(network: nn.Module, images: Tensor, classes: int) -> Tensor:
    logits = logits_of(network(images.to(torch.float32)))
    if logits.shape != (len(images), classes):
        raise ValueError(
            f"the classifier gives logits of shape {tuple(logits.shape)} for {len(images)} images; with the "
            f"evaluator's {classes} classes it must give {(len(images), classes)}"
        )
    return logits


def _small_network(shape: torch.Size, classes: int) -> nn.Module:
    """Two convolutions and two linear layers for images (C, H, W)."""
    channels, height, width = shape
    size = 5 if min(height, width) >= 16 else 3
    pixels = math.ceil(height / 4) * math.ceil(width / 4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, size, stride=2, padding=size // 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, size, stride=2, padding=size // 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * pixels, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
