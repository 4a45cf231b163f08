import sys
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from penult.activations import Activations, Tap, extract
from penult.head import find_head
from zoo import mlp, seeded, shake


class Net(nn.Module):
    """With layers that differ between training and evaluation."""

    def __init__(self):
        super().__init__()
        self.body, self.bn, self.drop, self.fc = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.fail = False

    def forward(self, x, scale=None):
        if self.fail:
            raise RuntimeError("no more memory, say")
        h = self.bn(self.body(x)).relu()
        return {"logits": self.fc(self.drop(h if scale is None else h * scale))}


def make():
    model = shake(Net()).eval()
    return model, Tap(model, find_head(model, seeded(5, 4)))


def token_tap():
    model = shake(nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 3)))
    return Tap(model, find_head(model, torch.arange(10).reshape(2, 5) % 7))


class Tagger(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(7, 8), nn.Linear(8, classes)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.fc(self.embedding(input_ids))}


def tagger(classes=7):
    model = shake(Tagger(classes))
    return Tap(model, find_head(model, torch.arange(10).reshape(2, 5) % 7))


class Unsized:
    """Batches that do not know their number."""

    def __init__(self, batches, error):
        self.batches, self.error = batches, error

    def __len__(self):
        raise self.error

    def __iter__(self):
        return iter(self.batches)


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
        "a mapping that is no dict": ([UserDict(pixel_values=a, labels=b) for a, b in parts], True),
        "data loader": (DataLoader(TensorDataset(x, y), batch_size=3), True),
        "generator": (((a, b.int()) for a, b in parts), True),
        "stream without a length": (Unsized(parts, TypeError), True),
        "stream whose length is not implemented": (Unsized(parts, NotImplementedError), True),
        "stream whose data set has no length": (Unsized(parts, AttributeError), True),
    }


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("name", loaders())
def test_any_loader(name, disk, tmp_path):
    loader, labelled = loaders()[name]
    _, tap = make()
    acts = extract(tap, loader, tmp_path / "new" / "acts" if disk else None)
    assert repr(acts).endswith("shards=1)") == disk
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


def test_hugging_face_batches():
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(10).reshape(2, 5) % 7
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3})
    assert torch.equal(extract(tagger(), [batch]).labels, (ids % 3).flatten())
    images = transformers.BatchFeature({"pixel_values": seeded(2, 4), "labels": torch.tensor([0, 1])})
    assert extract(make()[1], [images]).labels.tolist() == [0, 1]


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
    assert not [hook for module in tap.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tensors_are_ordinary_ones(outer):
    with outer():
        acts = extract(make()[1], [(seeded(2, 4), torch.tensor([0, 1]))])
    weight = seeded(8, 3).requires_grad_()
    (acts.activations @ weight + acts.logits).square().sum().backward()
    assert weight.grad.abs().sum() > 0
    assert not acts.labels.is_inference()


def test_a_model_that_keeps_something_can_be_trained_on():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc, self.table = nn.Linear(4, 8), nn.Linear(8, 3), {}

        def forward(self, x):
            table = self.table.setdefault(len(x), torch.arange(8.0) / len(x))
            return self.fc(self.body(x) * table)

    model = shake(Positions())
    extract(Tap(model, find_head(model, seeded(5, 4))), [seeded(7, 4)])
    model(seeded(7, 4)).sum().backward()  # in inference mode, the table for seven could not be saved for this
    assert model.body.weight.grad is not None


def test_a_model_that_writes_to_its_output_again():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)
            self.out = torch.zeros(2, 3)

        def forward(self, x):
            return self.out.copy_(self.fc(self.body(x))) if len(x) == 2 else self.fc(self.body(x))

    model = shake(Buffered())
    tap = Tap(model, find_head(model, seeded(5, 4)))
    acts = extract(tap, [seeded(2, 4), seeded(2, 4, seed=1)])
    assert torch.allclose(tap.head(acts.activations), acts.logits, atol=1e-5)


def test_rows_do_not_keep_what_they_were_cut_from():
    from penult.activations._batch import Reader

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.body(x)[-1])  # (100, B, 8) -> (B, 8)

    model = shake(Last())
    tap = Tap(model, find_head(model, seeded(100, 5, 4)))
    rows = Reader(tap, None, torch.device("cpu")).rows(seeded(100, 5, 4))
    assert rows.activations.untyped_storage().nbytes() == 5 * 8 * 4


def test_gathering_elsewhere(tmp_path):
    _, tap = make()
    acts = extract(tap, [(seeded(2, 4), torch.tensor([0, 1]))], device=torch.device("cpu"))
    assert acts.labels.device.type == "cpu"
    with pytest.raises(ValueError, match=r"device=cpu is for rows in memory, but out=.* is a folder"):
        extract(tap, [seeded(2, 4)], tmp_path, device="cpu")


def test_class_names(tmp_path):
    _, tap = make()
    for out in (None, tmp_path):
        assert extract(tap, [seeded(2, 4)], out, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="class_names has 2 names; expected 3"):
        extract(tap, [seeded(2, 4)], class_names=("a", "b"))


# ---- which rows --------------------------------------------------------------------------------------------


def test_tokens_become_rows():
    tap, ids = token_tap(), torch.arange(10).reshape(2, 5) % 7
    acts = extract(tap, [(ids, ids % 3), (ids[:1], ids[:1] % 3)])
    assert acts.activations.shape == (15, 8)
    assert torch.equal(acts.labels, torch.cat([ids, ids[:1]]).flatten() % 3)
    assert torch.allclose(acts.logits[7], tap.model(ids)[1, 2])


def test_pixels_become_rows(tmp_path):
    model = shake(nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 3, 1)))
    x, y = seeded(2, 2, 4, 5), torch.arange(40).reshape(2, 4, 5) % 3
    y[0, 0, :2] = -100
    tap = Tap(model, find_head(model, x))
    for out in (None, tmp_path):
        acts = extract(tap, [(x, y)], out)
        assert acts.activations.shape == (38, 8)
        assert torch.equal(acts.labels, y.flatten()[2:])
        assert torch.allclose(acts.logits[0], model(x)[0, :, 0, 2], atol=1e-6)
        assert torch.allclose(tap.head(acts.activations), acts.logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_ignored_labels(dtype):
    _, tap = make()
    x = seeded(6, 4)
    batches = [(x[:4], torch.tensor([0, -100, 2, -100], dtype=dtype)), (x[4:], torch.tensor([-100, 1], dtype=dtype))]
    acts = extract(tap, batches)
    assert acts.labels.tolist() == [0, 2, 1]
    assert torch.allclose(acts.activations, extract(tap, [x]).activations[torch.tensor([0, 2, 5])], atol=1e-6)


def test_bytes_know_no_ignored_label():
    with pytest.raises(ValueError, match=r"labels\[0\] is 156"):  # -100 in eight bits
        extract(make()[1], [(seeded(1, 4), torch.tensor([156], dtype=torch.uint8))])


def test_attention_mask():
    ids = torch.arange(10).reshape(2, 5) % 7
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    labels = (ids + 1) % 7
    labels[0, 1], labels[0, 3] = -100, 99  # what is masked may be anything
    acts = extract(tagger(), [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    assert acts.labels.tolist() == [1, 3, 0, 1, 2, 3]
    assert len(extract(tagger(), [{"input_ids": ids, "attention_mask": mask.bool()}])) == 7
    whole = extract(tagger(), [ids]).activations
    assert torch.equal(extract(tagger(), [{"input_ids": ids, "attention_mask": mask}]).activations[3], whole[6])


def test_a_mask_of_another_shape_is_the_models_own_affair():
    class Pooled(Tagger):
        def forward(self, input_ids, attention_mask):
            h = (self.embedding(input_ids) * attention_mask[..., None]).sum(1)
            return self.fc(h)

    model, ids = shake(Pooled()), torch.arange(10).reshape(2, 5) % 7
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    tap = Tap(model, find_head(model, ids, torch.ones_like(ids)))
    assert len(extract(tap, [{"input_ids": ids, "attention_mask": mask}])) == 2


def test_labels_that_are_the_inputs():
    ids = torch.arange(10).reshape(2, 5) % 7
    padded = ids.masked_fill(torch.tensor([[False] * 5, [False] * 3 + [True] * 2]), -100)
    for labels in (ids, padded):
        with pytest.raises(ValueError, match=r"labels are the input_ids of the batch.*-100 at the end"):
            extract(tagger(), [{"input_ids": ids, "labels": labels}])
    shifted = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    acts = extract(tagger(), [{"input_ids": ids, "labels": shifted}])
    assert torch.equal(acts.labels, ids[:, 1:].flatten())


@pytest.mark.parametrize("out", [False, True])
def test_nothing_left(out, tmp_path):
    with pytest.raises(ValueError, match=r"no sample of 2 batches is left: every label is -100"):
        extract(make()[1], [(seeded(2, 4), torch.tensor([-100, -100]))] * 2, tmp_path if out else None)
    assert list(tmp_path.iterdir()) == []


BAD = [
    ([], ValueError, "loader has no batch"),
    ([(seeded(1, 4), torch.tensor([0])), seeded(2, 4)], ValueError, "batch 1 .*has no labels"),
    ([seeded(2, 4), (seeded(1, 4), torch.tensor([0]))], ValueError, "batch 1 .*has labels, but none"),
    (
        [(seeded(2, 4), torch.tensor([0, 1])), (seeded(2, 4), torch.tensor([0, 3]))],
        ValueError,
        r"labels\[3\] is 3, out of range .*expected 0 to 2",
    ),
    ([(seeded(2, 4), torch.tensor([0, -1]))], ValueError, r"labels\[1\] is -1"),
    *(
        ([(seeded(3, 4), torch.tensor([-100, 0, ignored]))], ValueError, r"Samples to leave out have the label -100")
        for ignored in (-1, 255, 3)
    ),
    ([(seeded(2, 4), torch.tensor([[0], [1]]))], ValueError, r"labels has shape \(2, 1\)"),
    ([(seeded(2, 4), torch.tensor([0]))], ValueError, r"labels has shape \(1,\)"),
    ([(seeded(2, 4), torch.tensor([0.0, 1.0]))], TypeError, r"labels is a torch\.float32 tensor"),
    ([(seeded(2, 4), torch.tensor([True, False]))], TypeError, r"labels is a torch\.bool tensor"),
    ([(seeded(2, 4), ["cat", "dog"])], TypeError, "labels is a list"),
    (["x"], TypeError, "batch is a str"),
    ([("x", 1)], TypeError, "a tuple that begins with a str"),
    ([{"label": torch.tensor([1])}], TypeError, r"a dict with keys \['label'\]"),
    ([()], TypeError, "batch is a tuple;"),
]


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(("batches", "error", "words"), BAD)
def test_bad_loaders(batches, error, words, disk, tmp_path):
    _, tap = make()
    with pytest.raises(error, match=words):
        extract(tap, batches, tmp_path if disk else None)


# ---- half precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, tmp_path):
    _, tap = make()
    batches = [(x, torch.arange(4) % 3) for x in seeded(12, 4).split(4)]
    wide = extract(tap, batches)
    for out in (None, tmp_path):
        acts = extract(tap, batches, out, dtype=dtype)
        assert acts.dtype == acts.activations.dtype == acts.logits.dtype == dtype
        assert torch.equal(acts.activations, wide.activations.to(dtype))
        assert torch.equal(acts.logits, wide.logits.to(dtype))
        assert torch.equal(acts.labels, wide.labels)


@pytest.mark.parametrize("scale", [1e7, -1e7])
def test_overflow(scale, tmp_path):
    model = mlp()
    tap = Tap(model, find_head(model, seeded(5, 4)))
    x = torch.eye(4) * scale
    for out in (None, tmp_path):
        with pytest.raises(
            ValueError,
            match=r"activations holds -?[\d.e+]+, but the largest torch.float16 is 65504. Use dtype=torch.bfloat16",
        ):
            extract(tap, [x], out, dtype=torch.float16)
    assert extract(tap, [x], dtype=torch.bfloat16).activations.isfinite().all()


def test_infinity_of_the_models_own_is_no_overflow():
    model = mlp(nn.Threshold(-1e9, 0.0))
    tap = Tap(model, find_head(model, seeded(5, 4)))
    x = seeded(2, 4)
    x[0, 0] = float("inf")
    assert not extract(tap, [x], dtype=torch.float16).activations.isfinite().all()


def test_bad_options(tmp_path):
    _, tap = make()
    with pytest.raises(TypeError, match=r"dtype is torch\.int8; .*floating"):
        extract(tap, [seeded(2, 4)], dtype=torch.int8)
    with pytest.raises(TypeError, match="float8_e5m2, which cannot be stored; convert to one of float16"):
        extract(tap, [seeded(2, 4)], tmp_path, dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match="shard_size is 0; expected an integer of at least 1"):
        extract(tap, [seeded(2, 4)], tmp_path, shard_size=0)


# ---- progress ----------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(seeded(4, 4))


def test_progress_of_ones_own(tmp_path):
    _, tap = make()
    seen = []
    for out in (None, tmp_path):
        extract(tap, [seeded(2, 4)] * 3, out, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 3), (2, 3), (3, 3)]
        seen.clear()
    for loader in (DataLoader(Stream(), batch_size=2), (seeded(2, 4) for _ in range(2))):
        extract(tap, loader, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, None), (2, None)]
        seen.clear()


def test_bar(tmp_path, capsys, monkeypatch):
    _, tap = make()
    batches = [seeded(2, 4)] * 3

    def printed(*args, **kwargs):
        assert isinstance(extract(tap, batches, *args, **kwargs), Activations)
        out, err = capsys.readouterr()
        assert out == ""
        return err

    assert "3/3" in printed(progress=True)
    with monkeypatch.context() as patch:
        patch.setattr("penult._progress._SECONDS_BETWEEN_LINES", 0)
        assert "batches 1/3\nbatches 2/3\n" in printed(progress=True)  # where no bar is drawn
    assert printed() == printed(tmp_path / "a") == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert printed() == ""
    assert "3/3" in printed(tmp_path / "b")
    assert "3/3" in printed(tmp_path / "b")  # it is there already
    assert printed(tmp_path / "c", progress=False) == ""
    monkeypatch.setattr(sys, "stderr", None)
    extract(tap, batches, tmp_path / "d")


@pytest.mark.filterwarnings("ignore:the weight of the model's head")
def test_a_head_that_is_not_the_models_any_more(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    tap = Tap(model, find_head(model, torch.randn(5, 4)))  # the norm is folded, so that the head is a copy
    with torch.no_grad():
        model[2].weight.mul_(3)
    for out in (None, tmp_path / "acts"):
        with pytest.raises(ValueError, match=r"the head does not give the model's logits.*Find the head again"):
            extract(tap, [torch.randn(5, 4)], out)


def test_a_model_is_no_tap():
    with pytest.raises(TypeError, match=r"tap is a Linear; expected a penult\.Tap\. Make one .*penult\.Tap\(model"):
        extract(nn.Linear(4, 3), [torch.randn(5, 4)])
