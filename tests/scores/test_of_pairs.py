"""Scores of pairs against NumPy, closed forms, known laws and extreme inputs."""

import copy
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import special as scipy_special
from sklearn.metrics import roc_auc_score
from torch.func import vmap

import penult
from penult import scores
from penult.bases._radial import log_mass, log_mass_at, radial_table
from penult.scores import density, directional, energy, max_logit, msp
from tiers import thin

FUNCTIONS = (directional, energy, max_logit, msp, density)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def head_of(classes, dim, scale=3.0, dtype=torch.float64):
    g = generator(classes + dim)
    weight = scale * torch.randn(classes, dim, generator=g, dtype=dtype) / dim**0.5
    return penult.Head(weight, torch.randn(classes, generator=g, dtype=dtype))


def elliptic(head, count=400):
    h = torch.randn(count, head.in_features, generator=generator(1), dtype=torch.float64)
    h = h * torch.linspace(0.5, 2, head.in_features) + 1
    return penult.GenerativePair(head, penult.Sphere.fit(head, h.to(head.weight.dtype), shape="elliptic"))


def recomputed(pair, h):
    """The directional score from its formula, in NumPy and SciPy."""
    base, head = pair.base, pair.head
    weight = head.weight.double().numpy()
    weight = weight - weight.mean(0)
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.double().numpy()
    d = weight.shape[1]
    loc = np.zeros(d) if base.loc is None else base.loc.double().numpy()
    tril = np.eye(d) if base.scale_tril is None else base.scale_tril.double().numpy()
    u = np.linalg.solve(tril, (h.double().numpy() - loc).T).T
    radius = np.linalg.norm(u, axis=1)
    norms = np.linalg.norm(weight @ tril, axis=1)
    kappa = radius[:, None] * norms
    nu = d / 2 - 1
    growth = scipy_special.gammaln(nu + 1) + nu * np.log(2 / kappa) + np.log(scipy_special.ive(nu, kappa)) + kappa
    mass = scipy_special.logsumexp(bias + weight @ loc + growth, axis=1)
    logits = scipy_special.logsumexp(h.double().numpy() @ weight.T + bias, axis=1)
    log_area = math.log(2) + d / 2 * math.log(math.pi) - scipy_special.gammaln(d / 2)
    return mass - logits + log_area


@pytest.mark.parametrize(("classes", "dim"), [(2, 2), (3, 5), (10, 64), (1000, 16)])
@pytest.mark.parametrize("shape", ["elliptic", "round"])
def test_directional_is_its_formula(classes, dim, shape):
    head = head_of(classes, dim)
    h = torch.randn(300, dim, generator=generator(2), dtype=torch.float64) + 0.5
    pair = penult.GenerativePair(head, penult.Sphere.fit(head, h, shape=shape))
    found = directional(pair, 2 * h)
    assert np.allclose(found.numpy(), recomputed(pair, 2 * h), atol=1e-6, rtol=1e-9)


def test_usual_scores_are_those_of_numpy():
    head = head_of(10, 32)
    pair, h = elliptic(head), 4 * torch.randn(200, 32, generator=generator(), dtype=torch.float64)
    logits = h.numpy() @ head.weight.numpy().T + head.bias.numpy()
    assert np.allclose(energy(pair, h), -scipy_special.logsumexp(logits, axis=1), atol=1e-9)
    assert np.allclose(max_logit(pair, h), -logits.max(1), atol=1e-9)
    assert np.allclose(msp(pair, h), 1 - scipy_special.softmax(logits, axis=1).max(1), atol=1e-9)
    assert torch.equal(density(pair, h), -pair.log_prob(h))


def test_energy_is_the_model_s_own_and_directional_is_not_moved_by_the_gauge():
    head = head_of(5, 8)
    moved = penult.Head(head.weight + 3, head.bias + 7)
    h = torch.randn(50, 8, generator=generator(), dtype=torch.float64)
    base = penult.Sphere.fit(head, h, shape="elliptic")
    one, other = (penult.GenerativePair(each, base) for each in (head, moved))
    assert torch.allclose(directional(one, h), directional(other, h), atol=1e-9)
    assert torch.allclose(energy(other, h), energy(one, h) - 3 * h.sum(1) - 7, atol=1e-9)


@pytest.mark.parametrize("dim", [2, 3])
def test_directional_is_a_density_of_directions(dim):
    head = head_of(4, dim)
    base = penult.Sphere(torch.tensor([2.0, 5.0], dtype=torch.float64), loc=torch.ones(dim).double())
    pair = penult.GenerativePair(head, base)
    unit = penult.Sphere(torch.ones(1, dtype=torch.float64), loc=torch.zeros(dim).double())
    points, logs = unit.quadrature(200)
    for radius in (0.1, 2.0, 9.0):
        p = (logs - directional(pair, base.loc + radius * points)).logsumexp(0)
        assert abs(float(p)) < 1e-9


def test_auroc_of_two_known_laws():
    # Two classes on a circle, familiar from the pair, strange from the uniform law: both laws of the score are known.
    kappa = 4.0
    head = penult.Head(torch.tensor([[kappa / 2, 0.0], [-kappa / 2, 0.0]], dtype=torch.float64))
    pair = penult.GenerativePair(head, penult.Sphere(torch.tensor([2.0], dtype=torch.float64)))
    familiar, _ = pair.sample((40_000,), generator=generator())
    strange = torch.nn.functional.normalize(torch.randn(40_000, 2, generator=generator(1)).double()) * 2
    # A score falls with |cos|, whose density is cosh(κ cos) over both halves, or flat, in the angle.
    angle = np.linspace(0, np.pi / 2, 200_001)
    p = np.cosh(kappa * np.cos(angle))
    p = p / p.sum()
    exact = float(((np.cumsum(p) - p / 2) / len(angle)).sum())  # P(angle of a familiar one < that of a strange one)
    scores = torch.cat([directional(pair, familiar), directional(pair, strange)])
    measured = roc_auc_score(np.repeat([0, 1], 40_000), scores.numpy())
    assert abs(measured - exact) < 0.01  # five standard errors


@pytest.mark.parametrize("dim", [1, 2, 3, 10, 64, 512, 2048])
@pytest.mark.parametrize("classes", thin([2, 10, 1000], keep=[2, 10]))
def test_table_is_exact_to_a_billionth(dim, classes):
    g = generator(dim)
    norms = 2 * (0.2 * torch.randn(classes, generator=g, dtype=torch.float64)).exp()
    offsets = 3 * torch.randn(classes, generator=g, dtype=torch.float64)
    table = radial_table(dim, norms, offsets)
    radius = torch.empty(2000, dtype=torch.float64).uniform_(-20, 14, generator=g).exp() * dim**0.5
    radius = torch.cat([radius, torch.tensor([0.0, 1e-300]).double()])
    exact = log_mass(dim, norms, offsets, radius)
    error = (log_mass_at(table, radius) - exact).abs() / exact.abs().clamp_min(1)
    assert float(error.max()) < 1e-9


def test_table_far_out_is_that_of_mpmath():
    norms, offsets = torch.tensor([1.0, 1.5]).double(), torch.tensor([0.3, -2.0]).double()
    table = radial_table(3, norms, offsets)
    for radius in (1e-9, 1e3, 1e7, 1e12):
        terms = [
            mpmath.mpf(float(b)) + mpmath.log(mpmath.sinh(rho * radius) / (rho * radius))
            for rho, b in zip((1.0, 1.5), offsets, strict=True)
        ]
        exact = mpmath.log(sum(mpmath.exp(t - max(terms)) for t in terms)) + max(terms)
        found = float(log_mass_at(table, torch.tensor([radius], dtype=torch.float64)))
        assert abs(found - exact) <= 1e-9 * max(1, abs(exact))


def test_table_is_made_once_and_again_when_the_base_changes():
    pair = elliptic(head_of(3, 4))
    h = torch.randn(5, 4, generator=generator(), dtype=torch.float64)
    before = directional(pair, h)
    made = pair._derived["radial table"][1]
    directional(pair, h)
    assert pair._derived["radial table"][1] is made
    pair.base.loc += 1
    after = directional(pair, h)
    assert pair._derived["radial table"][1] is not made
    assert torch.allclose(after.double(), torch.tensor(recomputed(pair, h)), atol=1e-6)
    assert not torch.allclose(before, after)


@pytest.mark.slow
def test_tables_of_buffers_that_were_replaced():
    head = head_of(4, 5)
    pair = elliptic(head)
    h = torch.randn(6, 5, generator=generator(), dtype=torch.float64)
    for _ in range(30):  # a new tensor may have the place in memory of one that is gone
        directional(pair, h), pair.prior
        pair.base.scale_tril = pair.base.scale_tril * 1.1
        pair.base.scale_tril = pair.base.scale_tril * 1.1
        fresh = penult.GenerativePair(head, pair.base)
        assert torch.equal(directional(pair, h), directional(fresh, h))
        assert torch.equal(pair.prior.probs, fresh.prior.probs)


def test_equal_rows():
    pair = penult.GenerativePair(penult.Head(torch.ones(3, 4)), penult.Sphere(2.0))
    found = directional(pair, torch.randn(5, 4, generator=generator()))
    assert torch.allclose(found, torch.full((5,), math.log(2 * math.pi**2)))  # uniform on the sphere in R^4


def test_two_classes_without_data_have_no_directions_to_tell_apart():
    two, three = (penult.GenerativePair(penult.Head(head_of(k, 6).weight)) for k in (2, 3))
    assert scores.usual(two) is energy
    assert scores.usual(three) is directional
    assert scores.usual(elliptic(head_of(2, 6))) is directional


@pytest.mark.parametrize("dim", [3, 2048])
def test_table_of_very_unequal_rows(dim):
    norms = torch.empty(50, dtype=torch.float64).uniform_(0.5, 1.5, generator=generator())
    offsets = torch.zeros(50, dtype=torch.float64)
    norms[0], offsets[0] = 1e3, -1000
    radius = torch.empty(3000, dtype=torch.float64).uniform_(-12, 8, generator=generator()).exp()
    exact = log_mass(dim, norms, offsets, radius)
    error = (log_mass_at(radial_table(dim, norms, offsets), radius) - exact).abs() / exact.abs().clamp_min(1)
    assert float(error.max()) < 1e-9


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients(function):
    pair = elliptic(head_of(5, 6))
    h = torch.randn(3, 6, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(pair, x), h, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(function, dtype):
    pair = elliptic(head_of(10, 64, dtype=torch.float32))
    h = (1 + torch.randn(40, 64, generator=generator())).to(dtype)
    found = function(pair, h)
    assert found.dtype == torch.float32
    exact = function(copy.deepcopy(pair).double(), h.double())
    assert torch.allclose(found.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shapes_devices_of_batches_and_vmap(function):
    pair = elliptic(head_of(5, 6))
    h = torch.randn(2, 7, 6, generator=generator(), dtype=torch.float64)
    found = function(pair, h)
    assert found.shape == (2, 7)
    assert torch.allclose(found[1], function(pair, h[1]), atol=1e-12)
    assert function(pair, h[:, :0]).shape == (2, 0)
    assert torch.allclose(vmap(lambda row: function(pair, row))(h[0]), found[0], atol=1e-12)


@pytest.mark.parametrize("function", thin(FUNCTIONS, keep=[density]))
@pytest.mark.usefixtures("compiler")
def test_whole_graphs_compile(function):
    pair = elliptic(head_of(5, 6))
    h = torch.randn(7, 6, generator=generator(), dtype=torch.float64)
    expected = function(pair, h)
    compiled = torch.compile(lambda x: function(pair, x), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(h), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_extreme_norms(scale):
    head = head_of(10, 16, scale=scale)
    h = torch.randn(500, 16, generator=generator(), dtype=torch.float64) / scale
    pair = penult.GenerativePair(head, penult.Sphere.fit(head, h, shape="elliptic"))
    for function in FUNCTIONS:
        assert bool(function(pair, torch.cat([h, 0 * h[:1], 1e6 * h[:1]])).isfinite().all())
    plain = head_of(10, 16, scale=1.0)
    other = penult.GenerativePair(plain, penult.Sphere.fit(plain, h * scale, shape="elliptic"))
    assert torch.allclose(directional(pair, h), directional(other, h * scale), atol=1e-6)


def test_msp_keeps_digits_where_a_probability_rounds_to_one():
    pair = penult.GenerativePair(penult.Head(torch.eye(3)), penult.Sphere(1.0))
    found = msp(pair, torch.tensor([[40.0, 0.0, 0.0], [60.0, 0.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([2 * math.exp(-40), 2 * math.exp(-60)]), rtol=1e-5)


def test_data_free_pairs_and_subspaces():
    head = head_of(3, 20, dtype=torch.float32)
    pair = penult.GenerativePair(head)
    h = torch.randn(9, 20, generator=generator())
    outside = h + 5 * (torch.eye(20) - head.span().T @ head.span())[0]  # of no account in span(W)
    assert torch.allclose(directional(pair, h), directional(pair, outside), atol=1e-4)


def test_bad_input():
    head = head_of(3, 4)
    sphere = elliptic(head)
    marginal = penult.GenerativePair(head, penult.Marginal(head, penult.bases.Bank(torch.randn(20, 4).double())))
    with pytest.raises(
        TypeError, match=r"base is a Marginal, which has no distribution of directions.*shape='elliptic'"
    ):
        directional(marginal, torch.zeros(1, 4).double())
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            function(sphere, torch.zeros(2, 3, dtype=torch.float64))
        with pytest.raises(TypeError, match="int64"):
            function(sphere, torch.zeros(2, 4, dtype=torch.long))
