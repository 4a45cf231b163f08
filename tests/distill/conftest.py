import pytest
import torch

from heads import random_head
from penult import GenerativePair


@pytest.fixture(scope="session")
def pair():
    """K = 5 in d = 12 with biases, and the data-free sphere."""
    return GenerativePair(random_head(5, 12, seed=2, norm=4.0))


@pytest.fixture(scope="session")
def shown(pair):
    """Activations and labels of images whose domain is not quite the teacher's: some are wrong, some untypical."""
    g = torch.Generator().manual_seed(5)
    y = torch.arange(5).repeat(80)
    h = pair.given(y).sample(generator=g)
    return h + 0.5 * torch.randn(h.shape, generator=g, dtype=h.dtype), y
