"""Sixty-digit truth for the special functions of the sphere, by mpmath."""

import functools

import mpmath as mp


@functools.cache
def sphere(dim, kappa):
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


def log_area(dim):
    with mp.workdps(40):
        half = mp.mpf(dim) / 2
        return mp.log(2) + half * mp.log(mp.pi) - mp.loggamma(half)


def relative(value, truth):
    return float(abs((mp.mpf(float(value)) - truth) / truth)) if truth else float(abs(value))
