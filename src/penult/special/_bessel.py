"""F and its derivatives: tensor kernels, and autograd functions that are differentiable to any order."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "LOG_MGF",
    "LOG_MGF_DEFICIT",
    "MEAN",
    "MEAN_DEFICIT",
    "Expansion",
    "FunctionPair",
    "call",
    "expansion",
    "in_chunks",
    "variance",
]

# --- Coefficients of the uniform (Debye) expansion behind :mod:`penult.special` -----------------------------
# For order ν the normalised modified Bessel function obeys, with s = √(ν² + κ²) and p = ν / s,
#
#     log I_ν(κ) = s + ν log(κ / (ν + s)) − ½ log(2π s) + Σ_k D_k(p) / ν^k
#
# where D = Σ D_k ε^k is the logarithm of Debye's series (DLMF 10.41.3). Debye's recursion for the series
# becomes, for the derivatives E_k = D_k' of its logarithm, a Riccati recursion in the integers alone:
#
#     8 E_1 = 1 − 5 p²,    2 E_{k+1} = ((p² − p⁴) E_k)' + (p² − p⁴) Σ_{i+j=k} E_i E_j
#
# so that 8^k E_k has integer coefficients. The arithmetic is exact until the last rounding.


class Expansion(NamedTuple):
    """Coefficients of Debye's expansion at one order M, as short polynomials in q = 2p − 1, lowest power first.

    With p = M / √(M² + κ²), D_k(p) are the polynomials of the expansion of log I_M(κ), and E_k(p) those of its
    derivative.

    Attributes:
        order: The order M ≥ ν at which the expansion is evaluated.
        steps: Number of downward recurrence steps from M to ν.
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
    """Return the polynomials 8^k E_k for k = 1..terms as {power of p: integer coefficient}."""
    polynomials = [{0: 1, 2: -5}]
    for k in range(1, terms):
        following: dict[int, int] = {}
        for n, a in polynomials[k - 1].items():
            following[n + 1] = following.get(n + 1, 0) + 4 * (n + 2) * a
            following[n + 3] = following.get(n + 3, 0) - 4 * (n + 4) * a
        for i in range(1, k):
            for n, a in polynomials[i - 1].items():
                for m, b in polynomials[k - i - 1].items():
                    following[n + m + 2] = following.get(n + m + 2, 0) + 4 * a * b
                    following[n + m + 4] = following.get(n + m + 4, 0) - 4 * a * b
        polynomials.append(following)
    return polynomials


def _chebyshev(power: dict[int, int], scale: int) -> list[float]:
    """Return the correctly rounded Chebyshev coefficients on p in [0, 1] of Σ_n power[n] p^n / scale.

    Uses p^n = 2^{1−2n} Σ_j' C(2n, n−j) T_j(2p − 1), where the prime halves the term j = 0.
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
    """Return the Chebyshev coefficients of G_k = (D_k(p) − D_k(1)) / (p − 1) and of E_k, k = 1..terms."""
    common = math.lcm(*range(1, 3 * terms + 1))
    values, slopes = [], []
    for k, e in enumerate(_derivatives(terms), start=1):
        slopes.append(_chebyshev(e, 8**k))
        # (p^{n+1} − 1) / (p − 1) = 1 + p + … + p^n, so the coefficients are suffix sums.
        quotient, total = {}, 0
        for n in range(max(e), -1, -1):
            total += e.get(n, 0) * (common // (n + 1))
            quotient[n] = total
        values.append(_chebyshev(quotient, common * 8**k))
    return values, slopes


def _collapse(table: list[list[float]], order: float, tolerance: float) -> tuple[float, ...]:
    """Sum the terms k at one order, cut the Chebyshev tail, and return coefficients of powers of q."""
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
    """Return the coefficients for ν = dim/2 − 1, in double or (for devices without float64) single precision.

    Args:
        dim: Dimension of the ambient space, at least 1.
        double: Whether the arithmetic is float64 (14 terms from order 20) or float32 (5 from order 6).

    Returns:
        The :class:`Expansion` at the lowest order M = ν + steps at which that number of terms is accurate enough.
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


# Number of elements evaluated at a time: a dozen float64 temporaries of that size stay in the cache.
_CHUNK = 1 << 15

Kernel = Callable[[Tensor, int], Tensor]
FunctionPair = tuple[type[Function], type[Function]]


# --- kernels, on tensors of the working dtype ---------------------------------------------------------------


class _State:
    """Debye's expansion of order M at κ, shared by the kernels.

    The formulas are sums of terms of one sign, so every result has a small relative error at any κ ≥ 0.
    """

    def __init__(self, kappa: Tensor, dim: int) -> None:
        self.kappa = kappa
        self.double = kappa.dtype == torch.float64
        self.series = _series(dim, self.double)
        self.order = self.series.order
        self.s = torch.hypot(kappa, kappa.new_tensor(self.order))
        self.gap = 1 / (self.s + self.order)
        self.p = self.order / self.s
        self.q = 2 * self.p - 1

    def slope(self) -> Tensor:
        """Return the sum T of the derivatives of the terms of the expansion, see `Expansion`."""
        return _horner(self.series.slope, self.q)

    def ratio(self) -> Tensor:
        """Return A / κ at order M, where A is the derivative of F."""
        return self.gap - (0.5 + self.p * self.slope()) / (self.s * self.s)

    def rise(self) -> Tensor:
        """Return ρ_M = 2 (M + 1) A_M / κ, the start of the downward recurrence ρ → 1 / (1 + x ρ / (m (m + 1)))."""
        return 2 * (self.order + 1) * self.ratio()

    def orders(self) -> list[float]:
        """Return the orders m = M, M − 1, ..., ν + 1 of the recurrence."""
        return [self.order - i for i in range(self.series.steps)]


def _series(dim: int, double: bool) -> Expansion:
    return expansion(dim, double)


# torch.compile calls the function and stores its result as a constant, instead of tracing it.
_series._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _log_mgf(kappa: Tensor, dim: int) -> Tensor:
    """Return F(κ)."""
    state = _State(kappa, dim)
    order, w = state.order, kappa * kappa * state.gap
    f = w - order * torch.log1p(w / (2 * order)) - 0.5 * torch.log1p(w / order)
    f = f - w / state.s * _horner(state.series.value, state.q)
    return f + _log_growth(state)


def _log_mgf_deficit(kappa: Tensor, dim: int) -> Tensor:
    """Return κ − F(κ)."""
    if dim == 1:
        return torch.log1p(kappa.tanh())
    state = _State(kappa, dim)
    order, w = state.order, kappa * kappa * state.gap
    f = order * (w + kappa) / (state.s + kappa)  # κ − w without cancellation
    f = f + order * torch.log1p(w / (2 * order)) + 0.5 * torch.log1p(w / order)
    f = f + w / state.s * _horner(state.series.value, state.q)
    return f - _log_growth(state)


def _log_growth(state: _State) -> Tensor | float:
    """Return F_ν − F_M, the logarithm of the product of the recurrence's factors 1 + e."""
    if not state.series.steps:
        return 0.0
    x, rho = state.kappa * state.kappa / 4, state.rise()
    total: Tensor | float = 0.0
    product = torch.zeros_like(x)
    # The logarithm is taken every few steps, before the product of factors of order κ can overflow.
    flush = 10 if state.double else 3
    for i, m in enumerate(state.orders(), start=1):
        e = x * rho / (m * (m + 1))
        rho = 1 / (1 + e)
        product = product + e + product * e
        if i % flush == 0 or i == state.series.steps:
            total = total + torch.log1p(product)
            product = torch.zeros_like(x)
    return total


def mean(kappa: Tensor, dim: int) -> Tensor:
    """Return A(κ)."""
    if dim == 1:
        return kappa.tanh()
    state = _State(kappa, dim)
    if not state.series.steps:
        return kappa * state.ratio()
    x, rho = kappa * kappa / 4, state.rise()
    for m in state.orders():
        rho = 1 / (1 + x * rho / (m * (m + 1)))
    return kappa * rho / dim


def mean_deficit(kappa: Tensor, dim: int) -> Tensor:
    """Return 1 − A(κ)."""
    if dim == 1:
        return 2 * torch.sigmoid(-2 * kappa)
    state = _State(kappa, dim)
    order, s = state.order, state.s
    c = (order + order * order / (s + kappa)) * state.gap + kappa * (0.5 + state.p * state.slope()) / (s * s)
    if state.series.steps:
        x, rho = kappa * kappa / 4, state.rise()
        for m in state.orders():
            c = (2 * m - kappa * c) / (2 * m + kappa * kappa * rho / (2 * (m + 1)))
            rho = 1 / (1 + x * rho / (m * (m + 1)))
    return c


def _cosine_variance(kappa: Tensor, dim: int) -> Tensor:
    """Return V(κ)."""
    if dim == 1:
        return 4 * torch.sigmoid(2 * kappa) * torch.sigmoid(-2 * kappa)
    state = _State(kappa, dim)
    s, p, slope = state.s, state.p, state.slope()
    z2 = (kappa / s) ** 2
    v = p * state.gap + (z2 - p * p) / (2 * s * s)
    v = v + p / (s * s) * ((3 * z2 - 1) * slope + z2 * p * _horner(state.series.curvature, state.q))
    if state.series.steps:
        x, rho = kappa * kappa / 4, state.rise()
        for m in state.orders():
            rho = 1 / (1 + x * rho / (m * (m + 1)))
            a = kappa * rho / (2 * m)
            v = rho * rho / (2 * m) - a * a * v
    return v


def _horner(coefficients: tuple[float, ...], q: Tensor) -> Tensor:
    """Evaluate a polynomial in q, lowest power first."""
    total = torch.full_like(q, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * q + c
    return total


def in_chunks(kernel: Kernel, kappa: Tensor, dim: int) -> Tensor:
    """Apply a kernel to at most `_CHUNK` elements at a time."""
    if torch.compiler.is_compiling() or kappa.numel() <= _CHUNK:
        return kernel(kappa, dim)
    return torch.cat([kernel(k, dim) for k in kappa.reshape(-1).split(_CHUNK)]).reshape(kappa.shape)


# --- derivatives --------------------------------------------------------------------------------------------


def _differentiable(value: Kernel, derivative: Kernel) -> FunctionPair:
    """Return two autograd Functions κ ↦ value whose derivative is itself differentiable.

    The first has no forward-mode rule, because torch.compile refuses Functions that have one; the second has it.
    """

    class Reverse(Function):
        @staticmethod
        def forward(kappa: Tensor, dim: int) -> Tensor:
            return in_chunks(value, kappa, dim)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
            kappa, ctx.dim = inputs
            ctx.save_for_backward(kappa)
            ctx.save_for_forward(kappa)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * derivative(ctx.saved_tensors[0], ctx.dim), None

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, None], kappa: Tensor, dim: int) -> Any:
            return Both.apply(kappa, dim), in_dims[0]

    class Both(Reverse):
        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return tangents[0] * derivative(ctx.saved_tensors[0], ctx.dim)

    return Reverse, Both


def call(functions: FunctionPair, kappa: Tensor, dim: int) -> Tensor:
    """Apply the Function of a pair that suits the mode: compiled or eager."""
    reverse, both = functions
    function = reverse if torch.compiler.is_compiling() else both
    value: Tensor = function.apply(kappa, dim)
    return value


def variance(kappa: Tensor, dim: int) -> Tensor:
    """Return V from plain differentiable operations, so that autograd gives the third and higher derivatives of F."""
    return in_chunks(_cosine_variance, kappa, dim)


LOG_MGF: FunctionPair = _differentiable(_log_mgf, lambda k, dim: call(MEAN, k, dim))
LOG_MGF_DEFICIT: FunctionPair = _differentiable(_log_mgf_deficit, lambda k, dim: call(MEAN_DEFICIT, k, dim))
MEAN: FunctionPair = _differentiable(mean, variance)
MEAN_DEFICIT: FunctionPair = _differentiable(mean_deficit, lambda k, dim: -variance(k, dim))
