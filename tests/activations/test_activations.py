import copy
import pickle
from types import MappingProxyType

import numpy
import pytest
import torch

from penult.activations import Activations
from zoo import seeded

NAMES = ("a", "b", "c")
ROW = 4 * (4 + 3) + 8  # bytes


def some(labels=True, names=None, rows=6):
    return Activations(
        seeded(rows, 4), seeded(rows, 3, seed=1), torch.arange(rows) % 3 if labels else None, class_names=names
    )


def same(a, b):
    assert torch.equal(a.activations, b.activations)
    assert torch.equal(a.logits, b.logits)
    assert (a.labels is None) == (b.labels is None)
    assert a.labels is None or torch.equal(a.labels, b.labels)
    assert a.class_names == b.class_names
    assert len(a) == len(b) == len(a.activations)
    assert (a.in_features, a.num_classes, a.dtype) == (b.in_features, b.num_classes, b.dtype)


@pytest.fixture(params=["memory", "one shard", "shards", "parts", "chosen rows"])
def place(request, tmp_path):
    """Puts a set somewhere."""

    def put(acts):
        if request.param == "memory":
            return acts
        if request.param == "one shard":
            return acts.save(tmp_path / "one")
        if request.param == "shards":
            return acts.save(tmp_path / "many", shard_size=2 * ROW)
        if request.param == "parts":
            return Activations.concatenate([acts[:2], acts[2:5].save(tmp_path / "x", shard_size=1), acts[5:]])
        doubled = acts[torch.arange(2 * len(acts)) // 2].save(tmp_path / "twice", shard_size=5 * ROW)
        even = torch.arange(0, 2 * len(acts), 2)
        return Activations._of(doubled._rows.take(even), doubled.class_names)

    return put


@pytest.mark.parametrize("labels", [True, False])
def test_wherever_it_lies_it_is_the_same(place, labels):
    acts = some(labels, names=NAMES)
    found = place(acts)
    same(found, acts)
    assert torch.equal(found.predicted, acts.logits.argmax(1))
    assert repr(found).startswith(f"Activations(N=6, d=4, K=3, labels={labels}, dtype=torch.float32, device=cpu")


INDICES = {
    "slice": slice(1, 4),
    "all": slice(None),
    "from the end": slice(-3, -1),
    "beyond the end": slice(4, 99),
    "backward, so nothing": slice(4, 2),
    "nothing": slice(0, 0),
    "nothing at the end": slice(6, None),
    "step": slice(None, None, 2),
    "indices": torch.tensor([5, 0, 0, -1]),
    "mask": torch.tensor([True, False] * 3),
    "empty mask": torch.zeros(6, dtype=torch.bool),
    "list": [2, 1],
    "ellipsis": ...,
}


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", INDICES)
def test_indexing(place, name, labels):
    acts, index = some(labels, names=NAMES), INDICES[name]
    found = place(acts)[index]
    labels = acts.labels[index] if labels else None
    same(found, Activations(acts.activations[index], acts.logits[index], labels, NAMES))


@pytest.mark.parametrize("index", [3, -3, 99, numpy.int64(3), numpy.uint8(3), torch.tensor(3), numpy.array(3)])
def test_an_integer_is_no_index(index, place):
    start = {99: 99}.get(int(index), 3)
    with pytest.raises(TypeError, match=rf"the index is the integer {int(index)}; .* acts\[{start} : {start + 1}\] is"):
        place(some())[index]


def test_indexing_what_was_indexed(place):
    acts = some(rows=6)
    found = place(acts)
    same(found[1:][:4][2:], acts[3:5])
    same(found[1:5][torch.tensor([3, 0])], acts[torch.tensor([4, 1])])
    same(found[2:2][:5], acts[2:2])


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (2, TypeError, r"acts\[2 : 3\] is a set of one"),
        (torch.tensor([6]), IndexError, "out of (range|bounds)"),
        (torch.tensor([True]), IndexError, "mask"),
        (slice(None, None, -1), ValueError, "step"),
        (torch.tensor([[1]]), ValueError, "shape"),
    ],
)
def test_bad_indices(place, index, error, words):
    with pytest.raises(error, match=words):
        place(some())[index]


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
def test_batches(place, size):
    acts = some(names=NAMES)
    parts = list(place(acts).batches(size))
    assert [len(part) for part in parts] == [min(size, 6 - start) for start in range(0, 6, size)]
    assert all("shards" not in repr(part) for part in parts)
    same(Activations.concatenate(parts), acts)


def test_no_batches(place):
    acts = place(some())
    with pytest.raises(ValueError, match="size is 0; expected an integer of at least 1"):
        acts.batches(0)
    assert list(acts[:0].batches(3)) == []


@pytest.mark.parametrize("shares", [(0.5, 0.5), (1.0,), (0.34, 0.2), (0.01, 0.99), (1 / 3, 1 / 3, 1 / 3)])
def test_split(place, shares):
    acts = Activations(torch.arange(6.0)[:, None].expand(6, 4), seeded(6, 3), torch.arange(6) % 3, NAMES)
    found = place(acts)
    state = torch.get_rng_state()
    parts = found.split(*shares, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    rows = [part.activations[:, 0].tolist() for part in parts]
    assert all(part == sorted(part) for part in rows)
    ends = [round(sum(shares[: i + 1]) * 6) for i in range(len(shares))]
    assert [len(part) for part in rows] == [end - start for start, end in zip([0, *ends], ends, strict=False)]
    together = [row for part in rows for row in part]
    assert len(set(together)) == len(together)
    for part, again in zip(parts, acts.split(*shares, seed=3), strict=True):
        same(part, again)  # wherever it lies
    assert part.class_names == NAMES
    assert [len(half) for half in parts[0][:2].split(0.5, 0.5)] == [1, 1] or len(parts[0]) < 2


def test_split_depends_on_the_seed():
    acts = some(rows=50)
    assert not torch.equal(acts.split(0.5)[0].activations, acts.split(0.5, seed=1)[0].activations)
    assert torch.equal(acts.split(0.5)[0].activations, acts.split(0.5, 0.5)[0].activations)


@pytest.mark.parametrize("shares", [(), (0.0, 0.5), (-0.1,), (0.7, 0.4)])
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="expected positive numbers that sum to at most 1"):
        some().split(*shares)


def test_concatenate(place):
    acts = some(names=NAMES)
    found = place(acts)
    whole = Activations.concatenate([found, found[1:3], acts[:0], acts[4:]])
    same(whole, acts[torch.tensor([0, 1, 2, 3, 4, 5, 1, 2, 4, 5])])
    same(Activations.concatenate(iter([found])), acts)
    same(Activations.concatenate([found[:0], found[:0]]), acts[:0])
    same(whole[5:8], acts[torch.tensor([5, 1, 2])])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Activations(torch.zeros(1, 5), torch.zeros(1, 3), torch.tensor([0]), NAMES), "in_features is 5 there and 4"),
        (Activations(torch.zeros(1, 4), torch.zeros(1, 2), torch.tensor([0])), "num_classes is 2 there and 3"),
        (some(labels=False, names=NAMES), "labels is False there and True in part 0"),
        (some(), r"class_names is None there and \('a', 'b', 'c'\)"),
        (some(names=("a", "b", "d")), "class_names is .*'d'"),
        (some(names=NAMES).to(torch.float16), "^part 2 .*: dtype is torch.float16 .*; logits_dtype is torch.float16"),
    ],
)
def test_parts_that_do_not_fit(place, other, words):
    acts = place(some(names=NAMES))
    with pytest.raises(ValueError, match=words):
        Activations.concatenate([acts, acts, other])


def test_nothing_to_concatenate():
    with pytest.raises(ValueError, match="parts is empty"):
        Activations.concatenate([])


def test_to(place):
    acts = place(some(names=NAMES))
    for other in (acts.to(torch.float64), acts.to("cpu", torch.float64), acts.to(dtype=torch.float64)):
        assert other.activations.dtype == other.logits.dtype == other.dtype == torch.float64
        assert other.labels.dtype == torch.int64
        assert other.class_names == acts.class_names
    memory = some()
    assert memory.to("cpu").activations is memory.activations
    assert acts[:0].to(torch.float64).labels.shape == (0,)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda acts: pickle.loads(pickle.dumps(acts))])
def test_copies(place, copied):
    acts = some(names=NAMES)
    found = place(acts)
    same(copied(found), acts)
    same(copied(found.split(0.5)[0]), acts.split(0.5)[0])
    assert repr(copied(found[1:])) == repr(found[1:])


def test_nothing_changes(place):
    acts = place(some())
    for name in ("activations", "labels", "class_names", "_rows", "new"):
        with pytest.raises(AttributeError):
            setattr(acts, name, None)
    with pytest.raises(AttributeError):
        del acts.class_names


def test_memory_is_not_copied():
    h, logits, labels = seeded(6, 4), seeded(6, 3), torch.arange(6) % 3
    acts = Activations(h, logits, labels, class_names=["a", "b", "c"])
    assert acts.activations is h
    assert acts.logits is logits
    assert acts.labels is labels
    assert acts[1:3].activations.data_ptr() == h[1].data_ptr()
    assert next(acts.batches(6)).activations.data_ptr() == h.data_ptr()
    assert acts.class_names == ("a", "b", "c")
    assert repr(acts) == "Activations(N=6, d=4, K=3, labels=True, dtype=torch.float32, device=cpu)"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activations": torch.zeros(6)}, ValueError, r"activations has shape \(6,\)"),
        ({"activations": torch.zeros(5, 4)}, ValueError, r"\(5, 4\) and logits \(6, 3\)"),
        ({"activations": torch.zeros(6, 4).int()}, TypeError, r"activations is a torch\.int32 tensor"),
        ({"logits": torch.zeros(6, 3).int()}, TypeError, r"logits is a torch\.int32 tensor"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 0])}, ValueError, r"labels\[3\] is 3"),
        ({"labels": torch.zeros(6, device="cpu").double()}, TypeError, r"torch\.float64"),
        ({"activations": torch.zeros(6, 4, device="meta")}, ValueError, r"are on cpu and meta; expected one device"),
        ({"class_names": ("a",)}, ValueError, "class_names has 1 names; expected 3"),
    ],
)
def test_bad_activations(change, error, words):
    fields = {"activations": seeded(6, 4), "logits": seeded(6, 3), "labels": torch.arange(6) % 3}
    with pytest.raises(error, match=words):
        Activations(**(fields | change))


# ---- names of classes --------------------------------------------------------------------------------------

ANIMALS = ("cat", "dog", "eel")


@pytest.mark.parametrize(
    "names",
    [
        list(ANIMALS),
        (name for name in ANIMALS),
        dict(enumerate(ANIMALS)),
        {2: "eel", 0: "cat", 1: "dog"},
        {"2": "eel", "0": "cat", "1": "dog"},
        {numpy.int64(1): "dog", 0: "cat", "2": "eel"},
        MappingProxyType(dict(enumerate(ANIMALS))),
        numpy.array(ANIMALS),
        dict(enumerate(ANIMALS)).values(),
    ],
)
def test_names_stand_in_the_order_of_the_classes(names):
    kept = Activations(torch.zeros(2, 4), torch.zeros(2, 3), class_names=names).class_names
    assert kept == ANIMALS
    assert {type(name) for name in kept} == {str}


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ({1: "cat", 2: "dog", 3: "eel"}, ValueError, "keys 1, 2, 3; expected the class numbers 0 to 2"),
        ({0: "cat", 1: "dog"}, ValueError, "has 2 names; expected 3"),
        ({0: "cat", "0": "dog", 1: "eel"}, ValueError, "expected the class numbers 0 to 2"),
        ({False: "cat", True: "dog", 2: "eel"}, ValueError, "keys False, True, 2"),
        ({0.0: "cat", 1.0: "dog", 2.0: "eel"}, ValueError, "keys 0.0, 1.0"),
        ({"cat": 0, "dog": 1, "eel": 2}, ValueError, "keys 'cat', .* Pass the inverse mapping"),
        ({"a": "cat", "b": "dog", "c": "eel"}, ValueError, "expected the class numbers 0 to 2, each with its name$"),
        ({0: "cat", 1: "dog", 2: 3}, TypeError, r"class_names\[2\] is 3; expected a string"),
        ("cat", TypeError, "class_names is a str"),
        ({"cat", "dog", "eel"}, TypeError, "class_names is a set"),
        ([0, 1, 2], TypeError, r"class_names\[0\] is 0"),
        (3, TypeError, "class_names is a int"),
        (ANIMALS[:2], ValueError, "class_names has 2 names; expected 3, one for each class"),
    ],
)
def test_bad_names(names, error, words):
    with pytest.raises(error, match=words):
        Activations(torch.zeros(2, 4), torch.zeros(2, 3), class_names=names)
