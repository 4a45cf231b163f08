"""Every distribution, penult's and torch's own, keeps the contract of torch.distributions; wrong ones are told."""

import copy

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Exponential,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    VonMises,
    constraints,
    kl_divergence,
    register_kl,
)

import penult
from heads import random_head
from penult import VonMisesFisher
from penult.distributions import Bank, PrincipalMixture
from penult.testing import check_distribution
from tiers import thin


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def direction(*shape, dtype=torch.float32):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=seeded(3), dtype=dtype), dim=-1)


def names(report):
    return {law.name for law in report.laws}


# --- right ones ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", thin([0.0, 3.0, 1e4], keep=[3.0]))
@pytest.mark.parametrize(
    ("batch", "dim", "dtype"),
    [((), 2, torch.float32), ((2,), 3, torch.float64), ((2, 2), 5, torch.float32), ((), 64, torch.float64)],
)
def test_von_mises_fisher(batch, dim, dtype, kappa):
    loc = direction(*batch, dim, dtype=dtype)
    report = check_distribution(VonMisesFisher(loc, torch.full(batch, kappa, dtype=dtype)), samples=5000)
    assert {"entropy is the mean of -log_prob", "sample variance equals variance"} <= names(report)
    assert {"rsample gradients are those of the mean", "single precision agrees with double"} <= names(report)
    if kappa > 0:
        assert "the divergence from another law is the mean of log p - log q" in names(report)


def test_von_mises_fisher_of_many_dimensions_and_broadcast_parameters():
    check_distribution(VonMisesFisher(direction(512), torch.tensor(200.0)), samples=2000)
    check_distribution(VonMisesFisher(direction(4), torch.tensor([[0.5], [30.0]])), samples=5000)


def mixture(d=4, m=2, c=3, rectified=False, positive=False):
    rows = torch.randn(400, d, generator=seeded()) @ torch.randn(d, d, generator=seeded(1))
    rows = rows.exp().clamp_max(20) if positive else rows
    return PrincipalMixture.fit(rows, components=c, dims=m, rectified=rectified, positive=positive)


@pytest.mark.parametrize(("d", "m", "c"), [(1, 1, 1), (3, 3, 2), (4, 2, 3), (30, 5, 8)])
def test_principal_mixtures(d, m, c):
    report = check_distribution(mixture(d, m, c), samples=10_000)
    assert {"the gradient of log_prob in the value is that of differences", "sample mean equals mean"} <= names(report)
    assert ("the density integrates to one" in names(report)) is (d <= 8)


def test_rectified_and_positive_mixtures():
    check_distribution(mixture(rectified=True), samples=10_000)
    check_distribution(mixture(positive=True), samples=10_000)


@pytest.mark.parametrize("rectified", [False, True])
def test_banks(rectified):
    check_distribution(Bank(torch.randn(50, 3, generator=seeded()), rectified=rectified))


def test_tilts_of_every_base():
    head = random_head(3, 4, dtype=torch.float32)
    bases = [
        penult.Sphere(torch.tensor([1.0, 2.0])),
        penult.Gaussian(torch.ones(4), torch.eye(4) + 0.3),
        penult.Sphere(2.0, loc=torch.ones(4), subspace=head.span()),
    ]
    for base in bases:
        report = check_distribution(base.tilt(head.centered_weight()), samples=10_000)
        assert "the divergence to itself is zero" in names(report)


@pytest.mark.parametrize(
    "law",
    [
        Normal(torch.zeros(2), torch.tensor([1.0, 2.0])),
        Normal(torch.tensor(0.0), torch.tensor(1.0)),
        MultivariateNormal(torch.zeros(2, 3), torch.eye(3) + 0.3),
        LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3)),
        Independent(Normal(torch.zeros(2, 3), torch.ones(2, 3)), 1),
        Gamma(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])),
        Beta(torch.tensor(2.0), torch.tensor(3.0)),
        Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
        Laplace(torch.zeros(2), torch.ones(2)),
        LogNormal(torch.zeros(2), torch.full((2,), 0.5)),
        Exponential(torch.tensor([1.0, 2.0])),
        Categorical(torch.tensor([0.2, 0.3, 0.5])),
        Bernoulli(torch.tensor([0.2, 0.7])),
        Poisson(torch.tensor([2.0, 5.0])),
        MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.tensor([-1.0, 2.0]), torch.ones(2))),
    ],
    ids=lambda law: type(law).__name__,
)
def test_those_of_torch(law):
    report = check_distribution(law)
    assert len(report.laws) >= 30


def test_a_law_can_be_left_out():
    law = VonMises(torch.zeros(2), torch.tensor([1.0, 4.0]))
    with pytest.raises(AssertionError, match="FAIL  sample variance equals variance"):
        check_distribution(law)  # torch's is the variance of the angle on the circle
    check_distribution(law, without=["sample variance equals variance"])


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    check_distribution(Normal(0.0, 1.0), samples=2000)
    check_distribution(VonMisesFisher(torch.eye(3), torch.tensor(2.0)), samples=2000)
    assert torch.equal(before, torch.random.get_rng_state())


# --- wrong ones ---------------------------------------------------------------------------------------------


class Heavier(VonMisesFisher):  # its density sums to more than one, and its entropy is as wrong
    def log_prob(self, value):
        return super().log_prob(value) + 0.05


class TwoNormals(Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 0.05

    def entropy(self):
        return super().entropy() - 0.05


class Chaotic(VonMisesFisher):
    def entropy(self):
        return super().entropy() * 1.02


class Off(VonMisesFisher):
    def sample(self, sample_shape=(), generator=None):
        x = super().sample(sample_shape, generator)
        return torch.nn.functional.normalize(x + 0.1 * self.loc, dim=-1)


class Narrow(Normal):
    def sample(self, sample_shape=()):
        return self.loc + 0.97 * (super().sample(torch.Size(sample_shape)) - self.loc)

    def rsample(self, sample_shape=()):
        return self.loc + 0.97 * (super().rsample(torch.Size(sample_shape)) - self.loc)


class Mean(VonMisesFisher):
    @property
    def mean(self):
        return 1.05 * super().mean


class Variance(VonMisesFisher):
    @property
    def variance(self):
        return 1.05 * super().variance


class Detached(VonMisesFisher):
    def rsample(self, sample_shape=(), generator=None):
        return self.sample(sample_shape, generator)


class Blind(VonMisesFisher):  # the gradient passes through the mean direction alone
    def rsample(self, sample_shape=(), generator=None):
        return VonMisesFisher(self.loc, self.concentration.detach(), False).rsample(sample_shape, generator)


class Reparameterised(Normal):  # a gradient that is off by a tenth
    def rsample(self, sample_shape=()):
        x = super().rsample(sample_shape)
        return x.detach() + 1.1 * (x - x.detach())


class Forgetful(VonMisesFisher):
    def sample(self, sample_shape=(), generator=None):
        return super().sample(sample_shape)


class Greedy(VonMisesFisher):
    def sample(self, sample_shape=(), generator=None):
        torch.rand(1)
        return super().sample(sample_shape, generator)


class Unshapely(VonMisesFisher):
    def log_prob(self, value):
        return super().log_prob(value).unsqueeze(-1)


class Flat(VonMisesFisher):
    def sample(self, sample_shape=(), generator=None):
        return super().sample(sample_shape, generator).flatten(0, -2)


class Narrowing(VonMisesFisher):  # forgets the concentration
    def expand(self, batch_shape, _instance=None):
        new = super().expand(batch_shape, self._get_checked_instance(Narrowing, _instance))
        new.concentration = torch.ones_like(new.concentration)
        return new


class Unexpanded(VonMisesFisher):
    def expand(self, batch_shape, _instance=None):
        return self


class Shared(Normal):  # all entries of an expanded law are one draw
    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Shared, _instance))

    def sample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        return (self.loc + self.scale * torch.randn(*sample_shape, *[1] * len(self.batch_shape))).expand(shape)

    rsample = sample
    has_rsample = False


class Unconstrained(VonMisesFisher):
    def sample(self, sample_shape=(), generator=None):
        return 1.01 * super().sample(sample_shape, generator)


class Lenient(VonMisesFisher):
    def __init__(self, loc, concentration, validate_args=None):
        super().__init__(loc, concentration, validate_args=False)


class Loose(Normal):
    arg_constraints = {"loc": constraints.real, "scale": constraints.less_than(0.5)}  # noqa: RUF012

    def __init__(self, loc, scale, validate_args=None):
        super().__init__(loc, scale, validate_args=False)


class Numb(VonMisesFisher):
    def log_prob(self, value):
        return super().log_prob(value).detach() + 0 * value.sum(-1)


class Steep(Normal):
    def log_prob(self, value):
        x = super().log_prob(value)
        return x.detach() + 1.1 * (x - x.detach())


class Crowded(Normal):
    def log_prob(self, value):
        found = super().log_prob(value)
        return found + 1e-2 * (found.mean() - found) * (value.numel() > 8)


class Anonymous(VonMisesFisher):
    def __repr__(self):
        return "a law"


class Copied(VonMisesFisher):
    def __deepcopy__(self, memo):
        return VonMisesFisher(self.loc, 2 * self.concentration)


class Unpicklable(VonMisesFisher):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


class Coarse(VonMisesFisher):
    def log_prob(self, value):
        found = super().log_prob(value)
        return found if value.dtype == torch.float64 else found.bfloat16().to(found)


class Diverging(VonMisesFisher):
    pass


@register_kl(Diverging, Diverging)
def _wrong_divergence(p, q):
    return 1.2 * kl_divergence(VonMisesFisher(p.loc, p.concentration), VonMisesFisher(q.loc, q.concentration))


class Reversed(Normal):
    pass


@register_kl(Reversed, Reversed)
def _reversed_divergence(p, q):
    return kl_divergence(Normal(q.loc, q.scale), Normal(p.loc, p.scale))


class Negative(Normal):
    pass


@register_kl(Negative, Negative)
def _negative_divergence(p, q):
    return kl_divergence(Normal(p.loc, p.scale), Normal(q.loc, q.scale)) - 0.5


class Weighty(Categorical):
    def log_prob(self, value):
        return super().log_prob(value) + 0.01

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Weighty, _instance))


MUTANTS = [
    (Heavier, "entropy is the mean of -log_prob"),
    (TwoNormals, "the density integrates to one"),
    (Chaotic, "entropy is the mean of -log_prob"),
    (Off, "sample mean equals mean"),
    (Narrow, "sample variance equals variance"),
    (Mean, "sample mean equals mean"),
    (Variance, "sample variance equals variance"),
    (Detached, "rsample gradients are those of the mean"),
    (Blind, "rsample gradients are those of the mean"),
    (Reparameterised, "rsample gradients are those of the mean"),
    (Forgetful, "a generator reproduces samples"),
    (Greedy, "a generator leaves the global state"),
    (Unshapely, "log_prob shape is sample"),
    (Flat, "sample shape is sample"),
    (Narrowing, "expand keeps concentration"),
    (Unexpanded, "expand keeps class and event shape"),
    (Shared, "expanded entries have draws of their own"),
    (Unconstrained, "samples lie in the support"),
    (Lenient, "validate_args refuses loc that is NaN"),
    (Loose, "parameters satisfy arg_constraints"),
    (Numb, "the gradient of log_prob in the value is that of differences"),
    (Steep, "the gradient of log_prob in the parameters is that of differences"),
    (Crowded, "log_prob of a value is the same alone"),
    (Anonymous, "repr names the class"),
    (Copied, "a deep copy draws the same"),
    (Unpicklable, "copies can be computed"),
    (Coarse, "single precision agrees with double"),
    (Diverging, "the divergence from another law is the mean of log p - log q"),
    (Reversed, "the divergence to another law is the mean of log p - log q"),
    (Negative, "the divergence to itself is zero"),
    (Weighty, "probabilities add up to one"),
]


def wrong(kind):
    if issubclass(kind, VonMisesFisher):
        return kind(direction(2, 4), torch.tensor([2.0, 30.0]))
    if issubclass(kind, Categorical):
        return kind(torch.tensor([0.2, 0.3, 0.5]))
    return kind(torch.zeros(2), torch.tensor([0.8, 2.0]))


@pytest.mark.parametrize(("kind", "law"), MUTANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_wrong_distributions_are_told_by_the_law_that_they_break(kind, law):
    with pytest.raises(AssertionError) as raised:
        check_distribution(wrong(kind))
    failed = [line for line in str(raised.value).split("\n") if line.startswith("  FAIL")]
    assert any(law in line for line in failed), failed


def test_a_mixture_whose_factors_are_ignored_is_told():
    class Round(PrincipalMixture):
        def _sample_rows(self, count, generator):
            round_ = copy.copy(self)
            round_.scale_tril = torch.eye(self.scale_tril.shape[-1]).expand_as(self.scale_tril) * 1.5
            return PrincipalMixture._sample_rows(round_, count, generator)

    p = mixture()
    with pytest.raises(AssertionError, match="FAIL  sample variance equals variance"):
        check_distribution(Round(*(getattr(p, name) for name in p.arg_constraints)))


def test_errors_inside_a_law_fail_it_and_the_others_are_told():
    class Broken(Normal):
        def entropy(self):
            raise KeyError("lost")

        def expand(self, batch_shape, _instance=None):
            return super().expand(batch_shape, self._get_checked_instance(Broken, _instance))

    with pytest.raises(AssertionError, match=r"FAIL  estimates can be computed.*KeyError") as raised:
        check_distribution(Broken(torch.zeros(2), torch.ones(2)))
    assert "ok    log_prob is finite on samples" in str(raised.value)
