"""Sixty-digit truth for the special functions of the sphere, computed by mpmath and kept in tests/data/truth.json.

Tests read the file; a slow test computes it again. ``python tests/truth.py`` writes it, after a change of the grids.
"""

import functools
import itertools
import json
import struct
from pathlib import Path

import mpmath as mp

PATH = Path(__file__).parent / "data" / "truth.json"
DIGITS = 60

DIMS = (1, 2, 3, 4, 5, 10, 41, 42, 64, 512, 2048, 8192)
KAPPAS = (0.0, 1e-8, 1e-3, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e6)
# Pairs of concentrations kp, kp · (1 + step) for divergences.
KL_DIMS = (2, 3, 10, 64, 512, 2048)
KL_KAPPAS = (0.0, 1e-4, 1.0, 50.0, 1e3, 1e6)
KL_STEPS = (1e-9, 1e-4, 0.1, 0.5, 10.0)
SHIFT_DIMS = (2, 3, 8, 64, 512)
SHIFT_KAPPAS = (0.01, 1.0, 30.0, 5e3)


def other_kappa(kappa, step):
    """The concentration that a divergence from ``kappa`` is taken to."""
    return kappa * (1 + step) if kappa else step


def compute_sphere(dim, kappa):
    """F, A, V and 1 − A at one (dim, κ), as mpmath numbers."""
    with mp.workdps(70):
        if kappa == 0:
            return mp.mpf(0), mp.mpf(0), mp.mpf(1) / dim, mp.mpf(1)
        k = mp.mpf(kappa)
        if dim == 1:
            with mp.workdps(70 + int(kappa)):
                return mp.log(mp.cosh(k)), mp.tanh(k), 1 / mp.cosh(k) ** 2, 1 - mp.tanh(k)
        nu = mp.mpf(dim) / 2 - 1
        low = mp.besseli(nu, k, maxterms=10**7)
        high = mp.besseli(nu + 1, k, maxterms=10**7)
        mean = high / low
        value = mp.log(mp.gamma(nu + 1) * (2 / k) ** nu * low)
        return value, mean, 1 - mean * mean - (dim - 1) * mean / k, 1 - mean


def compute_shift(dim, kappa, cosine):
    """∫ (t − A) p(t) dt over cosines t above one, in units of the density there: ``special.cosine_shift``."""

    def weight(angle):
        return mp.sin(angle) ** (dim - 2) * mp.exp(kappa * (mp.cos(angle) - 1))

    with mp.workdps(30):
        mean = compute_sphere(dim, kappa)[1]
        angle = mp.acos(mp.mpf(cosine))
        integral = mp.quad(lambda x: (mp.cos(x) - mean) * weight(x), mp.linspace(0, angle, 24))
        return float(mp.sin(angle) * integral / weight(angle))


def shift_cosines(dim, kappa):
    """Three cosines: in the tail, one standard deviation below the mean, and above it."""
    _, mean, variance, _ = map(float, compute_sphere(dim, kappa))
    sd = variance**0.5
    return max(-0.999, mean - 3 * sd), mean - sd, mean + 0.6 * sd * min(1, (1 - mean) / sd)


def sphere_cells():
    """All (dim, κ) that the tests ask for: those of the grids, and κ as it is in single precision."""
    cells = {(dim, kappa) for dim in DIMS for kappa in KAPPAS if dim > 1 or kappa <= 100}
    cells |= {(dim, struct.unpack("f", struct.pack("f", kappa))[0]) for dim, kappa in cells}
    for dim, kappa, step in itertools.product(KL_DIMS, KL_KAPPAS, KL_STEPS):
        cells |= {(dim, kappa), (dim, other_kappa(kappa, step))}
    return sorted(cells)


def compute():
    """The contents of the file."""
    with mp.workdps(70):
        spheres = {
            str(dim): {
                repr(kappa): [mp.nstr(value, DIGITS) for value in compute_sphere(dim, kappa)] for _, kappa in cells
            }
            for dim, cells in itertools.groupby(sphere_cells(), key=lambda cell: cell[0])
        }
    shifts = [
        [dim, kappa, cosine, compute_shift(dim, kappa, cosine)]
        for dim, kappa in itertools.product(SHIFT_DIMS, SHIFT_KAPPAS)
        for cosine in shift_cosines(dim, kappa)
    ]
    return {"sphere": spheres, "cosine_shift": shifts}


@functools.cache
def table():
    return json.loads(PATH.read_text(encoding="utf-8"))


@functools.cache
def sphere(dim, kappa):
    """F, A, V and 1 − A at one (dim, κ) of the table, as mpmath numbers."""
    assert repr(kappa) in table()["sphere"][str(dim)], f"({dim}, {kappa}) is not in {PATH}; add it to a grid here"
    with mp.workdps(70):
        return tuple(mp.mpf(value) for value in table()["sphere"][str(dim)][repr(kappa)])


def shifts(dim, kappa):
    """Cosines and the values of ``special.cosine_shift`` there."""
    rows = [(cosine, value) for d, k, cosine, value in table()["cosine_shift"] if (d, k) == (dim, kappa)]
    assert rows, f"({dim}, {kappa}) is not in {PATH}; add it to a grid here"
    return rows


def log_area(dim):
    with mp.workdps(40):
        half = mp.mpf(dim) / 2
        return mp.log(2) + half * mp.log(mp.pi) - mp.loggamma(half)


def relative(value, truth):
    return float(abs((mp.mpf(float(value)) - truth) / truth)) if truth else float(abs(value))


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(compute(), indent=0).replace("\n]", "]") + "\n", encoding="utf-8")
