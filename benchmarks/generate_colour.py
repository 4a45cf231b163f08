"""The evaluator of the generation benchmark for colour images, (N, 3, 32, 32) in [0, 1].

Its size and training are limited by eight minutes on one core. `generate_setting.py` describes its use and stores its
weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_setting import Pictures

__all__ = ["evaluator_net", "shifted", "train"]

BATCH = 100
RATE = 5e-3  # the highest
WARM = 0.2  # of the steps, in which the rate rises
DECAY = 0.05
EPOCHS = 13
SHIFT = 4  # pixels at most, each way


def evaluator_net() -> nn.Sequential:
    """Four convolutions with pooling and batch normalisation, a layer of 128, ReLU and the head."""

    def block(channels: int, planes: int) -> list[nn.Module]:
        layers = [nn.Conv2d(channels, planes, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        return [*layers, nn.BatchNorm2d(planes), nn.ReLU()]

    made = nn.Sequential(
        *block(3, 32), *block(32, 64), *block(64, 128), *block(128, 128),
        nn.Flatten(), nn.Linear(128 * 2 * 2, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip
    return made.to(memory_format=torch.channels_last)  # faster on a CPU


def train(model: nn.Module, labelled: Pictures, seed: int = 0) -> None:
    """AdamW, its rate rising and falling once, over pictures that are flipped or not, and shifted.

    Args:
        model: In train mode.
        labelled: Pictures with labels.
        seed: Of the order, the flips and the shifts.
    """
    images, labels = labelled
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    steps = EPOCHS * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=WARM)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            x = shifted(_flipped(images[rows], generator), SHIFT, generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[rows]).backward()
            optimizer.step()
            schedule.step()


def _flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them, left to right."""
    flips = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flips, images.flip(3), images)


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each shifted over black.

    Args:
        images: (N, C, H, W).
        most: By how many pixels at most, each way.
        generator: Of the shifts.
    """
    count, channels, height, width = images.shape
    down, across = torch.randint(2 * most + 1, (2, count, 1, 1, 1), generator=generator)
    i, j = down + torch.arange(height)[:, None], across + torch.arange(width)
    padded = F.pad(images, (most,) * 4)
    return padded[torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None], i, j]
