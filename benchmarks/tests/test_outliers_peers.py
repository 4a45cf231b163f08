"""Scores of other authors agree with their formulas, written row by row."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from outliers_kinds import auroc, averaged, contaminating, direction, false_alarms, judged_outliers
from outliers_peers import PEERS

K, D, N = 4, 12, 90


def setting():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(K, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(K, generator=generator, dtype=torch.float64)
    rows = torch.randn(N, D, generator=generator, dtype=torch.float64).abs()
    h = 2 * torch.randn(7, D, generator=generator, dtype=torch.float64).abs()
    return weight, bias, rows, h


def logits_of(weight, bias, x):
    return [sum(float(w) * float(v) for w, v in zip(row, x, strict=True)) + float(b) for row, b in zip(weight, bias)]  # noqa: B905


def softmax(z):
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def lse(z):
    return math.log(sum(math.exp(v) for v in z))


def norm(x):
    return math.sqrt(sum(float(v) ** 2 for v in x))


def unit(x):
    return [float(v) / norm(x) for v in x]


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def argmax(z):
    return max(range(len(z)), key=lambda i: z[i])


def class_mean(weight, bias, rows, y):
    kept = [row for row in rows if argmax(logits_of(weight, bias, row)) == y] or list(rows)
    return [sum(float(row[i]) for row in kept) / len(kept) for i in range(D)]


def quantile(x, q):
    ordered = sorted(float(v) for v in x)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def naive(name, weight, bias, rows, x):
    z = logits_of(weight, bias, x)
    p, y = softmax(z), argmax(z)
    if name == "msp":
        return math.log(1 - max(p)) - math.log(max(p))
    if name == "max logit":
        return -max(z)
    if name == "energy":
        return -lse(z)
    if name == "GEN":
        return sum((v * (1 - v)) ** 0.1 for v in p)
    if name == "KNN":
        return sorted(norm([a - b for a, b in zip(unit(x), unit(r), strict=True)]) ** 2 for r in rows)[19]
    if name == "NNGuide":
        guides = sorted((dot(unit(x), unit(r)) * lse(logits_of(weight, bias, r)) for r in rows), reverse=True)[:10]
        return -lse(z) * sum(guides) / 10
    if name == "fDBD":
        center = [float(v) for v in rows.mean(0)]
        total = sum((z[y] - z[c]) / norm([a - b for a, b in zip(weight[y], weight[c])]) for c in range(K) if c != y)  # noqa: B905
        return -total / (K - 1) / norm([float(a) - b for a, b in zip(x, center, strict=True)])
    if name == "SHE":
        return -dot(x, class_mean(weight, bias, rows, y))
    if name in ("CARef", "CADRef"):
        difference = [float(a) - b for a, b in zip(x, class_mean(weight, bias, rows, y), strict=True)]
        size = sum(abs(float(v)) for v in x)
        if name == "CARef":
            return sum(map(abs, difference)) / size
        signed = [v * (1 if float(w) > 0 else -1) for v, w in zip(difference, weight[y], strict=True)]
        certainties = [1 / naive("GEN", weight, bias, rows, row) for row in rows]
        along, against = sum(max(v, 0) for v in signed), sum(max(-v, 0) for v in signed)
        return along / size * naive("GEN", weight, bias, rows, x) + against / size / (sum(certainties) / N)
    if name in ("SCALE", "ASH"):
        limit = quantile(x, 0.85 if name == "SCALE" else 0.9)
        top = [float(v) if float(v) >= limit else 0.0 for v in x]
        factor = math.exp(sum(map(float, x)) / sum(top))
        return -lse(logits_of(weight, bias, [v * factor for v in (x if name == "SCALE" else top)]))
    if name == "ReAct":
        limit = quantile(rows.flatten(), 0.9)
        return -lse(logits_of(weight, bias, [min(float(v), limit) for v in x]))
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    ["msp", "max logit", "energy", "GEN", "KNN", "NNGuide", "fDBD", "SHE", "CARef", "CADRef", "SCALE", "ASH", "ReAct"],
)
def test_formula(name):
    weight, bias, rows, h = setting()
    truth = torch.tensor([naive(name, weight, bias, rows, x) for x in h], dtype=torch.float64)
    torch.testing.assert_close(PEERS[name](weight, bias, rows)(h).double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["CoP", "NECO"])
def test_principal_axes(name):
    """By scikit-learn's principal components."""
    from sklearn.decomposition import PCA

    weight, bias, rows, h = setting()
    basis, x = (torch.nn.functional.normalize(t) if name == "CoP" else t for t in (rows, h))
    axes = PCA(n_components=0.9, svd_solver="full").fit(basis.numpy())
    inside = torch.tensor(axes.transform(x.numpy()))
    centered = x - torch.tensor(axes.mean_)
    if name == "CoP":
        truth = torch.linalg.vector_norm(centered - inside @ torch.tensor(axes.components_), dim=-1)
    else:
        share = inside.norm(dim=-1) / centered.norm(dim=-1)
        truth = -share * (h @ weight.T + bias).amax(-1)
    torch.testing.assert_close(PEERS[name](weight, bias, rows)(h), truth)


def test_maha_var():
    """By equation 23 of Chen et al. 2010, written entry by entry, and distances as sums."""
    weight, bias, rows, h = setting()
    index = (rows @ weight.T + bias).argmax(-1)
    basis, x = torch.nn.functional.normalize(rows), torch.nn.functional.normalize(h)
    names = index.unique().tolist()
    means = torch.stack([basis[index == y].mean(0) for y in names])
    residual = torch.cat([basis[index == y] - means[i] for i, y in enumerate(names)])
    covariance = sum(torch.outer(row, row) for row in residual) / N
    square = sum(float(v) ** 2 for v in covariance.flatten())
    trace = sum(float(covariance[i, i]) for i in range(D))
    share = ((1 - 2 / D) * square + trace**2) / ((N + 1 - 2 / D) * (square - trace**2 / D))
    target = torch.eye(D, dtype=torch.float64) * trace / D
    precision = torch.linalg.inv((1 - share) * covariance + share * target)

    def distances(t):
        gaps = t[:, None] - means
        squared = torch.einsum("bcd,de,bce->bc", gaps, precision, gaps)
        return squared.amin(-1), squared.std(-1, correction=0)

    (low, spread), (low_x, spread_x) = distances(basis), distances(x)
    truth = (low_x - low.mean()) / low.std() - (spread_x - spread.mean()) / spread.std()
    torch.testing.assert_close(PEERS["MahaVar++"](weight, bias, rows)(h), truth, rtol=1e-8, atol=1e-8)


def test_every_peer_gives_finite_scores():
    weight, bias, rows, h = (t.float() for t in setting())
    for name, fit in PEERS.items():
        values = fit(weight, bias, rows)(h)
        assert values.shape == (7,), name
        assert values.isfinite().all(), name


def test_auroc_with_ties():
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randint(offset, 9, (60,), generator=generator) for offset in (0, 3))
    truth = roc_auc_score([0] * 60 + [1] * 60, torch.cat([low, high]).numpy())
    assert auroc(low, high) == pytest.approx(truth)


def test_false_alarms_of_exchangeable_rows():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    assert false_alarms(values)["mean"] == pytest.approx(0.05, abs=0.005)


def test_averages_of_splits():
    cells = [{"a": 1.0, "b": {"c": 2.0}, "role": "judging"}, {"a": 3.0, "b": {"c": 4.0}, "role": "judging"}]
    assert averaged(cells) == {"a": 2.0, "b": {"c": 3.0}, "role": "judging"}


@pytest.mark.parametrize("count", [100, 200, 300, 600, 1000])
def test_tested_outliers_never_contaminate(count):
    rows = torch.arange(count)[:, None]
    first, last = judged_outliers(rows).flatten().tolist(), contaminating(rows).flatten().tolist()
    assert first
    assert last
    assert not set(first) & set(last)


def test_direction_depends_on_the_reference_activations():
    weight, bias, rows, h = setting()
    stretched = rows * torch.linspace(0.2, 3, D)
    one, other = (direction(weight, bias, x)(h) for x in (rows, stretched))
    assert not torch.allclose(one, other, atol=0.1)
