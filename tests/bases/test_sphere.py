import math

import pytest
import torch
from torch import nn

import penult
from heads import random_head
from penult import Activations, Gaussian, GenerativePair, Head, Sphere, special
from penult.testing import check_base
from tiers import thin


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def charted(dim, m, seed=0, radii=3, dtype=torch.float64):
    """A sphere with everything: radii, centre, shape and subspace."""
    g = seeded(seed)
    basis = torch.linalg.qr(torch.randn(dim, m, generator=g, dtype=torch.float64)).Q.T
    factor = torch.randn(m, m, generator=g, dtype=torch.float64)
    tril = torch.linalg.cholesky(factor @ factor.T + torch.eye(m, dtype=torch.float64))
    return Sphere(
        torch.linspace(0.5, 2, radii, dtype=torch.float64),
        loc=torch.randn(dim, generator=g, dtype=torch.float64),
        scale_tril=tril / m**0.5,
        subspace=basis,
        log_weights=torch.randn(radii, generator=g, dtype=torch.float64),
    ).to(dtype)


# --- laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radii", [1, 3])
@pytest.mark.parametrize(
    ("dim", "m"),
    [
        *thin([(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (5, 3), (64, 9)], keep=[(1, 1), (2, 1), (3, 2)]),
        pytest.param(1280, 20, marks=pytest.mark.long),
    ],
)
def test_laws_through_every_chart(dim, m, radii):
    base, head = charted(dim, m, seed=m, radii=radii), random_head(3, dim, seed=dim, norm=2.0)
    if base.subspace is not None:
        # A pair needs a subspace that contains the span of the head.
        head = Head(head.weight @ base.subspace.T @ base.subspace, head.bias)
    report = check_base(
        base,
        head,
        samples=50_000 if dim < 1000 else 5_000,
    )
    names = " ".join(law.name for law in report.laws)
    assert ("integrates to one" in names) == (m <= 3)
    assert ("radii" in names) == (radii > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "dim"),
    [
        *((classes, dim) for classes in (2, 3, 10) for dim in (2, 64, 1280)),
        (1000, 64),
        *(pytest.param(1000, dim, marks=pytest.mark.long) for dim in (2, 1280)),
    ],
)
def test_laws_of_the_data_free_sphere(classes, dim):
    head = random_head(classes, dim, seed=classes, norm=3.0)
    base = quiet_from_head(head, confidence=0.95 if classes < 1000 or dim > 2 else 0.3)
    assert base.subspace.shape == (head.rank, dim)
    check_base(base, head, samples=20_000 if classes < 1000 and dim < 1000 else 2_000)


def quiet_from_head(head, **kwargs):
    """``from_head`` where random rows may well be dominated by others, which is warned of."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "classes .* are not the largest", UserWarning)
        return Sphere.from_head(head, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["round", "centered", "elliptic"])
@pytest.mark.parametrize("ambient", [True, False])
def test_laws_of_fitted_spheres(shape, ambient):
    head = random_head(5, 12, seed=1, norm=1.5)
    h = torch.randn(4000, 12, generator=seeded(), dtype=torch.float64) * torch.logspace(-0.5, 0.5, 12) + 1
    base = Sphere.fit(head, h, shape=shape, ambient=ambient, radii=32)
    check_base(base, head, samples=50_000)


class Miscounted(Sphere):
    """A sphere whose log M is off by one per cent."""

    def log_mgf(self, weight):
        return 1.01 * super().log_mgf(weight)


@pytest.mark.parametrize("norm", [0.5, 5.0])
@pytest.mark.parametrize(
    ("classes", "dim"),
    [
        *thin([(2, 2), (3, 2), (3, 3), (10, 64)], keep=[(2, 2), (3, 2), (3, 3)]),
        *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in ((1000, 64), (2, 1280))),
    ],
)
def test_a_base_whose_log_m_is_off_by_one_per_cent_fails(classes, dim, norm):
    head = random_head(classes, dim, norm=norm)
    samples = 10_000 if classes * dim < 1000 else 3_000
    check_base(Sphere(torch.tensor([1.5], dtype=torch.float64)), head, samples=samples)
    with pytest.raises(AssertionError, match="FAIL"):
        check_base(Miscounted(torch.tensor([1.5], dtype=torch.float64)), head, samples=samples)


class Skewed(Sphere):
    """A sphere that draws with a concentration two per cent too large."""

    def draw(self, weight, index, generator):
        return super().draw(1.02 * weight, index, generator)


def test_a_base_that_draws_from_another_law_fails():
    with pytest.raises(AssertionError, match=r"FAIL.*gradient of log M"):
        check_base(Skewed(torch.tensor([1.5], dtype=torch.float64)), random_head(3, 8, norm=10.0), samples=20_000)


def test_log_mgf_is_the_sphere_mgf_and_differentiable():
    base, head = charted(6, 4), random_head(3, 6)
    rows = head.centered_weight()
    assert torch.autograd.gradcheck(base.log_mgf, rows.clone().requires_grad_())
    points = base.tilt(torch.zeros(6, dtype=torch.float64)).sample((200_000,), generator=seeded())
    estimate = (points @ rows.T).exp().mean(0).log()
    assert torch.allclose(estimate, base.log_mgf(rows), atol=0.05)


def test_one_sphere_is_von_mises_fisher():
    w = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    tilt = Sphere(torch.tensor(2.5, dtype=torch.float64)).tilt(w)
    law = penult.VonMisesFisher(w / w.norm(), 2.5 * w.norm())
    x = law.sample((10,), generator=seeded())
    assert torch.allclose(tilt.log_prob(2.5 * x), law.log_prob(x) - 2 * math.log(2.5))
    assert torch.allclose(tilt.mean, 2.5 * law.mean)


def test_zero_rows_tilt_nothing():
    base = Sphere(torch.tensor([1.0, 3.0]))
    tilt = base.tilt(torch.zeros(2, 5))
    x = tilt.sample((20_000,), generator=seeded())
    assert torch.equal(tilt.mean, torch.zeros(2, 5))
    assert float(x.mean(0).abs().max()) < 0.05
    assert {round(r, 4) for r in x.norm(dim=-1).flatten().tolist()} == {1.0, 3.0}


def test_parts_outside_the_subspace_are_dropped():
    base = charted(6, 3)
    h = torch.randn(7, 6, generator=seeded(), dtype=torch.float64)
    outside = h - base.loc
    outside = outside - outside @ base.subspace.T @ base.subspace
    assert torch.allclose(base.log_prob(h), base.log_prob(h + outside))
    assert torch.allclose(base.project(h), base.project(h + outside))
    assert torch.allclose(base.project(h), h - outside)


def test_kl_between_tilts():
    base = charted(5, 3)
    rows = random_head(2, 5).weight
    p, q = base.tilt(rows[0]), base.tilt(rows[1])
    x = p.sample((100_000,), generator=seeded())
    ratio = p.log_prob(x) - q.log_prob(x)
    kl = torch.distributions.kl_divergence(p, q)
    assert abs(float(ratio.mean() - kl)) < 4 * float(ratio.std()) / math.sqrt(len(x))
    with pytest.raises(ValueError, match="same base object"):
        torch.distributions.kl_divergence(p, charted(5, 3).tilt(rows[1]))


# --- from a head alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("ambient", [False, True])
def test_radius_reaches_the_confidence(confidence, ambient):
    head = random_head(6, 20, norm=3.0)
    base = Sphere.from_head(head, confidence=confidence, ambient=ambient)
    h = GenerativePair(head, base).given(torch.arange(6)).sample((5000,), generator=seeded(7))
    reached = head(h).softmax(-1).amax(-1).mean()
    assert float(reached) == pytest.approx(confidence, abs=0.012)


def test_two_classes_are_two_points():
    head = Head(torch.tensor([[2.0, 1.0, 0.0], [-2.0, 1.0, 0.0]], dtype=torch.float64))
    base = Sphere.from_head(head, confidence=0.9)
    assert base.subspace.shape == (1, 3)
    h, y = GenerativePair(head, base).sample((1000,), generator=seeded())
    assert len(h[:, 0].abs().round(decimals=8).unique()) == 1
    assert float(head(h).softmax(-1).amax(-1).mean()) == pytest.approx(0.9, abs=1e-3)
    assert 0.85 < float((head(h).argmax(-1) == y).double().mean()) < 0.95


def test_radius_is_deterministic_and_leaves_the_rng_alone():
    head = random_head(4, 8, norm=3.0)
    state = torch.random.get_rng_state()
    first, second = Sphere.from_head(head), Sphere.from_head(head)
    assert torch.equal(first.radius, second.radius)
    assert torch.equal(state, torch.random.get_rng_state())


def test_scaling_the_head_scales_the_radius():
    head = random_head(4, 8, norm=3.0, bias=False)
    scaled, scale = head.rescaled()
    ratio = Sphere.from_head(scaled).radius / Sphere.from_head(head).radius
    assert float(ratio) == pytest.approx(scale, rel=1e-4)


def test_dominated_class_is_named():
    weight = torch.tensor([[3.0, 0.0], [0.3, 0.1], [-3.0, 0.5], [0.0, -3.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="classes 1 are not the largest"):
        base = Sphere.from_head(Head(weight))
    check_base(base, Head(weight), samples=20_000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(("classes", "dim", "pair"), [(3, 8, (0, 2)), (100, 512, (2, 7)), (1000, 8, (501, 502))])
def test_tied_rows_are_an_error(classes, dim, pair, dtype):
    weight = torch.randn(classes, dim, generator=seeded()).to(dtype)
    weight[pair[1]] = weight[pair[0]]
    with pytest.raises(ValueError, match=f"rows {pair[0]} and {pair[1]} of the head are equal"):
        Sphere.from_head(Head(weight))


def test_a_class_at_the_mean_of_the_others_has_no_direction():
    with pytest.warns(UserWarning, match="not the largest"):
        base = Sphere.from_head(Head(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])), confidence=0.8)
    assert 0.1 < float(base.radius) < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_heads(dtype, tmp_path):
    head = Head((3 * torch.randn(10, 64, generator=seeded())).to(dtype))
    h = torch.randn(200, 64, generator=seeded()).to(dtype)
    for base in (quiet_from_head(head), Sphere.fit(head, h, shape="elliptic", ambient=False)):
        pair = GenerativePair(head, base)
        assert base.subspace.dtype == torch.float32
        assert pair.sample((3,), seeded())[0].dtype == dtype
        assert bool(pair.log_prob(h.float()).isfinite().all())
        again = penult.load(GenerativePair(head.clone(), base).half().save(tmp_path / "half.penult.safetensors"))
        assert again.base.subspace.dtype == torch.float32


@pytest.mark.slow
def test_large_heads_are_looked_at_in_blocks():
    weight = torch.randn(20_000, 32, generator=seeded())
    base = quiet_from_head(Head(weight), confidence=0.5)
    assert base.subspace.shape == (32, 32)


def test_mean_and_kl_of_tilts_are_differentiable():
    base = charted(4, 3)
    rows = random_head(2, 4).weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: base.tilt(w).mean, rows)
    assert torch.autograd.gradcheck(lambda w: torch.distributions.kl_divergence(base.tilt(w[0]), base.tilt(w[1])), rows)


def test_tilts_name_bad_activations():
    tilt = Sphere(1.0).tilt(torch.ones(3))
    for bad in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected floating activations \(\.\.\., 3\)"):
            tilt.log_prob(bad)


def test_unreachable_confidence():
    head = Head(torch.eye(3), torch.tensor([6.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="biases alone"):
        Sphere.from_head(head, confidence=0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Sphere.from_head(head, confidence=1.0)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_folded_normalisation_gives_the_true_sphere(norm):
    layer = nn.LayerNorm(16) if norm == "layer" else nn.RMSNorm(16)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=seeded())
    model = nn.Sequential(nn.Linear(4, 16), layer, nn.Linear(16, 5))
    x = torch.randn(64, 4, generator=seeded())
    head = penult.find_head(model, x)
    base = Sphere.from_head(head, ambient=True)
    assert float(base.radius) == pytest.approx(4.0)
    h, logits = penult.Tap(model, head)(x)
    assert torch.allclose(head(h), logits, atol=1e-5)
    assert torch.allclose(base.read(h).norm(dim=-1), torch.full((64,), 4.0), atol=1e-2)
    if norm == "layer":
        assert base.subspace.shape == (15, 16)
        draws, _ = GenerativePair(head, base).sample((100,), generator=seeded())
        assert float(draws.sum(-1).abs().max()) < 1e-4
    check_base(base, head, samples=20_000)


# --- fitted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["round", "centered", "elliptic"])
@pytest.mark.parametrize("ambient", [True, False])
def test_fit_reproduces_the_radial_law(shape, ambient):
    head = random_head(6, 10, norm=2.0)
    h = torch.randn(5000, 10, generator=seeded(), dtype=torch.float64) * 1.5 + 0.5
    base = Sphere.fit(head, h, shape=shape, ambient=ambient)
    drawn, _ = GenerativePair(head, base).sample((50_000,), generator=seeded(1))
    real, ours = base.read(h).norm(dim=-1), base.read(drawn).norm(dim=-1)
    grid = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    assert torch.allclose(real.quantile(grid), ours.quantile(grid), rtol=0.04)


def test_fit_recovers_the_pair_it_came_from():
    # of a large elliptic sphere in many dimensions the Gaussian fit finds centre and shape
    head = random_head(8, 24, norm=1.0)
    factor = torch.randn(24, 24, generator=seeded(3), dtype=torch.float64)
    tril = torch.linalg.cholesky(factor @ factor.T / 24 + torch.eye(24, dtype=torch.float64))
    truth = Sphere(torch.tensor(24.0**0.5, dtype=torch.float64), loc=torch.full((24,), 0.7).double(), scale_tril=tril)
    h, _ = GenerativePair(head, truth).sample((40_000,), generator=seeded())
    fitted = Sphere.fit(head, h, shape="elliptic", shrinkage=0.0)
    assert float((fitted.loc - truth.loc).norm() / truth.loc.norm()) < 0.15
    covariance = tril @ tril.T
    assert float((fitted.scale_tril @ fitted.scale_tril.T - covariance).norm() / covariance.norm()) < 0.1
    assert float(fitted.radius.mean()) == pytest.approx(24.0**0.5, rel=0.05)


def test_fit_in_span_keeps_the_mean_outside():
    head = random_head(4, 9)
    h = torch.randn(500, 9, generator=seeded(), dtype=torch.float64) + 5
    for shape in ("round", "centered", "elliptic"):
        base = Sphere.fit(head, h, shape=shape, ambient=False)
        away = h.mean(0) - base.loc
        assert torch.allclose(
            away - away @ base.subspace.T @ base.subspace, torch.zeros(9, dtype=torch.float64), atol=1e-9
        )


def test_fit_accepts_other_precisions_and_leaves_the_rng_alone():
    state = torch.random.get_rng_state()
    head = random_head(3, 5, dtype=torch.float32)
    for dtype in (torch.float16, torch.float32, torch.float64):
        base = Sphere.fit(head, torch.randn(100, 5, generator=seeded()).to(dtype), shape="elliptic")
        assert base.radius.dtype == torch.float32
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("activations", "kwargs", "message"),
    [
        (torch.zeros(0, 5), {}, r"shape \(0, 5\)"),
        (torch.ones(1, 5), {}, "N >= 2"),
        (torch.ones(9, 4), {}, r"expected \(N, 5\)"),
        (torch.zeros(9, 5), {}, "all 9 activations are equal to the centre"),
        (torch.full((9, 5), math.nan), {}, "9 of 9 rows of activations hold NaN"),
        (torch.ones(9, 5), {"shape": "elliptic"}, "all 9 activations are equal"),
        (torch.eye(5), {"shape": "oval"}, "shape is 'oval'; expected 'round' or 'centered' or 'elliptic'"),
        (torch.eye(5), {"shrinkage": 2.0}, "shrinkage"),
        (torch.eye(5), {"radii": 0}, "radii"),
        (torch.eye(5)[:2], {"shape": "elliptic", "shrinkage": 0.0}, "2 activations in 5 dimensions is singular"),
    ],
)
def test_fit_refuses(activations, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sphere.fit(random_head(3, 5, dtype=torch.float32), activations, **kwargs)


@pytest.mark.parametrize("bad", [torch.ones(9, 5, dtype=torch.long), [[1.0] * 5] * 9])
def test_fit_takes_floating_tensors(bad):
    with pytest.raises(TypeError, match=r"expected a floating-point tensor .* or penult\.Activations"):
        Sphere.fit(random_head(3, 5), bad)


def test_radii_histograms_merge():
    from penult.bases._sphere_fit import RadialHistogram

    r = torch.rand(1000, generator=seeded()) * 10 + 1e-3
    whole, left, right = RadialHistogram(), RadialHistogram(), RadialHistogram()
    whole.update(r)
    left.update(r[:300])
    right.update(r[300:])
    left.merge(right)
    for a, b in zip(whole.atoms(64), left.atoms(64), strict=True):
        assert torch.allclose(a, b)
    radius, share = whole.atoms(64)
    assert len(radius) <= 64
    assert float(share.sum()) == pytest.approx(1)
    assert float((radius * share).sum()) == pytest.approx(float(r.double().mean()))
    assert bool((radius.diff() > 0).all())


# --- construction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"radius": -1.0}, "positive, finite"),
        ({"radius": torch.tensor([])}, "positive, finite"),
        ({"radius": math.inf}, "positive, finite"),
        ({"radius": 1.0, "log_weights": torch.zeros(2)}, r"log_weights has shape \(2,\)"),
        ({"radius": 1.0, "log_weights": torch.tensor([-math.inf])}, "finite sum of the weights"),
        ({"radius": 1.0, "loc": torch.tensor([math.nan])}, r"loc holds 1 values that are NaN"),
        (
            {"radius": 1.0, "scale_tril": torch.tensor([[1.0, 0], [math.nan, 1]])},
            "scale_tril holds 1 values",
        ),
        ({"radius": 1.0, "subspace": torch.zeros(0, 3)}, "all equal span no subspace"),
        ({"radius": 1.0, "loc": torch.zeros(2, 2)}, r"loc has shape \(2, 2\); expected \(d,\)"),
        ({"radius": 1.0, "loc": torch.tensor(1.0)}, r"loc has shape \(\); expected \(d,\)"),
        ({"radius": 1.0, "scale_tril": torch.tensor(1.0)}, r"scale_tril has shape \(\); expected \(m, m\)"),
        ({"radius": 1.0, "subspace": torch.ones(1, 3)}, "expected orthonormal rows"),
        ({"radius": 1.0, "subspace": torch.eye(4)[:, :3]}, "m <= d"),
        ({"radius": 1.0, "subspace": torch.eye(3)[:2], "loc": torch.zeros(4)}, "loc has dimension 4"),
        ({"radius": 1.0, "subspace": torch.eye(3)[:2], "scale_tril": torch.eye(3)}, r"expected \(2, 2\)"),
        ({"radius": 1.0, "scale_tril": torch.ones(2, 2)}, "lower triangular"),
        ({"radius": 1.0, "scale_tril": -torch.eye(2)}, "positive diagonal"),
    ],
)
def test_bad_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sphere(**kwargs)


def test_wrong_dimension_of_activations():
    base = charted(5, 3)
    for call in (base.log_prob, base.read, base.tilt, base.log_mgf):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 5\), since .* dimension 5"):
            call(torch.zeros(2, 4, dtype=torch.float64))


def test_repr_info_and_moves():
    base = charted(5, 3)
    assert "radii=3" in repr(base)
    assert "subspace=(3, 5)" in repr(base)
    assert base.info.exact_mgf
    assert base.info.name == "elliptic sphere"
    assert Sphere(1.0).in_features is None
    assert base.to(torch.float32).radius.dtype == torch.float32
    again = Sphere.from_config(base.config(), base.state_dict(), penult.Head(torch.eye(3)))
    h = torch.randn(3, 5, generator=seeded())
    assert torch.equal(again.log_prob(h), base.log_prob(h))


def test_single_precision_sphere_on_other_precisions():
    base = charted(5, 3, dtype=torch.float32)
    h = torch.randn(3, 5, generator=seeded(), dtype=torch.float64)
    assert base.log_prob(h).dtype == torch.float64
    assert torch.allclose(base.log_prob(h.half()).float(), base.log_prob(h).float(), atol=0.05)


def test_marginal_of_radii_with_special_weights():
    # ω(r) ∝ p(r) / Σ_y e^{b'_y + F(r ρ_y)}: solved by hand for two atoms
    head = Head(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64))
    h = torch.tensor([[1.0, 0.0]] * 30 + [[0.0, 2.0]] * 70, dtype=torch.float64)
    base = Sphere.fit(head, h, radii=2)
    f = special.log_sphere_mgf(2, torch.tensor([1.0, 2.0], dtype=torch.float64))
    want = torch.tensor([0.3, 0.7], dtype=torch.float64).log() - f
    assert torch.allclose(base.radius, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert torch.allclose(base.log_weights, want.log_softmax(-1))


# --- trimmed fits -------------------------------------------------------------------------------------------


def test_trimmed_fit_survives_outliers():
    head = random_head(4, 6, norm=2.0)
    g = torch.Generator().manual_seed(0)
    shape = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    pair = GenerativePair(head, Gaussian(torch.ones(6, dtype=torch.float64), torch.diag(shape.square())))
    familiar, _ = pair.sample((1800,), generator=g)
    outliers = 1 + 8 * torch.randn(200, 6, generator=g, dtype=torch.float64) * (shape < 0.8)
    dirty = torch.cat([familiar, outliers])
    clean, plain, trimmed = (
        Sphere.fit(head, rows, shape="elliptic", trim=trim)
        for rows, trim in ((familiar, 0.0), (dirty, 0.0), (dirty, 0.2))
    )

    def apart(base):
        gram = base.scale_tril @ base.scale_tril.T
        true = clean.scale_tril @ clean.scale_tril.T
        return float((gram / gram.trace() - true / true.trace()).norm())

    assert apart(trimmed) < 0.3 * apart(plain)
    again = Sphere.fit(head, dirty, shape="elliptic", trim=0.2)
    assert torch.equal(again.scale_tril, trimmed.scale_tril)


def test_trimmed_fit_of_stored_activations_is_that_of_a_tensor():
    head = random_head(3, 4)
    h = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    acts = Activations(h, head(h))
    one, other = (Sphere.fit(head, rows, shape="elliptic", trim=0.3) for rows in (h, acts))
    assert torch.equal(one.loc, other.loc)
    assert torch.equal(one.radius, other.radius)


@pytest.mark.parametrize(("trim", "shape"), [(0.5, "elliptic"), (-0.1, "elliptic"), (0.1, "round"), (0.1, "centered")])
def test_trim_out_of_range(trim, shape):
    with pytest.raises(ValueError, match=f"trim is {trim}"):
        Sphere.fit(random_head(3, 4), torch.randn(50, 4).double(), shape=shape, trim=trim)


def test_rows_whose_norms_overflow_are_refused():
    with pytest.raises(ValueError, match="mean norm of the centered rows of the head is inf"):
        Sphere.from_head(Head(1e25 * torch.tensor([[1.0, 0.0], [-1.0, 0.0]])))
