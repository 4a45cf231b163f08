import io
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penult
from distill_baselines import (
    BASELINES,
    DKD,
    CrossEntropy,
    FitNets,
    Hinton,
    LabelSmoothing,
    MatchedSmoothing,
    SimKD,
    SimplexHead,
    simplex,
    spread_evenly,
)
from distill_setting import SETTINGS, Domain, Student, accuracy, begin, shares, train
from penult.data import parquet, shift

N, B, D, K, WIDTH, T = 12, 6, 7, 5, 4, 4.0


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """A student whose features and logits are given, whatever the picture."""

    def __init__(self, logits=None, features=None):
        super().__init__()
        self.logits, self.given = logits, features

    def features(self, x):
        return self.given

    def head(self, h):
        return self.logits

    def forward(self, x):
        return self.logits


ROWS = torch.tensor([3, 0, 11, 7, 7, 5])
LABELS = torch.tensor([1, 4, 0, 2, 3, 1])
TOLD = 3 * drawn(0, N, K)  # the teacher's logits


def of(method, logits=None, features=None):
    return method.loss(Fixed(logits, features), torch.zeros(B, 1), LABELS, ROWS)


def a_head():
    return penult.Head(drawn(1, K, D), drawn(2, K))


def cross_entropy(z):
    return -(z.exp() / z.exp().sum(1, keepdim=True))[torch.arange(B), LABELS].log().mean()


def divergence(p, q):
    return (p * (p / q).log()).sum(1)


def test_labels_alone():
    z = drawn(3, B, K)
    torch.testing.assert_close(of(CrossEntropy(), z), cross_entropy(z))
    smooth = 0.9 * F.one_hot(LABELS, K) + 0.1 / K
    torch.testing.assert_close(of(LabelSmoothing(), z), -(smooth * z.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(of(LabelSmoothing(), z), nn.CrossEntropyLoss(label_smoothing=0.1)(z, LABELS))


@pytest.mark.parametrize("weight", [0.9, 0.5])
def test_hinton(weight):
    z = drawn(4, B, K).requires_grad_()
    loss = of(Hinton(TOLD, weight), z)
    told, own = (TOLD[ROWS] / T).softmax(1), (z / T).softmax(1)
    expected = (1 - weight) * cross_entropy(z) + weight * T**2 * divergence(told, own).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradient = weight * T * (own - told) + (1 - weight) * (z.softmax(1) - F.one_hot(LABELS, K))
    torch.testing.assert_close(z.grad, gradient.detach() / B)


def test_dkd_is_cross_entropy_where_logits_agree():
    torch.testing.assert_close(of(DKD(TOLD), TOLD[ROWS]), cross_entropy(TOLD[ROWS]))


def test_dkd_by_the_paper():
    z = drawn(5, B, K)
    own, told = (z / T).softmax(1), (TOLD[ROWS] / T).softmax(1)
    target = nontarget = 0.0
    for i, y in enumerate(LABELS.tolist()):
        p, q = told[i], own[i]
        target += p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        for j in set(range(K)) - {y}:
            share = p[j] / (1 - p[y])
            nontarget += share * (share / (q[j] / (1 - q[y]))).log()
    expected = cross_entropy(z) + T**2 * (target + 8 * nontarget) / B
    torch.testing.assert_close(of(DKD(TOLD), z), expected)


def test_dkd_splits_the_divergence():
    # KL = TCKD + (1 - p_y) NCKD, picture by picture
    z = drawn(6, B, K)
    told = (TOLD[ROWS] / T).softmax(1)
    whole = T**2 * divergence(told, (z / T).softmax(1))
    for i in range(B):
        beta = 1 - float(told[i, LABELS[i]])
        one = slice(i, i + 1)
        loss = DKD(TOLD, 1.0, beta).loss(Fixed(z[one]), torch.zeros(1, 1), LABELS[one], ROWS[one])
        torch.testing.assert_close(loss - F.cross_entropy(z[one], LABELS[one]), whole[i])


def test_fitnets():
    h, features, z, head = drawn(7, N, D), drawn(8, B, WIDTH), drawn(9, B, K), a_head()
    method = FitNets(h, head, WIDTH, weight=2.0)
    weight, bias = method.parameters()
    scale = (head.weight - head.weight.mean(0)).norm(dim=1).mean() * math.sqrt(3)
    difference = features @ weight.T + bias - scale * h[ROWS]
    radius = (scale * h).pow(2).sum(1).mean()
    expected = cross_entropy(z) + 2 * difference.pow(2).sum(1).mean() / radius
    torch.testing.assert_close(of(method, z, features), expected)
    student = Fixed(z, features)
    assert method.predict(student, torch.zeros(B, 1)) is z


def test_fitnets_does_not_depend_on_the_unit():
    h, features, z, head = drawn(7, N, D), drawn(8, B, WIDTH), drawn(9, B, K), a_head()
    losses = []
    for unit in (1.0, 10.0):
        torch.manual_seed(0)
        losses.append(of(FitNets(h * unit, penult.Head(head.weight / unit, head.bias), WIDTH), z, features))
    torch.testing.assert_close(*losses)


def test_simkd():
    h, features, head = drawn(10, N, D), drawn(11, B, WIDTH), a_head()
    method = SimKD(h, head, WIDTH)
    weight, bias = method.parameters()
    scale = head.rescaled()[1]
    expected = (features @ weight.T + bias - scale * h[ROWS]).pow(2).sum() / (B * D)
    torch.testing.assert_close(of(method, features=features), expected)


def test_simkd_predicts_as_the_teacher_where_the_projector_reproduces_its_activations():
    h, head = drawn(12, N, D), a_head()
    method = SimKD(h, head, D)
    with torch.no_grad():
        method.projector.weight.copy_(head.rescaled()[1] * torch.eye(D))
        method.projector.bias.zero_()
    torch.testing.assert_close(method.predict(Fixed(features=h), torch.zeros(N, 1)), head(h))
    assert float(of(method, features=h[ROWS]).detach()) < 1e-10


def test_simplex():
    rows = simplex(K, seed=0)
    assert rows.shape == (K, K - 1)
    torch.testing.assert_close(rows.norm(dim=1), torch.full((K,), 1 / math.sqrt(3)))
    cosines = 3 * rows @ rows.T
    torch.testing.assert_close(cosines, torch.full((K, K), -1 / (K - 1)).fill_diagonal_(1.0))
    assert torch.equal(rows, simplex(K, seed=0))
    assert float((rows - simplex(K, seed=1)).abs().max()) > 0.05


def test_simplex_orientations_are_uniform():
    # the mean of a corner over rotations is zero; without the signs of QR it is not
    mean = torch.stack([simplex(K, seed) for seed in range(1000)]).mean(0)
    assert float(mean.abs().max()) < 5 * (1 / math.sqrt(3 * (K - 1))) / math.sqrt(1000)


def test_simplex_head():
    features = drawn(13, B, WIDTH)
    method = SimplexHead(K, WIDTH, radius=3.0, seed=2)
    weight, bias = method.parameters()
    u, rows = features @ weight.T + bias, simplex(K, 2)
    anchors = 3.0 * math.sqrt(3) * rows[LABELS]
    expected = cross_entropy(u @ rows.T) + 5 * (u - anchors).pow(2).sum(1).mean() / 9
    torch.testing.assert_close(of(method, features=features), expected)
    torch.testing.assert_close(method.predict(Fixed(features=features), torch.zeros(B, 1)), u @ rows.T)


def test_matched_smoothing():
    targets = (2 * drawn(14, K, K) + 2 * torch.eye(K)).softmax(1)
    even = spread_evenly(targets)
    torch.testing.assert_close(even.sum(1), torch.ones(K))
    torch.testing.assert_close(even.diagonal(), targets.diagonal())
    for y in range(K):
        others = torch.cat([even[y, :y], even[y, y + 1 :]])
        torch.testing.assert_close(others, torch.full((K - 1,), float(1 - targets[y, y]) / (K - 1)))
    z = drawn(15, B, K)
    expected = 0.1 * cross_entropy(z) + 0.9 * T**2 * divergence(even[LABELS], (z / T).softmax(1)).mean()
    torch.testing.assert_close(of(MatchedSmoothing(targets), z), expected)


def test_targets_may_be_zero():
    assert math.isfinite(float(of(MatchedSmoothing(torch.eye(K)), drawn(16, B, K))))


# --- students -----------------------------------------------------------------------------------------------


def pictures(setting, count=40):
    channels = 1 if setting.name == "mnist" else 3
    images = torch.rand(count, channels, setting.size, setting.size, generator=torch.Generator().manual_seed(3))
    return images, torch.arange(count) % 10


@pytest.mark.parametrize("name", SETTINGS)
def test_students(name):
    images, _ = pictures(SETTINGS[name])
    student, _ = begin(SETTINGS[name], lambda width: CrossEntropy(), seed=0)
    h = student.features(images)
    assert h.shape == (40, student.head.in_features)
    assert float(h.detach().min()) == 0  # after a ReLU
    torch.testing.assert_close(student(images), student.head(h))


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_trains_from_the_same_weights(name):
    setting = SETTINGS["mnist"]
    images, labels = pictures(setting)
    h, logits, head = drawn(17, 40, D), drawn(18, 40, 10), penult.Head(drawn(19, 10, D))
    state = torch.random.get_rng_state()
    student, method = begin(setting, partial(BASELINES[name], h, logits, labels, head), seed=5)
    plain, _ = begin(setting, lambda width: CrossEntropy(), seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), plain.parameters(), strict=True))
    rows = torch.arange(40)
    before = method.loss(student, images, labels, rows).detach()
    extra = [parameter.clone() for parameter in method.parameters()]
    train(method, student, images, labels, seed=0, steps=30)
    assert bool(method.loss(student, images, labels, rows) < before)
    assert all(not torch.equal(a, b) for a, b in zip(extra, method.parameters(), strict=True))
    assert 0 <= accuracy(method, student, images, labels) <= 1


def test_order_is_a_function_of_the_seed_and_rows_are_those_of_the_pictures():
    class Spy:
        def __init__(self):
            self.seen = []

        def loss(self, student, x, y, rows):
            assert torch.equal(x, images[rows])
            assert torch.equal(y, labels[rows])
            self.seen.append(rows)
            return student(x).sum()

        def parameters(self):
            return []

    images, labels = drawn(20, 100, 3), torch.arange(100)
    orders = []
    for seed in (0, 0, 1):
        spy = Spy()
        train(spy, Student(nn.Linear(3, 4), 4, 2), images, labels, seed=seed, steps=25)
        orders.append(torch.cat(spy.seen))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].bincount(), torch.full((100,), 16))  # 25 batches of 64, each picture as often


# --- shares -------------------------------------------------------------------------------------------------


def write(path, count, seed):
    pa, image = pytest.importorskip("pyarrow"), pytest.importorskip("PIL.Image")
    table = []
    for number, picture in enumerate((drawn(seed, count, 8, 8) * 50 + 128).clamp(0, 255).byte()):
        image.fromarray(picture.numpy()).save(png := io.BytesIO(), "png")
        table.append({"image": {"bytes": png.getvalue()}, "label": number % 5})
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(table), path)


def test_shares(tmp_path):
    write(tmp_path / "mnist-train.parquet", 100, seed=0)
    setting, domain = replace(SETTINGS["mnist"], per_class=3, size=8, pool=40, test=7), Domain("dim", "noise", 0.2)
    split = shares(setting, domain, 0, tmp_path)  # there is no test file yet
    assert split.train.labels.bincount().tolist() == [3] * 5
    assert sorted([*split.train_rows.tolist(), *split.validation_rows.tolist()]) == list(range(40, 100))
    images, labels, _ = parquet(tmp_path / "mnist-train.parquet").load()
    noisy = shift(images, "noise", 0.2)
    for share, rows in ((split.train, split.train_rows), (split.validation, split.validation_rows)):
        assert torch.equal(share.images, noisy[rows])
        assert torch.equal(share.labels, labels[rows])
    assert not torch.equal(split.train_rows, shares(setting, domain, 1, tmp_path).train_rows)
    assert torch.equal(split.train_rows, shares(setting, Domain("none", "none"), 0, tmp_path).train_rows)
    with pytest.raises(FileNotFoundError):
        _ = split.test
    write(tmp_path / "mnist-test.parquet", 10, seed=1)
    assert split.test.images.shape == (7, 1, 8, 8)
