"""Distributions of activations for the generation benchmark: a classifier, its activations, and pairs fitted to them.

The distributions are fitted once, without labels, to activations of the generator's images, and stored in the cache.

Example:
    >>> from generate_laws import known, pairs
    >>> made = pairs("mnist", 0, "relu", data, cache, ("bank", "mixture, 100 in 24"))
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

import penult
from generate_setting import SETTINGS, activations, classifier

__all__ = ["CHOSEN", "Known", "known", "laws", "pairs", "prepare"]

CHOSEN = "mixture, 100 in 24"  # of the mixtures, by the selection pictures; what penult writes in place of a bank


@dataclass(frozen=True)
class Known:
    """A classifier, and what it makes of the generator's pictures.

    Attributes:
        model: The classifier.
        tap: Its tap.
        head: Its head.
        before: Activations of the generator's pictures as laws are fitted to them, before the ReLU if there is one.
        after: What the head reads, (N, d).
        held_out: As `before`, of pictures that no generator is trained on; None for USPS.
    """

    model: nn.Module
    tap: penult.Tap
    head: penult.Head
    before: penult.Activations
    after: Tensor
    held_out: penult.Activations | None


@lru_cache(maxsize=2)
def known(name: str, seed: int, kind: str, data: Path, cache: Path) -> Known:
    """A classifier by its seed, and activations of the pictures of a setting."""
    setting = SETTINGS[name]
    model = classifier(setting, seed, data, cache, kind)
    head = penult.find_head(model, torch.rand(16, *setting.shape, generator=torch.Generator().manual_seed(0)))
    before = activations(setting, "generator", seed, data, cache, kind)
    after = before.activations.clamp_min(0) if before.pre_activation else before.activations
    held_out = None if name == "mnist-usps" else activations(setting, "held-out", seed, data, cache, kind)
    return Known(model, penult.Tap(model, head), head, before, after, held_out)


def laws(k: Known) -> dict[str, Callable[[], penult.bases.Base]]:
    """Every base, by name."""
    head = k.head.clone()

    def marginal(kind: str, acts: penult.Activations = k.before, **options: int) -> Callable[[], penult.bases.Base]:
        return lambda: penult.Marginal.fit(head, acts, kind=kind, **options)

    found = {
        "bank": marginal("bank"),
        "mixture": marginal("mixture"),
        CHOSEN: marginal("mixture", components=100, dims=24),
        "mixture, 50 in 24": marginal("mixture", components=50, dims=24),
        "class": marginal("class"),
        "flow": marginal("flow"),
        "gaussian": lambda: penult.Gaussian.fit(head, k.after),
        "elliptic sphere": lambda: penult.Sphere.fit(head, k.after, shape="elliptic"),
        "sphere, ambient": lambda: penult.Sphere.fit(head, k.after, shape="round"),
        "sphere, span(W)": lambda: penult.Sphere.fit(head, k.after, shape="round", ambient=False),
        "sphere, no data": lambda: penult.Sphere.from_head(head),
    }
    if k.held_out is not None:
        found["bank, held-out"] = marginal("bank", k.held_out)
    return found


def pairs(
    name: str, seed: int, kind: str, data: Path, cache: Path, wanted: Collection[str] | None = None
) -> dict[str, penult.GenerativePair]:
    """Pairs of a classifier with the laws of that name, or all; fitted once, and kept in the cache."""
    k = known(name, seed, kind, data, cache)
    found = {}
    for law, fitted in laws(k).items():
        if wanted is not None and law not in wanted:
            continue
        path = cache / "generate" / "laws" / f"{name}-{kind}-{seed}-{law.replace(' ', '-')}.penult.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            base = fitted()
            head = base.head if isinstance(base, penult.Marginal) else k.head.clone()
            penult.GenerativePair(head, base).save(path)
        found[law] = penult.load(path)
    return found


def prepare(name: str, seed: int, kind: str, data: Path, cache: Path, wanted: Collection[str] | None) -> None:
    """Fit the laws of a classifier, so that no two runs do."""
    torch.set_num_threads(1)
    pairs(name, seed, kind, data, cache, wanted)
