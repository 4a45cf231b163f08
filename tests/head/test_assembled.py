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


# --- fresh networks -----------------------------------------------------------------------------------------


def fresh(forward, std, **modules):
    """A network with the small weights of truncated normal initialisation, and no biases."""
    model = net(forward, **modules)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator) if parameter.ndim > 1 else 0.0)
    return model


@pytest.mark.parametrize("std", [0.5, 2e-2, 2e-3, 1e-5])
@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: (self.fc(self.a(x).tanh()) + self.dist(self.a(x).tanh())) / 2,
        lambda self, x: self.fc(self.a(x).relu()) + self.dist(self.b(x).tanh()),
        lambda self, x: 0.25 * self.fc(self.a(x)) + 0.75 * self.dist(self.b(x)),
    ],
)
def test_a_sum_of_heads_is_found_as_such_with_logits_of_any_size(std, forward):
    model = fresh(forward, std, b=nn.Linear(4, 8), dist=nn.Linear(8, 3))
    head = find_head(model, X)
    h, logits = Tap(model, head)(X)
    assert (head(h) - logits).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("std", [0.5, 2e-3, 1e-5])
def test_a_soft_maximum_of_heads_is_refused_with_logits_of_any_size(std):
    model = fresh(lambda self, x: torch.maximum(self.fc(self.a(x)), self.dist(self.a(x))), std, dist=nn.Linear(8, 3))
    with pytest.raises(HeadNotFoundError):
        find_head(model, X)


@pytest.mark.parametrize("std", [0.5, 2e-3, 1e-5])
def test_a_shift_does_not_make_a_wrong_product_match(std):
    # The bias is much larger than what differs between samples.
    model = fresh(
        lambda self, x: self.fc(self.a(x)).sigmoid() * self.dist(self.a(x)) + self.c,
        std,
        dist=nn.Linear(8, 3),
        c=nn.Parameter(torch.zeros(3)),
    )
    with torch.no_grad():
        model.c.copy_(torch.tensor([0.3, -0.2, 0.1]))
    with pytest.raises(HeadNotFoundError):
        find_head(model, X)
    model = fresh(lambda self, x: self.fc(self.a(x)) + self.c, max(std, 1e-2), c=nn.Parameter(torch.zeros(3)))
    with torch.no_grad():
        model.c.copy_(torch.tensor([0.3, -0.2, 0.1]))
    assert torch.allclose(find_head(model, X).bias, model.c, atol=1e-6)


class Update(nn.Module):
    """A layer with a low-rank update, which is zero before training."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.up(self.down(x))


class FunctionalUpdate(Update):
    def forward(self, x):
        return torch.addmm(self.base_layer(x), x @ self.down.weight.T, self.up.weight.T)


@pytest.mark.parametrize("kind", [Update, FunctionalUpdate])
@pytest.mark.parametrize("between", [nn.ReLU(), nn.LayerNorm(8)])
def test_a_head_with_an_update_that_is_zero_until_it_is_trained(kind, between):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), between, kind(nn.Linear(8, 3))).eval()
    pair = penult.GenerativePair(find_head(model, X))
    tap = Tap(model, pair.head)
    h, logits = tap(X)
    assert torch.allclose(pair.posterior(h).probs, logits.softmax(-1), atol=1e-5)
    nn.functional.cross_entropy(model(X), torch.zeros(6, dtype=torch.long)).backward()
    torch.optim.SGD(model[2].up.parameters(), 1.0).step()
    with pytest.raises(RuntimeError, match="changed"):
        pair.posterior(h)
    pair = penult.GenerativePair(find_head(model, X))
    h, logits = Tap(model, pair.head)(X)
    assert torch.allclose(pair.posterior(h).probs, logits.softmax(-1), atol=1e-5)
