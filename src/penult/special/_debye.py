"""Coefficients of the uniform (Debye) expansion behind :mod:`penult.special`.

For order ν the normalised modified Bessel function obeys, with s = √(ν² + κ²) and p = ν / s,

    log I_ν(κ) = s + ν log(κ / (ν + s)) − ½ log(2π s) + Σ_k D_k(p) / ν^k

where D = Σ D_k ε^k is the logarithm of Debye's series (DLMF 10.41.3). Debye's recursion for the series
becomes, for the derivatives E_k = D_k' of its logarithm, a Riccati recursion in the integers alone:

    8 E_1 = 1 − 5 p²,    2 E_{k+1} = ((p² − p⁴) E_k)' + (p² − p⁴) Σ_{i+j=k} E_i E_j

so that 8^k E_k has integer coefficients. Everything up to the last rounding is exact.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

__all__ = ["Expansion", "expansion"]


class Expansion(NamedTuple):
    """The expansion at one order, as short polynomials in q = 2p − 1 (lowest power first).

    Attributes:
        order: The order M ≥ ν at which the expansion is evaluated.
        steps: How many downward recurrence steps lead from M to ν.
        value: H with Σ_k (D_k(p) − D_k(1)) / M^k = (p − 1) H.
        slope: T = Σ_k E_k(p) / M^k.
        curvature: dT/dp.
    """

    order: float
    steps: int
    value: tuple[float, ...]
    slope: tuple[float, ...]
    curvature: tuple[float, ...]


def _derivatives(terms: int) -> list[dict[int, int]]:
    """The polynomials 8^k E_k for k = 1..terms as {power of p: integer coefficient}."""
    found = [{0: 1, 2: -5}]
    for k in range(1, terms):
        following: dict[int, int] = {}
        for n, a in found[k - 1].items():
            following[n + 1] = following.get(n + 1, 0) + 4 * (n + 2) * a
            following[n + 3] = following.get(n + 3, 0) - 4 * (n + 4) * a
        for i in range(1, k):
            for n, a in found[i - 1].items():
                for m, b in found[k - i - 1].items():
                    following[n + m + 2] = following.get(n + m + 2, 0) + 4 * a * b
                    following[n + m + 4] = following.get(n + m + 4, 0) - 4 * a * b
        found.append(following)
    return found


def _chebyshev(power: dict[int, int], scale: int) -> list[float]:
    """Chebyshev coefficients on p in [0, 1] of Σ_n power[n] p^n / scale, each correctly rounded.

    Uses p^n = 2^{1−2n} Σ_j' C(2n, n−j) T_j(2p − 1), the prime halving the term j = 0.
    """
    top = max(power)
    sums = [0] * (top + 1)
    for n, a in power.items():
        lifted = a << (2 * (top - n) + 1)
        for j in range(n + 1):
            sums[j] += lifted * math.comb(2 * n, n - j)
    sums[0] //= 2
    return [c / (scale << 2 * top) for c in sums]


@functools.cache
def _tables(terms: int) -> tuple[list[list[float]], list[list[float]]]:
    """Chebyshev coefficients of G_k = (D_k(p) − D_k(1)) / (p − 1) and of E_k, k = 1..terms."""
    common = math.lcm(*range(1, 3 * terms + 1))
    values, slopes = [], []
    for k, e in enumerate(_derivatives(terms), start=1):
        slopes.append(_chebyshev(e, 8**k))
        # (p^{n+1} − 1) / (p − 1) = 1 + p + … + p^n, hence suffix sums of the integrated coefficients.
        quotient, total = {}, 0
        for n in range(max(e), -1, -1):
            total += e.get(n, 0) * (common // (n + 1))
            quotient[n] = total
        values.append(_chebyshev(quotient, common * 8**k))
    return values, slopes


def _collapse(table: list[list[float]], order: float, tolerance: float) -> tuple[float, ...]:
    """Sum the terms k at one order, cut the Chebyshev tail, and return powers of q."""
    length = len(table[-1])
    series = [
        math.fsum(row[j] / order**k for k, row in enumerate(table, start=1) if j < len(row)) for j in range(length)
    ]
    tail = 0.0
    while length > 1 and tail + abs(series[length - 1]) < tolerance:
        length -= 1
        tail += abs(series[length])
    basis = [[1], [0, 1]]
    while len(basis) < length:
        older, newer = basis[-2], [0, *(2 * c for c in basis[-1])]
        basis.append([c - (older[n] if n < len(older) else 0) for n, c in enumerate(newer)])
    powers = range(length)
    return tuple(math.fsum(series[j] * basis[j][n] for j in powers if n < len(basis[j])) for n in powers)


@functools.lru_cache(maxsize=1024)
def expansion(dim: int, double: bool = True) -> Expansion:
    """Coefficients for ν = dim/2 − 1, in double or (for devices without float64) single precision.

    Args:
        dim: Dimension of the ambient space, at least 1.
        double: Whether the arithmetic is float64 (14 terms from order 20) or float32 (5 from order 6).

    Returns:
        The :class:`Expansion` at the lowest order M = ν + steps that the number of terms serves.
    """
    nu = dim / 2 - 1
    lowest, terms, epsilon = (20, 14, 1e-17) if double else (6, 5, 1e-8)
    steps = max(0, math.ceil(lowest - nu))
    order = nu + steps
    values, slopes = _tables(terms)
    value = _collapse(values, order, epsilon * order)
    slope = _collapse(slopes, order, epsilon * order)
    curvature = tuple(2.0 * n * c for n, c in enumerate(slope))[1:] or (0.0,)
    return Expansion(order, steps, value, slope, curvature)
