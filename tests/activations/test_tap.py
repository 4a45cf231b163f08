import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from penult import GenerativePair, Marginal, Sphere
from penult.activations import Tap
from penult.head import Head, find_head
from tiers import thin
from zoo import FOUND, net


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


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_training_mode_is_the_models_own(norm, tokens):
    model, tap = make(norm, tokens)
    tap.train()
    assert model.training
    h, logits = tap(seeded(200, 4))
    assert torch.allclose(tap.head(h), logits, atol=1e-4)  # dropout before the head is part of h
    dropped = model.norm.bias if norm == "layer" else torch.zeros(8)
    if norm != "none":
        dropped = -dropped / model.norm.weight
    assert 0.4 < (h - dropped).isclose(torch.zeros(()), atol=1e-5).double().mean() < 0.75
    tap.eval()
    assert torch.equal(tap(seeded(5, 4))[0], tap(seeded(5, 4))[0])


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


@pytest.mark.usefixtures("compiler")
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
    with pytest.raises(ValueError, match=r"weight 'fc.weight' of the model is of shape \(7, 8\); expected \(3, 8\)"):
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


def test_h_is_what_any_forward_hook_sees():
    model, tap = make()
    x = seeded(5, 4)
    assert torch.allclose(tap(x)[0], F.relu(model.bn(model.body(x))))


def test_axes():
    for name in ("tokens", "1x1 convolution", "mlp"):
        case = FOUND[name]
        model = case.make()
        assert Tap(model, find_head(model, case.inputs)).axes == case.says.get("axes", ("batch",))


@pytest.mark.parametrize(
    "name", ["functional", "W first", "cosine", "1x1 convolution, resized", "rms norm, 1 + weight"]
)
def test_gradients_through_every_kind_of_head(name):
    case = FOUND[name]
    model = case.make().double()
    x = case.inputs.double()[:2].requires_grad_()
    tap = Tap(model, find_head(model, case.inputs.double()))
    assert torch.autograd.gradcheck(lambda x: tap(x), (x,))
    h, logits = tap(x)
    (h.sin().sum() + logits.cos().sum()).backward()
    assert next(model.parameters()).grad is not None


def test_a_frozen_model_still_gives_gradients_to_its_input():
    model, tap = make("layer")
    model.requires_grad_(False)
    x = seeded(3, 4).requires_grad_()
    h, logits = tap(x)
    (h.sum() + logits.sum()).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert not tap(x)[0].requires_grad


@pytest.mark.parametrize("fullgraph", thin([True, False], keep=[True]))
@pytest.mark.parametrize(
    "name",
    thin(["mlp", "cnn", "functional", "W first", "einsum", "cosine", "scaled", "weight norm", "layer norm", "rms norm",
     "norm, then mean", "head used thrice", "aux head last", "last token picked", "language model, functional",
     "pooling after the head", "1x1 convolution", "1x1 convolution, resized", "dataclass"],
         keep=["functional", "1x1 convolution", "dataclass"]),
)  # fmt: skip
@pytest.mark.usefixtures("compiler")
def test_compiled(name, fullgraph):
    torch._dynamo.reset()
    case = FOUND[name]
    model, x = case.make(), case.inputs
    tap = Tap(model, find_head(model, x)).eval()
    h, logits = tap(x)
    compiled = torch.compile(tap, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        found, theirs = compiled(x)
        assert torch.allclose(found, h, atol=1e-5)
        assert torch.allclose(theirs, logits, atol=1e-5)
    model.train()
    if any(p.requires_grad for p in model.parameters()):
        compiled(x)[0].sum().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_of_transformers_stays():
    """The rest of the model runs as it does without a tap: an encoder keeps its path for inference."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.fc = nn.Linear(8, 3)

        def forward(self, x, mask):
            return self.fc(self.encoder(x, src_key_padding_mask=mask).mean(1))

    model = Encoder().eval()
    x, mask = seeded(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    with torch.no_grad():
        fused = model(x, mask)
        with Overridden():
            assert not torch.allclose(model(x, mask), fused, atol=1e-3)  # padding is not zero on the other path
        head = find_head(model, x, mask)
        h, logits = Tap(model, head)(x, mask)
    assert torch.equal(logits, fused)
    assert torch.allclose(head(h), logits, atol=1e-6)


class Overridden(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Tapped(Dataset):
    """Samples that a worker of a DataLoader taps."""

    def __init__(self, tap):
        self.tap = tap

    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            h, logits = self.tap(seeded(1, 4, seed=i))
        return h[0], logits[0]


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_in_a_worker(norm):
    _, tap = make(norm)
    tap.eval()
    h, logits = next(iter(DataLoader(Tapped(tap), batch_size=4, num_workers=1)))
    theirs = tap(torch.cat([seeded(1, 4, seed=i) for i in range(4)]))
    assert torch.allclose(h, theirs[0], atol=1e-5)
    assert torch.allclose(logits, theirs[1], atol=1e-5)


def test_pickled():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    tap = Tap(model, find_head(model, seeded(5, 4)))
    again = pickle.loads(pickle.dumps(tap))
    assert torch.equal(again(seeded(3, 4))[0], tap(seeded(3, 4))[0])
    assert again.head.certificate == tap.head.certificate


def test_threads_do_not_mix():
    _, tap = make("layer")
    tap.eval()
    inputs = [seeded(50, 4, seed=i) for i in range(8)]
    expected = [tap(x)[0] for x in inputs]
    found = [[] for _ in inputs]

    def work(i):
        found[i] += [tap(inputs[i])[0] for _ in range(30)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(mine) == 30 for mine in found)
    assert all(torch.equal(h, right) for mine, right in zip(found, expected, strict=True) for h in mine)
    assert sum(hooks(tap.model)) == 0


class Auxiliary(nn.Module):
    """A second head of the same shape that runs first, and only in training."""

    def __init__(self, functional):
        super().__init__()
        self.a, self.aux, self.fc = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.functional = functional

    def forward(self, x):
        h = self.a(x)
        aux = self.aux(h.sin()) if self.training else None
        return (F.linear(h, self.fc.weight, self.fc.bias) if self.functional else self.fc(h)), aux


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.usefixtures("compiler")
def test_a_head_that_runs_in_training_alone_is_not_taken_for_it(functional, compiled):
    torch._dynamo.reset()
    model = Auxiliary(functional)
    tap = Tap(model, find_head(model, seeded(6, 4))).train()
    run = torch.compile(tap, backend="aot_eager") if compiled else tap
    h, logits = run(seeded(5, 4, seed=3))
    assert torch.allclose(tap.head(h), logits, atol=1e-5)
    assert torch.allclose(h, model.a(seeded(5, 4, seed=3)), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_token_picked_is_the_models_own_where_logits_tie(dtype):
    """Two classes with opposite rows, in half precision: many tokens have equal logits and different h."""

    class Pick(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(16, 2, bias=False)
            with torch.no_grad():
                self.score.weight[1] = -self.score.weight[0]

        def forward(self, x, last):
            return self.score(x).float()[torch.arange(len(x)), last]

    model = Pick().to(dtype)
    x, last = seeded(16, 512, 16).to(dtype), torch.randint(512, (16,), generator=torch.Generator().manual_seed(0))
    head = find_head(model, x[:4, :9], last[:4] % 9)
    assert head.certificate.positions == "picked"
    h, _ = Tap(model, head)(x, last)
    assert torch.equal(h, x[torch.arange(16), last])


def test_a_mean_that_leaves_out_padding_is_told_apart():
    def forward(self, x, mask):
        logits = self.fc(self.a(x))
        return (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    model = net(forward)
    x, mask = seeded(3, 5, 4), torch.ones(3, 5)
    tap = Tap(model, find_head(model, x, mask))
    assert tap.head.certificate.positions == "mean"
    tap(seeded(2, 7, 4), torch.ones(2, 7))
    mask[0, 3:] = 0
    with pytest.raises(RuntimeError, match="a mean may leave out padding"):
        tap(x, mask)


def test_a_map_resized_by_a_factor_is_told_apart():
    model = FOUND["1x1 convolution, resized"].make()
    model._run = lambda self, x: F.interpolate(self.fc(self.a(x)), scale_factor=1.5, mode="bilinear")
    tap = Tap(model, find_head(model, seeded(2, 2, 8, 8)))  # 6 x 6 becomes 9 x 9, as by size
    tap(seeded(1, 2, 10, 10))
    with pytest.raises(RuntimeError, match="resized by a factor"):
        tap(seeded(2, 2, 11, 11))  # 9 x 9 becomes 13 x 13


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "cast", "load"])
def test_head_and_model_stay_one(way):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    tap = Tap(model, find_head(model, seeded(5, 4)))
    if way == "deepcopy":
        tap = copy.deepcopy(tap)
    elif way == "pickle":
        tap = pickle.loads(pickle.dumps(tap))
    elif way == "cast":
        model.double().float()
    else:
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    tap(seeded(5, 4))
    with torch.no_grad():
        for parameter in tap.model.parameters():
            parameter.add_(1)
    h, logits = tap(seeded(5, 4))
    assert torch.allclose(tap.head(h), logits, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "layer norm", "learned temperature", "weight norm", "functional"])
def test_a_pair_sees_that_the_model_was_trained(name):
    model, x = FOUND[name].make(), FOUND[name].inputs
    head = find_head(model, x)
    pair = GenerativePair(head, Sphere(1.0))
    h, _ = Tap(model, head)(x)
    pair.log_prob(h.detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), torch.arange(6) % 3).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="weights changed"):
        pair.log_prob(h.detach())


def _assigned(model):
    model.load_state_dict(
        {name: value + 0.1 * value.square() for name, value in model.state_dict().items()}, assign=True
    )


def _replaced(model):
    model[-1] = nn.Linear(model[-1].in_features, model[-1].out_features)


def _wrapped(model):
    model[-1] = nn.Sequential(nn.Linear(model[-1].in_features, model[-1].out_features))


def _averaged(model):
    for parameter in model.parameters():
        parameter.data.lerp_(torch.ones_like(parameter), 0.5)


def _exchanged(model):
    model[-1].weight.data = model[-1].weight.data.flip(0)


def _through_numpy(model):
    model[-1].bias.detach().numpy()[1] += 1


def _foreach(model):
    torch._foreach_mul_([parameter.data for parameter in model.parameters()], 2.0)


CHANGES = [_assigned, _replaced, _wrapped, _averaged, _exchanged, _through_numpy, _foreach]


@pytest.mark.filterwarnings("ignore:the weight of the model's head")
@pytest.mark.parametrize("change", CHANGES)
def test_a_pair_sees_every_way_to_change_the_weights(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 4)
    tap = Tap(model, find_head(model, x))
    bases = [Sphere(1.0), Marginal.fit(tap.head, tap(x)[0].detach(), kind="bank", rectified=False)]
    pairs = [GenerativePair(tap.head, base) for base in bases]
    assert all(pair.prior.probs.isfinite().all() for pair in pairs)
    change(model)
    h = tap(x)[0].detach()
    for pair in pairs:
        with pytest.raises(RuntimeError, match="weights changed"):
            pair.prior  # noqa: B018
        with pytest.raises(RuntimeError, match="weights changed"):
            pair.posterior(h)
        with pytest.raises(RuntimeError, match="weights changed"):
            pair.given(0)
    again = GenerativePair(find_head(model, x), Sphere(1.0))
    assert torch.allclose(again.posterior(h).logits.softmax(-1), model(x).softmax(-1), atol=1e-6)


def test_a_head_that_follows_its_model_has_the_mean_row_of_its_weights():
    fc = nn.Linear(8, 3)
    head = Head(fc.weight, fc.bias)
    fc.weight.data.mul_(3)
    assert torch.equal(head.centered_weight(), Head(fc.weight).centered_weight())
    with torch.no_grad():
        fc.weight.add_(torch.arange(8.0))
    fresh = GenerativePair(Head(fc.weight, fc.bias), Sphere(2.0))
    assert torch.equal(GenerativePair(head, Sphere(2.0)).prior.logits, fresh.prior.logits)


@pytest.mark.parametrize("derive", [Head.clone, lambda head: head.with_temperature(2.0), Head.centered])
@pytest.mark.parametrize("name", ["mlp", "layer norm", "weight norm", "functional"])
def test_a_tap_says_that_its_head_is_another_than_the_models(name, derive):
    model, x = FOUND[name].make(), FOUND[name].inputs
    tap = Tap(model, derive(find_head(model, x)))
    pair = GenerativePair(tap.head, Sphere(1.0))
    h = tap(x)[0].detach()
    pair.log_prob(h)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    with pytest.warns(UserWarning, match="is not that of this tap's head"):
        tap(x)
    with pytest.raises(RuntimeError, match="weights changed"):
        pair.log_prob(h)


def test_a_pair_on_a_copy_of_the_head_stays_when_the_model_is_trained():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    pair = GenerativePair(find_head(model, torch.randn(6, 4)).clone(), Sphere(1.0))
    before = pair.prior.probs
    with torch.no_grad():
        model[2].weight.mul_(2)
    assert torch.equal(pair.prior.probs, before)


def test_a_head_outlives_its_model():
    head = find_head(FOUND["layer norm"].make(), FOUND["layer norm"].inputs)
    version = head.version
    gc.collect()
    assert head.version == version
    pair = GenerativePair(head)
    assert pair.log_prob(torch.randn(2, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_folded_tap_in_another_precision(dtype):
    model = FOUND["layer norm"].make()
    tap = Tap(model, find_head(model, seeded(6, 4))).eval().to(dtype)
    h, logits = tap(seeded(6, 4).to(dtype))
    assert logits.dtype == dtype
    assert torch.allclose(tap.head(h), logits.to(h.dtype), atol=0.05)


@pytest.mark.parametrize(
    "name", ["W first", "matmul and a bias", "addmm", "einsum", "inner", "tensordot", "functional"]
)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])  # 3 classes, 4 inputs, 8 features
def test_a_batch_as_large_as_the_number_of_classes_is_not_taken_for_w(name, count):
    model = FOUND[name].make()
    tap = Tap(model, find_head(model, FOUND[name].inputs))
    x = seeded(count, 4)
    h, logits = tap(x)
    assert torch.allclose(tap.head(h), model(x), atol=1e-5)
    assert torch.equal(logits, model(x))
    assert find_head(model, x).certificate.residual <= 1e-6


def test_a_batch_of_other_positions_is_refused():
    case = FOUND["1x1 convolution, pooled"]
    model, x = case.make(), seeded(3, 2, 3, 3)  # one pixel is left, and its mean is itself
    tap = Tap(model, find_head(model, x))
    assert tap.head.certificate.positions == "same"
    with pytest.raises(RuntimeError, match="find the head again with a batch like this one"):
        tap(case.inputs)


@pytest.mark.parametrize("name", ["layer norm", "functional", "scaled", "1x1 convolution", "language model"])
def test_half_precision_with_float_logits(name):
    case = FOUND[name]
    half = case.make().bfloat16()

    class Float(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = half

        def forward(self, x):
            out = self.inner(x if x.dtype == torch.int64 else x.bfloat16())
            return (out["logits"] if isinstance(out, dict) else out).float()

    model = Float().eval()
    head = find_head(model, case.inputs)
    assert head.certificate.folded == case.says.get("folded")
    h, logits = Tap(model, head)(case.inputs)
    assert logits.dtype == torch.float32
    assert torch.allclose(head(h).float(), logits, atol=0.03 * logits.abs().max().item())


# ---- training mode -----------------------------------------------------------------------------------------

LAYERS = {
    "BatchNorm1d": nn.BatchNorm1d(8),
    "SyncBatchNorm": nn.SyncBatchNorm(8),
    "Dropout": nn.Dropout(0.5),
    "AlphaDropout": nn.AlphaDropout(0.1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_training_mode_without_gradients_is_told_once(name):
    model = nn.Sequential(nn.Linear(4, 8), copy.deepcopy(LAYERS[name]), nn.Linear(8, 3)).eval()
    tap = pickle.loads(pickle.dumps(Tap(model, find_head(model, torch.randn(5, 4)))))
    with torch.no_grad():
        tap(torch.randn(5, 4))
    tap.train()
    if name != "SyncBatchNorm":
        # It takes tensors of an accelerator in training.
        tap(torch.randn(5, 4))
    with torch.no_grad(), pytest.warns(UserWarning, match=f"training mode and gradients are off: {name} .*tap.eval"):
        tap(torch.randn(5, 4)) if name != "SyncBatchNorm" else tap._warn_of_training_mode()
    with torch.inference_mode():
        tap(torch.randn(5, 4)) if name != "SyncBatchNorm" else tap._warn_of_training_mode()


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8).eval()])
def test_layers_that_do_not_change_in_training(layer):
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))
    tap = Tap(model, find_head(model, torch.randn(5, 4)))
    tap.train()
    layer.train(not isinstance(layer, nn.BatchNorm1d))
    with torch.no_grad():
        tap(torch.randn(5, 4))
