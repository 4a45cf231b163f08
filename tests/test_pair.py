import copy
import json
import math
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.distributions import Categorical

import penult
from heads import random_head
from penult import GenerativePair, Head, Sphere, io
from penult.bases import Base, BaseInfo
from penult.distributions import Tilt
from penult.testing import check_pair


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sphere(radius=1.5, dtype=torch.float64):
    return Sphere(torch.tensor([radius, 2 * radius], dtype=dtype))


def fitted(head, shape="elliptic", ambient=True):
    h = torch.randn(500, head.in_features, generator=seeded(), dtype=torch.float64) + 1
    return Sphere.fit(head, h, shape=shape, ambient=ambient, radii=16)


# --- tables and what they were computed from ----------------------------------------------------------------


def test_tables_follow_buffers_of_the_base_that_no_counter_sees():
    head = Head(torch.randn(4, 6, generator=seeded()))
    h = torch.randn(3, 6, generator=seeded(1))
    base = Sphere.fit(head, torch.randn(50, 6, generator=seeded(2)), shape="elliptic", radii=8)
    pair = GenerativePair(head, base)
    before = pair.log_prob(h)
    base.scale_tril.data.mul_(1.5)
    base.radius.detach().numpy()[:] *= 0.5
    assert not torch.allclose(pair.log_prob(h), before)
    fresh = GenerativePair(head, base)
    assert torch.equal(pair.log_prob(h), fresh.log_prob(h))
    assert torch.equal(pair.prior.probs, fresh.prior.probs)


@pytest.mark.parametrize("shape", [(3, 5), (300, 128), (1000, 96)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_changed_column_of_a_large_head_is_seen(shape, transposed):
    weight = torch.randn(*shape, generator=seeded())
    weight = weight.T.contiguous().T if transposed else weight
    pair = GenerativePair(Head(weight), sphere())
    pair.prior  # noqa: B018
    weight.data[:, shape[1] - 1] += 1e-6
    with pytest.raises(RuntimeError, match="weights changed"):
        pair.prior  # noqa: B018


def test_a_replaced_tensor_is_compared_in_full():
    weight = torch.randn(2000, 64, generator=seeded())
    pair = GenerativePair(Head(weight), sphere())
    before = pair.prior.probs
    pair.head.weight = weight.clone()
    if weight._version == pair.head.weight._version:
        assert torch.equal(pair.prior.probs, before)
    for index in ((1, 0), (1, 1)):
        # At most one of them is among the values that are sampled.
        other = weight.clone()
        other[index] += 1
        pair.head.weight = other
        with pytest.raises(RuntimeError, match="weights changed"):
            pair.prior  # noqa: B018


# --- the identity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("features", [2, 64, 1280])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize(("bias", "unequal"), [(True, False), (False, True)])
def test_posterior_is_the_softmax(classes, features, dtype, bias, unequal):
    head = random_head(classes, features, seed=classes, bias=bias, unequal=unequal, dtype=dtype, norm=2.0)
    h = 2 * torch.randn(50, features, generator=seeded(1), dtype=dtype)
    bases = [sphere(dtype=dtype)]
    if features < 1000:
        bases += [fitted(head), fitted(head, "round", ambient=False)]
    for base in bases:
        pair = GenerativePair(head, base)
        error = (pair.posterior(h).probs - head(h).softmax(-1)).abs().max()
        assert float(error) <= (1e-9 if dtype == torch.float64 else 1e-5)
        if dtype == torch.float64:  # in float32 a log density in the thousands has no digits left for 1e-5
            assert float((pair.log_joint(h).softmax(-1) - head(h).softmax(-1)).abs().max()) <= 1e-9
        assert pair.log_joint(h).dtype == pair.log_prob(h).dtype == dtype


@pytest.mark.parametrize(
    ("classes", "features"),
    [
        *((classes, features) for classes in (2, 3, 10) for features in (2, 64)),
        *(pytest.param(1000, features, marks=pytest.mark.long) for features in (2, 64)),
    ],
)
def test_pairs_follow_their_laws(classes, features):
    head = random_head(classes, features, seed=1, unequal=True, norm=2.0)
    check_pair(GenerativePair(head, sphere()), samples=20_000)


def test_bayes_rule_holds_between_the_parts():
    head = random_head(4, 6, norm=2.0)
    for base in (sphere(), fitted(head), fitted(head, "centered", ambient=False)):
        pair = GenerativePair(head, base)
        h, y = pair.sample((40,), generator=seeded())
        each = pair.given(torch.arange(4)).log_prob(h.unsqueeze(1)) + pair.prior.logits
        assert torch.allclose(each, pair.log_joint(h), atol=1e-10)
        assert torch.allclose(each.logsumexp(-1), pair.log_prob(h), atol=1e-10)
        assert torch.allclose(each[torch.arange(40), y], pair.given(y).log_prob(h) + pair.prior.log_prob(y), atol=1e-10)


def test_gauge_does_not_matter():
    head = random_head(5, 7, norm=2.0)
    shifted = Head(head.weight + torch.randn(7, generator=seeded(3), dtype=torch.float64), head.bias + 4)
    h = torch.randn(20, 7, generator=seeded(), dtype=torch.float64)
    a, b = GenerativePair(head, sphere()), GenerativePair(shifted, sphere())
    assert torch.allclose(a.log_prob(h), b.log_prob(h), atol=1e-10)
    assert torch.allclose(a.prior.probs, b.prior.probs, atol=1e-12)
    assert torch.allclose(Sphere.from_head(head).radius, Sphere.from_head(shifted).radius)


def test_energy_is_the_log_density_ratio():
    head = random_head(5, 7)
    pair = GenerativePair(head, sphere())
    h = torch.randn(20, 7, generator=seeded(), dtype=torch.float64)
    ratio = pair.log_prob(h) - pair.base.log_prob(h) - head.centered_logits(h).logsumexp(-1)
    assert float(ratio.std()) < 1e-12


def test_no_class_by_feature_tensor_is_formed():
    head = random_head(1000, 256)
    pair = GenerativePair(head, sphere())
    h = torch.randn(2000, 256, generator=seeded(), dtype=torch.float64)  # (2000, 1000, 256) would take 4 GB
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pair.log_prob(h)
    largest = max(event.cpu_memory_usage for event in profile.key_averages())
    assert largest < 500e6


def test_half_precision():
    head = random_head(4, 8, dtype=torch.float16)
    pair = GenerativePair(head, Sphere(2.0))
    h, y = pair.sample((20,), generator=seeded())
    assert h.dtype == torch.float16
    assert pair.log_prob(h).dtype == torch.float16
    want = torch.nn.functional.linear(h.float(), head.weight.float(), head.bias.float()).softmax(-1)
    assert torch.allclose(pair.posterior(h).probs, want, atol=1e-5)
    assert y.dtype == torch.long


def test_half_precision_rows_are_centred_in_single():
    head = random_head(4, 8, dtype=torch.float16)
    pair = GenerativePair(head, Sphere(2.0))
    assert pair.given(1).sample((3,), generator=seeded()).dtype == torch.float32
    assert float(head.centered_weight().sum(0).abs().max()) < 1e-6


def test_double_activations_on_a_single_head():
    head = random_head(4, 8, dtype=torch.float32)
    pair = GenerativePair(head, Sphere(2.0))
    h = torch.randn(5, 8, generator=seeded(), dtype=torch.float64)
    assert pair.log_prob(h).dtype == torch.float64
    assert torch.allclose(pair.posterior(h).probs.float(), head(h.float()).softmax(-1), atol=1e-6)


# --- draws --------------------------------------------------------------------------------------------------


def test_shapes_of_given_and_sample():
    pair = GenerativePair(random_head(4, 8), sphere())
    p = pair.given(torch.tensor([[3, 1, 0], [2, 2, 2]]))
    assert p.batch_shape == (2, 3)
    assert p.event_shape == (8,)
    x = p.sample((5,), generator=seeded())
    assert x.shape == (5, 2, 3, 8)
    assert p.log_prob(x).shape == (5, 2, 3)
    assert p.mean.shape == (2, 3, 8)
    assert pair.given(2).sample(generator=seeded()).shape == (8,)
    h, y = pair.sample((3, 2), generator=seeded())
    assert h.shape == (3, 2, 8)
    assert y.shape == (3, 2)
    h, y = pair.sample((0,), generator=seeded())
    assert h.shape == (0, 8)
    assert pair.sample(generator=seeded())[1].shape == ()


def test_seeds_and_global_state():
    pair = GenerativePair(random_head(4, 8), sphere())
    state = torch.random.get_rng_state()
    first, second = pair.sample((50,), generator=seeded()), pair.sample((50,), generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_mean_in_inference_mode():
    pair = GenerativePair(random_head(4, 8), sphere())
    with torch.inference_mode():
        assert bool(pair.given(1).mean.isfinite().all())
        assert bool(pair.log_prob(torch.randn(3, 8, generator=seeded(), dtype=torch.float64)).isfinite().all())


# --- the class prior ----------------------------------------------------------------------------------------


def test_with_prior_keeps_the_laws_of_the_classes():
    pair = GenerativePair(random_head(4, 8), sphere())
    p = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    for prior in (p, 5 * p, Categorical(probs=p)):
        shifted = pair.with_prior(prior)
        assert torch.allclose(shifted.prior.probs, p)
        h = torch.randn(9, 8, generator=seeded(), dtype=torch.float64)
        y = torch.arange(4)
        assert torch.allclose(shifted.given(y).log_prob(h.unsqueeze(1)), pair.given(y).log_prob(h.unsqueeze(1)))
        bayes = pair.posterior(h).probs * p / pair.prior.probs
        assert torch.allclose(shifted.posterior(h).probs, bayes / bayes.sum(-1, keepdim=True))
        assert shifted.head.weight.data_ptr() == pair.head.weight.data_ptr()


def test_with_prior_takes_a_list():
    pair = GenerativePair(random_head(4, 8), sphere()).with_prior([0.7, 0.1, 0.1, 0.1])
    assert pair.prior.probs.tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("bad", [torch.ones(3), torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, math.nan, 1, 1])])
def test_with_prior_refuses(bad):
    with pytest.raises(ValueError, match="4 positive, finite class weights"):
        GenerativePair(random_head(4, 8), sphere()).with_prior(bad)


# --- as a module --------------------------------------------------------------------------------------------


def test_says_so_when_the_weights_change():
    layer = torch.nn.Linear(6, 3)
    pair = GenerativePair(Head(layer.weight, layer.bias), Sphere(2.0))
    kept = GenerativePair(Head(layer.weight, layer.bias).clone(), Sphere(2.0))
    h = torch.randn(5, 6, generator=seeded())
    pair.log_prob(h)
    before = kept.log_prob(h)
    with torch.no_grad():
        layer.weight.add_(1.0)
    uses = (
        lambda: pair.log_prob(h),
        lambda: pair.prior,
        lambda: pair.sample((2,), generator=seeded()),
        lambda: pair.given(1),
        lambda: pair.save("never.safetensors"),
        lambda: pair.to(torch.float64),
    )
    for use in uses:
        with pytest.raises(RuntimeError, match=r"weights changed.*head\.clone\(\)"):
            use()
    assert torch.equal(kept.log_prob(h), before)
    with torch.no_grad():
        layer.bias.add_(1.0)
    GenerativePair(Head(layer.weight, layer.bias), Sphere(2.0)).log_prob(h)


@pytest.mark.usefixtures("compiler")
def test_moves_state_dict_and_compile():
    pair = GenerativePair(random_head(4, 8), sphere())
    h = torch.randn(5, 8, generator=seeded(), dtype=torch.float64)
    want = pair.log_prob(h)
    other = GenerativePair(random_head(4, 8, seed=9).clone(), sphere(3.0))
    other.log_prob(h)
    other.load_state_dict(pair.state_dict())
    assert torch.allclose(other.log_prob(h), want)
    torch._dynamo.reset()
    compiled = torch.compile(pair.log_prob, backend="aot_eager")
    assert torch.allclose(compiled(h), want)
    narrow = GenerativePair(random_head(4, 8).clone(), sphere()).to(torch.float32)
    assert torch.allclose(narrow.log_prob(h.float()), want.float(), atol=1e-4)
    assert sum(b.numel() for b in pair.buffers() if b.shape == (4, 8)) == 32  # one W


def test_copies_live():
    layer = torch.nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight.mul_(2.0)  # a trained head: its tensors count their changes
    pair = GenerativePair(Head(layer.weight, layer.bias), Sphere(2.0))
    h = torch.randn(5, 6, generator=seeded())
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert torch.equal(other.log_prob(h), pair.log_prob(h))
        assert other.head.weight.data_ptr() != pair.head.weight.data_ptr()


def test_a_changed_base_changes_the_prior():
    pair = GenerativePair(random_head(3, 6, unequal=True), sphere())
    before = pair.prior.probs
    pair.base.radius.mul_(3)
    fresh = GenerativePair(pair.head, Sphere(pair.base.radius.clone()))
    assert not torch.allclose(pair.prior.probs, before)
    assert torch.allclose(pair.prior.probs, fresh.prior.probs)


@pytest.mark.usefixtures("compiler")
def test_compiles_whole():
    torch._dynamo.reset()
    pair = GenerativePair(random_head(4, 8), sphere())
    h = torch.randn(5, 8, generator=seeded(), dtype=torch.float64)
    compiled = torch.compile(pair.log_prob, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(h), GenerativePair(pair.head, pair.base).log_prob(h))


def test_gradients_reach_activations():
    pair = GenerativePair(random_head(4, 8), sphere())
    h = torch.randn(5, 8, generator=seeded(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(pair.log_prob, h)


def test_weight_is_held_by_reference():
    layer = torch.nn.Linear(6, 3)
    pair = GenerativePair(Head(layer.weight, layer.bias), Sphere(2.0))
    assert pair.head.weight.data_ptr() == layer.weight.data_ptr()
    assert not pair.head.weight.requires_grad


# --- bad input ----------------------------------------------------------------------------------------------


def test_wrong_kinds():
    head = random_head(4, 8)
    with pytest.raises(TypeError, match=r"head is a Linear; expected a penult\.Head.*find_head"):
        GenerativePair(torch.nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"base is a float; expected a penult\.bases\.Base"):
        GenerativePair(head, 2.0)
    with pytest.raises(ValueError, match="dimension 7, but the head takes 8"):
        GenerativePair(head, Sphere(1.0, loc=torch.zeros(7)))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 4]), ValueError, r"labels\[1\] is 4, out of range.*expected 0 to 3\. The head has 4 classes"),
        (-1, ValueError, "labels is -1, out of range"),
        (torch.tensor([0.5]), TypeError, "labels is a torch.float32 tensor; expected a tensor of integer class"),
        (torch.tensor([True]), TypeError, "labels is a torch.bool tensor"),
        ("cat", TypeError, "labels is a str"),
    ],
)
def test_labels_that_are_not_classes(labels, error, message):
    with pytest.raises(error, match=message):
        GenerativePair(random_head(4, 8), sphere()).given(labels)


@pytest.mark.parametrize("h", [torch.zeros(3, 7), torch.zeros(())])
def test_activations_of_wrong_shape(h):
    pair = GenerativePair(random_head(4, 8), sphere())
    for call in (pair.log_prob, pair.log_joint, pair.posterior):
        with pytest.raises(ValueError, match=r"h has shape .*; expected activations \(\.\.\., 8\)"):
            call(h)


# --- files --------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    head = penult.find_head(model, torch.randn(6, 4, generator=seeded()))
    for base in (None, Sphere.fit(head, torch.rand(50, 8, generator=seeded()), shape="elliptic", ambient=False)):
        pair = GenerativePair(head, base)
        path = pair.save(tmp_path / "net.penult.safetensors")
        again = penult.load(path)
        h = torch.randn(5, 8, generator=seeded())
        assert torch.equal(again.log_prob(h), pair.log_prob(h))
        assert torch.equal(again.prior.probs, pair.prior.probs)
        assert again.head.certificate == head.certificate
        drawn, kept = pair.sample((4,), generator=seeded()), again.sample((4,), generator=seeded())
        assert torch.equal(drawn[0], kept[0])
        assert os.listdir(tmp_path) == ["net.penult.safetensors"]


def test_save_keeps_temperature_norm_and_prior(tmp_path):
    head = Head(torch.eye(3), torch.zeros(3), norm="rms").with_temperature(2.0)
    pair = GenerativePair(head, Sphere.from_head(head, ambient=True)).with_prior(torch.tensor([0.5, 0.25, 0.25]))
    again = penult.load(pair.save(tmp_path / "a.penult.safetensors"))
    assert again.head.temperature == 2.0
    assert again.head.norm == "rms"
    assert again.head.radius == pytest.approx(3**0.5)
    assert torch.allclose(again.prior.probs, torch.tensor([0.5, 0.25, 0.25]))


class Flat(Base):
    """A base of someone else's: the standard normal law."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    info = BaseInfo("flat", "Lebesgue", "R^d", needs_data=False, exact_mgf=True, source="a test")
    in_features = property(lambda self: self.features)

    def log_mgf(self, weight):
        return 0.5 * weight.square().sum(-1)

    def log_prob(self, h):
        return -0.5 * h.square().sum(-1) - 0.5 * self.features * math.log(2 * math.pi)

    def draw(self, weight, index, generator):
        return weight[index] + torch.randn(len(index), self.features, generator=generator, dtype=weight.dtype)

    def config(self):
        return {"features": self.features}


def test_a_base_of_ones_own(tmp_path):
    from penult.testing import check_base

    check_base(Flat(5), random_head(3, 5), samples=20_000)
    path = GenerativePair(random_head(3, 5), Flat(5)).save(tmp_path / "own.penult.safetensors")
    assert isinstance(penult.load(path, bases=[Flat]).base, Flat)
    with pytest.raises(io.FileFormatError, match=r"base 'Flat', which penult does not know.*bases=\[Flat\]"):
        penult.load(path)


def test_files_that_are_no_pair(tmp_path):
    path = GenerativePair(random_head(3, 5), sphere()).save(tmp_path / "a.penult.safetensors")
    whole = path.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    save_file({"fc.weight": torch.eye(3)}, tmp_path / "foreign")
    torch.save({"weight": torch.eye(3)}, tmp_path / "pickle")
    io.write(tmp_path / "other", {"x": torch.ones(1)}, "vae", {})
    io.write(tmp_path / "bare", {"x": torch.ones(1)}, "pair", {})
    io.write(tmp_path / "broken", {}, "pair", {"head": {}, "base": {"class": "Sphere", "config": {}}})
    facts = {"penult": json.dumps({"schema": 99, "kind": "pair", "versions": {}})}
    save_file({"head.weight": torch.eye(3)}, tmp_path / "newer", metadata=facts)
    for name in ("cut", "foreign", "pickle", "other", "bare", "broken", "newer"):
        with pytest.raises(io.FileFormatError, match=name):
            penult.load(tmp_path / name)
    with pytest.raises(io.FileFormatError, match="upgrade"):
        penult.load(tmp_path / "newer")
    with pytest.raises(FileNotFoundError):
        penult.load(tmp_path / "missing")


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.penult.safetensors"
    old = GenerativePair(Head(torch.eye(3)), Sphere(2.0))
    old.save(path)
    code = f"""
import os, signal, torch, penult
os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
penult.GenerativePair(penult.Head(5 * torch.eye(3)), penult.Sphere(1.0)).save({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert float(penult.load(path).base.radius) == 2.0


def test_a_file_of_the_first_schema_still_loads():
    pair = penult.load(os.path.join(os.path.dirname(__file__), "data", "pair-schema-1.penult.safetensors"))
    assert torch.equal(pair.head.weight, torch.eye(3))
    assert torch.allclose(pair.base.radius, torch.tensor([1.0, 2.0]))
    h = torch.tensor([[1.0, 2.0, 3.0]])
    assert float(pair.log_prob(h)) == pytest.approx(-5.13206, abs=1e-4)


def shifted_digits():
    """Activations of digits under a small classifier: of its own balance, labelled, and of another, unlabelled."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=seeded(0))
    x, y = x[order], y[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(model(x[:700]), y[:700])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    head = penult.find_head(model, x[:8])
    with torch.no_grad():
        h = model[:2](x)
    held, held_y, rest, rest_y = h[700:1200], y[700:1200], h[1200:], y[1200:]
    chance = torch.tensor([0.05, 0.9, 0.1, 0.9, 0.05, 0.7, 0.1, 0.9, 0.5, 0.2])
    kept = torch.rand(len(rest), generator=seeded(1)) < chance[rest_y]
    return head.calibrate(head(held), held_y), held, rest[kept], rest_y[kept]


def test_label_shift_on_digits_against_the_oracle():
    head, held, target, labels = shifted_digits()
    oracle = labels.bincount(minlength=10).double().clamp_min(0.5) / len(labels)
    pair = GenerativePair(head, penult.Marginal.fit(head, held, kind="bank"))
    found = pair.estimate_prior(target).probs.double()
    before, after = float((pair.prior.probs - oracle).abs().sum() / 2), float((found - oracle).abs().sum() / 2)
    assert before > 0.3  # a real shift
    assert after < 0.05

    def loss(p):
        return float(torch.nn.functional.nll_loss(p.posterior(target).logits, labels))

    plain, adapted, best = loss(pair), loss(pair.with_prior(found)), loss(pair.with_prior(oracle))
    assert adapted < plain
    assert plain - adapted > 0.8 * (plain - best)
    # the mean posterior, which most would count, is worse
    assert after < float((pair.posterior(target).probs.double().mean(0) - oracle).abs().sum() / 2)


@pytest.mark.filterwarnings("ignore:the base Sphere")
def test_estimated_prior_is_a_fixed_point_of_most_likelihood():
    pair = GenerativePair(penult.Head(3 * torch.eye(3)), Sphere(2.0))
    y = torch.tensor([0] * 700 + [1] * 250 + [2] * 50)
    h = pair.given(y).sample((1,), generator=seeded())[0]
    found = pair.estimate_prior(h, tolerance=1e-9).probs.double()
    log_given = pair.given(torch.arange(3)).log_prob(h.unsqueeze(1)).double()

    def likelihood(q):
        return float((log_given + q.log()).logsumexp(-1).mean())

    for seed in range(20):
        other = (found + 0.02 * torch.rand(3, generator=seeded(seed), dtype=torch.float64)).clamp_min(1e-6)
        assert likelihood(other / other.sum()) < likelihood(found)
    assert float((found - torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)).abs().max()) < 0.03


@pytest.mark.filterwarnings("ignore:the base Sphere")
def test_estimated_prior_streams_and_takes_batches(tmp_path, monkeypatch):
    pair = GenerativePair(penult.Head(3 * torch.eye(3)), Sphere(2.0))
    h, _ = pair.with_prior(torch.tensor([0.6, 0.3, 0.1])).sample((2000,), generator=seeded())
    kept = pair.estimate_prior(h).probs
    acts = penult.Activations(h, pair.head(h)).save(tmp_path / "acts", shard_size=5000)
    monkeypatch.setattr("penult.pair._KEPT", 0)
    torch.testing.assert_close(pair.estimate_prior(acts).probs, kept)
    with pytest.raises(ValueError, match="hold NaN"):
        pair.estimate_prior(torch.full((5, 3), torch.nan))
    with pytest.raises(TypeError, match="floating-point tensor"):
        pair.estimate_prior([1.0])


@pytest.mark.filterwarnings("ignore:the base Sphere")
def test_a_class_that_is_absent_gets_next_to_nothing():
    pair = GenerativePair(penult.Head(5 * torch.eye(3)), Sphere(2.0))
    h = pair.given(torch.tensor([0, 1])).sample((500,), generator=seeded()).reshape(-1, 3)
    found = pair.estimate_prior(h)
    assert 0 < float(found.probs[2]) < 0.01
    assert float(pair.with_prior(found).prior.probs[2]) < 0.01


@pytest.mark.parametrize("load", [False, True])
def test_an_estimated_prior_needs_a_base_that_was_fitted(load, tmp_path):
    head = random_head(3, 4, dtype=torch.float32)
    h = torch.randn(90, 4, generator=seeded())

    def pair_of(base):
        pair = GenerativePair(head, base)
        return penult.load(pair.save(tmp_path / "pair.safetensors")) if load else pair

    for base in (Sphere.from_head(head), Sphere.from_head(head, ambient=True), Sphere(2.0)):
        with pytest.warns(UserWarning, match=r"was not fitted to activations.*biases=True"):
            pair_of(base).estimate_prior(h)
    one = Sphere.fit(head, h, radii=1)
    for base in (one, Sphere.fit(head, h), penult.Gaussian.fit(head, h), penult.Marginal.fit(head, h, kind="bank")):
        assert pair_of(base).base.reference == base.reference
        pair_of(base).estimate_prior(h)


def test_distributions_of_classes_map_over_labels():
    pair = GenerativePair(Head(torch.eye(3)), Sphere(2.0))
    h, y = pair.sample(6, generator=torch.Generator().manual_seed(0))
    mapped = torch.func.vmap(lambda label, row: pair.given(label).log_prob(row))(y, h)
    torch.testing.assert_close(mapped, pair.given(y).log_prob(h))


@pytest.mark.parametrize("weight", [[math.nan, 0.0], [math.inf, 0.0], [1.0, -math.inf]])
def test_tilts_that_are_not_finite_are_refused(weight):
    with pytest.raises(ValueError, match="expected finite tilts"):
        Tilt(Sphere(1.0), torch.tensor(weight), validate_args=True)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", 99])
def test_a_bad_device_is_no_fault_of_the_file(tmp_path, device):
    path = GenerativePair(Head(torch.eye(3)), Sphere(2.0)).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"^device is .*expected a device of this machine") as caught:
        penult.load(path, device=device)
    assert not isinstance(caught.value, penult.io.FileFormatError)


# --- bases that do not see all that the head reads ----------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 3, 5])
@pytest.mark.parametrize("loc", [None, torch.arange(6.0)])
def test_a_base_that_ignores_what_the_head_reads_is_refused(dims, loc):
    head = random_head(7, 6, dtype=torch.float32)
    rows = torch.linalg.qr(torch.randn(6, 6, generator=seeded()))[0][:dims]
    with pytest.raises(ValueError, match=r"ignores a part of activations that this head reads.*head\.span\(\)"):
        GenerativePair(head, Sphere(1.0, loc=loc, subspace=rows))
    other = random_head(4, 6, seed=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="ignores a part"):
        GenerativePair(head, Sphere.from_head(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_posterior_is_the_softmax_outside_of_the_subspace(dtype, tmp_path):
    head = Head(torch.randn(4, 9, generator=seeded()).to(dtype))
    h = torch.randn(20, 9, generator=seeded(1)).to(dtype)
    bases = (Sphere.from_head(head), Sphere.fit(head, h, ambient=False), Sphere.fit(head, h, "elliptic", False))
    for pair in (GenerativePair(head, base) for base in bases):
        expected = head.clone().float()(h.float()).softmax(-1)
        assert torch.allclose(pair.posterior(h).probs.float(), expected, atol=1e-5)
        assert torch.allclose(pair.log_joint(h).float().softmax(-1), expected, atol=1e-5 if h.itemsize > 2 else 0.05)
        assert penult.load(pair.save(tmp_path / "pair.safetensors")).base.in_features == 9
        penult.load(copy.deepcopy(pair).bfloat16().save(tmp_path / "half.safetensors"))


def test_a_sphere_of_a_layer_norm_lies_in_the_hyperplane_of_its_activations():
    head = Head(torch.randn(4, 6, generator=seeded()) + 1, norm="layer")
    pair = GenerativePair(head, Sphere.from_head(head, ambient=True))
    h = torch.nn.functional.layer_norm(torch.randn(5, 6, generator=seeded(1)), (6,))
    assert torch.allclose(pair.log_joint(h).softmax(-1), head(h).softmax(-1), atol=1e-5)
