import json
import math
import sys

import pytest
import torch

from penult import Activations, Gaussian, Sphere
from penult.realism import CANDIDATES, Comparison, Ranked, choose
from penult.realism._choose import _bank, recommend


def diagonal(head, rows):
    return Gaussian.fit(head, rows, covariance_type="spherical")


def broken(head, rows):
    raise RuntimeError("the disk is full")


@pytest.fixture(scope="module")
def ranking(truth, real):
    """Real activations are Gaussian, so that the Gaussian is right and the bank no better."""
    candidates = {
        "sphere": CANDIDATES["sphere"],
        "broken": broken,
        "gaussian": CANDIDATES["gaussian"],
        "round": diagonal,
        "bank": CANDIDATES["bank"],
        "none": lambda head, rows: head,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penult.realism._two_sample._STEPS", 100)
        return choose(truth.head, real[:2400], candidates=candidates)


@pytest.mark.slow
def test_the_smallest_law_that_is_as_good_as_any_is_recommended(ranking):
    assert ranking.best == "gaussian"
    assert abs(ranking["gaussian"].worst_auc - 0.5) < 0.07
    assert abs(ranking["bank"].worst_auc - 0.5) < 0.07
    assert ranking["sphere"].worst_auc > 0.9
    assert {row.name for row in ranking.rows[:2]} == {"gaussian", "bank"}
    assert ranking.fitted_rows + ranking.held_out_rows == 2400
    assert 1590 < ranking.fitted_rows <= 1600
    assert all(abs(auc - 0.5) < 0.05 for auc in ranking.real.auc.values())


def test_costs_are_the_floats_that_bases_keep(ranking):
    assert ranking["gaussian"].floats == 8 + 64
    assert ranking["bank"].floats == ranking.fitted_rows * 8
    assert 2 * 200 < ranking["sphere"].floats <= 2 * 256
    assert all(row.seconds >= 0 for row in ranking.rows if row.error is None)


def test_failures_are_listed_with_their_reason(ranking):
    assert ranking["broken"].error == "RuntimeError: the disk is full"
    assert "not a penult.bases.Base" in ranking["none"].error
    assert [row.name for row in ranking.rows[-2:]] == ["broken", "none"]
    text = str(ranking)
    assert "broken could not be compared: RuntimeError: the disk is full" in text
    assert "real activations" in text
    assert "<- best" in next(line for line in text.splitlines() if line.startswith("gaussian"))
    assert ranking.reason in text
    with pytest.raises(KeyError, match="'flows'"):
        ranking["flows"]


def test_a_ranking_is_json(ranking):
    facts = json.loads(json.dumps(ranking.to_dict(), allow_nan=False))
    assert facts["best"] == "gaussian"
    assert facts["rows"][0]["realism"]["pooled"]["rows"] > 100
    assert facts["rows"][-1]["realism"] is None


@pytest.mark.slow
def test_seeds_reproduce_and_global_state_stays(truth, real, quick):
    def run(seed=0):
        few = {"gaussian": CANDIDATES["gaussian"], "sphere": CANDIDATES["sphere"]}
        return choose(truth.head, real[:900], candidates=few, seed=seed)

    before = torch.random.get_rng_state()
    one = run()
    assert torch.equal(before, torch.random.get_rng_state())
    assert one == run()
    assert one != run(1)


def test_tensors_without_labels_and_candidates_that_train(truth, real, quick):
    seen = []

    def trained(head, rows):
        seen.append(rows)
        scale = torch.ones((), requires_grad=True)
        (scale * rows).square().mean().backward()
        assert scale.grad is not None
        return Gaussian.fit(head, rows)

    ranking = choose(truth.head, real.activations[:900], candidates={"trained": trained})
    assert ranking["trained"].error is None
    assert ranking["trained"].realism.labels == "drawn"
    assert ranking["trained"].realism.calibration.real_accuracy is None
    assert seen[0].shape == (ranking.fitted_rows, 8)
    held = ranking.held_out_rows
    assert held + ranking.fitted_rows == 900
    assert 290 < held < 310


def test_pre_activations_are_fitted_as_they_are_and_compared_rectified(truth, quick):
    u = torch.randn(900, 8, generator=torch.Generator().manual_seed(0))
    acts = Activations(u, truth.head(u.relu()), pre_activation=True)
    seen = {}

    def marginal(head, rows):
        seen["rows"] = rows
        return CANDIDATES["bank"](head, rows)

    ranking = choose(truth.head, acts, candidates={"bank": marginal, "sphere": CANDIDATES["sphere"]})
    assert seen["rows"].pre_activation
    assert float(seen["rows"].activations.min()) < 0
    assert ranking["bank"].error is None
    assert abs(ranking["bank"].worst_auc - 0.5) < 0.12
    plain = Activations(u.relu(), truth.head(u.relu()))
    again = choose(truth.head, plain, candidates={"sphere": CANDIDATES["sphere"]})
    assert again["sphere"].auc == ranking["sphere"].auc


def test_the_bank_draws_no_row_twice(truth, real):
    base = _bank(truth.head, real.activations[:300])
    y = torch.arange(3).repeat_interleave(20)
    h = base.draw(truth.head.centered_weight(torch.arange(3)), y, torch.Generator().manual_seed(0))
    assert all(len(h[y == k].unique(dim=0)) == 20 for k in range(3))


@pytest.mark.slow
def test_every_default_candidate_names_a_base_or_a_reason(truth, real, quick):
    ranking = choose(truth.head, real[:1500], candidates={k: v for k, v in CANDIDATES.items() if k != "flow"})
    assert {row.name for row in ranking.rows} == set(CANDIDATES) - {"flow"}
    assert all(row.error is None for row in ranking.rows), ranking
    assert isinstance(CANDIDATES["elliptic"](truth.head, real.activations).scale_tril, torch.Tensor)


def test_the_flow_is_left_out_where_zuko_is_missing(truth, real, quick, monkeypatch):
    monkeypatch.setattr("penult.realism._choose.CANDIDATES", {"flow": broken, "sphere": CANDIDATES["sphere"]})
    monkeypatch.setitem(sys.modules, "zuko", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [row.name for row in choose(truth.head, real[:600]).rows] == ["sphere"]


def test_bad_input_is_named(truth, real):
    with pytest.raises(ValueError, match=r"no candidate could be.*the disk is full"):
        choose(truth.head, real[:300], candidates={"broken": broken})
    with pytest.raises(ValueError, match="no candidates"):
        choose(truth.head, real, candidates={})
    with pytest.raises(TypeError, match="find_head"):
        choose(truth, real)
    with pytest.raises(ValueError, match="at least 50 are needed"):
        choose(truth.head, real[:90])
    with pytest.raises(ValueError, match=r"\(N, 8\)"):
        choose(truth.head, torch.zeros(100, 5))


def row(name, worst, energy, floats):
    return Ranked(name, auc={"mlp": worst}, worst_auc=worst, energy=energy, floats=floats)


REAL = Comparison({"mlp": 0.505}, {"mlp": 0.01}, 0.0, 0.0, 100, 1)
CASES = [
    ([row("bank", 0.51, 0.0, 9000), row("mixture", 0.53, 0.001, 900), row("sphere", 0.99, 0.3, 9)], "mixture"),
    ([row("bank", 0.51, 0.0, 9000), row("mixture", 0.60, 0.001, 900)], "bank"),
    ([row("gaussian", 1.0, 0.08, 900), row("sphere", 0.99, 0.3, 9)], "gaussian"),  # AUCs say no more
    ([row("gaussian", 0.44, 0.0, 900), row("bank", 0.5, 0.0, 9000)], "gaussian"),  # below is not told apart
    ([row("first", 0.5, 0.0, 9000), row("second", 0.534, 0.0, 9)], "second"),  # none is better than real ones
]


@pytest.mark.parametrize(("rows", "best"), CASES)
def test_the_rule(rows, best):
    name, reason, order = recommend(rows, REAL)
    assert name == best
    assert best in reason
    assert "Real against real: 0.505." in reason
    distances = [round(max(each.worst_auc - 0.5, 0.0), 2) for each in order]
    assert distances == sorted(distances)
    assert not any(math.isnan(each.worst_auc) for each in order)


def test_a_choice_among_bad_laws_says_so():
    _, reason, _ = recommend([row("sphere", 0.99, 0.3, 9)], REAL)
    assert "No candidate comes close" in reason


def test_sphere_candidates_are_those_of_the_paper_and_elliptic(truth, real):
    assert isinstance(CANDIDATES["sphere"](truth.head, real.activations), Sphere)
    assert CANDIDATES["sphere"](truth.head, real.activations).in_features is None  # no chart: all of R^d
