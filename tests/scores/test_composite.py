"""The recommended score: its parts against the scores that they are made of, and fits of unusual sizes."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import penult
from penult.scores import Composite, Mahalanobis, directional, energy, msp, usual


def network(classes, dims, rows, rectified=False, seed=0):
    """A head, activations of its classes, and activations of no class."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, dims, generator=g)
    head = penult.Head(8 * weight / weight.norm(dim=1, keepdim=True), 0.1 * torch.randn(classes, generator=g))
    mixing = torch.randn(dims, dims, generator=g) / (2 * dims**0.5)
    y = torch.randint(classes, (rows,), generator=g)
    h = head.weight[y] / 4 + torch.randn(rows, dims, generator=g) @ mixing
    other = torch.randn(300, dims, generator=g) * h.norm(dim=1).mean() / dims**0.5
    if rectified:
        h, other = h.clamp_min(0), other.clamp_min(0)
    return head, h, other


def raw(score, h):
    return score.parts(h) * score.deviation + score.center


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("classes", "dims", "rows"), [(2, 8, 200), (10, 64, 600), (300, 16, 2000)])
def test_parts_are_directional_mahalanobis_and_the_log_odds_of_msp(classes, dims, rows, bias):
    head, h, other = network(classes, dims, rows)
    head = penult.Head(head.weight.double() + 3, head.bias.double() if bias else None)
    h, other = h.double() + 1, other.double()
    pair = penult.GenerativePair(head, penult.Sphere.fit(head, h, shape="elliptic", shrinkage="oas"))
    score = Composite.fit(pair, h)
    direction, distance, certainty = raw(score, other).unbind(-1)
    assert torch.allclose(direction, directional(pair, other), rtol=1e-8)
    assert torch.allclose(distance, Mahalanobis.fit(h, head=head, normalize=True).score(other), rtol=1e-8)
    probability = msp(pair, other)
    assert torch.allclose(certainty, probability.log() - (-probability).log1p(), rtol=1e-8)
    assert torch.allclose(score(other), score.parts(other).sum(-1))


def test_certainty_has_no_limit():
    head, h, _ = network(4, 6, 200)
    far = 1e4 * head.weight[:1]
    z = head(far).double().sort(descending=True).values
    certainty = raw(Composite.fit(head, h), far)[0, 2]
    assert torch.isclose(certainty.double(), z[0, 1:].logsumexp(-1) - z[0, 0], rtol=1e-4)


def test_scales_are_those_of_rows_that_a_fit_has_not_seen():
    # With so few rows, distances of the rows that a covariance was fitted to are much too small.
    head, h, _ = network(4, 64, 100)
    fresh = network(4, 64, 2100)[1][100:]
    score = Composite.fit(head, h)
    inside, outside = score.parts(h).mean(0), score.parts(fresh).mean(0)
    assert outside.abs().max() < 1
    assert inside[1] < -2


@pytest.mark.parametrize(
    ("classes", "dims", "rows", "rectified"),
    [(2, 2, 200, False), (2, 64, 200, True), (10, 256, 200, True), (1000, 32, 500, False), (1000, 8, 60, False)],
)
def test_unusual_sizes(classes, dims, rows, rectified):
    head, h, other = network(classes, dims, rows, rectified)
    h[:, 0] = 0 if dims > 2 else h[:, 0]
    other[:, 0] = 0 if dims > 2 else other[:, 0]
    score = Composite.fit(head, h)
    for part in (h, other, torch.zeros_like(h[:3]), 1e9 * h[:3]):
        assert score(part).isfinite().all()
    assert score(other).mean() > score(h).mean()
    assert score(h.half()).dtype == torch.float32
    assert score(h[:0]).shape == (0,)


def test_outliers_have_high_scores():
    head, h, other = network(10, 64, 3000)
    score = Composite.fit(head, h[:1500])
    values = np.concatenate([score(h[1500:]), score(other)])
    assert roc_auc_score([0] * 1500 + [1] * 300, values) > 0.99


def test_trimmed_fits_tolerate_outliers():
    head, h, other = network(10, 32, 2000)
    # Outliers that are close to each other are a class of their own to a fit that believes them.
    other = other[:1] + other / 10
    mixed = torch.cat([h[:1000], other[:150]])
    aurocs = []
    for trim in (0.0, 0.2):
        score = Composite.fit(head, mixed, trim=trim)
        aurocs.append(roc_auc_score([0] * 1000 + [1] * 150, torch.cat([score(h[1000:]), score(other[150:])])))
    assert aurocs[1] > aurocs[0] + 0.01


def test_the_fit_follows_no_label_and_no_global_state():
    head, h, other = network(5, 16, 400)
    acts = penult.Activations(h, head(h), torch.zeros(400, dtype=torch.long))
    state = torch.get_rng_state()
    first, again = Composite.fit(head, h), Composite.fit(head, acts)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(other), again(other))
    assert first.reference == again.reference is not None


def test_blocks_state_and_copies():
    head, h, other = network(5, 16, 400)
    score = Composite.fit(head, h)
    many = other.repeat(8, 1)
    assert torch.allclose(score(many), score(other).repeat(8), atol=1e-4)
    assert torch.equal(copy.deepcopy(score)(other), score(other))
    narrow = copy.deepcopy(score).half()
    assert narrow.whitener.dtype == torch.float32
    assert narrow.table.dtype == torch.float64
    # Another number of predicted classes, and a table of another length.
    loaded = Composite.fit(penult.Head(head.weight.clone(), head.bias.clone()), h[:40] * 3)
    loaded.load_state_dict(score.state_dict())
    assert torch.equal(loaded(other), score(other))
    assert "distance" in repr(score)


def test_compiled_and_transformed():
    head, h, other = network(3, 6, 100)
    score = Composite.fit(head, h)
    gradient = torch.func.grad(lambda x: score(x).sum())(other)
    x = other.clone().requires_grad_()
    score(x).sum().backward()
    assert torch.allclose(gradient, x.grad, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(score, (other,), dynamic_shapes={"h": {0: torch.export.Dim.DYNAMIC}})
    assert torch.allclose(exported.module()(other[:7]), score(other[:7]), rtol=1e-5, atol=1e-5)


def test_usual():
    head, h, other = network(3, 6, 100)
    sphere = penult.GenerativePair(head)
    gaussian = penult.GenerativePair(head, penult.Gaussian.fit(head, h))
    assert usual(sphere) is directional
    assert usual(gaussian) is energy
    assert torch.equal(usual(gaussian, h)(other), Composite.fit(head, h)(other))
    line = penult.GenerativePair(penult.Head(torch.tensor([[1.0], [-1.0]])))
    assert usual(line, torch.randn(100, 1)) is energy


def test_bad_input():
    head, h, _ = network(3, 6, 100)
    with pytest.raises(TypeError, match=r"pair_or_head is .*expected a penult.GenerativePair or a penult.Head"):
        Composite.fit(h, h)
    with pytest.raises(ValueError, match=r"\(19, 6\).*N >= 20"):
        Composite.fit(head, h[:19])
    with pytest.raises(ValueError, match=r"\(100, 5\).*\(N, 6\)"):
        Composite.fit(head, h[:, :5])
    with pytest.raises(ValueError, match=r"trim is 0.7; expected"):
        Composite.fit(head, h, trim=0.7)
    with pytest.raises(ValueError, match="all 100 activations are equal"):
        Composite.fit(head, torch.ones(100, 6))
    with pytest.raises(ValueError, match=r"dimension 1.*penult.scores.energy"):
        Composite.fit(penult.Head(torch.tensor([[1.0], [-1.0]])), torch.randn(100, 1))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(B, 6\)"):
        Composite.fit(head, h).score(torch.zeros(2, 3))
