"""F and its derivatives: kernels in tensors, made differentiable to any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from penult.special._debye import Expansion, expansion

__all__ = ["LOG_MGF", "LOG_MGF_DEFICIT", "MEAN", "MEAN_DEFICIT", "FunctionPair", "call", "in_chunks", "variance"]

_CHUNK = 1 << 15  # elements evaluated at a time: a dozen float64 temporaries then stay in cache

Kernel = Callable[[Tensor, int], Tensor]
FunctionPair = tuple[type[Function], type[Function]]


# --- kernels, on tensors of the working dtype ---------------------------------------------------------------


class _State:
    """Debye's expansion of order M at κ: what the kernels share, computed on demand.

    The formulas are sums of terms of one sign: every result is relatively accurate at any κ ≥ 0.
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
        return _horner(self.series.slope, self.q)

    def ratio(self) -> Tensor:
        """A_M / κ at order M."""
        return self.gap - (0.5 + self.p * self.slope()) / (self.s * self.s)

    def rise(self) -> Tensor:
        """ρ_M = 2 (M + 1) A_M / κ, which the downward recurrence ρ → 1 / (1 + x ρ / (m (m + 1))) starts from."""
        return 2 * (self.order + 1) * self.ratio()

    def orders(self) -> list[float]:
        return [self.order - i for i in range(self.series.steps)]


def _series(dim: int, double: bool) -> Expansion:
    return expansion(dim, double)


_series._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it, rather than trace it


def _log_mgf(kappa: Tensor, dim: int) -> Tensor:
    state = _State(kappa, dim)
    order, w = state.order, kappa * kappa * state.gap
    f = w - order * torch.log1p(w / (2 * order)) - 0.5 * torch.log1p(w / order)
    f = f - w / state.s * _horner(state.series.value, state.q)
    return f + _log_growth(state)


def _log_mgf_deficit(kappa: Tensor, dim: int) -> Tensor:
    if dim == 1:
        return torch.log1p(kappa.tanh())
    state = _State(kappa, dim)
    order, w = state.order, kappa * kappa * state.gap
    f = order * (w + kappa) / (state.s + kappa)  # κ − w without cancellation
    f = f + order * torch.log1p(w / (2 * order)) + 0.5 * torch.log1p(w / order)
    f = f + w / state.s * _horner(state.series.value, state.q)
    return f - _log_growth(state)


def _log_growth(state: _State) -> Tensor | float:
    """F_ν − F_M, the logarithm of the product of the recurrence's factors 1 + e."""
    if not state.series.steps:
        return 0.0
    x, rho = state.kappa * state.kappa / 4, state.rise()
    total: Tensor | float = 0.0
    product = torch.zeros_like(x)
    flush = 10 if state.double else 3  # before the product of factors of order κ can overflow
    for i, m in enumerate(state.orders(), start=1):
        e = x * rho / (m * (m + 1))
        rho = 1 / (1 + e)
        product = product + e + product * e
        if i % flush == 0 or i == state.series.steps:
            total = total + torch.log1p(product)
            product = torch.zeros_like(x)
    return total


def mean(kappa: Tensor, dim: int) -> Tensor:
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
    total = torch.full_like(q, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * q + c
    return total


def in_chunks(kernel: Kernel, kappa: Tensor, dim: int) -> Tensor:
    if torch.compiler.is_compiling() or kappa.numel() <= _CHUNK:
        return kernel(kappa, dim)
    return torch.cat([kernel(k, dim) for k in kappa.reshape(-1).split(_CHUNK)]).reshape(kappa.shape)


# --- derivatives --------------------------------------------------------------------------------------------


def _differentiable(value: Kernel, derivative: Kernel) -> FunctionPair:
    """Autograd Functions κ ↦ value whose derivative is itself differentiable.

    Two of them, since torch.compile refuses a Function with a forward-mode rule: the first without, to be
    compiled, the second with.
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
    reverse, both = functions
    function = reverse if torch.compiler.is_compiling() else both
    return torch.as_tensor(function.apply(kappa, dim))


def variance(kappa: Tensor, dim: int) -> Tensor:
    """V in plain differentiable operations, so that third and higher derivatives come from autograd."""
    return in_chunks(_cosine_variance, kappa, dim)


LOG_MGF: FunctionPair = _differentiable(_log_mgf, lambda k, dim: call(MEAN, k, dim))
LOG_MGF_DEFICIT: FunctionPair = _differentiable(_log_mgf_deficit, lambda k, dim: call(MEAN_DEFICIT, k, dim))
MEAN: FunctionPair = _differentiable(mean, variance)
MEAN_DEFICIT: FunctionPair = _differentiable(mean_deficit, lambda k, dim: -variance(k, dim))
