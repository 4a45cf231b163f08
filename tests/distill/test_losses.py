import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heads import random_head
from penult import GenerativePair, Head, Sphere, VonMisesFisher
from penult.distill import ActivationLoss, SoftTargetLoss, targets


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def soft(seed, *shape):
    return (2 * drawn(seed, *shape)).softmax(-1)


def loss_of(pair, width=7, seed=0, **options):
    """An ActivationLoss in float64 whose projector has weights of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ActivationLoss(pair, width, **options)


# --- soft targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_soft_loss_is_its_formula(classes, weight, temperature):
    z, q, y = 3 * drawn(1, 6, classes), soft(2, 6, classes), torch.arange(6) % classes
    p = (z / temperature).exp() / (z / temperature).exp().sum(-1, keepdim=True)
    divergence = (q * (q / p).log()).sum(-1).mean()
    labelled = -(z.exp() / z.exp().sum(-1, keepdim=True)).log()[torch.arange(6), y].mean()
    want = (1 - weight) * labelled + weight * temperature**2 * divergence
    assert torch.allclose(SoftTargetLoss(temperature, weight)(z, y, q), want, atol=1e-12)


def test_soft_loss_is_cross_entropy_at_its_ends():
    z, y = 3 * drawn(1, 6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    ce = F.cross_entropy(z, y)
    assert torch.allclose(SoftTargetLoss(weight=0.0)(z, y, soft(2, 6, 5)), ce)
    hard = F.one_hot(y, 5).double()  # its zeros have no logarithm, and must not matter
    assert torch.allclose(SoftTargetLoss(1.0, 1.0)(z, y, hard), ce)


@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_soft_gradient(weight):
    z, q, y, t = (3 * drawn(1, 6, 5)).requires_grad_(), soft(2, 6, 5), torch.arange(6) % 5, 3.0
    SoftTargetLoss(t, weight)(z, y, q).backward()
    free = z.detach()
    want = weight * t * ((free / t).softmax(-1) - q) + (1 - weight) * (free.softmax(-1) - F.one_hot(y, 5))
    assert torch.allclose(z.grad, want / 6, atol=1e-12)


def test_soft_loss_is_least_at_its_targets():
    y, q, t = torch.arange(4), soft(3, 4, 4), 2.0
    at = t * q.log()
    loss = SoftTargetLoss(t, 1.0)
    assert float(loss(at, y, q)) == pytest.approx(0, abs=1e-12)
    assert all(float(loss(at + 0.1 * drawn(seed, 4, 4), y, q)) > 0 for seed in range(5))
    assert SoftTargetLoss().state_dict() == {}
    assert repr(SoftTargetLoss()) == "SoftTargetLoss(temperature=4, weight=0.9)"


# --- the quadratic of activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 5.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_at_the_class_the_quadratic_is_norm_and_angle(classes, strength):
    pair = GenerativePair(random_head(classes, classes + 5, seed=1, norm=3.0))
    y = torch.arange(12) % classes
    loss, none = loss_of(pair, strength=strength), loss_of(pair, strength=0.0)
    f = drawn(4, 12, 7)
    t = targets(pair, y, "activation")
    quadratic = (loss(f, y, t) - none(f, y, t)) / strength
    u = loss.projector(f)
    mu = loss.canonical.rows / loss.canonical.rows.norm(dim=-1, keepdim=True)
    length = u.norm(dim=-1) / loss.canonical.radius
    cosine = (u * mu[y]).sum(-1) / u.norm(dim=-1)
    want = ((length - 1).square() + 2 * length * (1 - cosine)).mean()
    assert float(quadratic.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    if classes > 2:  # and that is a von Mises-Fisher likelihood, of concentration 2λ|u|/r at direction u/|u|
        kappa = 2 * strength * length.detach()
        law = VonMisesFisher(mu[y].double(), kappa)
        off = (u / u.norm(dim=-1, keepdim=True)).detach()
        likelihood = law.log_prob(mu[y].double()) - law.log_prob(off)  # 0 at μ: the constant of the law is gone
        norms = strength * (length.detach() - 1).square()
        assert float((norms + likelihood).mean()) == pytest.approx(strength * float(want.detach()), rel=1e-6)


def test_activation_loss_is_its_formula(pair, shown):
    h, y = shown
    loss = loss_of(pair, strength=2.0)
    f, t = drawn(5, 400, 7), targets(pair, y, "activation", activations=h)
    u = f @ loss.projector.weight.T + loss.projector.bias
    centered = pair.head.weight - pair.head.weight.mean(0)
    c = centered.norm(dim=-1).mean() * 3**0.5
    r = float(pair.base.radius[0]) * c
    full = u @ pair.head.span()  # in R^d, at the canonical scale
    want = F.cross_entropy(full @ centered.T / c + pair.head.bias, y) + 2 * (full - t).square().sum(-1).mean() / r**2
    assert torch.allclose(loss(f, y, t), want, rtol=1e-6)
    assert torch.allclose(loss.predict(f).softmax(-1), pair.head(full / c).softmax(-1), atol=1e-8)
    assert float(loss.canonical.rows.norm(dim=-1).mean()) == pytest.approx(3**-0.5)


def trained(pair, h, y, steps=25):
    """Losses of a student over a short training."""
    loss = loss_of(pair, 16, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        features = nn.Sequential(nn.Linear(6, 16), nn.ReLU()).double()
    images, t = drawn(6, 5, 6)[y] + 0.3 * drawn(7, len(y), 6), targets(pair, y, "activation", activations=h)
    optimizer = torch.optim.AdamW([*features.parameters(), *loss.parameters()], lr=1e-2)
    values = []
    for step in range(steps):
        part = torch.arange(step * 16, step * 16 + 16) % len(y)
        value = loss(features(images[part]), y[part], t[part])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.detach())
    return torch.stack(values)


@pytest.mark.parametrize("c", [0.1, 7.0])
def test_the_unit_of_activations_does_not_change_a_training(pair, shown, c):
    h, y = shown
    values = trained(pair, h, y)
    other = GenerativePair(Head(pair.head.weight / c, pair.head.bias))
    assert torch.allclose(trained(other, c * h, y), values, rtol=1e-5)
    assert float(values[-5:].mean()) < 0.9 * float(values[:5].mean())  # it did train


def test_the_gauge_does_not_change_a_training(pair, shown):
    h, y = shown
    moved = GenerativePair(Head(pair.head.weight + drawn(3, 12), pair.head.bias + 4))
    assert torch.allclose(trained(moved, h, y), trained(pair, h, y), rtol=1e-5)


# --- prediction and folding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("kind", ["linear", "no bias", "deep"])
def test_folded_predicts_alike(kind, classes, dtype):
    pair = GenerativePair(random_head(classes, classes + 5, seed=1, norm=3.0, dtype=dtype))
    rank = classes - 1
    projector = {
        "linear": None,
        "no bias": nn.Linear(7, rank, bias=False).to(dtype),
        "deep": nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, rank)).to(dtype),
    }[kind]
    loss = loss_of(pair, projector=projector)
    folded = loss.folded()
    f = drawn(4, 20, 7).to(dtype)
    assert torch.allclose(folded(f), loss.predict(f), atol=1e-5)
    assert loss.predict(f).shape == (20, classes)
    assert isinstance(folded, nn.Sequential if kind == "deep" else nn.Linear)
    assert loss.num_classes == classes
    before = folded(f).detach().clone()
    with torch.no_grad():  # what is folded no longer follows the loss, where it has storage of its own
        loss.canonical.rows.mul_(2)
        loss.canonical.bias.add_(1)
        if kind == "linear":
            loss.projector.weight.mul_(2)
    assert torch.equal(folded(f), before)


def test_only_the_projector_is_trained(pair):
    loss = loss_of(pair)
    assert [name for name, _ in loss.named_parameters()] == ["projector.weight", "projector.bias"]
    y = torch.arange(5)
    loss(drawn(1, 5, 7), y, targets(pair, y, "activation")).backward()
    assert not any(buffer.requires_grad for buffer in loss.buffers())
    before = pair.head.weight.clone()
    torch.optim.SGD(loss.parameters(), 1.0).step()
    assert torch.equal(pair.head.weight, before)
    assert "strength=5" in repr(loss)


def test_building_draws_only_the_first_weights(pair):
    """As any layer does; a projector that is given leaves the global state alone."""
    state = torch.random.get_rng_state()
    projector = nn.Linear(7, 4, dtype=torch.float64)
    torch.random.set_rng_state(state)
    ActivationLoss(pair, 7, projector=projector)
    assert torch.equal(state, torch.random.get_rng_state())


def test_gradients_are_those_of_differences(pair, shown):
    loss, y = loss_of(pair, 3), torch.tensor([1, 0, 4])
    f, t = drawn(2, 3, 3).requires_grad_(), targets(pair, y, "activation")
    assert torch.autograd.gradcheck(lambda x: loss(x, y, t), (f,))
    z, q = drawn(3, 3, 5).requires_grad_(), soft(1, 3, 5)
    assert torch.autograd.gradcheck(lambda x: SoftTargetLoss()(x, y, q), (z,))


def test_under_autocast():
    pair = GenerativePair(random_head(5, 12, seed=2, norm=4.0, dtype=torch.float32))
    y = torch.arange(20) % 5
    body = nn.Linear(6, 7)
    own = nn.Linear(7, 5)
    loss = ActivationLoss(pair, 7)
    images, t, q = torch.randn(20, 6, generator=seeded()), targets(pair, y, "activation"), targets(pair, y)
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = body(images).relu()
            both = loss(features, y, t), SoftTargetLoss()(own(features), y, q)
        body.zero_grad()
        loss.zero_grad()
        sum(both).backward()
        grads = [body.weight.grad, loss.projector.weight.grad]
        assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in grads)
        values.append(both)
    for exact, half in zip(*values, strict=True):
        assert half.item() == pytest.approx(exact.item(), rel=0.05)


def test_state_dicts(pair):
    a, b = loss_of(pair, seed=0), loss_of(copy.deepcopy(pair), seed=1)
    f, y = drawn(1, 5, 7), torch.arange(5)
    t = targets(pair, y, "activation")
    assert not torch.equal(a.predict(f), b.predict(f))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.predict(f), b.predict(f))
    assert torch.equal(a(f, y, t), b(f, y, t))
    assert torch.equal(copy.deepcopy(a)(f, y, t), a(f, y, t))


def test_a_state_dict_brings_the_radius(pair):
    a = loss_of(pair)
    b = loss_of(GenerativePair(pair.head, Sphere(1.0, subspace=pair.head.span())))
    b.load_state_dict(a.state_dict())
    f, y = drawn(1, 5, 7), torch.arange(5)
    t = targets(pair, y, "activation")
    assert torch.equal(a(f, y, t), b(f, y, t))


# --- errors ---------------------------------------------------------------------------------------------------


def test_soft_errors():
    z, y, q = drawn(1, 6, 5), torch.arange(6) % 5, soft(2, 6, 5)
    loss = SoftTargetLoss()
    with pytest.raises(ValueError, match=r"logits .* shape \(6, 5\), and soft targets \(6, 4\); .*teacher's classes"):
        loss(z, y, q[:, 1:])
    with pytest.raises(ValueError, match=r"soft targets \(5, 5\)"):
        loss(z, y, q[1:])
    with pytest.raises(ValueError, match=r"shape \(5,\), and soft targets"):
        loss(z[0], y[:1], q[0])
    with pytest.raises(TypeError, match=r"labels is a torch.float64 tensor"):
        loss(z, y.double(), q)
    with pytest.raises(ValueError, match=r"labels\[0\] is 5, .*expected 0 to 4"):
        loss(z, y + 5, q)
    with pytest.raises(ValueError, match=r"labels has shape \(5,\)"):
        loss(z, y[1:], q)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            SoftTargetLoss(temperature)
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"weight is .*from 0 to 1"):
            SoftTargetLoss(weight=weight)


def test_activation_errors(pair):
    loss, y = loss_of(pair), torch.arange(5)
    f, t = drawn(1, 5, 7), targets(pair, y, "activation")
    with pytest.raises(ValueError, match=r"features have shape \(5, 6\); expected \(B, 7\)"):
        loss(f[:, 1:], y, t)
    with pytest.raises(ValueError, match=r"features have shape \(5, 7, 1\)"):
        loss.predict(f[..., None])
    with pytest.raises(ValueError, match=r"targets have shape \(5, 5\); expected \(5, 12\).*kind='activation'"):
        loss(f, y, targets(pair, y))
    with pytest.raises(ValueError, match=r"targets have shape \(4, 12\)"):
        loss(f, y, t[1:])
    with pytest.raises(ValueError, match=r"expected 0 to 4"):
        loss(f, y + 1, t)
    with pytest.raises(TypeError, match=r"labels is a torch.float64 tensor"):
        loss(f, y.double(), t)
    with pytest.raises(ValueError, match=r"takes 7 features to 12; .*in_features = 7 to 4, the rank"):
        ActivationLoss(pair, 7, projector=nn.Linear(7, 12))
    with pytest.raises(ValueError, match="takes 6 features to 4"):
        ActivationLoss(pair, 7, projector=nn.Linear(6, 4))
    deep = ActivationLoss(pair, 7, projector=nn.Sequential(nn.Linear(7, 12).double()))
    with pytest.raises(ValueError, match=r"projector has shape \(5, 12\); expected \(5, 4\)"):
        deep(f, y, t)
    for strength in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="strength is"):
            ActivationLoss(pair, 7, strength)
    with pytest.raises(ValueError, match="in_features is 0"):
        ActivationLoss(pair, 0)
    with pytest.raises(TypeError, match=r"pair is a Head; expected a penult.GenerativePair"):
        ActivationLoss(pair.head, 7)


# --- hints ----------------------------------------------------------------------------------------------------


def test_hints_add_their_distance_and_nothing_to_predictions(pair):
    plain, hinted = loss_of(pair), loss_of(pair, hint=3.0)
    assert torch.equal(plain.projector.weight, hinted.projector.weight)
    f, y, t = drawn(1, 6, 7), torch.arange(6) % 5, drawn(2, 6, 24)
    q, r = hinted.hint_projector, hinted.canonical.radius
    extra = 3.0 / r**2 * (f @ q.weight.T + q.bias - t[:, 12:]).square().sum(-1).mean()
    assert torch.allclose(hinted(f, y, t), plain(f, y, t[:, :12]) + extra)
    assert torch.equal(hinted.predict(f), plain.predict(f))
    assert torch.allclose(hinted.folded()(f), plain.predict(f))
    assert {name for name, _ in hinted.named_parameters()} == {
        "projector.weight", "projector.bias", "hint_projector.weight", "hint_projector.bias"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"expected \(6, 24\).*kind='hinted'"):
        hinted(f, y, t[:, :12])
    with pytest.raises(ValueError, match=r"expected \(6, 12\).*kind='activation'"):
        plain(f, y, t)
    with pytest.raises(ValueError, match="hint is -1"):
        loss_of(pair, hint=-1.0)
