"""How well scores separate outliers: the figures of scikit-learn, closed forms, and tables of several scores."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import penult
from penult import scores
from penult.scores import KNN, Threshold, compare, separation


def samples(ties, n=400, m=150, seed=0):
    g = np.random.default_rng(seed)
    familiar, outliers = g.normal(size=n), g.normal(1, 2, size=m)
    return (np.round(familiar), np.round(outliers)) if ties else (familiar, outliers)


@pytest.mark.parametrize("ties", [False, True])
def test_figures_are_those_of_scikit_learn(ties):
    familiar, outliers = samples(ties)
    truth, values = np.repeat([0, 1], [400, 150]), np.concatenate([familiar, outliers])
    found = separation(familiar, torch.tensor(outliers))
    alarms, hits, _ = roc_curve(truth, values, drop_intermediate=False)
    assert np.allclose(found.alarms, alarms)
    assert np.allclose(found.hits, hits)
    assert math.isclose(found.auroc, roc_auc_score(truth, values))
    assert math.isclose(found.aupr, average_precision_score(truth, values))
    # With familiar inputs as positives, and 95 % of them or more below the threshold.
    false_positives, true_positives, _ = roc_curve(1 - truth, -values, drop_intermediate=False)
    assert math.isclose(found.fpr95, false_positives[true_positives >= 0.95 - 1e-12].min(), abs_tol=1e-12)
    assert math.isclose(found.detected(0.05), 1 - found.fpr95)
    assert "auroc=" in repr(found)
    assert "tensor" not in repr(found)


def test_standard_error_is_the_spread_of_auroc_over_samples():
    found = [separation(*samples(ties=False, seed=seed)) for seed in range(300)]
    spread = np.std([one.auroc for one in found])
    assert abs(np.mean([one.standard_error for one in found]) / spread - 1) < 0.1


def test_auroc_is_the_statistic_of_mann_and_whitney():
    familiar, outliers = samples(ties=True)
    statistic = scipy.stats.mannwhitneyu(outliers, familiar).statistic
    assert math.isclose(separation(familiar, outliers).auroc, statistic / (400 * 150))


def test_closed_forms():
    apart = separation([1.0, 2.0, 3.0], [4.0, math.inf])
    assert (apart.auroc, apart.aupr, apart.fpr95, apart.standard_error) == (1, 1, 0, 0)
    same = separation(torch.ones(30), np.ones(20))
    assert (same.auroc, same.aupr, same.fpr95, same.detected(0.5)) == (0.5, 0.4, 1, 0)
    # Of twenty familiar inputs one may be lost: the outlier below the second highest passes.
    assert separation(list(range(20)), [18.5, 17.5]).fpr95 == 0.5
    assert math.isnan(separation([1.0], [2.0, 3.0]).standard_error)
    assert separation([-math.inf, 0], [-math.inf]).auroc == 0.25


@pytest.mark.parametrize(
    ("familiar", "outliers", "error", "words"),
    [
        ([1.0], [], ValueError, r"scores of outliers have shape \(0,\)"),
        ([1.0, math.nan], [1.0], ValueError, "scores of familiar inputs have .* 1 NaN"),
        (torch.ones(2, 2), [1.0], ValueError, r"\(2, 2\)"),
        ("abc", [1.0], TypeError, "scores of familiar inputs are a str; expected numbers"),
    ],
)
def test_bad_scores(familiar, outliers, error, words):
    with pytest.raises(error, match=words):
        separation(familiar, outliers)


# --- comparisons --------------------------------------------------------------------------------------------


@pytest.fixture
def familiar():
    return torch.randn(500, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pair():
    return penult.GenerativePair(penult.Head(torch.randn(3, 6, generator=torch.Generator().manual_seed(1))))


def test_all_kinds_of_scores(familiar, pair):
    def norm(h):
        return h.norm(dim=-1)

    knn = KNN.fit(familiar[:200])
    sets = {"far": 3 * familiar, "near": familiar[:100] + 0.5}
    found = compare([scores.energy, knn, norm], familiar[200:], sets, pair=pair)
    assert list(found.separations) == ["energy", "KNN", "norm"]
    assert found.sets == ("far", "near")
    assert found.num_familiar == 300
    truth = separation(scores.energy(pair, familiar[200:]), scores.energy(pair, sets["near"]))
    assert found.separations["energy"]["near"].auroc == truth.auroc
    assert found.separations["norm"]["far"].auroc == separation(norm(familiar[200:]), norm(sets["far"])).auroc
    assert found.best == max(found.separations, key=found.mean_auroc)
    rows = found.to_dicts()
    assert len(rows) == 6
    assert set(rows[0]) == {"score", "outliers", "auroc", "standard_error", "aupr", "fpr95"}
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["AUROC", "energy", "KNN", "norm"]
    assert f"{truth.auroc:.3f} / {truth.fpr95:.3f}" in lines[1]
    assert "mean" in lines[0]
    assert "mean" not in str(compare({"mine": norm}, familiar, {"far": 3 * familiar}))


def test_activations_in_memory_and_of_other_kinds(familiar, pair):
    acts = penult.Activations(familiar, pair.head(familiar))
    own = {"one": lambda h: h.sum(-1)}
    assert compare(own, acts, {"a": acts}).to_dicts() == compare(own, familiar.numpy(), {"a": familiar}).to_dicts()


def test_bad_comparisons(familiar, pair):
    far = {"far": 3 * familiar}
    with pytest.raises(TypeError, match="energy is a score of a pair"):
        compare([scores.energy], familiar, far)
    with pytest.raises(ValueError, match="0 scores and 1 sets"):
        compare([], familiar, far)
    with pytest.raises(ValueError, match=r"several scores have the name KNN.*Pass a dict"):
        compare([KNN.fit(3 * familiar, k=1), KNN.fit(3 * familiar, k=2)], familiar, far)
    with pytest.raises(ValueError, match=r"outliers\['far'\] has 2 features; expected 6"):
        compare([scores.energy], familiar, {"far": familiar[:, :2]}, pair=pair)
    with pytest.raises(ValueError, match=r"shape \(500, 6\); expected one number for each"):
        compare({"all": lambda h: h}, familiar, far)
    with pytest.raises(ValueError, match="the score bad is NaN for 500 of 500"):
        compare({"bad": lambda h: h[:, 0] * math.nan}, familiar, far)
    with pytest.raises(ValueError, match="familiar activations are the very set that the score of KNN"):
        compare([KNN.fit(familiar)], familiar, far)
    # A threshold gives verdicts, which are scores of a kind.
    threshold = Threshold.fit(scores.energy, familiar, pair=pair)
    assert compare({"verdict": threshold}, familiar, far).best == "verdict"
