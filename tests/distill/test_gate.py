import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.special import ive

from heads import random_head
from penult import Activations, Gaussian, GenerativePair, Head, Marginal, Sphere, find_head, special
from penult.distill import Gate
from tiers import thin

TAIL = 0.1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def span_of(head):
    """Orthonormal rows of the centered rows' span, and its dimension, by numpy."""
    w = head.weight.double().numpy()
    _, s, v = np.linalg.svd(w - w.mean(0), full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    return torch.from_numpy(v[:rank].copy())


def centered(head):
    return head.weight.double() - head.weight.double().mean(0)


def radius_of(pair):
    """Mean in-span norm, in the head's own unit; exact where the sphere has one radius in span(W)."""
    return float(pair.base.radius[0])


def activation(pair, y, cosine, seed=0, outside=0.0, length=1.7):
    """One whose cosine in span(W) to row y is given, of any length, with a part that the softmax does not see."""
    w, u = centered(pair.head), span_of(pair.head)
    mu = w[y] / w[y].norm()
    if len(u) == 1:
        inside = math.copysign(1, cosine) * mu
    else:
        other = u.T @ u @ torch.randn(len(mu), generator=seeded(seed), dtype=torch.float64)
        other = other - mu * (other @ mu)
        inside = cosine * mu + math.sqrt(1 - cosine**2) * other / other.norm()
    noise = torch.randn(len(mu), generator=seeded(seed + 1), dtype=torch.float64)
    return length * inside + outside * (noise - u.T @ u @ noise)


def law(dim, kappa, cosine):
    """P(cos ≤ cosine), by adding up the density on a fine grid of angles; two points in one dimension."""
    if dim == 1:
        return 1.0 if cosine > 0 else float(1 / (1 + np.exp(2 * kappa)))
    angle = np.linspace(0, np.pi, 20_001)
    density = np.exp(kappa * (np.cos(angle) - 1)) * np.sin(angle) ** (dim - 2)
    return float(density[np.cos(angle) <= cosine].sum() / density.sum())


def two_classes():
    return GenerativePair(
        Head(torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.0, 1.0]]).double(), torch.tensor([0.3, 0.0]).double())
    )


# --- the factors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_trust_is_the_accuracy_above_guessing(classes):
    pair = GenerativePair(random_head(classes, 4 * classes, seed=1, bias=False, norm=6.0))
    labels = torch.arange(classes).repeat(10)
    h = centered(pair.head)[labels]
    predicted = pair.head(h).argmax(-1)
    assert torch.equal(predicted, labels)
    for wrong in (0, 3, 7):  # of ten, all at once
        given = labels.clone()
        given[: wrong * classes] = (given[: wrong * classes] + 1) % classes
        a, chance = 1 - wrong / 10, 1 / classes
        gate = Gate.fit(pair, h, given)
        assert float(gate.trust) == pytest.approx(max(0.0, (a - chance) / (1 - chance)), abs=1e-6)
        # these point along their rows, so that nothing else is left than the second factor
        assert torch.allclose(gate(h, given), gate.trust.double() * (given == predicted), atol=1e-6)


def test_a_teacher_that_is_worse_than_guessing_is_not_believed_at_all(pair):
    labels = torch.arange(5).repeat(4)
    gate = Gate.fit(pair, centered(pair.head)[(labels + 1) % 5], labels)
    assert gate.summary.accuracy == 0
    assert float(gate.trust) == 0
    right = centered(pair.head)
    assert torch.equal(gate(right, torch.arange(5)), torch.zeros(5).double())


def test_an_image_that_the_teacher_gets_wrong_is_not_believed(pair):
    h = centered(pair.head).repeat(5, 1)
    labels = torch.arange(5).repeat_interleave(5)
    assert torch.equal(Gate(pair)(h, labels), (pair.head(h).argmax(-1) == labels).double())


@pytest.mark.parametrize("tail", thin([0.1, 0.5, 0.95], keep=[0.5]))
@pytest.mark.parametrize("classes", [3, 4, 10, 100])  # span of 2, 3, 9 and 99 dimensions
def test_density_is_the_share_of_the_class_that_lies_farther_out(classes, tail):
    head = random_head(classes, 3 * classes, seed=3, bias=False, norm=5.0)
    head = Head(head.weight * torch.linspace(0.95, 1.05, classes).double()[:, None])  # a law of its own for each class
    pair = GenerativePair(head, Sphere(1.5, subspace=head.span()))
    rank = classes - 1
    w = centered(pair.head)
    kappa = radius_of(pair) * w.norm(dim=-1)
    cosines = torch.linspace(-0.5, 0.999, 25, dtype=torch.float64)
    for y in (0, classes - 1):
        h = torch.stack([activation(pair, y, float(c), seed=i, outside=3.0) for i, c in enumerate(cosines)])
        labels = torch.full((25,), y)
        right = pair.head(h).argmax(-1) == y
        assert right[-1]
        exact = special.cosine_cdf(rank, kappa[y], cosines)
        summed = torch.tensor([law(rank, float(kappa[y]), float(c)) for c in cosines], dtype=torch.float64)
        assert torch.allclose(exact, summed, atol=1e-3)
        want = right * (exact / tail).clamp_max(1)
        assert torch.allclose(Gate(pair, tail=tail)(h, labels), want, atol=1e-5)


def test_all_three_factors_multiply(pair, shown):
    h, y = shown
    gate = Gate.fit(pair, h, y)
    w, u = centered(pair.head), span_of(pair.head)
    inside = h @ u.T @ u
    cosine = (inside * w[y]).sum(-1) / inside.norm(dim=-1) / w[y].norm(dim=-1)
    below = special.cosine_cdf(4, radius_of(pair) * w[y].norm(dim=-1), cosine)
    right = pair.head(h).argmax(-1) == y
    a = float(right.double().mean())
    assert 0.5 < a < 0.98
    want = (a - 0.2) / 0.8 * right * (below / TAIL).clamp_max(1)
    assert 0.02 < float(((want > 0) & (want < 0.9 * want.max())).double().mean())  # each factor has its part
    assert torch.allclose(gate(h, y), want, atol=1e-6)


def test_the_typical_image_of_the_pair_is_believed_in_proportion():
    """Of draws of a class, F is uniform, so that a share τ lies in the tail, and half of it is lost there."""
    pair = GenerativePair(random_head(6, 8, seed=5, bias=False, norm=4.0), None)
    y = torch.arange(6).repeat(4000)
    h = pair.given(y).sample(generator=seeded(1))
    right = (pair.head(h).argmax(-1) == y).double()
    for tail in (0.1, 0.4):
        typical = Gate(pair, tail=tail)(h, pair.head(h).argmax(-1))
        assert float((Gate(pair, tail=tail)(h, y) - right * typical).abs().max()) < 1e-6
        gate = Gate(pair, tail=tail)
        own = gate.canonical.typicality(gate.canonical.read(h), y)
        for q in (tail / 2, tail, 0.5, 0.9):
            assert float((own <= q).double().mean()) == pytest.approx(q, abs=4 * math.sqrt(q * (1 - q) / len(y)))


def test_in_one_dimension_a_right_activation_is_believed_in_full():
    pair = two_classes()
    h = torch.stack([activation(pair, y, 1.0, seed=i, outside=2.0, length=9.0) for i in range(300) for y in (0, 1)])
    y = torch.arange(2).repeat(300)
    assert bool((pair.head(h).argmax(-1) == y).all())
    for dtype in (torch.float32, torch.float64):  # rounding must not put a cosine just below 1, below all of the law
        own = copy.deepcopy(pair).to(dtype)
        assert torch.equal(Gate(own)(h.to(dtype), y), torch.ones(600, dtype=dtype))
        assert torch.equal(Gate(own)(h.to(dtype), 1 - y), torch.zeros(600, dtype=dtype))


def test_collinear_rows():
    """K = 3 in a span of one dimension: the class in the middle has no direction, and is typical anywhere."""
    pair = GenerativePair(
        Head(torch.tensor([[-2.0, -2.0], [0.0, 0.0], [2.0, 2.0]]) + 1, torch.tensor([0.0, 2.0, 0.0])), Sphere(1.5)
    )
    h = torch.tensor([[-1.0, -1.0], [0.1, -0.1], [1.0, 1.0]])
    assert torch.equal(Gate(pair)(h, torch.arange(3)), torch.ones(3))


def test_only_the_span_is_looked_at(pair, shown):
    h, y = shown
    u = span_of(pair.head)
    noise = torch.randn(h.shape, generator=seeded(8), dtype=torch.float64)
    outside = h + 5 * (noise - noise @ u.T @ u)
    assert torch.allclose(Gate(pair)(outside, y), Gate(pair)(h, y), atol=1e-9)
    assert torch.allclose(Gate(pair)(3 * h, y)[Gate(pair)(h, y) == 1], torch.ones(1).double())  # nor is the length


def test_the_law_takes_the_radius_of_the_base(pair, shown):
    """A wider sphere makes more concentrated classes, among which the same activation is less typical."""
    h, y = shown
    beliefs = [float(Gate(GenerativePair(pair.head, Sphere(r)))(h, y).mean()) for r in (0.5, 2.0, 6.0)]
    assert beliefs[0] > beliefs[1] > beliefs[2]
    gaussian = GenerativePair(pair.head, Gaussian(torch.zeros(12).double(), 0.3 * torch.eye(12).double()))
    u = span_of(pair.head)
    drawn, _ = gaussian.sample((100_000,), generator=seeded(1))
    radius = float((drawn @ u.T).norm(dim=-1).mean())
    kappa = radius * centered(pair.head).norm(dim=-1)
    inside = h @ u.T @ u
    cosine = (inside * centered(pair.head)[y]).sum(-1) / inside.norm(dim=-1) / centered(pair.head).norm(dim=-1)[y]
    want = (special.cosine_cdf(4, kappa[y], cosine) / TAIL).clamp_max(1) * (pair.head(h).argmax(-1) == y)
    assert torch.allclose(Gate(gaussian)(h, y), want, atol=0.06)  # 4096 draws give the radius to a per cent or so


# --- units and the gauge ------------------------------------------------------------------------------------


def bases(head, h):
    return {
        "without data": None,
        "span": Sphere.fit(head, h, ambient=False),
        "ambient": Sphere.fit(head, h),
        "gaussian": Gaussian.fit(head, h),
        "bank": Marginal.fit(head, h, kind="bank"),
    }


@pytest.mark.parametrize("base", ["without data", "span", "ambient", "gaussian", "bank"])
@pytest.mark.parametrize("c", [0.1, 7.0])
def test_the_unit_of_activations_does_not_matter(shown, pair, base, c):
    h, y = shown
    a = GenerativePair(pair.head, bases(pair.head, h)[base])
    other = Head(pair.head.weight / c, pair.head.bias)
    b = GenerativePair(other, bases(other, c * h)[base])
    # the atoms of a radial law are bins of a histogram, whose edges do not scale, and so do what is drawn of them
    error = 5e-3 if base == "ambient" else 1e-5
    assert torch.allclose(Gate.fit(b, c * h, y)(c * h, y), Gate.fit(a, h, y)(h, y), rtol=error, atol=error)


def test_the_gauge_does_not_matter(pair, shown):
    h, y = shown
    moved = Head(pair.head.weight + torch.randn(12, generator=seeded(3), dtype=torch.float64), pair.head.bias + 4)
    assert torch.allclose(Gate.fit(GenerativePair(moved), h, y)(h, y), Gate.fit(pair, h, y)(h, y), atol=1e-5)


# --- how rows come ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """More rows than are looked at at a time, in float32, with errors that come late."""
    pair = GenerativePair(random_head(3, 4, seed=6, norm=3.0, dtype=torch.float32))
    h, y = pair.sample(((1 << 14) + 3000,), generator=seeded(2))
    y = torch.where(torch.arange(len(y)) > 17_000, (y + 1) % 3, y)
    return pair, h, y


def test_neither_order_nor_batches_matter(many):
    pair, h, y = many
    gate = Gate.fit(pair, h, y)
    g = gate(h, y)
    assert torch.allclose(torch.cat([gate(a, b) for a, b in zip(h.split(1000), y.split(1000), strict=True)]), g)
    order = torch.randperm(len(y), generator=seeded(4))
    again = Gate.fit(pair, h[order], y[order])
    assert float(again.trust) == pytest.approx(float(gate.trust), abs=1e-6)
    assert torch.allclose(again(h[order], y[order]), g[order], atol=1e-6)
    right = pair.head(h).argmax(-1) == y
    assert gate.summary.accuracy == pytest.approx(float(right.double().mean()))
    assert float(g[~right].max()) == 0


def test_activations_in_memory_and_on_disk_are_alike(many, tmp_path):
    pair, h, y = many
    acts = Activations(h, pair.head(h), y, class_names=["ant", "bee", "cat"])
    acts.save(tmp_path / "acts")
    stored = Activations.open(tmp_path / "acts")
    a, b, c = Gate.fit(pair, h, y), Gate.fit(pair, acts), Gate.fit(pair, stored)
    assert a.summary.rows == b.summary.rows == c.summary.rows == len(y)
    assert float(a.trust) == float(b.trust) == float(c.trust)
    assert torch.equal(a(h, y), b(acts))
    assert torch.equal(b(acts), c(stored))
    assert [each.name for each in c.summary.classes] == ["ant", "bee", "cat"]
    assert [each.name for each in a.summary.classes] == ["0", "1", "2"]
    named = Gate.fit(pair, stored, class_names=["x", "y", "z"]).summary
    assert [each.name for each in named.classes] == ["x", "y", "z"]
    other = (y + 1) % 3
    assert torch.equal(Gate.fit(pair, stored, other)(stored, other), Gate.fit(pair, h, other)(h, other))


def test_pre_activations_are_rectified(tmp_path):
    head = random_head(4, 9, seed=7, norm=3.0)
    u = torch.randn(300, 9, generator=seeded(9), dtype=torch.float64)
    h = u.clamp_min(0)
    y = head(h).argmax(-1)
    assert not torch.equal(head(u).argmax(-1), y)
    pair = GenerativePair(head)
    before = Activations(u, head(h), y, pre_activation=True)
    gate = Gate.fit(pair, before)
    assert gate.summary.accuracy == 1
    assert torch.equal(gate(before), Gate.fit(pair, h, y)(h, y))
    assert not torch.equal(Gate(pair)(u, y), Gate(pair)(h, y))


def test_pre_activations_of_a_certified_relu_are_rectified():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(50, 6)
    pair = GenerativePair(find_head(net, x))
    u = net[0](x).detach()
    y = net(x).argmax(-1)
    assert torch.equal(Gate(pair)(u, y), Gate(pair)(u.clamp_min(0), y))
    assert Gate.fit(pair, u, y).summary.accuracy == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    single = random_head(4, 8, seed=1, norm=2.0, dtype=torch.float32)
    head = Head(single.weight.to(dtype), single.bias.to(dtype))
    wide = Head(head.weight.float(), head.bias.float())
    h = torch.randn(200, 8, generator=seeded()).to(dtype)
    y = wide(h.float()).argmax(-1)
    pair, own = GenerativePair(head, Sphere(2.0)), GenerativePair(wide, Sphere(2.0))
    gate, exact = Gate.fit(pair, h, y), Gate.fit(own, h.float(), y)
    assert gate.summary.accuracy > 0.98  # but for ties of rounded logits
    same = pair.head(h).argmax(-1) == y
    assert torch.allclose(gate(h, y).float()[same], exact(h.float(), y)[same], atol=0.02)


# --- without labels -----------------------------------------------------------------------------------------


def test_without_labels_the_teacher_labels_the_images(pair, shown):
    h, _ = shown
    predicted = pair.head(h).argmax(-1)
    gate = Gate.fit(pair, h)
    typical = Gate(pair)(h, predicted)
    full = float((typical == 1).double().mean())
    assert 0.2 < full < 0.9
    assert float(gate.trust) == pytest.approx(min(1.0, full / 0.9), abs=1e-6)
    assert torch.allclose(gate(h), gate.trust * typical, atol=1e-6)
    summary = gate.summary
    assert (summary.labelled, summary.accuracy) == (False, None)
    assert all(each.accuracy is None for each in summary.classes)
    assert [each.rows for each in summary.classes] == predicted.bincount(minlength=5).tolist()
    assert summary.typical == pytest.approx(full)
    assert "labelled by the teacher itself: teacher accuracy unknown" in str(summary)
    unlabelled = Activations(h, pair.head(h))
    assert torch.equal(Gate.fit(pair, unlabelled)(unlabelled), gate(h))
    json.dumps(summary.to_dict(), allow_nan=False)


def test_without_labels_a_pairs_own_draws_are_trusted_in_full():
    pair = GenerativePair(random_head(6, 8, seed=5, bias=False, norm=6.0))
    h, _ = pair.sample((5000,), generator=seeded())
    assert float(Gate.fit(pair, h).trust) > 0.97
    assert float(Gate.fit(pair, torch.randn(5000, 8, generator=seeded(1), dtype=torch.float64)).trust) < 0.8


# --- what it says -------------------------------------------------------------------------------------------


def test_summary_is_that_of_a_direct_computation(pair, shown):
    h, y = shown
    y = torch.where(y == 3, 2, y)  # nothing of one class
    y[0] = 0
    names = ["ant", "bee", "cat", "dog", "elephant"]
    gate = Gate.fit(pair, h, y, class_names=names)
    g, right = gate(h, y), (pair.head(h).argmax(-1) == y).double()
    summary = gate.summary
    assert summary.rows == 400
    assert summary.labelled
    assert summary.accuracy == pytest.approx(float(right.mean()))
    assert summary.trust == pytest.approx(float(gate.trust), abs=1e-6)
    assert summary.belief == pytest.approx(float(g.mean()), abs=1e-6)
    own = gate.canonical
    assert summary.typical == pytest.approx(float((own.typicality(own.read(h), y) >= TAIL).double().mean()))
    assert [each.name for each in summary.classes] == ["ant", "bee", "cat", "elephant"]
    for each in summary.classes:
        mine = y == names.index(each.name)
        assert each.rows == int(mine.sum())
        assert each.accuracy == pytest.approx(float(right[mine].mean()))
        assert each.belief == pytest.approx(float(g[mine].mean()), abs=1e-6)
    table = str(summary).splitlines()
    assert len(table) == 2 + 4
    assert table[-1].split() == ["elephant", f"{each.rows}", f"{each.accuracy:.1%}", f"{each.belief:.1%}"]
    assert f"teacher accuracy {summary.accuracy:.1%}" in table[0]
    assert len({len(line) for line in table[2:]}) == 1
    facts = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert facts["classes"][0] == {
        "name": "ant",
        "rows": summary.classes[0].rows,
        "accuracy": summary.classes[0].accuracy,
        "belief": summary.classes[0].belief,
    }
    assert facts["trust"] == summary.trust
    assert "tail=0.1" in repr(gate)
    assert f"trust={float(gate.trust):.4g}" in repr(gate)


def test_the_global_random_state_is_left_alone(pair, shown):
    state = torch.random.get_rng_state()
    first, second = Gate.fit(pair, *shown), Gate.fit(pair, *shown)
    assert torch.equal(first(*shown), second(*shown))
    assert torch.equal(state, torch.random.get_rng_state())


# --- moves and copies ---------------------------------------------------------------------------------------


def test_copies_behave_alike(pair, shown):
    gate = Gate.fit(pair, *shown)
    g = gate(*shown)
    assert g.dtype == torch.float64
    for other in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert torch.equal(other(*shown), g)
        assert other.summary == gate.summary
    stream = io.BytesIO()
    torch.save(gate.state_dict(), stream)
    stream.seek(0)
    again = Gate(copy.deepcopy(pair))
    again.load_state_dict(torch.load(stream))
    assert torch.equal(again(*shown), g)
    assert again.summary is None  # it told of another fit
    assert not any(p.requires_grad for p in gate.parameters())


def test_a_state_dict_brings_the_pair_it_was_of(pair, shown):
    gate = Gate.fit(pair, *shown)
    again = Gate(GenerativePair(random_head(5, 12, seed=9, norm=2.0)))
    again.load_state_dict(gate.state_dict())
    assert torch.allclose(again(*shown), gate(*shown), atol=1e-6)


def test_moves_to_another_dtype(pair, shown):
    h, y = shown
    gate = Gate.fit(copy.deepcopy(pair), h, y)
    g = gate(h, y)
    single = copy.deepcopy(gate).to(torch.float32)
    assert single(h.float(), y).dtype == torch.float32
    assert torch.allclose(single(h.float(), y).double(), g, atol=1e-4)
    assert torch.allclose(single.to(torch.float64)(h, y), g, atol=1e-4)
    assert torch.allclose(gate(h.float(), y), g, atol=1e-4)  # activations go to the head's dtype


@pytest.mark.parametrize("base", ["ambient", "gaussian"])
def test_moves_keep_a_radius_that_was_drawn(pair, shown, base):
    """The radius is a mean over draws where norms differ; another dtype must not draw another one."""
    h, y = shown
    gate = Gate.fit(GenerativePair(copy.deepcopy(pair.head), bases(pair.head, h)[base]), h, y)
    g = gate(h, y)
    assert torch.allclose(gate.to(torch.float32)(h.float(), y).double(), g, atol=1e-3)


def test_a_gate_belongs_to_a_head(pair, shown):
    gate = Gate.fit(pair, *shown)
    assert gate.belongs_to(pair)
    assert gate.belongs_to(copy.deepcopy(pair))
    assert gate.belongs_to(GenerativePair(pair.head, Sphere(3.0)))  # another base of the same teacher
    assert not gate.belongs_to(GenerativePair(Head(pair.head.weight + 0.1, pair.head.bias)))
    assert not gate.belongs_to(GenerativePair(Head(pair.head.weight, pair.head.bias + torch.eye(5)[0].double())))
    assert not gate.belongs_to(GenerativePair(random_head(4, 12)))


# --- errors -------------------------------------------------------------------------------------------------


def test_errors(pair, shown):
    h, y = shown
    with pytest.raises(TypeError, match=r"pair is a Head; expected a penult.GenerativePair"):
        Gate(pair.head)
    for trust in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"trust is .*from 0 to 1"):
            Gate(pair, trust)
    for tail in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"tail is .*between 0 and 1"):
            Gate(pair, tail=tail)
        with pytest.raises(ValueError, match="tail is"):
            Gate.fit(pair, h, y, tail=tail)
    gate = Gate(pair)
    for call in (gate, lambda *args: Gate.fit(pair, *args)):
        with pytest.raises(ValueError, match=r"labels\[7\] is 5, .*expected 0 to 4"):
            call(h, torch.where(torch.arange(400) == 7, 5, y))
        with pytest.raises(ValueError, match=r"is -1, .*expected 0 to 4"):
            call(h, y - 1)
        with pytest.raises(TypeError, match=r"labels is a torch.float32 tensor; .* integer"):
            call(h, y.float())
        with pytest.raises(ValueError, match=r"labels has shape \(399,\)"):
            call(h, y[:-1])
        with pytest.raises(ValueError, match="1 of 400 rows of activations hold NaN"):
            call(torch.where(torch.arange(400)[:, None] == 3, math.nan, h), y)
        with pytest.raises(ValueError, match=r"activations has shape \(400, 11\); expected \(N, 12\)"):
            call(h[:, 1:], y)
        with pytest.raises(TypeError, match=r"activations is a list; expected a floating-point tensor"):
            call(h.tolist(), y)
        with pytest.raises(TypeError, match=r"activations is a torch.int64 tensor"):
            call(h.long(), y)
    with pytest.raises(ValueError, match="class_names has 2 names; expected 5"):
        Gate.fit(pair, h, y, class_names=["a", "b"])
    with pytest.raises(ValueError, match=r"all rows of .*equal"):
        Gate(GenerativePair(Head(torch.ones(3, 4)), Sphere(1.0)))


def test_labels_that_activations_bring_are_looked_at(pair, shown):
    """Those of another classifier's activations fit its own classes, not the head's."""
    h, _ = shown
    foreign = Activations(h, torch.zeros(len(h), 9), torch.full((len(h),), 7))
    for call in (Gate(pair), lambda acts: Gate.fit(pair, acts)):
        with pytest.raises(ValueError, match=r"labels\[0\] is 7, .*expected 0 to 4"):
            call(foreign)


def test_bessel_and_the_law_agree():
    """The grid that the density is held against has the mean cosine of the exact law, I_{d/2} / I_{d/2−1}."""
    for dim, kappa in ((2, 3.0), (9, 12.0)):
        t = np.linspace(-1, 1, 201)
        mean = 1 - np.trapezoid([law(dim, kappa, c) for c in t], t)
        assert mean == pytest.approx(ive(dim / 2, kappa) / ive(dim / 2 - 1, kappa), abs=1e-3)


def test_sharpness_raises_trust_to_a_power(pair, shown):
    gate, sharp = Gate.fit(pair, *shown), Gate.fit(pair, *shown, sharpness=4.0)
    assert float(gate.trust) == float(sharp.trust)
    assert 0.3 < float(gate.trust) < 0.95  # so that the power shows
    assert torch.allclose(sharp(*shown), gate(*shown) * gate.trust**3)
    assert sharp.summary.belief == pytest.approx(float(sharp(*shown).double().mean()), rel=1e-6)
    full = Gate.fit(pair, *shown, sharpness=0.0)
    assert torch.allclose(full(*shown), Gate(pair, trust=1.0)(*shown))
    with pytest.raises(ValueError, match="sharpness is -1"):
        Gate(pair, sharpness=-1.0)
