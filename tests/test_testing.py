import pytest
import torch
from torch.distributions import Normal

from heads import random_head
from penult import Sphere, VonMisesFisher
from penult.testing import check_base, check_distribution, check_pair
from tiers import thin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", thin([2, 3, 10, 64], keep=[2, 10]))
def test_von_mises_fisher_keeps_the_contract(dim, dtype):
    loc = torch.nn.functional.normalize(
        torch.randn(3, dim, generator=torch.Generator().manual_seed(0), dtype=dtype), dim=-1
    )
    report = check_distribution(VonMisesFisher(loc, torch.tensor([0.5, 5.0, 500.0], dtype=dtype)))
    assert len(report.laws) >= 10
    assert "rsample" in str(report)


def test_tilts_keep_the_contract():
    base = Sphere(torch.tensor([1.0, 2.0]))
    check_distribution(base.tilt(random_head(3, 5, dtype=torch.float32).weight))


class Biased(VonMisesFisher):
    def sample(self, sample_shape=(), *, generator=None):
        x = super().sample(sample_shape, generator=generator)
        return torch.nn.functional.normalize(x + 0.1 * self.loc, dim=-1)


class Forgetful(VonMisesFisher):
    def sample(self, sample_shape=(), *, generator=None):
        return super().sample(sample_shape)


class Unshapely(VonMisesFisher):
    def log_prob(self, value):
        return super().log_prob(value).unsqueeze(-1)


@pytest.mark.parametrize(
    ("kind", "law"),
    [(Biased, "sample mean equals mean"), (Forgetful, "generator reproduces"), (Unshapely, "log_prob shape")],
)
def test_broken_distributions_fail(kind, law):
    with torch.random.fork_rng(), pytest.raises(AssertionError, match=f"FAIL.*{law}"):
        check_distribution(kind(torch.eye(3), torch.tensor(3.0)))


@pytest.mark.slow
def test_a_base_without_dimension_needs_a_head():
    with pytest.raises(ValueError, match="pass a head"):
        check_base(Sphere(1.0))
    check_base(Sphere(1.0, loc=torch.zeros(4)), samples=5000)
    for dtype in (torch.float32, torch.float64):  # the head that is made up has the base's precision
        check_base(Sphere(torch.tensor(2.0, dtype=dtype), loc=torch.zeros(3, dtype=dtype)), samples=5000)


def test_a_pair_with_a_wrong_prior_fails():
    from penult import GenerativePair

    pair = GenerativePair(random_head(3, 4), Sphere(torch.tensor(1.0, dtype=torch.float64)))
    pair._log_evidence()
    key, evidence = pair._derived["log evidence"]
    pair._derived["log evidence"] = key, evidence + torch.tensor([0.05, 0.0, 0.0])
    with pytest.raises(AssertionError, match="FAIL"):
        check_pair(pair)


def test_half_precision_heads_are_not_checked():
    with pytest.raises(ValueError, match=r"at least float32.*\.float\(\)"):
        check_base(Sphere(1.0), random_head(3, 4, dtype=torch.float16))


def test_distributions_that_know_the_global_random_state_alone_are_checked_by_it():
    before = torch.random.get_rng_state()
    assert check_distribution(Normal(0.0, 1.0)).passed
    assert torch.equal(torch.random.get_rng_state(), before)
