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


# ---- Tap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("norm", norms())
@pytest.mark.parametrize("fold", [True, False])
def test_the_head_of_h_is_the_logits(norm, tokens, fold):
    model, tap = make(norm, tokens, fold=fold)
    x = seeded(9, 4, seed=1)
    h, logits = tap(x)
    assert h.shape == (9, 8)
    assert torch.equal(logits, model(x)["logits"])
    assert torch.allclose(tap.head(h), logits, atol=1e-5)
    folded = fold and norm != "none"
    assert (tap.head.norm is not None) == folded
    if folded:
        assert torch.allclose(h.norm(dim=1), torch.full((9,), 8**0.5), rtol=1e-3)


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_gradients_reach_model_and_input(norm):
    model, tap = make(norm)
    model.double()
    x = seeded(3, 4).double().requires_grad_()
    h, logits = tap(x)
    (h.square().sum() * 0.3 + h.sum() + logits.sum()).backward()
    assert x.grad.abs().sum() > 0
    assert model.body.weight.grad.abs().sum() > 0
    assert model.fc.weight.grad.abs().sum() > 0  # the logits are the model's own
    assert torch.autograd.gradcheck(lambda x: tap(x)[0].sin(), (seeded(3, 4).double().requires_grad_(),))


def test_h_is_safe_from_what_the_model_does_next():
    _, tap = make(overwrite=True)
    with torch.no_grad():
        h, logits = tap(seeded(9, 4))
    assert torch.allclose(tap.head(h), logits, atol=1e-5)


def test_arguments_pass_through():
    model, tap = make()
    x = seeded(3, 4)
    assert torch.equal(tap(x, scale=2.0)[1], model(x, 2.0)["logits"])
    assert torch.equal(tap(x=x)[1], tap(x)[1])


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_hooks_go_even_when_the_model_fails(norm):
    model, tap = make(norm)
    before = hooks(model)
    tap(seeded(2, 4))
    assert hooks(model) == before
    model.fail = True
    with pytest.raises(RuntimeError, match="no more memory"):
        tap(seeded(2, 4))
    assert hooks(model) == before
    model.fail = False
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tap(seeded(2, 5))
    assert hooks(model) == before
    assert tap(seeded(2, 4))[0].shape == (2, 8)


def test_nested_taps_do_not_mix():
    _, inner_tap = make()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)
            self.seen = None

        def forward(self, x):
            self.seen, _ = inner_tap(2 * x)
            return self.fc(inner_tap(x)[0])

    outer = Outer()
    h, logits = Tap(outer, find_head(outer, seeded(2, 4)))(seeded(2, 4))
    assert torch.equal(h, inner_tap(seeded(2, 4))[0])
    assert torch.equal(outer.seen, inner_tap(2 * seeded(2, 4))[0])
    assert torch.allclose(outer.fc(h), logits)


def test_training_mode_is_the_models_own():
    model, tap = make("layer")
    tap.train()
    assert model.training
    h, logits = tap(seeded(2000, 4))
    assert torch.allclose(h.norm(dim=1), torch.full((2000,), 8**0.5), rtol=1e-2)  # before the dropout
    assert not torch.allclose(tap.head(h), logits, atol=1e-2)
    _, tap = make()
    tap.train()
    h, logits = tap(seeded(200, 4))
    assert torch.allclose(tap.head(h), logits, atol=1e-5)  # no norm folded: h is after the dropout


def test_a_class_token_after_dropout_in_training_mode_is_refused():
    _, tap = make("layer", tokens=True)
    tap.train()
    with pytest.raises(RuntimeError, match=r"call tap.eval\(\)"):
        tap(seeded(2, 4))
    assert hooks(tap.model) == hooks(make("layer", tokens=True)[0])


def test_a_head_used_several_times():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x, once=False):
            h = self.a(x).relu()
            if once:
                return self.fc(h)
            return self.fc(h + 1) * 0 + self.fc(h), self.fc(h * 2)

    model = Twice()
    tap = Tap(model, find_head(model, seeded(5, 4)))
    assert tap.head.certificate.call == 1
    h, logits = tap(seeded(5, 4))
    assert torch.allclose(tap.head(h), logits, atol=1e-6)
    with pytest.raises(RuntimeError, match="'fc' ran 1 times in this forward, but its call number 1"):
        tap(seeded(5, 4), once=True)


def test_wrappers_are_opened():
    model, tap = make()
    x = seeded(4, 4)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        other = Tap(wrapped, find_head(wrapped, x))
        assert other.model is model
        assert torch.equal(other(x)[0], tap(x)[0])


def test_bad_heads():
    model, tap = make()
    with pytest.raises(ValueError, match=r"no certificate.*find_head\(model, batch\)"):
        Tap(model, Head(model.fc.weight, model.fc.bias))
    with pytest.raises(ValueError, match="no certificate"):
        Tap(model, tap.head.rescaled()[0])
    with pytest.raises(ValueError, match="no module at path 'fc'"):
        Tap(nn.Sequential(nn.Linear(4, 3)), tap.head)
    model.fc = nn.Linear(8, 7)
    with pytest.raises(ValueError, match=r"at 'fc' is \(7, 8\), but the head was found as \(3, 8\)"):
        Tap(model, tap.head)


def test_derived_heads_can_be_tapped():
    model, tap = make("layer")
    h, logits = Tap(model, tap.head.with_temperature(2.0))(seeded(5, 4))
    assert torch.allclose(tap.head.with_temperature(2.0)(h), logits / 2, atol=1e-5)
    h, logits = Tap(model, tap.head.centered())(seeded(5, 4))
    assert torch.allclose(tap.head.centered()(h).softmax(1), logits.softmax(1), atol=1e-5)


def test_moving_a_tap_moves_both_and_keeps_one_weight():
    model, tap = make()
    assert tap.head.weight.data_ptr() == model.fc.weight.data_ptr()
    tap.double()
    assert model.fc.weight.dtype == tap.head.weight.dtype == tap.head.mean_row.dtype == torch.float64
    assert tap.head.weight.data_ptr() == model.fc.weight.data_ptr()
    assert tap.head.bias.data_ptr() == model.fc.bias.data_ptr()
    h, logits = tap(seeded(3, 4).double())
    assert torch.allclose(tap.head(h), logits)
    other = copy.deepcopy(tap)
    assert torch.equal(other(seeded(3, 4).double())[0], h)
    warm = Tap(model, tap.head.with_temperature(2.0)).float()
    assert torch.allclose(warm.head.weight, model.fc.weight / 2)


def test_half_precision_model_with_folded_norm():
    model = Net(nn.LayerNorm(8)).eval().bfloat16()
    tap = Tap(model, find_head(model, seeded(5, 4).bfloat16()))
    assert tap.head.norm == "layer"
    h, logits = tap(seeded(9, 4).bfloat16())
    assert h.dtype == tap.head.weight.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert torch.allclose(tap.head(h), logits.float(), rtol=0.05, atol=0.05 * logits.abs().max().item())


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
