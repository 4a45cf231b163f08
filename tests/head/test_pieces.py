"""Heads that run in several calls."""

import pytest
import torch
from torch import nn

from penult.activations import Tap
from penult.head import HeadNotFoundError, find_head
from zoo import net, seeded, tokens


def test_batches_of_other_sizes():
    model = net(lambda self, x: torch.cat([self.fc(self.a(part).relu()) for part in x.split(2)]))
    tap = Tap(model, find_head(model, seeded(6, 4)))
    for size in (1, 2, 3, 9, 40):
        h, logits = tap(seeded(size, 4, seed=size))
        assert h.shape == (size, 8)
        assert torch.allclose(tap.head(h), logits, atol=1e-6)


def test_many_single_samples():
    model = net(lambda self, x: torch.stack([self.fc(self.a(row)) for row in x]))
    head = find_head(model, seeded(100, 4))
    assert head.certificate.samples == 100
    assert "rows of several calls, concatenated" in str(head.certificate)


def test_rows_are_part_of_the_autograd_graph():
    model = net(lambda self, x: torch.cat([self.fc(self.a(part).relu()) for part in x.split(4)]))
    h, _ = Tap(model, find_head(model, seeded(6, 4)))(seeded(6, 4))
    h.sum().backward()
    assert model.a.weight.grad is not None


def test_pre_activations():
    model = net(lambda self, x: torch.cat([self.fc(self.a(part).relu()) for part in x.split(4)]))
    x = seeded(7, 4)
    tap = Tap(model, find_head(model, x))
    assert torch.equal(tap.pre_activation(x)[0].clamp(min=0), tap(x)[0])


def test_another_order_of_the_rows_is_noticed():
    def forward(self, x):
        parts = [self.fc(self.a(part).relu()) for part in x.split(2)]
        return torch.cat(parts[::-1] if self.reverse else parts)

    model = net(forward)
    model.reverse = False
    tap = Tap(model, find_head(model, seeded(6, 4)))
    model.reverse = True
    with pytest.raises(RuntimeError, match="did not become logits by 'pieces'"):
        tap(seeded(6, 4))


def test_a_call_that_is_left_out_is_noticed():
    model = net(lambda self, x: torch.cat([self.fc(self.a(part)) for part in x.split(2)])[: self.keep])
    model.keep = 6
    tap = Tap(model, find_head(model, seeded(6, 4)))
    model.keep = 5
    with pytest.raises(RuntimeError, match="in 3 calls, which together are not the logits"):
        tap(seeded(6, 4))


def test_two_heads_on_two_halves_are_no_head():
    model = net(lambda self, x: torch.cat([self.fc(self.a(x[:3])), self.o(self.a(x[3:]))]), o=nn.Linear(8, 3))
    with pytest.raises(HeadNotFoundError, match="reproduces the logits"):
        find_head(model, seeded(6, 4))


def test_compiled():
    model = net(lambda self, x: torch.stack([self.fc(h) for h in tokens(self, x).unbind(1)], 1))
    x = seeded(6, 4)
    tap = Tap(model, find_head(model, x))
    h, logits = torch.compile(tap, backend="eager")(x)
    assert torch.allclose(tap.head(h), logits, atol=1e-6)
