"""A generative adversarial network that is conditioned on activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from penult._checks import check_between, check_choice, check_integer, check_not_negative, check_positive, described
from penult.activations import Activations, Tap
from penult.generate._classifier import frozen
from penult.generate._conditions import check_below_one
from penult.generate._generator import ActivationGenerator, Condition
from penult.generate._lightning import optimizer_config
from penult.generate._networks import adversaries
from penult.pair import GenerativePair

__all__ = ["ActivationGAN", "Adversarial"]

Adversarial = Literal["non-saturating", "hinge"]

_PENALTY = 0.25
# The penalty is computed for one in this many batches, and multiplied by the same number.
_PENALTY_INTERVAL = 4


@final
class ActivationGAN(ActivationGenerator):
    r"""A generative adversarial network of images that is conditioned on a classifier's penultimate activations.

    A projection discriminator D separates real pairs (x, tap(x)) from generated pairs (G(z, h), h), which needs no
    labels. Images of class y are generated from h ~ p(h|y), sampled from the pair, and z ~ N(0, I).

    With ``loss="hinge"`` discriminator and generator minimize, under spectral normalization,

    .. math:: E[(1 - D(x, h))_+] + E[(1 + D(G(z, h), h))_+], \qquad -E[D(G(z, h), h)],

    and with ``loss="non-saturating"``

    .. math:: E[\mathrm{softplus}(-D(x, h)) + \mathrm{softplus}(D(G(z, h), h))]
        + \gamma\, E[\|\nabla_x D(x, h)\|^2], \qquad E[\mathrm{softplus}(-D(G(z, h), h))].

    Feature consistency λ (1 − cos(tap(G(z, h)), h)) is added to the loss of the generator. One optimizer updates both
    networks in the same step. Images are generated with a running mean of the generator's weights.

    References:
        Goodfellow et al., "Generative Adversarial Nets", NeurIPS 2014. Miyato and Koyama, "cGANs with Projection
        Discriminator", ICLR 2018. Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative
        Adversarial Networks", ICLR 2018. Mescheder, Geiger and Nowozin, "Which Training Methods for GANs do actually
        Converge?", ICML 2018 (the penalty R1). Yazıcı et al., "The Unusual Effectiveness of Averaging in GAN
        Training", ICLR 2019.

    Args:
        pair: The pair that activations are sampled from. Its base should be a :class:`~penult.Marginal` of activations
            of the training images or of similar images.
        tap: The classifier, ``penult.Tap(model, head)``. It is not trained or changed. None if it is not needed: with
            activations in the batches and no consistency, or for a generator that only generates.
        image_shape: (C, H, W). Images are floats in [0, 1].
        condition: ``"activation"`` trains on h = tap(x); batches are images, or images and their activations.
            ``"label"`` is the setting of the paper: the generator gets h ~ p(h|y), the discriminator the row w_y of the
            class; batches are (images, labels).
        latent: Dimension of the code z.
        width: Channels next to the image of the default networks. Default: 16 for grey images, 32 for others.
        generator: A network of your own, (z, condition (B, d)) → (B, C, H, W), logits of pixels.
        discriminator: A network of your own, (images, condition (B, d)) → (B,).
        loss: ``"hinge"`` needs spectral normalization, also in a discriminator of your own. It is best for grey images
            with condition ``"activation"``, but loses variety on CIFAR-10 and collapses with condition ``"label"``.
            ``"non-saturating"`` has the penalty R1. Default: ``"hinge"`` for grey images with condition
            ``"activation"``, else ``"non-saturating"``.
        penalty: Weight γ of the squared gradient, computed for every fourth batch. Default: 0.25 with
            ``"non-saturating"``, 0 with ``"hinge"``.
        consistency: Weight λ of 1 − cosine between tap(G(z, h)) and h.
        drawn: Fraction of generator inputs h sampled from the pair instead of taken from the batch's images; with
            ``condition="label"`` all are sampled.
        decay: Decay of the running mean of weights in each step; at most n / (9 + n) after n steps.
        activations: Activations for mean and scale of the condition. Default: samples of the pair, which are suitable
            for bases that were fitted to data.
        preprocess: Function from images in [0, 1] to inputs of the classifier, such as a normalisation or a resize; it
            has to be differentiable for `consistency`.
        optimizer: Function from parameters to an optimizer. Default: Adam with betas (0.5, 0.999).
        scheduler: Function from an optimizer to a scheduler, stepped once per epoch.
        rate: Learning rate of the default optimizer.

    Attributes:
        history: A dict of ``epoch`` and means of ``loss`` (of the generator), ``discriminator_loss`` and, with
            consistency, ``cosine`` for each epoch; ``val_cosine`` with validation and a classifier. The losses only
            show whether one network dominates; the cosine and samples show how good images are.

    Raises:
        ImportError: Lightning is not installed.
        TypeError: `pair` is not a pair, `tap` not a tap, or a network not a module; an option has a wrong type.
        ValueError: An option is out of range, or the heads of pair and tap have different shapes.

    Example:
        >>> import lightning, penult
        >>> images = penult.data.digits().images
        >>> # In practice, use a trained classifier.
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> head = penult.find_head(model, images[:8])
        >>> tap = penult.Tap(model, head)
        >>> acts = penult.extract(tap, [images], pre_activation=True)
        >>> pair = penult.GenerativePair(head, penult.Marginal.fit(head, acts, components=8))
        >>> gan = ActivationGAN(pair, tap, image_shape=(1, 8, 8))
        >>> lightning.Trainer(max_epochs=20).fit(gan, loader)  # doctest: +SKIP
        >>> gan.generate(torch.tensor([3, 5]), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """

    networks = ("generator",)
    training_networks = ("discriminator",)
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
        is_grey = self.image_shape[0] == 1
        if loss is None:
            loss = "hinge" if condition == "activation" and is_grey else "non-saturating"
        check_choice("loss", loss, get_args(Adversarial))
        self.rate = check_positive("rate", rate)
        penalty = (_PENALTY if loss == "non-saturating" else 0.0) if penalty is None else penalty
        self.penalty = check_not_negative("penalty", penalty)
        self.consistency = check_not_negative("consistency", consistency)
        self.drawn = check_between("drawn", drawn, inclusive=True)
        if drawn and condition == "label":
            raise ValueError(f"drawn is {drawn} with condition='label', which samples all activations: leave drawn out")
        check_below_one("decay", decay)
        self.width = width = None if width is None else check_integer("width", width)
        self.loss: Adversarial = loss
        self.decay = float(decay)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.own, self.own_discriminator = generator is not None, discriminator is not None
        if generator is None or discriminator is None:
            default_generator, default_discriminator = adversaries(
                self.image_shape, pair.head.in_features, self.latent, width, bounded=loss == "hinge"
            )
            generator = default_generator if generator is None else generator
            discriminator = default_discriminator if discriminator is None else discriminator
        for name, module in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is {described(module)}; expected a torch.nn.Module")
        self.generator, self.discriminator = generator, discriminator
        # The network that the optimizer updates; `generator` is the running mean of its weights.
        self.moving: nn.Module | None
        self.register_module("moving", None)
        rows = pair.head.weight.detach()
        rows = rows - rows.mean(0)
        self.register_buffer("classes", (rows / rows.square().mean().sqrt().clamp_min(1e-30)).float(), persistent=False)

    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] of codes (B, latent) and activations (B, d), with gradients."""
        return self._images(self.generator, z, h)

    def configure_model(self) -> None:
        """Copy the generator before training; the optimizer updates the copy."""
        if self.moving is None:
            self.moving = deepcopy(self.generator)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of parameters and buffers that are not trained, and of the running mean, which gets no gradients."""
        named = (*self.generator.named_parameters(), *self.generator.named_buffers())
        return [*super()._ddp_params_and_buffers_to_ignore, *(f"generator.{name}" for name, _ in named)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of both losses for a batch: images alone, or images with activations or labels."""
        images, h, y = self.read_batch(batch, batch_idx)
        real_condition = self.standardize(h) if y is None else self.classes[y].to(h)
        if self.drawn:
            count = round(self.drawn * len(h))
            with torch.autocast(h.device.type, enabled=False):
                h = torch.cat([self.pair.sample((count,))[0].to(h), h[count:]])
        fake_images = self._images(self._trained_generator(), self.random_codes(len(h)).to(h), h)
        fake_condition = self.standardize(h) if y is None else real_condition

        penalized = self.penalty > 0 and batch_idx % _PENALTY_INTERVAL == 0
        images = images.detach().requires_grad_(penalized)
        real = self._scores(images, real_condition)
        fake = self._scores(fake_images.detach(), fake_condition)
        if self.loss == "hinge":
            discriminator_loss = (1 - real).relu().mean() + (1 + fake).relu().mean()
        else:
            discriminator_loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        with frozen(self.discriminator):
            fake_for_generator = self._scores(fake_images, fake_condition)
        loss = -fake_for_generator.mean() if self.loss == "hinge" else F.softplus(-fake_for_generator).mean()
        metrics = {"discriminator_loss": discriminator_loss}
        if self.consistency:
            metrics["cosine"] = self.agreement(fake_images, h)
            loss = loss + self.consistency * (1 - metrics["cosine"])
        for name, value in ({"loss": loss} | metrics).items():
            self._log(name, value, len(images))
        if penalized:
            (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
            squared_norm = gradient.square().flatten(1).sum(1).mean()
            discriminator_loss = discriminator_loss + _PENALTY_INTERVAL * self.penalty * squared_norm
        return loss + discriminator_loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the running mean of the generator's weights."""
        trained, steps = self._trained_generator(), self.trainer.global_step
        # A smaller decay in the first steps removes the first weights from the mean.
        weight = 1 - min(self.decay, steps / (9 + steps))
        for mean, parameter in zip(self.generator.parameters(), trained.parameters(), strict=True):
            mean.data.lerp_(parameter.data, weight)
        for buffer, trained_buffer in zip(self.generator.buffers(), trained.buffers(), strict=True):
            buffer.copy_(trained_buffer)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean cosine between the activations of generated images and their conditions."""
        images, h, _ = self.read_batch(batch, batch_idx)
        if self.tap is not None:
            activations = self.activations(self.decode(self.random_codes(len(h)).to(h), h))
            cosine = torch.cosine_similarity(self.standardize(activations), self.standardize(h), dim=-1).mean()
            self._log("val_cosine", cosine, len(images))

    def configure_optimizers(self) -> Any:
        """Return one optimizer for generator and discriminator."""
        networks = self._trained_generator(), self.discriminator
        parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(parameters)
        else:
            optimizer = torch.optim.Adam(parameters, lr=self.rate, betas=(0.5, 0.999))
        return optimizer_config(optimizer, self.scheduler)

    def config(self) -> dict[str, Any]:
        """Return JSON data from which the generator is rebuilt."""
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
        """Make a generator from its `config`, without its weights, with the networks of the user, if any."""
        settings: dict[str, Any] = {name: value for name, value in config.items() if name != "own_networks"}
        # Files do not hold the user's discriminator.
        if settings.pop("own_discriminator"):
            networks = {"discriminator": _MissingDiscriminator()} | networks
        return cls(pair, None, settings.pop("image_shape"), **(settings | networks))

    # --- private ----------------------------------------------------------------------------------------------

    def _trained_generator(self) -> nn.Module:
        """Return the network that the optimizer updates."""
        if self.moving is None:
            raise RuntimeError("the generator is not set up for training; lightning.Trainer().fit(gan, loader) does it")
        return self.moving

    def _images(self, network: nn.Module, z: Tensor, h: Tensor) -> Tensor:
        pixels: Tensor = network(z, self.standardize(h))
        if pixels.shape != (len(z), *self.image_shape):
            raise ValueError(
                f"the output of the generator has shape {tuple(pixels.shape)}; expected "
                f"{(len(z), *self.image_shape)}, logits of pixels"
            )
        return pixels.sigmoid()

    def _scores(self, images: Tensor, condition: Tensor) -> Tensor:
        scores: Tensor = self.discriminator(images, condition)
        if scores.shape != (len(images),):
            raise ValueError(
                f"the output of the discriminator has shape {tuple(scores.shape)}; expected {(len(images),)}, one "
                "score for each image"
            )
        return scores.float()


@final
class _MissingDiscriminator(nn.Module):
    """Placeholder for a discriminator that a file does not hold; generating does not need it."""

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Raise a ValueError."""
        raise ValueError(
            "the discriminator was one of your own, which files do not hold: give load(path, discriminator=...) to "
            "train the generator further"
        )
