import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch

from penult import Activations, Gaussian, GenerativePair, Head, Marginal, Sphere
from penult.bases import Base, BaseInfo
from penult.distributions import Bank
from penult.realism import compare
from penult.realism._matched_rows import labelled_source, match_rows, split_by_class
from penult.realism._statistics import collapse
from tiers import in_default_tier


def shortly(pair, real):
    """A comparison whose networks hardly learn in the default tier, where their power does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        if in_default_tier():
            patch.setattr("penult.realism._two_sample._STEPS", 20)
        return compare(pair, real)


@pytest.fixture(scope="module")
def own(truth, real):
    return shortly(truth, real)


@pytest.fixture(scope="module")
def paper(truth, real):
    return shortly(GenerativePair(truth.head, Sphere.fit(truth.head, real.activations)), real)


class Shifted(Base):
    """Real activations of no class in particular, moved; without any density."""

    def __init__(self, rows, shift=0.0):
        super().__init__()
        self.register_buffer("rows", rows)
        self.shift = shift

    info = BaseInfo("shifted", "none", "points", True, False, "this test")
    in_features = property(lambda self: self.rows.shape[1])

    def log_mgf(self, weight):
        return (self.rows.to(weight) @ weight.T).logsumexp(0) - math.log(len(self.rows))

    def log_prob(self, h):
        raise AssertionError("a base without a density was asked for one")

    def draw(self, weight, index, generator):
        shares = (self.rows @ weight.T).softmax(0).T
        picked = torch.multinomial(shares, len(index), True, generator=generator)
        return self.rows[picked[index, torch.arange(len(index))]] + self.shift


@pytest.mark.slow
def test_a_pair_is_not_told_apart_from_its_own_draws(own):
    for comparison in (own.by_class, own.pooled, own.real_by_class, own.real_pooled):
        # standard error .013 to .018; cross-validation of what cannot be told apart errs to below 0.5
        assert all(0.44 < auc < 0.54 for auc in comparison.auc.values()), comparison
        assert abs(comparison.energy) < 0.01
    assert own.auc is own.by_class.auc
    assert own.auc.keys() == own.real_auc.keys() == {"logistic", "mlp", "knn"}
    assert own.cosine.distance < 0.07
    assert own.norm.distance < 0.12
    assert own.cosine.real_mean == pytest.approx(own.cosine.drawn_mean, abs=0.03)
    assert own.labels == "stored"
    assert [each.name for each in own.classes] == ["ant", "bee", "cat"]


@pytest.mark.slow
def test_the_papers_sphere_is_told_apart(paper):
    assert paper.auc["logistic"] > 0.95
    assert paper.worst_auc > 0.95
    assert paper.energy > 0.1
    assert all(abs(auc - 0.5) < 0.05 for auc in paper.real_auc.values())
    assert paper.norm.distance < 0.25  # its radii are the real ones


def test_draws_of_a_sphere_follow_the_exact_law_that_is_shown(paper):
    assert paper.chart_cosine.drawn_mean == pytest.approx(paper.chart_cosine.law_mean, abs=0.03)
    assert paper.chart_cosine.drawn_sd == pytest.approx(paper.chart_cosine.law_sd, abs=0.03)
    assert paper.chart_cosine.drawn_mean == pytest.approx(paper.cosine.drawn_mean, abs=1e-5)  # no chart here
    assert paper.cosine.law_mean is None


@pytest.mark.parametrize("fixture", ["own", "paper"])
def test_joint_draws_are_calibrated_whatever_the_base(fixture, request):
    c = request.getfixturevalue(fixture).calibration
    assert abs(c.drawn_accuracy - c.drawn_confidence) < 0.02
    assert c.drawn_ece < 0.03


def test_real_calibration_and_prior(own, truth, real):
    p = real.logits.softmax(-1)
    assert own.calibration.real_accuracy == pytest.approx(float((real.predicted == real.labels).double().mean()))
    assert own.calibration.real_confidence == pytest.approx(float(p.amax(-1).double().mean()), abs=1e-6)
    prior = truth.prior.probs.double()
    assert own.prior.total_variation == pytest.approx(float((p.double().mean(0) - prior).abs().sum()) / 2, abs=1e-6)
    assert own.prior.effective_classes == pytest.approx(math.exp(-float((prior * prior.log()).sum())))
    assert (own.prior.min, own.prior.max) == pytest.approx((float(prior.min()), float(prior.max())))


def test_tilt_identity_holds_for_a_gaussian_and_not_for_others(own, truth):
    assert own.tilt_identity.ratio == pytest.approx(1, abs=0.12)
    w = truth.head.centered_weight().double()
    exact = float((w @ truth.base.covariance_matrix.double() * w).sum() / w.square().sum())
    assert own.tilt_identity.variance == pytest.approx(exact, rel=0.1)
    apart = truth.head.weight[torch.arange(3).repeat(100)] * 2 + torch.randn(300, 8, generator=seeded(0)) * 0.1
    labelled = labelled_source(apart, truth.head, torch.arange(3).repeat(100))
    assert collapse(truth.head, labelled)[1].ratio > 50


def legacy_state():
    return np.random.get_state()[1].copy()  # noqa: NPY002


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_collapse_figures_of_a_collapsed_network():
    k, d = 4, 6
    simplex = (torch.eye(k) - 1 / k) @ torch.linalg.qr(torch.randn(d, d, generator=seeded(0)))[0][:k]
    head = Head(3 * simplex + 0.5, torch.tensor([1.0, 1.0, 1.0, 3.0]))
    y = torch.arange(k).repeat_interleave(50)
    h = 2 * simplex[y] + 7.0
    figures, identity = collapse(head, labelled_source(h, head, y))
    norm = 3 * math.sqrt(1 - 1 / k)
    assert (figures.weight_norm_min, figures.weight_norm_max) == pytest.approx((norm, norm), rel=1e-5)
    assert figures.weight_norm_cv == pytest.approx(0, abs=1e-5)
    assert figures.weight_cosine_mean == pytest.approx(-1 / 3, abs=1e-5)
    assert figures.weight_cosine_sd == pytest.approx(0, abs=1e-3)
    assert figures.mean_alignment_centered == pytest.approx(1, abs=1e-5)
    assert figures.mean_alignment_raw < 0.5
    assert figures.mean_weight_norm == pytest.approx(0.5 * d**0.5, rel=1e-5)
    assert figures.bias_max == pytest.approx(1.5)
    assert figures.trace_within == pytest.approx(0, abs=1e-9)
    assert figures.trace_between == pytest.approx(4 * (1 - 1 / k), rel=1e-5)
    assert identity.offset == pytest.approx(2 / 3, rel=1e-5)


def test_within_class_variance_is_that_of_a_direct_computation(truth, real):
    figures, _ = collapse(truth.head, labelled_source(real, truth.head, real.labels))
    h, y = real.activations.double(), real.labels
    means = torch.stack([h[y == k].mean(0) for k in range(3)])
    assert figures.trace_within == pytest.approx(float((h - means[y]).square().sum()) / (len(h) - 3), rel=1e-8)
    share = y.bincount().double()[:, None] / len(y)
    assert figures.trace_between == pytest.approx(float((share * (means - h.mean(0)).square()).sum()), rel=1e-6)
    norms = [float(h[y == k].norm(dim=-1).mean()) for k in range(3)]
    assert (figures.class_norm_min, figures.class_norm_max) == pytest.approx((min(norms), max(norms)))


def test_results_are_json_and_text(own):
    facts = json.loads(json.dumps(own.to_dict(), allow_nan=False))
    assert facts["by_class"]["auc"]["mlp"] == own.auc["mlp"]
    assert facts["chart_cosine"] is None
    assert "histogram" not in facts["cosine"]
    assert sum(own.cosine.histogram.counts["drawn"]) == own.pooled.rows
    text = str(own)
    for word in ("gaussian base", "AUC mlp, each of 3 classes", "effective classes", "labels as stored", "ECE"):
        assert word in text


@pytest.mark.slow
def test_seeds_reproduce_and_global_state_stays(truth, real, quick):
    before = torch.random.get_rng_state(), legacy_state(), list(warnings.filters)
    few = real[:400]
    one, again = compare(truth, few), compare(truth, few)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], legacy_state())
    assert before[2] == list(warnings.filters)
    assert one == again
    assert one.auc != compare(truth, few, seed=1).auc


def test_labels_that_are_missing_are_drawn_from_the_head(truth, real, quick):
    result = compare(truth, real.activations[:1500])
    assert result.labels == "drawn"
    assert result.calibration.real_accuracy is None
    assert result.calibration.real_ece is None
    assert max(abs(auc - 0.5) for auc in result.auc.values()) < 0.08


def test_given_labels_come_before_stored_ones(truth, real, quick):
    real = real[:1200]
    wrong = (real.labels + 1) % 3
    with pytest.warns(UserWarning, match=r"predicts \d+\.\d% of the labels, as by guessing\. .* 3 classes") as said:
        result = compare(truth, real, wrong)
    assert said[0].filename == __file__
    assert result.labels == "given"
    assert result.calibration.real_accuracy < 0.5
    assert result.auc["logistic"] > 0.8  # p(h|y) of another class


@pytest.mark.slow
def test_a_reference_takes_the_other_side(truth, real, quick):
    held, fitted = real[:900], real[900:1800]
    result = compare(truth, held, reference=fitted)
    assert result.by_class.rows > 0.8 * 300  # not halved
    assert compare(truth, held, reference=(fitted.activations, fitted.labels)) == result
    moved = compare(truth, held, reference=(fitted.activations + 1, fitted.labels))
    assert moved.real_auc["logistic"] > 0.9
    assert moved.real_energy > 0.02
    assert moved.auc == result.auc
    with pytest.raises(ValueError, match="the reference has none"):
        compare(truth, held, reference=fitted.activations)
    assert compare(truth, held.activations, reference=fitted).labels == "drawn"


def test_pre_activations_are_compared_as_the_head_reads_them(truth, quick):
    g = seeded(5)
    u = torch.randn(600, 8, generator=g)
    acts = Activations(u, truth.head(u.relu()), pre_activation=True)
    plain = Activations(u.relu(), truth.head(u.relu()))
    assert compare(truth, acts) == compare(truth, plain)


def test_bases_without_a_density_will_do(truth, real, quick):
    base = Shifted(real.activations[900:1800].clone())
    pair = GenerativePair(truth.head, base)
    result = compare(pair, real[:400])
    assert result.base == "shifted"
    moved = compare(GenerativePair(truth.head, Shifted(real.activations[900:1800].clone(), 1.0)), real[:400])
    assert moved.auc["logistic"] > 0.9
    assert moved.energy > result.energy + 0.02


@pytest.mark.slow
def test_a_bank_without_replacement_is_compared(truth, real):
    bank = Bank(real.activations[1200:], replacement=False)
    result = compare(GenerativePair(truth.head, Marginal(truth.head, bank)), real[:1200], reference=real[1200:])
    assert max(abs(auc - 0.5) for auc in result.auc.values()) < 0.06
    assert abs(result.calibration.drawn_accuracy - result.calibration.drawn_confidence) < 0.02


def test_many_classes_with_few_rows_are_compared_together():
    k, d = 300, 16
    head = Head(torch.randn(k, d, generator=seeded(0)))
    pair = GenerativePair(head, Gaussian(torch.zeros(d), torch.eye(d) * 0.5))
    h, y = pair.sample((1500,), generator=seeded(1))
    result = compare(pair, h, y)
    assert result.by_class is None
    assert result.classes == ()
    assert result.auc is result.pooled.auc
    assert max(abs(auc - 0.5) for auc in result.auc.values()) < 0.06
    assert 300 < result.pooled.rows < 750
    assert "all classes together" in str(result)


def test_rows_are_matched_by_class():
    g = seeded(0)
    y = torch.randint(0, 7, (999,), generator=g).clamp_max(5)
    head = Head(torch.randn(9, 2, generator=g))
    h = torch.stack([y.float(), torch.arange(999).float()], dim=1)
    sizes = {"max_pooled": 200, "min_per_class": 50, "max_per_class": 60, "max_classes": 3}
    rows = match_rows(labelled_source(h, head, y), None, seeded(1), **sizes)
    assert torch.equal(rows.real[:, 0], rows.labels.float())
    assert torch.equal(rows.other[:, 0], rows.labels.float())
    together = torch.cat([rows.real, rows.other])[:, 1]
    assert len(together.unique()) == len(together)
    assert int(rows.pooled.sum()) == 200
    assert len(rows.tested) == 3
    for k in rows.tested:
        assert int((rows.per_class & (rows.labels == k)).sum()) == 60
    assert set(rows.labels[rows.per_class].tolist()) == set(rows.tested)


def test_halves_hold_each_class_alike():
    y = torch.arange(4).repeat_interleave(torch.tensor([3, 30, 1, 60]))
    one, two = split_by_class(y, 2 / 3, seeded(0))
    assert torch.equal(torch.cat([one, two]).sort().values, torch.arange(94))
    assert y[one].bincount(minlength=4).tolist() == [2, 20, 0, 40]


def test_progress_counts_to_the_end(truth, real, quick):
    steps = []
    compare(truth, real[:400], progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))


BAD = [
    ({"activations": torch.zeros(100, 7)}, ValueError, r"\(N, 8\)"),
    ({"activations": torch.zeros(100, 8, dtype=torch.long)}, TypeError, "floating"),
    ({"activations": "rows"}, TypeError, "str"),
    ({"activations": torch.full((100, 8), torch.nan)}, ValueError, "100 of 100 rows of activations hold NaN"),
    ({"labels": torch.zeros(99, dtype=torch.long)}, ValueError, r"\(99,\).*\(100,\)"),
    ({"labels": torch.full((100,), 3)}, ValueError, "expected 0 to 2"),
    ({"labels": torch.zeros(100)}, TypeError, "integer"),
    ({"activations": torch.zeros(60, 8)}, ValueError, "at least 50 are needed"),
    ({"labels": torch.zeros(100, dtype=torch.long), "reference": (torch.zeros(99, 8), torch.ones(99).long())},
     ValueError, "0 rows can be compared"),
    ({"reference": torch.zeros(99, 7)}, ValueError, "reference has shape"),
    ({"max_per_class": 10}, ValueError, "at least 50"),
    ({"pair": "pair"}, TypeError, "GenerativePair"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "match"), BAD)
def test_bad_input_is_named(truth, change, error, match):
    arguments = {"pair": truth, "activations": torch.randn(100, 8, generator=seeded(0))} | change
    with pytest.raises(error, match=match):
        compare(arguments.pop("pair"), arguments.pop("activations"), arguments.pop("labels", None), **arguments)


def test_scikit_learn_is_asked_for_first(truth, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "penult\[data\]"'):
        compare(truth, torch.zeros(3, 3))
