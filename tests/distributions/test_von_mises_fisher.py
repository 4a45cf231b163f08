import contextlib
import math
import sys
from types import SimpleNamespace

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, kl_divergence, transform_to

from penult import special
from penult.distributions import VonMisesFisher, sphere
from tiers import thin
from truth import KL_DIMS, KL_KAPPAS, KL_STEPS, log_area, other_kappa
from truth import sphere as exact

normalize = torch.nn.functional.normalize


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def direction(*shape, seed=0, dtype=torch.float64):
    return normalize(torch.randn(*shape, generator=seeded(seed), dtype=dtype), dim=-1)


def law(dim, kappa, dtype=torch.float64, seed=0):
    return VonMisesFisher(direction(dim, seed=seed, dtype=dtype), torch.tensor(kappa, dtype=dtype))


def complement(p, x):
    return 0.5 * (x - p.loc).square().sum(-1).double()


# --- density ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", thin([2, 3, 10, 64, 512, 2048, 8192], keep=[2, 3, 10, 64, 512, 2048]))
@pytest.mark.parametrize("kappa", [0.0, 1e-8, 1.0, 100.0, 1e6])
def test_log_prob_against_mpmath(dim, kappa):
    p = law(dim, kappa)
    x = normalize(p.loc + 0.1 * direction(5, dim, seed=1), dim=-1)
    with mp.workdps(40):
        truth = [
            -(log_area(dim) + exact(dim, kappa)[0])
            + mp.mpf(kappa)
            * (1 - sum((mp.mpf(a) - mp.mpf(b)) ** 2 for a, b in zip(row, p.loc.tolist(), strict=True)) / 2)
            for row in x.tolist()
        ]
    for got, want in zip(p.log_prob(x).tolist(), truth, strict=True):
        assert abs(got - want) <= 2e-13 * max(1, abs(want), kappa)


@pytest.mark.parametrize("dim", [2, 3, 64, 2048])
@pytest.mark.parametrize("kappa", [0.5, 50.0, 1e4])
def test_single_precision_log_prob_and_gradients(dim, kappa):
    p = law(dim, kappa, dtype=torch.float32)
    x = p.sample((20,), generator=seeded()).requires_grad_()
    k = p.concentration.clone().requires_grad_()
    value = VonMisesFisher(p.loc, k).log_prob(x)
    assert value.dtype == torch.float32
    wide = VonMisesFisher(p.loc.double(), p.concentration.double(), validate_args=False)
    truth = wide.log_prob(x.detach().double())
    assert bool(((value.detach().double() - truth).abs() <= 2e-7 * truth.abs().clamp_min(1)).all())
    grad_x, grad_k = torch.autograd.grad(value.sum(), (x, k))
    assert torch.allclose(grad_x, -kappa * (x.detach() - p.loc), rtol=1e-6, atol=1e-6 * kappa)
    y = 0.5 * (x.detach().double() - p.loc.double()).square().sum(-1)
    want = (special.mean_resultant_deficit(dim, p.concentration.double()) - y).sum()
    assert float(grad_k) == pytest.approx(float(want), rel=2e-7)


def test_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        p = VonMisesFisher(direction(8).to(dtype), torch.tensor(20.0, dtype=dtype))
        x = p.sample((50,), generator=seeded())
        assert x.dtype == p.log_prob(x).dtype == p.mean.dtype == p.entropy().dtype == dtype
        assert bool(p.log_prob(x).isfinite().all())


@pytest.mark.parametrize("dim", thin([2, 3, 5, 64], keep=[2, 3]))
def test_gradcheck_of_log_prob(dim):
    loc, kappa = direction(3, dim), torch.tensor([0.2, 4.0, 60.0], dtype=torch.float64)
    x = direction(2, 3, dim, seed=1)

    def f(mu, k, y):
        return VonMisesFisher(mu, k, validate_args=False).log_prob(y)

    inputs = tuple(t.clone().requires_grad_() for t in (loc, kappa, x))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.slow
def test_compiles_and_maps():
    loc, kappa, x = direction(3, 8), torch.tensor([0.0, 4.0, 60.0], dtype=torch.float64), direction(5, 3, 8, seed=1)
    plain = VonMisesFisher(loc, kappa).log_prob(x)

    def f(mu, k, y):
        return VonMisesFisher(mu, k).log_prob(y)

    torch._dynamo.reset()
    assert torch.allclose(torch.compile(f, fullgraph=True, backend="aot_eager")(loc, kappa, x), plain)
    assert torch.allclose(torch.func.vmap(f, in_dims=(None, None, 0))(loc, kappa, x), plain)
    assert torch.allclose(torch.func.vmap(f, in_dims=(0, 0, 1), out_dims=1)(loc, kappa, x), plain)
    gradient = torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(0, 0, 0))(loc, kappa, x[0])
    assert bool(gradient.isfinite().all())


@pytest.mark.slow
def test_compiles_in_several_dimensions():
    torch._dynamo.reset()
    compiled = torch.compile(lambda mu, k, x: VonMisesFisher(mu, k).log_prob(x), fullgraph=True, backend="aot_eager")
    for dim in (8, 16, 70, 90):
        p, x = law(dim, 3.0), direction(4, dim, seed=1)
        assert torch.allclose(compiled(p.loc, p.concentration, x), p.log_prob(x))


def test_sampling_inside_a_transform_says_why_not():
    with pytest.raises(RuntimeError, match=r"inside a torch\.func transform.*Sample outside"):
        torch.func.vmap(lambda mu: VonMisesFisher(mu, torch.tensor(2.0)).sample())(direction(3, 5))


def test_generator_by_position():
    p = law(4, 2.0)
    assert torch.equal(p.sample((3,), seeded()), p.sample((3,), generator=seeded()))


def test_uniform_law_at_zero():
    p = law(5, 0.0)
    x = direction(4, 5, seed=2)
    assert torch.allclose(p.log_prob(x), torch.full((4,), -special.log_sphere_area(5), dtype=torch.float64))
    assert torch.equal(p.mean, torch.zeros(5, dtype=torch.float64))
    assert torch.allclose(p.variance, torch.full((5,), 0.2, dtype=torch.float64))


# --- samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", thin([0.0, 1.0, 50.0, 1e3, 1e6], keep=[0.0, 50.0]))
@pytest.mark.parametrize("dim", thin([2, 3, 4, 5, 10, 31, 32, 64, 512, 2048], keep=[2, 3, 64, 512]))
def test_samples_follow_the_exact_law(dim, kappa, dtype):
    p = law(dim, kappa, dtype=dtype, seed=dim)
    n = 20_000 if dim <= 64 else 3_000
    x = p.sample((n,), generator=seeded(dim + 1))
    assert x.dtype == dtype
    assert float((torch.linalg.vector_norm(x, dim=-1) - 1).abs().max()) <= 5 * torch.finfo(dtype).eps
    y = complement(p, x)
    k = p.concentration.double()
    assert stats.kstest(special.cosine_cdf(dim, k, 1 - y, y).numpy(), "uniform").pvalue > 1e-4
    mean, sd = special.mean_resultant_deficit(dim, k), special.cosine_variance(dim, k).sqrt()
    assert abs(float((y.mean() - mean) / sd)) * math.sqrt(n) < 4
    # around the mean: mean zero, and by symmetry no direction preferred
    across = x.double() - (x.double() @ p.loc.double()).unsqueeze(-1) * p.loc.double()
    across = across / torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    z2 = float(across.mean(0).square().sum()) * n * (dim - 1) / 1.0
    assert stats.chi2.sf(z2, dim - 1) > 1e-4 if dim > 2 else abs(float(across[:, 0].sign().mean())) * math.sqrt(n) < 4


@pytest.mark.parametrize("shift", [0.0, 1e-8, -1e-8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dim", [2, 3, 40])
def test_means_on_and_next_to_the_axes(dim, sign, shift):
    loc = torch.zeros(2 * dim, dim, dtype=torch.float64)
    loc[torch.arange(dim), torch.arange(dim)] = sign
    loc[torch.arange(dim) + dim, torch.arange(dim)] = sign
    loc[torch.arange(dim) + dim, (torch.arange(dim) + 1) % dim] += shift
    kappa = torch.tensor(30.0, dtype=torch.float64).requires_grad_()
    for dtype in (torch.float32, torch.float64):
        p = VonMisesFisher(loc.to(dtype), kappa.to(dtype))
        x = p.rsample((200,), generator=seeded())
        assert bool(x.isfinite().all())
        assert bool(p.log_prob(x).isfinite().all())
        (gradient,) = torch.autograd.grad(x.sum(), kappa)
        assert bool(gradient.isfinite())


def test_concentrated_samples_keep_their_distance_from_the_mean():
    for dim in (2, 3, 64):
        p = law(dim, 1e6, dtype=torch.float32)
        y = complement(p, p.sample((50_000,), generator=seeded()))
        want = float(special.mean_resultant_deficit(dim, torch.tensor(1e6, dtype=torch.float64)))
        assert float(y.mean()) == pytest.approx(want, rel=0.05 if dim < 64 else 0.01)
        assert len(y.unique()) > 40_000


def test_batches_of_different_parameters():
    loc, kappa = direction(1000, 16, dtype=torch.float32), torch.logspace(-2, 4, 1000)
    p = VonMisesFisher(loc, kappa)
    x = p.sample((200,), generator=seeded())
    assert x.shape == (200, 1000, 16)
    y = complement(p, x)
    z = (y.mean(0) - special.mean_resultant_deficit(16, kappa.double())) / special.cosine_variance(
        16, kappa.double()
    ).sqrt()
    z = z * math.sqrt(200)
    assert float(z.std()) == pytest.approx(1, abs=0.1)
    assert stats.kstest(special.cosine_cdf(16, kappa.double(), 1 - y, y).flatten().numpy(), "uniform").pvalue > 1e-4


def test_batches_larger_than_a_block():
    loc, kappa = direction(700, 2048, dtype=torch.float32), torch.full((700,), 300.0)
    p = VonMisesFisher(loc, kappa)
    y = complement(p, p.sample((2,), generator=seeded()))
    assert stats.kstest(special.cosine_cdf(2048, kappa.double(), 1 - y, y).flatten().numpy(), "uniform").pvalue > 1e-4


def test_broadcast_batches_share_no_randomness():
    p = VonMisesFisher(direction(4), torch.tensor([3.0, 3.0], dtype=torch.float64))
    x = p.sample((1000,), generator=seeded())
    assert x.shape == (1000, 2, 4)
    assert not torch.equal(x[:, 0], x[:, 1])


def test_sampling_ends_on_bad_parameters():
    p = VonMisesFisher(direction(5), torch.tensor(math.nan, dtype=torch.float64), validate_args=False)
    assert bool(p.sample((10,), generator=seeded()).isnan().all())


def test_default_generator_and_rng_state():
    p = law(6, 5.0)
    state = torch.random.get_rng_state()
    p.sample((10,), generator=seeded())
    p.log_prob(p.loc)
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = p.sample((4,))
        torch.manual_seed(3)
        assert torch.equal(first, p.sample((4,)))


# --- pathwise gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "kappa", "truth"),
    [
        (5, 2.0, 0.1473887),
        (8, 5.0, 0.0632898),
        (64, 10.0, 0.0145941),
        (2, 1.0, None),
        (3, 0.0, None),
        (512, 100.0, None),
        (2, 0.0, None),
        (10, 1e4, None),
    ],
)
def test_rsample_is_unbiased_in_the_concentration(dim, kappa, truth):
    n = 100_000 if dim < 500 else 10_000
    k = torch.full((n,), kappa, dtype=torch.float64, requires_grad=True)
    p = VonMisesFisher(direction(dim), k)
    x = p.rsample(generator=seeded())
    (slope,) = torch.autograd.grad((x @ p.loc[0]).sum(), k)
    want = float(special.cosine_variance(dim, k.detach()[:1]))
    if truth is not None:
        assert want == pytest.approx(truth, abs=6e-8)
    assert abs(float(slope.mean()) - want) / float(slope.std()) * math.sqrt(n) < 4


def test_rsample_gradient_in_the_mean_direction():
    # d/dμ E[a·x] = A a, projected on the tangent space
    loc = direction(6).requires_grad_()
    a = direction(6, seed=5)
    n = 200_000
    x = VonMisesFisher(loc, torch.tensor(7.0, dtype=torch.float64)).rsample((n,), generator=seeded())
    (gradient,) = torch.autograd.grad((x @ a).mean(), loc)
    mu = loc.detach()
    want = special.mean_resultant_length(6, torch.tensor(7.0, dtype=torch.float64)) * (a - (a @ mu) * mu)
    assert torch.allclose(gradient, want, atol=6e-3)
    assert abs(float(gradient @ mu)) < 1e-12


def test_rsample_in_single_precision_and_expanded():
    loc = direction(2, 7, dtype=torch.float32).requires_grad_()
    kappa = torch.tensor([3.0, 1e6], requires_grad=True)
    x = VonMisesFisher(loc, kappa).expand((4, 2)).rsample((3,), generator=seeded())
    assert x.shape == (3, 4, 2, 7)
    gradients = torch.autograd.grad(x.sum(), (loc, kappa))
    assert all(g.shape == p.shape and bool(g.isfinite().all()) for g, p in zip(gradients, (loc, kappa), strict=True))


# --- entropy, divergence, moments ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "kappa"), [(2, 1.0), (3, 20.0), (10, 0.0), (64, 30.0), (2048, 500.0)])
def test_entropy_against_samples(dim, kappa):
    p = law(dim, kappa)
    n = 20_000 if dim < 100 else 2_000
    surprise = -p.log_prob(p.sample((n,), generator=seeded()))
    error = float(surprise.std()) / math.sqrt(n) + 1e-9
    assert abs(float(surprise.mean() - p.entropy())) / error < 4


@pytest.mark.parametrize("dim", thin(KL_DIMS, keep=[2, 64]))
@pytest.mark.parametrize("kp", thin(KL_KAPPAS, keep=[0.0, 1.0, 1e3]))
@pytest.mark.parametrize("step", KL_STEPS)
def test_kl_against_mpmath(dim, kp, step):
    kq = other_kappa(kp, step)
    p, q = law(dim, kp), law(dim, kq)
    with mp.workdps(70):
        fp, a = exact(dim, kp)[:2]
        truth = exact(dim, kq)[0] - fp - a * (mp.mpf(kq) - mp.mpf(kp))
    got = float(kl_divergence(p, q))
    assert got >= 0
    assert abs(got - truth) <= 1e-12 * truth


def test_kl_between_directions_and_to_itself():
    p, q = law(10, 30.0), law(10, 12.0, seed=1)
    x = p.sample((200_000,), generator=seeded())
    ratio = p.log_prob(x) - q.log_prob(x)
    assert abs(float(ratio.mean() - kl_divergence(p, q))) / (float(ratio.std()) / math.sqrt(len(x))) < 4
    assert float(kl_divergence(p, p)) == 0
    nearly = VonMisesFisher(normalize(p.loc + 1e-9 * direction(10, seed=4), dim=-1), p.concentration * (1 + 1e-12))
    assert 0 <= float(kl_divergence(p, nearly)) < 1e-15
    single = VonMisesFisher(p.loc.float(), torch.tensor(30.0)), VonMisesFisher(p.loc.float(), torch.tensor(30.00001))
    assert float(kl_divergence(*single)) >= 0
    with pytest.raises(ValueError, match="different spheres"):
        kl_divergence(p, law(9, 1.0))


def test_kl_is_differentiable():
    loc = direction(5)

    def f(kp, kq):
        return kl_divergence(VonMisesFisher(loc, kp), VonMisesFisher(loc, kq))

    kp = torch.tensor([0.5, 3.0, 100.0], dtype=torch.float64, requires_grad=True)
    kq = torch.tensor([0.6, 9.0, 101.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (kp, kq))


def test_moments_against_samples():
    p = law(4, 6.0)
    x = p.sample((400_000,), generator=seeded())
    assert torch.allclose(x.mean(0), p.mean, atol=4e-3)
    assert torch.allclose(x.var(0), p.variance, atol=3e-3)
    assert torch.equal(p.mode, p.loc)


# --- fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", thin([2, 3, 64, 512], keep=[2, 64]))
@pytest.mark.parametrize("kappa", [5.0, 200.0, 1e6])
def test_fit_recovers_parameters(dim, kappa):
    p = law(dim, kappa)
    fitted = VonMisesFisher.fit(p.sample((20_000,), generator=seeded()))
    error = 1 / math.sqrt(20_000 * float(special.cosine_variance(dim, p.concentration)))
    assert abs(float(fitted.concentration) - kappa) < 5 * error + 0.5 * dim**2 / 20_000 / max(kappa, 1) * 10
    assert float(fitted.loc @ p.loc) > 1 - 50 * dim / 20_000 / kappa


def test_fit_is_the_maximum_of_the_weighted_likelihood():
    x, w = direction(50, 5), torch.rand(50, generator=seeded(), dtype=torch.float64)
    p = VonMisesFisher.fit(x, w)
    best = (w * p.log_prob(x)).sum()
    for factor in (0.99, 1.01):
        assert (w * VonMisesFisher(p.loc, p.concentration * factor).log_prob(x)).sum() < best
    doubled = VonMisesFisher.fit(torch.cat([x, x[:10]]), None)
    weighted = VonMisesFisher.fit(x, torch.cat([torch.full((10,), 2.0), torch.ones(40)]))
    assert torch.allclose(doubled.concentration, weighted.concentration)
    batch = VonMisesFisher.fit(x.reshape(25, 2, 5))
    assert batch.batch_shape == (2,)
    assert torch.allclose(batch.concentration[1], VonMisesFisher.fit(x[1::2]).concentration)


def test_fit_of_opposite_points_is_uniform():
    p = VonMisesFisher.fit(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert float(p.concentration) == 0


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (torch.zeros(0, 3), None, r"shape \(0, 3\)"),
        (torch.ones(4), None, r"expected \(N"),
        (torch.ones(4, 3), None, "Normalise them first"),
        (torch.eye(3), torch.tensor([-1.0, 1.0, 1.0]), "non-negative"),
        (torch.eye(3), torch.zeros(3), "positive sum"),
        (torch.eye(3), torch.ones(2), "weights has shape"),
        (torch.eye(3)[:1], None, "coincide"),
        (torch.full((3, 2), math.nan), None, "Normalise"),
    ],
)
def test_fit_refuses(x, weights, message):
    with pytest.raises(ValueError, match=message):
        VonMisesFisher.fit(x, weights)


# --- the contract of torch.distributions --------------------------------------------------------------------


def test_works_inside_other_distributions():
    p = VonMisesFisher(direction(3, 5), torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64))
    mixture = MixtureSameFamily(Categorical(logits=torch.zeros(3, dtype=torch.float64)), p)
    assert mixture.log_prob(direction(7, 5, seed=1)).shape == (7,)
    product = Independent(p, 1)
    assert product.batch_shape == ()
    assert product.event_shape == (3, 5)
    assert product.log_prob(p.sample((2,), generator=seeded())).shape == (2,)
    assert torch.allclose(product.entropy(), p.entropy().sum())


@pytest.mark.usefixtures("validation")
def test_sphere_constraint():
    assert bool(sphere.check(direction(4, 6)).all())
    assert not bool(sphere.check(torch.tensor([1.0, 0.1])))
    assert not bool(sphere.check(torch.tensor([1.1, 0.0], dtype=torch.bfloat16)))
    assert bool(sphere.check(direction(50, 512).bfloat16()).all())
    assert torch.allclose(
        torch.linalg.vector_norm(transform_to(sphere)(torch.randn(4, 3, generator=seeded())), dim=-1), torch.ones(4)
    )
    assert repr(sphere) == "Sphere()"
    with pytest.raises(ValueError, match="within the support"):
        law(3, 1.0).log_prob(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


def test_repr_and_expand():
    p = law(3, 2.0).expand((4, 2))
    assert p.batch_shape == (4, 2)
    assert "VonMisesFisher" in repr(p)
    assert p.sample((5,), generator=seeded()).shape == (5, 4, 2, 3)


@pytest.mark.parametrize(
    ("loc", "kappa", "message"),
    [
        (torch.ones(1), torch.tensor(1.0), "d >= 2"),
        (torch.tensor(1.0), torch.tensor(1.0), "d >= 2"),
        (torch.tensor([1.0, 0.0]), torch.tensor(-1.0), "value -1 .*at least 0"),
        (torch.tensor([1.0, 0.0]), torch.tensor(math.inf), "finite"),
        (torch.tensor([1.0, 0.0]), torch.tensor(math.nan), "finite"),
        (torch.tensor([1.0, 1.0]), torch.tensor(1.0), "norm 1.41421.*Normalise"),
        (torch.tensor([math.nan, 1.0]), torch.tensor(1.0), "unit vectors"),
        (torch.eye(3), torch.ones(2), "do not broadcast"),
    ],
)
@pytest.mark.usefixtures("validation")
def test_bad_parameters(loc, kappa, message):
    with pytest.raises(ValueError, match=message):
        VonMisesFisher(loc, kappa)


def test_bad_types():
    with pytest.raises(TypeError, match=r"loc is a torch\.int64 tensor; expected a floating-point tensor"):
        VonMisesFisher(torch.tensor([1, 0]), torch.tensor(1.0))
    with pytest.raises(TypeError, match="concentration is a float; expected a floating-point tensor"):
        VonMisesFisher(torch.tensor([1.0, 0.0]), 1.0)


# ---- switches and shapes as torch has them ------------------------------------------------------------------


@pytest.mark.parametrize("switch", [True, False])
def test_torchs_switch_of_validation_is_followed(switch):
    Distribution.set_default_validate_args(switch)
    context = pytest.raises(ValueError, match=r"norm|support") if switch else contextlib.nullcontext()
    with context:
        VonMisesFisher(torch.tensor([0.0, 2.0]), torch.tensor(1.0))
    with context:
        VonMisesFisher(torch.tensor([0.0, 1.0]), torch.tensor(1.0)).log_prob(torch.tensor([0.0, 1.1]))
    with pytest.raises(ValueError, match="norm"):
        VonMisesFisher(torch.tensor([0.0, 2.0]), torch.tensor(1.0), validate_args=True)


# torch.compile turns the switch off by a cached function, whose names are not public.
APPLIED = SimpleNamespace(cache_info=lambda: SimpleNamespace(currsize=1))


@pytest.mark.parametrize(
    ("patcher", "validates"),
    [
        (SimpleNamespace(patch=APPLIED), True),
        (SimpleNamespace(patch=SimpleNamespace(cache_info=lambda: SimpleNamespace(currsize=0))), False),
        (SimpleNamespace(patch=lambda: None), False),
        (SimpleNamespace(patch=SimpleNamespace(cache_info=lambda: ())), False),
        (SimpleNamespace(), False),
        (None, False),
    ],
)
def test_a_switch_that_the_compiler_turned_off_is_ignored_where_torch_shows_it(patcher, validates, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo.eval_frame", SimpleNamespace(TorchPatcher=patcher))
    assert special._validates_by_default() is True
    Distribution.set_default_validate_args(False)
    assert special._validates_by_default() is validates


def test_an_integer_is_a_shape():
    p = VonMisesFisher(torch.eye(3), torch.ones(3))
    assert p.sample(7).shape == p.rsample(7).shape == (7, 3, 3)
    assert p.sample(np.int64(2)).shape == (2, 3, 3)
    assert VonMisesFisher(torch.eye(3)[0], torch.tensor(1.0)).expand(4).batch_shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e30])
def test_vectors_of_any_size_are_carried_to_the_sphere(size, dtype):
    x = (size * torch.tensor([[3.0, 4.0], [0.0, -1.0]], dtype=torch.float64)).to(dtype).requires_grad_()
    y = transform_to(sphere)(x)
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [0.0, -1.0]], dtype=dtype))
    y[:, 0].sum().backward()
    torch.testing.assert_close(x.grad * size, torch.tensor([[0.128, -0.096], [1.0, 0.0]], dtype=dtype))


def test_zero_is_carried_to_the_first_axis():
    y = transform_to(sphere)(torch.zeros(2, 3))
    assert torch.equal(y, torch.tensor([[1.0, 0.0, 0.0]]).expand(2, 3))
