import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

import penult
from penult.bases import Base, Marginal
from penult.bases._class_samples import RowIndex
from penult.distributions import Bank, PrincipalMixture
from penult.head import Head
from penult.pair import GenerativePair
from penult.testing import check_base, check_pair


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(k, d, n=4000, seed=0, dtype=torch.float32, scale=1.0):
    """A head and unlabelled activations in clusters near its rows."""
    g = seeded(seed)
    weight = torch.randn(k, d, generator=g, dtype=dtype) / d**0.5 * 2
    bias = 0.3 * torch.randn(k, generator=g, dtype=dtype)
    y = torch.randint(k, (n,), generator=g)
    h = scale * weight[y] + torch.randn(n, d, generator=g, dtype=dtype)
    return Head(weight, bias), h


def normal(d, dtype=torch.float32):
    return Independent(Normal(torch.zeros(d, dtype=dtype), torch.ones(d, dtype=dtype)), 1)


class Coin:
    """A sampler without density, generator or event shape."""

    def sample(self, sample_shape=()):
        return torch.randn(*sample_shape, 3).sign() + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "class", "bank"])
@pytest.mark.parametrize(("k", "d"), [(2, 2), (3, 3), (10, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laws(kind, k, d, dtype):
    head, h = problem(k, d, dtype=dtype)
    check_base(Marginal.fit(head, h, kind=kind, components=10, dims=4), head, samples=20_000)


@pytest.mark.slow
def test_laws_of_many_classes():
    head, h = problem(300, 16, n=10_000, scale=3.0)
    check_base(Marginal.fit(head, h, kind="bank"), head, samples=3_000)
    check_base(Marginal(head, Marginal.fit(head, h, components=10).distribution, samples=20_000), head, samples=2_000)


def test_laws_of_any_torch_distribution():
    head, _ = problem(3, 4)
    check_base(Marginal(head, MultivariateNormal(torch.ones(4), 2 * torch.eye(4))), head, samples=20_000)
    head = Head(torch.eye(3))
    check_base(Marginal(head, Coin()), head, samples=20_000)


@pytest.mark.parametrize("kind", ["mixture", "bank"])
def test_a_wrong_log_mgf_fails_the_check(kind):
    head, h = problem(3, 3)
    base = Marginal.fit(head, h, kind=kind, components=5)

    class Off(Marginal):
        def log_mgf(self, weight):
            return 1.01 * super().log_mgf(weight)

    base.__class__ = Off
    with pytest.raises(AssertionError, match="shares of the law add up"):
        check_base(base, head, samples=20_000)


def test_one_class_too_likely_fails_the_check():
    head, h = problem(3, 3)
    base = Marginal.fit(head, h, kind="bank")
    base.log_prior = (base.log_prior + torch.tensor([0.1, 0.0, 0.0])).log_softmax(-1)
    with pytest.raises(AssertionError, match="FAIL"):
        check_base(base, head, samples=50_000)


def test_the_pair_gives_back_the_law():
    head, _ = problem(4, 3, dtype=torch.float64)
    law = normal(3, torch.float64)
    pair = GenerativePair(head, Marginal(head, law))
    h = torch.randn(50, 3, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(pair.log_prob(h), law.log_prob(h), rtol=0, atol=1e-9)
    torch.testing.assert_close(pair.posterior(h).probs, head(h).softmax(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        pair.given(2).log_prob(h), law.log_prob(h) + head(h).log_softmax(-1)[:, 2] - pair.prior.logits[2]
    )


def test_prior_of_a_normal_law_against_quadrature():
    head = Head(torch.tensor([[1.5], [-0.5]], dtype=torch.float64), torch.tensor([0.2, 0.0], dtype=torch.float64))
    base = Marginal(head, normal(1, torch.float64), samples=1_000_000)
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64).unsqueeze(-1)
    density = normal(1, torch.float64).log_prob(x).exp()
    truth = torch.trapezoid(density.unsqueeze(-1) * head(x).softmax(-1), x.squeeze(-1), dim=0)
    prior = GenerativePair(head, base).prior.probs
    assert bool(((prior - truth).abs() < 4 * base.info.mgf_standard_error * truth).all())
    assert 1e-4 < base.info.mgf_standard_error < 2e-3
    assert not base.info.exact_mgf


def test_bank_is_exact():
    head, h = problem(3, 4, n=500)
    base = Marginal.fit(head, h, kind="bank")
    assert base.info.mgf_standard_error == 0
    pair = GenerativePair(head, base)
    softmax = head(h).double().softmax(-1)
    torch.testing.assert_close(pair.prior.probs.double(), softmax.mean(0), rtol=1e-6, atol=0)
    mean = softmax.T @ h.double() / softmax.sum(0).unsqueeze(-1)
    torch.testing.assert_close(pair.given(torch.arange(3)).mean.double(), mean, rtol=1e-5, atol=1e-6)
    drawn = pair.given(1).sample((2000,), generator=seeded())
    rows = {tuple(row) for row in h.tolist()}
    assert all(tuple(row) in rows for row in drawn.tolist())


def test_bank_without_replacement_repeats_no_row_of_a_class():
    head, h = problem(3, 4, n=600)
    base = Marginal(head, Bank(h, replacement=False))
    drawn = base.tilt(head.centered_weight(torch.tensor(0))).sample((100,), generator=seeded())
    assert len(drawn.unique(dim=0)) == 100
    with pytest.raises(ValueError, match=r"without replacement is 500; expected at most \d+, since"):
        base.tilt(head.centered_weight(torch.tensor(0))).sample((500,))


@pytest.mark.slow
def test_class_draws_follow_the_joint_stream():
    """E[f(h) | y] of class draws against E_p[softmax_y f] / E_p[softmax_y], with rare classes among them."""
    head = Head(torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 1.0]]), torch.tensor([0.0, -6.0, 1.0]))
    base = Marginal(head, normal(2))
    drawn = base.tilt(head.centered_weight()).sample((4000,), generator=seeded())
    x = torch.randn(2_000_000, 2, generator=seeded(1))
    p = head(x).softmax(-1)
    for y in range(3):
        share = p[:, y] / p[:, y].mean()
        for f in (lambda h: h[:, 0], lambda h: h[:, 1], lambda h: h.square().sum(-1)):
            truth, off = float((share * f(x)).mean()), f(drawn[:, y])
            assert abs(float(off.mean()) - truth) < 4.5 * float(off.std()) / 4000**0.5 + 0.01 * abs(truth)


def test_joint_draws_lose_none_and_are_those_of_either_order():
    class Counting:
        drawn = 0

        def sample(self, shape):
            self.drawn += shape.numel()
            return torch.randn(*shape, 2)

    head = Head(torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 1.0]]), torch.tensor([0.0, -9.0, 1.0]))
    law = Counting()
    pair = GenerativePair(head, Marginal(head, law))
    before = law.drawn
    h, y = pair.sample((2, 50_000), generator=seeded())
    assert (h.shape, y.shape, law.drawn - before) == ((2, 50_000, 2), (2, 50_000), 100_000)
    torch.testing.assert_close(y.flatten().bincount(minlength=3) / 1e5, pair.prior.probs, atol=0.006, rtol=0)
    for c in (0, 2):
        torch.testing.assert_close(h[y == c].mean(0), pair.given(c).sample((50_000,)).mean(0), atol=0.03, rtol=0)

    other = pair.with_prior(torch.tensor([0.45, 0.1, 0.45]))  # its marginal is not p, so that classes come first
    before = law.drawn
    h, y = other.sample((1000,), generator=seeded())
    assert law.drawn - before > 10_000
    assert abs(float((y == 1).double().mean()) - 0.1) < 0.04
    moved = GenerativePair(head.with_bias(head.full_bias + 2.5), pair.base)  # the same softmax
    assert torch.equal(moved.sample((9,), generator=seeded())[1], pair.sample((9,), generator=seeded())[1])


def test_rows_in_any_order_and_repeated():
    head, h = problem(5, 4)
    base = Marginal.fit(head, h, kind="bank")
    y = torch.tensor([4, 0, 4, 2, 2, 2, 1, 3])
    index = torch.tensor([7, 0, 0, 3, 5, 2])
    drawn = base.draw(head.centered_weight(y), index, seeded())
    posterior = head(base.draw(head.centered_weight(y), index.repeat(500), seeded())).softmax(-1).reshape(500, 6, 5)
    assert drawn.shape == (6, 4)
    means = torch.stack([GenerativePair(head, base).given(c).sample((4000,), generator=seeded(1)) for c in y[index]])
    expected = head(means).softmax(-1).mean(1)
    assert float((posterior.mean(0) - expected).abs().max()) < 0.06
    assert torch.equal(base.log_mgf(head.centered_weight(y)), base.log_mgf(head.centered_weight())[y])


def test_tied_rows_and_half_precision_are_found():
    weight = torch.randn(6, 5, generator=seeded())
    weight[3] = weight[1]
    head = Head(weight)
    assert set(RowIndex(head).classes(head.centered_weight()).tolist()) <= {0, 1, 2, 3, 4, 5}
    half = Head(weight.bfloat16())
    assert RowIndex(half).classes(half.centered_weight(torch.tensor([5, 0])).double()).tolist() == [5, 0]
    large, _ = problem(3000, 7)
    index = torch.randperm(3000, generator=seeded())
    assert torch.equal(RowIndex(large).classes(large.centered_weight(index).double()), index)
    assert RowIndex(large).classes(large.centered_weight(index[:4]) * 1.001).tolist() == [-1] * 4


def test_other_rows_are_refused():
    head, h = problem(3, 4)
    base = Marginal.fit(head, h, kind="bank")
    with pytest.raises(ValueError, match="are not rows of the head"):
        base.tilt(torch.zeros(4)).sample()
    with pytest.raises(ValueError, match="for another head or temperature"):
        _ = GenerativePair(head.with_temperature(2.0), base).prior


def test_another_prior_is_the_same_class_law():
    head, h = problem(3, 4)
    pair = GenerativePair(head, Marginal.fit(head, h, components=5))
    shifted = pair.with_prior(torch.tensor([0.7, 0.2, 0.1]))
    torch.testing.assert_close(shifted.prior.probs, torch.tensor([0.7, 0.2, 0.1]))
    x = h[:20]
    torch.testing.assert_close(shifted.given(1).log_prob(x), pair.given(1).log_prob(x))
    check_pair(shifted, samples=20_000)


def test_no_density_is_an_error_and_nothing_else():
    head = Head(torch.eye(3))
    pair = GenerativePair(head, Marginal(head, Coin()))
    h, _ = pair.sample((10,), generator=seeded())
    torch.testing.assert_close(pair.posterior(h).probs, head(h).softmax(-1))
    with pytest.raises(ValueError, match="Coin has no log_prob"):
        pair.log_prob(h)
    assert not pair.base.info.has_density
    with pytest.raises(ValueError, match="has no density"):
        GenerativePair(head, Marginal(head, Bank(torch.randn(9, 3)))).log_joint(h)


def test_global_random_state_is_left_alone():
    head = Head(torch.eye(3))
    state = torch.random.get_rng_state()
    pair = GenerativePair(head, Marginal(head, Coin()))
    first = pair.given(1).sample((5,), generator=seeded())
    assert torch.equal(first, pair.given(1).sample((5,), generator=seeded()))
    assert torch.equal(state, torch.random.get_rng_state())
    pair.given(1).sample((5,))
    assert not torch.equal(state, torch.random.get_rng_state())


def test_a_class_that_never_comes_is_an_error():
    head = Head(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.0, -25.0]))
    base = Marginal(head, normal(2))
    with pytest.raises(ValueError, match=r"class 1 has prior .* would take about"):
        base.tilt(head.centered_weight(torch.tensor(1))).sample((10,))
    with pytest.raises(ValueError, match="class 1 has probability 0"):
        Marginal(Head(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.0, -300.0])), normal(2))


@pytest.mark.parametrize("kind", ["mixture", "class", "bank"])
def test_files(tmp_path, kind):
    head, h = problem(3, 4)
    pair = GenerativePair(head, Marginal.fit(head, h, kind=kind, components=5, dims=2))
    again = penult.load(pair.save(tmp_path / "pair.safetensors"))
    assert torch.equal(again.prior.probs, pair.prior.probs)
    torch.testing.assert_close(again.sample((9,), generator=seeded()), pair.sample((9,), generator=seeded()))
    assert str(again.base) == str(pair.base)
    assert again.base.head.weight is again.head.weight


def test_another_prior_is_kept_in_the_file(tmp_path):
    head, h = problem(3, 4)
    pair = GenerativePair(head, Marginal.fit(head, h, components=3)).with_prior(torch.tensor([8.0, 1.0, 1.0]))
    again = penult.load(pair.save(tmp_path / "pair.safetensors"))
    torch.testing.assert_close(again.prior.probs, pair.prior.probs)
    torch.testing.assert_close(again.given(1).log_prob(h[:9]), pair.given(1).log_prob(h[:9]))
    torch.testing.assert_close(again.posterior(h[:9]).probs, pair.posterior(h[:9]).probs)
    check_pair(again, samples=20_000)


def test_files_of_foreign_laws_are_refused(tmp_path):
    head = Head(torch.eye(3))
    with pytest.raises(ValueError, match="Marginal of Coin cannot be saved"):
        GenerativePair(head, Marginal(head, Coin())).save(tmp_path / "pair.safetensors")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path):
    head, h = problem(3, 4)
    pair = GenerativePair(head, Marginal.fit(head, h, components=5))
    base = pair.base
    good = base.config()
    tensors = base.state_dict()
    Marginal.from_config(good, tensors, head)
    for config, state, reason in [
        (good | {"law": {"class": "Popen", "options": {}}}, tensors, "which penult does not know"),
        (good, tensors | {"log_prior": torch.zeros(7)}, r"log_prior is .* of shape \(7,\)"),
        (good, tensors | {"log_prior": torch.zeros(3)}, "log_prior is not normalised"),
        (good, tensors | {"standard_error": torch.full((3,), torch.nan)}, "standard_error is"),
        (good | {"samples": 10**15}, tensors, "samples is .* expected an integer from 2"),
        (good | {"seed": 0.5}, tensors, "seed is 0.5; expected an integer"),
        (good | {"law": good["law"] | {"options": {"rectified": "false"}}}, tensors, "expected true or false"),
        (good | {"law": {"class": "NormalizingFlow", "options": []}}, tensors, "expected a mapping"),
        (good, tensors | {"bias": torch.zeros(2)}, "bias"),
        (good, tensors | {"law.means": torch.zeros(2, 2)}, "shapes do not agree"),
        (good, tensors | {"law.loc": torch.full((4,), torch.nan)}, "NaN"),
    ]:
        with pytest.raises((TypeError, ValueError), match=reason):
            Marginal.from_config(config, state, head)


def test_state_dicts_carry_another_prior():
    head, h = problem(3, 4)
    pair = GenerativePair(head.clone(), Marginal.fit(head, h, components=3)).with_prior(torch.tensor([8.0, 1.0, 1.0]))
    other_head, other = problem(3, 4, seed=5)
    target = GenerativePair(other_head.clone(), Marginal.fit(other_head, other, components=3))
    target = GenerativePair(target.head, Marginal.fit(target.head, other, components=3))
    _ = target.prior
    target.load_state_dict(pair.state_dict())
    torch.testing.assert_close(target.prior.probs, pair.prior.probs)
    torch.testing.assert_close(target.posterior(h[:9]).probs, pair.posterior(h[:9]).probs)
    torch.testing.assert_close(target.log_prob(h[:9]), pair.log_prob(h[:9]))


def test_weights_that_change_are_noticed():
    weight, bias = torch.randn(3, 4, generator=seeded()), torch.zeros(3)
    head = Head(weight, bias)
    base = Marginal(head, normal(4))
    weight[0] *= 3
    with pytest.raises(RuntimeError, match="Fit a new base"):
        _ = GenerativePair(head, base).prior
    fresh = Marginal(head, normal(4))
    bias[0] = -3  # another prior: the base keeps its own
    pair = GenerativePair(head, fresh)
    check_pair(pair, samples=20_000)


def test_a_prior_that_is_not_the_laws_ends():
    head = Head(3 * torch.eye(3))
    base = Marginal(head, normal(3))
    base.head.bias[0] = -2000
    base._head_version = None
    with pytest.raises(RuntimeError, match="The prior of this base is not that of its distribution"):
        base.tilt(head.centered_weight(torch.tensor(0))).sample((3,))


def test_moving_and_casting_finds_the_rows_again():
    head, h = problem(50, 16)
    pair = GenerativePair(head, Marginal.fit(head, h, components=4, dims=8))
    _ = pair.prior
    pair.to(torch.bfloat16)
    assert pair.sample((10,))[0].dtype == torch.bfloat16
    assert pair.base.head.weight is pair.head.weight


def test_half_precision_banks_use_single_precision_posteriors():
    head, _ = problem(5, 64)
    h = (torch.randn(3000, 64, generator=seeded()) + 3).bfloat16()
    base = Marginal.fit(Head(2 * head.weight), h, kind="bank")
    pair = GenerativePair(Head(2 * head.weight), base)
    drawn = pair.given(2).sample((20_000,), generator=seeded(1)).float()
    error = (drawn.mean(0) - pair.given(2).mean) / (drawn.std(0) / 20_000**0.5)
    assert float(error.abs().max()) < 4.5


def test_numbers_out_of_range_are_refused():
    head, h = problem(3, 4)
    with pytest.raises(ValueError, match="dims is 0; expected an integer of at least 1"):
        Marginal.fit(head, h, dims=0)
    with pytest.raises(TypeError, match=r"samples is 100000\.0; expected an integer"):
        Marginal(head, normal(4), samples=1e5)


@pytest.mark.slow
def test_very_many_classes_have_a_class_law():
    head = Head(torch.randn(12_001, 4, generator=seeded()))
    base = Marginal.fit(head, torch.randn(200, 4, generator=seeded(1)), kind="class")
    assert len(base.distribution.components) == 4


def test_collapsed_classes_have_a_class_law():
    weight = 3 * torch.randn(5, 20, generator=seeded())
    h = weight[torch.arange(1000) % 5] * 3e3 + 1e-4 * torch.randn(1000, 20, generator=seeded(1))
    assert bool(Marginal.fit(Head(weight), h, kind="class").distribution.scale_tril.isfinite().all())


def test_torch_distributions_without_log_prob_have_no_density():
    class Odd(torch.distributions.Distribution):
        def __init__(self):
            super().__init__(torch.Size(), torch.Size((3,)), validate_args=False)

        def sample(self, sample_shape=()):
            return torch.randn(*sample_shape, 3)

    base = Marginal(Head(torch.eye(3)), Odd())
    assert not base.info.has_density
    check_base(base, Head(torch.eye(3)), samples=5000)


@pytest.mark.slow
def test_compiled_and_mapped():
    head, h = problem(3, 8)
    pair = GenerativePair(head, Marginal.fit(head, h, components=3, dims=4))
    torch.testing.assert_close(torch.func.vmap(pair.log_prob)(h[:5]), pair.log_prob(h[:5]))
    rows = head.centered_weight()
    torch.testing.assert_close(torch.func.vmap(pair.base.log_mgf)(rows), pair.base.log_mgf(rows))
    for name in ("log_prob", "log_joint"):
        method = getattr(pair, name)
        torch.testing.assert_close(torch.compile(method, fullgraph=True, backend="eager")(h[:5]), method(h[:5]))


def test_it_is_a_module():
    head, h = problem(3, 4)
    pair = GenerativePair(head, Marginal.fit(head, h, components=5, dims=3))
    for twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert twin.base.head.weight is twin.head.weight
        assert torch.equal(twin.prior.probs, pair.prior.probs)
    assert not any(name.startswith("base.head") for name in pair.state_dict())
    double = copy.deepcopy(pair).double()
    assert double.base.distribution.loc.dtype == torch.float64
    assert double.base.head.weight is double.head.weight
    assert head.weight.dtype == torch.float32
    torch.testing.assert_close(double.given(1).log_prob(h[:5].double()).float(), pair.given(1).log_prob(h[:5]))
    half = copy.deepcopy(pair).bfloat16()
    assert half.base.distribution.loc.dtype == torch.float32
    assert half.sample((3,))[0].dtype == torch.bfloat16


def test_a_module_as_the_law_moves_with_it():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))

        def sample(self, sample_shape=(), generator=None):
            return torch.randn(*sample_shape, 3, generator=generator).to(self.shift) + self.shift

    base = Marginal(Head(torch.eye(3)), Shifted())
    assert any(name.endswith("shift") for name in base.state_dict())
    base.double()
    assert base.distribution.shift.dtype == torch.float64
    assert base.num_parameters == 3


def test_pre_activations_are_rectified():
    relu = penult.find_head(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(20, 6, generator=seeded())
    )
    u = torch.randn(3000, 8, generator=seeded(1)) @ torch.randn(8, 8, generator=seeded(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = Marginal.fit(relu, u, components=5)
    assert base.distribution.rectified
    assert not base.info.has_density
    assert base.info.support == "orthant"
    h, _ = GenerativePair(relu, base).sample((2000,), generator=seeded())
    assert float(h.min()) == 0
    assert abs(float((h == 0).float().mean()) - float((u <= 0).float().mean())) < 0.03
    check_base(base, relu, samples=20_000)
    # the prior is that of what the head reads
    truth = relu(u.clamp_min(0)).softmax(-1).mean(0)
    assert float((GenerativePair(relu, base).prior.probs - truth).abs().max()) < 0.03
    acts = penult.Activations(u, relu(u.clamp_min(0)), pre_activation=True)
    plain = Head(relu.weight, relu.bias)
    assert Marginal.fit(plain, acts, components=5).distribution.rectified
    bank = Marginal.fit(plain, acts, kind="bank")
    assert torch.equal(bank.distribution.activations, u)
    assert torch.equal(bank.distribution.rows, u.clamp_min(0))
    after = Marginal.fit(plain, u.clamp_min(0), kind="bank")
    assert torch.equal(bank.log_prior, after.log_prior)
    drawn = [GenerativePair(plain, base).sample((500,), generator=seeded())[0] for base in (bank, after)]
    assert torch.equal(*drawn)
    assert Marginal.fit(plain, acts, kind="class").distribution.rectified
    assert torch.equal(penult.Gaussian.fit(relu, u).loc, penult.Gaussian.fit(plain, acts).loc)
    assert torch.equal(penult.Sphere.fit(relu, u).radius, penult.Sphere.fit(plain, u.clamp_min(0)).radius)
    assert not Marginal.fit(plain, u, components=5).distribution.rectified
    assert not Marginal.fit(relu, u, components=5, rectified=False).distribution.rectified


def test_contradictions_about_pre_activations():
    relu = penult.find_head(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(20, 6, generator=seeded())
    )
    h = torch.rand(200, 8, generator=seeded())
    with pytest.warns(UserWarning, match="pre_activation=True"):
        assert not Marginal.fit(relu, h, components=5).distribution.rectified
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Marginal.fit(relu, h, kind="bank")
        Marginal.fit(relu, h, components=5, rectified=False)
    with pytest.raises(ValueError, match="expected pre-activations"):
        Marginal.fit(relu, h, rectified=True)
    acts = penult.Activations(h - 0.5, relu(h), pre_activation=True)
    with pytest.raises(ValueError, match="rectified is False, but activations are pre-activations"):
        Marginal.fit(relu, acts, rectified=False)


def test_spheres_and_gaussians_read_what_the_head_reads():
    head, u = problem(3, 4)
    acts = penult.Activations(u, head(u.clamp_min(0)), pre_activation=True)
    assert torch.equal(penult.Gaussian.fit(head, acts).loc, penult.Gaussian.fit(head, u.clamp_min(0)).loc)
    assert torch.equal(penult.Sphere.fit(head, acts).radius, penult.Sphere.fit(head, u.clamp_min(0)).radius)


def test_fits_stream(tmp_path):
    head, h = problem(3, 4, n=3000)
    acts = penult.Activations(h, head(h))
    stored = acts.save(tmp_path / "acts", shard_size=10_000)
    for kind in ("mixture", "class", "bank"):
        whole, parts = (Marginal.fit(head, a, kind=kind, components=5, dims=3) for a in (h, stored))
        torch.testing.assert_close(whole.distribution.mean, parts.distribution.mean)
        torch.testing.assert_close(whole.log_prior, parts.log_prior, rtol=1e-3, atol=1e-3)


def test_a_bank_keeps_a_bounded_sample(monkeypatch):
    monkeypatch.setattr("penult.bases.marginal._BANK", 400)
    head, h = problem(3, 4, n=3000)
    base = Marginal.fit(head, h, kind="bank")
    assert 90 <= len(base.distribution) <= 100
    assert len(base.distribution.activations.unique(dim=0)) == len(base.distribution)
    assert f"{len(base.distribution)} rows" in str(base)


def test_class_law_is_the_weighted_moments():
    head, h = problem(3, 4, dtype=torch.float64)
    law = Marginal.fit(head, h, kind="class", dims=4).distribution
    p = head(h).softmax(-1)
    assert isinstance(law, PrincipalMixture)
    torch.testing.assert_close(law.logits.exp(), p.mean(0))
    means = law.loc + law.means @ law.components
    torch.testing.assert_close(means, p.T @ h / p.sum(0).unsqueeze(-1))
    off = h - means[0]
    covariance = (p[:, :1] * off).T @ off / p[:, 0].sum()
    factor = law.scale_tril[0].mT @ law.components
    assert float((factor.mT @ factor - covariance).abs().max()) < 0.01  # the prior counts for two rows


def test_bad_input():
    head, h = problem(3, 4)
    with pytest.raises(TypeError, match=r"expected a penult\.Head, as in Marginal"):
        Marginal(torch.eye(3), normal(3))
    with pytest.raises(TypeError, match="no method sample"):
        Marginal(head, h)
    with pytest.raises(ValueError, match="batch shape"):
        Marginal(head, Normal(torch.zeros(4), torch.ones(4)))
    with pytest.raises(ValueError, match=r"samples of .* have shape"):
        Marginal(head, normal(5))
    with pytest.raises(ValueError, match="kind is 'gmm'; expected"):
        Marginal.fit(head, h, kind="gmm")
    with pytest.raises(ValueError, match="hold NaN"):
        Marginal.fit(head, torch.full((5, 4), torch.nan))
    with pytest.raises(ValueError, match=r"samples is .* expected an integer from 2"):
        Marginal(head, normal(4), samples=1)
    assert issubclass(Marginal, Base)


def test_info():
    head, h = problem(3, 4)
    assert Marginal.fit(head, h, kind="bank").info.support == "4000 points"
    assert Marginal(head, normal(4)).info.reference == "Lebesgue measure"
    assert replace(Marginal.fit(head, h, components=3).info, mgf_standard_error=None).name == "marginal mixture"


def test_positive_activations_get_a_positive_law():
    head, h = problem(3, 4)
    h = h.square()
    base = Marginal.fit(head, h, components=3)
    assert base.distribution.softness is not None
    assert base.info.support == "orthant"
    assert base.info.has_density
    assert float(GenerativePair(head, base).sample((3000,), generator=seeded())[0].min()) > 0
    check_base(base, head, samples=20_000)
    assert Marginal.fit(head, h, kind="class").distribution.softness is not None
    assert Marginal.fit(head, h, positive=False, components=3).distribution.softness is None
    zeros = h * (torch.rand(h.shape, generator=seeded(1)) > 0.2)
    assert Marginal.fit(head, zeros, components=3).distribution.softness is None
    few = h * (torch.rand(h.shape, generator=seeded(1)) > 0.01)
    pair = GenerativePair(head, Marginal.fit(head, few, components=3))
    assert pair.base.distribution.softness is not None
    assert bool(pair.log_joint(few).isfinite().all())


def test_positive_law_is_saved(tmp_path):
    head, h = problem(3, 4)
    pair = GenerativePair(head, Marginal.fit(head, h.square(), components=3))
    again = penult.load(pair.save(tmp_path / "pair.safetensors"))
    assert torch.equal(again.base.distribution.softness, pair.base.distribution.softness)
    torch.testing.assert_close(again.log_prob(h.square()), pair.log_prob(h.square()))
    assert copy.deepcopy(pair).double().base.distribution.softness.dtype == torch.float64


@pytest.mark.slow
def test_flow(tmp_path):
    pytest.importorskip("zuko")
    head, h = problem(3, 4)
    base = Marginal.fit(head, h[:1000], kind="flow")
    assert base.info.name == "marginal flow"
    check_base(base, head, samples=20_000)
    pair = GenerativePair(head, base)
    again = penult.load(pair.save(tmp_path / "pair.safetensors"))
    torch.testing.assert_close(again.log_prob(h[:50]), pair.log_prob(h[:50]))
    torch.testing.assert_close(again.sample((9,), generator=seeded()), pair.sample((9,), generator=seeded()))
    assert base.num_parameters == base.distribution.num_parameters


@pytest.mark.slow
def test_sizes_by_default():
    head, h = problem(3, 70, n=3000)
    law = Marginal.fit(head, h).distribution
    assert (len(law.logits), len(law.components)) == (32, 45)
    many, h = problem(200, 30, n=4000)
    law = Marginal.fit(many, h).distribution
    assert (len(law.logits), len(law.components)) == (100, 25)
    assert len(Marginal.fit(many, h, kind="class").distribution.components) == 24
    assert len(Marginal.fit(many, h, components=5).distribution.components) == 30
