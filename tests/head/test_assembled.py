"""Heads that a model assembles from several products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penult
from penult.activations import Tap
from penult.head import HeadCertificate, HeadNotFoundError, find_head
from zoo import net, seeded

X = seeded(6, 4)


def distilled():
    """The mean of the heads of two tokens, as distilled transformers return it."""
    return net(
        lambda self, x: (self.fc(self.a(x).relu()) + self.dist(self.b(x).relu())) / 2,
        b=nn.Linear(4, 8),
        dist=nn.Linear(8, 3),
    )


def test_the_mean_of_two_tokens_is_one_head_of_both():
    model = distilled()
    head = find_head(model, X)
    assert torch.equal(head.weight, torch.cat([model.fc.weight, model.dist.weight], 1) / 2)
    assert torch.allclose(head.bias, (model.fc.bias + model.dist.bias) / 2)
    assert [part.path for part in head.certificate.parts] == ["fc", "dist"]
    assert "h is the activations of fc (linear 8->3), dist (linear 8->3), concatenated" in str(head.certificate)
    for size in (1, 3, 20):
        x = seeded(size, 4, seed=size)
        h, logits = Tap(model, head)(x)
        assert torch.equal(h, torch.cat([model.a(x).relu(), model.b(x).relu()], 1))
        assert torch.allclose(head(h), logits, atol=1e-5)


def test_gradients_pre_activations_and_compilation():
    model = distilled()
    tap = Tap(model, find_head(model, X))
    h, logits = tap(X)
    h.square().sum().backward()
    assert all(layer.weight.grad is not None for layer in (model.a, model.b))
    assert torch.equal(tap.pre_activation(X)[0].clamp(min=0), h)
    for expected, actual in zip((h, logits), torch.compile(tap, backend="eager")(X), strict=True):
        assert torch.allclose(expected, actual, atol=1e-6)


def test_pairs_and_files(tmp_path):
    head = find_head(distilled(), X)
    pair = penult.GenerativePair(head, penult.Sphere.from_head(head))
    pair.save(tmp_path / "pair.safetensors")
    loaded = penult.load(tmp_path / "pair.safetensors").head
    assert loaded.certificate == head.certificate
    assert isinstance(loaded.certificate, HeadCertificate)
    h, logits = Tap(distilled(), loaded)(X)
    assert torch.allclose(loaded(h), logits, atol=1e-5)


def test_a_low_rank_update_is_merged():
    def forward(self, x):
        h = self.a(x).relu()
        return self.fc(h) + 0.5 * self.up(F.dropout(self.down(h), training=self.training))

    model = net(forward, down=nn.Linear(8, 2, bias=False), up=nn.Linear(2, 3, bias=False))
    head = find_head(model, X)
    merged = model.fc.weight + 0.5 * model.up.weight @ model.down.weight
    assert torch.allclose(head.weight, merged, atol=1e-5)


def test_changes_of_any_product_are_noticed():
    model = distilled()
    head = find_head(model, X)
    before = head.version
    with torch.no_grad():
        model.dist.weight.mul_(2)
    assert head.version != before


def test_one_part_only():
    with pytest.raises(HeadNotFoundError, match="nothing computed in 'dist' reproduces"):
        find_head(distilled(), X, path="dist")


def test_a_head_that_no_longer_runs():
    def forward(self, x):
        return (self.fc(self.a(x)) + self.o(x.sin())) / 2 if self.both else self.fc(self.a(x))

    model = net(forward, o=nn.Linear(4, 3))
    model.both = True
    tap = Tap(model, find_head(model, X))
    model.both = False
    with pytest.raises(RuntimeError, match="the head at 'o' ran 0 times"):
        tap(X)


def test_weights_that_depend_on_the_batch_are_no_head():
    model = net(lambda self, x: self.fc(self.a(x)) * x.mean() + self.o(x.sin()), o=nn.Linear(4, 3))
    with pytest.raises(HeadNotFoundError, match=r"concatenated activations of 'fc', 'o' .*not those of a second one"):
        find_head(model, X)


def test_classes_without_a_layer_are_told():
    model = net(lambda self, x: torch.cat([self.fc(self.a(x)), self.fc(self.a(x)).exp()], 1))
    with pytest.raises(HeadNotFoundError, match="The cause is not known"):
        find_head(model, X)
