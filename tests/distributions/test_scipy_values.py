"""The von Mises-Fisher law of SciPy, where that is right, and values that its authors published, made by mpmath."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

from penult import VonMisesFisher


def truth(x, loc, kappa):
    """The log density at 40 digits, of exactly these doubles; loc as it is, for a mean that is normalised."""
    with mp.workdps(40):
        d, k = len(loc), mp.mpf(kappa)
        norm = mp.sqrt(sum(mp.mpf(m) ** 2 for m in loc))
        cosine = sum(mp.mpf(a) * mp.mpf(m) for a, m in zip(x, loc, strict=True)) / norm
        nu = mp.mpf(d) / 2 - 1
        constant = nu * mp.log(k) - mp.mpf(d) / 2 * mp.log(2 * mp.pi) - mp.log(mp.besseli(nu, k))
        return float(constant + k * cosine)


POLE = [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("x", "loc", "kappa", "reference"),
    [
        (POLE, POLE, 1e-4, -2.5309242486359573),
        (POLE, [0.0, 0.0, 1.0], 1e-4, -2.5310242486359575),
        (POLE, POLE, 100.0, 2.767293119578746),
        (POLE, [0.0, 0.0, 1.0], 100.0, -97.23270688042125),
        (POLE, POLE, 2000.0, 5.763025393132737),
        (POLE, [0.98**0.5, 0.02**0.5, 0.0], 2000.0, -14.337987284534103),
        ([*POLE, 0.0, 0.0], [*POLE, 0.0, 0.0], 2000.0, 11.526550911307156),
        ([*POLE, 0.0, 0.0], [0.8**0.5, 0.2**0.5, 0.0, 0.0, 0.0], 2000.0, -199.61906708886113),
    ],
)
def test_published_densities(x, loc, kappa, reference):
    p = VonMisesFisher(torch.tensor(loc, dtype=torch.float64), torch.tensor(kappa, dtype=torch.float64))
    found = float(p.log_prob(torch.tensor(x, dtype=torch.float64)))
    assert found == pytest.approx(truth(x, loc, kappa), rel=1e-13)
    assert found == pytest.approx(reference, rel=1e-13)


@pytest.mark.parametrize("dim", [2, 3, 5, 10])
@pytest.mark.parametrize("kappa", [1e-3, 0.7, 10.0, 500.0])
def test_densities_and_entropies_where_scipy_is_right(dim, kappa):
    g = np.random.default_rng(dim)
    loc, x = g.standard_normal(dim), g.standard_normal((20, dim))
    loc, x = loc / np.linalg.norm(loc), x / np.linalg.norm(x, axis=1, keepdims=True)
    theirs, ours = stats.vonmises_fisher(loc, kappa), VonMisesFisher(torch.tensor(loc), torch.tensor(kappa).double())
    found = ours.log_prob(torch.tensor(x)).numpy()
    kappa_ = float(ours.concentration)
    theirs = stats.vonmises_fisher(loc, kappa_)
    assert np.allclose(found, theirs.logpdf(x), rtol=1e-10, atol=1e-10)
    assert float(ours.entropy()) == pytest.approx(theirs.entropy(), abs=1e-9)
    exact = [truth(row, loc, kappa_) for row in x]
    assert np.allclose(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_fits_are_those_of_scipy(dim):
    g = np.random.default_rng(0)
    loc = np.eye(dim)[0]
    x = stats.vonmises_fisher(loc, 30.0, seed=g).rvs(500)
    mean, kappa = stats.vonmises_fisher.fit(x)
    ours = VonMisesFisher.fit(torch.tensor(x))
    assert np.allclose(ours.loc.numpy(), mean, atol=1e-9)
    assert float(ours.concentration) == pytest.approx(kappa, rel=1e-6)


def test_one_law_in_one_dimension_of_angles():
    # on the circle it is von Mises, of which torch and scipy have the density of the angle
    kappa, angle = 3.0, torch.linspace(-3, 3, 13, dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], dim=-1)
    p = VonMisesFisher(torch.tensor([1.0, 0.0]).double(), torch.tensor(kappa).double())
    assert np.allclose(p.log_prob(x).numpy(), stats.vonmises(kappa).logpdf(angle.numpy()), atol=1e-12)
    other = torch.distributions.VonMises(torch.tensor(0.0).double(), torch.tensor(kappa).double())
    assert torch.allclose(p.log_prob(x), other.log_prob(angle), atol=1e-6)
    assert math.isclose(float(p.mean[0]), float(mp.besseli(1, kappa) / mp.besseli(0, kappa)), rel_tol=1e-12)
