"""Fitted scores against scikit-learn and NumPy."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.covariance import OAS, EmpiricalCovariance, ShrunkCovariance
from sklearn.neighbors import NearestNeighbors

import penult
from penult.scores import KNN, Mahalanobis, RelativeMahalanobis, ViM


@pytest.fixture
def rows():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (600,), generator=g)
    means = 3 * torch.randn(4, 12, generator=g, dtype=torch.float64)
    mixing = torch.randn(12, 12, generator=g, dtype=torch.float64)
    return means[labels] + torch.randn(600, 12, generator=g, dtype=torch.float64) @ mixing, labels


@pytest.fixture
def strange():
    return 5 * torch.randn(100, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def head():
    g = torch.Generator().manual_seed(2)
    return penult.Head(torch.randn(4, 12, generator=g).double(), torch.randn(4, generator=g).double())


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_mahalanobis_is_that_of_scikit_learn(rows, strange, shrinkage):
    x, y = rows
    means = np.stack([x[y == c].mean(0).numpy() for c in range(4)])
    within = ShrunkCovariance(shrinkage=shrinkage, assume_centered=True).fit(x.numpy() - means[y.numpy()])
    total = ShrunkCovariance(shrinkage=shrinkage).fit(x.numpy())
    within.location_ = np.zeros(12)
    least = np.min([within.mahalanobis(strange.numpy() - mean) for mean in means], axis=0)
    assert np.allclose(Mahalanobis.fit(x, y, shrinkage=shrinkage).score(strange), least, rtol=1e-6)
    relative = least - total.mahalanobis(strange.numpy())
    assert np.allclose(RelativeMahalanobis.fit(x, y, shrinkage=shrinkage).score(strange), relative, rtol=1e-6)


def test_mahalanobis_of_empirical_covariance(rows, strange):
    x, _ = rows
    whole = EmpiricalCovariance().fit(x.numpy())
    found = Mahalanobis.fit(x, torch.zeros(len(x), dtype=torch.long), shrinkage=0.0).score(strange)
    assert np.allclose(found, whole.mahalanobis(strange.numpy()), rtol=1e-6)


def test_oracle_approximating_shrinkage_is_that_of_scikit_learn(rows, strange):
    x, y = rows
    y = y[:30]
    means = np.stack([x[:30][y == c].mean(0).numpy() for c in range(4)])
    deviations = x[:30].numpy() - means[y.numpy()]
    # Rows of the same scatter, as many as there are degrees of freedom.
    independent = np.linalg.svd(deviations, full_matrices=False)
    independent = independent[1][:, None] * independent[2]
    independent = np.concatenate([independent, np.zeros((26 - 12, 12))])
    within = OAS(assume_centered=True).fit(independent)
    assert 0.05 < within.shrinkage_ < 0.95
    within = within.precision_ * 30 / 26
    least = np.min([np.einsum("nd,de,ne->n", r, within, r) for r in (strange.numpy() - m for m in means)], axis=0)
    assert np.allclose(Mahalanobis.fit(x[:30], y).score(strange), least, rtol=1e-6)
    total = OAS().fit(x[:30].numpy()).mahalanobis(strange.numpy())
    assert np.allclose(RelativeMahalanobis.fit(x[:30], y).score(strange), least - total, rtol=1e-6)


@pytest.mark.parametrize("score", [Mahalanobis, RelativeMahalanobis])
def test_normalised_activations(rows, strange, score):
    x, y = rows
    unit, other = (a / a.norm(dim=-1, keepdim=True) for a in (x, strange))
    plain, normalised = score.fit(unit, y), score.fit(x, y, normalize=True)
    assert torch.allclose(normalised.score(strange), plain.score(other), rtol=1e-9)
    assert torch.allclose(normalised.score(1000 * strange), normalised.score(strange), rtol=1e-9)
    assert "normalize=True" in repr(normalised)
    plain.load_state_dict(normalised.state_dict())
    assert torch.equal(plain.score(strange), normalised.score(strange))
    normalised.load_state_dict(score.fit(unit, y).state_dict())
    assert not normalised.normalize


def test_labels_default_to_those_of_activations_then_to_predictions(rows, strange, head):
    x, y = rows
    predicted = head(x).argmax(-1)
    expected = Mahalanobis.fit(x, predicted).score(strange)
    assert torch.equal(Mahalanobis.fit(x, head=head).score(strange), expected)
    assert torch.equal(Mahalanobis.fit(penult.Activations(x, head(x))).score(strange), expected)
    labelled = penult.Activations(x, head(x), y)
    assert torch.equal(Mahalanobis.fit(labelled, head=head).score(strange), Mahalanobis.fit(x, y).score(strange))


def test_one_row_for_each_class_has_no_spread(rows):
    x, _ = rows
    with pytest.raises(ValueError, match="several activations of each class"):
        Mahalanobis.fit(x[:5], torch.arange(5))


@pytest.mark.parametrize("k", [1, 20, 600])
def test_knn_is_that_of_scikit_learn(rows, strange, k):
    x, _ = rows
    unit, other = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x.numpy(), strange.numpy()))
    expected = NearestNeighbors(n_neighbors=k).fit(unit).kneighbors(other)[0][:, -1]
    assert np.allclose(KNN.fit(x, k=k).score(strange), expected, atol=1e-9)


@pytest.mark.parametrize("separation", [10.0, 1e4])
def test_distances_between_far_classes_in_single_precision(separation):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    x = separation * torch.randn(4, 16, generator=g)[labels] + torch.randn(400, 16, generator=g)
    exact, single = Mahalanobis.fit(x.double(), labels), Mahalanobis.fit(x, labels)
    assert torch.allclose(single.score(x).double(), exact.score(x.double()), rtol=0.02)


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_neighbours_in_tight_clusters_in_single_precision(spread):
    g = torch.Generator().manual_seed(0)
    x = 1 + spread * torch.randn(500, 16, generator=g)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    expected = NearestNeighbors(n_neighbors=20).fit(unit[:400].numpy()).kneighbors(unit[400:].numpy())[0][:, -1]
    assert np.allclose(KNN.fit(x[:400]).score(x[400:]), expected, rtol=0.02)


@pytest.mark.parametrize("spread", [0.3, 3e-2, 1e-2, 1e-3, 1e-5])
def test_neighbours_in_several_tight_clusters(spread):
    # The products of different clusters are large, whatever is subtracted from all rows.
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 32, generator=g)[torch.arange(1000) % 5]
    x = centers + spread * torch.randn(1000, 32, generator=g)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    expected = NearestNeighbors(n_neighbors=10).fit(unit[:800].numpy()).kneighbors(unit[800:].numpy())[0][:, -1]
    # Rows in float32 have distances themselves only up to their rounding.
    rounding = 1e-7 / expected
    assert (np.abs(KNN.fit(x[:800], k=10).score(x[800:]).numpy() / expected - 1) < 1e-3 + rounding).all()


def test_knn_keeps_a_bounded_number(rows):
    x, _ = rows
    first, again, other = (
        KNN.fit(x, k=5, size=100, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.bank.shape == (100, 12)
    assert "bank=(100, 12)" in repr(first)
    assert torch.equal(first.bank, again.bank)
    assert not torch.equal(first.bank, other.bank)
    assert torch.equal(KNN.fit(x, k=1).score(x[:5]), torch.zeros(5).double())


def test_vim_is_that_of_its_paper(rows, strange, head):
    x, _ = rows
    weight, bias = head.weight.numpy(), head.bias.numpy()
    origin = -np.linalg.pinv(weight) @ bias
    values, vectors = np.linalg.eigh(EmpiricalCovariance(assume_centered=True).fit(x.numpy() - origin).covariance_)
    space = vectors[:, np.argsort(values * -1)[6:]]
    alpha = (x.numpy() @ weight.T + bias).max(1).mean() / np.linalg.norm((x.numpy() - origin) @ space, axis=1).mean()
    virtual = np.linalg.norm((strange.numpy() - origin) @ space, axis=1) * alpha
    expected = virtual - logsumexp(strange.numpy() @ weight.T + bias, axis=1)
    assert np.allclose(ViM.fit(head, x).score(strange), expected, rtol=1e-6)  # d // 2 = 6 dimensions, as chosen


def test_single_precision_state_and_activations(rows, strange, head):
    x, y = rows
    acts = penult.Activations(x.float(), head(x).float(), y)
    for exact, score in (
        (Mahalanobis.fit(x, y), Mahalanobis.fit(acts)),
        (RelativeMahalanobis.fit(x, y), RelativeMahalanobis.fit(acts)),
        (KNN.fit(x), KNN.fit(acts)),
        (ViM.fit(head, x), ViM.fit(penult.Head(head.weight.float(), head.bias.float()), acts)),
    ):
        assert torch.allclose(score.score(strange.float()).double(), exact.score(strange), rtol=1e-3, atol=1e-3)
        assert torch.equal(score(strange.float()), score.score(strange.float()))
        assert score.score(strange.half()).dtype == torch.float32
        assert score.score(strange[:0].float()).shape == (0,)
        other = copy.deepcopy(score)
        for buffer in other.buffers():
            buffer.add_(1)
        assert not torch.equal(other.score(strange.float()), score.score(strange.float()))
        other.load_state_dict(score.state_dict())
        assert torch.equal(other.score(strange.float()), score.score(strange.float()))


def test_pre_activations_are_rectified(rows):
    x, y = rows
    acts = penult.Activations(x, x[:, :4].clamp_min(0), y, pre_activation=True)
    assert torch.equal(KNN.fit(acts, k=1).bank, KNN.fit(x.clamp_min(0), k=1).bank)


def test_classes_without_rows(rows, strange):
    x, y = rows
    assert torch.equal(Mahalanobis.fit(x, y).score(strange), Mahalanobis.fit(x, 10 * y).score(strange))


def test_bad_input(rows, head):
    x, y = rows
    with pytest.raises(ValueError, match=r"labels=acts\.predicted"):
        Mahalanobis.fit(x)
    with pytest.raises(ValueError, match=r"\(3,\).*600"):
        Mahalanobis.fit(x, y[:3])
    with pytest.raises(TypeError, match="float64"):
        RelativeMahalanobis.fit(x, y.double())
    with pytest.raises(ValueError, match="not positive definite"):
        Mahalanobis.fit(x[:5], y[:5], shrinkage=0.0)
    with pytest.raises(ValueError, match="shrinkage"):
        Mahalanobis.fit(x, y, shrinkage=2.0)
    with pytest.raises(ValueError, match="shrinkage is 'ledoit'; expected a number from 0 to 1, or 'oas'"):
        Mahalanobis.fit(x, y, shrinkage="ledoit")
    with pytest.raises(ValueError, match="k = 700"):
        KNN.fit(x, k=700)
    with pytest.raises(ValueError, match="size is 5"):
        KNN.fit(x, size=5)
    with pytest.raises(ValueError, match=r"largest logits is -.*head.centered"):
        ViM.fit(penult.Head(head.weight, head.bias - 1000), x)
    with pytest.raises(ValueError, match="1 to 11"):
        ViM.fit(head, x, dims=12)
    with pytest.raises(ValueError, match=r"\(600, 6\)|6 features"):
        ViM.fit(head, x[:, :6])
    with pytest.raises(TypeError, match="list"):
        KNN.fit([1.0])
    with pytest.raises(ValueError, match="NaN"):
        KNN.fit(torch.full((30, 2), torch.nan))
    with pytest.raises(ValueError, match=r"\(0, 2\).*N >= 1"):
        KNN.fit(torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(B, 12\)"):
        KNN.fit(x).score(torch.zeros(2, 3))
