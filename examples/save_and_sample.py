"""Save the pair of a classifier to one small file, and sample activations of every class from it without the model.

The weights are random here, so that no data is needed. Any nn.Module that ends in a linear layer can be used.

Run: python examples/save_and_sample.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import penult


def save(path: Path) -> None:
    """Find the head of a model and save the pair that it implies."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 10)
    )
    head = penult.find_head(model, torch.randn(16, 3, 32, 32))
    print(head.certificate)
    # The LayerNorm was folded into the head, so activations lie on a sphere whose radius is known.
    pair = penult.GenerativePair(head, penult.Sphere.from_head(head, ambient=True))
    pair.save(path)


def sample(path: Path) -> None:
    """Load the pair and sample activations from it, without the model."""
    pair = penult.load(path)
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(pair.head.num_classes)
    h = pair.given(classes).sample((200,), generator=generator)  # type: ignore[call-arg]
    accuracy = (pair.head(h).argmax(-1) == classes).float().mean()
    error = (pair.posterior(h).probs - pair.head(h).softmax(-1)).abs().max()
    print(f"\n{path.name}: {path.stat().st_size} bytes with {pair.head} and {pair.base}")
    print(f"samples {tuple(h.shape)}; norms {h.norm(dim=-1).min():.3f} to {h.norm(dim=-1).max():.3f}")
    print(f"the head classifies {accuracy:.0%} of the samples correctly: classes overlap, as the head is not trained")
    print(f"max |posterior - softmax| = {error:.0e}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.penult.safetensors"
        save(file)
        sample(file)
