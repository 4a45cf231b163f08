import pytest
import torch

from penult import Activations, Gaussian, GenerativePair, Head


@pytest.fixture(scope="session")
def truth():
    """A pair whose own draws stand for real activations: K = 3 in d = 8, not round."""
    g = torch.Generator().manual_seed(3)
    head = Head(1.5 * torch.randn(3, 8, generator=g), 0.3 * torch.randn(3, generator=g))
    root = torch.randn(8, 8, generator=g) / 8**0.5
    pair = GenerativePair(head, Gaussian(2 * torch.randn(8, generator=g), root @ root.T + 0.2 * torch.eye(8)))
    return pair.with_prior(torch.ones(3))


@pytest.fixture(scope="session")
def real(truth):
    h, y = truth.sample((4000,), generator=torch.Generator().manual_seed(4))
    return Activations(h, truth.head(h), y, class_names=["ant", "bee", "cat"])


@pytest.fixture
def quick(monkeypatch):
    """Tests of two samples that hardly learn, where their power does not matter."""
    monkeypatch.setattr("penult.realism._two_sample._STEPS", 20)
    monkeypatch.setattr("penult.realism._compare._POOL", 300)
    monkeypatch.setattr("penult.realism._compare._CLASSES", 1)
