"""What the ReLU right before the head reads."""

import copy
import json
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from penult import io
from penult.activations import Activations, Tap, extract
from penult.head import Head, find_head
from zoo import FOUND, conv_net, mlp, net, param, seeded, shake, tokens

VECTORS, MAPS = seeded(6, 4), seeded(3, 2, 6, 5)
LAST = torch.tensor([4, 0, 2])


def tapped(model, *args, **kwargs):
    model.eval()
    return Tap(model, find_head(model, *args, **kwargs))


def both(model, *args):
    """The same forward by u and by h."""
    tap = tapped(model, *args)
    assert tap.head.certificate.rectified
    h, logits = tap(*args)
    u, again = tap.pre_activation(*args)
    assert torch.equal(again, logits)
    assert torch.equal(u.clamp(min=0), h)
    assert (u < 0).any()
    return u


# ---- where a ReLU stands right before the head -------------------------------------------------------------


def functional(relu):
    return lambda: net(lambda self, x: self.fc(relu(self.a(x))))


def statement(self, x):
    h = self.a(x)
    h.relu_()  # whose output nobody takes
    return self.fc(h)


class Rectify(nn.Module):
    def forward(self, x):
        return x.clamp(min=0)


KINDS = {
    "module": lambda: mlp(nn.ReLU()),
    "module, in place": lambda: mlp(nn.ReLU(inplace=True)),
    "a module of one's own": lambda: mlp(Rectify()),
    "module, then dropout": lambda: mlp(nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Identity()),
    "all in place": lambda: mlp(nn.ReLU(inplace=True), nn.Dropout(0.9, inplace=True)),
    "F.relu": functional(F.relu),
    "F.relu by name": functional(lambda x: F.relu(input=x)),
    "F.relu, in place": functional(lambda x: F.relu(x, inplace=True)),
    "F.relu, in place by position": functional(lambda x: F.relu(x, True)),
    "F.relu_": functional(F.relu_),
    "torch.relu": functional(torch.relu),
    "torch.relu_": functional(torch.relu_),
    "relu": functional(lambda x: x.relu()),
    "relu_": functional(lambda x: x.relu_()),
    "a statement": lambda: net(statement),
    "torch.clamp": functional(lambda x: torch.clamp(x, min=0)),
    "torch.clamp by position": functional(lambda x: torch.clamp(x, 0.0, None)),
    "clamp": functional(lambda x: x.clamp(0)),
    "clamp_": functional(lambda x: x.clamp_(min=0)),
    "clip": functional(lambda x: x.clip(min=0)),
    "clamp_min": functional(lambda x: torch.clamp_min(x, 0)),
    "F.dropout": functional(lambda x: F.dropout(x.relu(), 0.5, training=False)),
    "there and back": functional(lambda x: x.relu().double().float().detach().reshape(-1, 2, 4).flatten(1)),
    "log_softmax": lambda: mlp(nn.ReLU()).append(nn.LogSoftmax(-1)),
    "scaled": lambda: net(lambda self, x: 16 * self.fc(self.a(x).relu())),
    "functional head": lambda: net(lambda self, x: F.linear(self.a(x).relu(), self.fc.weight, self.fc.bias)),
    "matmul": lambda: net(lambda self, x: self.a(x).relu() @ self.fc.weight.T + self.fc.bias),
    "W first": lambda: net(lambda self, x: (self.fc.weight @ self.a(x).relu().T).T),
    "einsum": lambda: net(lambda self, x: torch.einsum("kd,bd->bk", self.fc.weight, self.a(x).relu())),
    "addmm": lambda: net(lambda self, x: torch.addmm(self.fc.bias, self.a(x).relu(), self.w), w=param(8, 3)),
    "weight norm": lambda: net(
        lambda self, x: self.fc(self.a(x).relu()), fc=nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
    ),
    "head used thrice": lambda: net(
        lambda self, x: (self.fc(self.a(x).relu() + 1) * 0 + self.fc(self.a(x).relu()), self.fc(self.a(x)))
    ),
    "two heads": lambda: net(
        lambda self, x: (self.fc(h := self.a(x).relu()), self.other(h)), other=nn.Linear(8, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_relu(name):
    model = KINDS[name]()
    u = both(model, VECTORS)
    linear = model.a if hasattr(model, "a") else model[0]
    assert torch.equal(u, linear(VECTORS))


class Block(nn.Module):
    """One of a residual network: its ReLU is used twice, in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True)

    def before(self, x):
        return self.second(self.relu(self.first(x))) - x

    def forward(self, x):
        return self.relu(self.before(x))


def test_the_last_of_many():
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), Block(), Block())
    model = net(lambda self, x: self.fc(self.body(x)), body=body)
    u = both(model, VECTORS)
    assert torch.allclose(u, model.body[4].before(model.body[:4](VECTORS)))


def test_a_trunk_that_flattens_maps():
    trunk = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten())
    model = net(lambda self, x: self.fc(self.trunk(x)), trunk=trunk, fc=nn.Linear(36, 5))
    assert torch.allclose(both(model, MAPS), model.trunk[:2](MAPS).flatten(1))


def pointwise(relu):
    return conv_net(lambda self, x: self.fc(relu(self.a(x))), fc=nn.Conv2d(8, 3, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("relu", [F.relu, lambda x: x.relu_()])
def test_maps(relu, memory_format):
    model = pointwise(relu).to(memory_format=memory_format)
    x = MAPS.to(memory_format=memory_format)
    assert torch.equal(both(model, x), model.a(x).movedim(1, -1))
    head = nn.Linear(8 * 4 * 3, 5)
    flat = conv_net(lambda self, x: self.fc(relu(self.a(x)).permute(0, 2, 3, 1).reshape(len(x), -1)), fc=head)
    flat = flat.to(memory_format=memory_format)
    assert torch.equal(both(flat, x), flat.a(x).permute(0, 2, 3, 1).flatten(1))


def test_a_view_that_u_itself_would_not_allow():
    """The ReLU's output is contiguous, its input is not."""
    model = net(lambda self, x: self.fc(F.relu(tokens(self, x)[:, ::2]).view(len(x), 24)), fc=nn.Linear(24, 3))
    assert torch.equal(both(model, VECTORS), tokens(model, VECTORS)[:, ::2].flatten(1))


SELECTIONS = {
    "one": (lambda h: h[:, 2], 8),
    "each its own": (lambda h: h[torch.arange(3), LAST], 8),
    "select": (lambda h: h.select(1, 3), 8),
    "gathered": (lambda h: h.gather(1, LAST[:, None, None].expand(3, 1, 8)).squeeze(1), 8),
    "some features": (lambda h: h[:, 1, :4].contiguous(), 4),
    "all": (lambda h: h.flatten(1), 40),
    "each token": (lambda h: h, 8),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name):
    select, features = SELECTIONS[name]
    model = net(lambda self, x: self.fc(select(tokens(self, x).relu())), fc=nn.Linear(features, 3))
    assert torch.equal(both(model, VECTORS[:3]), select(tokens(model, VECTORS[:3])))


def test_positions_that_are_picked_or_swapped_after_the_head():
    x = VECTORS[:3]
    model = net(lambda self, x: self.fc(tokens(self, x).relu())[torch.arange(3), LAST])
    assert torch.equal(both(model, x), tokens(model, x)[torch.arange(3), LAST])
    model = net(lambda self, x: self.fc(tokens(self, x).relu()).transpose(0, 1))
    assert torch.equal(both(model, x), tokens(model, x).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(dtype):
    model = KINDS["module, in place"]().to(dtype)
    assert both(model, VECTORS.to(dtype)).dtype == dtype
    cast = net(lambda self, x: self.fc(self.a(x).relu().to(dtype)), fc=nn.Linear(8, 3).to(dtype))
    assert torch.equal(both(cast, VECTORS), cast.a(VECTORS).to(dtype))


def test_autocast():
    model = KINDS["module, in place"]()
    tap = tapped(model, VECTORS)
    with torch.autocast("cpu", torch.bfloat16):
        u, logits = tap.pre_activation(VECTORS)
        h, _ = tap(VECTORS)
    assert torch.equal(u.clamp(min=0), h)
    assert logits.dtype == torch.bfloat16


def test_values_that_are_not_finite():
    tap = tapped(mlp(nn.ReLU()), VECTORS)
    x = VECTORS.clone()
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    u, _ = tap.pre_activation(x)
    assert torch.equal(u.nan_to_num(), tap.model[0](x).nan_to_num())


def test_no_rows():
    tap = tapped(mlp(nn.ReLU()), VECTORS)
    assert tap.pre_activation(VECTORS[:0])[0].shape == (0, 8)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.usefixtures("compiler")
def test_the_certificate_agrees_with_what_stands_before(name):
    case = FOUND[name]
    tap = tapped(case.make(), case.inputs)
    certificate = tap.head.certificate
    assert certificate.rectified == (case.before in ("ReLU", "relu"))
    assert ("rectified" in str(certificate)) == certificate.rectified
    if certificate.rectified:
        u, logits = tap.pre_activation(case.inputs)
        h, again = tap(case.inputs)
        assert torch.equal(u.clamp(min=0), h)
        assert torch.equal(logits, again)


# ---- where none does ---------------------------------------------------------------------------------------


class ReLU(nn.Module):
    """Of another sort than its name says."""

    def forward(self, x):
        return x.abs()


def lying():
    return mlp(ReLU())


def late(self, x):
    h = self.a(x).relu()
    h += 1
    return self.fc(h)


NOT = {
    "gelu": (lambda: mlp(nn.GELU()), "'GELU', not a ReLU"),
    "leaky": (lambda: mlp(nn.LeakyReLU()), "'LeakyReLU', not a ReLU"),
    "leaky, of slope 0": (lambda: mlp(nn.LeakyReLU(0.0)), "'LeakyReLU'"),
    "relu6": (lambda: mlp(nn.ReLU6()), "'ReLU6', not a ReLU"),
    "capped": (functional(lambda x: x.clamp(0, 5)), "'clamp' is before the head, but h was not observed"),
    "cut elsewhere": (functional(lambda x: x.clamp(min=-1)), "'clamp' is before"),
    "linear": (lambda: mlp(), "'Linear', not a ReLU"),
    "nothing": (lambda: shake(nn.Linear(4, 3)), "the input of the model, not a ReLU"),
    "a liar": (lying, "'ReLU' is before the head, but h was not observed to be"),
    "batch norm": (lambda: mlp(nn.ReLU(), nn.BatchNorm1d(8)), "'BatchNorm1d', not a ReLU"),
    "layer norm": (lambda: mlp(nn.ReLU(), nn.LayerNorm(8)), "a LayerNorm is right before .* folded into it"),
    "rms norm": (lambda: mlp(nn.ReLU(), nn.RMSNorm(8)), "a RMSNorm is right before .* folded into it"),
    "normalised": (functional(lambda x: F.normalize(x.relu(), dim=-1)), "'normalize', not a ReLU"),
    "pooled": (lambda: net(lambda self, x: self.fc(tokens(self, x).relu().mean(1))), "'mean', not a ReLU"),
    "pooled after the head": (
        lambda: net(lambda self, x: self.fc(tokens(self, x).relu()).mean(1)), "the positions 'mean' combine several"
    ),
    "shifted": (functional(lambda x: x.relu() + 1), "'add', not a ReLU"),
    "changed in place": (lambda: net(late), "not a ReLU|'relu' is before"),
    "dropout that never ends": (functional(lambda x: F.dropout(x.relu())), "'relu' is before the head, but h"),
    "W is rectified, h not": (
        lambda: net(lambda self, x: F.linear(self.a(x).square(), self.w.relu()), w=param(3, 8)), "not a ReLU"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT)
def test_no_pre_activation(name, tmp_path):
    make, words = NOT[name]
    tap = tapped(make(), VECTORS)
    assert not tap.head.certificate.rectified
    for run in (
        lambda: tap.pre_activation(VECTORS),
        lambda: extract(tap, [VECTORS], pre_activation=True),
        lambda: extract(tap, [VECTORS], tmp_path / "acts", pre_activation=True),
    ):
        with pytest.raises(ValueError, match=rf"no pre-activations u .*{words}.*leave pre_activation out"):
            run()
    assert not list(tmp_path.iterdir())
    extract(tap, [VECTORS])


def test_a_norm_that_is_not_folded():
    tap = tapped(mlp(nn.ReLU(), nn.LayerNorm(8)), VECTORS, fold=False)
    with pytest.raises(ValueError, match="'LayerNorm', not a ReLU"):
        tap.pre_activation(VECTORS)


def test_a_cosine_of_rectified_vectors_is_no_rectified_head():
    model = net(lambda self, x: 9 * F.cosine_similarity(self.a(x).relu()[:, None], self.w, dim=-1), w=param(3, 8))
    with torch.no_grad():
        model.a.bias += 9  # so that the ReLU does nothing here, and the values would agree
    assert not tapped(model, VECTORS).head.certificate.rectified


def test_a_head_of_an_older_version_has_to_be_found_again():
    model = mlp(nn.ReLU())
    head = find_head(model, VECTORS)
    config = head.config()
    del config["certificate"]["rectified"]
    old = Head.from_config(config, {"weight": head.weight, "bias": head.bias})
    assert not old.certificate.rectified
    with pytest.raises(ValueError, match="older penult has to be found again"):
        Tap(model, old).pre_activation(VECTORS)
    assert Head.from_config(head.config(), {"weight": head.weight, "bias": head.bias}).certificate.rectified


# ---- a forward that is another one than find_head saw ------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_in_training(inplace):
    tap = tapped(mlp(nn.ReLU(inplace), nn.Dropout(0.5, inplace)), VECTORS)
    tap.train()
    torch.manual_seed(0)
    tap(VECTORS)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"shape \(6, 8\).* not max\(u, 0\).*differ by up to.*call tap.eval\(\)"):
        tap.pre_activation(VECTORS)
    assert torch.equal(torch.get_rng_state(), state)  # nothing more was drawn
    tap.eval()
    tap.pre_activation(VECTORS)
    tap.train()
    tap.model[2].p = 0.0
    assert torch.equal(tap.pre_activation(VECTORS)[0], tap.model[0](VECTORS))
    tap.model[2].p = 0.5
    assert len(extract(tap, [VECTORS], pre_activation=True)) == 6  # which runs in eval mode
    assert tap.training


def test_another_path():
    model = net(lambda self, x, act=F.relu: self.fc(act(self.a(x))))
    tap = tapped(model, VECTORS)
    with pytest.raises(RuntimeError, match=r"no ReLU is right before the head in this forward.*another path"):
        tap.pre_activation(VECTORS, act=F.gelu)
    with pytest.raises(RuntimeError, match=r"no ReLU is right before"):
        tap.pre_activation(VECTORS, act=lambda x: x.relu_().add_(1))
    with pytest.raises(RuntimeError, match=r"not max\(u, 0\).*change of u in place"):
        tap.pre_activation(VECTORS, act=lambda x: (x.relu(), x.neg_())[0])
    u, _ = tap.pre_activation(VECTORS, act=lambda x: x.relu_())
    assert torch.equal(u, model.a(VECTORS))


def test_what_the_model_does_next_leaves_u_alone():
    def forward(self, x):
        u = self.a(x)
        logits = self.fc(u.relu())
        u.zero_()
        return logits

    model = net(forward)
    assert both(model, VECTORS).abs().sum() > 1


def test_an_auxiliary_head_and_relu_that_run_in_training_alone():
    def forward(self, x):
        h = self.a(x).relu()
        aux = self.aux(self.a(x).sin().relu()) if self.training else None
        return self.fc(h), aux

    model = net(forward, aux=nn.Linear(8, 3))
    tap = tapped(model, VECTORS).train()
    u, logits = tap.pre_activation(VECTORS)
    assert torch.equal(u, model.a(VECTORS))
    assert torch.allclose(tap.head(u.clamp(min=0)), logits, atol=1e-6)


# ---- the model is left as it was ---------------------------------------------------------------------------


def test_nothing_is_left_behind():
    model = mlp(nn.ReLU(inplace=True))
    tap = tapped(model, VECTORS)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    mode = torch.overrides._get_current_function_mode_stack()
    tap.pre_activation(VECTORS)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tap.pre_activation(seeded(2, 5))
    other = tapped(net(lambda self, x: self.fc(F.relu_(x)), fc=nn.Linear(4, 3)), VECTORS.clone())
    with pytest.raises(RuntimeError, match="leaf Variable"):
        other.pre_activation(VECTORS.clone().requires_grad_())
    assert torch.overrides._get_current_function_mode_stack() == mode
    assert not [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(tap.pre_activation(VECTORS)[0], model[0](VECTORS))


@pytest.mark.parametrize("name", ["module", "module, in place", "clamp_", "F.relu", "there and back", "W first"])
def test_gradients(name):
    if name == "there and back":
        model = functional(lambda x: x.relu().reshape(-1, 2, 4).flatten(1))().double()
    else:
        model = KINDS[name]().double()
    x = VECTORS.double()
    tap = tapped(model, x)
    assert torch.autograd.gradcheck(tap.pre_activation, (x.clone().requires_grad_(),))
    u, logits = tap.pre_activation(x)
    (u.sin().sum() + logits.cos().sum()).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    linear = model.a if hasattr(model, "a") else model[0]
    (linear(x).sin().sum() + model(x).cos().sum()).backward()
    assert all(torch.allclose(g, p.grad) for g, p in zip(found, model.parameters(), strict=True) if g is not None)
    assert linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not tap.pre_activation(x)[0].requires_grad


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode(inference):
    for name in ("module", "module, in place"):
        model = KINDS[name]()
        with torch.inference_mode(inference):
            assert torch.equal(both(model, VECTORS), model[0](VECTORS))


def test_copies():
    tap = tapped(mlp(nn.ReLU(inplace=True)), VECTORS)
    u, _ = tap.pre_activation(VECTORS)
    for other in (copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
        assert other.head.certificate == tap.head.certificate
        assert torch.equal(other.pre_activation(VECTORS)[0], u)
    moved = copy.deepcopy(tap).double()
    assert torch.allclose(moved.pre_activation(VECTORS.double())[0], u.double(), atol=1e-6)
    warm = Tap(tap.model, tap.head.with_temperature(2.0))
    assert torch.equal(warm.pre_activation(VECTORS)[0], u)


def test_threads_do_not_mix():
    tap = tapped(mlp(nn.ReLU(inplace=True), nn.Dropout()), VECTORS)
    inputs = [seeded(50, 4, seed=i) for i in range(6)]
    found = [[] for _ in inputs]

    def work(i):
        found[i] += [(tap.pre_activation if run % 2 else tap)(inputs[i])[0] for run in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, mine in zip(inputs, found, strict=True):
        u = tap.model[0](x)
        assert len(mine) == 20
        assert all(torch.equal(value, u if run % 2 else u.clamp(min=0)) for run, value in enumerate(mine))


def test_memory_is_that_of_the_layers_alive():
    """A ReLU's input is forgotten with its output: of a deep network without gradients, one layer's at a time."""
    from penult.head import _capture
    from penult.head._rectified import Rectifiers

    kept = []

    class Counting(Rectifiers):
        def run(self, *args):
            output = super().run(*args)
            kept.append(len(self._inputs))
            return output

    layers = [layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.ReLU(inplace=True))]
    tap = tapped(mlp(*layers), VECTORS)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(_capture, "Rectifiers", Counting)
        tap.pre_activation(VECTORS)
    assert len(kept) > 40
    assert 1 <= max(kept) <= 2


@pytest.mark.usefixtures("compiler")
def test_compilation_is_refused_and_compiled_parts_run_as_written():
    torch._dynamo.reset()
    tap = tapped(mlp(nn.ReLU()), VECTORS)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Call tap.pre_activation outside of torch.compile"):
        torch.compile(tap.pre_activation, backend="eager", fullgraph=True)(VECTORS)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(tap.pre_activation, backend="eager")(VECTORS)[0], tap.model[0](VECTORS))
    part = mlp(nn.ReLU())
    part[1].compile(backend="eager")
    for model in (nn.Sequential(torch.compile(part[:2], backend="eager"), part[2]), part):
        assert torch.equal(both(model, VECTORS), part[0](VECTORS))


# ---- extract -----------------------------------------------------------------------------------------------


def loader(count=24, seed=0):
    x = seeded(count, 4, seed=seed)
    return DataLoader(TensorDataset(x, torch.arange(count) % 3), batch_size=4)


@pytest.fixture
def tap():
    return tapped(mlp(nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout()), VECTORS)


SHARD = 7 * (4 * (8 + 3) + 8)  # two batches


def test_extract_to_memory_and_to_a_folder(tap, tmp_path):
    plain = extract(tap, loader())
    tap.train()
    x = seeded(24, 4)
    for out in (None, tmp_path / "acts"):
        acts = extract(tap, loader(), out, pre_activation=True, shard_size=SHARD)
        assert acts.pre_activation
        assert not plain.pre_activation
        tap.eval()
        assert torch.allclose(acts.activations, tap.model[:2](x).detach(), atol=1e-6)
        tap.train()
        assert torch.equal(acts.activations.clamp(min=0), plain.activations)
        assert torch.equal(acts.logits, plain.logits)
        assert torch.equal(acts.labels, plain.labels)
        assert not acts.activations.requires_grad
        assert "device=cpu, pre_activation=True" in repr(acts)
        assert "pre_activation" not in repr(plain)
    assert Activations.open(tmp_path / "acts").pre_activation
    half = extract(tap, loader(), pre_activation=True, dtype=torch.float16)
    assert torch.equal(half.activations, acts.activations.half())


def test_extract_of_tokens_and_of_pixels():
    model = net(lambda self, x: self.fc(tokens(self, x).relu()))
    labels = torch.arange(30).reshape(6, 5) % 3
    labels[:, 0] = -100
    acts = extract(tapped(model, VECTORS), [(VECTORS, labels)], pre_activation=True)
    assert torch.equal(acts.activations, tokens(model, VECTORS)[:, 1:].flatten(0, 1))
    model = pointwise(F.relu)
    acts = extract(tapped(model, MAPS), [MAPS], pre_activation=True)
    assert torch.equal(acts.activations, model.a(MAPS).permute(0, 2, 3, 1).flatten(0, 2))


def test_the_head_is_checked_with_what_it_reads():
    model = net(lambda self, x: 16 * self.fc(self.a(x).relu()))
    tap = tapped(model, VECTORS)  # of which the head is a copy
    extract(tap, [VECTORS], pre_activation=True)
    with torch.no_grad():
        model.fc.weight.mul_(-3)
    with (
        pytest.warns(UserWarning, match="is not that of this tap's head"),
        pytest.raises(ValueError, match=r"the head does not give the model's logits.*Find the head again"),
    ):
        extract(tap, [VECTORS], pre_activation=True)


def stop(tap, out, **kwargs):
    def broken():
        for number, batch in enumerate(loader()):
            if number == 3:
                raise OSError("gone")
            yield batch

    with pytest.raises(OSError, match="gone"):
        extract(tap, broken(), out, shard_size=SHARD, **kwargs)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_resuming(tap, tmp_path, flag, finished):
    extract(tap, loader(), tmp_path / "whole", shard_size=SHARD, pre_activation=flag)
    out = tmp_path / "out"
    if finished:
        extract(tap, loader(), out, shard_size=SHARD, pre_activation=flag)
    else:
        stop(tap, out, pre_activation=flag)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    words = rf"pre_activation is {flag} there and {not flag} now.*another folder, or pass overwrite=True"
    with pytest.raises(ValueError, match=words):
        extract(tap, loader(), out, shard_size=SHARD, pre_activation=not flag)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert extract(tap, loader(), out, shard_size=SHARD, pre_activation=flag).pre_activation == flag
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    other = extract(tap, loader(), out, shard_size=SHARD, pre_activation=not flag, overwrite=True)
    assert other.pre_activation != flag


def test_what_a_folder_says(tap, tmp_path):
    for flag in (False, True):
        extract(tap, loader(), tmp_path / str(flag), pre_activation=flag)
    indices = [json.loads((tmp_path / str(flag) / "index.json").read_text()) for flag in (False, True)]
    assert "pre_activation" not in indices[0]["facts"]  # as older versions wrote, and read
    assert indices[1]["facts"].pop("pre_activation") is True
    assert indices[0]["facts"] == indices[1]["facts"]
    indices[1]["facts"]["pre_activation"] = "perhaps"
    (tmp_path / "True" / "index.json").write_text(json.dumps(indices[1]))
    with pytest.raises(io.FileFormatError, match="pre_activation is neither true nor false"):
        Activations.open(tmp_path / "True")


# ---- Activations -------------------------------------------------------------------------------------------


def some(flag=True, rows=6):
    return Activations(seeded(rows, 4), seeded(rows, 3, seed=1), torch.arange(rows) % 3, pre_activation=flag)


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_the_fact_goes_along(flag, disk, tmp_path):
    acts = some(flag)
    if disk:
        acts = acts.save(tmp_path / "acts", shard_size=80)
    parts = [
        acts, acts[1:3], acts[:0], acts[torch.tensor([3, 1])], acts[acts.labels == 0], *acts.split(0.5, 0.5),
        *acts.batches(4), acts.to(torch.float64), Activations.concatenate([acts, acts[2:4]]),
        Activations.concatenate([some(flag), acts]), acts[2:].save(tmp_path / "again"), copy.deepcopy(acts),
        pickle.loads(pickle.dumps(acts)),
    ]  # fmt: skip
    assert [part.pre_activation for part in parts] == [flag] * len(parts)


def test_sets_that_do_not_agree():
    with pytest.raises(
        ValueError, match=r"part 1 .*cannot be joined to part 0: pre_activation is False there and True"
    ):
        Activations.concatenate([some(True), some(False)])


def test_the_fact_is_fixed_and_false_where_nothing_is_said():
    assert not Activations(torch.zeros(1, 2), torch.zeros(1, 2)).pre_activation
    with pytest.raises(AttributeError):
        some().pre_activation = False
    old = some()
    state = {name: value for name, value in vars(old).items() if name != "pre_activation"}
    assert not copy.copy(_with(state)).pre_activation


def _with(state):
    """What an older version pickled."""
    acts = Activations.__new__(Activations)
    acts.__dict__.update(state)
    return acts


def test_the_argument_is_by_keyword():
    with pytest.raises(TypeError):
        Activations(torch.zeros(1, 2), torch.zeros(1, 2), None, None, True)
