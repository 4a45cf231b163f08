"""Adversarial generators of the generation benchmark, which differ in the conditions of generator and discriminator.

All are `penult.generate.ActivationGAN`s with the same networks, losses and optimiser, and differ only in their
conditions. The usual conditional GAN is the special case in which the "activation" of an image is its one-hot label,
embedded in as many numbers as an activation has, so that it has as many parameters.

Example:
    >>> from generate_gan import MODELS, build
    >>> gan, told = build(MODELS["gan"], known("mnist", 0, "relu", data, cache), pair, shape, labels)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import penult
from generate_laws import CHOSEN, Known
from penult.bases import Marginal
from penult.distributions import Bank
from penult.generate import ActivationGAN
from penult.generate._networks import Bounded, adversaries

__all__ = ["ALL", "BATCH", "ISOLATED", "MODELS", "TRIES", "Model", "build", "parameters"]

BATCH = 64
LATENT = 32
LOUD = 0.5  # deviation of a label's embedding, that of activations being 1; chosen by the selection pictures
CLASSES = 10

Labels = Literal["true", "classifier", "few", "few, classifier"]


@dataclass(frozen=True)
class Model:
    """What an adversarial generator is told, and how it is trained.

    Attributes:
        labels: Whose labels it needs; None where activations are told.
        told: ``"activation"``, ``"label"``, ``"nothing"``, or a pair of what generator and discriminator are told of an
            activation, each ``"activation"`` or ``"mean"``, that of its class.
        loud: Deviation of a label's embedding.
        options: Of `ActivationGAN`, whose loss is hinge for grey pictures where none is given.
        bounded: Whether the discriminator has spectral normalisation; with hinge loss when left out.
        law: What it is trained on; the bank where that does not matter.
    """

    labels: Labels | None = None
    told: str | tuple[str, str] = "activation"
    loud: float = LOUD
    options: dict[str, Any] = field(default_factory=dict)
    bounded: bool | None = None
    law: str = "bank"


HINGE = {"loss": "hinge"}
OTHER = {"loss": "non-saturating", "rate": 4e-3}  # the rate was chosen by the selection pictures, for labels
PLAIN = {"consistency": 0.0}
ONE_HOT = PLAIN | OTHER

MODELS: dict[str, Model] = {
    "gan": Model(),
    "gan, non-saturating": Model(options=OTHER),
    "gan, hinge": Model(options=HINGE),
    "gan, one-hot, labels": Model("true", "label", options=ONE_HOT),
    "gan, one-hot, labels, hinge": Model("true", "label", options=PLAIN | HINGE),
    "gan, one-hot, pseudo-labels": Model("classifier", "label", options=ONE_HOT),
    "gan, one-hot, 100 labels": Model("few", "label", options=ONE_HOT),
    "gan, one-hot, labels of a 100-label classifier": Model("few, classifier", "label", options=ONE_HOT),
    "gan, unconditional, labelled by the classifier": Model("classifier", "nothing", options=ONE_HOT),
    "gan, half of the conditions drawn": Model(options={"drawn": 0.5}, law=CHOSEN),
    "gan, all conditions drawn": Model(options={"drawn": 1.0}, law=CHOSEN),
    "gan on class embeddings and a mixture": Model("true", options={"condition": "label"} | OTHER, law=CHOSEN),
    "gan on class embeddings and von Mises-Fisher, span(W)": Model(
        "true", options={"condition": "label"} | OTHER, law="sphere, span(W)"
    ),
}
TRIES: dict[str, Model] = {  # what options were chosen from, beside the default
    **{f"gan, rate {rate}": Model(options={"rate": float(rate)}) for rate in ("5e-4", "1e-3", "4e-3")},
    **{
        f"gan, non-saturating, rate {rate}": Model(options=OTHER | {"rate": float(rate)})
        for rate in ("5e-4", "1e-3", "2e-3")
    },
    **{
        f"gan, one-hot, labels, rate {rate}": Model("true", "label", options=ONE_HOT | {"rate": float(rate)})
        for rate in ("1e-3", "2e-3", "8e-3")
    },
    **{
        f"gan, one-hot, labels, loud {loud}, rate {rate}": Model(
            "true", "label", loud, options=ONE_HOT | {"rate": float(rate)}
        )
        for loud, rate in ((1, "5e-4"), (1, "1e-3"), (1, "2e-3"), (0.25, "2e-3"))
    },
}
ISOLATED: dict[str, Model] = {  # why hinge loss collapses; nothing but the named part differs from the first
    "hinge: both see the activation": Model(options=PLAIN | HINGE),
    "hinge: both see the class": Model(told=("mean", "mean"), options=PLAIN | HINGE),
    "hinge: the discriminator sees the class alone": Model(told=("activation", "mean"), options=PLAIN | HINGE),
    "hinge: the generator sees the class alone": Model(told=("mean", "activation"), options=PLAIN | HINGE),
    "hinge: both see the class and noise": Model(told=("noise", "noise"), options=PLAIN | HINGE),
    "hinge, penalty in place of spectral norm: both see the class": Model(
        told=("mean", "mean"), options=PLAIN | HINGE | {"penalty": 0.25}, bounded=False
    ),
    "non-saturating, spectral norm in place of penalty: both see the class": Model(
        told=("mean", "mean"), options=PLAIN | {"loss": "non-saturating", "penalty": 0.0}, bounded=True
    ),
    "non-saturating: both see the class": Model(told=("mean", "mean"), options=PLAIN | {"loss": "non-saturating"}),
}

ALL = MODELS | TRIES | ISOLATED


def build(
    model: Model, k: Known, pair: penult.GenerativePair, shape: tuple[int, int, int], labels: Tensor
) -> tuple[Callable[[], ActivationGAN], Tensor]:
    """What makes the generator, and what is told of each picture, (N, d) or labels (N,).

    Args:
        model: What it is.
        k: The classifier.
        pair: The law to draw from, where activations are told.
        shape: Of pictures.
        labels: Those that it needs, or any.
    """
    slow = PLAIN if shape[0] > 1 else {}  # a ResNet would have to see every picture that is generated
    d, options = k.head.in_features, {"latent": LATENT} | model.options | slow
    usual = "hinge" if shape[0] == 1 else "non-saturating"
    bounded = options.get("loss", usual) == "hinge" if model.bounded is None else model.bounded
    tap = k.tap if options.get("consistency", 1.0) else None

    def parts() -> dict[str, nn.Module]:
        makes, scores = adversaries(shape, d, LATENT, bounded=bounded)
        return {"generator": makes, "discriminator": scores}

    if model.told == "label":
        codes = torch.eye(CLASSES)

        def embedded() -> ActivationGAN:
            own = {name: Embedded(part, d, model.loud, bounded) for name, part in parts().items()}
            return ActivationGAN(_pair_of(codes), None, shape, **options, **own)

        return embedded, codes[labels]
    if model.told == "nothing":

        def blind() -> ActivationGAN:
            return ActivationGAN(pair, None, shape, **options, **{n: Blind(part) for n, part in parts().items()})

        return blind, k.after
    if model.told == "activation":
        return lambda: ActivationGAN(pair, tap, shape, activations=k.after, **options), (
            labels if options.get("condition") == "label" else k.after
        )
    assert isinstance(model.told, tuple)
    told = k.after
    if "noise" in model.told:
        told = _noisy(k)
        pair = penult.GenerativePair(k.head, Marginal(k.head, Bank(told)))

    def seen() -> ActivationGAN:
        own = parts()
        gan = ActivationGAN(pair, tap, shape, activations=told, **options, **own)
        for (name, part), what in zip(own.items(), model.told, strict=True):
            if what == "mean":
                setattr(gan, name, OfClass(part, gan, k))
        return gan

    return seen, told


def parameters(gan: ActivationGAN) -> int:
    """Number of trained parameters of generator and discriminator."""
    return sum(p.numel() for part in (gan.generator, gan.discriminator) for p in part.parameters())


@final
class Embedded(nn.Module):
    """A network that is told a label by a learned embedding of as many numbers as an activation has."""

    def __init__(self, network: nn.Module, features: int, loud: float, bounded: bool) -> None:
        super().__init__()
        embed = nn.Linear(CLASSES, features, bias=False)
        nn.init.normal_(embed.weight, std=loud * (CLASSES - 1) ** 0.5 / CLASSES)  # one-hot labels come in deviations
        self.network = network
        self.embed = Bounded(embed) if bounded and "Discriminator" in type(network).__name__ else embed

    def forward(self, first: Tensor, condition: Tensor) -> Tensor:
        """As the network, for one-hot labels (B, K) in deviations."""
        return self.network(first, self.embed(condition))


@final
class Blind(nn.Module):
    """A network that is told nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, first: Tensor, condition: Tensor) -> Tensor:
        """As the network, for a condition of zeros."""
        return self.network(first, torch.zeros_like(condition))


@final
class OfClass(nn.Module):
    """A network that is told, of an activation, the mean activation of the class that the head puts it into."""

    def __init__(self, network: nn.Module, gan: ActivationGAN, k: Known) -> None:
        super().__init__()
        self.network = network
        std = gan.standardize
        self.register_buffer("weight", k.head.weight.detach() * std.scale)
        self.register_buffer("bias", k.head(std.mean).detach())
        self.register_buffer("means", std(_means(k)))

    def forward(self, first: Tensor, condition: Tensor) -> Tensor:
        """As the network, for activations (B, d) in deviations."""
        return self.network(first, self.means[F.linear(condition, self.weight, self.bias).argmax(1)])


def _pair_of(codes: Tensor) -> penult.GenerativePair:
    """The pair whose only activation of a class is its code."""
    head = penult.Head(100 * codes)
    return penult.GenerativePair(head, Marginal(head, Bank(codes)))


def _means(k: Known) -> Tensor:
    said = k.head(k.after).argmax(1)
    return torch.stack([k.after[said == y].mean(0) for y in range(k.head.num_classes)])


def _noisy(k: Known) -> Tensor:
    """For each picture the mean of its class, with as much noise as activations vary by, which tells nothing."""
    means, said = _means(k), k.head(k.after).argmax(1)
    spread = (k.after - means[said]).std(0)
    noise = torch.randn(k.after.shape, generator=torch.Generator().manual_seed(0))
    return means[said] + spread * noise
