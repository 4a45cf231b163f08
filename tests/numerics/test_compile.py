"""Whole graphs: what a pair, its laws and its scores compute is captured by torch.compile without a break."""

import shutil

import pytest
import torch

import penult
from tiers import thin

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(autouse=True)
def _fresh_graphs(compiler):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *thin([("elliptic", "directional"), ("elliptic", "given"), ("elliptic", "log_prob")], [("elliptic", "given")]),
        ("gaussian", "log_joint"),
        *thin([("mixture", name) for name in ("given", "log_prob", "prior", "posterior")], [("mixture", "prior")]),
    ],
)
def test_a_pair_that_was_never_used_compiles_whole(problem, kind, name, laws_of, close):
    pair, h = problem.pair(kind), problem.rows()
    fresh = penult.GenerativePair(pair.head, problem.base(kind, pair.head, problem.rows()))
    found = compiled(laws_of(fresh)[name])(h)
    close(found, laws_of(pair)[name](h), problem.tolerance, name)
    close(laws_of(fresh)[name](h), laws_of(pair)[name](h), problem.tolerance, name)  # and is as good as new afterwards


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data-free", "span"])
def test_all_laws_in_one_graph(problem, kind, laws_of, close):
    pair, h = problem.pair(kind), problem.rows()

    def everything(x):
        return [law(x) for law in laws_of(fresh).values()]

    fresh = penult.GenerativePair(pair.head, pair.base)
    for found, law in zip(compiled(everything)(h), laws_of(pair).values(), strict=True):
        close(found, law(h), problem.tolerance)


@pytest.mark.slow
def test_flows_compile_whole(problem, close):
    pytest.importorskip("zuko")
    head, rows = problem.head(dim=3), problem.rows(200, 3).to(torch.promote_types(problem.dtype, torch.float32))
    law = penult.distributions.NormalizingFlow.fit(rows, components=2, iterations=5, epochs=0)
    pair = penult.GenerativePair(head, penult.Marginal(head, law, samples=1000))
    close(compiled(pair.log_prob)(rows), pair.log_prob(rows), 1e-5)


@pytest.mark.slow
def test_one_graph_serves_several_pairs(problem, close):
    first, second = problem.pair("elliptic"), problem.pair("elliptic", problem.head(seed=7))
    h = problem.rows()
    score = compiled(penult.scores.directional)
    for _ in range(2):
        for pair in (first, second):
            close(score(pair, h), penult.scores.directional(pair, h), problem.tolerance)


@pytest.mark.slow
def test_a_graph_follows_a_base_once_code_that_is_not_compiled_has_met_the_change(problem, close):
    pair, h = problem.pair("elliptic"), problem.rows()
    score = compiled(lambda x: penult.scores.directional(pair, x))
    before = score(h)
    pair.base.loc.add_(1.0)
    expected = penult.scores.directional(pair, h)
    assert not torch.allclose(before, expected)
    close(score(h), expected, problem.tolerance)


def test_a_moved_and_a_loaded_pair_compile_anew(problem, close):
    pair, h = problem.pair("elliptic"), problem.rows().float()
    score = compiled(lambda x: penult.scores.directional(pair, x))
    close(score(h), penult.scores.directional(pair, h), 2e-5)
    other = problem.pair("elliptic", problem.head(seed=7))
    if len(other.base.radius) == len(pair.base.radius):
        pair.load_state_dict(other.state_dict())
        close(score(h), penult.scores.directional(other, h), 2e-5)
    pair.double() if problem.device.type != "mps" else pair.float()
    close(score(h), penult.scores.directional(pair, h), 2e-5)


def test_labels_are_data_in_a_graph(problem, close):
    pair, h = problem.pair("elliptic"), problem.rows()
    given = compiled(lambda y, x: pair.given(y).log_prob(x.unsqueeze(-2)))
    for y in (LABELS, LABELS.flip(0)):
        close(given(y.to(h.device), h), pair.given(y).log_prob(h.unsqueeze(-2)), problem.tolerance)


@pytest.mark.slow
def test_under_autocast_and_without(problem, close):
    pair, h = problem.pair("elliptic"), problem.rows()
    score, expected = compiled(lambda x: penult.scores.directional(pair, x)), penult.scores.directional(pair, h)
    close(score(h), expected, problem.tolerance)
    with torch.autocast(h.device.type, dtype=torch.bfloat16):
        close(score(h), expected, problem.tolerance)


def test_fitted_scores_compile_whole(problem, scores_of, close):
    h = problem.rows()
    for name, score in scores_of(problem.head(), problem.rows(100)).items():
        close(compiled(score)(h), score(h), 10 * problem.tolerance, name)


@pytest.mark.slow
def test_thresholds_compile_whole(problem):
    pair, h = problem.pair("elliptic"), problem.rows(200)
    threshold = penult.scores.Threshold.fit(penult.scores.directional, h[:100], pair=pair)
    assert torch.equal(compiled(threshold)(h), threshold(h))
    assert torch.equal(compiled(threshold.p_value)(h), threshold.p_value(h))


@pytest.mark.slow
def test_gradients_of_graphs(problem, close):
    pair = problem.pair("elliptic")
    h = problem.rows().to(torch.promote_types(problem.dtype, torch.float32)).requires_grad_()

    def law(x):
        return penult.scores.directional(pair, x) + pair.log_prob(x) + pair.given(1).log_prob(x)

    (expected,) = torch.autograd.grad(law(h).sum(), h)
    (found,) = torch.autograd.grad(compiled(law, "aot_eager")(h).sum(), h)
    close(found, expected, 10 * problem.tolerance)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_gives_the_same_numbers(problem, close):
    pair, h = problem.pair("elliptic"), problem.rows()

    def both(x):
        return penult.scores.directional(pair, x), pair.log_prob(x)

    for found, expected in zip(compiled(both, "inductor")(h), both(h), strict=True):
        close(found, expected, problem.tolerance)
