"""The classifiers that moments are compared with, by their definitions and by scikit-learn."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid

import penult

BENCHMARKS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    """The script, whose name is that of a room of the library."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("moments_benchmark", BENCHMARKS / "moments.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def rows(script):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    return script.Rows(torch.randn(400, 6, generator=g) + 1.5 * torch.eye(4, 6)[y], y)


def test_ridge_is_that_of_scikit_learn(script, rows):
    sums = script.RidgeSums(6, 4)
    sums.add(rows.of(torch.arange(400) < 150))
    sums.add(rows.of(torch.arange(400) >= 150))
    penalty = 0.1 * float(sums.gram.diagonal()[:-1].mean())
    theirs = Ridge(alpha=penalty).fit(rows.h.numpy(), torch.eye(4)[rows.y].numpy())
    w = sums.solve(0.1)
    assert np.allclose(w[:, :-1], theirs.coef_, atol=1e-5)
    assert np.allclose(w[:, -1], theirs.intercept_, atol=1e-5)


def test_logistic_regression_is_that_of_scikit_learn(script, rows):
    decay = 1e-2
    w = script.logistic(rows, 4, decay)
    scale = float(rows.h.std(0).mean())
    standardised = (rows.h - rows.h.mean(0)) / scale
    theirs = LogisticRegression(C=1 / (decay * len(rows.y)), tol=1e-8, max_iter=1000).fit(standardised, rows.y)
    assert np.allclose(w[:, :-1] * scale, theirs.coef_, atol=2e-3)


def test_nearest_means_are_those_of_scikit_learn(script, rows):
    means = penult.Moments.of(*rows).means
    w = script.nearest_mean(means)
    predicted = (rows.h @ w[:, :-1].T + w[:, -1]).argmax(-1)
    assert np.array_equal(predicted, NearestCentroid().fit(rows.h, rows.y).predict(rows.h))
    assert script.accuracy(w, rows, torch.arange(4)) == float((predicted == rows.y).double().mean())


def test_membership_is_the_area_under_the_curve(script, rows):
    pair = penult.Moments.of(*rows).pair()
    some, others = rows.h[:100], rows.h[100:] * 1.2
    scores = pair.log_prob(torch.cat([some, others])).numpy()
    truth = roc_auc_score(np.repeat([1, 0], [100, 300]), scores)
    assert script.membership(pair, some, others) == pytest.approx(truth, abs=1e-6)


def test_every_row_has_one_owner(script, rows):
    owner = script.split(rows.y, 0.5, seed=1)
    assert owner.min() >= 0
    assert owner.max() < script.OWNERS
    assert torch.equal(owner, script.split(rows.y, 0.5, seed=1))
    shares = torch.bincount(script.split(torch.zeros(10_000).long(), 0.1, seed=0), minlength=script.OWNERS) / 10_000
    assert float(shares.max()) > 0.3
