import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penult.activations import Tap
from penult.head import HeadCertificate, HeadNotFoundError, find_head
from zoo import FOUND, IDS, REFUSED, LanguageModel, Net, cnn, mlp, net, seeded, shake, tokens, twice


def batch(name):
    return seeded(6, 1, 9, 9) if name == "cnn" else seeded(6, 4)


def logits_of(output):
    if isinstance(output, dict):
        return output["out"] if "out" in output else output["logits"]
    if isinstance(output, tuple):
        return next(entry for entry in output if isinstance(entry, torch.Tensor) and entry.ndim)
    for name in ("logits", "prediction"):
        output = getattr(output, name, output)
    return output


# ---- the zoo ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUND)
def test_the_zoo(name):
    case = FOUND[name]
    model, x = case.make(), case.inputs
    head = find_head(model, x)
    certificate = head.certificate
    assert certificate.path == case.path
    assert certificate.before == case.before
    assert certificate.support == case.support
    assert certificate.residual <= 1e-6
    assert certificate.confirmed <= 1e-5
    assert certificate.shape == (head.num_classes, head.in_features) == tuple(head.weight.shape)
    defaults = {"folded": None, "log_softmax": False, "positions": "same", "class_axis": None, "scale": None}
    for fact, value in (defaults | case.says).items():
        if value is not None or fact in case.says:
            assert getattr(certificate, fact) == (pytest.approx(value) if fact == "scale" else value), fact
    if "scale" not in case.says and "temperature" not in name and "learned" not in name:
        assert certificate.scale == 1
    inner = getattr(model, "_orig_mod", model)
    inner = inner.module if isinstance(inner, nn.DataParallel) else inner
    assert inner.get_submodule(certificate.path) is not None
    if case.shares:  # the head takes no memory beside the model's own
        assert head.weight.data_ptr() in {value.data_ptr() for value in inner.parameters()}
    # The same by the name of its module, or of the module that holds W.
    for path in {certificate.path, (certificate.weight or "").rpartition(".")[0]}:
        again = find_head(model, x, path=path)
        assert torch.equal(again.weight, head.weight)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", FOUND)
def test_the_tap_of_the_zoo_gives_the_softmax_of_the_model(name, fold):
    case = FOUND[name]
    model, x = case.make(), case.inputs
    head = find_head(model, x, fold=fold)
    model.eval()
    fresh = x.roll(1, -1) if x.dtype == torch.int64 else 0.7 * x.roll(1, 0) - 0.2
    tap = Tap(model, head)
    h, logits = tap(fresh)
    theirs = logits_of(model(fresh)).movedim(head.certificate.class_axis, -1)
    assert torch.allclose(logits, theirs, atol=1e-6)
    assert h.shape == (*logits.shape[:-1], head.in_features)
    assert len(tap.axes) == h.ndim - 1
    assert torch.allclose(head(h).softmax(-1), theirs.softmax(-1), atol=1e-5)
    if not head.certificate.log_softmax:
        assert torch.allclose(head(h), theirs, atol=1e-4)
    assert not fold or (head.certificate.folded == case.says.get("folded"))


def test_a_learned_scale_is_found():
    model = FOUND["learned temperature"].make()
    assert find_head(model, seeded(6, 4)).certificate.scale == pytest.approx(1 / model.t.item(), rel=1e-6)


def test_a_bias_added_later_is_the_models_own():
    model = FOUND["matmul and a bias"].make()
    head = find_head(model, seeded(6, 4))
    assert torch.equal(head.bias, model.c)
    assert head.certificate.residual == 0


def test_one_sample_will_do_where_nothing_is_fitted():
    assert find_head(mlp(nn.ReLU()), seeded(1, 4)).certificate.confirmed == 0
    assert find_head(FOUND["scaled"].make(), seeded(1, 4)).certificate.scale == pytest.approx(16)


def test_interpolations():
    for mode, options, name in (
        ("bilinear", {"align_corners": True}, "bilinear aligned"),
        ("nearest", {}, "nearest"),
        ("bicubic", {"align_corners": False}, "bicubic"),
    ):
        model = FOUND["1x1 convolution, resized"].make()
        model._run = lambda self, x, m=mode, o=options: F.interpolate(self.fc(self.a(x)), (9, 11), mode=m, **o)
        head = find_head(model, seeded(2, 2, 6, 5))
        assert head.certificate.positions == name
        h, logits = Tap(model, head)(seeded(2, 2, 6, 5, seed=2))
        assert h.shape == (2, 9, 11, 8)
        assert torch.allclose(head(h), logits, atol=1e-5)


def test_tokens_and_tied_weights():
    model = LanguageModel()
    head = find_head(model, input_ids=IDS)
    assert head.certificate.samples == 15
    assert head.bias is None
    assert (head.norm, head.certificate.norm_path) == ("rms", "norm")
    assert head.radius == pytest.approx(math.sqrt(8))
    plain = find_head(model, input_ids=IDS, fold=False)
    assert plain.weight.data_ptr() == model.embed.weight.data_ptr()
    assert plain.norm is plain.certificate.folded is plain.radius is None


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)])
def test_folding_is_exact(norm):
    model, x = mlp(norm).double(), batch("").double()
    head = find_head(model, x)
    gamma, beta = model[1].weight, getattr(model[1], "bias", None)
    assert torch.allclose(head.weight, model[2].weight * gamma, rtol=1e-14)
    shift = 0 if beta is None else model[2].weight @ beta
    assert torch.allclose(head.bias, model[2].bias + shift, rtol=1e-14)
    low, high = head.certificate.norms
    assert low == pytest.approx(math.sqrt(8), rel=1e-2)
    assert high <= math.sqrt(8)
    assert not head.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, x = mlp(nn.ReLU()).to(dtype), batch("").to(dtype)
    head = find_head(model, x)
    assert head.weight.dtype == dtype
    assert head.certificate.residual == 0
    folded = find_head(mlp(nn.LayerNorm(8)).to(dtype), x)
    assert folded.norm == "layer"
    assert folded.weight.dtype == torch.float32  # what the fold computes, half precision could not hold


def test_under_autocast_and_inference_mode():
    with torch.inference_mode():
        assert find_head(mlp(nn.LayerNorm(8)), batch("")).norm == "layer"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_head(mlp(nn.ReLU()), batch("")).certificate.path == "2"


def test_a_view_of_another_dimension_is_not_folded():
    # The head reads the tokens' dimension of what the norm gives: gamma cannot be folded into it.
    model = Net(
        lambda self, x: self.fc(self.norm(x[:, None, :] * torch.arange(1.0, 5.0)[:, None]).mT[:, 0]),
        norm=nn.LayerNorm(4),
        fc=nn.Linear(4, 3),
    )
    shake(model)
    head = find_head(model, batch(""))
    assert head.norm is None
    assert head.certificate.residual < 1e-6


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (lambda o: o + 1, "add"),
        (lambda o: o.mul_(2), "mul_"),
        (lambda o: o.flip(-1), "flip"),
        (lambda o: torch.relu(o), "relu"),
    ],
)
def test_what_changes_the_norms_output_is_not_folded(step, name):
    model = net(lambda self, x: self.fc(step(self.norm(self.a(x)))), norm=nn.LayerNorm(8))
    head = find_head(model, batch(""))
    assert head.norm is None
    assert head.certificate.before == name


def test_the_residual_stream_may_go_on_in_place():
    def forward(self, x):
        x = self.a(x)
        h = self.norm(x)
        x.add_(1)  # what the norm read is gone
        return self.fc(h)

    head = find_head(net(forward, norm=nn.LayerNorm(8)), batch(""))
    assert head.norm == "layer"
    assert head.certificate.support == "sphere"


@pytest.mark.parametrize("between", [nn.LayerNorm(8, eps=0.5), nn.LayerNorm(8)])
def test_one_sample_does_not_make_a_sphere(between):
    mean = net(lambda self, x: self.fc(self.norm(tokens(self, x)).mean(1)), norm=nn.LayerNorm(8))
    for model, support in ((mlp(between), "ball" if between.eps == 0.5 else "sphere"), (mean, "ball")):
        assert find_head(model, seeded(1, 4)).certificate.support == support


def test_some_rows_may_be_zero():
    model = LanguageModel()
    with torch.no_grad():
        model.embed.weight[0] = 0  # as that of a padding token
    head = find_head(model, IDS)
    assert head.certificate.empty == 1
    assert "1 classes have a row of zeros" in str(head.certificate)
    h, logits = Tap(model, head)(IDS)
    assert torch.allclose(head(h), logits, atol=1e-5)


def test_a_norm_of_ones_with_a_gain_of_another_name_is_not_folded():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return F.rms_norm(x, (8,)) * self.gamma

    model = mlp(Norm())
    with torch.no_grad():
        model[1].gamma.fill_(1)
    assert find_head(model, seeded(6, 4)).norm is None


def test_a_gain_of_zero_is_not_folded():
    model = mlp(nn.LayerNorm(8))
    with torch.no_grad():
        model[1].weight[3] = 0
    head = find_head(model, batch(""))
    assert head.norm is None
    assert head.certificate.before == "LayerNorm"
    assert torch.equal(head.weight, model[2].weight)


def test_norm_subclasses_are_not_trusted():
    class Strange(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.flip(-1)) ** 3

    head = find_head(mlp(Strange(8)), batch(""))
    assert head.norm is None
    assert head.certificate.before == "Strange"


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_the_refused(name):
    make, x, words = REFUSED[name]
    with pytest.raises(HeadNotFoundError, match=words):
        find_head(make(), x)


@pytest.mark.parametrize(
    "name",
    ["softmax", "softmax over maps", "sigmoid", "soft cap", "relu after the last convolution", "relu after the head"],
)
def test_the_refused_where_values_are_so_small_that_all_looks_affine(name):
    make, x, _ = REFUSED[name]
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-2)
    with pytest.raises(HeadNotFoundError, match="residual"):
        find_head(model, x)


def test_refusals_name_the_three_nearest():
    model = net(
        lambda self, x: torch.tanh(self.fc(self.a(x)) + self.b(x) + self.c(x.cos())),
        b=nn.Linear(4, 3), c=nn.Linear(4, 3), d=nn.Linear(8, 3),
    )  # fmt: skip
    with pytest.raises(HeadNotFoundError) as caught:
        find_head(model, seeded(6, 4))
    words = str(caught.value)
    assert "shape (6, 3) within tolerance 0.0001" in words
    nearest = words.split("nearest: ")[1].split(")\u2009")[0]
    assert nearest.count("residual") == 3
    residuals = [float(part.split("residual ")[1].split(";")[0].split(")")[0]) for part in nearest.split("; ")[:3]]
    assert residuals == sorted(residuals)
    assert all(f"{name} (linear" in nearest for name in ("fc", "b", "c"))


def test_multi_label_models_are_refused():
    model = mlp(nn.ReLU())
    model.config = type("Config", (), {"problem_type": "multi_label_classification"})()
    with pytest.raises(HeadNotFoundError, match=r"multi_label_classification.*do not exclude each other"):
        find_head(model, seeded(6, 4))


def test_a_tolerance_accepts_what_is_near():
    make, x, _ = REFUSED["the largest of two heads"]
    assert find_head(make(), x, tolerance=100.0).num_classes == 3


def test_models_that_cannot_be_watched():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        scripted = torch.jit.script(mlp(nn.ReLU()))
    with pytest.raises(TypeError, match="TorchScript"):
        find_head(scripted, seeded(6, 4))
    with pytest.raises(HeadNotFoundError, match="'0' is TorchScript, so its computation cannot be watched"):
        find_head(nn.Sequential(scripted), seeded(6, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.jit.script(nn.ReLU())
    assert find_head(mlp(part), seeded(6, 4)).certificate.path == "2"

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(TypeError, match="are sharded"):
        find_head(nn.Sequential(FullyShardedDataParallel()), seeded(6, 4))


def test_a_second_batch_that_a_model_refuses():
    def forward(self, x):
        if x[0, 0] != 1:
            raise ValueError("not mine")
        return self.fc(self.a(x)) * self.scale

    x = seeded(6, 4)
    x[0, 0] = 1
    model = net(forward)
    model.scale = 1
    assert find_head(model, x).certificate.confirmed is None
    assert "not confirmed" in str(find_head(model, x).certificate)
    model.scale = 2
    with pytest.raises(HeadNotFoundError, match="needs a second batch to confirm"):
        find_head(model, x)


def test_a_batch_without_variety_confirms_nothing():
    model = FOUND["scaled"].make()
    assert find_head(mlp(nn.ReLU()), torch.zeros(6, 4)).certificate.confirmed is None
    with pytest.raises(HeadNotFoundError, match="give several different samples"):
        find_head(model, torch.zeros(6, 4))


def test_path():
    model = net(lambda self, x: self.fc(self.a(x)), other=nn.Linear(8, 3), act=nn.ReLU())
    with pytest.raises(ValueError, match=r"no module at path 'head'; its last modules: 'a', 'fc'"):
        find_head(model, batch(""), path="head")
    with pytest.raises(HeadNotFoundError, match="nothing computed in 'act' reproduces"):
        find_head(model, batch(""), path="act")
    with pytest.raises(HeadNotFoundError, match="nothing computed in 'other' reproduces"):
        find_head(model, batch(""), path="other")


def test_bad_models_and_outputs():
    with pytest.raises(TypeError, match=r"model is a function; expected an nn\.Module"):
        find_head(lambda x: x, batch(""))
    with pytest.raises(TypeError, match=r"a dict with keys \['z', 'y'\], which holds no logits"):
        find_head(net(lambda self, x: {"z": self.fc(self.a(x)), "y": x}), batch(""))
    with pytest.raises(ValueError, match=r"the model's output holds 18 values"):
        find_head(net(lambda self, x: self.fc(self.a(x)) / 0.0), batch("") * 0 + 1)
    untrained = mlp(nn.ReLU())
    nn.init.zeros_(untrained[2].weight)
    with pytest.raises(ValueError, match=r"class 0, 1, 2 are all zero"):
        find_head(untrained, batch(""))


def test_the_last_of_equal_calls_is_recorded():
    def forward(self, x):
        h = self.a(x)
        self.fc(h)
        return self.fc(h)

    assert find_head(net(forward), batch("")).certificate.call == 1
    assert find_head(net(twice), batch("")).certificate.call == 1


def test_odd_modules_do_no_harm():
    class Pair(nn.Module):
        def forward(self, x):
            return x, {"x": x.to_sparse()}

    def forward(self, x):
        x, other = self.pair(self.drop(self.a(x)))
        self.any((x, other))
        self.any(x.to_sparse())
        return self.fc(x)

    model = net(forward, pair=Pair(), any=nn.Identity(), drop=nn.Dropout())
    assert find_head(model, batch("")).certificate.before == "Linear"


# ---- find_head: nothing is left behind --------------------------------------------------------------------


class Stubborn(nn.Module):
    """Random, keeps statistics, and has a frozen part: much that a careless finder would disturb."""

    def __init__(self, fail=False):
        super().__init__()
        self.a, self.bn, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.frozen = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU())
        self.fc = nn.Linear(8, 3)
        self.fail = fail
        self.train()
        self.frozen.eval()

    def forward(self, x):
        x = self.frozen(self.drop(self.bn(self.a(x))))
        x = x + torch.rand_like(x)
        if self.fail:
            raise RuntimeError("out of memory, say")
        return self.fc(x)


def snapshot(model):
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()
        },
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "rng": torch.get_rng_state(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
    }


def assert_same(before, after):
    for key in before:
        if key == "state":
            assert all(torch.equal(before[key][name], after[key][name]) for name in before[key])
        elif key == "rng":
            assert torch.equal(before[key], after[key])
        else:
            assert before[key] == after[key]


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind(fail):
    model, x = Stubborn(fail), batch("")
    seen = []
    handle = model.fc.register_forward_hook(lambda *args: seen.append(1))
    before = snapshot(model)
    if fail:
        with pytest.raises(RuntimeError, match="out of memory"):
            find_head(model, x)
    else:
        assert find_head(model, x).certificate.path == "fc"
    assert_same(before, snapshot(model))
    assert seen == ([] if fail else [1, 1])  # two forwards, in which the user's own hook ran
    handle.remove()
    assert all(p.grad is None for p in model.parameters())


def test_other_state_is_not_left_behind():
    import random

    import numpy as np

    class Messy(nn.Module):
        """Counts in buffers, caches, draws from three sources, and merges weights in eval mode, as some adapters do."""

        def __init__(self):
            super().__init__()
            self.a, self.fc, self.merged = nn.Linear(4, 8), nn.Linear(8, 3), False
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("cache", None)
            self.register_buffer("sized", torch.zeros(0))

        def train(self, mode=True):
            if mode == self.merged:
                with torch.no_grad():
                    self.fc.weight.add_(-1.0 if mode else 1.0)
                self.merged = not mode
            return super().train(mode)

        def forward(self, x):
            self.steps += 1
            self.cache = x * random.random()
            self.sized.resize_(5).fill_(np.random.rand())  # noqa: NPY002
            self.register_buffer("extra", torch.ones(2))
            return self.fc(self.a(x))

    model = Messy().train()
    weight, state, draws = model.fc.weight.clone(), random.getstate(), np.random.get_state()  # noqa: NPY002
    find_head(model, batch(""))
    assert model.training
    assert not model.merged
    assert torch.allclose(model.fc.weight, weight, atol=1e-6)  # merged and unmerged
    assert model.steps == 0
    assert model.cache is None
    assert model.sized.shape == (0,)
    assert "extra" not in model.state_dict()
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == draws[1].tolist()  # noqa: NPY002


def test_a_refusal_leaves_nothing_behind_either():
    model = REFUSED["softmax"][0]().train()
    before = snapshot(model)
    with pytest.raises(HeadNotFoundError):
        find_head(model, batch(""))
    assert_same(before, snapshot(model))


# ---- the certificate --------------------------------------------------------------------------------------


def test_certificate_reads_well():
    head = find_head(cnn(), batch("cnn"))
    first, *details = str(head.certificate).splitlines()
    assert first.startswith("path=fc  linear 8->3  residual=")
    assert first.endswith("support: orthant (>=0)  before: AdaptiveAvgPool2d")
    assert len(details) == 5
    head = find_head(mlp(nn.LayerNorm(8)), batch(""))
    assert "LayerNorm at 1: ideal radius sqrt(8) = 2.8284" in str(head.certificate)
    assert "path=(the model itself)" in str(find_head(shake(nn.Linear(4, 3)), batch("")).certificate)
    assert "box [" in str(find_head(mlp(nn.ReLU6()), batch("")).certificate)


def test_certificate_tells_what_was_seen():
    model = mlp(nn.ReLU())
    x = seeded(50, 4)
    h = model[:2](x).detach()
    certificate = find_head(model, x).certificate
    assert certificate.zeros == pytest.approx((h == 0).float().mean().item())
    assert certificate.norms == pytest.approx((h.norm(dim=1).min().item(), h.norm(dim=1).max().item()))
    assert (certificate.minimum, certificate.maximum) == (h.min().item(), h.max().item())
    assert certificate.gauge == pytest.approx(model[2].weight.mean(0).norm().item())
    assert HeadCertificate(**dataclasses.asdict(certificate)) == certificate
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.path = "x"


def test_derived_heads_keep_the_certificate_while_h_is_the_models():
    head = find_head(mlp(nn.ReLU()), batch(""))
    for other in (head.centered(), head.with_temperature(2), head.clone()):
        assert other.certificate is head.certificate
    assert head.rescaled()[0].certificate is None


def test_what_a_processor_gives_goes_by_keyword():
    model = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r"no mapping by position \(TypeError: .*find_head\(model, \*\*batch\)"):
        find_head(model, {"pixel_values": seeded(6, 4)})
