"""Half precision and torch.autocast lose no digits beyond those of the numbers given."""

import pytest
import torch

import penult

NARROW = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("narrow", NARROW)
def test_narrow_activations_are_read_as_they_are(problem, kind, narrow, laws_of, close):
    pair = problem.pair(kind)
    exact, h = laws_of(problem.exact(pair)), problem.rows().to(narrow)
    for name, law in laws_of(pair).items():
        found, expected = law(h), exact[name](h.double().cpu())
        assert name in ("log_prob", "log_joint") or found.dtype in (torch.float32, torch.float64)
        # densities come in the dtype of h, rounded once
        close(found, expected, torch.finfo(narrow).eps if found.dtype == narrow else max(problem.tolerance, 2e-5), name)


@pytest.mark.parametrize("narrow", NARROW)
def test_narrow_heads_have_wide_laws(problem, narrow, laws_of, close):
    head = penult.Head(problem.head().weight.to(narrow), problem.head().bias.to(narrow))
    pair = penult.GenerativePair(head, penult.Sphere(torch.tensor([1.0, 2.0], device=problem.device)))
    wide = penult.Head(head.weight.double().cpu(), head.bias.double().cpu())
    exact = laws_of(penult.GenerativePair(wide, penult.Sphere(torch.tensor([1.0, 2.0], dtype=torch.float64))))
    h = problem.rows().float()
    for name, law in laws_of(pair).items():
        close(law(h), exact[name](h.double().cpu()), 1e-5, name)


@pytest.mark.parametrize("narrow", NARROW)
def test_fitted_scores_read_narrow_activations(problem, narrow, scores_of, close):
    h = problem.rows().to(narrow)
    for name, score in scores_of(problem.head(), problem.rows(100)).items():
        exact = problem.exact(score)
        assert score(h).dtype in (torch.float32, torch.float64)
        close(score(h), exact(h.double().cpu()), 2e-4, name)


def test_autocast_changes_no_law(problem, kind, laws_of):
    pair, h = problem.pair(kind), problem.rows()
    for name, law in laws_of(pair).items():
        expected = law(h)
        fresh = laws_of(penult.GenerativePair(pair.head, pair.base))[name]
        with torch.autocast(h.device.type, dtype=torch.bfloat16):
            assert torch.equal(fresh(h), expected), name
    mean = pair.given(1).mean
    with torch.autocast(h.device.type, dtype=torch.bfloat16):
        assert torch.equal(pair.given(1).mean, mean)


def test_autocast_leaves_the_posterior_the_softmax_of_the_head(problem, kind, close):
    pair, h = problem.pair(kind), problem.rows()
    exact = problem.exact(pair.head)(h.double().cpu()).softmax(-1)
    with torch.autocast(h.device.type, dtype=torch.bfloat16):
        close(pair.posterior(h).probs, exact, problem.tolerance)
        own = pair.head(h)
    assert own.dtype == torch.bfloat16 or h.dtype == torch.float64  # the model's own logits are as autocast has them


def test_autocast_changes_no_draw(problem, kind):
    pair, y = problem.pair(kind), torch.tensor([0, 2])
    joint, own = pair.sample((20,), generator=problem.generator()), pair.given(y).sample((5,), problem.generator())
    with torch.autocast(problem.device.type, dtype=torch.bfloat16):
        assert torch.equal(pair.sample((20,), generator=problem.generator())[0], joint[0])
        assert torch.equal(pair.given(y).sample((5,), problem.generator()), own)


@pytest.mark.parametrize("dim", [2, 8, 40, 100])
def test_autocast_changes_no_distribution(problem, dim):
    wide = torch.promote_types(problem.dtype, torch.float32)
    loc = torch.nn.functional.normalize(problem.normal(3, dim).to(wide), dim=-1)
    p = penult.VonMisesFisher(loc, torch.tensor([0.0, 5.0, 100.0]).to(loc))
    mixture = penult.distributions.PrincipalMixture.fit(problem.rows(100, dim).to(wide), components=2, dims=3)
    for law in (p, mixture):
        x = law.sample((6,), generator=problem.generator())
        expected, mean = law.log_prob(x), law.mean
        with torch.autocast(problem.device.type, dtype=torch.bfloat16):
            assert torch.equal(law.sample((6,), generator=problem.generator()), x)
            assert torch.equal(law.log_prob(x), expected)
            assert torch.equal(law.mean, mean)


def test_autocast_changes_no_fitted_score(problem, scores_of):
    h = problem.rows()
    for name, score in scores_of(problem.head(), problem.rows(100)).items():
        expected = score(h)
        with torch.autocast(h.device.type, dtype=torch.bfloat16):
            assert torch.equal(score(h), expected), name


def test_gradients_of_what_was_computed_under_autocast(problem, close):
    pair = problem.pair("elliptic")
    h = problem.rows().to(torch.promote_types(problem.dtype, torch.float32)).requires_grad_()
    (expected,) = torch.autograd.grad(penult.scores.directional(pair, h).sum(), h)
    with torch.autocast(h.device.type, dtype=torch.bfloat16):
        score = penult.scores.directional(pair, h).sum()
    (found,) = torch.autograd.grad(score, h)  # outside, as torch advises
    close(found, expected, 1e-6)


def test_autocast_changes_no_radius_that_a_head_implies(problem):
    head = problem.head()
    expected = penult.Sphere.from_head(head).radius
    with torch.autocast(problem.device.type, dtype=torch.bfloat16):
        assert torch.equal(penult.Sphere.from_head(head).radius, expected)
