"""Laws, the report of them, and the statistics that they are held by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Law", "LawReport", "Z", "fact", "frequencies", "kolmogorov", "score", "uniform"]

Z = 4.0  # the bar on a z-score: one true law in 16,000 fails it by chance, and seeds are fixed


@dataclass(frozen=True)
class Law:
    """One law and how well it holds.

    Attributes:
        name: What must hold.
        value: The measured statistic.
        bar: What it is held against.
        passed: Whether it holds.
    """

    name: str
    value: float
    bar: str
    passed: bool


@dataclass(frozen=True)
class LawReport:
    """The laws that a check looked at; prints as a table."""

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
        """Itself, or an AssertionError with the table where a law fails."""
        if not self.passed:
            raise AssertionError(str(self))
        return self


def fact(name: str, holds: bool) -> Law:
    """What holds or does not."""
    return Law(name, float(holds), "holds", holds)


def score(name: str, deviations: Tensor, doubt: Tensor | float = 0.0) -> Law:
    """The largest |z| of the column means of ``deviations`` (N, ...), each against zero known to ``doubt``."""
    flat = deviations.double().reshape(len(deviations), -1)
    error = (flat.var(0) / len(flat) + torch.as_tensor(doubt, dtype=torch.float64).square()).sqrt()
    floor = 1e-7 * max(1.0, float(flat.abs().max())) + 1e-300  # rounding, where a column does not vary
    z = float((flat.mean(0).abs() / (error + floor)).max())
    bar = max(Z, math.sqrt(2 * math.log(max(flat.shape[1], 1))) + 2)  # the largest of many is larger
    return Law(name, z, f"|z| < {bar:.2g}", z < bar)


def frequencies(name: str, y: Tensor, p: Tensor, doubt: float = 0.0) -> Law:
    """The largest |z| of Σ 1[y ≤ k] − P(Y ≤ k) and Σ 1[y = k] − P(Y = k) over classes seen often enough.

    Shares of classes that are known to a relative ``doubt`` may be off by as much.
    """
    hits = torch.nn.functional.one_hot(y, p.shape[-1]).to(p)
    off = torch.cat([hits - p, (hits - p).cumsum(-1)], dim=-1).sum(0)
    upto = p.cumsum(-1)
    variance = torch.cat([p * (1 - p), upto * (1 - upto)], dim=-1).sum(0)
    known = variance >= 25  # below, a count is not normal
    variance = variance + (doubt * torch.cat([p, upto * (1 - upto)], dim=-1).sum(0)).square()
    z = float((off[known].abs() / variance[known].sqrt()).max()) if bool(known.any()) else 0.0
    bar = max(Z, math.sqrt(2 * math.log(max(int(known.sum()), 1))) + 2)
    return Law(name, z, f"|z| < {bar:.2g}", z < bar)


def uniform(values: Tensor) -> float:
    """Kolmogorov-Smirnov p-value of values (N,) against the uniform law."""
    ordered, n = values.sort().values, len(values)
    steps = torch.arange(n, dtype=ordered.dtype) / n
    largest = float(torch.maximum((ordered - steps).max(), (steps + 1 / n - ordered).max()))
    return kolmogorov(largest * math.sqrt(n))


def kolmogorov(x: float) -> float:
    """P(K > x) of the Kolmogorov law."""
    if x < 0.2:
        return 1.0
    total = math.fsum((1 if i % 2 else -1) * math.exp(-2 * i * i * x * x) for i in range(1, 101))
    return min(1.0, max(0.0, 2 * total))
