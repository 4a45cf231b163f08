"""Tensors of the CPU are computed with on the CPU, also where another device is the default.

The device "meta" takes the place of an accelerator: its tensors hold no numbers, so that a tensor made there by mistake
is noticed at once.
"""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import penult
from penult import Activations, Gaussian, GenerativePair, Head, Marginal, Sphere, Tap, distill, extract, find_head
from penult.data import read
from penult.distributions import Bank, PrincipalMixture, VonMisesFisher
from penult.realism import choose, compare
from penult.scores import (
    KNN,
    Composite,
    Mahalanobis,
    RelativeMahalanobis,
    Threshold,
    ViM,
    density,
    directional,
    energy,
    max_logit,
    msp,
)

K, D, N = 3, 6, 240


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def generator():
    return torch.Generator("cpu").manual_seed(0)


def labels():
    return torch.arange(N, device="cpu") % K


def rows():
    return normal(N, D, seed=2) + 2 * normal(K, D, seed=3)[labels()]


def head():
    return Head(2 * normal(K, D, seed=3), normal(K, seed=1))


def positive_head():
    return Head(normal(K, D, seed=3), torch.full((K,), 9.0, device="cpu"))


def model(*layers):
    with torch.device("cpu"):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, D), *(layer() for layer in layers), nn.Linear(D, K)).eval()


def inputs(count=8):
    return normal(count, 4, seed=4)


def tap(*layers):
    network = model(*layers)
    return Tap(network, find_head(network, inputs()))


def batches():
    return [(x, torch.arange(len(x), device="cpu") // 2 % K) for x in inputs(20).split(8)]


def acts():
    return Activations(rows(), head()(rows()), labels())


# --- calls: name -> function (folder) -> tensors ------------------------------------------------------------

CALLS = {}


def call(function):
    CALLS[function.__name__] = function
    return function


@call
def heads(folder):
    h = head()
    noisy = torch.where(torch.arange(N, device="cpu") % 5 == 0, 0, labels())
    derived = [h.centered(), h.rescaled()[0], h.with_temperature(2.0), h.with_bias(None), h.clone(), Head(h.weight)]
    derived += [h.calibrate(h(rows()), noisy), h.calibrate(h(rows()), noisy, biases=True)]
    tensors = [(each.weight, each.full_bias, each.mean_row) for each in derived]
    return h(rows()), h.centered_logits(rows()), h.centered_weight(), h.span(), h.rank, tensors


@call
def find_head_of_a_linear_layer(folder):
    found = find_head(model(nn.ReLU), inputs())
    return found.weight, found.bias


@call
def find_head_with_a_norm(folder):
    found = find_head(model(lambda: nn.LayerNorm(D), nn.Dropout), inputs())
    return found.weight, found.bias


@call
def find_head_of_a_cosine(folder):
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.weight = nn.Linear(4, D, device="cpu"), nn.Parameter(normal(K, D))

        def forward(self, x):
            return 8 * nn.functional.linear(nn.functional.normalize(self.body(x)), nn.functional.normalize(self.weight))

    torch.manual_seed(0)
    return find_head(Cosine(), inputs()).weight


@call
def tap_of_a_model(folder):
    return tap()(inputs())


@call
def tap_before_a_relu(folder):
    return tap(nn.ReLU).pre_activation(inputs())


@call
def extract_into_memory(folder):
    extracted = extract(tap(), batches())
    return extracted.activations, extracted.logits, extracted.labels


@call
def extract_of_mappings(folder):
    loader = [{"image": x, "index": torch.arange(len(x), device="cpu"), "label": y} for x, y in batches()]
    return extract(tap(), loader).logits, extract(tap(nn.ReLU), loader, pre_activation=True).activations


@call
def extract_of_triples(folder):
    loader = [(x, torch.arange(len(x), device="cpu") + 99, y) for x, y in batches()]
    with pytest.warns(UserWarning, match="entry 2"):
        return extract(tap(), loader).labels


@call
def extract_into_a_folder(folder):
    first = extract(tap(), batches(), folder / "a", shard_size=200)
    again = extract(tap(), batches(), folder / "a", shard_size=200)
    return first.activations, again.logits, again.labels, again.predicted


@call
def activations_in_memory(folder):
    a = acts()
    parts = [*a.split(0.5, 0.5), *a.batches(100), a[:7], a[labels() == 1], a[torch.tensor([3, 1], device="cpu")]]
    parts += [Activations.concatenate([a, a[:3]]), a.to(torch.float64), a.to("cpu")]
    return a.predicted, [(part.activations, part.logits, part.labels) for part in parts]


@call
def activations_in_a_folder(folder):
    a = acts().save(folder / "a", shard_size=2000)
    a = Activations.open(folder / "a")
    parts = [a, *a.split(0.5, 0.5), *a.batches(100), a[:7], a[labels() == 1], a[torch.tensor([3, 1], device="cpu")]]
    return a.predicted, [(part.activations, part.logits, part.labels) for part in parts]


@call
def activations_of_numpy(folder):
    a = Activations(rows().numpy(), head()(rows()).numpy(), np.arange(N) % K)
    return a.activations, a.logits, a.labels, head()(rows().numpy())


BASES = {
    "sphere_from_head": lambda: Sphere.from_head(head()),
    "sphere_of_a_radius": lambda: Sphere(2.0),
    "sphere_fit": lambda: Sphere.fit(head(), rows()),
    "sphere_fit_in_the_span": lambda: Sphere.fit(head(), rows(), ambient=False),
    "sphere_fit_of_several_radii": lambda: Sphere.fit(head(), rows(), radii=3),
    "elliptic_sphere_fit": lambda: Sphere.fit(head(), rows(), shape="elliptic"),
    "trimmed_sphere_fit": lambda: Sphere.fit(head(), rows(), shape="elliptic", trim=0.1),
    "gaussian_fit": lambda: Gaussian.fit(head(), rows()),
    "diagonal_gaussian_fit": lambda: Gaussian.fit(head(), rows(), covariance_type="diag"),
    "mixture_fit": lambda: Marginal.fit(head(), rows(), components=2, dims=2),
    "positive_mixture_fit": lambda: Marginal.fit(head(), rows().abs(), components=2, dims=2, positive=True),
    "rectified_mixture_fit": lambda: Marginal.fit(head(), rows(), components=2, dims=2, rectified=True),
    "class_fit": lambda: Marginal.fit(head(), rows(), kind="class", dims=2),
    "bank_fit": lambda: Marginal.fit(head(), rows(), kind="bank"),
}


def laws(base):
    """Everything that a base and its pair compute."""
    pair = GenerativePair(head(), base)
    h, y = pair.sample((5,), generator=generator())
    given = pair.given(torch.tensor([0, 2], device="cpu"))
    results = [h, y, pair.prior.probs, pair.posterior(h).probs, given.sample((4,), generator=generator())]
    results += [base.log_mgf(head().centered_weight()), pair.given(1).sample((2,), generator=generator())]
    results += [pair.with_prior(torch.tensor([0.2, 0.3, 0.5], device="cpu")).prior.probs]
    results += [pair.estimate_prior(rows(), iterations=3).probs, list(base.state_dict().values())]
    if not isinstance(base, Marginal) or base.law.has_density:
        results += [pair.log_prob(h), pair.log_joint(h), given.log_prob(h[:2]), base.log_prob(h)]
    return results


def of_base(make):
    def saved_and_loaded(folder):
        base = make()
        path = GenerativePair(head(), base).save(folder / "pair.penult.safetensors")
        loaded = penult.load(path)
        return laws(base), loaded.head.weight, list(loaded.base.state_dict().values()), loaded.prior.probs

    return saved_and_loaded


CALLS |= {name: of_base(make) for name, make in BASES.items()}


@call
def mean_and_rsample(folder):
    given = GenerativePair(head(), Sphere(2.0)).given(torch.tensor([0, 2], device="cpu"))
    weight = normal(2, 3).requires_grad_()
    vmf = VonMisesFisher(nn.functional.normalize(weight, dim=-1), torch.tensor([5.0, 50.0], device="cpu"))
    torch.manual_seed(0)
    x = vmf.rsample((4,))
    x.sum().backward()
    return given.mean, vmf.log_prob(x), vmf.mean, vmf.entropy(), weight.grad


@call
def distributions(folder):
    mixture = PrincipalMixture.fit(rows(), 2, 2)
    bank = Bank(rows())
    torch.manual_seed(0)
    return mixture.sample((5,)), mixture.log_prob(rows()), mixture.mean, bank.sample((5,)), bank.mean


@call
def flow(folder):
    pytest.importorskip("zuko")
    fitted = penult.distributions.NormalizingFlow.fit(rows(), components=2, dims=2, iterations=2, epochs=1)
    torch.manual_seed(0)
    return fitted.sample((3,)), fitted.log_prob(rows())


SCORES = {
    "directional": lambda: lambda h: directional(GenerativePair(head()), h),
    "energy": lambda: lambda h: energy(GenerativePair(head()), h),
    "max_logit": lambda: lambda h: max_logit(GenerativePair(head()), h),
    "msp": lambda: lambda h: msp(GenerativePair(head()), h),
    "density": lambda: lambda h: density(GenerativePair(head(), Gaussian.fit(head(), rows())), h),
    "composite": lambda: Composite.fit(head(), rows()),
    "mahalanobis": lambda: Mahalanobis.fit(rows(), labels()),
    "relative_mahalanobis": lambda: RelativeMahalanobis.fit(rows(), labels()),
    "knn": lambda: KNN.fit(rows(), k=3),
    "knn_of_a_subset": lambda: KNN.fit(rows(), k=3, size=50, generator=generator()),
    "vim": lambda: ViM.fit(positive_head(), rows(), dims=2),
}


def of_score(make):
    def score_and_threshold(folder):
        score = make()
        # Calibration on the reference activations themselves is refused.
        threshold = Threshold.fit(score, 1.01 * rows())
        results = [score(rows()), threshold(rows()), threshold.p_value(rows()), threshold.value, threshold.rate_bound()]
        if isinstance(score, nn.Module):
            buffer = io.BytesIO()
            torch.save(threshold.state_dict(), buffer)
            buffer.seek(0)
            threshold.load_state_dict(torch.load(buffer, weights_only=True, map_location="cpu"))
            results.append(threshold.p_value(rows()))
        return results

    return score_and_threshold


CALLS |= {f"score_{name}": of_score(make) for name, make in SCORES.items()}


@call
def compare_a_pair(folder):
    result = compare(GenerativePair(head(), Gaussian.fit(head(), rows()[:120])), acts()[120:])
    return result.auc, result.worst_auc, result.energy


@call
def choose_a_base(folder):
    candidates = {
        "sphere": lambda head, h: Sphere.from_head(head),
        "gaussian": lambda head, h: Gaussian.fit(head, h),
    }
    return [(row.name, row.error, row.auc) for row in choose(head(), acts(), candidates=candidates).rows]


@call
def distill_targets(folder):
    pair = GenerativePair(head(), Sphere.fit(head(), rows()))
    results = [distill.class_soft_targets(pair, draws=50), distill.pseudo_labels(pair, rows())]
    for kind in ("soft", "activation", "hinted"):
        results.append(distill.targets(pair, labels(), kind, activations=rows()))
    return *results, distill.targets(pair, labels()), distill.targets(pair, labels(), "activation")


@call
def distill_gate(folder):
    pair = GenerativePair(head(), Sphere.fit(head(), rows()))
    gate = distill.Gate.fit(pair, acts())
    return gate(rows(), labels()), gate.trust, distill.Gate.fit(pair, rows())(rows())


@call
def distill_losses(folder):
    pair, y = GenerativePair(head()), labels()[:8]
    targets = distill.targets(pair, labels(), "activation")[:8]
    soft = distill.SoftTargetLoss()(normal(8, K), y, distill.targets(pair, labels())[:8])
    torch.manual_seed(0)
    with torch.device("cpu"):
        projector = nn.Linear(5, pair.head.rank)
    loss = distill.ActivationLoss(pair, 5, projector=projector)
    return soft, loss(normal(8, 5), y, targets)


@call
def data_of_digits(folder):
    dataset = read("digits", size=6, mode="RGB")
    images = read("digits").load()
    first, second = images.split(0.5, 0.5)
    return dataset[3][0], dataset.labels, images.images, first.labels, second.images


@call
def data_of_npz(folder):
    np.savez(folder / "a.npz", images=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), labels=np.arange(4) % 2)
    dataset = read(folder / "a.npz")
    return dataset[1][0], dataset.labels, dataset.load().images


@call
def data_of_a_folder(folder):
    image = pytest.importorskip("PIL.Image")
    for name in ("cat", "dog"):
        (folder / "a" / name).mkdir(parents=True)
        for index in range(2):
            image.new("L", (8, 8), 50 * index).save(folder / "a" / name / f"{index}.png")
    dataset = read(folder / "a")
    return dataset[1][0], dataset.labels, dataset.load().images


def on_meta(function, folder):
    """What a function returns where meta is the default device."""
    torch.set_default_device("meta")
    try:
        return function(folder)
    finally:
        torch.set_default_device(None)


SLOW = {"compare_a_pair", "choose_a_base"}


def marked(name):
    return pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.filterwarnings("ignore:the base .* was not fitted to activations")
@pytest.mark.parametrize("name", [marked(name) for name in CALLS])
def test_the_default_device_is_not_used(name, tmp_path):
    folders = [tmp_path / "expected", tmp_path / "result"]
    for folder in folders:
        folder.mkdir()
    expected, result = CALLS[name](folders[0]), on_meta(CALLS[name], folders[1])
    leaves, others = pytree.tree_leaves(expected), pytree.tree_leaves(result)
    assert len(leaves) == len(others)
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert other.device.type == "cpu"
            assert torch.equal(leaf.detach(), other.detach())
        else:
            assert leaf == other


SOURCE = Path(penult.__file__).parent
FACTORIES = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "triu_indices", "tril_indices", "zeros",
}  # fmt: skip


def test_every_tensor_is_made_on_a_stated_device():
    """A factory without ``device=`` follows torch's default device, which may be another than that of the data."""
    unstated = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if getattr(node.func.value, "id", None) != "torch" or node.func.attr not in FACTORIES:
                continue
            if not any(keyword.arg in ("device", None) for keyword in node.keywords):
                unstated.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert not unstated
