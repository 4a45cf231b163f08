import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from penult.activations import Activations, Tap, extract
from penult.head import Head, find_head


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A small classifier: body, maybe a norm, dropout, head; with a class token if wanted."""

    def __init__(self, norm=None, tokens=False, overwrite=False):
        super().__init__()
        self.body, self.bn = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.norm = nn.Identity() if norm is None else norm
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 3)
        self.tokens, self.overwrite = tokens, overwrite
        self.fail = False
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(seeded(*p.shape, seed=i))

    def forward(self, x, scale=None):
        if self.fail:
            raise RuntimeError("no more memory, say")
        h = self.bn(self.body(x)).relu() if isinstance(self.norm, nn.Identity) else self.body(x)
        h = h if scale is None else h * scale
        if self.tokens:
            h = torch.stack([h, 2 * h + 1, h.flip(-1)], dim=1)
            h = self.norm(h)[:, 1]
        else:
            h = self.norm(h)
        h = self.drop(h)
        logits = self.fc(h)
        if self.overwrite:
            h.zero_()
        return {"logits": logits}


def norms():
    return {
        "none": None,
        "layer": nn.LayerNorm(8),
        "layer, no bias": nn.LayerNorm(8, bias=False),
        "plain layer": nn.LayerNorm(8, elementwise_affine=False),
        "rms": nn.RMSNorm(8),
    }


def make(norm=None, tokens=False, overwrite=False, fold=True):
    model = Net(norms()[norm or "none"], tokens, overwrite).eval()
    return model, Tap(model, find_head(model, seeded(5, 4), fold=fold))


# ---- extract ----------------------------------------------------------------------------------------------


def loaders():
    x, y = seeded(10, 4), torch.arange(10) % 3
    parts = list(zip(x.split(4), y.split(4), strict=True))
    return {
        "tensors": (list(x.split(4)), False),
        "one tuples": ([(a,) for a in x.split(4)], False),
        "pairs": (parts, True),
        "lists with more": ([[a, b, "path"] for a, b in parts], True),
        "no labels": ([(a, None) for a in x.split(4)], False),
        "image, label": ([{"image": a, "label": b, "path": ["p"] * len(a)} for a, b in parts], True),
        "pixel_values, labels": ([{"labels": b, "pixel_values": a} for a, b in parts], True),
        "keywords": ([{"x": a, "scale": torch.ones(()), "y": b} for a, b in parts], True),
        "data loader": (DataLoader(TensorDataset(x, y), batch_size=3), True),
        "generator": (((a, b.int()) for a, b in parts), True),
    }


@pytest.mark.parametrize("name", loaders())
def test_any_loader(name):
    loader, labelled = loaders()[name]
    _, tap = make()
    acts = extract(tap, loader)
    x, y = seeded(10, 4), torch.arange(10) % 3
    with torch.no_grad():
        h, logits = tap(x)
    assert torch.allclose(acts.activations, h, atol=1e-6)
    assert torch.allclose(acts.logits, logits, atol=1e-6)
    assert not acts.logits.requires_grad
    assert not acts.activations.requires_grad
    if labelled:
        assert torch.equal(acts.labels, y)
        assert acts.labels.dtype == torch.int64
    else:
        assert acts.labels is None


def test_eval_mode_for_the_time_of_it():
    model, tap = make()
    model.train()
    model.bn.eval()
    flags = [module.training for module in tap.modules()]
    buffers = [b.clone() for b in model.buffers()]
    rng = torch.get_rng_state()
    first, second = (extract(tap, [seeded(5, 4)]) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert [module.training for module in tap.modules()] == flags
    model.fail = True
    with pytest.raises(RuntimeError, match="no more memory"):
        extract(tap, [seeded(5, 4)])
    assert [module.training for module in tap.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def test_progress():
    _, tap = make()
    seen = []
    extract(tap, [seeded(2, 4)] * 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(seeded(4, 4))

    for loader in (DataLoader(Stream(), batch_size=2), iter_without_length()):
        seen.clear()
        extract(tap, loader, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, None), (2, None)]


def iter_without_length():
    yield seeded(2, 4)
    yield seeded(1, 4)


def test_gathering_elsewhere():
    _, tap = make()
    acts = extract(tap, [(seeded(2, 4), torch.tensor([0, 1]))], device=torch.device("cpu"))
    assert acts.labels.device.type == "cpu"


def test_tokens_become_rows():
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 3))
    ids = torch.arange(10).reshape(2, 5) % 7
    tap = Tap(model, find_head(model, ids))
    acts = extract(tap, [(ids, ids % 3), (ids[:1], ids[:1] % 3)])
    assert acts.activations.shape == (15, 8)
    assert torch.equal(acts.labels, torch.cat([ids, ids[:1]]).flatten() % 3)
    assert torch.allclose(acts.logits[7], model(ids)[1, 2])


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], ValueError, "no batch at all"),
        ([(seeded(1, 4), torch.tensor([0])), seeded(2, 4)], ValueError, "batch 1 .*has no labels"),
        ([seeded(2, 4), (seeded(1, 4), torch.tensor([0]))], ValueError, "batch 1 .*has labels, but none"),
        (
            [(seeded(2, 4), torch.tensor([0, 1])), (seeded(2, 4), torch.tensor([0, 3]))],
            ValueError,
            r"labels\[3\] is 3, outside of 0\.\.2",
        ),
        ([(seeded(2, 4), torch.tensor([0, -1]))], ValueError, r"labels\[1\] is -1"),
        ([(seeded(2, 4), torch.tensor([[0], [1]]))], ValueError, r"labels have shape \(2, 1\)"),
        ([(seeded(2, 4), torch.tensor([0]))], ValueError, r"labels have shape \(1,\)"),
        ([(seeded(2, 4), torch.tensor([0.0, 1.0]))], TypeError, r"labels are torch\.float32"),
        ([(seeded(2, 4), torch.tensor([True, False]))], TypeError, r"labels are torch\.bool"),
        ([(seeded(2, 4), ["cat", "dog"])], TypeError, "labels are list"),
        (["x"], TypeError, "a batch is a str"),
        ([("x", 1)], TypeError, "a tuple that begins with a str"),
        ([{"label": torch.tensor([1])}], TypeError, r"a dict with keys \['label'\]"),
        ([()], TypeError, "a batch is a tuple;"),
    ],
)
def test_bad_loaders(batches, error, words):
    _, tap = make()
    with pytest.raises(error, match=words):
        extract(tap, batches)


# ---- Activations -------------------------------------------------------------------------------------------


def some(labels=True, names=None):
    return Activations(seeded(6, 4), seeded(6, 3, seed=1), torch.arange(6) % 3 if labels else None, names)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "index",
    [
        slice(1, 4),
        slice(None, None, 2),
        torch.tensor([5, 0, 0]),
        torch.tensor([True, False] * 3),
        [2, 1],
        slice(0, 0),
    ],
)
def test_indexing(index, labels):
    acts = some(labels, names=("a", "b", "c"))
    part = acts[index]
    assert torch.equal(part.activations, acts.activations[index])
    assert torch.equal(part.logits, acts.logits[index])
    assert (part.labels is None) if not labels else torch.equal(part.labels, acts.labels[index])
    assert part.class_names == ("a", "b", "c")
    assert len(part) == len(acts.activations[index])


def test_a_single_index_is_no_set():
    with pytest.raises(TypeError, match=r"use acts\[2 : 3\]"):
        some()[2]


def test_predicted_and_repr():
    acts = some()
    assert torch.equal(acts.predicted, acts.logits.argmax(1))
    assert repr(acts) == "Activations(N=6, d=4, K=3, labels=True, dtype=torch.float32, device=cpu)"
    assert some(names=["a", "b", "c"]).class_names == ("a", "b", "c")


def test_to():
    acts = some(names=("a", "b", "c"))
    for other in (acts.to(torch.float64), acts.to("cpu", torch.float64), acts.to(dtype=torch.float64)):
        assert other.activations.dtype == other.logits.dtype == torch.float64
        assert other.labels.dtype == torch.int64
        assert other.class_names == acts.class_names
    assert acts.to("cpu").activations is acts.activations


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activations": torch.zeros(6)}, ValueError, r"activations have shape \(6,\)"),
        ({"activations": torch.zeros(5, 4)}, ValueError, r"\(5, 4\) and logits \(6, 3\)"),
        ({"activations": torch.zeros(6, 4).int()}, TypeError, r"activations are torch\.int32"),
        ({"logits": torch.zeros(6, 3).int()}, TypeError, r"logits are torch\.int32"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 0])}, ValueError, r"labels\[3\] is 3"),
        ({"labels": torch.zeros(6, device="cpu").double()}, TypeError, r"torch\.float64"),
        ({"activations": torch.zeros(6, 4, device="meta")}, ValueError, r"one device, not .*meta"),
        ({"class_names": ("a",)}, ValueError, "1 class_names for 3 classes"),
    ],
)
def test_bad_activations(change, error, words):
    fields = {"activations": seeded(6, 4), "logits": seeded(6, 3), "labels": torch.arange(6) % 3}
    with pytest.raises(error, match=words):
        Activations(**(fields | change))


def test_activations_do_not_change():
    with pytest.raises(AttributeError):
        some().labels = None


def test_a_pretend_feature_extractor_agrees():
    # The tap's h is what any forward hook sees, for a layout with functional parts between body and head.
    model, tap = make()
    x = seeded(5, 4)
    expected = F.relu(model.bn(model.body(x)))
    assert torch.allclose(tap(x)[0], expected)
