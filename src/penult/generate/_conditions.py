"""Activations as conditions of a generator: draws for classes, brought to one scale."""

from __future__ import annotations

from copy import deepcopy
from typing import final

import torch
from torch import Tensor, nn

from penult.activations import Activations, _ActivationSource
from penult.bases import Marginal
from penult.distributions import Bank
from penult.pair import GenerativePair

__all__ = ["Standardizer", "bank_of", "check_share", "draw", "without_data"]

_DRAWS = 8192  # of the pair, for mean and scale
_FLOOR = 0.1  # of the mean deviation: units that hardly move must not be blown up
_TRIES = 4096  # draws for one activation that is confident enough, on average
_AT_ONCE = 1 << 16
_COMPONENTS, _DIMS, _ROWS = 100, 24, 20  # of the mixture that stands for a bank, and rows of it for a component


@final
class Standardizer(nn.Module):
    """Activations less their mean, each unit over its standard deviation, which is at least a tenth of the mean one.

    Without the floor, units that are almost always zero would be the loudest of all.

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
        """Mean and scale of activations, blocks of (n, d).

        Raises:
            ValueError: All activations are the same.
        """
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        shift: Tensor | None = None
        for block in blocks:
            rows = block.double()
            if shift is None:
                shift = rows.mean(0)  # so that no digits are lost where the mean is large
                total, square = torch.zeros_like(shift), torch.zeros_like(shift)
            count += len(rows)
            total = total + (rows - shift).sum(0)
            square = square + (rows - shift).square().sum(0)
        assert shift is not None
        mean = total / count
        deviation = (square / count - mean.square()).clamp_min(0).sqrt()
        if not bool(deviation.mean() > 0):
            raise ValueError("all activations are the same, so that no class can be told from another by them")
        return cls((mean + shift).float(), deviation.clamp_min(_FLOOR * float(deviation.mean())).float())

    @classmethod
    def of_pair(cls, pair: GenerativePair, activations: Tensor | Activations | None = None) -> Standardizer:
        """Mean and scale of activations, or else of draws of the pair; the global random state is left alone."""
        if activations is not None:
            return cls.of(_ActivationSource(activations, pair.head, min_rows=2))
        generator = torch.Generator(pair.head.weight.device).manual_seed(0)
        return cls.of([pair.sample((_DRAWS,), generator=generator)[0]])

    def forward(self, h: Tensor) -> Tensor:
        """Activations (*S, d) to (*S, d) in deviations from the mean."""
        return (h.to(self.mean.dtype) - self.mean) / self.scale


@torch.no_grad()
def draw(
    pair: GenerativePair, y: Tensor, confident: float | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Activations of classes, h ~ p(h|y), or of those of them that the head is sure of.

    Args:
        pair: The pair.
        y: Labels (N,).
        confident: Keeps draws with p(y|h) above it. It is then no longer an exact pair: what is kept are the clear
            cases.
        generator: Source of randomness, or None for torch's default.

    Returns:
        (N, d).

    Raises:
        ValueError: `confident` is no probability, or hardly a draw of a class comes up to it.
    """
    with torch.autocast(y.device.type, enabled=False):  # training may be in mixed precision, laws are not
        return _draw(pair, y, confident, generator)


def _draw(pair: GenerativePair, y: Tensor, confident: float | None, generator: torch.Generator | None) -> Tensor:
    h = pair.given(y).sample(generator=generator)
    if confident is None:
        return h
    check_share("confident", confident)
    sure = _posterior(pair, h, y) > confident
    pending = (~sure).nonzero().flatten()
    tried = torch.ones(pair.head.num_classes, device=h.device)
    kept, best = torch.zeros_like(tried), torch.zeros_like(tried)
    while len(pending):
        repeats = max(1, min(64, _AT_ONCE // len(pending)))
        classes = y[pending].repeat_interleave(repeats)
        drawn = pair.given(classes).sample(generator=generator)
        p = _posterior(pair, drawn, classes)
        tried += torch.bincount(classes, minlength=len(tried))
        best.scatter_reduce_(0, classes, p.to(best), "amax")
        good = p > confident
        kept += torch.bincount(classes[good], minlength=len(kept))
        for label in y[pending].unique():  # draws of a class are alike, so that any of them serves any of its rows
            rows, picks = pending[y[pending] == label], (good & (classes == label)).nonzero().flatten()
            filled = min(len(rows), len(picks))
            h[rows[:filled]] = drawn[picks[:filled]]
            sure[rows[:filled]] = True
        pending = pending[~sure[pending]]
        rare = (tried > _TRIES * (kept + 1))[y[pending]]
        if bool(rare.any()):
            worst = int(y[pending[rare][0]])
            raise ValueError(
                f"of {int(tried[worst])} draws for class {worst}, {int(kept[worst])} have p(y|h) > {confident}; the "
                f"highest was {float(best[worst]):.3g}. Ask for less, or fit a base that puts activations where the "
                "head is sure"
            )
    return h


def bank_of(pair: GenerativePair) -> Bank | None:
    """The real activations that a pair holds, if it does."""
    law = pair.base.distribution if isinstance(pair.base, Marginal) else None
    return law if isinstance(law, Bank) else None


def without_data(pair: GenerativePair) -> GenerativePair:
    """The pair; in place of a bank of real activations a mixture of 100 components in 24 dimensions, fitted to it.

    Raises:
        ValueError: The bank is too small for a mixture.
    """
    bank = bank_of(pair)
    if bank is None:
        return pair
    if len(bank) < 2 * _ROWS:
        raise ValueError(
            f"the pair holds {len(bank)} real activations, too few to fit a mixture that would stand for them: give a "
            "pair of another law, or save(path, store_activations=True) to write them"
        )
    pair = deepcopy(pair)  # of weights that nothing else changes
    assert isinstance(pair.base, Marginal)
    head, rows = pair.base.head, bank.activations
    components, dims = min(_COMPONENTS, len(rows) // _ROWS), min(_DIMS, rows.shape[1])
    rectified = bank.rectified and bool((rows < 0).any())
    mixture = Marginal.fit(head, rows, components=components, dims=dims, rectified=rectified)
    return GenerativePair(pair.head, mixture)


def check_share(name: str, value: float) -> None:
    """Raise unless a number can be a probability to be exceeded."""
    if not (hasattr(value, "__float__") and 0 <= float(value) < 1):
        raise ValueError(f"{name} must be a probability from 0 to below 1, got {value!r}")


def _posterior(pair: GenerativePair, h: Tensor, y: Tensor) -> Tensor:
    return pair.posterior(h).probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
