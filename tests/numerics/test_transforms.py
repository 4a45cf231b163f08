"""torch.func: laws map over activations and rows, and have derivatives of first and second order."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import penult
from tiers import thin


@pytest.fixture
def wide(problem):
    """Activations in float32 or float64, in which derivatives are looked at."""
    return problem.rows(4).to(torch.promote_types(problem.dtype, torch.float32))


def test_laws_map_over_activations(problem, kind, wide, laws_of, close):
    for name, law in laws_of(problem.pair(kind)).items():
        if name != "prior":
            close(vmap(law)(wide), law(wide), 5 * problem.tolerance, name)


def test_gradients_are_those_of_autograd(problem, kind, wide, laws_of, close):
    pair = problem.pair(kind)
    leaf = wide.clone().requires_grad_()
    for name, law in laws_of(pair).items():
        if name in ("prior", "logits", "posterior"):
            continue
        (expected,) = torch.autograd.grad(law(leaf).sum(), leaf)
        close(vmap(grad(lambda h, law=law: law(h).sum()))(wide), expected, 50 * problem.tolerance, name)


@pytest.mark.parametrize("kind", thin(["elliptic", "mixture"], keep=["elliptic"]))
def test_what_is_kept_outlives_the_transform_that_met_it_first(problem, kind, wide, laws_of, close):
    for name in laws_of(problem.pair(kind)):
        if name == "prior":
            continue
        pair = problem.pair(kind)
        law = laws_of(pair)[name]
        vmap(grad(lambda h, law=law: law(h).sum()))(wide)
        close(laws_of(pair)[name](wide), laws_of(problem.pair(kind))[name](wide), problem.tolerance, name)
        assert bool(pair.head.span().isfinite().all())


def test_transforms_of_the_tensors_of_a_pair(problem, wide, close):
    pair = penult.GenerativePair(problem.head().float(), problem.base("gaussian", problem.head(), problem.rows()))
    loc, h = pair.base.loc.clone(), wide.float()

    def law(loc):
        return torch.func.functional_call(_LogProb(pair), {"pair.base.loc": loc}, (h,)).sum()

    step = 1e-2 * torch.nn.functional.one_hot(torch.tensor(0), len(loc)).to(loc)
    slope = (law(loc + step) - law(loc - step)) / 2e-2
    close(grad(law)(loc)[0], slope, 1e-2)
    close(pair.log_prob(h).sum(), law(loc), 1e-5)


class _LogProb(torch.nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, h):
        return self.pair.log_prob(h)


def test_scores_of_densities_are_differences_of_classes(problem, wide, close):
    # d log p(h|y) / dh - d log p(h|y') / dh = w_y - w_y', whatever the base
    pair = problem.pair("elliptic")
    jacobian = jacrev(pair.log_joint)(wide[0])
    rows = pair.head.centered_weight().to(jacobian.dtype)
    close(jacobian - jacobian[:1], rows - rows[:1], 50 * problem.tolerance)


def test_second_derivatives(problem, kind, wide, close):
    pair, h = problem.pair(kind), wide[0]
    found = hessian(pair.log_prob)(h)
    close(found, found.mT, 1e-3, "symmetry")
    close(found, jacrev(jacrev(pair.log_prob))(h), 1e-3)
    exact = problem.exact(pair)
    close(found, torch.autograd.functional.hessian(exact.log_prob, h.cpu().double()), 1e-3)


def test_the_mean_is_the_derivative_of_log_m(problem, close):
    pair = problem.pair("elliptic")
    rows = pair.head.centered_weight().float()
    close(vmap(grad(pair.base.log_mgf))(rows), pair.base.tilt(rows).mean, 1e-4)
    covariance = hessian(pair.base.log_mgf)(rows[0])
    assert float(torch.linalg.eigvalsh(covariance).min()) > 0  # log M is convex
    drawn = pair.base.tilt(rows[0]).sample((40_000,), problem.generator())
    close(torch.cov(drawn.T), covariance, 0.1)


def test_derivatives_of_laws_in_their_rows(problem, close):
    # d log p(h|w) / dw = h - E[h|w]
    pair, h = problem.pair("gaussian"), problem.rows(1).float()[0]
    w = pair.head.centered_weight(0).float()
    close(grad(lambda row: pair.base.tilt(row).log_prob(h))(w), h - pair.base.tilt(w).mean, 1e-4)


def test_fitted_scores_map_and_differentiate(problem, wide, scores_of, close):
    for name, score in scores_of(problem.head(), problem.rows(100)).items():
        leaf = wide.clone().requires_grad_()
        (expected,) = torch.autograd.grad(score(leaf).sum(), leaf)
        found = vmap(lambda h, score=score: grad(lambda row: score(row.unsqueeze(0)).sum())(h))(wide)
        close(found, expected, 100 * problem.tolerance, name)


@pytest.mark.parametrize("dim", [2, 3, 64])
def test_von_mises_fisher_to_second_order(problem, dim, close):
    work = torch.float32 if problem.device.type == "mps" else torch.float64
    loc = torch.nn.functional.normalize(problem.normal(dim).to(work), dim=-1)
    x = torch.nn.functional.normalize(problem.normal(dim, seed=4).to(work), dim=-1)
    kappa = torch.tensor(7.0, dtype=work, device=problem.device)

    def law(k):
        return penult.VonMisesFisher(loc, k, validate_args=False).log_prob(x)

    first, second = grad(law)(kappa), hessian(law)(kappa)
    mean = penult.special.mean_resultant_length(dim, kappa)
    close(first, (loc * x).sum() - mean, 1e-6)
    close(second, -penult.special.cosine_variance(dim, kappa), 1e-6)
    close(jacfwd(law)(kappa), first, 1e-6)
    many = torch.linspace(0.1, 50.0, 9, dtype=work, device=problem.device)
    close(vmap(law)(many), torch.stack([law(k) for k in many]), 1e-6)
