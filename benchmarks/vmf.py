# ruff: noqa: E402  # thread counts are set before NumPy and torch load
"""Accuracy and speed of the von Mises-Fisher distribution, compared with other implementations.

Three sections, each a list of cells:

* ``accuracy``: every quantity against mpmath (70 digits) on a grid and at random points, compared with SciPy, the
  Bessel-function formula that PyTorch ports use, and TensorFlow Probability if it is installed; the inverse, the
  divergence between nearly equal distributions, and the pathwise gradient of samples.
* ``sampling``: cost of sampling relative to ``torch.randn`` of the same size, and whether the cosines of each sampler
  follow the exact distribution.
* ``evaluation``: nanoseconds for one value of the special functions, and the setup of a new dimension.

Times are CPU times of the process on one thread. Compared functions are interleaved in one process (A B A B ...), so
rely on the ratios. Results are written to JSON after each cell: a run that was stopped continues, and cells measured
with the same settings, versions, machine and code are kept (``--fresh`` measures all of them again).

Example:
    python benchmarks/vmf.py --quick
    python benchmarks/vmf.py --only sampling
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import ast
import functools
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mpmath as mp
import numpy as np
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Beta, kl_divergence

import penult
import tables
from penult import special
from penult.distributions import VonMisesFisher
from record import load, machine, short, versions, write

HERE = Path(__file__).resolve().parent
SECTIONS = ("accuracy", "sampling", "evaluation")
DIMS = (2, 3, 10, 64, 512, 2048, 8192)
KAPPAS = (0.0, 1e-8, 1e-6, 1e-2, 1.0, 10.0, 1e2, 1e3, 1e4, 1e6)
BARS: dict[str, dict[str, Any]] = {
    "accuracy": {
        "float64": {
            "log_c": 1e-13, "mean": 1e-14, "mgf": 1e-14, "variance": 1e-12, "deficit": 1e-12,
            "grad_log_c": 1e-14, "grad_mean": 1e-12,
        },
        "float32": 2e-7,
        "inverse": {"error": 1e-12, "residual": 4e-15},
        "divergence": 1e-12,
        "gradient_z": 4.0,
    },
    "sampling": {
        "randn": {"64": 1.7, "512": 1.3, "2048": 1.25},
        "randn_batch": {"2048": 1.4},
        "scipy": {"64": 8.0, "512": 25.0, "2048": 150.0},
        "p": 1e-4,
    },
    "evaluation": {"ns_from_64": 60.0, "ns_below_42": 250.0, "setup_ms": 10.0},
}  # fmt: skip
LAYOUT = 1  # of the JSON file
PACKAGES = ("torch", "scipy", "numpy", "mpmath", "tensorflow-probability", "jax", "geomstats")

# --- truth --------------------------------------------------------------------------------------------------


DIGITS = 70


@functools.lru_cache(maxsize=4096)
def truth(dim: int, kappa: float) -> dict[str, Any]:
    """Every quantity at one point, as mpmath numbers."""
    with mp.workdps(DIGITS):
        half = mp.mpf(dim) / 2
        log_area = mp.log(2) + half * mp.log(mp.pi) - mp.loggamma(half)
        f, a = by_series(dim, kappa) if kappa else (mp.mpf(0), mp.mpf(0))
        v = 1 - a * a - (dim - 1) * a / mp.mpf(kappa) if kappa else mp.mpf(1) / dim
        return {
            "log_c": -(log_area + f),
            "mean": a,
            "variance": v,
            "deficit": 1 - a,
            "mgf": f,
            "grad_log_c": -a,
            "grad_mean": v,
            "entropy": log_area + f - mp.mpf(kappa) * a,
        }


def by_series(dim: int, kappa: float) -> tuple[Any, Any]:
    """F and A from the defining series, Σ x^k / (k! (d/2)_k) with x = κ²/4, all of whose terms are positive.

    Summed in integers outwards from the largest term, which takes about √κ terms where mpmath's own Bessel
    function can take minutes. A = (2/κ) E[k], the terms being the weights.
    """
    with mp.workdps(DIGITS + 10):
        half, x = mp.mpf(dim) / 2, (mp.mpf(kappa) / 2) ** 2
        start = max(0, int((math.hypot(dim / 2, kappa) - dim / 2) / 2))
        bits = 4 * (DIGITS + 10)
        one, doubled = 1 << bits, int(2 * x * mp.mpf(2) ** bits)
        total, moment = one, 0
        term, k = one, start
        while term:
            term = term * doubled // ((k + 1) * (2 * k + dim)) >> bits
            k += 1
            total, moment = total + term, moment + term * (k - start)
        term, k = one, start
        while term and k > 0:
            k -= 1
            term = (term * ((k + 1) * (2 * k + dim)) << bits) // doubled
            total, moment = total + term, moment + term * (k - start)
        peak = start * mp.log(x) - mp.loggamma(start + 1) - mp.loggamma(start + half) + mp.loggamma(half)
        return peak + mp.log(mp.mpf(total) / one), 2 / mp.mpf(kappa) * (start + mp.mpf(moment) / total)


def by_bessel(dim: int, kappa: float) -> tuple[Any, Any]:
    """F and A from mpmath's modified Bessel function."""
    with mp.workdps(DIGITS):
        half, k = mp.mpf(dim) / 2, mp.mpf(kappa)
        low = mp.besseli(half - 1, k, maxterms=10**7)
        high = mp.besseli(half, k, maxterms=10**7)
        return mp.loggamma(half) + (half - 1) * mp.log(2 / k) + mp.log(low), high / low


def disagreement(dims: tuple[int, ...]) -> dict[str, float]:
    """Largest relative difference of the two routes to the truth on the grid."""
    worst = {"mgf": 0.0, "mean": 0.0}
    with mp.workdps(DIGITS):
        for dim in dims:
            for kappa in filter(None, KAPPAS):
                for name, a, b in zip(worst, by_series(dim, kappa), by_bessel(dim, kappa), strict=True):
                    worst[name] = max(worst[name], short(float(abs((a - b) / b)), 2))
    return worst


def error(value: float, exact: Any, *, scaled: bool) -> float:
    """Relative error, or for logarithms (scaled) the absolute error over max(1, |exact|)."""
    with mp.workdps(70):
        size = max(mp.mpf(1), abs(exact)) if scaled else abs(exact) or mp.mpf(1)
        return float(abs(mp.mpf(value) - exact) / size)


LOGARITHMS = ("log_c", "entropy")

# --- tools --------------------------------------------------------------------------------------------------

Values = dict[str, np.ndarray]


def penult_values(dtype: torch.dtype) -> Callable[[int, np.ndarray], Values]:
    """Penult as a user calls it: densities through the distribution, the rest through ``penult.special``."""

    def values(dim: int, kappas: np.ndarray) -> Values:
        kappa = torch.as_tensor(kappas).to(dtype)
        loc, across = torch.eye(2, dim, dtype=dtype)
        law = VonMisesFisher(loc, kappa)
        k = kappa.clone().requires_grad_()
        (slope,) = torch.autograd.grad(special.log_sphere_mgf(dim, k).sum(), k)
        (second,) = torch.autograd.grad(special.mean_resultant_length(dim, k).sum(), k)
        found = {
            "log_c": law.log_prob(across),  # at right angles to the mean direction
            "mean": special.mean_resultant_length(dim, kappa),
            "variance": special.cosine_variance(dim, kappa),
            "deficit": special.mean_resultant_deficit(dim, kappa),
            "mgf": special.log_sphere_mgf(dim, kappa),
            "grad_log_c": -slope,
            "grad_mean": second,
            "entropy": law.entropy(),
        }
        return {name: value.double().numpy() for name, value in found.items()}

    return values


class Ive(torch.autograd.Function):
    """SciPy's scaled Bessel function with the usual derivative: what PyTorch ports of the law are built on."""

    @staticmethod
    def forward(ctx: Any, order: float, z: Tensor) -> Tensor:
        """Evaluate on the CPU, in the precision of z."""
        ctx.order = order
        ctx.save_for_backward(z)
        return torch.as_tensor(scipy.special.ive(order, z.detach().numpy()), dtype=z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ive' = ive(ν − 1) − ive(ν) (ν + z) / z."""
        (z,) = ctx.saved_tensors
        lower, same = Ive.apply(ctx.order - 1, z), Ive.apply(ctx.order, z)
        return None, grads[0] * (lower - same * (ctx.order + z) / z)


def port_log_c(dim: int, kappa: Tensor) -> Tensor:
    """Log C by the textbook formula."""
    nu = dim / 2 - 1
    return nu * kappa.log() - (nu + 1) * math.log(2 * math.pi) - (kappa + torch.log(Ive.apply(nu, kappa)))


def port_mean(dim: int, kappa: Tensor) -> Tensor:
    """A by the textbook formula."""
    return Ive.apply(dim / 2, kappa) / Ive.apply(dim / 2 - 1, kappa)


def port_values(dtype: torch.dtype) -> Callable[[int, np.ndarray], Values]:
    """The textbook formulas over ``Ive``."""

    def values(dim: int, kappas: np.ndarray) -> Values:
        k = torch.as_tensor(kappas).to(dtype).requires_grad_()
        log_c, mean = port_log_c(dim, k), port_mean(dim, k)
        (slope,) = torch.autograd.grad(log_c.sum(), k, retain_graph=True)
        (second,) = torch.autograd.grad(mean.sum(), k, retain_graph=True)
        found = {
            "log_c": log_c,
            "mean": mean,
            "variance": 1 - mean * mean - (dim - 1) * mean / k,
            "deficit": 1 - mean,
            "grad_log_c": slope,
            "grad_mean": second,
            "entropy": -log_c - k * mean,
        }
        return {name: value.detach().double().numpy() for name, value in found.items()}

    return values


def scipy_formula_values(dim: int, kappas: np.ndarray) -> Values:
    """The same formulas in NumPy float64; no gradients."""
    nu = dim / 2 - 1
    with np.errstate(all="ignore"):
        low = scipy.special.ive(nu, kappas)
        mean = scipy.special.ive(nu + 1, kappas) / low
        log_c = nu * np.log(kappas) - (nu + 1) * math.log(2 * math.pi) - np.log(low) - kappas
        return {
            "log_c": log_c,
            "mean": mean,
            "variance": 1 - mean * mean - (dim - 1) * mean / kappas,
            "deficit": 1 - mean,
            "entropy": -log_c - kappas * mean,
        }


def scipy_stats_values(dim: int, kappas: np.ndarray) -> Values:
    """``scipy.stats.vonmises_fisher``, which takes one concentration at a time; refusals count as NaN."""
    loc, across = np.eye(2, dim)
    found: Values = {name: np.full(len(kappas), np.nan) for name in ("log_c", "entropy")}
    with np.errstate(all="ignore"):
        for i, kappa in enumerate(kappas.tolist()):
            try:
                law = scipy.stats.vonmises_fisher(loc, kappa)
                found["log_c"][i], found["entropy"][i] = law.logpdf(across), law.entropy()
            except ValueError:
                continue
    return found


def tfp_values(dtype: str) -> Callable[[int, np.ndarray], Values]:
    """TensorFlow Probability on JAX."""
    import jax
    import jax.numpy as jnp
    from tensorflow_probability.substrates.jax.distributions import VonMisesFisher as Law

    jax.config.update("jax_enable_x64", True)

    def values(dim: int, kappas: np.ndarray) -> Values:
        loc, across = jnp.eye(2, dim, dtype=dtype)
        k = jnp.asarray(kappas, dtype=dtype)

        def log_c(kappa: Any) -> Any:
            return Law(loc, kappa).log_prob(across)

        def mean(kappa: Any) -> Any:
            return Law(loc, kappa).mean()[..., 0]

        a = mean(k)
        found = {
            "log_c": log_c(k),
            "mean": a,
            "variance": 1 - a * a - (dim - 1) * a / k,
            "deficit": 1 - a,
            "grad_log_c": jax.grad(lambda kappa: log_c(kappa).sum())(k),
            "grad_mean": jax.grad(lambda kappa: mean(kappa).sum())(k),
            "entropy": Law(loc, k).entropy(),
        }
        return {name: np.asarray(value, dtype=np.float64) for name, value in found.items()}

    return values


def installed(module: str) -> bool:
    """Whether an optional peer can be imported; one that breaks on import counts as missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            __import__(module)
    except Exception as reason:
        print(f"{module}: not used ({type(reason).__name__}: {str(reason).splitlines()[0]})")
        return False
    return True


def tools() -> dict[str, tuple[str, Callable[[int, np.ndarray], Values] | None]]:
    """What is compared: name to (precision of the concentrations, values); None where it is not installed."""
    tfp = installed("tensorflow_probability.substrates.jax.distributions")
    return {
        "penult float64": ("float64", penult_values(torch.float64)),
        "penult float32": ("float32", penult_values(torch.float32)),
        "scipy.special.ive": ("float64", scipy_formula_values),
        "scipy.stats.vonmises_fisher": ("float64", scipy_stats_values),
        "ive port float64": ("float64", port_values(torch.float64)),
        "ive port float32": ("float32", port_values(torch.float32)),
        "TFP (JAX) float64": ("float64", tfp_values("float64") if tfp else None),
        "TFP (JAX) float32": ("float32", tfp_values("float32") if tfp else None),
    }


# --- accuracy -----------------------------------------------------------------------------------------------


def accuracy_cells(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The cells of the section: names and what measures them."""
    known = tools()
    yield "truth", lambda: disagreement(options.dims)
    for dim in options.dims:
        yield f"grid d={dim}", lambda d=dim: compare(known, {d: KAPPAS}, where=True)
    groups = min(1 if options.quick else 4, options.points // 10)
    rng = np.random.default_rng(options.seed)
    top = math.log(max(options.dims))
    for i in range(groups):
        points: dict[int, tuple[float, ...]] = {}
        for _ in range(options.points // (10 * groups)):
            dim = round(math.exp(rng.uniform(math.log(2), top)))
            points[dim] = points.get(dim, ()) + tuple((10 ** rng.uniform(-8, 6, size=10)).tolist())
        yield f"random {i + 1} of {groups}", lambda p=points: compare(known, p, where=False)
    yield "inverse", lambda: inverse(options.dims)
    yield "divergence", lambda: divergence(options.dims)
    n = 20_000 if options.quick else 200_000
    for dim, kappa in ((2, 1.0), (5, 2.0), (8, 5.0), (64, 10.0), (512, 100.0)):
        if not (options.quick and dim > 64):
            yield f"gradient d={dim} kappa={kappa:g}", lambda d=dim, k=kappa: gradient(d, k, n if d < 500 else n // 4)


def compare(
    known: dict[str, tuple[str, Callable[[int, np.ndarray], Values] | None]],
    points: dict[int, tuple[float, ...]],
    *,
    where: bool,
) -> dict[str, Any]:
    """Errors of every tool and quantity over the points; with ``where``, the points at which it breaks."""
    report: dict[str, Any] = {}
    for name, (precision, values) in known.items():
        if values is None:
            report[name] = "not installed"
            continue
        summary: dict[str, Any] = {}
        for dim, kappas in points.items():
            rounded = np.asarray(kappas, dtype=precision).astype(np.float64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = values(dim, rounded)
            for quantity, column in found.items():
                entry = summary.setdefault(quantity, {"n": 0, "nonfinite": 0, "max": 0.0, "at": None})
                for kappa, value in zip(rounded.tolist(), column.tolist(), strict=True):
                    entry["n"] += 1
                    if not math.isfinite(value):
                        entry["nonfinite"] += 1
                        if where:
                            entry.setdefault("where", []).append(short(kappa))
                        continue
                    miss = error(value, truth(dim, kappa)[quantity], scaled=quantity in LOGARITHMS)
                    if miss > entry["max"] or entry["at"] is None:
                        entry["max"], entry["at"] = short(miss), [dim, short(kappa)]
        report[name] = summary
    return report


def inverse(dims: tuple[int, ...]) -> dict[str, Any]:
    """The concentration from the mean resultant length: error of κ and of A(κ); off by over 10 % is a failure."""
    misses: dict[str, dict[str, Any]] = {}

    def note(name: str, dim: int, kappa: float, got: float, exact: Any) -> None:
        entry = misses.setdefault(name, {"n": 0, "failures": 0, "error": 0.0, "residual": 0.0})
        entry["n"] += 1
        if not (math.isfinite(got) and got > 0 and abs(got / kappa - 1) <= 0.1):
            entry["failures"] += 1
            return
        entry["error"] = max(entry["error"], short(abs(got / kappa - 1)))
        entry["residual"] = max(entry["residual"], short(float(abs(truth(dim, got)["mean"] - exact))))

    for dim in dims:
        kappas = [k for k in KAPPAS if k > 0]
        exact = [truth(dim, k) for k in kappas]
        r = torch.tensor([float(t["mean"]) for t in exact], dtype=torch.float64)
        c = torch.tensor([float(t["deficit"]) for t in exact], dtype=torch.float64)
        both, alone = special.concentration(dim, r, c), special.concentration(dim, r)
        rough = r * (dim - r * r) / (c * (2 - c))
        for i, kappa in enumerate(kappas):
            target = mp.mpf(float(r[i]))
            note("penult, R and 1 − R", dim, kappa, float(both[i]), exact[i]["mean"])
            note("penult, R alone", dim, kappa, float(alone[i]), target)
            note("Banerjee et al. (2005) approximation", dim, kappa, float(rough[i]), exact[i]["mean"])
            note("scipy.stats fit", dim, kappa, scipy_fit(dim, float(r[i]), float(c[i])), target)
    return misses


def scipy_fit(dim: int, r: float, c: float) -> float:
    """SciPy's estimate from two points whose mean has length r; NaN where it gives up."""
    x = np.zeros((2, dim))
    x[:, 0], x[0, 1] = r, math.sqrt(c * (2 - c))
    x[1, 1] = -x[0, 1]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(scipy.stats.vonmises_fisher.fit(x)[1])
        except (ValueError, RuntimeError):
            return math.nan


def divergence(dims: tuple[int, ...]) -> dict[str, Any]:
    """KL(p‖q) of two laws with one mean direction, κ_q = κ_p (1 + step), and to the uniform law."""
    steps = {"nearly equal": (1e-9, 1e-4), "apart": (0.1, 0.5, 10.0), "to the uniform law": (-1.0,)}
    report: dict[str, Any] = {}
    for label, values in steps.items():
        found = {name: {"n": 0, "nonfinite": 0, "negative": 0, "error": 0.0} for name in ("penult", "ive port float64")}
        for dim in dims:
            for kp in (1e-4, 1.0, 50.0, 1e3, 1e6):
                for step in values:
                    kq = kp * (1 + step)
                    with mp.workdps(70):
                        p, q = truth(dim, kp), truth(dim, kq)
                        exact = q["mgf"] - p["mgf"] - p["mean"] * (mp.mpf(kq) - mp.mpf(kp))
                    loc = torch.eye(1, dim, dtype=torch.float64)[0]
                    k = torch.tensor([kp, kq], dtype=torch.float64)
                    got = {"penult": float(kl_divergence(VonMisesFisher(loc, k[0]), VonMisesFisher(loc, k[1])))}
                    log_c, mean = port_log_c(dim, k), port_mean(dim, k)
                    if kq == 0:
                        log_c[1] = -special.log_sphere_area(dim)  # which the formula itself cannot give
                    got["ive port float64"] = float(log_c[0] - log_c[1] + (k[0] - k[1]) * mean[0])
                    for name, value in got.items():
                        entry = found[name]
                        entry["n"] += 1
                        if not math.isfinite(value):
                            entry["nonfinite"] += 1
                            continue
                        entry["negative"] += value < 0
                        entry["error"] = max(entry["error"], short(error(value, exact, scaled=False)))
        report[label] = found
    return report


def gradient(dim: int, kappa: float, n: int) -> dict[str, Any]:
    """Monte Carlo dE[t]/dκ through samples against A'(κ), beside the gradient through the proposal alone."""
    want = float(truth(dim, kappa)["variance"])
    k = torch.full((n,), kappa, dtype=torch.float64, requires_grad=True)
    loc = torch.eye(1, dim, dtype=torch.float64)[0]
    (exact,) = torch.autograd.grad((VonMisesFisher(loc, k).rsample() @ loc).sum(), k)
    (naive,) = torch.autograd.grad(wood_cosines(dim, k, n).sum(), k)

    def judged(slope: Tensor) -> dict[str, float]:
        mean, spread = float(slope.mean()), float(slope.std()) / math.sqrt(n)
        return {"value": short(mean, 6), "z": short((mean - want) / spread), "bias": short(mean / want - 1)}

    return {"n": n, "truth": short(want, 8), "penult": judged(exact), "proposal alone": judged(naive)}


# --- sampling -----------------------------------------------------------------------------------------------


def wood_cosines(dim: int, kappa: Tensor, n: int, *, shortcut: bool = False) -> Tensor:
    """Cosines by Wood's rejection scheme (1994), with Beta proposals; differentiable through the proposal alone.

    Args:
        dim: Dimension.
        kappa: One concentration, or n equal ones.
        n: How many.
        shortcut: Replace b by (d − 1)/(4κ) above κ = 10, as some ports do; it holds for κ much larger than d only.
    """
    m, first = dim - 1, kappa.detach().reshape(-1)[:1]

    def slope(k: Tensor) -> Tensor:
        b = (torch.sqrt(4 * k * k + m * m) - 2 * k) / m
        if not shortcut:
            return b
        mix = (k - 10).clamp(0, 1)
        return mix * m / (4 * k) + (1 - mix) * b

    b = slope(first)
    a = (m + 2 * first + torch.sqrt(4 * first * first + m * m)) / 4
    offset = 4 * a * b / (1 + b) - m * math.log(m)
    half = torch.tensor(m / 2, dtype=first.dtype)
    beta = Beta(half, half)
    kept, left = [], n
    while left > 0:
        proposal = beta.sample((left,))
        bottom = 1 - (1 - b) * proposal
        t = 2 * a * b / bottom
        accepted = m * t.log() - t + offset >= torch.rand(left, dtype=first.dtype).log()
        kept.append(proposal[accepted])
        left -= len(kept[-1])
    proposal, b = torch.cat(kept), slope(kappa)
    return (1 - (1 + b) * proposal) / (1 - (1 - b) * proposal)


def wood(loc: Tensor, kappa: Tensor, n: int, *, shortcut: bool = False) -> Tensor:
    """A plain Wood sampler: cosine, uniform direction, Householder reflection onto the mean direction."""
    dim = loc.shape[-1]
    t = wood_cosines(dim, kappa, n, shortcut=shortcut).unsqueeze(-1)
    around = torch.nn.functional.normalize(torch.randn(n, dim - 1, dtype=loc.dtype), dim=-1)
    x = torch.cat([t, torch.sqrt((1 - t * t).clamp_min(0)) * around], dim=-1)
    normal = -loc.clone()
    normal[0] += 1
    normal = torch.nn.functional.normalize(normal, dim=-1)
    return x - 2 * (x @ normal).unsqueeze(-1) * normal


def scipy_sample(loc: Tensor, kappa: Tensor, n: int) -> np.ndarray:
    """SciPy's sampler."""
    return scipy.stats.vonmises_fisher(loc.double().numpy(), float(kappa)).rvs(n)


def geomstats_sample(loc: Tensor, kappa: Tensor, n: int) -> np.ndarray:
    """The sampler of geomstats."""
    from geomstats.geometry.hypersphere import Hypersphere

    return Hypersphere(loc.shape[-1] - 1).random_von_mises_fisher(loc.double().numpy(), float(kappa), n)


def cpu(run: Callable[[], Any]) -> float:
    """CPU seconds of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def direction(*shape: int) -> Tensor:
    """Random unit vectors, float32."""
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def sampling_cells(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The cells of the section: names and what measures them."""
    peers: dict[str, Callable[[Tensor, Tensor, int], Any] | None] = {
        "wood": wood,
        "scipy": scipy_sample,
        "geomstats": geomstats_sample if installed("geomstats.geometry.hypersphere") else None,
    }
    rounds = {64: 41, 512: 15, 2048: 25}  # enough for both sides to meet an undisturbed moment
    full = ((100_000, 64), (100_000, 512), (20_000, 2048))
    for n, dim in ((50_000, 64), (20_000, 512), (5_000, 2048)) if options.quick else full:
        r = 5 if options.quick else rounds[dim]
        for kappa in (50.0,) if options.quick else (1.0, 50.0, 1000.0):
            yield f"d={dim} kappa={kappa:g}", functools.partial(one_law, n, dim, kappa, r, peers)
    for n, dim in ((100, 64), (10, 2048)):
        r = 5 if options.quick else rounds[dim]
        yield f"batch d={dim}", functools.partial(many_laws, n, dim, r)


def one_law(
    n: int, dim: int, kappa: float, rounds: int, peers: dict[str, Callable[[Tensor, Tensor, int], Any] | None]
) -> dict[str, Any]:
    """Cost and law of n draws from one distribution."""
    loc, k = direction(dim), torch.tensor(kappa)
    law = VonMisesFisher(loc, k)
    # Peers whose full size would take many seconds run at two smaller sizes; a line through both gives the rest.
    slow = {"scipy": {512: (500, 2500), 2048: (50, 350)}, "geomstats": {512: (2000, 10_000), 2048: (200, 2000)}}
    base, ours = paired(lambda: torch.randn(n, dim), lambda: law.sample((n,)), rounds)
    report: dict[str, Any] = {"n": n, "dim": dim, "kappa": kappa, **ratios(base, ours)}
    report["penult"] = {"ms": short(1e3 * min(ours)), "per_second": short(n / min(ours))}
    for name, sampler in peers.items():
        if sampler is None:
            report[name] = "not installed"
            continue
        few, many = slow.get(name, {}).get(dim, (0, n))
        sampler(loc, k, 2)
        ours = []
        small, large = [], []
        for _ in range(1 if name == "scipy" and few else min(7 if dim == 64 else 3, rounds)):
            ours.append(cpu(lambda: law.sample((n,))))
            large.append(cpu(lambda s=sampler, size=many: s(loc, k, size)))
            if few:
                small.append(cpu(lambda s=sampler, size=few: s(loc, k, size)))
        seconds = min(large)
        if few:
            seconds += (n - many) * max(0.0, min(large) - min(small)) / (many - few)
        report[name] = {
            "ms": short(1e3 * seconds),
            "per_second": short(n / seconds),
            "over_penult": short(seconds / min(report["penult"]["ms"] / 1e3, *ours)),
            "scaled_from": many if few else None,
        }
    size = {64: 20_000, 512: 5_000, 2048: 1_000}[dim]
    checked: dict[str, Callable[[], Any]] = {"penult": lambda: law.sample((size,))}
    checked |= {name: lambda s=s: s(loc, k, size) for name, s in peers.items() if s is not None}
    checked["wood with shortcut"] = lambda: wood(loc, k, size, shortcut=True)
    report["law"] = {name: follows(torch.as_tensor(draw()), loc, kappa) for name, draw in checked.items()}
    return report


def many_laws(n: int, dim: int, rounds: int) -> dict[str, Any]:
    """Draws from each of 1000 different distributions, beside a loop over SciPy's scaled from a few."""
    laws = 1000
    loc, k = direction(laws, dim), torch.logspace(0, 3, laws)
    law = VonMisesFisher(loc, k)
    base, ours = paired(lambda: torch.randn(n, laws, dim), lambda: law.sample((n,)), rounds)
    few = range(0, laws, laws // (20 if dim < 100 else 2))
    seconds = cpu(lambda: [scipy_sample(loc[i], k[i], n) for i in few]) * laws / len(few)
    y = 0.5 * (law.sample((n,)) - loc).square().sum(-1).double()
    p = scipy.stats.kstest(special.cosine_cdf(dim, k.double(), 1 - y, y).flatten().numpy(), "uniform").pvalue
    return {
        "n": n, "dim": dim, "laws": laws, **ratios(base, ours),
        "penult": {"ms": short(1e3 * min(ours)), "per_second": short(n * laws / min(ours))},
        "scipy": {
            "ms": short(1e3 * seconds), "per_second": short(n * laws / seconds),
            "over_penult": short(seconds / min(ours)), "scaled_from": len(few) * n,
        },
        "law": {"penult": {"n": n * laws, "p": short(float(p))}},
    }  # fmt: skip


def paired(base: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of both, taken in turns after one round that is thrown away."""
    base(), ours()
    times = [(cpu(base), cpu(ours)) for _ in range(rounds)]
    return [t[0] for t in times], [t[1] for t in times]


def ratios(base: list[float], ours: list[float]) -> dict[str, Any]:
    """Best over best, and the median of the ratios of neighbours."""
    return {
        "randn_ms": short(1e3 * min(base)),
        "ratio_best": short(min(ours) / min(base)),
        "ratio_median": short(statistics.median(b / a for a, b in zip(base, ours, strict=True))),
        "rounds": len(base),
    }


def follows(x: Tensor, loc: Tensor, kappa: float) -> dict[str, Any]:
    """Kolmogorov-Smirnov test of the cosines against the exact law, and their mean beside A."""
    dim, k = loc.shape[-1], torch.tensor(kappa, dtype=torch.float64)
    y = 0.5 * (x.double() - loc.double()).square().sum(-1)
    p = scipy.stats.kstest(special.cosine_cdf(dim, k, 1 - y, y).numpy(), "uniform").pvalue
    spread = math.sqrt(float(special.cosine_variance(dim, k)) / len(y))
    gap = float(special.mean_resultant_deficit(dim, k) - y.mean())
    return {"n": len(y), "p": short(float(p)), "mean": short(float(1 - y.mean())), "z": short(gap / spread)}


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluation_cells(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The cells of the section: names and what measures them."""
    n, rounds = (200_000, 3) if options.quick else (1_000_000, 9)
    for dim in (2, 10, 64, 512, 2048, 8192):
        yield f"d={dim}", lambda d=dim: evaluation(d, n, rounds)
    yield "setup", lambda: setup(1 if options.quick else 3)


def evaluation(dim: int, n: int, rounds: int) -> dict[str, Any]:
    """Nanoseconds for one value: the best of the rounds, and their median."""
    kappa = 10 ** torch.empty(n, dtype=torch.float64).uniform_(-2, 4)
    grad, one, numbers = kappa.clone().requires_grad_(), torch.ones_like(kappa), kappa.numpy()
    runs: dict[str, Callable[[], Any]] = {
        "F": lambda: special.log_sphere_mgf(dim, kappa),
        "A": lambda: special.mean_resultant_length(dim, kappa),
        "F and gradient": lambda: torch.autograd.grad(special.log_sphere_mgf(dim, grad), grad, one),
        "A and gradient": lambda: torch.autograd.grad(special.mean_resultant_length(dim, grad), grad, one),
        "scipy.special.ive": lambda: scipy.special.ive(dim / 2 - 1, numbers),
    }
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(cpu(run) / n * 1e9)
    report = {name: {"ns": short(min(t)), "median_ns": short(statistics.median(t))} for name, t in times.items()}
    return {"n": n, "rounds": rounds, **report}


SETUP = """
import json, statistics, time
import torch
from penult import special

def cost(dim):
    start = time.process_time()
    special.log_sphere_mgf(dim, kappa)
    return 1e3 * (time.process_time() - start)

torch.set_num_threads(1)
kappa = torch.ones((), dtype=torch.float64)
kappa.hypot(kappa)
found = {"first_of_process_ms": cost(64)}
for label, dims in (("d < 42", range(3, 42, 2)), ("d >= 42", range(43, 8192, 401))):
    found[label] = statistics.median(cost(dim) for dim in dims)
print(json.dumps(found))
"""


def setup(repeats: int) -> dict[str, Any]:
    """Milliseconds of the first evaluation in a new dimension, and of the first one of a process."""
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", SETUP], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    best = {name: short(min(run[name] for run in runs)) for name in runs[0]}
    return {"first_of_process_ms": best.pop("first_of_process_ms"), "new_dimension_ms": best}


# --- results ------------------------------------------------------------------------------------------------


def digest() -> str:
    """Fingerprint of the code that the figures depend on, comments and docstrings apart: a change measures afresh."""
    source = Path(penult.__file__).parent
    files = [f for room in ("special", "distributions") for f in sorted((source / room).rglob("*.py"))]
    seen = hashlib.sha256()
    for file in [*files, Path(__file__)]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        seen.update(ast.dump(tree).encode())
    return seen.hexdigest()[:16]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds (under 40 s)")
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="only this section (repeatable; default: all)"
    )
    parser.add_argument(
        "--out", type=Path, help="results file (default: benchmarks/results/vmf.json; with --quick: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of points and samples (default: 0)")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument(
        "--dims", type=int, nargs="+", default=DIMS, help="dimensions of the accuracy grid (default: %(default)s)"
    )
    parser.add_argument(
        "--points",
        type=int,
        help="number of random points of the accuracy section, a multiple of ten (default: 400; quick: 100)",
    )
    options = parser.parse_args(arguments)
    options.only = tuple(options.only or SECTIONS)
    options.dims = tuple(options.dims)
    options.points = options.points if options.points is not None else (100 if options.quick else 400)
    if min(options.dims) < 2:
        parser.error("--dims must be at least 2: the law lives on the unit sphere of R^d, d >= 2")
    if options.points < 0:
        parser.error("--points must not be negative")
    if options.out is None and not options.quick:
        options.out = HERE / "results" / "vmf.json"
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, write it, print the tables."""
    options = parse(arguments)
    torch.set_num_threads(1)
    results = load(options.out, "vmf", LAYOUT)
    for section in options.only if options.fresh else ():
        results["sections"].pop(section, None)
    code = digest()  # once: a file edited from here on is not what this process has loaded
    cells = {"accuracy": accuracy_cells, "sampling": sampling_cells, "evaluation": evaluation_cells}
    for section in options.only:
        settings: dict[str, Any] = {"seed": options.seed, "quick": options.quick, "code": code}
        if section == "accuracy":
            settings |= {"dims": list(options.dims), "kappas": list(KAPPAS), "points": options.points}
        head = {"settings": settings, "versions": versions(PACKAGES), "machine": machine(), "bars": BARS[section]}
        stored = results["sections"].get(section, {})
        if any(stored.get(key) != head[key] for key in ("settings", "versions", "machine")):
            if stored:
                print(f"{section}: settings, versions, machine or code differ from those stored; measuring again")
            stored = {"cells": {}}
        planned = dict(cells[section](options))
        found = {name: cell for name, cell in stored["cells"].items() if name in planned}
        kept = len(found)
        results["sections"][section] = stored = {**head, "cells": found}
        for name, measure in planned.items():
            if name in found:
                continue
            seed = (options.seed + zlib.crc32(f"{section} {name}".encode())) % 2**32
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002  # the generator that SciPy and geomstats draw from
            start = time.perf_counter()
            found[name] = measure()
            print(f"{section}: {name}: {time.perf_counter() - start:.1f} s", flush=True)
            write(options.out, results)
        print(f"{section}: {len(found) - kept} cells measured, {kept} kept")
        stored["cells"] = {name: found[name] for name in planned}
        write(options.out, results)
    for section in options.only:
        tables.show(f"vmf-{section}", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
