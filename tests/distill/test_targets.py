import copy
import math

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from heads import random_head
from penult import Activations, Gaussian, GenerativePair, Head, Marginal, Sphere
from penult.distill import Gate, TargetDataset, class_soft_targets, pseudo_labels, targets


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def centered(head):
    return head.weight.double() - head.weight.double().mean(0)


def unit_of(head):
    """c: the mean norm of the centered rows over 1/√3."""
    return float(centered(head).norm(dim=-1).mean()) * 3**0.5


def projection(head):
    u = head.span().double()
    return u.T @ u


def in_span(head, radius=1.5):
    return GenerativePair(head, Sphere(radius, subspace=head.span()))


def moved(head, c=1.0, seed=3):
    """The same classifier in another unit of h, and in another gauge."""
    vector = torch.randn(head.in_features, generator=seeded(seed), dtype=torch.float64)
    return Head((head.weight + vector) / c, head.bias + 4)


# --- class_soft_targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 10, 40])
def test_class_targets_are_expectations_of_the_pair(classes, temperature):
    head = random_head(classes, classes + 4, seed=classes, bias=True, norm=4.0)
    pair = in_span(head)
    e = class_soft_targets(pair, temperature)
    assert e.shape == (classes, classes)
    assert torch.allclose(e.sum(-1), torch.ones(classes).double(), atol=1e-12)
    h = pair.given(torch.arange(classes)).sample((4000,), generator=seeded(17))
    p = ((h @ head.weight.T + head.bias) / temperature).softmax(-1)
    error = p.std(0) * math.sqrt(1 / 1000 + 1 / 4000)
    z = (e - p.mean(0)) / error.clamp_min(1e-9)
    assert float(z.abs().max()) < (4 if classes < 40 else 5)  # of 1600 numbers, the largest is near 3.4
    assert float(z.square().mean()) < 2


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_in_one_dimension_the_law_has_two_points(temperature):
    head = Head(torch.tensor([[0.8, 0.0, 0.4], [-0.2, 0.6, 0.4]]).double(), torch.tensor([0.3, -0.1]).double())
    radius = 1.2
    pair = GenerativePair(head, Sphere(radius, subspace=head.span()))
    w = centered(head)
    ends = radius * torch.stack([w[0], w[1]]) / w[0].norm()  # ±r along the only direction
    p = (head(ends) / temperature).softmax(-1)
    kappa = radius * w[0].norm()
    near = torch.sigmoid(2 * kappa)
    assert 0.6 < float(near) < 0.95  # both of the points count
    exact = torch.stack([near * p[0] + (1 - near) * p[1], near * p[1] + (1 - near) * p[0]])
    draws = 40_000
    error = torch.sqrt(near * (1 - near) / draws) * (p[0] - p[1]).abs()
    assert bool(((class_soft_targets(pair, temperature, draws=draws) - exact).abs() < 4 * error).all())


def test_temperature_from_hardly_any_to_a_lot():
    pair = in_span(random_head(6, 8, seed=1, norm=3.0))
    e = class_soft_targets(pair, 1e6)
    assert torch.allclose(e, torch.full((6, 6), 1 / 6).double(), atol=1e-4)
    h = pair.given(torch.arange(6)).sample((20_000,), generator=seeded(3))
    shares = torch.nn.functional.one_hot(pair.head(h).argmax(-1), 6).double().mean(0)
    error = (shares * (1 - shares) * (1 / 1000 + 1 / 20_000)).sqrt()
    assert bool(((class_soft_targets(pair, 1e-6) - shares).abs() <= 4 * error + 1e-3).all())
    concentrated = in_span(random_head(6, 8, seed=1, bias=False, norm=3.0), 200.0)
    assert torch.allclose(class_soft_targets(concentrated, 1.0), torch.eye(6).double(), atol=1e-6)
    entropies = [float(torch.special.entr(class_soft_targets(pair, t)).sum(-1).mean()) for t in (0.5, 1, 2, 4, 8)]
    assert entropies == sorted(entropies)


def test_draws_are_reproducible_and_leave_the_global_state():
    pair = in_span(random_head(5, 7, norm=3.0))
    state = torch.random.get_rng_state()
    first = class_soft_targets(pair, seed=1)
    assert torch.equal(first, class_soft_targets(pair, seed=1))
    assert not torch.equal(first, class_soft_targets(pair, seed=2))
    assert torch.equal(targets(pair, torch.tensor([4, 0]), seed=1), first[[4, 0]])
    assert torch.equal(
        targets(pair, torch.tensor([4, 0]), seed=1, draws=50), class_soft_targets(pair, draws=50, seed=1)[[4, 0]]
    )
    for kind in ("soft", "activation"):
        targets(
            pair, torch.tensor([1, 2]), kind, activations=torch.randn(2, 7, generator=seeded(), dtype=torch.float64)
        )
    assert torch.equal(state, torch.random.get_rng_state())


def test_classes_are_drawn_in_parts_where_they_are_many(monkeypatch):
    pair = in_span(random_head(7, 9, norm=3.0))
    whole = class_soft_targets(pair, draws=4000)
    monkeypatch.setattr("penult.distill._targets._NUMBERS", 4000 * 9 * 3)  # three classes at a time
    parts = class_soft_targets(pair, draws=4000)
    assert not torch.equal(whole, parts)
    assert torch.allclose(whole, parts, atol=0.03)


@pytest.mark.parametrize("base", ["gaussian", "bank"])
def test_class_targets_of_other_bases(base):
    """p(h|y) of a Gaussian base is N(loc + Σ w_y, Σ); that of a bank weighs its own rows by softmax_y."""
    head = random_head(4, 6, seed=2, norm=2.0)
    w, t = centered(head), 3.0
    if base == "gaussian":
        root = torch.randn(6, 6, generator=seeded(4), dtype=torch.float64) / 3
        covariance = root @ root.T + 0.2 * torch.eye(6).double()
        pair = GenerativePair(head, Gaussian(torch.ones(6).double(), covariance))
        noise = torch.randn(20_000, 1, 6, generator=seeded(5), dtype=torch.float64)
        h = 1 + w @ covariance + noise @ torch.linalg.cholesky(covariance).T
        p = (head(h) / t).softmax(-1)
        want, deviation = p.mean(0), p.std(0)
    else:
        h = 1.5 * torch.randn(800, 6, generator=seeded(6), dtype=torch.float64)
        pair = GenerativePair(head, Marginal.fit(head, h, kind="bank"))
        weight, p = head(h).softmax(-1), (head(h) / t).softmax(-1)
        share = weight / weight.sum(0)  # (N, y)
        want = share.T @ p
        deviation = (share.T @ p.square() - want.square()).sqrt()
    z = (class_soft_targets(pair, t, draws=5000) - want) / (deviation * math.sqrt(1 / 5000 + 1 / 20_000))
    assert float(z.abs().max()) < 4


# --- targets from labels alone --------------------------------------------------------------------------------


def test_without_activations_targets_are_those_of_the_class(pair):
    y = torch.tensor([3, 0, 3, 4], dtype=torch.int32)
    assert torch.equal(targets(pair, y, temperature=2.0), class_soft_targets(pair, 2.0)[y.long()])
    t = targets(pair, y, "activation")
    w = centered(pair.head)
    radius = float(pair.base.radius[0]) * unit_of(pair.head)
    assert torch.allclose(t, radius * (w / w.norm(dim=-1, keepdim=True))[y.long()], rtol=1e-5)
    assert torch.allclose(t.norm(dim=-1), torch.full((4,), radius).double(), rtol=1e-5)
    assert torch.allclose(t @ projection(pair.head), t, atol=1e-9)
    assert targets(pair, torch.zeros(0, dtype=torch.long)).shape == (0, 5)
    assert targets(pair, torch.zeros(0, dtype=torch.long), "activation").shape == (0, 12)


@pytest.mark.parametrize("classes", [2, 3, 10, 40])
def test_the_radius_is_the_mean_norm_in_the_span(classes):
    head = random_head(classes, classes + 6, seed=classes, norm=2.0)
    covariance = torch.diag(torch.linspace(0.2, 1.5, classes + 6).double())
    pair = GenerativePair(head, Gaussian(torch.zeros(classes + 6).double(), covariance))
    drawn, _ = pair.sample((40_000,), generator=seeded(2))
    norms = (drawn @ projection(head)).norm(dim=-1)
    r = targets(pair, torch.arange(classes), "activation").norm(dim=-1) / unit_of(head)
    error = float(norms.std()) * math.sqrt(1 / 4096 + 1 / 40_000)
    assert torch.allclose(r, r[0].expand(classes), rtol=1e-6)
    assert float(r[0]) == pytest.approx(float(norms.mean()), abs=4 * error)


@pytest.mark.parametrize("c", [0.1, 7.0])
def test_neither_the_unit_nor_the_gauge_matters(pair, shown, c):
    h, y = shown
    other = GenerativePair(moved(pair.head, c))
    for more, theirs in (({}, {}), ({"activations": h}, {"activations": c * h})):
        for kind in ("soft", "activation"):
            a, b = targets(pair, y, kind, **more), targets(other, y, kind, **theirs)
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


# --- targets from activations ---------------------------------------------------------------------------------


def said(pair, h, temperature):
    return (pair.head(h) / temperature).softmax(-1), unit_of(pair.head) * h @ projection(pair.head)


def test_a_gate_mixes_what_the_teacher_says_and_the_class(pair, shown):
    h, y = shown
    g = Gate.fit(pair, h, y)(h, y)[:, None]
    assert 0 < float((g == 0).double().mean()) < 0.6
    soft, inside = said(pair, h, 2.5)
    q = targets(pair, y, activations=h, temperature=2.5)
    assert torch.allclose(q, g * soft + (1 - g) * class_soft_targets(pair, 2.5)[y], atol=1e-7)
    assert torch.allclose(q.sum(-1), torch.ones(len(y)).double(), atol=1e-9)
    t = targets(pair, y, "activation", activations=h)
    assert torch.allclose(t, g * inside + (1 - g) * targets(pair, y, "activation"), atol=1e-6)
    assert torch.allclose(t @ projection(pair.head), t, atol=1e-6)
    given = targets(pair, y, activations=h, temperature=2.5, gate=Gate.fit(pair, h, y))
    assert torch.equal(given, q)


def test_where_the_gate_is_open_the_teacher_speaks_and_where_it_is_shut_the_class(pair, shown):
    h, y = shown
    soft, inside = said(pair, h, 4.0)
    right = pair.head(h).argmax(-1) == y
    gate = Gate(pair, tail=1e-9)  # all cosines are typical
    full, shut = gate(h, y) == 1, ~right
    assert bool((full == right).all())
    q, t = targets(pair, y, activations=h, gate=gate), targets(pair, y, "activation", activations=h, gate=gate)
    assert torch.allclose(q[full], soft[full], rtol=1e-12, atol=0)
    assert torch.allclose(t[full], inside[full], rtol=1e-9, atol=1e-9)
    assert torch.equal(q[shut], targets(pair, y)[shut])
    assert torch.equal(t[shut], targets(pair, y, "activation")[shut])
    never = Gate(pair, trust=0.0)
    for kind in ("soft", "activation"):
        assert torch.equal(targets(pair, y, kind, activations=h, gate=never), targets(pair, y, kind))


def test_activations_in_memory_and_on_disk(tmp_path, monkeypatch, pair, shown):
    h, y = shown
    acts = Activations(h, pair.head(h), y)
    acts.save(tmp_path / "acts")
    stored = Activations.open(tmp_path / "acts")
    for kind in ("soft", "activation"):
        want = targets(pair, y, kind, activations=h)
        assert torch.equal(targets(pair, kind=kind, activations=acts), want)
        monkeypatch.setattr("penult.activations._source._ROWS", 70)  # several looks
        assert torch.allclose(targets(pair, kind=kind, activations=stored), want, atol=1e-9)
        other = (y + 1) % 5
        assert torch.allclose(
            targets(pair, other, kind, activations=stored), targets(pair, other, kind, activations=h), atol=1e-9
        )
        monkeypatch.undo()
    assert torch.equal(pseudo_labels(pair, stored), pseudo_labels(pair, h))


def test_pre_activations_are_rectified():
    head = random_head(4, 9, seed=7, norm=3.0)
    u = torch.randn(60, 9, generator=seeded(9), dtype=torch.float64)
    h = u.clamp_min(0)
    pair, y = GenerativePair(head), head(h).argmax(-1)
    before = Activations(u, head(h), y, pre_activation=True)
    for kind in ("soft", "activation"):
        assert torch.equal(targets(pair, kind=kind, activations=before), targets(pair, y, kind, activations=h))
    assert torch.equal(pseudo_labels(pair, before), y)
    assert not torch.equal(pseudo_labels(pair, u), y)


def test_pseudo_labels_stand_in_for_labels(pair, shown):
    h, _ = shown
    y = pseudo_labels(pair, h)
    assert torch.equal(y, (h @ pair.head.weight.T + pair.head.bias).argmax(-1))
    blind = Gate.fit(pair, h)
    q = targets(pair, y, activations=h, gate=blind)
    g = blind(h)[:, None]
    assert torch.allclose(q, g * said(pair, h, 4.0)[0] + (1 - g) * class_soft_targets(pair)[y], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    single = random_head(4, 8, seed=1, norm=2.0, dtype=torch.float32)
    head = Head(single.weight.to(dtype), single.bias.to(dtype))
    wide = Head(head.weight.float(), head.bias.float())
    pair, own = GenerativePair(head, Sphere(2.0)), GenerativePair(wide, Sphere(2.0))
    h = torch.randn(200, 8, generator=seeded()).to(dtype)
    y = pseudo_labels(pair, h)
    q, t = targets(pair, y, activations=h), targets(pair, y, "activation", activations=h)
    assert q.dtype == t.dtype == torch.float32
    assert torch.allclose(q.sum(-1), torch.ones(200), atol=1e-6)
    assert torch.allclose(q, targets(own, y, activations=h.float()), atol=0.03)
    exact = targets(own, y, "activation", activations=h.float())
    assert float((t - exact).norm(dim=-1).max()) < 0.05 * float(exact.norm(dim=-1).max())


def test_double_activations_on_a_single_head(shown, pair):
    h, y = shown
    single = copy.deepcopy(pair).float()
    for kind in ("soft", "activation"):
        t = targets(single, y, kind, activations=h)
        assert t.dtype == torch.float32
        # draws in another dtype are other draws
        assert torch.allclose(t.double(), targets(pair, y, kind, activations=h), atol=0.05)


# --- errors ---------------------------------------------------------------------------------------------------


def test_errors(pair, shown):
    h, y = shown
    with pytest.raises(TypeError, match=r"pair is a Head; expected a penult.GenerativePair"):
        targets(pair.head, y)
    with pytest.raises(TypeError, match=r"pair is a str; expected a penult.GenerativePair"):
        class_soft_targets("resnet.penult.safetensors")
    with pytest.raises(ValueError, match="kind is 'hard'; expected 'soft' or 'activation' or 'hinted'"):
        targets(pair, y, "hard")
    with pytest.raises(ValueError, match=r"labels is None; .*pseudo_labels"):
        targets(pair)
    with pytest.raises(ValueError, match=r"labels is None; .*pseudo_labels"):
        targets(pair, activations=Activations(h, pair.head(h)))
    with pytest.raises(ValueError, match="labels is None"):
        targets(pair, activations=h)
    with pytest.raises(ValueError, match=r"labels\[1\] is 5, .*expected 0 to 4"):
        targets(pair, torch.tensor([0, 5]))
    with pytest.raises(TypeError, match=r"labels is a torch.float32 tensor"):
        targets(pair, torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match="labels is a list"):
        targets(pair, ["0", "1"])
    with pytest.raises(ValueError, match=r"labels has shape \(2, 1\)"):
        targets(pair, torch.tensor([[0], [1]]))
    for kind in ("soft", "activation"):
        with pytest.raises(ValueError, match=r"labels has shape \(399,\).*\(400"):
            targets(pair, y[1:], kind, activations=h)
        with pytest.raises(ValueError, match=r"a gate weighs .*activations is None"):
            targets(pair, y, kind, gate=Gate(pair))
        with pytest.raises(ValueError, match=r"gate was fitted on another head .*fit it"):
            targets(pair, y, kind, activations=h, gate=Gate(GenerativePair(random_head(5, 12, seed=9))))
        with pytest.raises(ValueError, match=r"(?s)another head .*in_features=11"):
            targets(pair, y, kind, activations=h, gate=Gate(GenerativePair(random_head(5, 11, seed=9))))
        with pytest.raises(ValueError, match="400 of 400 rows of activations hold NaN or infinity"):
            targets(pair, y, kind, activations=h / 0)
        with pytest.raises(ValueError, match=r"expected \(N, 12\)"):
            targets(pair, y, kind, activations=h[:, :5])
        with pytest.raises(TypeError, match=r"activations is a list; expected a floating-point tensor"):
            targets(pair, y, kind, activations=h.tolist())
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"temperature is .*positive, finite"):
            targets(pair, y, temperature=temperature)
    with pytest.raises(ValueError, match="draws is 0"):
        class_soft_targets(pair, draws=0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        pseudo_labels(pair, h * math.nan)


def test_errors_of_what_is_no_pair_and_no_activations(pair, shown):
    with pytest.raises(TypeError, match=r"pair is a Head; expected a penult.GenerativePair"):
        pseudo_labels(pair.head, shown[0])
    with pytest.raises(TypeError, match="activations is a int; expected a floating-point tensor"):
        targets(pair, shown[1], activations=5)


# --- TargetDataset --------------------------------------------------------------------------------------------


class Numbered:
    """Images that are all of their own number, flipped at random, and labels number mod 3."""

    def __init__(self, count, labelled=True):
        self.count, self.labelled = count, labelled

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.full((1, 2, 2), float(index)) * (1 if torch.rand(()) < 0.5 else -1)
        return (image, index % 3) if self.labelled else image


def rows(count):
    return torch.arange(count * 4, dtype=torch.float32).reshape(count, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_arrives_with_its_own_target(workers):
    data = TargetDataset(Numbered(50), rows(50))
    # threads of the test process are none of the workers' business: they are started afresh
    loader = DataLoader(data, 8, shuffle=True, num_workers=workers, generator=seeded(1))
    epochs = []
    for _ in range(2):
        images, labels, given = (torch.cat(parts) for parts in zip(*loader, strict=True))
        numbers = images[:, 0, 0, 0].abs().long()
        assert sorted(numbers.tolist()) == list(range(50))
        assert torch.equal(given, rows(50)[numbers])
        assert torch.equal(labels, numbers % 3)
        epochs.append(images[numbers.argsort(), 0, 0, 0])
    assert not torch.equal(*epochs)  # augmented anew, and still with the same target


def test_index():
    data = TargetDataset(Numbered(5), rows(5))
    assert len(data) == 5
    assert torch.equal(data[-1][2], rows(5)[4])
    assert abs(float(data[-1][0].flatten()[0])) == 4
    assert torch.equal(data[torch.tensor(2)][2], rows(5)[2])
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"index is {index}; expected -5 to 4"):
            data[index]
    assert [int(label) for _, label, _ in (data[i] for i in range(5))] == [0, 1, 2, 0, 1]
    assert "targets=(5, 4)" in repr(data)


def test_labels_in_place_of_those_of_the_data_set():
    labels = torch.tensor([2, 2, 0, 1])
    for labelled in (True, False):
        data = TargetDataset(Numbered(4, labelled), rows(4), labels)
        assert [data[i][1] for i in range(4)] == [2, 2, 0, 1]
        assert data[1][0].shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"item 0 .*without a label.*pseudo_labels"):
        TargetDataset(Numbered(4, labelled=False), rows(4))[0]


def test_items_may_hold_more():
    data = TargetDataset([(torch.zeros(1), 1, "file.png")], rows(1))
    _, label, target = data[0]
    assert label == 1
    assert torch.equal(target, rows(1)[0])


def test_targets_need_no_graph():
    given = rows(3).requires_grad_()
    assert not TargetDataset(Numbered(3), given)[0][2].requires_grad


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1), 0


class Counted(Stream):
    def __len__(self):
        return 1


def test_dataset_errors():
    with pytest.raises(TypeError, match="dataset is a Stream; expected a map-style data set"):
        TargetDataset(Stream(), rows(1))
    with pytest.raises(ValueError, match=r"targets has shape \(4, 4\); expected one row for each of 5 images"):
        TargetDataset(Numbered(5), rows(4))
    with pytest.raises(ValueError, match=r"targets has shape \(5,\)"):
        TargetDataset(Numbered(5), rows(5)[:, 0])
    with pytest.raises(ValueError, match="1 of 5 targets hold NaN"):
        TargetDataset(Numbered(5), torch.where(rows(5) == 6, math.nan, rows(5)))
    with pytest.raises(TypeError, match=r"targets is a torch.int64 tensor"):
        TargetDataset(Numbered(5), rows(5).long())
    with pytest.raises(TypeError, match="targets is a list"):
        TargetDataset(Numbered(5), rows(5).tolist())
    with pytest.raises(ValueError, match=r"labels has shape \(4,\); expected \(5,\)"):
        TargetDataset(Numbered(5), rows(5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(TypeError, match=r"labels is a torch.float32 tensor"):
        TargetDataset(Numbered(5), rows(5), torch.zeros(5))


def test_dataset_errors_of_counted_streams_and_lists():
    with pytest.raises(TypeError, match="dataset is a Counted; expected a map-style data set"):
        TargetDataset(Counted(), rows(1))
    with pytest.raises(TypeError, match="labels"):
        TargetDataset(Numbered(3), rows(3), ["a", "b", "c"])
    with pytest.raises(ValueError, match="labels"):
        TargetDataset(Numbered(3), rows(3), [0, 1])
    assert TargetDataset(Numbered(3), rows(3), [0, 1, 2])[1][1] == 1


# --- hints ----------------------------------------------------------------------------------------------------


def test_hinted_targets_are_activation_targets_and_the_activations_behind_them(pair, shown):
    h, y = shown
    gate = Gate.fit(pair, h, y, sharpness=4.0)
    made = targets(pair, y, "hinted", activations=h)
    assert made.shape == (len(h), 24)
    assert torch.equal(made[:, :12], targets(pair, y, "activation", activations=h, gate=gate))
    hint = made[:, 12:].double()
    around = h.double() - h.double().mean(0)
    r = float(pair.base.radius[0]) * unit_of(pair.head)
    norm = float(h.double().square().sum(-1).mean().sqrt())
    assert torch.allclose(hint, r / norm * around, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="all zero"):
        targets(pair, y, "hinted", activations=torch.zeros_like(h))
    with pytest.raises(ValueError, match="hints are the teacher's activations"):
        targets(pair, y, "hinted")
