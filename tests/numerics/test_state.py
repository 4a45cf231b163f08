"""Copies, state dicts, pickles and other processes give the same numbers."""

import copy
import io
import multiprocessing
import operator
import pickle

import pytest
import torch

import penult
from penult.scores import KNN, Composite, Mahalanobis, RelativeMahalanobis, Threshold, ViM


def stored(state):
    """A state dict as it comes back from a file that may hold tensors alone."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_pairs_of_every_base_come_back_from_their_state(problem, kind, laws_of):
    pair, h = problem.pair(kind), problem.rows()
    expected = {name: law(h) for name, law in laws_of(pair).items()}
    other = copy.deepcopy(pair)
    for buffer in other.buffers():
        buffer.mul_(1.25)
    other = copy.deepcopy(other)  # whose state is taken for its own
    other.load_state_dict(stored(pair.state_dict()))
    for same in (other, copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        for name, law in laws_of(same).items():
            assert torch.allclose(law(h), expected[name], rtol=1e-5, atol=1e-5), name
    assert all(torch.equal(law(h), expected[name]) for name, law in laws_of(copy.deepcopy(pair)).items())


def test_scores_load_the_state_of_those_fitted_to_other_rows(problem, close):
    head, rows = problem.head(), problem.rows(100).float()
    labels, strange = torch.arange(100) % 4, 3 * problem.normal(20, 8, seed=5).float()
    other = penult.Head(problem.head(seed=9).weight, problem.head(seed=9).bias)
    for fitted, blank in (
        (Composite.fit(head, rows), Composite.fit(other, rows[:40])),
        (KNN.fit(rows, k=7), KNN.fit(rows[:30], k=3)),
        (Mahalanobis.fit(rows, labels), Mahalanobis.fit(rows, labels % 2)),
        (RelativeMahalanobis.fit(rows, labels), RelativeMahalanobis.fit(rows, labels % 2)),
        (ViM.fit(head, rows, dims=2), ViM.fit(other, rows, dims=5)),
    ):
        expected = fitted(strange)
        assert not torch.allclose(blank(strange), expected)
        blank.load_state_dict(stored(fitted.state_dict()))
        close(blank(strange), expected, 1e-5, type(fitted).__name__)
        for same in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
            close(same(strange), expected, 1e-6)
    with pytest.raises(RuntimeError, match="size mismatch for bank"):
        KNN.fit(rows).load_state_dict(KNN.fit(rows[:, :5]).state_dict())


def test_thresholds_load_the_state_of_others(problem):
    rows, pair = problem.rows(300).float(), problem.pair("elliptic")
    strict = Threshold.fit(penult.scores.directional, rows[:200], pair=pair, false_alarm=0.01)
    loose = Threshold.fit(penult.scores.directional, rows[200:250], pair=copy.deepcopy(pair), false_alarm=0.2)
    loose.load_state_dict(stored(strict.state_dict()))
    assert loose.false_alarm == 0.01
    assert torch.equal(loose.calibration, strict.calibration)
    assert torch.equal(loose.p_value(rows), strict.p_value(rows))
    assert torch.equal(loose(rows), strict(rows))
    assert repr(loose) == repr(strict)
    nested = torch.nn.ModuleDict({"alarm": Threshold(KNN.fit(rows[:50], k=2), torch.arange(60.0), 0.1)})
    nested.load_state_dict(
        torch.nn.ModuleDict({"alarm": Threshold.fit(KNN.fit(rows[:90], k=5), rows[:99])}).state_dict(), assign=True
    )
    assert (nested["alarm"].score.k, nested["alarm"].false_alarm) == (5, 0.05)


def test_a_threshold_keeps_its_rate_in_every_dtype():
    threshold = Threshold(operator.itemgetter((slice(None), 0)), torch.arange(99.0), 0.01)
    assert threshold.half().false_alarm == 0.01
    assert threshold.value == 98.0


def test_states_of_before_the_rate_was_kept_still_load():
    rows = torch.randn(99, 3, generator=torch.Generator().manual_seed(0))
    threshold = Threshold.fit(KNN.fit(rows[:98], k=3), rows, false_alarm=0.1)
    old = {name: value for name, value in threshold.state_dict().items() if not name.endswith("_extra_state")}
    other = Threshold.fit(KNN.fit(rows, k=3), rows[:50], false_alarm=0.1)
    assert not other.load_state_dict(old).missing_keys
    assert torch.equal(other.p_value(rows), threshold.p_value(rows))
    with pytest.raises(RuntimeError, match="calibration"):
        other.load_state_dict({})


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(3), "3 familiar activations cannot keep"),
        (torch.full((99,), torch.nan), "99 of them NaN"),
        (torch.arange(99), "int64"),
    ],
)
def test_states_that_are_no_threshold_are_refused_and_change_nothing(calibration, message):
    threshold = Threshold(torch.nn.Flatten(0), torch.arange(99.0))
    with pytest.raises(ValueError, match=message):
        threshold.load_state_dict({**threshold.state_dict(), "calibration": calibration})
    assert torch.equal(threshold.calibration, torch.arange(99.0))


@pytest.mark.slow
def test_other_processes_give_the_same_numbers(problem):
    """Sent to a process that was spawned: no memory of this one, no tensors, no caches."""
    if problem.device.type != "cpu":
        pytest.skip("pickles are read on the CPU")
    pair, h = problem.pair("elliptic"), problem.rows(120)
    loc = torch.nn.functional.normalize(problem.rows(3).float(), dim=-1)
    law = penult.VonMisesFisher(loc, torch.tensor([0.0, 3.0, 300.0]))
    threshold = Threshold.fit(penult.scores.directional, h, pair=pair)
    given, bank = pair.given(torch.tensor([0, 1])), penult.distributions.Bank(h.float())
    x = law.sample((5,), torch.Generator().manual_seed(0))
    cases = [
        (operator.methodcaller("log_prob", h), pair),
        (operator.methodcaller("log_prob", h.unsqueeze(1)), given),
        (operator.methodcaller("forward", h), pair.head),
        (operator.methodcaller("p_value", h), threshold),
        (operator.methodcaller("log_prob", x), law),
        (operator.attrgetter("mean"), bank),
        (operator.methodcaller("forward", h), KNN.fit(h.float(), k=3)),
        (operator.methodcaller("log_prob", h), problem.pair("mixture")),
    ]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        results = [pool.apply_async(call, (subject,)) for call, subject in cases]
        for (call, subject), result in zip(cases, results, strict=True):
            assert torch.allclose(result.get(120), call(subject), rtol=1e-6, atol=1e-6), subject


# --- files --------------------------------------------------------------------------------------------------


LAWS = {
    "weighted": lambda head, rows: penult.Sphere(
        torch.linspace(0.5, 2, 7, dtype=rows.dtype), log_weights=rows.flatten()[:7]
    ),
    "round": lambda head, rows: penult.Sphere.fit(head, rows),
    "centered": lambda head, rows: penult.Sphere.fit(head, rows, shape="centered", ambient=False),
    "full": lambda head, rows: penult.Gaussian.fit(head, rows),
    "diag": lambda head, rows: penult.Gaussian.fit(head, rows, covariance_type="diag"),
    "class": lambda head, rows: penult.Marginal.fit(head, rows, kind="class"),
    "bank": lambda head, rows: penult.Marginal.fit(head, rows, kind="bank"),
    "flow": lambda head, rows: penult.Marginal(
        head, penult.distributions.NormalizingFlow.fit(rows, epochs=1, components=4, dims=4)
    ),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moved", [None, torch.float32, torch.float64, torch.bfloat16])
def test_a_file_holds_a_pair_to_the_last_bit(law, dtype, moved, tmp_path):
    g = torch.Generator().manual_seed(1)
    head = penult.Head(torch.randn(4, 6, generator=g, dtype=dtype), torch.randn(4, generator=g, dtype=dtype))
    pair = penult.GenerativePair(head, LAWS[law](head, torch.randn(150, 6, generator=g, dtype=dtype)))
    pair = pair if moved is None else pair.to(moved)
    read = penult.load(pair.save(tmp_path / "pair.safetensors"))
    old, new = dict(pair.named_buffers()), dict(read.named_buffers())
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, rtol=0, atol=0, msg=name)
    (h, y), again = (each.sample((9,), generator=torch.Generator().manual_seed(0)) for each in (pair, read))
    assert torch.equal(h, again[0])
    assert torch.equal(y, again[1])
    assert torch.equal(pair.prior.logits, read.prior.logits)
    assert torch.equal(pair.posterior(h).logits, read.posterior(h).logits)
    if pair.base.info.has_density:
        assert torch.equal(pair.log_prob(h), read.log_prob(h))
