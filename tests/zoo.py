"""Classifiers that carry their heads in every way known, and some that have none."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def seeded(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def shake(model):
    """Weights that are no round numbers, so that nothing matches by luck."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
                if tensor.ndim > 1:
                    tensor.sub_(0.5)
    return model


class Net(nn.Module):
    """Backbone, head, and a forward given as a function, so that a layout is one line."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            if isinstance(module, nn.Parameter):
                self.register_parameter(name, module)
            else:
                self.add_module(name, module)
        self._run = forward

    def forward(self, *args, **kwargs):
        return self._run(self, *args, **kwargs)


def mlp(*between, features=8):
    return shake(nn.Sequential(nn.Linear(4, features), *between, nn.Linear(features, 3)))


def net(forward, **modules):
    modules = {"a": nn.Linear(4, 8), "fc": nn.Linear(8, 3)} | modules
    return shake(Net(forward, **modules))


def conv_net(forward, **modules):
    modules = {"a": nn.Conv2d(2, 8, 3), "fc": nn.Conv2d(8, 3, 1)} | modules
    return shake(Net(forward, **modules))


def param(*shape, seed=3):
    return nn.Parameter(seeded(*shape, seed=seed))


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout()
        self.head = nn.Linear(8, 3)
        shake(self)

    def forward(self, x):
        tokens = self.norm(self.body(x[:, None].expand(-1, 5, -1) * torch.arange(1, 6)[:, None]))
        return self.head(self.drop(tokens[:, 2]))


class LanguageModel(nn.Module):
    """Tied weights; `pick` gives one token of each sequence, the last that is not 0."""

    def __init__(self, pick=False, functional=False):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        self.pick, self.functional = pick, functional
        shake(self)

    def forward(self, input_ids):
        h = self.norm(self.body(self.embed(input_ids)))
        logits = h @ self.embed.weight.T if self.functional else self.lm_head(h)
        if self.pick:
            last = (input_ids != 0).int().cumsum(1).argmax(1)
            logits = logits[torch.arange(len(logits)), last]
        return {"logits": logits}


class OneRMSNorm(nn.Module):
    """An RMSNorm with gain 1 + weight, as some language models write it."""

    def __init__(self, features):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(features)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


@dataclass
class Output:
    loss: Any
    prediction: torch.Tensor


def cnn():
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
    body = nn.Sequential(*layers)
    return shake(Net(lambda self, x: self.fc(torch.flatten(self.body(x), 1)), body=body, fc=nn.Linear(8, 3)))


def compiled():
    return torch.compile(mlp(nn.ReLU()), backend="eager")


def overwrite(self, x):
    h = F.relu(self.a(x))
    logits = self.fc(h)
    h.zero_()
    return logits


def twice(self, x):
    h = F.relu(self.a(x))
    self.fc(h * 2)
    logits = self.fc(h)
    self.fc(h + 1)
    return logits


def tokens(self, x):
    """Five tokens a sample."""
    return self.a(x[:, None] * torch.arange(1, 6)[:, None]).sin()


def product_net(product):
    """A network whose W h is computed by a function of h and W."""
    return net(lambda self, x: product(self.a(x).relu(), self.fc.weight))


def cosine(self, x):
    return 16 * F.linear(F.normalize(self.a(x)), F.normalize(self.w))


def clip(self, x):
    return self.s.exp() * F.normalize(self.a(x), dim=-1) @ F.normalize(self.w, dim=-1).t()


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps, as vision models write it."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CLIPSoftmaxNet(Net):
    """Named after functions that it does not call."""

    def forward(self, x):
        logits = torch.empty(len(x), 3)
        logits[:] = self.fc(self.a(x))
        return logits


def two_heads(self, x):
    return (self.fc(self.a(x)) + self.other(self.a(x))) / 2


def lora(self, x):
    h = self.a(x).relu()
    return self.fc(h) + 2 * self.b(self.c(h))


def masked(squash):
    def forward(self, x):
        logits = squash(self, x).clone()
        logits[:, 2] = -1e9
        return logits

    return forward


IDS = torch.tensor([[1, 5, 3, 0, 0], [9, 2, 4, 8, 6], [7, 10, 1, 1, 0]])
VECTORS, IMAGES, MAPS = seeded(6, 4), seeded(6, 1, 9, 9), seeded(3, 2, 6, 5)


@dataclass
class Case:
    """A model, its input, and what its certificate has to say."""

    make: Callable[[], nn.Module]
    path: str
    before: str | None
    support: str
    inputs: torch.Tensor = field(default_factory=lambda: VECTORS)
    shares: bool = True  # W is the model's own tensor
    says: dict[str, Any] = field(default_factory=dict)


LN, RMS = {"folded": "LayerNorm"}, {"folded": "RMSNorm"}

FOUND = {
    "mlp": Case(lambda: mlp(nn.ReLU()), "2", "ReLU", "orthant"),
    "cnn": Case(cnn, "fc", "AdaptiveAvgPool2d", "orthant", IMAGES),
    "dropout": Case(lambda: mlp(nn.ReLU(), nn.Dropout(0.9)), "3", "ReLU", "orthant"),
    "flatten": Case(lambda: mlp(nn.ReLU(), nn.Flatten(), nn.Identity()), "4", "ReLU", "orthant"),
    "tanh": Case(lambda: mlp(nn.Tanh(), nn.Dropout()), "3", "Tanh", "cube"),
    "functional tanh": Case(lambda: net(lambda self, x: self.fc(torch.tanh(self.a(x)))), "fc", "tanh", "cube"),
    "relu6": Case(lambda: mlp(nn.ReLU6()), "2", "ReLU6", "box"),
    "mean of relu6": Case(
        lambda: conv_net(lambda self, x: self.fc(F.relu6(self.a(x)).mean((2, 3))), fc=nn.Linear(8, 3)),
        "fc", "mean", "box", MAPS,
    ),
    "gelu": Case(lambda: mlp(nn.GELU()), "2", "GELU", "reals"),
    "functional before": Case(lambda: net(lambda self, x: self.fc(F.silu(self.a(x)))), "fc", "silu", "reals"),
    "normalised": Case(
        lambda: net(lambda self, x: self.fc(F.normalize(self.a(x), dim=-1))), "fc", "normalize", "sphere"
    ),
    "no backbone": Case(lambda: shake(nn.Linear(4, 3)), "", None, "reals"),
    "no bias": Case(lambda: net(lambda self, x: self.fc(self.a(x)), fc=nn.Linear(8, 3, bias=False)), "fc", "Linear",
                    "reals", says={"bias": False}),
    "two linear layers": Case(lambda: mlp(), "1", "Linear", "reals"),
    "in place": Case(lambda: mlp(nn.BatchNorm1d(8), nn.ReLU(inplace=True)), "3", "ReLU", "orthant"),
    "overwritten input": Case(lambda: net(overwrite), "fc", "relu", "orthant"),
    "head used thrice": Case(lambda: net(twice), "fc", "relu", "orthant", says={"call": 1, "forward_call": 1}),
    "aux head last": Case(
        lambda: net(lambda self, x: (self.fc(self.a(x)), self.aux(self.a(x))), main=nn.Identity(), aux=nn.Linear(8, 3)),
        "fc", "Linear", "reals",
    ),
    # how W is multiplied
    "functional": Case(
        lambda: net(lambda self, x: F.linear(self.a(x), self.fc.weight, self.fc.bias)), "", "Linear", "reals",
        says={"weight": "fc.weight", "kind": "linear"},
    ),
    "matmul and a bias": Case(
        lambda: net(lambda self, x: self.a(x).relu() @ self.w + self.c, w=param(8, 3), c=param(3)), "", "relu",
        "orthant", says={"weight": "w", "kind": "matmul", "bias": True, "scale": 1.0},
    ),
    "W first": Case(
        lambda: net(lambda self, x: (self.fc.weight @ self.a(x).T).T), "", "Linear", "reals", says={"kind": "matmul"}
    ),
    "addmm": Case(
        lambda: net(lambda self, x: torch.addmm(self.c, self.a(x), self.w), w=param(8, 3), c=param(3)), "", "Linear",
        "reals", says={"kind": "matmul", "bias": True},
    ),
    "addmm, weighted": Case(
        lambda: net(lambda self, x: torch.addmm(self.c, self.a(x), self.w, alpha=2.5), w=param(8, 3), c=param(3)), "",
        "Linear", "reals", shares=False, says={"scale": 2.5, "bias": True},
    ),
    "einsum": Case(
        lambda: net(lambda self, x: torch.einsum("kd,bd->bk", self.fc.weight, self.a(x)) + self.fc.bias), "", "Linear",
        "reals", says={"kind": "einsum", "weight": "fc.weight"},
    ),
    "einsum, classes first": Case(
        lambda: net(lambda self, x: torch.einsum("bnd,dk->bkn", tokens(self, x), self.w), w=param(8, 3)), "", "sin",
        "reals", says={"kind": "einsum", "class_axis": 1, "axes": ("batch", "length")},
    ),
    "inner": Case(lambda: net(lambda self, x: torch.inner(self.a(x), self.fc.weight)), "", "Linear", "reals"),
    "tensordot": Case(
        lambda: net(lambda self, x: torch.tensordot(self.a(x), self.fc.weight, dims=([1], [1]))), "", "Linear", "reals"
    ),
    "bmm": Case(
        lambda: product_net(lambda h, w: torch.bmm(h[None], w.T[None]).squeeze(0)), "", "relu", "orthant",
        says={"kind": "bmm", "weight": "fc.weight"},
    ),
    "bmm of expanded rows": Case(
        lambda: product_net(lambda h, w: torch.bmm(h.unsqueeze(1), w.T.expand(len(h), 8, 3)).squeeze(1)), "", "relu",
        "orthant", says={"kind": "bmm", "weight": "fc.weight"},
    ),
    "bmm of repeated rows": Case(
        lambda: product_net(lambda h, w: h.unsqueeze(1).bmm(w.T.repeat(len(h), 1, 1)).squeeze(1)), "", "relu",
        "orthant", says={"kind": "bmm", "weight": None}, shares=False,
    ),
    "bmm, W first": Case(
        lambda: product_net(lambda h, w: torch.bmm(w.expand(len(h), 3, 8), h.unsqueeze(2)).squeeze(2)), "", "relu",
        "orthant", says={"kind": "bmm", "weight_first": True},
    ),
    "bmm, a sample": Case(
        lambda: product_net(lambda h, w: torch.bmm(h.unsqueeze(1), w.T.expand(len(h), 8, 3)).squeeze(1)), "", "relu",
        "orthant", VECTORS[:1],
    ),
    "matmul of batches": Case(
        lambda: product_net(lambda h, w: torch.matmul(h[None], w.T[None])[0]), "", "relu", "orthant",
        says={"kind": "bmm"},
    ),
    "matmul, broadcast": Case(
        lambda: product_net(lambda h, w: (h @ w.T.expand(1, 1, 8, 3)).flatten(0, 2)), "", "relu", "orthant",
        says={"kind": "bmm"},
    ),
    "matmul of batches of tokens": Case(
        lambda: net(lambda self, x: tokens(self, x) @ self.fc.weight.T[None] + self.fc.bias), "", "sin", "reals",
        says={"kind": "bmm", "axes": ("batch", "token"), "bias": True},
    ),
    "matmul of batches, W first": Case(
        lambda: net(lambda self, x: torch.matmul(self.fc.weight[None], tokens(self, x).mT)), "", "sin", "reals",
        says={"kind": "bmm", "class_axis": 1},
    ),
    "matmul by keywords": Case(
        lambda: product_net(lambda h, w: torch.matmul(other=w.T, input=h)), "", "relu", "orthant"
    ),
    "baddbmm": Case(
        lambda: net(lambda self, x: torch.baddbmm(self.fc.bias[None, None], self.a(x).relu()[None],
                                                  self.fc.weight.T[None])[0]),
        "", "relu", "orthant", says={"kind": "bmm", "bias": True},
    ),
    "baddbmm, weighted": Case(
        lambda: net(lambda self, x: torch.baddbmm(self.fc.bias.expand(6, 1, 3), self.a(x).relu().unsqueeze(1),
                                                  self.fc.weight.T.expand(6, 8, 3), alpha=2.0)[:, 0]),
        "", "relu", "orthant", says={"scale": 2.0, "bias": True}, shares=False,
    ),
    "addmm of an expanded bias": Case(
        lambda: net(lambda self, x: torch.addmm(self.fc.bias.expand(len(x), 3), self.a(x), self.fc.weight.T)), "",
        "Linear", "reals", says={"bias": True, "kind": "matmul"},
    ),
    "addmm in place": Case(
        lambda: net(lambda self, x: self.fc.bias.repeat(len(x), 1).addmm_(self.a(x).relu(), self.fc.weight.T)), "",
        "relu", "orthant", says={"bias": True},
    ),
    "multi_dot": Case(
        lambda: product_net(lambda h, w: torch.linalg.multi_dot([h, w.T])), "", "relu", "orthant",
        says={"kind": "matmul"},
    ),
    "multi_dot of three": Case(
        lambda: net(lambda self, x: torch.linalg.multi_dot([self.a(x), self.b, self.fc.weight.T]), b=param(8, 8)), "",
        "Linear", "reals", shares=False, says={"weight": None},
    ),
    "aten.linear": Case(
        lambda: net(lambda self, x: torch.ops.aten.linear(self.a(x).relu(), self.fc.weight, self.fc.bias)), "", "relu",
        "orthant", says={"kind": "linear", "bias": True},
    ),
    "aten.mm": Case(
        lambda: product_net(lambda h, w: torch.ops.aten.mm.default(h, torch.ops.aten.t(w))), "", "relu", "orthant"
    ),
    "aten.addmm": Case(
        lambda: net(lambda self, x: torch.ops.aten.addmm.default(self.fc.bias, torch.ops.aten.relu.default(self.a(x)),
                                                                 self.fc.weight.T)),
        "", "relu", "orthant", says={"bias": True, "rectified": True},
    ),
    "aten.matmul, einsum": Case(
        lambda: product_net(lambda h, w: torch.ops.aten.einsum("bd,kd->bk", [h, w])), "", "relu", "orthant",
        says={"kind": "einsum"},
    ),
    "aten.convolution": Case(
        lambda: conv_net(lambda self, x: torch.ops.aten.convolution(
            self.a(x), self.fc.weight, self.fc.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        "", "Conv2d", "reals", MAPS, says={"kind": "conv", "class_axis": 1},
    ),
    "sum of products": Case(
        lambda: product_net(lambda h, w: (h.unsqueeze(1) * w).sum(-1)), "", "relu", "orthant",
        says={"kind": "sum", "weight": "fc.weight"},
    ),
    "sum of products, W first": Case(
        lambda: product_net(lambda h, w: torch.sum(w * h[:, None], dim=2)), "", "relu", "orthant",
        says={"kind": "sum", "weight_first": True},
    ),
    "sum of products, classes last": Case(
        lambda: product_net(lambda h, w: torch.mul(h[:, :, None], w.T).sum(1)), "", "relu", "orthant",
        says={"kind": "sum"},
    ),
    "mean of products": Case(
        lambda: product_net(lambda h, w: (h.unsqueeze(-2) * w[None]).mean((-1,))), "", "relu", "orthant",
        says={"kind": "sum", "scale": 1 / 8}, shares=False,
    ),
    "sum of products, a token": Case(
        lambda: net(lambda self, x: (tokens(self, x)[:, :, None] * self.fc.weight).sum(-1) + self.fc.bias), "", "sin",
        "reals", says={"kind": "sum", "axes": ("batch", "token")},
    ),
    "vecdot": Case(
        lambda: product_net(lambda h, w: torch.linalg.vecdot(h[:, None], w)), "", "relu", "orthant",
        says={"kind": "sum"},
    ),
    "cosine": Case(
        lambda: net(cosine, w=param(3, 8)), "", "normalize", "sphere", shares=False,
        says={"kind": "cosine", "scale": 16.0, "weight": None, "bias": False},
    ),
    "cosine, learned scale": Case(
        lambda: net(clip, w=param(3, 8), s=nn.Parameter(torch.tensor(1.3))),
        "",
        "mul",
        "sphere",
        shares=False,
        says={"kind": "matmul", "weight": None},
    ),
    "cosine_similarity": Case(
        lambda: net(lambda self, x: 9 * F.cosine_similarity(self.a(x)[:, None], self.w, dim=-1), w=param(3, 8)), "",
        "normalize", "sphere", shares=False, says={"kind": "cosine", "scale": 9.0},
    ),
    "learned temperature": Case(
        lambda: net(lambda self, x: self.fc(self.a(x)) / self.t, t=nn.Parameter(torch.tensor(0.7))), "fc", "Linear",
        "reals", shares=False,
    ),
    "scaled": Case(
        lambda: net(lambda self, x: 16 * self.fc(self.a(x))), "fc", "Linear", "reals", shares=False,
        says={"scale": 16.0},
    ),
    "scaled, then shifted": Case(
        lambda: net(lambda self, x: 3 * self.fc(self.a(x)) + self.c, c=param(3)), "fc", "Linear", "reals", shares=False,
        says={"scale": 3.0},
    ),
    "log_softmax": Case(
        lambda: mlp(nn.ReLU()).append(nn.LogSoftmax(-1)), "2", "ReLU", "orthant", says={"log_softmax": True}
    ),
    "log_softmax, scaled": Case(
        lambda: net(lambda self, x: F.log_softmax(self.fc(self.a(x)) / 2, -1)), "fc", "Linear", "reals", shares=False,
        says={"log_softmax": True, "scale": 0.5},
    ),
    "weight norm": Case(
        lambda: net(
            lambda self, x: self.fc(self.a(x)), fc=nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
        ),
        "fc", "Linear", "reals", shares=False, says={"weight": None},
    ),
    "einsum, ellipsis": Case(
        lambda: net(lambda self, x: torch.einsum("...d,kd->...k", tokens(self, x), self.fc.weight)), "", "sin", "reals",
        says={"kind": "einsum", "axes": ("batch", "token")},
    ),
    "einsum, no arrow": Case(
        lambda: net(lambda self, x: torch.einsum("bd,kd", self.a(x), self.fc.weight)), "", "Linear", "reals",
        says={"kind": "einsum"},
    ),
    "linalg.matmul": Case(
        lambda: net(lambda self, x: torch.linalg.matmul(self.a(x), self.w), w=param(8, 3)), "", "Linear", "reals"
    ),
    "clamped against overflow": Case(
        lambda: net(lambda self, x: self.fc(self.a(x)).clamp(-1e4, 1e4)), "fc", "Linear", "reals"
    ),
    "a masked class": Case(
        lambda: net(masked(lambda self, x: self.fc(self.a(x)))), "fc", "Linear", "reals", says={"bias": True}
    ),
    "named after what it does not do": Case(
        lambda: shake(CLIPSoftmaxNet(None, a=nn.Linear(4, 8), fc=nn.Linear(8, 3))), "fc", "Linear", "reals"
    ),
    "log of softmax": Case(
        lambda: net(lambda self, x: self.fc(self.a(x)).softmax(-1).log()), "fc", "Linear", "reals",
        says={"log_softmax": True},
    ),
    "nine other heads": Case(
        lambda: net(
            lambda self, x: {"logits": self.fc(self.a(x)), "other": [head(self.a(x)) for head in self.heads]},
            heads=nn.ModuleList(nn.Linear(8, 3) for _ in range(9)),
        ),
        "fc", "Linear", "reals",
    ),
    # pieces
    "chunks of the batch": Case(
        lambda: net(lambda self, x: torch.cat([self.fc(part.relu()) for part in self.a(x).split(2)])), "fc", "relu",
        "orthant", says={"positions": "pieces"},
    ),
    "chunks of unequal size": Case(
        lambda: net(lambda self, x: torch.cat([self.fc(self.a(part).relu()) for part in x.split(4)])), "fc", "relu",
        "orthant", says={"positions": "pieces"},
    ),
    "chunks, scaled": Case(
        lambda: net(lambda self, x: torch.vstack([3 * self.fc(self.a(part)) for part in x.split(4)])), "fc", "Linear",
        "reals", says={"positions": "pieces", "scale": 3.0}, shares=False,
    ),
    "sample by sample": Case(
        lambda: net(lambda self, x: torch.stack([self.fc(self.a(row).relu()) for row in x])), "fc", "relu", "orthant",
        says={"positions": "pieces"},
    ),
    "mv, sample by sample": Case(
        lambda: net(lambda self, x: torch.stack([self.fc.weight.mv(row.relu()) for row in self.a(x)])), "", "relu",
        "orthant", says={"positions": "pieces", "weight_first": True},
    ),
    "chunks of a norm": Case(
        lambda: net(lambda self, x: torch.cat([self.fc(self.norm(self.a(part))) for part in x.split(3)]),
                    norm=nn.LayerNorm(8)),
        "fc", "LayerNorm", "sphere", says=LN | {"positions": "pieces"}, shares=False,
    ),
    "chunks of a cosine": Case(
        lambda: net(lambda self, x: torch.cat([cosine(self, part) for part in x.split(2)]), w=param(3, 8)), "",
        "normalize", "sphere", says={"positions": "pieces", "kind": "cosine", "scale": 16.0}, shares=False,
    ),
    "token by token": Case(
        lambda: net(lambda self, x: torch.stack([self.fc(h) for h in tokens(self, x).unbind(1)], 1)), "fc", "sin",
        "reals", says={"positions": "pieces along axis 1", "axes": ("batch", "token")},
    ),
    "chunks of tokens": Case(
        lambda: net(lambda self, x: torch.cat([self.fc(h) for h in tokens(self, x).split(2, 1)], 1)), "fc", "sin",
        "reals", says={"positions": "pieces along axis 1", "axes": ("batch", "token")},
    ),
    "chunks of flattened tokens": Case(
        lambda: net(lambda self, x: torch.cat([self.fc(h) for h in tokens(self, x).flatten(0, 1).split(7)])
                    .view(len(x), 5, 3)),
        "fc", "sin", "reals", says={"positions": "pieces", "axes": ("batch", "token")},
    ),
    "chunks of maps": Case(
        lambda: conv_net(lambda self, x: torch.cat([self.fc(self.a(part)) for part in x.split(2)])), "fc", "Conv2d",
        "reals", MAPS, says={"positions": "pieces", "class_axis": 1},
    ),
    "chunks after another call": Case(
        lambda: net(lambda self, x: torch.cat([self.fc(h) for h in (self.fc(self.a(x) + 1), self.a(x))[1].split(2)])),
        "fc", "Linear", "reals", says={"positions": "pieces", "call": 1},
    ),
    # several products
    "two heads averaged": Case(
        lambda: net(two_heads, other=nn.Linear(8, 3)), "", "Linear", "reals", shares=False, says={"weight": None}
    ),
    "two tokens averaged": Case(
        lambda: net(lambda self, x: (self.fc(self.a(x).relu()) + self.other(self.b(x).relu())) / 2,
                    b=nn.Linear(4, 6), other=nn.Linear(6, 3)),
        "", "relu", "orthant", shares=False, says={"shape": (3, 14), "bias": True},
    ),
    "two heads in a module": Case(
        lambda: Net(lambda self, x: self.part(x), part=net(two_heads, other=nn.Linear(8, 3))), "part", "Linear",
        "reals", shares=False,
    ),
    "three tokens summed": Case(
        lambda: net(lambda self, x: sum(head(self.a(x * i).tanh()) for i, head in enumerate(self.heads, 1)),
                    heads=nn.ModuleList(nn.Linear(8, 3) for _ in range(3))),
        "heads", "tanh", "cube", shares=False, says={"shape": (3, 24)},
    ),
    "weighted heads": Case(
        lambda: net(lambda self, x: torch.lerp(self.fc(self.a(x)), self.other(x.sin()), 0.3) + self.c,
                    other=nn.Linear(4, 3), c=param(3)),
        "", "Linear, sin", "reals", shares=False, says={"shape": (3, 12)},
    ),
    "one head of two tokens": Case(
        lambda: net(lambda self, x: torch.stack([self.fc(self.a(x).relu()), self.fc(self.a(-x).relu())]).mean(0)), "fc",
        "relu", "orthant", shares=False, says={"shape": (3, 16)},
    ),
    "two heads, log_softmax": Case(
        lambda: net(lambda self, x: two_heads(self, x).log_softmax(-1), other=nn.Linear(8, 3)), "", "Linear", "reals",
        shares=False, says={"log_softmax": True},
    ),
    "two heads of tokens": Case(
        lambda: net(lambda self, x: self.fc(tokens(self, x)) + self.other(tokens(self, x).cos()),
                    other=nn.Linear(8, 3)),
        "", "sin, cos", "reals", shares=False, says={"axes": ("batch", "token")},
    ),
    "two heads and a masked class": Case(
        lambda: net(masked(lambda self, x: (self.fc(self.a(x)) + self.o(x.sin())) / 2), o=nn.Linear(4, 3)), "",
        "Linear, sin", "reals", shares=False, says={"empty": 1},
    ),
    "two heads, one sample": Case(
        lambda: net(lambda self, x: self.fc(self.a(x)) + self.o(x.mean(1, keepdim=True)), o=nn.Linear(1, 3)), "",
        "Linear, mean", "reals", VECTORS[:1], shares=False, says={"shape": (3, 9)},
    ),
    "update from the input": Case(
        lambda: net(lambda self, x: self.fc(self.a(x)) + self.b(self.c(x)), b=nn.Linear(2, 3), c=nn.Linear(4, 2)), "",
        "Linear", "reals", shares=False, says={"shape": (3, 10)},
    ),
    "low-rank update": Case(
        lambda: net(lora, b=nn.Linear(2, 3, bias=False), c=nn.Linear(8, 2, bias=False)), "", "relu", "orthant",
        shares=False, says={"shape": (3, 8)},
    ),
    "parts of the classes": Case(
        lambda: net(lambda self, x: torch.cat([self.fc(self.a(x).relu()), self.other(self.a(x).relu())], -1),
                    other=nn.Linear(8, 2)),
        "", "relu", "orthant", shares=False, says={"shape": (5, 8)},
    ),
    "parts of the classes of two tokens": Case(
        lambda: net(lambda self, x: torch.cat([self.fc(self.a(x).relu()), self.other(self.a(-x).relu())], -1),
                    other=nn.Linear(8, 2)),
        "", "relu", "orthant", shares=False, says={"shape": (5, 16)},
    ),
    "a layer for each class": Case(
        lambda: net(lambda self, x: torch.cat([head(self.a(x)) for head in self.heads], 1),
                    heads=nn.ModuleList(nn.Linear(8, 1) for _ in range(4))),
        "heads", "Linear", "reals", shares=False, says={"shape": (4, 8)},
    ),
    "chosen classes": Case(
        lambda: net(lambda self, x: self.fc(self.a(x)).index_select(1, torch.tensor([4, 1, 3])), fc=nn.Linear(8, 6)),
        "fc", "Linear", "reals", shares=False, says={"shape": (3, 8)},
    ),
    "first classes": Case(
        lambda: net(lambda self, x: self.fc(self.a(x))[:, :3], fc=nn.Linear(8, 6)), "fc", "Linear", "reals",
        shares=False,
    ),
    "classes in another order": Case(
        lambda: net(lambda self, x: self.fc(self.a(x))[..., [2, 0, 1]]), "fc", "Linear", "reals", shares=False,
        says={"shape": (3, 8)},
    ),
    "classes in another order, maps": Case(
        lambda: conv_net(lambda self, x: self.fc(self.a(x)).flip(1)), "fc", "Conv2d", "reals", MAPS, shares=False,
        says={"class_axis": 1, "axes": ("batch", "height", "width")},
    ),
    "a class of zeros": Case(
        lambda: net(lambda self, x: F.pad(self.fc(self.a(x)), (1, 0))), "fc", "Linear", "reals", shares=False,
        says={"shape": (4, 8), "empty": 1},
    ),
    "classes that never occur": Case(
        lambda: net(lambda self, x: F.pad(self.fc(self.a(x)), (0, 2), value=-1e9)), "fc", "Linear", "reals",
        shares=False, says={"shape": (5, 8), "empty": 2},
    ),
    # norms
    "channel norm, a pixel": Case(
        lambda: conv_net(lambda self, x: self.fc(self.norm(self.a(x))), norm=ChannelNorm(8)), "fc", "ChannelNorm",
        "sphere", MAPS, says=LN | {"class_axis": 1}, shares=False,
    ),
    "channel norm, pooled": Case(
        lambda: conv_net(
            lambda self, x: self.fc(self.norm(F.adaptive_avg_pool2d(self.a(x), 1)).flatten(1)), norm=ChannelNorm(8),
            fc=nn.Linear(8, 3),
        ),
        "fc", "ChannelNorm", "sphere", MAPS, says=LN, shares=False,
    ),
    "norm, then flattened": Case(
        lambda: net(lambda self, x: self.fc(self.norm(tokens(self, x)).flatten(1)), norm=nn.LayerNorm(8),
                    fc=nn.Linear(40, 3)), "fc", "LayerNorm", "reals", says={"folded": None},
    ),
    "part of a norm": Case(
        lambda: net(lambda self, x: self.fc(self.norm(self.a(x))[:, :4]), fc=nn.Linear(4, 3),
                    norm=nn.RMSNorm(8, elementwise_affine=False)), "fc", "RMSNorm", "reals", says={"folded": None},
    ),
    "layer norm": Case(lambda: mlp(nn.LayerNorm(8), nn.Dropout()), "3", "LayerNorm", "sphere", says=LN, shares=False),
    "layer norm, no bias": Case(
        lambda: mlp(nn.LayerNorm(8, bias=False)), "2", "LayerNorm", "sphere", says=LN, shares=False
    ),
    "plain layer norm": Case(
        lambda: mlp(nn.LayerNorm(8, elementwise_affine=False)), "2", "LayerNorm", "sphere", says=LN
    ),
    "rms norm": Case(lambda: mlp(nn.RMSNorm(8), nn.Identity()), "3", "RMSNorm", "sphere", says=RMS, shares=False),
    "rms norm, 1 + weight": Case(
        lambda: mlp(OneRMSNorm(8)), "2", "OneRMSNorm", "sphere", says=RMS | {"unit_offset": True}, shares=False
    ),
    "large eps": Case(lambda: mlp(nn.LayerNorm(8, eps=0.5)), "2", "LayerNorm", "ball", says=LN, shares=False),
    "norm, then relu": Case(lambda: mlp(nn.LayerNorm(8), nn.ReLU()), "3", "ReLU", "orthant", says={"folded": None}),
    "class token": Case(ClassToken, "head", "LayerNorm", "sphere", says=LN, shares=False),
    "norm, then mean": Case(
        lambda: net(lambda self, x: self.fc(self.norm(tokens(self, x)).mean(1)), norm=nn.LayerNorm(8)), "fc", "mean",
        "ball", says=LN, shares=False,
    ),
    "batch norm": Case(lambda: mlp(nn.BatchNorm1d(8)), "2", "BatchNorm1d", "reals", says={"folded": None}),
    # positions
    "tokens": Case(
        lambda: net(lambda self, x: self.fc(tokens(self, x))), "fc", "sin", "reals", says={"axes": ("batch", "token")}
    ),
    "language model": Case(
        LanguageModel, "lm_head", "RMSNorm", "sphere", IDS, says=RMS | {"weight": "embed.weight"}, shares=False
    ),
    "language model, functional": Case(
        lambda: LanguageModel(functional=True), "", "RMSNorm", "sphere", IDS, says=RMS | {"weight": "embed.weight"},
        shares=False,
    ),
    "last token picked": Case(
        lambda: LanguageModel(pick=True), "lm_head", "RMSNorm", "sphere", IDS,
        says=RMS | {"positions": "picked", "axes": ("batch",)}, shares=False,
    ),
    "tokens first": Case(
        lambda: net(lambda self, x: self.fc(tokens(self, x)).transpose(0, 1)), "fc", "sin", "reals",
        says={"positions": "swapped", "axes": ("token", "batch")},
    ),
    "tokens first, log_softmax": Case(
        lambda: net(lambda self, x: self.fc(tokens(self, x)).transpose(0, 1).log_softmax(-1)), "fc", "sin", "reals",
        says={"positions": "swapped", "log_softmax": True},
    ),
    "pooling after the head": Case(
        lambda: net(lambda self, x: self.fc(tokens(self, x)).mean(1)), "fc", "sin", "reals", says={"positions": "mean"}
    ),
    "1x1 convolution": Case(
        lambda: conv_net(lambda self, x: self.fc(self.a(x).relu())), "fc", "relu", "orthant", MAPS,
        says={"kind": "conv", "class_axis": 1, "axes": ("batch", "height", "width")},
    ),
    "1x1 convolution, pooled": Case(
        lambda: conv_net(lambda self, x: self.fc(self.a(x)).mean((2, 3))), "fc", "Conv2d", "reals", MAPS,
        says={"kind": "conv", "positions": "mean", "axes": ("batch",)},
    ),
    "1x1 convolution, pooled to a map": Case(
        lambda: conv_net(lambda self, x: F.adaptive_avg_pool2d(self.fc(self.a(x)), 1)), "fc", "Conv2d", "reals", MAPS,
        says={"kind": "conv", "positions": "mean", "axes": ("batch", "height", "width")},
    ),
    "1x1 convolution, resized": Case(
        lambda: conv_net(lambda self, x: {"out": F.interpolate(self.fc(self.a(x)), x.shape[2:], mode="bilinear")}),
        "fc", "Conv2d", "reals", MAPS, says={"positions": "bilinear"},
    ),
    "1d convolution": Case(
        lambda: conv_net(lambda self, x: self.fc(self.a(x)), a=nn.Conv1d(4, 8, 1), fc=nn.Conv1d(8, 3, 1)), "fc",
        "Conv1d", "reals", seeded(3, 4, 7), says={"class_axis": 1, "axes": ("batch", "length")},
    ),
    # outputs
    "dict": Case(
        lambda: net(lambda self, x: {"out": self.fc(self.a(x)), "aux": x}), "fc", "Linear", "reals"
    ),
    "tuple": Case(lambda: net(lambda self, x: (None, self.fc(self.a(x)), x)), "fc", "Linear", "reals"),
    "loss first": Case(lambda: net(lambda self, x: (x.sum(), self.fc(self.a(x)))), "fc", "Linear", "reals"),
    "object": Case(
        lambda: net(lambda self, x: SimpleNamespace(loss=None, logits=self.fc(self.a(x)))), "fc", "Linear", "reals"
    ),
    "dataclass": Case(
        lambda: net(lambda self, x: Output(x.sum(), self.fc(self.a(x)))), "fc", "Linear", "reals"
    ),
    # wrappers
    "data parallel": Case(lambda: nn.DataParallel(mlp(nn.ReLU())), "2", "ReLU", "orthant"),
    "wrapper": Case(
        lambda: Net(lambda self, x: self.module(x), module=mlp(nn.ReLU())), "module.2", "ReLU", "orthant"
    ),
    "compiled": Case(compiled, "2", "ReLU", "orthant"),
    "compiled inside": Case(
        lambda: Net(lambda self, x: self.part(x), part=compiled()), "part._orig_mod.2", "ReLU", "orthant"
    ),
}  # fmt: skip


REFUSED = {
    # name: model, input, words of the reason
    "softmax": (lambda: mlp(nn.ReLU()).append(nn.Softmax(-1)), VECTORS, "a softmax inside"),
    "softmax over maps": (lambda: conv_net(lambda self, x: self.fc(self.a(x)).softmax(1)), MAPS, "a softmax inside"),
    "sigmoid": (lambda: mlp(nn.ReLU()).append(nn.Sigmoid()), VECTORS, "a sigmoid inside"),
    "soft cap": (lambda: net(lambda self, x: 2 * torch.tanh(self.fc(self.a(x)) / 2)), VECTORS, "tanh .a soft cap"),
    "relu after the last convolution": (
        lambda: conv_net(lambda self, x: F.relu(self.fc(self.a(x))).mean((2, 3))), MAPS, "applies relu"
    ),
    "relu after the head": (lambda: mlp(nn.Tanh()).append(nn.ReLU()), VECTORS, "applies relu"),
    "one logit": (lambda: net(lambda self, x: self.fc(self.a(x)), fc=nn.Linear(8, 1)), VECTORS, "sigmoid"),
    "one logit, squeezed": (
        lambda: net(lambda self, x: self.fc(self.a(x)).squeeze(-1), fc=nn.Linear(8, 1)), VECTORS, "one number for each"
    ),
    "scale of the sample": (
        lambda: net(lambda self, x: self.fc(self.a(x)) * x.norm(dim=1, keepdim=True)), VECTORS, "depends on the input"
    ),
    "scale of the batch": (
        lambda: net(lambda self, x: self.fc(self.a(x)) / x.std(0).flip(0)[0]), VECTORS, "not those of a second one"
    ),
    "scale of one sample": (
        lambda: net(lambda self, x: self.fc(self.a(x)) * x.norm(dim=1, keepdim=True)), VECTORS[:1], "second one"
    ),
    "scale of the batch, whatever its order": (
        lambda: net(lambda self, x: self.fc(self.a(x)) / x.std()), VECTORS, "not those of a second one"
    ),
    "a gate between two heads": (
        lambda: net(lambda self, x: torch.lerp(self.fc(self.a(x)), self.o(x.sin()), x[:, :1].abs()),
                    o=nn.Linear(4, 3)), VECTORS, "residual",
    ),
    "two soft caps averaged": (
        lambda: net(lambda self, x: self.fc(self.a(x)).tanh() + self.o(x.sin()).tanh(), o=nn.Linear(4, 3)), VECTORS,
        "applies tanh",
    ),
    "a product in steps that are not read": (
        lambda: net(lambda self, x: (self.a(x).relu()[:, None] * self.fc.weight).sum(-1, keepdim=True).squeeze(-1)),
        VECTORS, "relu and then mul, which is not read",
    ),
    "a product in steps, as wide as the classes": (
        lambda: net(lambda self, x: (self.b(x).relu()[:, None] * self.fc.weight).cumsum(-1)[..., -1],
                    b=nn.Linear(4, 3), fc=nn.Linear(3, 3)),
        VECTORS, "which is not read",
    ),
    "classes that depend on the input": (
        lambda: net(lambda self, x: self.fc(self.a(x)).sort(-1).values), VECTORS, "sort, which is not read",
    ),
    "the largest of two heads": (
        lambda: net(lambda self, x: torch.maximum(self.fc(self.a(x)), self.o(x.sin())), o=nn.Linear(4, 3)), VECTORS,
        "residual",
    ),
    "soft cap and a masked class": (
        lambda: net(masked(lambda self, x: 3 * torch.tanh(self.fc(self.a(x))))), VECTORS, "applies tanh"
    ),
    "soft caps of other kinds": (
        lambda: net(lambda self, x: torch.stack([30 * torch.atan(self.fc(self.a(0.01 * x)) / 30)]).sum(0)), VECTORS,
        "applies atan",
    ),
    "maximum over tokens": (lambda: net(lambda self, x: self.fc(tokens(self, x)).amax(1)), VECTORS, "nearest: fc"),
    "distances": (lambda: net(lambda self, x: -torch.cdist(self.a(x), self.fc.weight)), VECTORS, "no product"),
}  # fmt: skip
