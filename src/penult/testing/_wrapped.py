"""A distribution inside of torch's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)

from penult.testing._laws import Law, fact
from penult.testing._subjects import Subject

__all__ = ["wrapped"]


def wrapped(subject: Subject, x: Tensor) -> Iterator[Law]:
    """Independent, MixtureSameFamily and TransformedDistribution, where they take it."""
    law: Any = subject.law
    if not law.batch_shape:
        law, x = law.expand(Size((3,))), x[: len(x) // 3 * 3].reshape(-1, 3, *law.event_shape)
    x = x[:20]
    event, last = law.event_shape, law.batch_shape[-1]
    whole = Independent(law, 1, validate_args=False)
    yield fact("Independent has its shapes", whole.event_shape == Size((last,)) + event)
    if not subject.dense:
        return
    density = law.log_prob(x)
    yield _close("Independent sums densities", whole.log_prob(x), density.sum(-1))
    try:
        yield _close("Independent sums entropies", whole.entropy(), law.entropy().sum(-1))
    except NotImplementedError:
        pass
    logits = torch.linspace(-1, 1, last, dtype=density.dtype, device=density.device).expand(law.batch_shape)
    mixture = MixtureSameFamily(Categorical(logits=logits), law, validate_args=False)
    one = x.select(-1 - len(event), 0)
    each = law.log_prob(one.unsqueeze(-1 - len(event)))
    yield _close(
        "MixtureSameFamily mixes densities", mixture.log_prob(one), (each + logits.log_softmax(-1)).logsumexp(-1)
    )
    with torch.random.fork_rng():
        drawn = mixture.sample((4,))
    yield fact("MixtureSameFamily draws", drawn.shape == Size((4,)) + law.batch_shape[:-1] + event)
    support = law.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real:
        moved = TransformedDistribution(law, AffineTransform(1.0, 2.0, event_dim=len(event)), validate_args=False)
        expected = density - event.numel() * math.log(2.0)
        yield _close("TransformedDistribution moves densities", moved.log_prob(1 + 2 * x), expected)


def _close(name: str, found: Tensor, expected: Tensor) -> Law:
    if found.shape != expected.shape:
        return fact(name, False)
    error = float(((found - expected).abs() / expected.abs().clamp_min(1)).max())
    return Law(name, error, "<= 1e-4", error <= 1e-4)
