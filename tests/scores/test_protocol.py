"""Functions and modules wherever a score is taken, and the state and files of scores."""

import functools

import pytest
import torch

import penult
from penult import io, scores
from penult.scores import (
    KNN,
    Composite,
    Mahalanobis,
    PairScore,
    RelativeMahalanobis,
    Score,
    ViM,
    _bound,
    _score_from_state,
    _score_state,
)

FUNCTIONS = ["density", "directional", "energy", "max_logit", "msp"]


@functools.cache
def fitted():
    """A pair, the fitted scores by kind, and activations."""
    g = torch.Generator().manual_seed(0)
    head = penult.Head(torch.randn(5, 8, generator=g), torch.randn(5, generator=g))
    h = torch.randn(300, 8, generator=g)
    pair = penult.GenerativePair(head, penult.Sphere.fit(head, h, shape="elliptic"))
    made = [
        Composite.fit(pair, h),
        Mahalanobis.fit(h, head=head, normalize=True),
        RelativeMahalanobis.fit(h, head=head),
        KNN.fit(h, k=3),
        ViM.fit(head, h),
    ]
    return pair, {score.kind: score for score in made}, torch.randn(50, 8, generator=g)


KINDS = ["composite", "mahalanobis", "relative_mahalanobis", "knn", "vim"]


# --- functions of activations -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_a_pair_become_functions_of_activations(name):
    pair, _, h = fitted()
    function = getattr(scores, name)
    score = _bound(function, pair)
    assert isinstance(score, PairScore)
    assert score.in_features == 8
    assert torch.equal(score(h), function(pair, h))
    with pytest.raises(TypeError, match=f"{name} is a score of a pair"):
        _bound(function)


def test_other_scores_stay_as_they_are():
    pair, by_kind, h = fitted()
    for score in (*by_kind.values(), torch.nn.Flatten(0), lambda h: h.norm(dim=-1), torch.linalg.vector_norm):
        assert _bound(score, pair) is score

    def own(pair, h, power=2):
        return pair.log_prob(h) ** power

    assert torch.equal(_bound(own, pair)(h), own(pair, h))
    with pytest.raises(TypeError, match=r"score is a str.*expected a penult.scores.Score or a function"):
        _bound("directional", pair)


# --- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_scores_are_rebuilt_from_their_state_alone(kind):
    pair, by_kind, h = fitted()
    name, tensors = _score_state(by_kind[kind])
    assert name == kind
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    assert not any(key.startswith("head") for key in tensors)
    again = _score_from_state(name, tensors, pair)
    assert torch.equal(again(h), by_kind[kind](h))
    assert again.reference == by_kind[kind].reference is not None
    assert repr(again) == repr(by_kind[kind])
    assert again.state_dict().keys() == by_kind[kind].state_dict().keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_rebuilt_from_their_name(name):
    pair, _, h = fitted()
    function = getattr(scores, name)
    for score in (function, PairScore(function, pair)):
        assert _score_state(score) == (name, {})
    assert torch.equal(_score_from_state(name, {}, pair)(h), function(pair, h))


class Own(Score):
    kind = "own"
    in_features = 8

    def score(self, h):
        return h.norm(dim=-1)


def directional(pair, h):
    """A function that has only the name of one of penult's."""
    return h.norm(dim=-1)


@pytest.mark.parametrize("score", [Own(), directional, torch.linalg.vector_norm, torch.nn.Linear(8, 1)])
def test_other_scores_have_no_state(score):
    with pytest.raises(TypeError, match=r"not one of penult's.*expected one of density, .*Composite"):
        _score_state(score)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_state(kind):
    pair, by_kind, _ = fitted()
    _, tensors = _score_state(by_kind[kind])
    name = next(iter(by_kind[kind]._shapes))
    wrong = [
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: tensors[name][..., None]},
        tensors | {name: tensors[name][..., :-1] if name != "residual" else tensors[name][:-1]},
        tensors | {name: torch.full_like(tensors[name], torch.nan)},
        tensors | {"surplus": torch.zeros(2)},
        tensors | {"reference": torch.tensor([255, 255], dtype=torch.uint8)},
    ]
    for state in wrong:
        with pytest.raises(ValueError, match=r"expected|has no surplus|NaN|decode"):
            _score_from_state(kind, state, pair)
    with pytest.raises(ValueError, match=r"kind of the score is 'other'; expected one of density"):
        _score_from_state("other", tensors, pair)


def test_neighbours_need_their_number():
    pair, by_kind, _ = fitted()
    _, tensors = _score_state(by_kind["knn"])
    with pytest.raises(ValueError, match="k is 400; expected 1 to 300"):
        _score_from_state("knn", tensors | {"_extra_state": torch.tensor(400)}, pair)
    del tensors["_extra_state"]
    with pytest.raises(ValueError, match="_extra_state is missing"):
        _score_from_state("knn", tensors, pair)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, *FUNCTIONS])
def test_files_hold_pair_and_score(tmp_path, kind):
    pair, by_kind, h = fitted()
    score = by_kind.get(kind) or getattr(scores, kind)
    path = scores.save(tmp_path / "net.penult.safetensors", score, pair)
    again = scores.load(path)
    assert torch.equal(again(h), _bound(score, pair)(h))
    assert torch.equal(penult.load(path).log_prob(h), pair.log_prob(h))
    # The score must not be the file, mapped into memory.
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(again(h), _bound(score, pair)(h))


def test_a_file_without_a_score_has_the_usual_one(tmp_path):
    pair, _, h = fitted()
    score = scores.load(pair.save(tmp_path / "net.penult.safetensors"))
    assert torch.equal(score(h), scores.directional(pair, h))


def test_a_threshold_of_a_stored_score_knows_its_reference(tmp_path):
    pair, by_kind, _ = fitted()
    g = torch.Generator().manual_seed(0)
    torch.randn(5, 8, generator=g), torch.randn(5, generator=g)
    reference = torch.randn(300, 8, generator=g)
    score = scores.load(scores.save(tmp_path / "net.penult.safetensors", by_kind["composite"], pair))
    with pytest.raises(ValueError, match="very set that the score of Composite was fitted to"):
        scores.Threshold.fit(score, reference)


def test_scores_of_another_head_are_refused(tmp_path):
    pair, by_kind, h = fitted()
    path = tmp_path / "net.penult.safetensors"
    other = penult.GenerativePair(penult.Head(pair.head.weight + 1, pair.head.bias), pair.base)
    for kind in ("composite", "vim"):
        with pytest.raises(ValueError, match=r"fitted with another head.*pair.head"):
            scores.save(path, by_kind[kind], other)
    with pytest.raises(ValueError, match="dimension 2; expected 8"):
        scores.save(path, KNN.fit(h[:, :2]), pair)
    with pytest.raises(ValueError, match="directional is bound to another pair"):
        scores.save(path, PairScore(scores.directional, other), pair)
    with pytest.raises(TypeError, match="no file can hold it"):
        scores.save(path, Own(), pair)
    assert not path.exists()


def test_damaged_files_name_the_score(tmp_path):
    pair, by_kind, _ = fitted()
    path = scores.save(tmp_path / "net.penult.safetensors", by_kind["composite"], pair)
    file = io.read(path)
    tensors = {name: tensor.clone() for name, tensor in file.tensors.items() if name != "score.means"}
    io.write(path, tensors, "pair", file.metadata)
    with pytest.raises(io.FileFormatError, match=r"score cannot be rebuilt.*means has shape None"):
        scores.load(path)
    assert penult.load(path).head.num_classes == 5
    io.write(path, tensors, "pair", file.metadata | {"score": ["composite"]})
    with pytest.raises(io.FileFormatError, match="score cannot be rebuilt"):
        scores.load(path)
