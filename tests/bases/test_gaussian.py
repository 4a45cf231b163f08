import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.covariance import OAS

import penult
from heads import random_head
from penult import Activations, GenerativePair, Head
from penult.bases import Gaussian, Sphere
from penult.testing import check_base, check_pair
from tiers import thin


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some(dim, seed=0, diagonal=False, dtype=torch.float64):
    g = seeded(seed)
    factor = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    covariance = factor @ factor.T / dim + 0.3 * torch.eye(dim, dtype=torch.float64)
    loc = torch.randn(dim, generator=g, dtype=torch.float64)
    return Gaussian(loc, covariance.diagonal() if diagonal else covariance).to(dtype)


# --- laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("dim", [*thin([1, 2, 3, 64], keep=[1, 2]), pytest.param(1280, marks=pytest.mark.long)])
def test_laws(dim, diagonal):
    base = some(dim, seed=dim, diagonal=diagonal)
    report = check_base(base, random_head(3, dim, seed=dim, norm=1.5), samples=50_000 if dim < 1000 else 1_000)
    assert ("integrates to one" in " ".join(law.name for law in report.laws)) == (dim <= 3)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("dim", [2, 64])
def test_laws_for_many_classes_and_in_single_precision(classes, dim):
    head = random_head(classes, dim, seed=classes, norm=2.0)
    samples = 20_000 if classes < 1000 else 2_000
    check_base(some(dim), head, samples=samples)
    single = Head(head.weight.float(), head.bias.float())
    check_base(some(dim, dtype=torch.float32), single, samples=samples)
    check_pair(GenerativePair(head, some(dim)), samples=samples)


class Miscounted(Gaussian):
    """A Gaussian whose log M is off by one per cent."""

    def log_mgf(self, weight):
        return 1.01 * super().log_mgf(weight)


@pytest.mark.parametrize(("classes", "dim"), thin([(2, 2), (3, 3), (10, 64), (1000, 64)], keep=[(2, 2), (3, 3)]))
def test_a_log_m_off_by_one_per_cent_fails(classes, dim):
    base = some(dim)
    head = random_head(classes, dim, norm=2.0)
    with pytest.raises(AssertionError, match="FAIL"):
        check_base(Miscounted(base.loc, base.covariance_matrix), head, samples=20_000 if classes < 1000 else 5_000)


# --- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_against_scipy(dim, diagonal):
    base = some(dim, diagonal=diagonal)
    covariance = base.covariance_matrix if not diagonal else torch.diag(base.covariance_matrix)
    h = torch.randn(4, 5, dim, generator=seeded(1), dtype=torch.float64)
    truth = scipy.stats.multivariate_normal(base.loc.numpy(), covariance.numpy())
    assert torch.allclose(base.log_prob(h), torch.as_tensor(truth.logpdf(h.numpy()).reshape(4, 5)), atol=1e-12)
    w = torch.randn(3, dim, generator=seeded(2), dtype=torch.float64)
    tilt = base.tilt(w)
    for i in range(3):
        moved = scipy.stats.multivariate_normal((base.loc + covariance @ w[i]).numpy(), covariance.numpy())
        ours = base.tilt(w[i]).log_prob(h)
        assert torch.allclose(ours, torch.as_tensor(moved.logpdf(h.numpy()).reshape(4, 5)), atol=1e-11)
    assert torch.allclose(tilt.mean, base.loc + w @ covariance, atol=1e-12)
    assert torch.autograd.gradcheck(base.log_mgf, w.clone().requires_grad_())


def test_the_posterior_is_the_softmax():
    head = random_head(10, 64, seed=3)
    pair = GenerativePair(head, some(64))
    h = torch.randn(50, 64, generator=seeded(), dtype=torch.float64)
    assert (pair.log_joint(h).softmax(-1) - head(h).softmax(-1)).abs().max() < 1e-9


# --- fitting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_fit_recovers_the_pair_that_drew(kind):
    """Where the activations are a pair's own with balanced classes, the label-free fit is its base."""
    d, k = 4, 3
    truth = some(d, diagonal=kind != "full")
    if kind == "spherical":
        truth = Gaussian(truth.loc, torch.full((d,), 0.7, dtype=torch.float64))
    rows = random_head(k, d, seed=2, norm=1.2).centered_weight()
    pair = GenerativePair(Head(rows, -truth.log_mgf(rows)), truth)
    h, _ = pair.sample((200_000,), generator=seeded())
    found = Gaussian.fit(pair.head, h, covariance_type=kind, shrinkage=0.0)
    assert found.covariance_matrix.shape == ((d, d) if kind == "full" else (d,))
    assert torch.allclose(found.covariance_matrix, truth.covariance_matrix, atol=0.03)
    assert torch.allclose(found.loc, truth.loc, atol=0.03)
    again = GenerativePair(pair.head, found)
    assert torch.allclose(again.prior.probs, torch.full((k,), 1 / k, dtype=torch.float64), atol=0.02)


def test_the_tilt_identity_of_the_fit():
    """T = Σ + Σ C Σ, for the covariance T of the activations and C of the rows under the soft labels."""
    head = random_head(6, 9, seed=1, norm=2.0)
    h = torch.randn(3000, 9, generator=seeded(), dtype=torch.float64) @ torch.randn(9, 9, generator=seeded(1)).double()
    base = Gaussian.fit(head, h, shrinkage=0.0)
    p = head(h).softmax(-1).mean(0)
    rows = head.centered_weight()
    spread = (rows * p[:, None]).T @ rows - torch.outer(p @ rows, p @ rows)
    sigma = base.covariance_matrix
    centred = h - h.mean(0)
    assert torch.allclose(sigma + sigma @ spread @ sigma, centred.T @ centred / len(h), atol=1e-9)
    assert torch.allclose(base.loc + sigma @ (p @ rows), h.mean(0), atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "sphere", "elliptic", "span"])
def test_fits_to_activations_on_disk_are_those_in_memory(name, tmp_path):
    head = random_head(5, 12, seed=1, norm=1.5, dtype=torch.float32)
    h = torch.randn(40_000, 12, generator=seeded()) + 1
    stored = Activations(h, head(h)).save(tmp_path / "acts", shard_size=2**18)
    assert len(list((tmp_path / "acts").glob("*.safetensors"))) > 5
    fit = {
        "gaussian": lambda a: Gaussian.fit(head, a),
        "sphere": lambda a: Sphere.fit(head, a),
        "elliptic": lambda a: Sphere.fit(head, a, shape="elliptic"),
        "span": lambda a: Sphere.fit(head, a, shape="elliptic", ambient=False),
    }[name]
    one, two = fit(h), fit(stored)
    for key, value in one.state_dict().items():
        assert torch.allclose(value, two.state_dict()[key], rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activations": torch.zeros(5, 12)}, ValueError, "all 5 activations are equal"),
        ({"activations": torch.randn(1, 12)}, ValueError, r"expected \(N, 12\) with N >= 2"),
        ({"activations": torch.randn(5, 3)}, ValueError, r"shape \(5, 3\); expected \(N, 12\)"),
        ({"activations": torch.full((5, 12), torch.nan)}, ValueError, "5 of 5 rows of activations hold NaN"),
        ({"activations": [1.0]}, TypeError, "activations is a list; expected a floating-point tensor"),
        ({"covariance_type": "tied"}, ValueError, "covariance_type is 'tied'; expected 'full'"),
        ({"shrinkage": 2.0}, ValueError, "shrinkage is 2.0; expected a number from 0 to 1"),
        ({"activations": torch.randn(5, 12), "shrinkage": 0.0}, ValueError, "not positive definite"),
    ],
)
def test_bad_fits(change, error, words):
    arguments = {"activations": torch.randn(50, 12, generator=seeded()), "covariance_type": "full"} | change
    with pytest.raises(error, match=words):
        Gaussian.fit(random_head(3, 12, dtype=torch.float32), **arguments)


@pytest.mark.parametrize(
    ("loc", "covariance", "words"),
    [
        (torch.zeros(2), torch.eye(3), r"\(2,\) and covariance_matrix \(3, 3\)"),
        (torch.zeros(2), torch.tensor([1.0, 0.0]), "diagonal covariance_matrix is 0.0; expected positive entries"),
        (torch.zeros(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "expected a symmetric matrix"),
        (torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "not positive definite"),
        (torch.tensor([0.0, torch.nan]), torch.eye(2), "loc holds .* NaN"),
    ],
)
def test_bad_parameters(loc, covariance, words):
    with pytest.raises(ValueError, match=words):
        Gaussian(loc, covariance)


@pytest.mark.parametrize(("rows", "dims"), [(400, 6), (20, 12), (10, 40), (5, 1)])
def test_oracle_approximating_shrinkage_is_that_of_scikit_learn(rows, dims):
    h = torch.randn(rows, dims, generator=seeded(), dtype=torch.float64) * torch.linspace(0.3, 3, dims).double() + 1
    # A head without slopes leaves the covariance of the activations as it is.
    head = Head(1e-12 * torch.ones(2, dims).double())
    truth = OAS().fit(h.numpy())
    assert np.allclose(Gaussian.fit(head, h, shrinkage="oas").covariance_matrix, truth.covariance_, rtol=1e-6)
    sphere = Sphere.fit(head, h, shape="elliptic", shrinkage="oas")
    assert np.allclose(sphere.scale_tril @ sphere.scale_tril.T, truth.covariance_, rtol=1e-6)


def test_oracle_approximating_shrinkage_of_a_multiple_of_the_identity():
    h = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    base = Gaussian.fit(Head(torch.eye(3).double() * 1e-9), h, shrinkage="oas")
    assert torch.allclose(base.covariance_matrix, torch.eye(3).double() / 3)


# --- a module like any other --------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [True, False])
def test_files_and_state(tmp_path, diagonal):
    head, base = random_head(3, 4), some(4, diagonal=diagonal)
    pair = GenerativePair(head, base)
    again = penult.load(pair.save(tmp_path / "g.penult.safetensors"))
    assert isinstance(again.base, Gaussian)
    h, y = pair.sample((5,), generator=seeded())
    assert torch.equal(again.log_prob(h), pair.log_prob(h))
    assert torch.equal(again.given(y).sample((), seeded()), pair.given(y).sample((), seeded()))
    other = some(4, seed=9, diagonal=diagonal)
    other.load_state_dict(base.state_dict())
    assert torch.equal(other.log_prob(h), base.log_prob(h))
    half = some(4, diagonal=diagonal).bfloat16()
    assert half.covariance_matrix.dtype == torch.float64
    assert "loc=(4,)" in repr(base)
    assert base.info.exact_mgf
