"""Pairs to compute with, and exact ones to hold them against."""

import copy
import functools

import pytest
import torch

import penult

KINDS = ("data-free", "elliptic", "span", "gaussian", "mixture")


class Problem:
    """A head of random rows, activations for it, and pairs of all kinds, on one device in one dtype."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype

    def normal(self, *shape, seed=0):
        """Standard normal numbers, the same on every device."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=g).to(self.device, self.dtype)

    def head(self, classes=5, dim=8, scale=1.0, seed=0):
        return penult.Head(2 * scale / dim**0.5 * self.normal(classes, dim, seed=seed), self.normal(classes, seed=1))

    def rows(self, count=60, dim=8, scale=1.0):
        return (self.normal(count, dim, seed=2) + 0.5) * scale

    def base(self, kind, head, rows):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if kind == "data-free":
            return penult.Sphere.from_head(head)
        if kind in ("elliptic", "span"):
            return penult.Sphere.fit(
                head, rows, shape="elliptic" if kind == "elliptic" else "round", ambient=kind != "span"
            )
        if kind == "gaussian":
            return penult.Gaussian.fit(head, rows)
        return penult.Marginal.fit(head, rows, components=2, positive=False)

    def pair(self, kind, head=None, rows=None):
        head = self.head() if head is None else head
        rows = self.rows(dim=head.in_features) if rows is None else rows
        return penult.GenerativePair(head, self.base(kind, head, rows))

    def exact(self, pair):
        """The same pair in float64, on the CPU, where there always is one."""
        return copy.deepcopy(pair).cpu().double()

    def generator(self, seed=0):
        return torch.Generator(self.device).manual_seed(seed)

    @property
    def tolerance(self):
        """Relative, of what is computed in this dtype; half precision is computed in float32."""
        return 1e-9 if self.dtype == torch.float64 else 2e-5


@pytest.fixture
def problem(device, dtype):
    return Problem(device, dtype)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def laws(pair):
    """Everything that a pair says about activations h (N, d), by name."""
    functions = {
        "log_prob": lambda h: pair.log_prob(h),
        "log_joint": lambda h: pair.log_joint(h),
        "posterior": lambda h: pair.posterior(h).probs,
        "logits": lambda h: pair.posterior(h).logits,
        "given": lambda h: pair.given(torch.tensor([0, 1])).log_prob(h.unsqueeze(-2)),
        "prior": lambda h: pair.prior.logits,
    }
    for name in ("energy", "max_logit", "msp", "density", "directional"):
        if name != "directional" or isinstance(pair.base, penult.Sphere):
            functions[name] = functools.partial(getattr(penult.scores, name), pair)
    return functions


def fitted_scores(head, rows):
    """Every score that is fitted, to float rows."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    labels = torch.arange(len(rows), device=rows.device) % 4
    return {
        "Composite": penult.scores.Composite.fit(head, rows),
        "Mahalanobis": penult.scores.Mahalanobis.fit(rows, labels),
        "RelativeMahalanobis": penult.scores.RelativeMahalanobis.fit(rows, labels),
        "KNN": penult.scores.KNN.fit(rows, k=5),
        "ViM": penult.scores.ViM.fit(head, rows),
    }


@pytest.fixture
def laws_of():
    return laws


@pytest.fixture
def scores_of():
    return fitted_scores


@pytest.fixture
def close():
    def check(found, expected, tolerance, name=""):
        """Finite, and off by no more than a tolerance relative to max(1, |value|)."""
        found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
        assert bool(found.isfinite().all()), f"{name} is not finite"
        error = float(((found - expected).abs() / expected.abs().clamp_min(1)).max())
        assert error <= tolerance, f"{name} is off by {error:.3g}, more than {tolerance:.3g}"

    return check
