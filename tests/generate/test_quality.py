import dataclasses
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from penult import Tap, find_head
from penult.data import digits
from penult.demo.networks import DigitsNet
from penult.generate import Judge, Quality, quality
from penult.generate._image_metrics import Balls, frechet_distance, nearer, nearest, overlap
from penult.generate._images import shuffled

scipy_linalg = pytest.importorskip("scipy.linalg")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def rows_of(mean, covariance, n=50, seed=0):
    """Rows with exactly that mean and unbiased covariance, whatever its rank."""
    d = len(mean)
    white = normal(n, d, seed)
    white = torch.linalg.qr(white - white.mean(0)).Q * (n - 1) ** 0.5
    values, vectors = torch.linalg.eigh(covariance)
    return mean + white @ (vectors * values.where(values > 1e-12 * values.max(), 0).sqrt()).T


def covariance(d, seed, rank=None):
    a = normal(d, rank or d, seed)
    return a @ a.T / d


def by_scipy(m1, s1, m2, s2):
    root = scipy_linalg.sqrtm((s1 @ s2).numpy())
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * root.real.trace()


# The Fréchet distance.


def test_frechet_of_diagonal_covariances():
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    v1, v2 = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 9.0]).double()
    got = frechet_distance(rows_of(m1, v1.diag()), rows_of(m2, v2.diag(), n=30, seed=1))
    assert got == pytest.approx(1 + 4 + 1 + 1, rel=1e-12)  # Σ (m1 - m2)² + Σ (s1 - s2)²


def test_frechet_of_commuting_covariances():
    rotation = torch.linalg.qr(normal(5, 5)).Q
    v1, v2 = torch.arange(1.0, 6).double(), torch.tensor([3.0, 0.1, 2.0, 7.0, 1.0]).double()
    zero = torch.zeros(5).double()
    s1, s2 = (rotation @ v.diag() @ rotation.T for v in (v1, v2))
    got = frechet_distance(rows_of(zero, s1), rows_of(zero, s2, seed=1))
    assert got == pytest.approx(float((v1.sqrt() - v2.sqrt()).square().sum()), rel=1e-12)


def test_frechet_of_two_by_two_covariances_that_do_not_commute():
    # For 2×2, tr (AB)^½ = √(tr AB + 2 √det AB).
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[1.0, -0.5], [-0.5, 4.0]]).double()
    assert not torch.allclose(a @ b, b @ a)
    shared = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.det(a @ b))))
    zero = torch.zeros(2).double()
    got = frechet_distance(rows_of(zero, a), rows_of(zero, b, seed=1))
    assert got == pytest.approx(2 + 3 + 1 + 4 - 2 * shared, rel=1e-12)


@pytest.mark.parametrize("d", [2, 7, 20])
def test_frechet_agrees_with_scipy(d):
    m1, m2, s1, s2 = normal(1, d, 1)[0], normal(1, d, 2)[0], covariance(d, 3), covariance(d, 4)
    got = frechet_distance(rows_of(m1, s1), rows_of(m2, s2, seed=1))
    assert got == pytest.approx(by_scipy(m1, s1, m2, s2), rel=1e-6)


def test_frechet_of_translations_scales_and_order():
    x, y = normal(60, 4, 1), normal(40, 4, 2) * 2 + 1
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x + 3) == pytest.approx(36, rel=1e-12)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)
    assert frechet_distance(x + 5, y + 5) == pytest.approx(frechet_distance(x, y), rel=1e-10)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * frechet_distance(x, y), rel=1e-12)
    rotation = torch.linalg.qr(normal(4, 4)).Q
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(frechet_distance(x, y), rel=1e-12)
    # A scale alone: (c - 1)² tr Σ.
    centred = x - x.mean(0)
    assert frechet_distance(centred, 4 * centred) == pytest.approx(9 * float(x.T.cov().trace()), rel=1e-12)


def test_frechet_of_singular_covariances():
    zero = torch.zeros(6).double()
    s1, s2 = covariance(6, 1, rank=2), covariance(6, 2, rank=3)
    x, y = rows_of(zero, s1), rows_of(zero, s2, seed=1)
    # By the eigenvalues of Σ1 Σ2, of which four are zero.
    values = torch.linalg.eigvals(s1 @ s2).real.sort(descending=True).values[:2]
    assert frechet_distance(x, y) == pytest.approx(float(s1.trace() + s2.trace() - 2 * values.sqrt().sum()), rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    point = torch.ones(3, 6).double()
    assert frechet_distance(point, x) == pytest.approx(6 + float(s1.trace()), rel=1e-12)
    assert frechet_distance(point, point) == 0
    a, b = normal(3, 40, 1), normal(2, 40, 2)  # fewer rows than dimensions
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, b) > 0


@pytest.mark.parametrize("seed", range(20))
def test_frechet_is_never_negative(seed):
    x = normal(4 + seed, 10, seed) * 10.0 ** (seed - 10)
    moved = x[torch.randperm(len(x), generator=generator(seed))]
    assert 0 <= frechet_distance(x, moved) <= 1e-12 * float(x.square().sum())


def test_frechet_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Features(nn.Module):
        num_features = 6

        def forward(self, x):
            return x.flatten(1)[:, :6]

    x, y = torch.rand(50, 3, 2, 2, generator=generator(1)), torch.rand(40, 3, 2, 2, generator=generator(2)) ** 2
    metric = fid.FrechetInceptionDistance(feature=Features(), normalize=True).set_dtype(torch.float64)
    metric.update(x.double(), real=True)
    metric.update(y.double(), real=False)
    mine = frechet_distance(x.flatten(1)[:, :6], y.flatten(1)[:, :6])
    assert mine > 0.05
    assert float(metric.compute()) == pytest.approx(mine, rel=1e-5)


def test_frechet_refuses():
    for x, y in ((normal(1, 3), normal(5, 3)), (normal(5, 3), normal(5, 4)), (normal(5, 3)[0], normal(5, 3))):
        with pytest.raises(ValueError, match=r"expected \(N, d\), \(M, d\)"):
            frechet_distance(x, y)


# Nearest neighbours.


def line(*values):
    return torch.tensor(values)[:, None]


def test_overlap_by_hand():
    # Radii with k = 2: real 0, 1, 3, 7 -> 3, 2, 3, 6; made 2, 3.5, 20 -> 18, 16.5, 18.
    real, made = Balls.of(line(0.0, 1.0, 3.0, 7.0), 2), Balls.of(line(2.0, 3.5, 20.0), 2)
    assert real.radii.tolist() == [3, 2, 3, 6]
    assert made.radii.tolist() == [18, 16.5, 18]
    # 2 is in the balls of 0, 1, 3 and 7; 3.5 in those of 3 and 7; 20 in none.
    found = overlap(real, made)
    assert found.precision == pytest.approx(2 / 3)
    assert found.density == pytest.approx((4 + 2 + 0) / (2 * 3))
    assert found.coverage == 1
    assert found.recall == 1
    back = overlap(made, real)
    assert back.precision == 1
    assert back.recall == pytest.approx(2 / 3)
    assert back.coverage == 1  # 7 lies in the ball of 20, which reaches to 2
    assert back.density == pytest.approx((4 + 4 + 2) / (2 * 4))


def test_overlap_is_that_of_the_definition_in_many_blocks():
    x, y, k = normal(700, 3, 1), normal(600, 3, 2) + 0.7, 4
    y[500:] *= 2  # so that the last block has other radii than the first
    real, made = Balls.of(x, k), Balls.of(y, k)

    def radii(z):
        return (z[:, None] - z).square().sum(-1).sqrt().sort(1).values[:, k]  # the nearest is the row itself

    assert torch.allclose(real.radii, radii(x), rtol=1e-12)
    distance = (y[:, None] - x).square().sum(-1).sqrt()
    inside = distance <= radii(x)
    found = overlap(real, made)
    assert found.precision == pytest.approx(float(inside.any(1).double().mean()), abs=1e-12)
    assert found.recall == pytest.approx(float((distance <= radii(y)[:, None]).any(0).double().mean()), abs=1e-12)
    assert found.density == pytest.approx(float(inside.sum()) / (k * len(y)), abs=1e-12)
    assert found.coverage == pytest.approx(float(inside.any(0).double().mean()), abs=1e-12)
    assert 0.2 < found.precision < 0.995
    assert 0.2 < found.recall < 0.995


def test_overlap_of_one_law_is_what_naeem_et_al_say():
    n, k = 300, 3
    found = [overlap(Balls.of(normal(n, 5, 2 * i), k), Balls.of(normal(n, 5, 2 * i + 1), k)) for i in range(12)]
    coverage = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert coverage == pytest.approx(1 - 2**-k, abs=0.01)
    assert sum(f.coverage for f in found) / 12 == pytest.approx(coverage, abs=0.015)
    assert sum(f.density for f in found) / 12 == pytest.approx(1, abs=0.04)


def test_overlap_of_collapsed_sampler():
    x = normal(400, 4)
    point = (x[:1] * 0.01).expand(300, 4)
    found = overlap(Balls.of(x, 5), Balls.of(point, 5))
    assert found.precision == 1
    assert found.recall == 0
    assert found.coverage < 0.1


def test_overlap_of_disjoint_and_of_equal_rows():
    x = normal(100, 4)
    assert tuple(overlap(Balls.of(x, 5), Balls.of(x + 50, 5))) == (0, 0, 0, 0)
    same = overlap(Balls.of(x, 5), Balls.of(x, 5))
    assert same == (1, 1, 6 / 5, 1)  # each ball holds its own row and k others, the last on its border


def test_overlap_of_sampler_that_drops_a_mode():
    shift = torch.tensor([20.0, 0, 0]).double()
    x = torch.cat([normal(200, 3, 1), normal(200, 3, 2) + shift])
    found = overlap(Balls.of(x, 5), Balls.of(normal(400, 3, 3), 5))
    assert found.precision > 0.9
    assert found.recall < 0.51
    assert 0.4 < found.coverage <= 0.5


@pytest.mark.slow
def test_nearest_is_exact_and_passes_over_its_own():
    pool, rows = normal(5000, 6, 1) + 1000, normal(700, 6, 2) + 1000
    truth = (rows[:, None] - pool).square().sum(-1).sqrt().min(1).values
    assert torch.allclose(nearest(rows, pool), truth, rtol=1e-9)
    own = torch.randperm(5000, generator=generator())[:700]
    assert (nearest(pool[own], pool) == 0).all()  # not a rounding error, also far from the origin
    other = (pool[own][:, None] - pool).square().sum(-1).sqrt().sort(1).values[:, 1]
    assert torch.allclose(nearest(pool[own], pool, own), other, rtol=1e-9)


def test_nearer_counts_pairs():
    made, real = torch.rand(50, generator=generator(1)).round(decimals=1), torch.rand(300, generator=generator(2))
    real = real.round(decimals=1)
    pairs = (made[:, None] < real).double() + (made[:, None] == real).double() / 2
    share = (real > made[:, None]).double().mean(1)
    assert nearer(made, real) == pytest.approx((float(pairs.mean()), float((share >= 0.99).double().mean())))
    hundred = torch.arange(100.0)
    assert nearer(torch.tensor([0.5, 1.5]), hundred)[1] == 0.5  # 0.5 has 99 above it, 1.5 has 98
    assert nearer(hundred, hundred) == (0.5, 0.01)


# Judges of images whose pixels are their features.


def flat(k=3, d=8):
    """Features are pixels, and the class is the brightest of the first k."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, k, bias=False))
    model[1].weight.data = torch.eye(k, d)
    return model


def blobs(n, seed, k=3, d=8):
    labels = torch.arange(n) % k
    noise = 0.03 * torch.randn(n, 1, 1, d, generator=generator(seed))
    images = 0.3 + 0.4 * torch.eye(k, d)[labels][:, None, None] + noise
    return images.clamp(0, 1), labels


@pytest.fixture(scope="module")
def judge():
    return Judge(flat(), blobs(300, 1), blobs(600, 2), cas=False)


def test_quality_is_made_of_its_parts(judge):
    images, labels = blobs(300, 3)
    images = images + 0.02 * torch.rand(images.shape, generator=generator(4))
    real, real_labels = blobs(300, 1)
    x, y = images.flatten(1), real.flatten(1)
    found = judge(images, labels)
    assert found.frechet == pytest.approx(frechet_distance(x, y), rel=1e-9)
    by_class = [frechet_distance(x[labels == c], y[real_labels == c]) for c in range(3)]
    assert found.class_frechet == pytest.approx(sum(by_class) / 3, rel=1e-9)
    shared = overlap(Balls.of(y, 5), Balls.of(x, 5))
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(tuple(shared))
    train = blobs(600, 2)[0].flatten(1)
    assert (found.nearness, found.copies) == pytest.approx(nearer(nearest(x, train), nearest(y, train)))
    assert found.accuracy == 1
    assert (found.count, found.cas, found.reference) == (300, None, None)


def test_fresh_real_images_are_no_copies():
    found = []
    for i in range(12):
        judge = Judge(flat(), blobs(300, 100 + 3 * i), blobs(600, 101 + 3 * i), cas=False)
        fresh = judge(*blobs(300, 102 + 3 * i))
        found.append([fresh.nearness, fresh.copies, judge.reference.nearness, judge.reference.copies])
    # Of one judge, nearness has a standard deviation of 0.02 and copies of 0.01. (3 + 1) / (300 + 1) is expected.
    mean = torch.tensor(found).mean(0).tolist()
    assert mean[::2] == pytest.approx([0.5, 0.5], abs=0.02)
    assert mean[1::2] == pytest.approx([4 / 301, 4 / 301], abs=0.01)


def test_copies_are_found(judge):
    images, labels = (x[:300] for x in blobs(600, 2))
    found = judge(images, labels)
    assert (found.nearness, found.copies) == (1, 1)
    slight = judge((images + 1e-4 * torch.rand(images.shape, generator=generator())).clamp(0, 1), labels)
    assert (slight.nearness, slight.copies) == (1, 1)
    assert found.precision > 0.9  # which alone would have praised them
    fresh = blobs(150, 5)
    mixed, alone = judge(torch.cat([images[:150], fresh[0]]), labels), judge(*fresh)
    assert alone.copies < 0.05
    assert mixed.copies == pytest.approx((1 + alone.copies) / 2)
    assert mixed.nearness == pytest.approx((1 + alone.nearness) / 2)


def test_far_images_are_no_copies(judge):
    images, labels = blobs(300, 5)
    far = judge(images + 0.2, labels)
    assert (far.nearness, far.copies) == (0, 0)


def test_labels_count(judge):
    images, labels = blobs(300, 5)
    moved = judge(images, (labels + 1) % 3)
    right = judge(images, labels)
    assert (right.accuracy, moved.accuracy) == (1, 0)
    assert moved.frechet == pytest.approx(right.frechet, rel=1e-9)  # which does not see them
    assert moved.class_frechet > 0.3 > 0.01 > right.class_frechet
    half = torch.where(torch.arange(300) < 150, labels, (labels + 1) % 3)
    assert judge(images, half).accuracy == 0.5


def test_collapsed_sampler(judge):
    labels = torch.arange(300) % 3
    images = (0.3 + 0.4 * torch.eye(3, 8))[labels][:, None, None]
    found = judge(images, labels)
    assert found.precision == 1
    assert found.recall == 0
    assert found.coverage < 0.3
    assert found.class_frechet > 2 * judge.reference.class_frechet


def test_reference_samples_training_images_or_halves_real_ones():
    real, train = blobs(90, 1), blobs(300, 2)
    sampled = Judge(flat(), real, train, cas=False)
    assert sampled.reference.count == 90
    assert sampled.reference is sampled.reference
    train_images = {tuple(x) for x in train[0].flatten(1).tolist()}
    assert len(train_images) == 300
    halved = Judge(flat(), real, train[0], cas=False)
    assert halved.reference.count == 45
    assert halved.reference.nearness == pytest.approx(0.5, abs=0.15)
    unknown = Judge(flat(), real, cas=False)
    assert unknown.reference.count == 45
    assert unknown.reference.nearness is None
    assert unknown.reference.copies is None
    assert unknown.reference.frechet == halved.reference.frechet
    assert unknown.reference.frechet > 1e-4  # the halves are not the same
    assert unknown.reference.recall < 1
    # Not more than there are, and images of another law show in it.
    few = Judge(flat(), real, (train[0][:60] * 0.9, train[1][:60]), cas=False)
    assert few.reference.count == 60
    assert few.reference.frechet > 3 * sampled.reference.frechet


def test_reference_of_training_images_leaves_each_out():
    train = blobs(300, 2)
    twice = torch.cat([train[0], train[0]]), torch.cat([train[1], train[1]])
    assert Judge(flat(), blobs(300, 1), twice, cas=False).reference.copies == 1  # each has a copy left
    assert Judge(flat(), blobs(300, 1), train, cas=False).reference.copies < 0.05


def test_quality_comes_with_a_reference_of_as_many():
    images, labels = blobs(60, 3)
    found = quality(images, labels, flat(), blobs(300, 1), train=blobs(600, 2), cas=False)
    assert found.reference.count == 60
    assert found.reference.reference is None
    assert dataclasses.replace(found, reference=None) == Judge(flat(), blobs(300, 1), blobs(600, 2), cas=False)(
        images, labels
    )
    assert found.coverage == pytest.approx(found.reference.coverage, abs=0.15)
    assert quality(images, labels, flat(), blobs(80, 1), cas=False).reference.count == 40


def test_data_sets_are_read_like_tensors(judge):
    images, labels = blobs(300, 3)
    expected = judge(images, labels)
    sets = TensorDataset(*blobs(300, 1)), TensorDataset(blobs(600, 2)[0])
    sets = sets[0], [item[0] for item in sets[1]]
    other = Judge(flat(), *sets, cas=False)
    assert other(images, labels) == expected
    listed = Judge(flat(), [(x, int(y)) for x, y in zip(*blobs(300, 1), strict=True)], list(blobs(600, 2)), cas=False)
    assert listed(images, labels) == expected
    assert listed.reference == judge.reference


def test_a_compiled_tap_and_double_images_are_taken(judge):
    images, labels = blobs(300, 3)
    model = flat()
    tap = torch.compile(Tap(model, find_head(model, images[:8])), backend="eager")
    real, train = blobs(300, 1), blobs(600, 2)
    other = Judge(tap, (real[0].double(), real[1].int()), train, cas=False)
    assert other(images.double(), labels.int()) == judge(images, labels)


def test_order_and_batches_make_no_difference():
    real, train, (images, labels) = blobs(300, 1), blobs(300, 2), blobs(240, 3)
    options = {"most": 100, "classifier": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3))}
    order, other = (torch.randperm(n, generator=generator(n)) for n in (240, 300))
    expected = Judge(flat(), real, train, **options)
    shuffled = Judge(
        flat(), (real[0][other], real[1][other]), (train[0][other], train[1][other]), batch_size=7, **options
    )
    pairs = [(expected(images, labels), shuffled(images[order], labels[order]))]
    pairs += [(expected.reference, shuffled.reference)]
    for one, two in (map(dataclasses.asdict, pair) for pair in pairs):
        assert one.pop("reference") is two.pop("reference") is None
        assert one == pytest.approx(two, rel=1e-9, abs=1e-12)


def test_random_orders_depend_on_images_and_labels_alone():
    images, labels = torch.rand(6, 1, 2, 2, generator=generator()).repeat(2, 1, 1, 1), torch.arange(12) // 6
    order = torch.randperm(12, generator=generator(1))
    one, two = shuffled(images, labels, 0), order[shuffled(images[order], labels[order], 0)]
    assert torch.equal(images[one], images[two])
    assert torch.equal(labels[one], labels[two])
    assert not torch.equal(one, shuffled(images, labels, 1))
    assert one.sort().values.tolist() == list(range(12))


def test_only_so_many_are_compared_by_neighbours():
    real, (images, labels) = blobs(300, 1), blobs(300, 3)
    few = Judge(flat(), real, most=60, cas=False)
    assert few(images, labels).frechet == Judge(flat(), real, cas=False)(images, labels).frechet
    assert few(images, labels).coverage * 60 == pytest.approx(round(few(images, labels).coverage * 60))
    other = Judge(flat(), real, most=60, cas=False, seed=1)
    assert few(images, labels).density != other(images, labels).density
    # Equal numbers of both: else coverage would rise with the number of generated images.
    many = Judge(flat(), blobs(60, 1), cas=False)(*blobs(3000, 3))
    assert many.coverage == pytest.approx(1 - 2**-5, abs=0.12)
    assert many.coverage < 1


def test_classes_that_neither_side_has_are_passed_over():
    keep = blobs(400, 1, k=4)[1] != 1
    (real, y), (images, labels) = blobs(400, 1, k=4), blobs(400, 3, k=4)
    found = Judge(flat(4), (real[keep], y[keep]), cas=False)(images[keep], labels[keep])
    assert found.class_frechet < 0.01


@pytest.mark.slow
def test_nothing_global_is_touched():
    torch.manual_seed(3)
    random.seed(3)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model[2].eval()
    before = torch.get_rng_state(), random.getstate(), {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    assert flags == [True, True, True, False, True]
    with torch.no_grad():
        found = quality(*blobs(60, 3), model, blobs(60, 1))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[2][k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        torch.manual_seed(4)
        assert quality(*blobs(60, 3), model, blobs(60, 1)) == found
    assert torch.get_default_dtype() == torch.float32


def test_half_precision_evaluators_and_double_defaults():
    images, labels = blobs(60, 3)
    expected = Judge(flat(), blobs(60, 1))(images, labels)
    half = Judge(flat().bfloat16(), blobs(60, 1), cas=False)(images, labels)
    assert half.frechet == pytest.approx(expected.frechet, rel=0.2)
    torch.set_default_dtype(torch.float64)
    try:
        # Data are drawn in the default dtype, so that they are made before.
        assert Judge(flat().float(), (blobs(60, 1)[0].float(), labels), cas=True)(images, labels).cas is not None
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_user_s_classifier_takes_the_place_of_the_default():
    made = []

    def factory():
        made.append(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)))
        return made[-1]

    judge = Judge(flat(), blobs(60, 1), classifier=factory)
    found = judge(*blobs(60, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)  # which is not where first weights and dropout come from
        assert found.cas == judge(*blobs(60, 3)).cas
    assert len(made) == 2
    assert not any(network.training for network in made)  # their accuracy was taken without dropout
    assert all(torch.equal(x, y) for x, y in zip(made[0].parameters(), made[1].parameters(), strict=True))
    wrong = Judge(flat(), blobs(60, 1), classifier=lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 4)))
    with pytest.raises(ValueError, match=r"logits of shape \(60, 4\) for 60 images; expected \(60, 3\)"):
        wrong(*blobs(60, 3))


def test_tables_and_dictionaries():
    images, labels = blobs(60, 3)
    found = quality(images, labels, flat(), blobs(90, 1), train=blobs(90, 2), cas=False)
    head, generated, real = str(found).splitlines()
    names = "images accuracy frechet class_frechet precision recall density coverage nearness copies"
    assert head.split() == names.split()
    assert generated.split()[:3] == ["generated", "60", "1.000"]
    assert real.split()[:3] == ["real", "60", "1.000"]
    assert len({len(line) for line in (head, generated, real)}) == 1
    assert len(str(Judge(flat(), blobs(90, 1), cas=False)(images, labels)).splitlines()) == 2
    told = json.loads(json.dumps(found.to_dict()))
    assert told["reference"]["count"] == 60
    assert told["cas"] is None
    assert told["frechet"] == found.frechet
    reference = told.pop("reference")
    assert Quality(**told, reference=Quality(**reference)) == found


# Digits.


@pytest.fixture(scope="module")
def trained():
    """A network and three parts of the digits: two to train on, one to judge by."""
    one, two, real = digits().split(0.35, 0.35, 0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = generator()
    for _ in range(12):
        for batch in torch.randperm(len(one.labels), generator=order).split(64):
            loss = F.cross_entropy(model(one.images[batch]), one.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), two, real


@pytest.mark.slow
def test_digits(trained):
    model, two, real = trained
    judge = Judge(model, (real.images, real.labels), (two.images, two.labels))
    reference = judge.reference
    assert reference.accuracy > 0.93
    assert reference.cas > 0.88
    assert reference.coverage > 0.85
    assert reference.nearness == pytest.approx(0.5, abs=0.06)
    assert reference.copies < 0.05
    noise = judge(torch.rand(500, 1, 8, 8, generator=generator()), torch.arange(500) % 10)
    assert noise.accuracy < 0.2
    assert noise.cas < 0.25
    assert noise.frechet > 10 * reference.frechet
    assert noise.class_frechet > 3 * reference.class_frechet
    assert noise.precision < 0.1
    assert noise.copies == 0
    pale = judge(two.images * 0.7, two.labels)
    assert reference.frechet < pale.frechet < noise.frechet
    wrong = judge(two.images, two.labels.roll(1))
    assert wrong.accuracy < 0.2
    assert wrong.cas < 0.25
    # The head's own row of figures: the same again from the same seed.
    again = Judge(model, (real.images, real.labels), (two.images, two.labels))
    assert again.reference == reference


def test_images_objects_are_read(trained):
    model, two, real = trained
    found = quality(two.images, two.labels, model, real, train=two, cas=False)
    assert found.copies == 1
    assert found.nearness > 0.99
    assert found.reference.copies < 0.05


# What is refused.


def changed(images, value):
    images = images.clone()
    images[3, 0, 0, 1] = value
    return images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, 0], y), r"generated images have shape \(60, 1, 8\); expected \(N, C, H, W\)"),
        (lambda x, y: (x[:0], y[:0]), r"shape \(0, 1, 1, 8\); expected \(N, C, H, W\) with N > 0"),
        (lambda x, y: (2 * x - 1, y), r"values from -0.\d+ to .*expected values in \[0, 1\].*Undo any normalisation"),
        (lambda x, y: (changed(x, 1.002), y), r"to 1.002; expected values in"),
        (lambda x, y: (changed(x, torch.nan), y), r"generated images holds? 1 values.*\[3, 0, 0, 1\]"),
        (lambda x, y: (changed(x, torch.inf), y), r"NaN or infinite"),
        (lambda x, y: (x.reshape(60, 1, 2, 4), y), r"shape \(1, 2, 4\), and real images \(1, 1, 8\)"),
        (lambda x, y: (x, y[:50]), r"generated labels has shape \(50,\); expected \(60,\)"),
        (lambda x, y: (x, y[:, None]), r"generated labels has shape \(60, 1\)"),
        (lambda x, y: (x, None), r"generated has no labels"),
        (lambda x, y: (x, y - 1), r"generated labels\[0\] is -1, .*expected 0 to 2"),
        (lambda x, y: (x, y + 1), r"generated labels\[2\] is 3, .*expected 0 to 2"),
        (lambda x, y: (x[y != 1], y[y != 1]), r"generated has fewer than 2 images of the classes \[1\]"),
        (lambda x, y: (x[:5], y[:5]), r"generated has fewer than 2 images of the classes \[2\]"),
    ],
)  # fmt: skip
def test_generated_images_that_are_refused(judge, change, message):
    with pytest.raises(ValueError, match=message):
        judge(*change(*blobs(60, 3)))


def test_types_that_are_refused(judge):
    x, y = blobs(60, 3)
    with pytest.raises(TypeError, match=r"generated images are torch.uint8.*images / 255"):
        judge((255 * x).byte(), y)
    with pytest.raises(TypeError, match=r"generated labels is a torch.float32 tensor; .*integer"):
        judge(x, y.float())
    with pytest.raises(TypeError, match=r"label 1 of real is 0.5; expected an integer"):
        Judge(flat(), [(x[0], 0), (x[1], 0.5)], cas=False)
    assert judge(x, y.to(torch.uint8)) == judge(x, y.tolist()) == judge(x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda real, **_: {"real": real[0]}, ValueError, "real has no labels"),
        (lambda real, **_: {"real": (real[0],)}, TypeError, r"real is \(Tensor\); expected \(images, labels\)"),
        (lambda real, **_: {"real": 3}, TypeError, "real is a int; expected"),
        (lambda real, **_: {"real": []}, ValueError, "real is a data set without images"),
        (lambda real, **_: {"real": [(real[0][0], 0), (real[0][1, :, :, :4], 1)]}, ValueError, "image 1 of real has"),
        (lambda real, **_: {"real": (real[0], real[1].clamp(max=1))}, None, ""),
        (lambda real, **_: {"real": [{"image": real[0][0]}]}, TypeError, "a data set of dict"),
        (lambda real, **_: {"real": (real[0], real[1] + 1)}, ValueError, r"real labels\[2\] is 3"),
        (lambda real, **_: {"real": (real[0], (real[1] > 0).long() * 2)}, None, ""),
        (lambda real, **_: {"real": (real[0][:4], real[1][:4])}, ValueError, r"real has fewer than 2 .* \[1, 2\]"),
        (lambda real, **_: {"neighbours": 90}, ValueError, "real has 90 images, too few for 90 neighbours"),
        (lambda real, **_: {"neighbours": 0}, ValueError, "neighbours is 0"),
        (lambda real, **_: {"most": 5}, ValueError, "most is 5; expected an integer of at least 6"),
        (lambda real, **_: {"batch_size": 0}, ValueError, "batch_size is 0"),
        (lambda real, **_: {"train": real[0] * 3}, ValueError, "train images have values"),
        (lambda real, **_: {"train": real[0][:1]}, ValueError, "train has 1 images; give at least 2"),
        (lambda real, **_: {"train": (real[0], real[1] * 0)}, ValueError, r"train has fewer than 2 .* \[1, 2\]"),
        (lambda real, **_: {"train": (real[0], real[1][:3])}, ValueError, "train labels has shape"),
        (lambda real, **_: {"evaluator": torch.tanh}, TypeError, "evaluator is a builtin_function_or_method; expected"),
    ],
)  # fmt: skip
def test_judges_that_are_refused(change, error, message):
    real = blobs(90, 1)
    arguments = {"evaluator": flat(), "real": real, "most": 100, "cas": False} | change(real)
    if error is None:
        Judge(**arguments)
    else:
        with pytest.raises(error, match=message):
            Judge(**arguments)


def test_classes_that_real_images_lack_are_refused():
    real, labels = blobs(90, 1)
    judge = Judge(flat(), (real[labels != 1], labels[labels != 1]), cas=False)
    with pytest.raises(ValueError, match=r"real has fewer than 2 images of the classes \[1\]"):
        judge(*blobs(90, 3))


def test_training_images_of_a_class_that_is_not_judged_may_be_single():
    (real, labels), (train, known) = blobs(90, 1), blobs(90, 2)
    keep = (known != 2) | ((known == 2).cumsum(0) == 1)
    judge = Judge(flat(), (real[labels != 2], labels[labels != 2]), (train[keep], known[keep]), cas=False)
    assert judge.reference.accuracy == 1.0


def test_halves_that_are_too_small_are_refused():
    judge = Judge(flat(), blobs(9, 1), cas=False)
    with pytest.raises(ValueError, match=r"half of real has .*passing train="):
        judge.reference  # noqa: B018


def test_evaluators_whose_features_are_refused():
    class Pixelwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(1, 3, 1)

        def forward(self, x):
            return self.last(x)

    model = Pixelwise()
    with pytest.raises(ValueError, match=r"features of shape .* for 90 images; .* one vector for each image"):
        Judge(Tap(model, find_head(model, blobs(90, 1)[0][:8])), blobs(90, 1), cas=False)

    class Broken(nn.Module):
        def forward(self, x):
            return x.log() if len(x) > 20 else x

    images = blobs(90, 1)[0].clone()
    images[50] = 0
    broken = nn.Sequential(nn.Flatten(), Broken(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"the evaluator's features of real images holds? .* NaN or infinite"):
        Judge(broken, (images, blobs(90, 1)[1]), cas=False)
