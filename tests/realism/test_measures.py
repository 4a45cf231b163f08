"""Two-sample tests, distances and calibration against closed forms and by brute force."""

import itertools
import sys
import warnings

import numpy as np
import pytest
import torch

from penult.realism import energy_coefficient, two_sample_auc
from penult.realism._statistics import expected_calibration_error, kolmogorov_smirnov, wasserstein
from penult.realism._two_sample import _area, auc_standard_error


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def legacy_state():
    return np.random.get_state()[1].copy()  # noqa: NPY002


def brute_force(x, y):
    def mean(pairs):
        return np.mean([np.linalg.norm(a - b) for a, b in pairs])

    x, y = x.double().numpy(), y.double().numpy()
    across = mean(itertools.product(x, y))
    within = mean(itertools.combinations(x, 2)) + mean(itertools.combinations(y, 2))
    return (2 * across - within) / (2 * across)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_energy_is_that_of_all_pairs(monkeypatch, offset):
    monkeypatch.setattr("penult.realism._statistics._BLOCK", 7)
    x, y = normal(23, 5) + offset, 1.3 * normal(31, 5, seed=1) + 0.2 + offset
    assert energy_coefficient(x.double(), y.double()) == pytest.approx(brute_force(x, y), abs=1e-9)


def test_energy_is_without_bias_and_blind_to_scale():
    values = [energy_coefficient(normal(20, 3, seed=2 * i), normal(20, 3, seed=2 * i + 1)) for i in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    x, y = normal(50, 3).double(), normal(50, 3, seed=1).double() + 1
    assert energy_coefficient(1e6 * x, 1e6 * y) == pytest.approx(energy_coefficient(x, y), rel=1e-9)


@pytest.mark.parametrize(("x", "y"), [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5,))])
def test_energy_refuses_other_shapes(x, y):
    with pytest.raises(ValueError, match=r"expected \(N, d\)"):
        energy_coefficient(torch.zeros(x), torch.zeros(y))


def test_distances_of_numbers_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    x, y = normal(200), normal(200, seed=1) + 0.3
    assert kolmogorov_smirnov(x, y) == pytest.approx(stats.ks_2samp(x.numpy(), y.numpy()).statistic)
    assert wasserstein(x, y) == pytest.approx(stats.wasserstein_distance(x.numpy(), y.numpy()), rel=1e-6)


def test_calibration_error_by_hand():
    # bins of width 1/15: .62 and .65 share one (accuracy 1/2 at .635), .95 has its own, right
    confidence, correct = torch.tensor([0.62, 0.65, 0.95]), torch.tensor([True, False, True])
    assert expected_calibration_error(confidence, correct) == pytest.approx((2 * 0.135 + 0.05) / 3)
    assert expected_calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0


def relu_like(n, seed):
    g = torch.Generator().manual_seed(7)
    mix = torch.randn(10, 64, generator=g) / 10**0.5
    return (normal(n, 10, seed=seed) @ mix + 0.5 * normal(n, 64, seed=seed + 1000)).relu()


@pytest.mark.slow
def test_equal_laws_are_not_told_apart():
    runs = [two_sample_auc(relu_like(150, 2 * s), relu_like(150, 2 * s + 1), seed=s) for s in range(5)]
    for test in runs[0]:
        values = [run[test] for run in runs]
        assert abs(np.mean(values) - 0.5) < 0.05, test  # standard error .017


def test_a_continuous_law_does_not_pass_for_relu_activations():
    real, pool = relu_like(200, 0), relu_like(4000, 2)
    assert 0.3 < (real == 0).float().mean() < 0.6
    scale = torch.linalg.cholesky(torch.cov(pool.T))
    gaussian = pool.mean(0) + normal(200, 64, seed=5) @ scale.T
    assert two_sample_auc(real, gaussian, ("mlp",))["mlp"] > 0.99
    smeared = relu_like(200, 4) + 0.01 * normal(200, 64, seed=6).abs()
    assert two_sample_auc(real, smeared, ("mlp",))["mlp"] > 0.99


def test_other_shapes_are_found_where_means_agree():
    n, d = 400, 32
    scaled = two_sample_auc(1.3 * normal(n, d), normal(n, d, seed=1), ("logistic", "mlp"))
    assert scaled["mlp"] > 0.85
    assert abs(scaled["logistic"] - 0.5) < 0.1
    rng = np.random.default_rng(0)
    heavy = torch.from_numpy(rng.standard_t(3, size=(n, d)) / 3**0.5).float()
    assert two_sample_auc(heavy, normal(n, d), ("mlp",))["mlp"] > 0.85
    mixing = normal(4, d, seed=3)
    sides = torch.from_numpy(rng.choice([-1.0, 1.0], size=(n, 4))).float()
    modes = ((sides + 0.3 * normal(n, 4)) / 1.09**0.5) @ mixing + 0.3 * normal(n, d, seed=4)
    single = normal(n, 4, seed=5) @ mixing + 0.3 * normal(n, d, seed=6)
    found = two_sample_auc(modes, single, ("mlp", "knn"))
    assert found["mlp"] > 0.7
    assert found["knn"] > 0.7


def test_constant_coordinates_and_few_rows_are_fine():
    x, y = normal(10, 3), normal(10, 3, seed=1)
    x[:, 0] = y[:, 0] = 0.0
    x[:, 1] = y[:, 1] = 2.5
    assert set(two_sample_auc(x, y)) == {"logistic", "mlp", "knn"}
    zero = two_sample_auc(torch.zeros(20, 3), torch.zeros(20, 3))
    assert all(value == 0.5 for value in zero.values())


@pytest.mark.slow
def test_no_global_state_is_touched():
    before = torch.random.get_rng_state(), legacy_state(), list(warnings.filters)
    one = two_sample_auc(normal(60, 4), normal(60, 4, seed=1))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], legacy_state())
    assert before[2] == list(warnings.filters)
    assert one == two_sample_auc(normal(60, 4), normal(60, 4, seed=1))
    assert one != two_sample_auc(normal(60, 4), normal(60, 4, seed=1), seed=1)


def test_area_counts_pairs_and_halves_of_ties():
    g = torch.Generator().manual_seed(0)
    score, which = torch.randint(0, 6, (40,), generator=g).double(), torch.randint(0, 2, (40,), generator=g)
    ones, zeros = score[which == 1][:, None], score[which == 0]
    exact = float(((ones > zeros).double() + (ones == zeros).double() / 2).mean())
    assert _area(score, which) == pytest.approx(exact)


def test_what_two_sample_auc_refuses(monkeypatch):
    with pytest.raises(ValueError, match="N, M >= 10"):
        two_sample_auc(torch.zeros(9, 2), torch.zeros(20, 2))
    with pytest.raises(ValueError, match="'forest'"):
        two_sample_auc(torch.zeros(20, 2), torch.zeros(20, 2), ("forest",))
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "penult\[data\]"'):
        two_sample_auc(torch.zeros(20, 2), torch.zeros(20, 2))


def test_standard_error_of_an_auc_is_what_repetition_gives():
    rng = np.random.default_rng(0)
    values = [(rng.normal(1, 1, (60, 1)) > rng.normal(0, 1, (1, 60))).mean() for _ in range(2000)]
    assert auc_standard_error(float(np.mean(values)), 60) == pytest.approx(np.std(values), rel=0.06)
