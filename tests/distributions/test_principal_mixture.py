import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from penult.distributions import PrincipalMixture, _mixture_fit
from penult.processes import Processes
from penult.testing import check_distribution


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def law(d=5, m=2, c=3, s=0.5, rectified=False, dtype=torch.float64, seed=0, apart=2.0):
    g = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    plane = torch.linalg.qr(normal(d, m)).Q.mT
    tril = 0.3 * normal(c, m, m).tril(-1) + torch.diag_embed(0.5 + torch.rand(c, m, generator=g, dtype=torch.float64))
    given = (normal(d), plane, normal(c), apart * normal(c, m), tril, torch.tensor(s))
    return PrincipalMixture(*(part.to(dtype) for part in given), rectified=rectified)


def dense(p):
    """The same law by torch's own mixture of full covariances in R^d."""
    d, plane = len(p.loc), p.components
    across = p.residual_scale**2 * (torch.eye(d, dtype=plane.dtype) - plane.mT @ plane)
    covariance = plane.mT @ p.scale_tril @ p.scale_tril.mT @ plane + across
    return MixtureSameFamily(
        Categorical(logits=p.logits), MultivariateNormal(p.loc + p.means @ plane, (covariance + covariance.mT) / 2)
    )


def z_scores(samples, truth):
    return (samples.mean(0) - truth).abs() / (samples.std(0) / math.sqrt(len(samples)) + 1e-12)


# --- the law ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "m", "c"), [(1, 1, 1), (2, 1, 3), (3, 3, 2), (5, 2, 3), (20, 6, 10), (64, 24, 30)])
def test_contract_of_torch(d, m, c):
    assert check_distribution(law(d, m, c), samples=5_000).passed
    assert check_distribution(law(d, m, c, dtype=torch.float32), samples=5_000).passed


@pytest.mark.parametrize(("d", "m", "c"), [(1, 1, 2), (4, 1, 3), (5, 2, 3), (6, 6, 4), (30, 8, 12)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_log_prob_against_torch(d, m, c, scale):
    p = law(d, m, c, s=0.3)
    x = p.loc + scale * torch.randn(4, 7, d, generator=seeded(1), dtype=torch.float64)
    assert torch.allclose(p.log_prob(x), dense(p).log_prob(x), rtol=1e-9, atol=1e-9)
    single = law(d, m, c, s=0.3, dtype=torch.float32)
    assert single.log_prob(x.float()).dtype == torch.float32
    assert torch.allclose(single.log_prob(x.float()).double(), dense(p).log_prob(x), rtol=2e-5, atol=1e-4)
    half = law(d, m, c, s=0.3, dtype=torch.bfloat16)
    wide = PrincipalMixture(*(getattr(half, name).double() for name in half.arg_constraints), validate_args=False)
    assert torch.allclose(half.log_prob(x.bfloat16()).double(), wide.log_prob(x.bfloat16().double()), rtol=1e-2)


def test_integrates_to_one():
    line = torch.linspace(-25, 25, 4001, dtype=torch.float64)
    assert float(torch.trapezoid(law(1, 1, 3).log_prob(line.unsqueeze(-1)).exp(), line)) == pytest.approx(1, abs=1e-9)
    grid = torch.linspace(-15, 15, 601, dtype=torch.float64)
    for m in (1, 2):
        values = law(2, m, 3).log_prob(torch.cartesian_prod(grid, grid)).exp().reshape(601, 601)
        assert float(torch.trapezoid(torch.trapezoid(values, grid), grid)) == pytest.approx(1, abs=1e-9)


def test_log_prob_gradients():
    p = law(4, 2, 3)

    def f(x, *given):
        return PrincipalMixture(x.new_zeros(4), p.components, *given, validate_args=False).log_prob(x)

    leaves = [
        part.detach().clone().requires_grad_() for part in (p.logits, p.means, p.scale_tril.tril(), p.residual_scale)
    ]
    x = p.sample((3,), generator=seeded()).requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *leaves))
    mapped = torch.func.vmap(torch.func.grad(p.log_prob))(x.detach())
    (direct,) = torch.autograd.grad(p.log_prob(x).sum(), x)
    assert torch.allclose(mapped, direct)


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize(("d", "m", "s"), [(5, 2, 0.5), (4, 4, 0.5), (12, 3, 0.0), (30, 8, 1.0)])
def test_moments_against_samples(d, m, s, rectified):
    p = law(d, m, 4, s=s, rectified=rectified)
    x = p.sample((50_000,), generator=seeded())
    assert float(z_scores(x, p.mean).max()) < 4.5
    assert float(z_scores((x - p.mean).square(), p.variance).max()) < 4.5


def test_covariance_of_samples():
    p = law(5, 2, 3)
    weight, centre = p.logits.softmax(-1), p.loc + p.means @ p.components
    off = (centre - p.mean) * weight.sqrt().unsqueeze(-1)
    within = (dense(p).component_distribution.covariance_matrix * weight[:, None, None]).sum(0)
    x = p.sample((50_000,), generator=seeded()) - p.mean
    products = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(1)
    assert float(z_scores(products, (within + off.mT @ off).flatten()).max()) < 4.5


def test_draws_follow_the_mixture():
    # a wrong pairing of means, factors or weights shows here and not in the mean
    p = law(6, 3, 5, apart=4.0)
    x = p.sample((50_000,), generator=seeded())
    u = (x - p.loc) @ p.components.mT
    joint = p.logits.log_softmax(-1) + MultivariateNormal(p.means, scale_tril=p.scale_tril).log_prob(u.unsqueeze(-2))
    assert float(z_scores(joint.softmax(-1), p.logits.softmax(-1)).max()) < 4.5
    rest = (x - p.loc - u @ p.components).square().sum(-1, keepdim=True)
    assert float(z_scores(rest, 3 * p.residual_scale**2).max()) < 4.5


def test_rectified_zeros_follow_the_normal_cdf():
    p = law(8, 3, 4, rectified=True)
    x = p.sample((50_000,), generator=seeded())
    spread = dense(p).component_distribution.variance.sqrt()
    share = p.logits.softmax(-1) @ Normal(0.0, 1.0).cdf(-(p.loc + p.means @ p.components) / spread)
    assert float(((x == 0).double().mean(0) - share).abs().max() / math.sqrt(0.25 / len(x))) < 4.5
    assert bool((x >= 0).all())
    assert bool(p.support.check(x).all())
    raw = PrincipalMixture(*(getattr(p, name) for name in p.arg_constraints))
    assert torch.equal(raw.sample((100,), generator=seeded()).clamp_min(0), p.sample((100,), generator=seeded()))


@pytest.mark.parametrize("ratio", [-30.0, -5.0, -1.0, 0.0, 2.0, 9.0, 1e4, 1e8])
def test_rectified_moments_in_the_tails(ratio):
    one = torch.ones(1, 1, dtype=torch.float64)
    given = (one[0], one, one[0], one * (ratio - 1), one.unsqueeze(0), one[0, 0])
    p = PrincipalMixture(*given, rectified=True)
    x = torch.linspace(max(0.0, ratio - 12), max(ratio, 0.0) + 12, 200_001, dtype=torch.float64)
    x = torch.linspace(0.0, 6.0, 200_001, dtype=torch.float64) if ratio < -2 else x
    weight = Normal(ratio, 1.0, validate_args=False).log_prob(x).exp()
    first = torch.trapezoid(weight * x, x)
    zero = Normal(0.0, 1.0).cdf(torch.tensor(-ratio, dtype=torch.float64))
    second = torch.trapezoid(weight * (x - first).square(), x) + zero * first.square()
    assert float(p.mean) == pytest.approx(float(first), rel=1e-6)
    assert float(p.variance) == pytest.approx(float(second), rel=1e-6)


def test_a_constant_coordinate():
    plane = torch.tensor([[1.0, 0.0, 0.0]])
    given = (torch.tensor([0.0, 2.0, -1.0]), plane, torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
    p = PrincipalMixture(*given, torch.tensor(0.0), rectified=True)
    assert torch.allclose(p.mean, torch.tensor([1 / math.sqrt(2 * math.pi), 2.0, 0.0]))
    assert torch.allclose(p.variance, torch.tensor([0.5 - 0.5 / math.pi, 0.0, 0.0]))


def test_no_density_says_so():
    for p, why in ((law(rectified=True), "atoms at zero.*rectified=False"), (law(s=0.0), "residual_scale is 0")):
        assert not p.has_density
        with pytest.raises(ValueError, match=f"has no density.*{why}"):
            p.log_prob(p.loc)
        assert p.sample((3,), generator=seeded()).shape == (3, 5)
    full = law(3, 3, s=0.0)
    assert full.has_density
    assert torch.allclose(full.log_prob(full.loc), law(3, 3, s=2.0).log_prob(full.loc))  # ignored, as documented


# --- the contract of torch.distributions --------------------------------------------------------------------


def test_expand_and_repr():
    p = law().expand((4, 2))
    assert p.batch_shape == (4, 2)
    assert p.mean.shape == p.variance.shape == (4, 2, 5)
    x = p.sample((3,), generator=seeded())
    assert x.shape == (3, 4, 2, 5)
    assert torch.equal(p.log_prob(x), law().log_prob(x))
    assert p.log_prob(x[0, 0, 0]).shape == (4, 2)
    assert len(x.flatten(0, -2).unique(dim=0)) == 24  # no shared randomness
    assert Independent(p, 1).log_prob(x).shape == (3, 4)
    assert p.expand((7, 4, 2)).batch_shape == (7, 4, 2)
    with pytest.raises(RuntimeError):
        p.expand((3,))
    assert repr(p) == "PrincipalMixture(3 components in 2 of 5 dimensions, 34 floats, batch (4, 2))"
    assert repr(law(rectified=True)) == "PrincipalMixture(3 components in 2 of 5 dimensions, 34 floats, rectified)"
    assert "1 component in" in repr(law(c=1))
    assert law(rectified=True).expand((2,)).rectified


def test_number_of_floats():
    assert law(64, 24, 100).num_parameters == 34_101
    assert law(64, 24, 50).num_parameters == 17_851


def test_generator_and_rng_state():
    p = law()
    state = torch.random.get_rng_state()
    assert torch.equal(p.sample((3,), seeded()), p.sample((3,), generator=seeded()))
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = p.sample((4,))
        torch.manual_seed(3)
        assert torch.equal(first, p.sample((4,)))


def test_a_component_left_out():
    p = law(c=2)
    p = PrincipalMixture(
        p.loc, p.components, torch.tensor([0.0, -math.inf]).double(), p.means, p.scale_tril, p.residual_scale
    )
    x = p.sample((50,), generator=seeded())
    assert bool(p.log_prob(x).isfinite().all())
    assert bool(p.mean.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc": torch.zeros(4)}, r"shapes do not agree: loc \(4,\)"),
        ({"components": torch.eye(2)}, "shapes do not agree"),
        ({"components": torch.zeros(2)}, "shapes do not agree"),
        ({"components": torch.eye(5).repeat(2, 1)}, "shapes do not agree"),
        ({"logits": torch.zeros(())}, "shapes do not agree"),
        ({"means": torch.zeros(3, 3)}, "shapes do not agree"),
        ({"residual_scale": torch.zeros(1)}, "shapes do not agree"),
        ({"components": 1.01 * torch.eye(2, 5)}, "0.0201; expected orthonormal rows"),
        ({"loc": torch.full((5,), math.nan)}, "loc holds NaN"),
        ({"means": torch.full((3, 2), math.inf)}, "means holds NaN or infinity"),
        ({"logits": torch.full((3,), -math.inf)}, "logits are all -inf"),
        ({"logits": torch.full((3,), math.inf)}, "logits holds NaN or infinity"),
        ({"scale_tril": torch.ones(3, 2, 2)}, "scale_tril"),
        ({"scale_tril": torch.zeros(3, 2, 2)}, "scale_tril"),
        ({"residual_scale": torch.tensor(-1.0)}, "residual_scale"),
    ],
)
@pytest.mark.usefixtures("validation")
def test_bad_parameters(change, message):
    p = law(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        PrincipalMixture(**({name: getattr(p, name) for name in p.arg_constraints} | change))


@pytest.mark.usefixtures("validation")
def test_bad_types():
    p = law(dtype=torch.float32)
    given = {name: getattr(p, name) for name in p.arg_constraints}
    with pytest.raises(TypeError, match="residual_scale is a float; expected a floating-point tensor"):
        PrincipalMixture(**(given | {"residual_scale": 0.5}))
    with pytest.raises(TypeError, match="one dtype"):
        PrincipalMixture(**(given | {"loc": p.loc.double()}))
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.full((5,), math.nan))
    with pytest.raises(ValueError, match="right-most size"):
        p.log_prob(torch.zeros(4))


# --- fit ----------------------------------------------------------------------------------------------------


def test_fit_recovers_a_known_mixture():
    truth = law(12, 3, 4, s=0.2, apart=6.0, seed=2)
    x, fresh = truth.sample((6000,), generator=seeded()), truth.sample((6000,), generator=seeded(1))
    p = PrincipalMixture.fit(x, components=4, dims=3)
    loss = truth.log_prob(fresh) - p.log_prob(fresh)
    # 12 + 36 + 40 parameters cost about 88 / 2 / 6000 = .007 nats a row
    assert -0.005 < float(loss.mean()) < 0.03
    assert float(p.residual_scale) == pytest.approx(0.2, rel=0.02)
    order, wanted = p.logits.argsort(), truth.logits.argsort()
    assert torch.allclose(p.logits.softmax(-1)[order], truth.logits.softmax(-1)[wanted], atol=0.02)
    centres = p.loc + p.means @ p.components, truth.loc + truth.means @ truth.components
    assert torch.allclose(centres[0][order], centres[1][wanted], atol=0.2)


def test_fit_matches_the_first_two_moments():
    # a fitted mixture has the mean of its rows, as any maximum of the likelihood has
    x = law(10, 4, 6, seed=3).sample((1000,), generator=seeded())
    p = PrincipalMixture.fit(x, components=6, dims=4, iterations=30)
    assert torch.allclose(p.mean, x.mean(0), atol=1e-6)
    assert float((p.variance / x.var(0) - 1).abs().max()) < 0.1


def test_more_components_fit_better_than_one():
    truth = law(12, 4, 8, apart=4.0)
    x, fresh = truth.sample((3000,), generator=seeded()), truth.sample((3000,), generator=seeded(1))
    few, many = (PrincipalMixture.fit(x, components=c, dims=6).log_prob(fresh).mean() for c in (1, 8))
    assert float(many - few) > 0.5


@pytest.mark.parametrize("strength", [0.5, 8.0])
def test_updates_never_lower_the_objective(strength):
    u = law(6, 6, 5).sample((600,), generator=seeded())
    first, prior = _mixture_fit.start(u, 12, strength, seeded())
    fitted, history = _mixture_fit.maximise(first, prior, lambda: u.split(100), 40, 0.0, Processes())
    assert len(history) > 20
    assert min(b - a for a, b in pairwise(history)) > -1e-11
    law_of = MixtureSameFamily(
        Categorical(logits=fitted.logits), MultivariateNormal(fitted.means, scale_tril=fitted.scale_tril)
    )
    natural = _mixture_fit._natural(fitted)
    assert torch.allclose((_mixture_fit._statistics(u) @ natural.mT).logsumexp(-1), law_of.log_prob(u))


class Batches:
    """Rows in batches of several sizes, again at each iteration."""

    def __init__(self, rows, sizes):
        self.rows, self.sizes, self.passes = rows, sizes, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.rows.split(self.sizes))


@pytest.mark.parametrize("keep", [True, False])
def test_batches_equal_the_whole(monkeypatch, keep):
    x = law(10, 4, 6).sample((1000,), generator=seeded())
    whole = PrincipalMixture.fit(x, components=6, dims=4, iterations=20)
    if not keep:
        monkeypatch.setattr("penult.distributions._principal_components._KEPT_ELEMENTS", 0)
    batches = Batches(x, [0, 1, 399, 600])
    parts = PrincipalMixture.fit(batches, components=6, dims=4, iterations=20)
    assert (batches.passes == 3) is keep
    for name in whole.arg_constraints:
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-9), name


def test_start_on_a_sample(monkeypatch):
    x = law(10, 4, 6, apart=5.0).sample((3000,), generator=seeded())
    single = PrincipalMixture.fit(x, components=1, dims=4).log_prob(x).mean()
    monkeypatch.setattr("penult.distributions._mixture_fit._START_ROWS", 300)
    p = PrincipalMixture.fit(x.split(700), components=6, dims=4)
    assert float(p.log_prob(x).mean() - single) > 0.5
    assert float((p.mean - x.mean(0)).abs().max()) < 0.01  # all rows took part in the updates


def test_fit_is_reproducible_and_leaves_the_global_state():
    x = law(10, 4, 6).sample((500,), generator=seeded())
    state = torch.random.get_rng_state()
    one, same, other = (PrincipalMixture.fit(x, components=6, dims=4, seed=seed, iterations=3) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(getattr(one, name), getattr(same, name)) for name in one.arg_constraints)
    assert not torch.equal(one.means, other.means)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fit_in_each_dtype(dtype):
    x = law(10, 4, 6).sample((500,), generator=seeded()).to(dtype)
    p = PrincipalMixture.fit(x, components=6, dims=4)
    assert p.loc.dtype == torch.promote_types(dtype, torch.float32)
    exact = PrincipalMixture.fit(x.double(), components=6, dims=4)
    assert torch.allclose(p.log_prob(x.to(p.loc)).double(), exact.log_prob(x.double()), atol=1e-3)


def test_fit_far_from_the_origin():
    x = law(10, 4, 6).sample((500,), generator=seeded())
    near, far = (PrincipalMixture.fit(x + shift, components=6, dims=4) for shift in (0.0, 1e5))
    assert torch.allclose(near.log_prob(x), far.log_prob(x + 1e5), atol=1e-4)
    small = PrincipalMixture.fit(1e-6 * x, components=6, dims=4)
    assert torch.allclose(near.log_prob(x), small.log_prob(1e-6 * x) + 10 * math.log(1e-6), atol=1e-6)


def test_fit_clips_what_the_rows_do_not_allow():
    g = seeded()
    few = PrincipalMixture.fit(torch.randn(30, 5, generator=g), components=100, dims=24)
    assert few.components.shape == (5, 5)  # d
    assert len(few.logits) == 1  # a component for 20 rows
    assert few.has_density
    assert float(few.residual_scale) == 0
    two = PrincipalMixture.fit(torch.randn(2, 5, generator=g))
    assert two.components.shape == (1, 5)  # the rank
    assert not two.has_density
    assert bool(two.sample((5,), generator=g).isfinite().all())
    flat = torch.randn(200, 3, generator=g) @ torch.randn(3, 9, generator=g) + 5
    plane = PrincipalMixture.fit(flat, components=4, dims=8)
    assert plane.components.shape == (3, 9)
    assert float(plane.residual_scale) < 1e-5
    with pytest.raises(ValueError, match="no density"):
        plane.log_prob(flat)
    repeated = torch.randn(3, 6, generator=g).repeat(50, 1)
    points = PrincipalMixture.fit(repeated, components=10, dims=4)
    assert len(points.logits) == 3  # distinct rows
    assert PrincipalMixture.fit(torch.randn(40, 1, generator=g), components=2).event_shape == (1,)


def test_fit_with_few_rows_for_each_component_is_well_conditioned():
    x = law(20, 12, 10).sample((240,), generator=seeded())
    p = PrincipalMixture.fit(x, components=12, dims=12)
    values = torch.linalg.svdvals(p.scale_tril)
    assert float((values[:, 0] / values[:, -1]).max()) < 100
    fresh = law(20, 12, 10).sample((500,), generator=seeded(1))
    assert float(p.log_prob(fresh).mean()) > float(p.log_prob(x).mean()) - 15


def test_a_rectified_fit_is_the_fit_of_the_pre_activations():
    x = law(10, 4, 6).sample((400,), generator=seeded())
    p, q = (PrincipalMixture.fit(x, components=4, dims=4, rectified=flag) for flag in (True, False))
    assert p.rectified
    assert torch.equal(p.means, q.means)
    assert float(z_scores(x.clamp_min(0), p.mean).max()) < 4.5


def test_empty_components_are_left_out():
    u = torch.cat([torch.zeros(50, 2), torch.ones(50, 2)]).double() + 0.1 * torch.randn(100, 2, generator=seeded())
    first, prior = _mixture_fit.start(u, 2, 1.0, seeded())
    far = _mixture_fit.Components(
        torch.full((3,), -math.log(3)).double(),
        torch.cat([first.means, torch.full((1, 2), 1e4).double()]),
        torch.cat([first.scale_tril, first.scale_tril[:1]]),
    )
    fitted, history = _mixture_fit.maximise(far, prior, lambda: [u], 20, 0.0, Processes())
    assert len(fitted.logits) == 2
    assert all(math.isfinite(value) for value in history)
    assert float(fitted.logits.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (torch.zeros(4), {}, r"shape \(4,\); expected \(N, d\)"),
        (torch.zeros(1, 4), {}, "1 rows.*at least two"),
        ([], {}, "0 rows"),
        (torch.ones(10, 4), {}, "all rows of activations are equal"),
        (torch.full((10, 4), math.nan), {}, "10 of 10 .* NaN"),
        ([torch.randn(3, 4), torch.randn(3, 5)], {}, r"shape \(3, 5\); expected \(n, 4\)"),
        (torch.eye(4), {"components": 0}, "components is 0; expected an integer of at least 1"),
        (torch.eye(4), {"iterations": 0}, "iterations is 0; expected an integer of at least 1"),
        (torch.eye(4), {"tolerance": math.nan}, "tolerance is nan; expected a finite number of at least 0"),
    ],
)
def test_fit_refuses(rows, options, message):
    with pytest.raises(ValueError, match=message):
        PrincipalMixture.fit(rows, **options)


def test_fit_refuses_types_and_passes_that_differ():
    for rows, message in (
        (torch.eye(4).long(), r"activations is a torch.int64 tensor; expected a floating-point tensor"),
        (iter([torch.eye(4)]), "each time it is iterated, such as a list of batches"),
        (3, "activations is a int"),
        (["a"], "a batch of activations is a str; expected a floating-point tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            PrincipalMixture.fit(rows)
    with pytest.raises(TypeError, match=r"dims is 1\.5; expected an integer of at least 1"):
        PrincipalMixture.fit(torch.eye(4), dims=1.5)

    class Shrinking(Batches):
        def __iter__(self):
            self.passes += 1
            return iter([self.rows[self.passes :]])

    with pytest.raises(ValueError, match="39 rows at first and 38 later"):
        PrincipalMixture.fit(Shrinking(torch.randn(40, 3, generator=seeded()), None))


# --- positive laws ------------------------------------------------------------------------------------------


def positive(d=2, seed=0, dtype=torch.float64):
    rows = torch.rand(3000, d, generator=seeded(seed), dtype=dtype) ** 2 * 2
    return rows, PrincipalMixture.fit(rows, components=3, dims=d, positive=True)


def test_positive_contract():
    check_distribution(positive()[1])
    check_distribution(positive(dtype=torch.float32)[1])


@pytest.mark.slow
def test_positive_density_integrates_to_one():
    _, p = positive()
    logs = torch.linspace(-18, 4, 2001, dtype=torch.float64)
    points = torch.cartesian_prod(logs, logs)
    mass = (p.log_prob(points.exp()) + points.sum(-1)).exp().sum() * (logs[1] - logs[0]) ** 2
    assert abs(float(mass) - 1) < 1e-9


def test_positive_moments_are_those_of_draws():
    rows, p = positive()
    h = p.sample((400_000,), generator=seeded(1))
    assert float(h.min()) > 0
    error = (h.mean(0) - p.mean).abs() / (h.std(0) / len(h) ** 0.5)
    assert float(error.max()) < 4
    torch.testing.assert_close(h.var(0), p.variance, rtol=0.02, atol=0)
    assert float((p.mean - rows.mean(0)).abs().max()) < 0.02


def test_positive_law_keeps_skewed_rows_off_the_other_side():
    rows, held = (-torch.rand(4, 3000, 5, generator=seeded(i), dtype=torch.float64).log().mean(0) for i in (0, 9))
    p, plain = (PrincipalMixture.fit(rows, components=1, dims=5, positive=positive) for positive in (True, False))
    assert float((plain.sample((2000,), generator=seeded()) < 0).double().mean()) > 0.01
    assert float(p.log_prob(held).mean()) > float(plain.log_prob(held).mean()) + 0.3


@pytest.mark.usefixtures("validation")
def test_positive_law_has_no_mass_at_zero():
    _, p = positive()
    loose = PrincipalMixture(
        *(getattr(p, name) for name in p.arg_constraints), softness=p.softness, validate_args=False
    )
    assert loose.log_prob(torch.tensor([[0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)).tolist() == [-math.inf] * 2
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.zeros(2, dtype=torch.float64))


def test_positive_fit_follows_the_scale_of_each_coordinate():
    rows, p = positive()
    scale = torch.tensor([1e-4, 1e3], dtype=torch.float64)
    torch.testing.assert_close(PrincipalMixture.fit(rows * scale, dims=2, positive=True).softness, p.softness * scale)
    one = PrincipalMixture.fit(rows * 1e5, components=3, dims=2, positive=True)
    torch.testing.assert_close(one.mean, p.mean * 1e5)


def test_rounding_of_half_precision_rows_is_not_their_variance():
    rows = (torch.randn(3000, 256, generator=seeded()) * 0.1 + 1).bfloat16()
    p = PrincipalMixture.fit(rows, components=4, dims=24)
    assert float(p.variance.sum()) == pytest.approx(float(rows.double().var(0).sum()), rel=0.02)


@pytest.mark.usefixtures("validation")
def test_positive_bad_input():
    rows, p = positive()
    with pytest.raises(ValueError, match=r"smallest value of activations is -0\.5"):
        PrincipalMixture.fit(rows - 0.5, positive=True)
    with pytest.raises(ValueError, match="rectified and positive are both True"):
        PrincipalMixture.fit(rows, positive=True, rectified=True)
    parts = [getattr(p, name) for name in p.arg_constraints]
    with pytest.raises(ValueError, match=r"softness has the value .*expected positive"):
        PrincipalMixture(*parts, softness=torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="rectified is True and softness is given"):
        PrincipalMixture(*parts, rectified=True, softness=p.softness)
    with pytest.raises(ValueError, match=r"softness \(1,\)"):
        PrincipalMixture(*parts, softness=p.softness[:1])
    with pytest.raises(TypeError, match="one dtype"):
        PrincipalMixture(*parts, softness=p.softness.float())


# --- one component a class ----------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [False, True])
def test_from_posterior_of_hard_labels_is_the_law_of_each_class(positive):
    centres = torch.tensor([[0.0] * 4, [6.0] * 4])
    y = torch.arange(2000) % 2
    rows = (
        (centres[y] + torch.randn(2000, 4, generator=seeded())).exp().clamp_max(1e5)
        if positive
        else (centres[y] + torch.randn(2000, 4, generator=seeded()))
    )
    index = {tuple(row): int(c) for row, c in zip(rows.tolist(), y, strict=True)}

    def labels(h):
        return torch.eye(2)[[index[tuple(row)] for row in h.tolist()]]

    p = PrincipalMixture.from_posterior(rows, labels, dims=4, positive=positive)
    batches = PrincipalMixture.from_posterior([rows[:3], rows[3:]], labels, dims=4, positive=positive)
    torch.testing.assert_close(p.logits.exp(), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(batches.means, p.means, rtol=1e-4, atol=1e-4)
    if not positive:
        means = p.loc + p.means @ p.components
        torch.testing.assert_close(means, torch.stack([rows[y == c].mean(0) for c in (0, 1)]), rtol=1e-4, atol=1e-4)


def test_from_posterior_leaves_out_what_never_comes():
    rows = torch.randn(300, 3, generator=seeded())
    p = PrincipalMixture.from_posterior(rows, lambda h: torch.tensor([1.0, 0.0]).expand(len(h), 2), dims=3)
    assert len(p.logits) == 1
    with pytest.raises(ValueError, match=r"posterior has shape \(300,\)"):
        PrincipalMixture.from_posterior(rows, lambda h: h.sum(-1))
    with pytest.raises(ValueError, match="dims is 0; expected an integer of at least 1"):
        PrincipalMixture.from_posterior(rows, lambda h: h, dims=0)
