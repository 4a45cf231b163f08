"""Laws, reports of laws, and the statistics that test them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Law", "LawReport", "Z", "fact", "frequencies", "kolmogorov", "score", "uniform"]

# The bar on a z-score. One true law in 16,000 exceeds it by chance, but seeds are fixed, so results do not vary.
Z = 4.0


@dataclass(frozen=True)
class Law:
    """One law and its test.

    Attributes:
        name: The law.
        value: The measured statistic.
        bar: The condition on the statistic, such as "< 4".
        passed: Whether the condition holds.
    """

    name: str
    value: float
    bar: str
    passed: bool


@dataclass(frozen=True)
class LawReport:
    """The laws that a check tested; prints as a table."""

    subject: str
    laws: tuple[Law, ...]

    @property
    def passed(self) -> bool:
        """Whether every law holds."""
        return all(law.passed for law in self.laws)

    def __str__(self) -> str:
        width = max((len(law.name) for law in self.laws), default=0)
        rows = [
            f"  {'ok  ' if law.passed else 'FAIL'}  {law.name:<{width}}  {law.value:10.3g}  ({law.bar})"
            for law in self.laws
        ]
        return "\n".join([self.subject, *rows])

    def raise_unless_passed(self) -> LawReport:
        """Return the report, or raise an AssertionError with the table if a law fails."""
        if not self.passed:
            raise AssertionError(str(self))
        return self


def fact(name: str, holds: bool) -> Law:
    """Return a law that is tested by a yes-or-no condition, without a statistic."""
    return Law(name, float(holds), "holds", holds)


def score(name: str, deviations: Tensor, doubt: Tensor | float = 0.0) -> Law:
    """Test that the column means of ``deviations`` (N, ...) are zero, by the largest |z|.

    Args:
        name: Name of the law.
        deviations: Deviations from the expected value.
        doubt: Standard error of the expected value.
    """
    flat = deviations.double().reshape(len(deviations), -1)
    error = (flat.var(0) / len(flat) + torch.as_tensor(doubt, dtype=torch.float64).square()).sqrt()
    # For columns that vary by rounding only.
    floor = 1e-7 * max(1.0, float(flat.abs().max())) + 1e-300
    z = float((flat.mean(0).abs() / (error + floor)).max())
    # The largest of many z-scores is larger.
    bar = max(Z, math.sqrt(2 * math.log(max(flat.shape[1], 1))) + 2)
    return Law(name, z, f"|z| < {bar:.2g}", z < bar)


def frequencies(name: str, y: Tensor, p: Tensor, doubt: float = 0.0) -> Law:
    """Test class frequencies by the largest |z| of Σ 1[y ≤ k] − P(Y ≤ k) and Σ 1[y = k] − P(Y = k).

    Classes that occur too rarely are ignored. ``doubt`` is the relative standard error of the probabilities.
    """
    hits = torch.nn.functional.one_hot(y, p.shape[-1]).to(p)
    off = torch.cat([hits - p, (hits - p).cumsum(-1)], dim=-1).sum(0)
    upto = p.cumsum(-1)
    variance = torch.cat([p * (1 - p), upto * (1 - upto)], dim=-1).sum(0)
    # A smaller count is not approximately normal.
    known = variance >= 25
    variance = variance + (doubt * torch.cat([p, upto * (1 - upto)], dim=-1).sum(0)).square()
    z = float((off[known].abs() / variance[known].sqrt()).max()) if bool(known.any()) else 0.0
    bar = max(Z, math.sqrt(2 * math.log(max(int(known.sum()), 1))) + 2)
    return Law(name, z, f"|z| < {bar:.2g}", z < bar)


def uniform(values: Tensor) -> float:
    """Return the Kolmogorov-Smirnov p-value of values (N,) for the uniform distribution."""
    ordered, n = values.sort().values, len(values)
    steps = torch.arange(n, dtype=ordered.dtype, device="cpu") / n
    largest = float(torch.maximum((ordered - steps).max(), (steps + 1 / n - ordered).max()))
    return kolmogorov(largest * math.sqrt(n))


def kolmogorov(x: float) -> float:
    """Return P(K > x) of the Kolmogorov distribution."""
    if x < 0.2:
        return 1.0
    total = math.fsum((1 if i % 2 else -1) * math.exp(-2 * i * i * x * x) for i in range(1, 101))
    return min(1.0, max(0.0, 2 * total))
