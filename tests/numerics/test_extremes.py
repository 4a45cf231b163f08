"""Heads and activations of any size, next to each other, and at the ends of what a dtype holds."""

import math
from functools import partial

import pytest
import torch

import penult
from penult import Sphere, scores


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4, 1e8])
def test_rows_of_any_norm(problem, kind, scale, laws_of, close):
    head, rows = problem.head(scale=scale), problem.rows(scale=1 / scale)
    pair = problem.pair(kind, head, rows)
    exact = laws_of(problem.exact(pair))
    for name, law in laws_of(pair).items():
        # rows and activations of half precision have products of 8 digits fewer
        close(
            law(rows),
            exact[name](rows.cpu().double()),
            max(problem.tolerance, 4 * torch.finfo(law(rows).dtype).eps),
            name,
        )
    drawn, _ = pair.sample((50,), generator=problem.generator())
    assert bool(drawn.isfinite().all())
    norms = torch.linalg.vector_norm(drawn.double(), dim=-1) * scale
    assert 0.05 < float(norms.median()) < 500


@pytest.mark.parametrize("kind", ["elliptic", "gaussian", "mixture"])
def test_rows_that_differ_in_the_sixth_digit(problem, kind, laws_of, close):
    if problem.dtype == torch.bfloat16:
        pytest.skip("bfloat16 has two digits")
    row = problem.normal(1, 8)
    head = penult.Head(row * (1 + 1e-6 * problem.normal(5, 8, seed=3)))
    pair, rows = problem.pair(kind, head), problem.rows()
    exact = laws_of(problem.exact(pair))
    for name, law in laws_of(pair).items():
        close(law(rows), exact[name](rows.cpu().double()), problem.tolerance, name)


def test_rows_that_differ_by_rounding_imply_no_radius():
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = row * (1 + 1e-6 * noise)
    with pytest.raises(ValueError, match=r"rounding of their torch\.float32.*float64.*Sphere\(radius\)"):
        penult.GenerativePair(penult.Head(weight.float()))
    pair = penult.GenerativePair(penult.Head(weight))  # whose float64 tells them apart
    assert float(pair.base.radius) > 1e4
    h, y = pair.sample((4000,), generator=torch.Generator().manual_seed(0))
    assert float((pair.posterior(h).probs.argmax(-1) == y).double().mean()) > 0.9


@pytest.mark.parametrize(("classes", "dim"), [(2, 2), (2, 16384), (100_000, 2), (3, 2048), (1000, 64)])
def test_few_and_many_classes_and_dimensions(problem, classes, dim, laws_of, close):
    head = problem.head(classes, dim)
    base = penult.Sphere(torch.tensor([0.7, 1.4], device=problem.device, dtype=torch.float32) * dim**0.5)
    pair, rows = penult.GenerativePair(head, base), problem.rows(6, dim)
    exact = laws_of(problem.exact(pair))
    for name, law in laws_of(pair).items():
        if name == "directional" and classes > 10_000:
            continue  # its table takes ten seconds then
        bar = max(5 * problem.tolerance, 4 * torch.finfo(law(rows).dtype).eps)
        close(law(rows), exact[name](rows.cpu().double()), bar, name)
    h, y = pair.sample((64,), generator=problem.generator())
    assert bool(h.isfinite().all())
    assert bool(((y >= 0) & (y < classes)).all())


@pytest.mark.parametrize(
    ("classes", "dim"),
    [
        (50_000, 512),
        (1000, 16384),
        pytest.param(100_000, 2000, marks=pytest.mark.long),
        pytest.param(12_000, 16384, marks=pytest.mark.long),
    ],
)
def test_large_heads(problem, classes, dim, close):
    """Heads of 60 to 800 MB; what would need a second W for every activation would not fit, nor end."""
    if problem.dtype == torch.float64:
        pytest.skip("float32 is enough to see it")
    g = torch.Generator().manual_seed(0)
    block = torch.randn(1000, dim, generator=g) / dim**0.5
    factors = torch.linspace(0.5, 1.5, classes // 1000)
    weight = torch.cat([block * factor for factor in factors]).to(problem.device, problem.dtype)
    head = penult.Head(weight)
    pair = penult.GenerativePair(head, penult.Sphere(float(dim**0.5)))
    h, y = pair.sample((32,), generator=problem.generator())
    logits = torch.nn.functional.linear(h.double().cpu(), weight[::997].double().cpu())
    off = pair.posterior(h).logits[:, ::997].double().cpu() - logits
    close(off - off.mean(-1, keepdim=True), torch.zeros_like(off), 1e-3 if problem.dtype == torch.float32 else 0.2)
    if classes == 1000:
        assert bool(penult.scores.directional(pair, h).isfinite().all())
    assert bool(pair.log_prob(h.float()).isfinite().all())
    assert bool(pair.given(y[:4]).log_prob(h[:4].float()).isfinite().all())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_activations_at_the_ends_have_posteriors_and_scores(problem, kind, size, laws_of, close):
    pair, rows = problem.pair(kind), problem.rows(6) * size
    exact = laws_of(problem.exact(pair))
    for name, law in laws_of(pair).items():
        found, expected = law(rows), exact[name](rows.cpu().double())
        assert not bool(found.isnan().any()), name
        if name in ("posterior", "logits", "energy", "max_logit", "msp", "directional", "prior"):
            close(found, expected, 1e-4 if size else 5 * problem.tolerance, name)


def test_the_centre_of_a_sphere_has_infinite_density_and_a_finite_score(problem):
    pair, centre = problem.pair("data-free"), problem.rows(1) * 0
    assert float(pair.log_prob(centre)) == math.inf  # log r^(1 - m): the surface of no radius has no area
    assert math.isfinite(float(penult.scores.directional(pair, centre)))
    found, expected = pair.posterior(centre).probs.double(), pair.head.full_bias.double().softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_densities_far_out_round_to_minus_infinity(problem, kind):
    if problem.dtype == torch.float64:
        pytest.skip("float64 holds them")
    pair, rows = problem.pair(kind), problem.rows(3) * 1e25
    assert pair.log_prob(rows).tolist() == [-math.inf] * 3
    assert penult.scores.density(pair, rows).tolist() == [math.inf] * 3
    threshold = penult.scores.Threshold.fit(penult.scores.density, 1.01 * problem.rows(60), pair=pair)
    assert threshold(rows).tolist() == [True] * 3


@pytest.mark.parametrize("kind", ["elliptic", "span", "gaussian"])
def test_a_class_that_is_never_predicted(problem, kind):
    bias = torch.zeros(5)
    bias[2] = -2000.0  # its probability is zero in every dtype
    head = penult.Head(problem.head().weight, bias.to(problem.device, problem.dtype))
    pair = problem.pair(kind, head)
    assert float(pair.prior.probs[2]) == 0.0
    assert bool(pair.prior.logits.isfinite().all())
    _, y = pair.sample((500,), generator=problem.generator())
    assert not bool((y == 2).any())
    drawn = pair.given(2).sample((50,), generator=problem.generator())  # it has a law nevertheless
    assert bool(drawn.isfinite().all())
    assert bool(pair.given(2).log_prob(drawn).isfinite().all())
    assert bool(pair.log_joint(drawn.float()).isfinite().all())
    shifted = pair.with_prior(torch.full((5,), 0.2))
    assert float((shifted.prior.probs - 0.2).abs().max()) < (1e-3 if problem.dtype != torch.bfloat16 else 0.9)


def test_a_marginal_has_no_law_of_a_class_that_is_never_predicted(problem):
    bias = torch.zeros(5)
    bias[2] = -2000.0
    head = penult.Head(problem.head().weight, bias.to(problem.device, problem.dtype))
    with pytest.raises(ValueError, match="class 2 has probability 0"):
        problem.pair("mixture", head)


# --- activations whose squares overflow ---------------------------------------------------------------------


LARGE_HEAD = penult.Head(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
LARGE_ROWS = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)) + 0.5
FITS = {
    "round": lambda: Sphere.fit(LARGE_HEAD, LARGE_ROWS),
    "elliptic": lambda: Sphere.fit(LARGE_HEAD, LARGE_ROWS, shape="elliptic"),
    "span": lambda: Sphere.fit(LARGE_HEAD, LARGE_ROWS, ambient=False),
    "gaussian": lambda: penult.Gaussian.fit(LARGE_HEAD, LARGE_ROWS),
    "mixture": lambda: penult.Marginal.fit(LARGE_HEAD, LARGE_ROWS, components=3),
}


def large_scores(base):
    if base == "fitted":
        labels = LARGE_HEAD(LARGE_ROWS).argmax(-1)
        return [
            scores.Composite.fit(LARGE_HEAD, LARGE_ROWS),
            scores.Mahalanobis.fit(LARGE_ROWS, labels),
            scores.RelativeMahalanobis.fit(LARGE_ROWS, labels),
            scores.KNN.fit(LARGE_ROWS, k=3),
            scores.ViM.fit(LARGE_HEAD, LARGE_ROWS, dims=2),
        ]
    pair = penult.GenerativePair(LARGE_HEAD, FITS[base]())
    of_pair = [scores.density, scores.energy, scores.msp, *([scores.directional] if base in SPHERES else [])]
    laws = [pair.log_prob, pair.given(0).log_prob, lambda h: pair.posterior(h).probs]
    return [partial(score, pair) for score in of_pair] + laws


SPHERES = ("round", "elliptic", "span")


@pytest.mark.parametrize("scale", [1e10, 1e19, 1e25, 1e37])
@pytest.mark.parametrize("base", [*FITS, "fitted"])
def test_large_activations_have_the_scores_that_float64_gives(base, scale):
    h = scale * LARGE_ROWS[:20]
    for score in large_scores(base):
        value, wide = score(h), score(h.double())
        assert value.dtype == torch.float32
        assert not value.isnan().any()
        assert torch.allclose(value, wide.float(), rtol=1e-5, atol=1e-6)


def test_directions_do_not_depend_on_the_norm():
    h = LARGE_ROWS[:20]
    knn = scores.KNN.fit(h, k=2)
    assert torch.allclose(knn(1e25 * h), knn(h), atol=1e-5)
    assert torch.allclose(scores.KNN.fit(1e25 * h, k=2)(h), knn(h), atol=1e-5)
    base, row = Sphere(torch.tensor([1.0])), LARGE_HEAD.centered_weight()[:1].expand(20, -1)
    assert torch.allclose(base.cosine(1e25 * h, row), base.cosine(h, row), atol=1e-6)


def test_activations_beyond_the_range_of_float64_are_refused():
    pair = penult.GenerativePair(LARGE_HEAD, Sphere(1.0))
    with pytest.raises(ValueError, match=r"the largest value of h is 1e\+200; expected at most 1e\+150"):
        pair.log_prob(torch.full((1, 4), 1e200, dtype=torch.float64))
