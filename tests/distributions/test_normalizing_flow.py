import json
import math
import subprocess
import sys

import pytest
import torch

from penult.distributions import PrincipalMixture
from penult.distributions.normalizing_flow import NormalizingFlow

pytest.importorskip("zuko")

NAMES = ("loc", "components", "logits", "means", "scale_tril", "residual_scale")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(d=5, m=2, c=3, s=0.5, dtype=torch.float64, seed=0, apart=1.0):
    g = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    plane = torch.linalg.qr(normal(d, m)).Q.mT
    tril = 0.2 * normal(c, m, m).tril(-1) + torch.diag_embed(0.5 + torch.rand(c, m, generator=g, dtype=torch.float64))
    given = (0.3 * normal(d), plane, normal(c), apart * normal(c, m), tril, torch.tensor(s))
    return PrincipalMixture(*(part.to(dtype) for part in given))


def law(d=5, m=2, c=3, s=0.5, bins=6, rectified=False, dtype=torch.float64, seed=0, bend=1.0):
    g = seeded(seed + 100)
    given = (
        torch.randn(d, generator=g),
        0.5 + torch.rand(d, generator=g),
        bend * torch.randn(d, 3 * bins - 1, generator=g),
    )
    return NormalizingFlow(*(part.to(dtype) for part in given), mixture(d, m, c, s, dtype, seed), rectified)


def skewed(n=600, d=4, seed=0):
    g = seeded(seed)
    return torch.cat([torch.randn(n // 2, d, generator=g), torch.randn(n - n // 2, d, generator=g) + 4]).exp()


def state(p):
    return {name: value.clone() for name, value in p.state_dict().items()}


QUICK = {"components": 3, "iterations": 30, "epochs": 2}


# --- the law ------------------------------------------------------------------------------------------------


def test_integrates_to_one():
    line = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    one = law(1, 1, 3).log_prob(line.unsqueeze(-1)).exp()
    assert float(torch.trapezoid(one, line)) == pytest.approx(1, abs=1e-4)
    grid = torch.linspace(-14, 14, 701, dtype=torch.float64)
    for m in (1, 2):
        values = law(2, m, 3).log_prob(torch.cartesian_prod(grid, grid)).exp().reshape(701, 701)
        assert float(torch.trapezoid(torch.trapezoid(values, grid), grid)) == pytest.approx(1, abs=1e-3)


def test_without_splines_it_is_the_mixture():
    base = mixture()
    p = NormalizingFlow(base.loc.new_zeros(5), base.loc.new_ones(5), base.loc.new_zeros(5, 11), base)
    x = 3 * torch.randn(50, 5, generator=seeded(), dtype=torch.float64)
    assert torch.allclose(p.log_prob(x), base.log_prob(x), atol=1e-9)
    assert torch.allclose(p.sample((9,), generator=seeded()), base.sample((9,), generator=seeded()), atol=1e-9)


def test_density_by_the_jacobian_of_the_draws():
    # x = g(z): log p(x) = log p(z) - log|g'(z)|, with the jacobian by autograd from draws to z
    p = law(4, 4, 3)
    x = p.sample((6,), generator=seeded())
    z = p.base.sample((6,), generator=seeded())

    def forward(h):
        from penult.distributions._flow_fit import splines

        return splines(p.knots)((h - p.loc) / p.scale)

    assert torch.allclose(forward(x), z, atol=1e-8)
    jacobian = torch.stack([torch.autograd.functional.jacobian(forward, row) for row in x])
    assert torch.allclose(p.log_prob(x), p.base.log_prob(z) + jacobian.logdet(), atol=1e-8)


@pytest.mark.parametrize(("d", "m", "dtype"), [(2, 2, torch.float32), (5, 2, torch.float64), (16, 16, torch.float32)])
def test_draws_follow_the_density(d, m, dtype):
    # the mean under p of q/p is 1 for a q that is near
    p = law(d, m, 3, dtype=dtype)
    q = NormalizingFlow(p.loc + 0.03 * p.scale, p.scale, 0.95 * p.knots, p.base)
    x = p.sample((20_000,), generator=seeded())
    ratio = (q.log_prob(x) - p.log_prob(x)).double().exp()
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / math.sqrt(len(x))
    assert float(ratio.std()) > 0.01


def test_draws_follow_the_cdf_of_a_coordinate():
    p = law(1, 1, 2)
    x = p.sample((20_000,), generator=seeded()).squeeze(-1).sort().values
    line = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    cdf = torch.cumulative_trapezoid(p.log_prob(line.unsqueeze(-1)).exp(), line)
    index = torch.searchsorted(line, x).clamp(1, len(cdf))
    ranks = (torch.arange(len(x)) + 0.5) / len(x)
    assert float((cdf[index - 1] - ranks).abs().max()) * math.sqrt(len(x)) < 2  # Kolmogorov: p = 0.0007


def test_log_prob_gradients_and_shapes():
    p = law(4, 2, 3)
    x = p.sample((3,), generator=seeded()).requires_grad_()
    assert torch.autograd.gradcheck(p.log_prob, (x,))
    mapped = torch.func.vmap(torch.func.grad(p.log_prob))(x.detach())
    (direct,) = torch.autograd.grad(p.log_prob(x).sum(), x)
    assert torch.allclose(mapped, direct)
    assert p.log_prob(x[0]).shape == ()
    assert p.log_prob(x.detach().expand(2, 3, 4)).shape == (2, 3)
    assert p.log_prob(x.detach()[:0]).shape == (0,)
    assert p.sample().shape == (4,)
    assert p.sample((2, 3)).shape == (2, 3, 4)
    assert p.sample((0,)).shape == (0, 4)


def test_small_blocks_give_the_same(monkeypatch):
    p = law(4, 2, 3)
    x = p.sample((50,), generator=seeded())
    density = p.log_prob(x)
    monkeypatch.setattr("penult.distributions.normalizing_flow.ELEMENTS", 12)
    assert torch.allclose(p.log_prob(x), density)
    assert torch.allclose(p.sample((50,), generator=seeded()), x)


def test_precision():
    p = law(8, 4, 3)
    single = law(8, 4, 3, dtype=torch.float32)
    x = p.sample((200,), generator=seeded())
    assert single.log_prob(x.float()).dtype == torch.float32
    assert torch.allclose(single.log_prob(x.float()).double(), p.log_prob(x), atol=2e-3)
    assert single.log_prob(x).dtype == torch.float64
    half = law(8, 4, 3).to(torch.bfloat16)
    assert half.sample((3,)).dtype == torch.bfloat16
    wide = law(8, 4, 3).to(torch.bfloat16).double()
    assert torch.allclose(half.log_prob(x.bfloat16()).double(), wide.log_prob(x.bfloat16().double()), rtol=2e-2)
    far = torch.full((8,), 1e4)
    assert bool(single.log_prob(far).isfinite())


def test_rectified():
    p, raw = law(rectified=True), law()
    x = p.sample((500,), generator=seeded())
    assert torch.equal(x, raw.sample((500,), generator=seeded()).clamp_min(0))
    assert bool((x == 0).any())
    assert bool(p.support.check(x).all())
    assert not p.has_density
    with pytest.raises(ValueError, match=r"no density.*atoms at zero.*rectified=False"):
        p.log_prob(x)
    assert raw.has_density
    assert "rectified" in repr(p)
    assert "rectified" not in repr(raw)


def test_a_plane_has_no_density():
    p = law(s=0.0)
    assert not p.has_density
    with pytest.raises(ValueError, match="lie in a plane"):
        p.log_prob(p.loc)
    assert p.sample((3,)).shape == (3, 5)


def test_generator_and_rng_state():
    p = law()
    before = torch.random.get_rng_state()
    assert torch.equal(p.sample((3,), seeded()), p.sample((3,), generator=seeded()))
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = p.sample((4,))
        torch.manual_seed(3)
        assert torch.equal(first, p.sample((4,)))


# --- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rectified", [False, True])
def test_config_and_state_make_it_again(rectified):
    p = law(rectified=rectified, dtype=torch.float32)
    tensors = state(p)
    assert all(value.is_floating_point() and value.is_contiguous() for value in tensors.values())
    assert not list(p.parameters())
    again = NormalizingFlow.from_config(json.loads(json.dumps(p.config())), tensors)
    assert again.config() == p.config()
    assert all(torch.equal(value, tensors[name]) for name, value in again.state_dict().items())
    assert torch.equal(again.sample((5,), generator=seeded()), p.sample((5,), generator=seeded()))
    other = law(rectified=rectified, dtype=torch.float32, seed=5)
    other.load_state_dict(tensors)
    assert torch.equal(other.sample((5,), generator=seeded()), p.sample((5,), generator=seeded()))
    assert p.double().sample((5,)).dtype == torch.float64
    assert p.event_shape == (5,)
    assert p.batch_shape == ()


def test_from_config_refuses():
    p = law()
    with pytest.raises(ValueError, match="not the state of a NormalizingFlow"):
        NormalizingFlow.from_config(p.config(), {"loc": p.loc})
    with pytest.raises(ValueError, match="not the state of a NormalizingFlow"):
        NormalizingFlow.from_config({}, state(p))
    with pytest.raises(ValueError, match="do not belong together"):
        NormalizingFlow.from_config(p.config() | {"bins": 7}, state(p))
    with pytest.raises(ValueError, match="means holds NaN"):
        NormalizingFlow.from_config(p.config(), state(p) | {"base_means": p.base_means * math.nan})


def test_number_of_floats():
    assert law(64, 64, 12, bins=8, dtype=torch.float32).num_parameters == 31_501
    assert repr(law(64, 64, 12, bins=8)) == (
        "NormalizingFlow(12 components in 64 of 64 dimensions, 8 bins, 31 501 floats)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc": torch.zeros(4)}, r"shapes do not agree: loc \(4,\)"),
        ({"scale": torch.ones(1)}, "shapes do not agree"),
        ({"knots": torch.zeros(5, 12)}, "shapes do not agree"),
        ({"knots": torch.zeros(3, 11)}, "shapes do not agree"),
        ({"scale": torch.zeros(5)}, "scale positive"),
        ({"loc": torch.full((5,), math.nan)}, "must be finite"),
        ({"base": mixture(dtype=torch.float32).expand((2,))}, "neither rectified nor expanded"),
    ],
)
def test_bad_parameters(change, message):
    given = {"loc": torch.zeros(5), "scale": torch.ones(5), "knots": torch.zeros(5, 11)}
    with pytest.raises(ValueError, match=message):
        NormalizingFlow(**(given | {"base": mixture(dtype=torch.float32)} | change))


def test_bad_types_and_values():
    p = law()
    with pytest.raises(TypeError, match=r"base is a Normal; expected a PrincipalMixture"):
        NormalizingFlow(p.loc, p.scale, p.knots, torch.distributions.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match=r"loc is a torch\.float32 tensor; expected a torch\.float64 tensor"):
        NormalizingFlow(p.loc.float(), p.scale, p.knots, p.base)
    with pytest.raises(TypeError, match=r"scale is a float; expected a .* tensor"):
        NormalizingFlow(p.loc, 1.0, p.knots, p.base)
    with pytest.raises(ValueError, match="NaN"):
        p.log_prob(torch.full((5,), math.nan))
    with pytest.raises(ValueError, match=r"shape \(4,\); expected \(..., 5\)"):
        p.log_prob(torch.zeros(4))


# --- fit ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fit_beats_the_mixture_on_skewed_rows():
    x, fresh = ((0.7 * torch.randn(2000, 3, generator=seeded(seed)).cumsum(-1)).exp() for seed in (0, 1))
    plain = PrincipalMixture.fit(x, components=4, dims=3)
    start, p = (NormalizingFlow.fit(x, components=4, iterations=100, epochs=epochs) for epochs in (0, 5))
    first, second, third = (float(q.log_prob(fresh).mean()) for q in (plain, start, p))
    assert first + 0.1 < min(second, third)
    # two modes are not pressed into one
    two, more = skewed(2000, 3).sqrt(), skewed(2000, 3, seed=1).sqrt()
    plain_two = PrincipalMixture.fit(two, components=4, dims=3)
    flow_two = NormalizingFlow.fit(two, components=4, iterations=100, epochs=0)
    assert float(flow_two.log_prob(more).mean()) > float(plain_two.log_prob(more).mean()) - 0.05
    below = [float((q.sample((20_000,), generator=seeded()) < 0).any(-1).float().mean()) for q in (plain, p)]
    assert below[1] < 0.5 * below[0]  # the rows are positive
    assert float((p.sample((20_000,), generator=seeded()).mean(0) / fresh.mean(0) - 1).abs().max()) < 0.1


def test_fit_is_reproducible_and_leaves_the_global_state():
    x = skewed(400)
    before = torch.random.get_rng_state()
    one, same, other = (NormalizingFlow.fit(x, **QUICK, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, state(same)[name]) for name, value in state(one).items())
    assert not torch.equal(one.knots, other.knots)
    assert not one.knots.requires_grad


def test_fit_streams(monkeypatch):
    x = skewed(500)
    whole = NormalizingFlow.fit(x, **QUICK)
    parts = NormalizingFlow.fit(x.split([0, 1, 199, 300]), **QUICK)
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, parts.state_dict()[name], atol=1e-4), name
    monkeypatch.setattr("penult.distributions._flow_fit._SAMPLE_ELEMENTS", 800)
    monkeypatch.setattr("penult.distributions._flow_fit.ELEMENTS", 100)
    monkeypatch.setattr("penult.distributions._flow_fit._COLUMNS", 3)
    few = NormalizingFlow.fit(x.split(200), **QUICK)  # on 200 rows, but for the mixture
    assert float(few.log_prob(x).mean()) > float(PrincipalMixture.fit(x, components=3, dims=4).log_prob(x).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_fit_in_each_dtype(dtype):
    x = skewed(300).clamp_max(1000).to(dtype)
    p = NormalizingFlow.fit(x, **QUICK)
    assert p.loc.dtype == torch.promote_types(dtype, torch.float32)
    assert all(value.dtype == p.loc.dtype for value in p.state_dict().values())
    assert bool(p.log_prob(x).isfinite().all())


def test_fit_far_from_the_origin_and_at_any_scale():
    x = skewed(300).double()
    near, far, small = (NormalizingFlow.fit(y, **QUICK) for y in (x, x + 1e5, 1e-6 * x))
    assert torch.allclose(near.log_prob(x), far.log_prob(x + 1e5), atol=1e-2)
    assert torch.allclose(near.log_prob(x), small.log_prob(1e-6 * x) + 4 * math.log(1e-6), atol=1e-2)


def test_fit_of_few_dims_and_rows():
    x = skewed(300, 6)
    p = NormalizingFlow.fit(x, **QUICK, dims=2)
    assert p.base_components.shape == (2, 6)
    assert p.has_density
    assert NormalizingFlow.fit(x, **QUICK, dims=None).base_components.shape == (6, 6)
    few = NormalizingFlow.fit(x[:40], **QUICK)
    assert not bool(few.knots.any())
    two = NormalizingFlow.fit(x[:2])
    assert not two.has_density
    assert two.sample((3,)).shape == (3, 6)
    one = NormalizingFlow.fit(skewed(300, 1), **QUICK)
    assert bool(one.log_prob(skewed(300, 1)).isfinite().all())


def test_a_constant_coordinate_stays():
    x = skewed(300)
    x[:, 1] = 0.7
    p = NormalizingFlow.fit(x, **QUICK)
    assert not p.has_density
    draws = p.sample((50,), generator=seeded())
    assert float((draws[:, 1] - 0.7).abs().max()) < 0.05


def test_a_rectified_fit_is_the_fit_of_the_pre_activations():
    x = skewed(300) - 1
    p, q = (NormalizingFlow.fit(x, **QUICK, rectified=flag) for flag in (True, False))
    assert p.rectified
    assert all(torch.equal(value, q.state_dict()[name]) for name, value in p.state_dict().items())


def test_where_nothing_is_gained_it_is_the_mixture_of_all_rows():
    x = torch.randn(300, 2, generator=seeded()) + torch.tensor([[0.0, 0.0], [40.0, 0.0]]).repeat(150, 1)
    p = NormalizingFlow.fit(x, components=2, iterations=20, epochs=0)
    assert not bool(p.knots.any())
    plain = PrincipalMixture.fit((x - p.loc) / p.scale, components=2, dims=2)
    assert torch.allclose(p.log_prob(x), plain.log_prob((x - p.loc) / p.scale) - p.scale.log().sum(), atol=1e-3)


def test_progress_counts_to_the_end():
    seen = []
    NormalizingFlow.fit(skewed(300), **QUICK, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 34) for i in range(34)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (torch.zeros(4), {}, r"shape \(4,\); expected \(N, d\)"),
        (torch.zeros(1, 4), {}, "at least two"),
        (torch.ones(10, 4), {}, "all rows of activations are equal"),
        (torch.full((10, 4), math.nan), {}, "NaN"),
        ([torch.randn(3, 4), torch.randn(3, 5)], {}, r"shape \(3, 5\); expected \(n, 4\)"),
        (torch.eye(4), {"components": 0}, "components is 0; expected an integer of at least 1"),
        (torch.eye(4), {"dims": 0}, "dims is 0; expected an integer of at least 1"),
        (torch.eye(4), {"bins": 1}, "bins is 1; expected an integer of at least 2"),
        (torch.eye(4), {"epochs": -1}, "epochs is -1; expected an integer of at least 0"),
    ],
)
def test_fit_refuses(rows, options, message):
    with pytest.raises(ValueError, match=message):
        NormalizingFlow.fit(rows, **options)


def test_fit_refuses_types():
    for rows, message in (
        (torch.eye(4).long(), r"activations is a torch.int64 tensor; expected a floating-point tensor"),
        (iter([torch.eye(4)]), "each time it is iterated"),
    ):
        with pytest.raises(TypeError, match=message):
            NormalizingFlow.fit(rows)
    for options, message in (({"dims": 1.5}, r"dims is 1\.5"), ({"iterations": True}, "iterations is True")):
        with pytest.raises(TypeError, match=f"{message}; expected an integer"):
            NormalizingFlow.fit(torch.eye(4), **options)


# --- zuko ---------------------------------------------------------------------------------------------------


def test_without_zuko_it_says_what_to_install(monkeypatch):
    p = law()
    for name in [name for name in sys.modules if name == "zuko" or name.startswith("zuko.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zuko", None)
    for call in (lambda: NormalizingFlow.fit(torch.eye(4)), lambda: NormalizingFlow.from_config(p.config(), state(p))):
        with pytest.raises(ImportError, match=r'pip install "penult\[flow\]"'):
            call()


@pytest.mark.parametrize("rectified", [False, True])
def test_moments_are_those_of_samples(rectified):
    rows = torch.cat([torch.randn(200, 3), torch.randn(200, 3) + 3]).exp()
    p = NormalizingFlow.fit(rows - 2, components=2, iterations=30, epochs=1, rectified=rectified)
    h = p.sample(200_000, generator=torch.Generator().manual_seed(0)).double()
    error = (h.var(0) / len(h)).sqrt()
    assert ((p.mean - h.mean(0)).abs() < 5 * error + 1e-3 * p.mean.abs()).all()
    torch.testing.assert_close(p.variance.double(), h.var(0), rtol=0.05, atol=1e-3)


def test_a_flow_has_no_batch_shape():
    p = NormalizingFlow.fit(torch.randn(120, 3), components=2, iterations=2, epochs=0)
    assert p.expand(()) is p
    for shape in (2, (2,), (1, 3)):
        with pytest.raises(NotImplementedError, match=r"expected \(\)"):
            p.expand(shape)


@pytest.mark.slow
def test_importing_zuko_leaves_the_switch_of_validation():
    code = (
        "import torch\nfrom torch.distributions import Distribution\nfrom penult.distributions import NormalizingFlow\n"
        "NormalizingFlow.fit(torch.randn(50, 2), components=1, iterations=1, epochs=0)\n"
        "assert Distribution._validate_args"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
