"""Arguments of a forward: `find_head` and `Tap` leave the caller's as they are."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from penult.activations import Tap
from penult.head import find_head
from zoo import shake


class Cache:
    """Grows with each forward, like the caches of language models."""

    def __init__(self):
        self.keys = torch.zeros(3, 0, 16)

    def update(self, rows):
        self.keys = torch.cat([self.keys, rows], 1)
        return self.keys


class Preallocated(Cache):
    """Writes into a tensor in place."""

    def __init__(self):
        self.keys, self.count = torch.zeros(3, 40, 16), torch.zeros((), dtype=torch.long)

    def update(self, rows):
        self.keys[:, self.count : self.count + rows.shape[1]] = rows
        self.count += rows.shape[1]
        return self.keys[:, : self.count]


@dataclass
class Nested:
    layers: list = field(default_factory=lambda: [{"own": Cache()}])

    def update(self, rows):
        return self.layers[0]["own"].update(rows)


class Language(nn.Module):
    def __init__(self, update):
        super().__init__()
        self.embedding, self.fc, self.update = nn.Embedding(20, 16), nn.Linear(16, 20), update

    def forward(self, ids, past):
        rows = self.update(past, self.embedding(ids))
        return self.fc(rows.cumsum(1)[:, -ids.shape[1] :].tanh())


def of_list(past, rows):
    past.append(rows)
    return torch.cat(past, 1)


def of_dict(past, rows):
    past["rows"] = torch.cat([past["rows"], rows], 1)
    return past["rows"]


def of_legacy(past, rows):
    past[0][0].append(rows)
    return torch.cat(past[0][0], 1)


def of_object(past, rows):
    return past.update(rows)


KINDS = {
    "list": (of_list, list),
    "dict": (of_dict, lambda: {"rows": torch.zeros(3, 0, 16)}),
    "tuple of tuples of lists": (of_legacy, lambda: (([],),)),
    "object": (of_object, Cache),
    "preallocated": (of_object, Preallocated),
    "nested": (of_object, Nested),
}


def length(past):
    if isinstance(past, Preallocated):
        return int(past.count) + int(past.keys.any(-1).sum())
    if isinstance(past, Cache):
        return past.keys.shape[1]
    if isinstance(past, Nested):
        return length(past.layers[0]["own"])
    return sum(part.shape[1] for part in past) if isinstance(past, list) else past["rows"].shape[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keyword", [False, True])
def test_a_cache_does_not_grow(kind, keyword):
    update, make = KINDS[kind]
    model, past = shake(Language(update)).eval(), make()
    ids = torch.arange(18).reshape(3, 6)
    with torch.no_grad():
        model(ids[:, :2], past)
    count = (lambda: length(past[0][0])) if isinstance(past, tuple) else (lambda: length(past))
    before = count()
    arguments = ((ids[:, 2:],), {"past": past}) if keyword else ((ids[:, 2:], past), {})
    tap = Tap(model, find_head(model, *arguments[0], **arguments[1]))
    assert count() == before
    first, second = (tap(*arguments[0], **arguments[1])[1] for _ in range(2))
    assert count() == before
    assert torch.equal(first, second)
    assert torch.equal(first, model(*arguments[0], **arguments[1]))
    assert count() > before


@pytest.mark.parametrize("kind", ["list", "dict", "object", "nested"])
def test_gradients_reach_tensors_in_copies(kind):
    update, make = KINDS[kind]
    model, past = shake(Language(update)).eval(), make()
    ids = torch.arange(18).reshape(3, 6)
    with torch.no_grad():
        model(ids[:, :2], past)
    tap = Tap(model, find_head(model, ids[:, 2:], past))
    start = torch.randn(3, 2, 16, requires_grad=True)
    # Not a leaf, which copy.deepcopy refuses.
    rows = 2 * start
    if kind == "list":
        past[0] = rows
    elif kind == "dict":
        past["rows"] = rows
    else:
        (past if kind == "object" else past.layers[0]["own"]).keys = rows
    tap(ids[:, 2:], past)[0].sum().backward()
    assert start.grad is not None
    assert bool(start.grad.any())


def test_what_cannot_be_copied_is_refused():
    model = shake(Language(lambda past, rows: rows)).eval()
    ids = torch.arange(18).reshape(3, 6)
    tap = Tap(model, find_head(model, ids, None))
    for past in (threading.Lock(), (x for x in [1])):
        with pytest.raises(TypeError, match=r"an argument of the model is a .*, which copy.deepcopy cannot copy"):
            find_head(model, ids, past)
        with pytest.raises(TypeError, match="an argument of the model is a"):
            tap(ids, past)


def test_tensors_and_modules_are_passed_as_they_are():
    seen = []

    class Listening(Language):
        def forward(self, ids, past):
            seen.append(past)
            return super().forward(ids, past)

    model, ids = shake(Listening(lambda past, rows: rows)).eval(), torch.arange(18).reshape(3, 6)
    tap = Tap(model, find_head(model, ids, None))
    for past in (torch.ones(3), nn.Linear(2, 2), (torch.ones(3), "text", 1.5, None)):
        tap(ids, past)
        same = all(map(lambda a, b: a is b, past, seen[-1])) if isinstance(past, tuple) else past is seen[-1]
        assert same
