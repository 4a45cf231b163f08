"""A generative adversarial network that is conditioned on activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from penult._checks import check_positive
from penult.activations import Activations, Tap
from penult.generate._classifier import frozen
from penult.generate._generator import ActivationGenerator, Condition
from penult.generate._lightning import scheduled
from penult.generate._networks import adversaries
from penult.pair import GenerativePair

__all__ = ["ActivationGAN", "Adversarial"]

Adversarial = Literal["non-saturating", "hinge"]

_PENALTY = 0.25
_EVERY = 4  # batches, of which one has the penalty, as many times larger


@final
class ActivationGAN(ActivationGenerator):
    r"""A generative adversarial network of images that is conditioned on a classifier's penultimate activations.

    A projection discriminator D tells real pairs (x, tap(x)) from generated ones (G(z, h), h), for which no labels are
    needed: the classifier has them. Images of class y come of h ~ p(h|y), the pair's law, and z ~ N(0, I).

    With ``loss="hinge"`` discriminator and generator minimise, under spectral normalisation,

    .. math:: E[(1 - D(x, h))_+] + E[(1 + D(G(z, h), h))_+], \qquad -E[D(G(z, h), h)],

    and with ``loss="non-saturating"``

    .. math:: E[\mathrm{softplus}(-D(x, h)) + \mathrm{softplus}(D(G(z, h), h))]
        + \gamma\, E[\|\nabla_x D(x, h)\|^2], \qquad E[\mathrm{softplus}(-D(G(z, h), h))].

    To the generator's is added λ (1 − cos(tap(G(z, h)), h)), feature consistency. One optimiser moves both at once.
    What generates is a running mean of the generator's weights.

    References:
        Goodfellow et al., "Generative Adversarial Nets", NeurIPS 2014. Miyato and Koyama, "cGANs with Projection
        Discriminator", ICLR 2018. Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative
        Adversarial Networks", ICLR 2018. Mescheder, Geiger and Nowozin, "Which Training Methods for GANs do actually
        Converge?", ICML 2018 (the penalty R1). Yazıcı et al., "The Unusual Effectiveness of Averaging in GAN
        Training", ICLR 2019.

    Args:
        pair: The law of activations that images are generated from. A :class:`~penult.Marginal` of activations of the
            images to train on, or of others like them, is what works.
        tap: The classifier, ``penult.Tap(model, head)``. It is not trained, and left as it is. None where nothing
            has to be seen by it: with activations in the batches and no consistency, or for a generator that only
            generates.
        image_shape: (C, H, W). Images are floats in [0, 1].
        condition: ``"activation"`` trains on h = tap(x); batches are images, or images and their activations.
            ``"label"`` is the paper's setting: the generator gets h ~ p(h|y), the discriminator the class's row w_y of
            the head; batches are (images, labels).
        latent: Numbers of a code z.
        width: Channels next to the image of the default networks: 16 of grey images, 32 of others.
        generator: A network of your own, (z, condition (B, d)) → (B, C, H, W), logits of pixels.
        discriminator: A network of your own, (images, condition (B, d)) → (B,).
        loss: ``"hinge"`` with spectral normalisation, which a discriminator of your own has to bring; it is best for
            grey images of which activations are told, loses variety on CIFAR-10, and collapses where classes alone are
            told. ``"non-saturating"`` with the penalty R1. When left out, the first for activations of grey images, and
            the other else.
        penalty: Weight γ of the squared gradient, applied to every fourth batch; 0.25 with ``"non-saturating"`` and 0
            with ``"hinge"`` when left out.
        consistency: Weight λ of 1 − cosine between tap(G(z, h)) and h.
        drawn: Share of generated pairs whose h is drawn from the pair's law rather than of the batch's images; with
            ``condition="label"`` all are.
        decay: Of the running mean of weights, per batch; less at first, n / (9 + n) after n steps.
        activations: What the condition's mean and scale are taken from; draws of the pair when left out, which does
            for laws that were fitted to data.
        preprocess: What brings images in [0, 1] to what the classifier takes, such as a normalisation or a resize; it
            has to be differentiable for `consistency`.
        optimizer: What makes an optimiser of parameters; Adam with betas (0.5, 0.999) when left out.
        scheduler: What makes a scheduler of an optimiser, stepped once an epoch.
        rate: Learning rate of the default.

    Attributes:
        history: A dict of ``epoch`` and means of ``loss`` (the generator's), ``discriminator_loss`` and, with
            consistency, ``cosine`` for each epoch; ``val_cosine`` where there is validation and a classifier. Losses of
            adversaries say that neither wins, not how good images are; the cosine and samples do.

    Raises:
        ImportError: Lightning is not installed.
        TypeError: `pair` is no pair, `tap` no tap, or a network no module.
        ValueError: An option is out of range; pair and tap are of different heads.

    Example:
        >>> import lightning, penult
        >>> images = penult.data.digits().images
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> head = penult.find_head(model, images[:8])  # of a classifier that was trained, in earnest
        >>> tap = penult.Tap(model, head)
        >>> acts = penult.extract(tap, [images], pre_activation=True)
        >>> pair = penult.GenerativePair(head, penult.Marginal.fit(head, acts, components=8))
        >>> gan = ActivationGAN(pair, tap, image_shape=(1, 8, 8))
        >>> lightning.Trainer(max_epochs=20).fit(gan, loader)  # doctest: +SKIP
        >>> gan.generate(torch.tensor([3, 5]), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """

    networks = ("generator",)
    beside = ("discriminator",)
    classes: Tensor

    def __init__(
        self,
        pair: GenerativePair,
        tap: Tap | None,
        image_shape: Sequence[int],
        *,
        condition: Condition = "activation",
        latent: int = 32,
        width: int | None = None,
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        loss: Adversarial | None = None,
        penalty: float | None = None,
        consistency: float = 1.0,
        drawn: float = 0.0,
        decay: float = 0.995,
        activations: Tensor | Activations | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        rate: float = 2e-3,
    ) -> None:
        super().__init__(pair, tap, image_shape, latent, condition, activations, preprocess)
        if loss not in (None, *get_args(Adversarial)):
            raise ValueError(f"loss must be 'non-saturating' or 'hinge', got {loss!r}")
        grey = self.image_shape[0] == 1
        loss = loss or ("hinge" if condition == "activation" and grey else "non-saturating")
        check_positive("rate", rate)
        penalty = (_PENALTY if loss == "non-saturating" else 0.0) if penalty is None else penalty
        for name, value in (("penalty", penalty), ("consistency", consistency)):
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not (isinstance(drawn, int | float) and 0 <= drawn <= 1):
            raise ValueError(f"drawn must be a share from 0 to 1, got {drawn!r}")
        if drawn and condition == "label":
            raise ValueError(f"drawn is {drawn} with condition='label', which draws all activations: leave drawn out")
        if not (isinstance(decay, int | float) and 0 <= decay < 1):
            raise ValueError(f"decay must be from 0 to below 1, got {decay!r}")
        if width is not None:
            check_positive("width", width)
        self.width, self.penalty = width, float(penalty)
        self.loss: Adversarial = loss
        self.consistency, self.drawn, self.decay = float(consistency), float(drawn), float(decay)
        self.optimizer, self.scheduler, self.rate = optimizer, scheduler, float(rate)
        self.own, self.own_discriminator = generator is not None, discriminator is not None
        if generator is None or discriminator is None:
            makes, scores = adversaries(
                self.image_shape, pair.head.in_features, self.latent, width, bounded=loss == "hinge"
            )
            generator = makes if generator is None else generator
            discriminator = scores if discriminator is None else discriminator
        for name, module in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is a {type(module).__name__}, not an nn.Module")
        self.generator, self.discriminator = generator, discriminator
        self.moving: nn.Module | None  # what the optimiser moves, and `generator` is the running mean of
        self.register_module("moving", None)
        rows = pair.head.weight.detach()
        rows = rows - rows.mean(0)
        self.register_buffer("classes", (rows / rows.square().mean().sqrt().clamp_min(1e-30)).float(), persistent=False)

    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Codes (B, latent) and activations (B, d) to images (B, C, H, W) in [0, 1], part of the autograd graph."""
        return self._images(self.generator, z, h)

    def configure_model(self) -> None:
        """Lightning's hook before a training: a copy of the generator is moved, which then follows it."""
        if self.moving is None:
            self.moving = deepcopy(self.generator)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The running mean gets no gradients, and is the same wherever what it follows is."""
        held = (*self.generator.named_parameters(), *self.generator.named_buffers())
        return [*super()._ddp_params_and_buffers_to_ignore, *(f"generator.{name}" for name, _ in held)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of both losses of a batch: images, with activations or labels behind them or alone."""
        images, h, y = self.read_batch(batch, batch_idx)
        told = self.standardize(h) if y is None else self.classes[y].to(h)
        if self.drawn:
            count = round(self.drawn * len(h))
            with torch.autocast(h.device.type, enabled=False):
                h = torch.cat([self.pair.sample((count,))[0].to(h), h[count:]])
        fake = self._images(self._moving(), self.random_codes(len(h)).to(h), h)
        asked = self.standardize(h) if y is None else told

        penalized = self.penalty > 0 and batch_idx % _EVERY == 0
        images = images.detach().requires_grad_(penalized)
        real = self._scores(images, told)
        both = self._scores(fake.detach(), asked)
        if self.loss == "hinge":
            discriminator_loss = (1 - real).relu().mean() + (1 + both).relu().mean()
        else:
            discriminator_loss = F.softplus(-real).mean() + F.softplus(both).mean()
        with frozen(self.discriminator):
            fooled = self._scores(fake, asked)
        loss = -fooled.mean() if self.loss == "hinge" else F.softplus(-fooled).mean()
        figures = {"discriminator_loss": discriminator_loss}
        if self.consistency:
            figures["cosine"] = self.agreement(fake, h)
            loss = loss + self.consistency * (1 - figures["cosine"])
        for name, value in ({"loss": loss} | figures).items():
            self._log(name, value, len(images))
        if penalized:
            (slope,) = torch.autograd.grad(real.sum(), images, create_graph=True)
            discriminator_loss = discriminator_loss + _EVERY * self.penalty * slope.square().flatten(1).sum(1).mean()
        return loss + discriminator_loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The running mean follows what was moved."""
        moved, steps = self._moving(), self.trainer.global_step
        share = 1 - min(self.decay, steps / (9 + steps))  # so that first weights are soon forgotten
        for mean, new in zip(self.generator.parameters(), moved.parameters(), strict=True):
            mean.data.lerp_(new.data, share)
        for held, seen in zip(self.generator.buffers(), moved.buffers(), strict=True):
            held.copy_(seen)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """How like what it was made of an image of other activations is to the classifier."""
        images, h, _ = self.read_batch(batch, batch_idx)
        if self.tap is not None:
            seen = self.activations(self.decode(self.random_codes(len(h)).to(h), h))
            cosine = torch.cosine_similarity(self.standardize(seen), self.standardize(h), dim=-1).mean()
            self._log("val_cosine", cosine, len(images))

    def configure_optimizers(self) -> Any:
        """One optimiser of generator and discriminator."""
        parts = self._moving(), self.discriminator
        parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(parameters)
        else:
            optimizer = torch.optim.Adam(parameters, lr=self.rate, betas=(0.5, 0.999))
        return scheduled(optimizer, self.scheduler)

    def config(self) -> dict[str, Any]:
        """JSON facts that rebuild the generator."""
        return {
            "image_shape": list(self.image_shape),
            "condition": self.condition,
            "latent": self.latent,
            "width": self.width,
            "loss": self.loss,
            "penalty": self.penalty,
            "consistency": self.consistency,
            "drawn": self.drawn,
            "decay": self.decay,
            "own_networks": self.own,
            "own_discriminator": self.own_discriminator,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], pair: GenerativePair, **networks: nn.Module) -> ActivationGAN:
        """A generator as `config` says, its weights still to be loaded; with a network of the user's own if it had."""
        settings: dict[str, Any] = {name: value for name, value in config.items() if name != "own_networks"}
        if settings.pop("own_discriminator"):  # which no file holds
            networks = {"discriminator": _Missing()} | networks
        return cls(pair, None, settings.pop("image_shape"), **(settings | networks))

    # --- inside -----------------------------------------------------------------------------------------------

    def _moving(self) -> nn.Module:
        if self.moving is None:
            raise RuntimeError("the generator is not set up for training; lightning.Trainer().fit(gan, loader) does it")
        return self.moving

    def _images(self, network: nn.Module, z: Tensor, h: Tensor) -> Tensor:
        pixels: Tensor = network(z, self.standardize(h))
        if pixels.shape != (len(z), *self.image_shape):
            raise ValueError(
                f"the generator gives {tuple(pixels.shape)}; expected {(len(z), *self.image_shape)}, logits of pixels"
            )
        return pixels.sigmoid()

    def _scores(self, images: Tensor, condition: Tensor) -> Tensor:
        scores: Tensor = self.discriminator(images, condition)
        if scores.shape != (len(images),):
            raise ValueError(f"the discriminator gives {tuple(scores.shape)}; expected {(len(images),)}, one an image")
        return scores.float()


@final
class _Missing(nn.Module):
    """In place of a discriminator that is not in a file; it generates nothing, so that only a training needs it."""

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Say so."""
        raise ValueError(
            "the discriminator was one of your own, which files do not hold: give load(path, discriminator=...) to "
            "train the generator further"
        )
