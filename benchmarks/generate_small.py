"""Small distributions of activations, or fitted to few images, for one trained generator.

The generator is the adversarial one of the benchmark, trained on all images of its split; only the distribution of
the activations changes. Sizes are floats of the distribution, without the head.

Example:
    >>> from generate_small import LAWS, fitted
    >>> pair = fitted(LAWS["mixture, 50 in 24"], known("mnist", 0, "relu", data, cache))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

import penult
from generate_laws import Known
from penult.bases import Marginal

__all__ = ["LAWS", "Law", "fitted"]

_ROWS = 20  # pictures for a component, at least


@dataclass(frozen=True)
class Law:
    """A law to fit.

    Attributes:
        kind: Of `Marginal.fit`.
        components: Of a mixture.
        dims: Principal components of a mixture or of class Gaussians.
        pictures: How many it is fitted to; None for all.
        confident: What draws have to exceed.
    """

    kind: Literal["bank", "mixture", "class"] = "mixture"
    components: int = 100
    dims: int = 24
    pictures: int | None = None
    confident: float | None = None


LAWS: dict[str, Law] = (
    {f"mixture, {n} in 24": Law(components=n) for n in (10, 20, 50, 100, 200)}
    | {f"mixture, 100 in {m}": Law(dims=m) for m in (8, 16, 32, 64)}
    | {f"class Gaussians in {m}": Law("class", dims=m) for m in (16, 24, 64)}
    | {
        f"{name} of {n} pictures": Law(kind, pictures=n)
        for n in (100, 300, 1000, 3000)
        for name, kind in (("bank", "bank"), ("class Gaussians in 24", "class"), ("mixture in 24", "mixture"))
    }
    | {
        f"{name}, p(y|h) > {p}": Law(kind, confident=p)
        for name, kind in (("bank", "bank"), ("mixture, 100 in 24", "mixture"))
        for p in (0.5, 0.8, 0.95, 0.99)
    }
)


def fitted(law: Law, k: Known) -> penult.GenerativePair:
    """The pair with that law, fitted to activations of some of the generator's pictures."""
    rows, head = k.before.activations, k.head.clone()
    if law.pictures is not None:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: law.pictures]]
    acts = penult.Activations(rows, head(rows.clamp_min(0) if k.before.pre_activation else rows).detach(),
                              pre_activation=k.before.pre_activation)  # fmt: skip
    components = max(1, min(law.components, len(rows) // _ROWS))
    dims = min(law.dims, rows.shape[1])
    return penult.GenerativePair(head, Marginal.fit(head, acts, kind=law.kind, components=components, dims=dims))
