"""Models that hold or compute tensors of every kind that is no array of real numbers."""

import functools
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import penult
from penult.head import Head, HeadNotFoundError, find_head
from zoo import Net, mlp, net, seeded, shake

X = seeded(6, 4)


def nested(rows):
    with warnings.catch_warnings():
        # torch warns that nested tensors are a prototype.
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([rows[:2], rows[2:]])


def padded(ragged):
    return torch.nested.to_padded_tensor(ragged, 0.0).flatten(0, 1)[:6]


class Raises(nn.Module):
    """Every attribute that `find_head` might ask for raises."""

    weight = bias = eps = config = logits = property(lambda self: 1 / 0)

    def forward(self, x):
        return x + 0


class NamedLikeANorm(nn.Module):
    """A gain with a bias of another kind, and an eps that is no number."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(8)), True, "1e-6"

    def forward(self, x):
        return F.layer_norm(x, (8,)) * self.weight


class Wrapped(torch.Tensor):
    """A subclass that answers no question."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "as_subclass":
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(f"{func} of a Wrapped")


class Catches(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        try:
            return self.part(x.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1))
        except RuntimeError:
            return x


def float8(x):
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def quantised(x):
    with warnings.catch_warnings():
        # torch deprecates quantised tensors.
        warnings.simplefilter("ignore")
        return F.relu(torch.quantize_per_tensor(x, 0.01, 0, torch.qint8)).dequantize()


WATCHED = {
    "complex": lambda x: torch.fft.ifft(torch.fft.fft(x) @ torch.eye(8, dtype=torch.complex64)).real,
    "complex, of a relu": lambda x: (x.relu().to(torch.complex64) @ torch.eye(8, dtype=torch.complex64)).abs(),
    "complex linear": lambda x: F.linear(torch.polar(x.abs(), x), torch.eye(8, dtype=torch.complex64)).abs(),
    "nested": lambda x: padded(F.relu(nested(x))),
    "sparse": lambda x: (torch.eye(8).to_sparse() @ x.T).T,
    "compressed rows": lambda x: (torch.eye(8).to_sparse_csr() @ x.T).T,
    "float8": float8,
    "quantised": quantised,
    "integers": lambda x: (100 * x).round().long().clamp(0).float() + x,
    "meta": lambda x: x + 0 * F.linear(x.to("meta"), torch.eye(8, device="meta")).ndim,
    "vmap": lambda x: torch.vmap(lambda row: torch.eye(8) @ row.relu())(x),
    "grad": lambda x: torch.func.vmap(torch.func.grad(lambda row: (torch.eye(8) @ row.relu()).sum()))(x) + x,
    "empty": lambda x: x + F.linear(x[:0], torch.eye(8)).sum(),
    "a subclass": lambda x: x + 0 * len([x.as_subclass(Wrapped)]),
}


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Sparse invariant")
def test_what_is_computed_inside_is_only_no_candidate(name):
    model = net(lambda self, x: self.fc(WATCHED[name](self.a(x))))
    head = find_head(model, X)
    assert head.certificate.path == "fc"
    h, logits = penult.Tap(model.eval(), head)(X)
    assert torch.allclose(head(h), logits, atol=1e-5)


@pytest.mark.parametrize(
    "part",
    [Raises(), NamedLikeANorm(), Catches(nn.Conv3d(5, 2, 3)), nn.Sequential(Raises())],
    ids=["raises", "like a norm", "catches", "raises inside"],
)
def test_odd_modules_are_only_watched(part):
    model = nn.Sequential(shake(nn.Linear(4, 8)), part, shake(nn.Linear(8, 3)))
    assert find_head(model, X).certificate.path == "2"


class ConfigRaises(nn.Module):
    def __getattr__(self, name):
        if name in ("config", "_orig_mod", "weight", "bias"):
            raise RuntimeError("not attached")
        return super().__getattr__(name)

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_attributes_that_raise():
    assert find_head(ConfigRaises(mlp(nn.ReLU())), X).certificate.path == "inner.2"


def test_buffers_and_parameters_that_hold_no_numbers():
    model = mlp(nn.ReLU())
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("meta", torch.ones(24, device="meta"))
    model.register_buffer("complex", torch.ones(3, dtype=torch.complex64))
    model.register_buffer("float8", torch.ones(24).to(torch.float8_e5m2))
    model.register_parameter("unused", nn.UninitializedParameter())
    model.register_buffer("empty", nn.UninitializedBuffer())
    model.register_parameter("offloaded", nn.Parameter(torch.ones(3, 8, device="meta")))
    head = find_head(model, X)
    assert head.certificate.path == "2"
    assert len(penult.Tap(model, head)(X)) == 2


def offload(module):
    """Keep the weights of a module on the meta device except in its forward, as offloading does."""
    values = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}

    def put(device):
        for name, value in values.items():
            module._parameters[name] = nn.Parameter(value.to(device, copy=True), requires_grad=False)

    put("meta")
    module.register_forward_pre_hook(lambda *_: put("cpu"))
    module.register_forward_hook(lambda *_: put("meta"), always_call=True)


@pytest.mark.parametrize(
    "between", [[nn.RMSNorm(8)], [nn.BatchNorm1d(8), nn.ReLU()], [nn.LayerNorm(8), nn.Dropout()]], ids=len
)
def test_offloaded_weights(between):
    model = mlp(*between).eval()
    expected = model(X)
    for layer in model:
        offload(layer)
    head = find_head(model, X)
    assert head.norm is None
    h, logits = penult.Tap(model, head)(X + 1)
    assert torch.allclose(head(h), logits, atol=1e-5)
    assert torch.allclose(head(penult.Tap(model, head)(X)[0]), expected, atol=1e-5)


def test_a_norm_that_is_offloaded_alone_is_not_folded():
    model = mlp(nn.LayerNorm(8))
    offload(model[1])
    head = find_head(model, X)
    assert (head.norm, head.certificate.weight) == (None, "2.weight")


@pytest.mark.parametrize("layer", [nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Sequential(nn.LazyLinear(8))])
def test_lazy_layers_are_not_created(layer):
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))
    with pytest.raises(TypeError, match=r"'1(.0)?' is a Lazy\w+ without weights yet.* Run the model once"):
        find_head(model, X)
    assert any(map(nn.parameter.is_lazy, (*layer.parameters(), *layer.buffers())))
    model(X)
    assert find_head(model, X).certificate.path == "2"


def test_a_lazy_layer_that_does_not_run_is_no_matter():
    model = net(lambda self, x: self.fc(self.a(x).relu()), act=nn.ReLU())
    model.unused = nn.LazyBatchNorm1d()
    assert len(penult.Tap(model, find_head(model, X))(X)) == 2


INPUTS = {
    "nested": (nested(X), padded),
    "nested, jagged": (torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged), lambda x: padded(x)),
    "nested, a list": ([nested(X)], lambda x: padded(x[0])),
    "sparse": (X.to_sparse(), torch.Tensor.to_dense),
    "complex": (torch.complex(X, X.flip(0)), torch.abs),
    "float8": (X.to(torch.float8_e4m3fn), torch.Tensor.float),
    "bytes": ((100 * X.abs()).to(torch.uint8), lambda x: x / 100),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_other_kinds(name, scale):
    x, step = INPUTS[name]
    model = net(lambda self, x: scale * self.fc(self.a(step(x)).relu()))
    head = find_head(model, x)
    assert head.certificate.path == "fc"
    assert head.certificate.confirmed <= 1e-5
    h, logits = penult.Tap(model, head)(x)
    assert torch.allclose(head(h), logits, atol=1e-5)


# ---- outputs ----------------------------------------------------------------------------------------------

OUTPUTS = {
    # name: what becomes of the logits, words of the error
    "classes": (lambda z: z.argmax(-1), TypeError, "a torch.int64 tensor; expected a floating-point tensor of logits"),
    "scores in integers": (lambda z: (1000 * z).round().int(), TypeError, "a torch.int32 tensor"),
    "a mask": (lambda z: z > 0, TypeError, r"a torch.bool tensor"),
    "complex": (lambda z: torch.complex(z, z.flip(0)), TypeError, r"a complex torch.complex64 tensor.* x.abs\(\)"),
    "complex, of double": (lambda z: torch.fft.fft(z.double()), TypeError, "a complex torch.complex128 tensor"),
    "nested": (lambda z: nested(z), TypeError, "a nested tensor.*to_padded_tensor"),
    "sparse": (lambda z: z.to_sparse(), TypeError, r"a sparse_coo tensor.* x.to_dense\(\)"),
    "float8": (lambda z: z.to(torch.float8_e5m2), TypeError, "a torch.float8_e5m2 tensor"),
    "meta": (lambda z: z.to("meta"), TypeError, "on meta, which holds no values"),
    "-inf": (lambda z: F.pad(z, (0, 2), value=-torch.inf), ValueError, "-inf for class 3, 4 in every row.* -1e9"),
    "empty": (lambda z: z[:0], ValueError, r"shape \(0, 3\), which holds no logits"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_no_logits(name):
    step, error, words = OUTPUTS[name]
    model = net(lambda self, x: step(self.fc(self.a(x).relu())))
    with pytest.raises(error, match=words):
        find_head(model, X)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        find_head(mlp(nn.ReLU()), X[:0])


def test_an_output_whose_logits_raise():
    class Out:
        logits = property(lambda self: 1 / 0)

    with pytest.raises(TypeError, match="output is a Out, which holds no logits"):
        find_head(net(lambda self, x: Out()), X)


@pytest.mark.filterwarnings("ignore")
def test_exported_programs_are_refused():
    program = torch.export.export(mlp(nn.ReLU()).eval(), (X,))
    for model in (program, program.module(), nn.Sequential(program.module())):
        with pytest.raises(TypeError, match=r"a program of torch.export .*pass the model that it was exported from"):
            find_head(model, X)
        with pytest.raises(TypeError, match="exported from"):
            penult.Tap(model, find_head(mlp(nn.ReLU()), X))


# ---- heads from W and b -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda w: w.to(torch.float8_e4m3fn), TypeError, r"a torch.float8_e4m3fn tensor.* x.to\(torch.bfloat16\)"),
        (lambda w: w.to(torch.float8_e5m2), TypeError, "a torch.float8_e5m2 tensor"),
        (lambda w: w.to_sparse(), TypeError, "a sparse_coo tensor"),
        (lambda w: w.to(torch.complex64), TypeError, "a complex torch.complex64 tensor"),
        (lambda w: w.to("meta"), ValueError, "on the meta device"),
        (lambda w: nn.UninitializedParameter(), TypeError, "not initialised"),
        (lambda w: w.long(), TypeError, "a torch.int64 tensor"),
    ],
)
def test_weights_that_hold_no_real_numbers(make, error, words):
    with pytest.raises(error, match=words):
        Head(make(seeded(3, 4)))


def test_a_bias_of_another_dtype():
    with pytest.raises((TypeError, ValueError), match="float8"):
        Head(seeded(3, 4), seeded(3).to(torch.float8_e4m3fn))


def test_a_refusal_is_told_of_a_model_with_complex_layers():
    model = Net(lambda self, x: torch.fft.fft(self.a(x)).abs() ** 2, a=nn.Linear(4, 3))
    with pytest.raises(HeadNotFoundError, match="residual"):
        find_head(shake(model), X)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("lengths", [(3, 5, 2), (1, 1), (4, 4, 4)])
def test_inputs_that_are_nested_tensors(lengths):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.nested.to_padded_tensor(self.body(x), 0.0).mean(1))

    ragged = torch.nested.nested_tensor([torch.randn(length, 4) for length in lengths])
    assert find_head(Pooled().eval(), ragged).certificate.path == "head"


# --- weights that are subclasses ----------------------------------------------------------------------------


class EightBits(torch.Tensor):
    """A weight of integers and a scale for each row, as packages for quantisation have it."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype, device=integers.device)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __repr__(self):
        return "EightBits()"

    def dequantize(self):
        return self.integers * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scale)
        if func.name() in ("aten::t", "aten::mm", "aten::addmm", "aten::linear"):
            return func(*(x.dequantize() if isinstance(x, cls) else x for x in args), **(kwargs or {}))
        raise NotImplementedError(f"{func} of EightBits")


def in_eight_bits(layer):
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    integers = (layer.weight.detach() / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(EightBits(integers, scale), requires_grad=False)


@pytest.mark.parametrize("make", [lambda: mlp(nn.ReLU()), lambda: mlp(nn.Tanh()), lambda: mlp(nn.LayerNorm(8))])
def test_a_quantised_head_is_refused_by_name_and_a_quantised_body_does_no_harm(make):
    model = make().eval()
    in_eight_bits(model[-1])
    with pytest.raises(HeadNotFoundError, match=r"'2.weight' of shape \(3, 8\) is a EightBits.*weight.dequantize"):
        find_head(model, X)
    plain = nn.Parameter(model[-1].weight.dequantize())
    model[-1].weight = plain
    in_eight_bits(model[0])
    assert torch.equal(find_head(model, X, fold=False).weight, plain)


# --- wrappers, checkpoints, autocast and threads -------------------------------------------------------------


class PassesOn(nn.Module):
    """A wrapper with a forward of its own, whose other attributes are those of the model inside."""

    def __init__(self, model, forward):
        super().__init__()
        self.model, self._run = model, forward

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x):
        return self._run(self.model, x)


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: m((x - 0.5) / 0.25), lambda m, x: 3 * m(x), lambda m, x: m(x.relu()).log_softmax(-1)],
)
def test_a_wrapper_that_passes_attributes_on_to_a_compiled_model(forward):
    model = PassesOn(torch.compile(mlp(nn.ReLU()), backend="eager"), forward).eval()
    tap = penult.Tap(model, find_head(model, X))
    assert torch.allclose(tap(X)[1], model(X), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.relu(),
        # Half of the values are a wider type than the product is computed in.
        lambda h: h.float().tanh(),
        lambda h: F.layer_norm(h.float(), (8,)),
    ],
)
@pytest.mark.parametrize("widened", [True, False])
def test_a_forward_that_enters_autocast_itself(dtype, between, widened):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype):
                logits = self.fc(between(self.a(x)))
            return logits.float() if widened else logits

    model = shake(Mixed()).eval()
    head = find_head(model, X)
    assert torch.equal(head.weight, model.fc.weight)
    h, logits = penult.Tap(model, head)(X)
    assert (head(h.float()) - logits).abs().max() <= 2 * torch.finfo(dtype).eps * logits.abs().max()


def test_a_sum_of_heads_under_autocast():
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return (self.fc(self.a(x).relu()) + self.other(self.a(x).tanh())).float() / 2

    model = shake(Net(forward, a=nn.Linear(4, 8), fc=nn.Linear(8, 3), other=nn.Linear(8, 3)))
    head = find_head(model, seeded(40, 4))
    assert [part.path for part in head.certificate.parts] == ["fc", "other"]


def checkpointed(where, reentrant):
    def forward(self, x):
        run = functools.partial(checkpoint, use_reentrant=reentrant) if torch.is_grad_enabled() else lambda f, u: f(u)
        if where == "head":
            return run(lambda u: self.fc(u.relu()), self.a(x))
        if where == "whole":
            return run(lambda u: self.fc(self.a(u).relu()), x)
        return self.fc(run(lambda u: u.relu(), self.a(x)))

    return shake(Net(forward, a=nn.Linear(4, 8), fc=nn.Linear(8, 3)))


@pytest.mark.parametrize("where", ["head", "whole"])
def test_a_head_in_a_reentrant_checkpoint_is_refused(where):
    model = checkpointed(where, True)
    tap = penult.Tap(model, find_head(model, X))
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"ran without gradients.*use_reentrant=False"):
        tap(x)
    with torch.no_grad():
        assert torch.equal(tap(x)[0], model.a(x).relu())


@pytest.mark.parametrize(("where", "reentrant"), [("head", False), ("whole", False), ("body", True), ("body", False)])
def test_other_checkpoints_keep_h_in_the_graph(where, reentrant):
    model = checkpointed(where, reentrant)
    h, logits = penult.Tap(model, find_head(model, X))(X)
    (h.square().sum() + logits.sum()).backward()
    assert model.a.weight.grad is not None


@pytest.mark.parametrize("frozen", [True, False])
def test_a_head_after_a_body_without_gradients_is_no_reentrant_checkpoint(frozen):
    def forward(self, x):
        with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
            h = self.a(x).relu()
        return self.fc(h)

    model = shake(Net(forward, a=nn.Linear(4, 8), fc=nn.Linear(8, 3)))
    h, logits = penult.Tap(model, find_head(model, X))(X)
    assert (h.requires_grad, logits.requires_grad) == (not frozen, True)


@pytest.mark.parametrize("make", [lambda: mlp(nn.ReLU()), lambda: mlp(nn.LayerNorm(8)), lambda: mlp(nn.Dropout())])
def test_the_head_of_one_model_is_found_in_several_threads_at_once(make):
    model = make().train()
    # All threads are within the forward at the same time, if nothing keeps them apart.
    model.insert(1, Net(lambda self, x: (time.sleep(0.005), x)[1]))
    certificates = []
    expected = find_head(model, X).certificate

    def search():
        certificates.extend(find_head(model, X).certificate for _ in range(3))

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert certificates == [expected] * 12
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_another_thread_may_run_the_model_while_its_head_is_found():
    started, finished = threading.Event(), threading.Event()

    def pause(self, x):
        if threading.current_thread() is threading.main_thread():
            started.set()
            finished.wait(10)
        return x

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Net(pause), nn.Linear(8, 3)).eval()

    def run():
        started.wait(10)
        model(X)
        finished.set()

    thread = threading.Thread(target=run)
    thread.start()
    certificate = find_head(model, X).certificate
    thread.join()
    assert (certificate.path, certificate.before, certificate.rectified) == ("3", "ReLU", True)
