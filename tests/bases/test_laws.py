"""The laws of every base, with few samples; the tests of each base have more cells and samples, in the slow tier."""

import pytest
import torch

from heads import random_head
from penult.bases import Gaussian, Marginal, Sphere
from penult.testing import check_base

KINDS = {
    "data-free": lambda head, h: Sphere.from_head(head, confidence=0.9),
    "round": Sphere.fit,
    "elliptic": lambda head, h: Sphere.fit(head, h, shape="elliptic"),
    "span": lambda head, h: Sphere.fit(head, h, ambient=False),
    "gaussian": Gaussian.fit,
    "mixture": lambda head, h: Marginal.fit(head, h, components=4, dims=2),
    "class": lambda head, h: Marginal.fit(head, h, kind="class", dims=2),
    "bank": lambda head, h: Marginal.fit(head, h, kind="bank"),
}


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    monkeypatch.setattr("penult.bases.marginal._SAMPLES", 20_000)


def problem(kind, classes, dim):
    """A base of that kind, and its head."""
    head = random_head(classes, dim, seed=classes + dim, norm=2.0)
    h = torch.randn(2000, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return KINDS[kind](head, h), head


@pytest.mark.parametrize("dim", [2, 64])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:classes .* are not the largest:UserWarning")
def test_laws(kind, classes, dim):
    base, head = problem(kind, classes, dim)
    check_base(base, head, samples=4000 if classes < 10 else 2000)


@pytest.mark.parametrize("kind", ["round", "gaussian", "mixture"])
def test_a_log_m_off_by_one_per_cent_fails(kind):
    base, head = problem(kind, 3, 2)

    class Miscounted(type(base)):
        def log_mgf(self, weight):
            return 1.01 * super().log_mgf(weight)

    base.__class__ = Miscounted
    with pytest.raises(AssertionError, match="FAIL"):
        check_base(base, head, samples=4000)
