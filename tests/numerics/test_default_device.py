"""Public calls on CPU tensors work while another device is torch's default; "meta" stands in for an accelerator."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

import penult
from penult import distill, realism, scores

SOURCE = Path(penult.__file__).parent
FACTORIES = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "triu_indices", "tril_indices", "zeros",
}  # fmt: skip


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).eval()
        return model, torch.randn(300, 8)


@pytest.fixture
def on_meta(network):
    """The model, inputs, labels, head and activations, with "meta" as the default device."""
    model, x = network
    y = model(x).argmax(1)
    with default_device("meta"):
        head = penult.find_head(model, x[:16])
        acts = penult.extract(penult.Tap(model, head), [(x[:150], y[:150]), (x[150:], y[150:])])
        yield head, acts


def bases(head, h):
    yield "data-free", penult.Sphere.from_head(head)
    yield "elliptic", penult.Sphere.fit(head, h, shape="elliptic")
    yield "gaussian", penult.Gaussian.fit(head, h)
    for kind in ("mixture", "class", "bank"):
        yield (
            kind,
            penult.Marginal.fit(head, h, kind=kind, components=2)
            if kind == "mixture"
            else (penult.Marginal.fit(head, h, kind=kind)),
        )


def test_pairs(on_meta, tmp_path):
    head, acts = on_meta
    h, generator = acts.activations, torch.Generator("cpu").manual_seed(0)
    for name, base in bases(head, h):
        pair = penult.GenerativePair(head, base)
        assert pair.posterior(h).probs.device.type == "cpu"
        sampled, labels = pair.sample(5, generator=generator)
        assert sampled.device.type == labels.device.type == "cpu"
        p = pair.given(torch.tensor([1, 2], device="cpu"))
        assert p.sample(3, generator=generator).shape == (3, 2, 16)
        if name != "bank":
            assert pair.log_prob(h).isfinite().all()
            assert p.log_prob(h[:2]).isfinite().all()
        pair.save(tmp_path / f"{name}.penult.safetensors")
        read = penult.load(tmp_path / f"{name}.penult.safetensors")
        assert torch.equal(read.prior.probs, pair.prior.probs)


def test_activations(on_meta, tmp_path):
    _, acts = on_meta
    acts.save(tmp_path / "acts")
    stored = penult.Activations.open(tmp_path / "acts")
    assert [len(part) for part in stored.split(0.5, 0.5)] == [150, 150]
    assert sum(len(part) for part in stored.batches(70)) == 300
    assert len(acts[acts.labels == 0]) == int((acts.labels == 0).sum())


def test_scores(on_meta):
    head, acts = on_meta
    h, y = acts.activations, acts.labels
    pair = penult.GenerativePair(head, penult.Sphere.fit(head, h, shape="elliptic"))
    for score in (scores.directional, scores.energy, scores.max_logit, scores.msp, scores.density):
        assert score(pair, h).device.type == "cpu"
    for fitted in (scores.Mahalanobis.fit(h, y), scores.RelativeMahalanobis.fit(h, y), scores.KNN.fit(h[:100])):
        assert fitted(h).device.type == "cpu"
    assert scores.ViM.fit(head, h)(h).device.type == "cpu"
    threshold = scores.Threshold.fit(scores.energy, h[150:], pair=pair, false_alarm=0.1)
    assert threshold(h).dtype == torch.bool
    assert threshold.p_value(h).device.type == "cpu"


def test_distillation(on_meta):
    head, acts = on_meta
    pair = penult.GenerativePair(head, penult.Gaussian.fit(head, acts.activations))
    targets = distill.targets(pair, acts.labels)
    assert targets.device.type == "cpu"
    assert distill.SoftTargetLoss()(acts.logits, acts.labels, targets).isfinite()
    assert distill.Gate.fit(pair, acts).trust > 0
    loss = distill.ActivationLoss(pair, in_features=4)
    assert all(parameter.device.type == "cpu" for parameter in loss.parameters())


@pytest.mark.slow
def test_realism(on_meta):
    head, acts = on_meta
    pair = penult.GenerativePair(head, penult.Gaussian.fit(head, acts.activations))
    assert 0 <= realism.compare(pair, acts).auc["mlp"] <= 1


def test_every_tensor_is_made_on_a_stated_device():
    """A factory without ``device=`` follows torch's default device, which may be another than that of the data."""
    unstated = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if getattr(node.func.value, "id", None) != "torch" or node.func.attr not in FACTORIES:
                continue
            if not any(keyword.arg in ("device", None) for keyword in node.keywords):
                unstated.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert not unstated
