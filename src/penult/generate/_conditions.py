"""Conditions of generators: sampled activations of classes, and their standardization."""

from __future__ import annotations

from copy import deepcopy
from typing import final

import torch
from torch import Tensor, nn

from penult.activations import Activations, _ActivationSource
from penult.bases import Marginal
from penult.distributions import Bank
from penult.pair import GenerativePair

__all__ = ["Standardizer", "bank_of", "check_below_one", "draw", "without_data"]

# Number of samples of the pair, for mean and scale.
_SAMPLES = 8192
# Smallest scale of a unit, relative to the mean standard deviation: units that are almost always zero would otherwise
# have the largest standardized values.
_MIN_SCALE = 0.1
# Most samples for one that is confident enough, on average.
_TRIES = 4096
_BLOCK = 1 << 16
# Components and dimensions of the mixture that replaces a bank, and fewest rows of the bank for each component.
_COMPONENTS, _DIMS, _ROWS = 100, 24, 20


@final
class Standardizer(nn.Module):
    """Standardize activations: subtract the mean and divide by the scale of each unit.

    The scale is the standard deviation of the unit, or a tenth of the mean standard deviation if that is larger.

    Attributes:
        mean: (d,).
        scale: (d,), positive.

    Args:
        mean: (d,).
        scale: (d,).

    Example:
        >>> standardize = Standardizer.of([torch.tensor([[1.0, 0.0], [3.0, 0.0]])])
        >>> standardize(torch.tensor([4.0, 0.1]))
        tensor([2., 2.])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, blocks: list[Tensor] | _ActivationSource) -> Standardizer:
        """Compute mean and scale of activations, given as blocks (n, d).

        Raises:
            ValueError: All activations are the same.
        """
        count, total, square = 0, torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
        shift: Tensor | None = None
        for block in blocks:
            rows = block.double()
            if shift is None:
                # Variances of rows close to 0 lose fewer digits.
                shift = rows.mean(0)
                total, square = torch.zeros_like(shift), torch.zeros_like(shift)
            count += len(rows)
            total = total + (rows - shift).sum(0)
            square = square + (rows - shift).square().sum(0)
        assert shift is not None
        mean = total / count
        deviation = (square / count - mean.square()).clamp_min(0).sqrt()
        if not bool(deviation.mean() > 0):
            raise ValueError("all activations are the same; expected different ones for different images")
        return cls((mean + shift).float(), deviation.clamp_min(_MIN_SCALE * float(deviation.mean())).float())

    @classmethod
    def of_pair(cls, pair: GenerativePair, activations: Tensor | Activations | None = None) -> Standardizer:
        """Compute mean and scale of activations, or of samples of the pair without touching the global random state."""
        if activations is not None:
            return cls.of(_ActivationSource(activations, pair.head, min_rows=2))
        generator = torch.Generator(pair.head.weight.device).manual_seed(0)
        return cls.of([pair.sample((_SAMPLES,), generator=generator)[0]])

    def forward(self, h: Tensor) -> Tensor:
        """Return standardized activations (*S, d)."""
        return (h.to(self.mean.dtype) - self.mean) / self.scale


@torch.no_grad()
def draw(
    pair: GenerativePair, y: Tensor, confident: float | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Sample activations of classes, h ~ p(h|y).

    Args:
        pair: The pair.
        y: Labels (N,).
        confident: Reject samples unless p(y|h) is above this. The samples then no longer follow the pair.
        generator: Source of randomness, or None for torch's default.

    Returns:
        (N, d).

    Raises:
        ValueError: `confident` is not in [0, 1), or almost all samples of a class are rejected.
    """
    # Training may use mixed precision, which has too few digits for sampling.
    with torch.autocast(y.device.type, enabled=False):
        return _draw(pair, y, confident, generator)


def _draw(pair: GenerativePair, y: Tensor, confident: float | None, generator: torch.Generator | None) -> Tensor:
    h = pair.given(y).sample(generator=generator)
    if confident is None:
        return h
    check_below_one("confident", confident)
    accepted = _posterior(pair, h, y) > confident
    pending = (~accepted).nonzero().flatten()
    num_sampled = torch.ones(pair.head.num_classes, device=h.device)
    num_accepted, highest = torch.zeros_like(num_sampled), torch.zeros_like(num_sampled)
    while len(pending):
        repeats = max(1, min(64, _BLOCK // len(pending)))
        classes = y[pending].repeat_interleave(repeats)
        samples = pair.given(classes).sample(generator=generator)
        p = _posterior(pair, samples, classes)
        num_sampled += torch.bincount(classes, minlength=len(num_sampled))
        highest.scatter_reduce_(0, classes, p.to(highest), "amax")
        is_confident = p > confident
        num_accepted += torch.bincount(classes[is_confident], minlength=len(num_accepted))
        # Samples of a class are exchangeable, so any of them can fill any row of the class.
        for label in y[pending].unique():
            rows = pending[y[pending] == label]
            sample_index = (is_confident & (classes == label)).nonzero().flatten()
            count = min(len(rows), len(sample_index))
            h[rows[:count]] = samples[sample_index[:count]]
            accepted[rows[:count]] = True
        pending = pending[~accepted[pending]]
        rare = (num_sampled > _TRIES * (num_accepted + 1))[y[pending]]
        if bool(rare.any()):
            worst = int(y[pending[rare][0]])
            raise ValueError(
                f"of {int(num_sampled[worst])} samples for class {worst}, {int(num_accepted[worst])} have p(y|h) > "
                f"{confident}; the highest is {float(highest[worst]):.3g}. Give a smaller confident, or fit a base "
                "with activations of which the head is more certain"
            )
    return h


def bank_of(pair: GenerativePair) -> Bank | None:
    """Return the bank of real activations that a pair samples from; None for other pairs."""
    distribution = pair.base.distribution if isinstance(pair.base, Marginal) else None
    return distribution if isinstance(distribution, Bank) else None


def without_data(pair: GenerativePair) -> GenerativePair:
    """Replace a bank of real activations by a mixture of 100 components in 24 dimensions that is fitted to it.

    Pairs without a bank are returned unchanged.

    Raises:
        ValueError: The bank is too small for a mixture.
    """
    bank = bank_of(pair)
    if bank is None:
        return pair
    if len(bank) < 2 * _ROWS:
        raise ValueError(
            f"the pair holds {len(bank)} real activations, too few to fit a mixture that replaces them: give a pair "
            "with another base, or save(path, store_activations=True) to write them"
        )
    # A copy, so that later changes of the weights of one pair do not affect the other.
    pair = deepcopy(pair)
    assert isinstance(pair.base, Marginal)
    head, rows = pair.base.head, bank.activations
    components, dims = min(_COMPONENTS, len(rows) // _ROWS), min(_DIMS, rows.shape[1])
    rectified = bank.rectified and bool((rows < 0).any())
    mixture = Marginal.fit(head, rows, components=components, dims=dims, rectified=rectified)
    return GenerativePair(pair.head, mixture)


def check_below_one(name: str, value: float) -> None:
    """Raise unless a number lies in [0, 1)."""
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}; expected a number from 0 to below 1")
    if not 0 <= float(value) < 1:
        raise ValueError(f"{name} is {value!r}; expected a number from 0 to below 1")


def _posterior(pair: GenerativePair, h: Tensor, y: Tensor) -> Tensor:
    return pair.posterior(h).probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
