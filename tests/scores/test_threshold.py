"""Thresholds keep the false alarm rate that they promise."""

import copy
import math
from functools import partial

import pytest
import torch
from scipy import stats

import penult
from penult.scores import KNN, Composite, Mahalanobis, RelativeMahalanobis, Threshold, ViM, density, directional, energy


def identity(h):
    return h[:, 0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("count", "alpha"), [(19, 0.05), (100, 0.05), (57, 0.2), (999, 0.01)])
def test_rate_over_many_calibrations(count, alpha):
    g, rates = generator(count), []
    for _ in range(400):
        threshold = Threshold.fit(identity, torch.randn(count, 1, generator=g), false_alarm=alpha)
        rates.append(float(stats.norm.sf(threshold.value)))
    rates = torch.tensor(rates)
    kept = math.floor(alpha * (count + 1) + 1e-9)
    exact = kept / (count + 1)  # the mean of Beta(kept, count + 1 - kept), the law of the rate
    error = math.sqrt(exact * (1 - exact) / (count + 2) / 400)
    assert abs(float(rates.mean()) - exact) < 4 * error
    assert exact <= alpha
    assert stats.kstest(rates.numpy(), stats.beta(kept, count + 1 - kept).cdf).pvalue > 1e-4


@pytest.mark.parametrize("law", ["ties", "heavy"])
def test_guarantee_under_any_law(law):
    g, alarms = generator(), 0.0
    for _ in range(200):
        rows = (
            torch.randint(5, (1050, 1), generator=g).float() if law == "ties" else 1 / torch.rand(1050, 1, generator=g)
        )
        threshold = Threshold.fit(identity, rows[:50], false_alarm=0.1)
        alarms += float(threshold(rows[50:]).double().mean()) / 200
    assert alarms <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / 52 / 200)


def test_p_values_are_uniform_and_agree_with_verdicts():
    g = generator()
    threshold = Threshold.fit(identity, torch.randn(999, 1, generator=g), false_alarm=0.05)
    rows = torch.randn(20_000, 1, generator=g)
    p = threshold.p_value(rows)
    assert torch.equal(threshold(rows), p <= 0.05 + 1e-7)
    assert torch.equal(threshold(rows), rows[:, 0] > threshold.value)
    scores = threshold.calibration
    expected = torch.tensor([(1 + int((scores >= row).sum())) / 1000 for row in rows[:50, 0]])
    assert torch.allclose(p[:50], expected)
    assert float(threshold.p_value(torch.tensor([[1e9]]))) == pytest.approx(1e-3)
    assert float(threshold.p_value(torch.tensor([[-1e9]]))) == 1.0


@pytest.mark.parametrize(("count", "alpha", "confidence"), [(19, 0.05, 0.95), (500, 0.05, 0.95), (5000, 0.01, 0.5)])
def test_bound_is_a_quantile_of_beta(count, alpha, confidence):
    threshold = Threshold(identity, torch.arange(float(count)), alpha)
    kept = math.floor(alpha * (count + 1) + 1e-9)
    exact = stats.beta(kept, count + 1 - kept).ppf(confidence)
    assert threshold.rate_bound(confidence) == pytest.approx(exact, rel=1e-9)


def test_with_a_pair_a_module_and_activations():
    head = penult.Head(4 * torch.eye(3))
    h, y = penult.GenerativePair(head).sample((400,), generator=generator())
    pair = penult.GenerativePair(head, penult.Sphere.fit(head, h[:200], shape="elliptic"))
    acts = penult.Activations(h[200:], head(h[200:]), y[200:])
    for threshold in (
        Threshold.fit(directional, acts, pair=pair),
        Threshold.fit(KNN.fit(h[:200]), acts),
        Threshold.fit(lambda rows: energy(pair, rows), acts),
    ):
        assert len(threshold.calibration) == 200
        assert float(threshold(h[:200]).double().mean()) < 0.15
        assert float(threshold.p_value(h[200:]).double().mean()) == pytest.approx(0.5, abs=0.05)
        same = copy.deepcopy(threshold)
        assert torch.equal(same.p_value(h), threshold.p_value(h))
    assert repr(Threshold.fit(directional, acts, pair=pair)).startswith("Threshold(directional > ")
    whole = Threshold.fit(directional, acts, pair=pair).state_dict()
    assert {"calibration", "score.pair.head.weight"} <= set(whole)


def test_nan_is_as_strange_as_can_be():
    threshold = Threshold(identity, torch.arange(99.0))
    assert threshold(torch.tensor([[math.nan]])).tolist() == [True]


def test_infinite_scores_have_ranks_like_others():
    threshold = Threshold(identity, torch.cat([torch.arange(98.0), torch.tensor([-math.inf, math.inf])]))
    assert threshold.p_value(torch.tensor([[math.inf], [-math.inf]])).tolist() == pytest.approx([2 / 101, 1.0])


def test_bad_input():
    for alpha in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="false_alarm"):
            Threshold(identity, torch.arange(100.0), alpha)
    with pytest.raises(ValueError, match=r"18 familiar.*at least 19"):
        Threshold(identity, torch.arange(18.0), 0.05)
    with pytest.raises(ValueError, match="50 of them NaN"):
        Threshold(identity, torch.tensor([math.nan] * 50))
    with pytest.raises(TypeError, match="int64"):
        Threshold(identity, torch.arange(50))
    with pytest.raises(TypeError, match=r"energy is a score of a pair: give it, pair=pair"):
        Threshold.fit(energy, torch.eye(3))
    with pytest.raises(ValueError, match=r"\(5, 2\)"):
        Threshold(identity, torch.zeros(5, 2))
    with pytest.raises(TypeError, match=r"score is a str.*expected a penult.scores.Score or a function"):
        Threshold.fit("energy", torch.eye(3))
    with pytest.raises(ValueError, match="confidence"):
        Threshold(identity, torch.arange(100.0)).rate_bound(1.0)


def test_scores_that_are_no_functions_of_a_pair_ignore_it():
    pair, rows = penult.GenerativePair(penult.Head(torch.eye(3))), torch.randn(50, 3)
    for score in (KNN(torch.eye(3), k=1), lambda h: h.norm(dim=-1), torch.nn.Flatten(0, -1)):
        rows = rows[:, :1] if isinstance(score, torch.nn.Flatten) else rows
        threshold = Threshold.fit(score, rows, pair=pair)
        assert threshold.score is score
        assert torch.equal(threshold.calibration, score(rows).sort().values)


# --- calibration with the reference activations -------------------------------------------------------------


HEAD = penult.Head(3 * torch.eye(3))
ROWS = torch.randn(120, 3, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(120) % 3
BASES = {
    "sphere": lambda: penult.Sphere.fit(HEAD, ROWS),
    "elliptic": lambda: penult.Sphere.fit(HEAD, ROWS, shape="elliptic", trim=0.2),
    "gaussian": lambda: penult.Gaussian.fit(HEAD, ROWS),
    "mixture": lambda: penult.Marginal.fit(HEAD, ROWS, components=3),
}
FITTED = {
    "Composite": lambda: Composite.fit(HEAD, ROWS),
    "KNN": lambda: KNN.fit(ROWS),
    "Mahalanobis": lambda: Mahalanobis.fit(ROWS, LABELS),
    "RelativeMahalanobis": lambda: RelativeMahalanobis.fit(ROWS, LABELS),
    "ViM": lambda: ViM.fit(HEAD, ROWS, dims=1),
}


def same_sets(folder):
    """The reference activations, as people hold them."""
    yield ROWS.clone()
    yield ROWS[torch.randperm(120, generator=torch.Generator().manual_seed(1))]
    yield ROWS.double()
    yield penult.Activations(ROWS, HEAD(ROWS)).save(folder, shard_size=500)


@pytest.mark.parametrize(
    ("base", "score"),
    [("sphere", directional), ("elliptic", directional), *((base, density) for base in BASES)],
)
def test_calibration_with_what_the_base_was_fitted_to_is_refused(base, score, tmp_path):
    pair = penult.GenerativePair(HEAD, BASES[base]())
    pairs = [pair, penult.load(pair.save(tmp_path / "pair.safetensors")), copy.deepcopy(pair)]
    for number, rows in enumerate(same_sets(tmp_path / "acts")):
        with pytest.raises(ValueError, match=f"very set that the base of {score.__name__} was fitted to"):
            Threshold.fit(score, rows, pair=pairs[number % 3])
    with pytest.raises(ValueError, match="very set"):
        Threshold.fit(partial(score, pair), ROWS)
    # The head alone was not fitted to them, and a part of them is not noticed.
    Threshold.fit(energy, ROWS, pair=pair)
    Threshold.fit(score, ROWS[1:], pair=pair)


@pytest.mark.parametrize("score", FITTED)
def test_calibration_with_what_a_score_was_fitted_to_is_refused(score, tmp_path):
    fitted = FITTED[score]()
    for rows in same_sets(tmp_path / "acts"):
        with pytest.raises(ValueError, match=f"very set that the score of {score} was fitted to"):
            Threshold.fit(fitted, rows)
    changed = ROWS.clone()
    changed[7, 1] += 1e-3
    for others in (changed, torch.cat([ROWS, ROWS[:1]]), ROWS + torch.tensor([[1.0], [-1.0]]).repeat(60, 1)):
        Threshold.fit(fitted, others)
