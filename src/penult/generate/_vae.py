"""A variational autoencoder that is conditioned on activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from penult._checks import check_choice, check_integer, check_not_negative, check_positive, described
from penult.activations import Activations, Tap
from penult.generate._generator import BATCH, ActivationGenerator, Condition
from penult.generate._lightning import optimizer_config
from penult.generate._networks import autoencoder
from penult.head import _untouched
from penult.pair import GenerativePair

__all__ = ["ActivationVAE", "Likelihood"]

Likelihood = Literal["bernoulli", "gaussian"]

# Smallest mean squared error of a pixel.
_MIN_ERROR = 1e-6
# Largest absolute log-variance of a code.
_MAX_LOG_VARIANCE = 12.0


@final
class ActivationVAE(ActivationGenerator):
    r"""A variational autoencoder p(x|z, h) of images, conditioned on a classifier's penultimate activations.

    It is trained on images with h = tap(x), with the evidence lower bound

    .. math:: \log p(x|h) \ge E_{q(z|x,h)}[\log p(x|z,h)] - \beta\, KL(q(z|x,h) \,\|\, N(0, I)),

    which needs no labels. Images of class y are generated from h ~ p(h|y), sampled from the pair, and z ~ N(0, I).
    Quality depends mostly on the base of the pair: with a bank or a mixture of activations of unlabelled images it
    beats a one-hot conditional autoencoder in fidelity and variety; with the von Mises-Fisher distribution of the head
    alone it does not (see the guide).

    If activations determine most of an image, z has little effect: the decoder inverts the classifier. Images belong to
    class y as reliably as samples of p(h|y) do, which is the classifier's own accuracy; ``generate(y, confident=0.95)``
    only uses clear cases.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014. Sohn, Lee and Yan, "Learning Structured
        Output Representation using Deep Conditional Generative Models", NeurIPS 2015. Rybkin, Daniilidis and Levine,
        "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021. Hou, Shen, Sun and Qiu, "Deep Feature
        Consistent Variational Autoencoder", WACV 2017.

    Args:
        pair: The pair that activations are sampled from. Its base should be a :class:`~penult.Marginal` of activations
            of the training images or of similar images.
        tap: The classifier, ``penult.Tap(model, head)``. It is not trained or changed; it moves with the generator to
            another device, but is not cast. None if it is not needed: with activations in the batches, with
            ``condition="label"``, or for a generator that only generates.
        image_shape: (C, H, W). Images are floats in [0, 1].
        condition: ``"activation"`` trains on h = tap(x); batches are images, or images and their activations; labels
            are ignored. ``"label"`` trains on h ~ p(h|y), as in the paper; batches are (images, labels).
        latent: Dimension of the code z.
        width: Units of a hidden layer (400), or channels of the first convolution (64), of the default networks.
        encoder: A network of your own, (images, condition (B, d)) → (B, 2 latent), means and log-variances.
        decoder: A network of your own, (z, condition (B, d)) → (B, C, H, W), logits of pixels.
        likelihood: ``"bernoulli"``, the cross-entropy of pixels, or ``"gaussian"``, with the standard deviation that
            fits best. Default: ``"bernoulli"`` for grey images, else ``"gaussian"``.
        beta: Weight of the divergence.
        consistency: Weight of 1 − cosine between tap(decode(z, h)) and h, in nats per image: feature consistency.
        activations: Activations for mean and scale of the condition. Default: samples of the pair, which are suitable
            for bases that were fitted to data.
        preprocess: Function from images in [0, 1] to inputs of the classifier, such as a normalisation or a resize; it
            has to be differentiable for `consistency`.
        optimizer: Function from parameters to an optimizer, such as ``functools.partial(torch.optim.SGD, lr=0.1)``.
            Default: Adam, whose learning rate falls to zero over the second half of the training.
        scheduler: Function from an optimizer to a scheduler, stepped once per epoch; it replaces the schedule of the
            default.
        rate: Learning rate of the default optimizer.

    Attributes:
        history: A dict of ``epoch`` and means of ``loss``, ``reconstruction``, ``divergence`` in nats per image for
            each epoch, ``cosine`` with consistency, and ``val_loss`` with validation.

    Raises:
        ImportError: Lightning is not installed.
        TypeError: `pair` is not a pair, `tap` not a tap, or a network not a module; an option has a wrong type.
        ValueError: An option is out of range, the heads of pair and tap have different shapes, or only one network is
            given.

    Example:
        >>> import lightning, penult
        >>> images = penult.data.digits().images
        >>> # In practice, use a trained classifier.
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> head = penult.find_head(model, images[:8])
        >>> tap = penult.Tap(model, head)
        >>> acts = penult.extract(tap, [images], pre_activation=True)
        >>> pair = penult.GenerativePair(head, penult.Marginal.fit(head, acts, components=8))
        >>> vae = ActivationVAE(pair, tap, image_shape=(1, 8, 8))
        >>> lightning.Trainer(max_epochs=20).fit(vae, loader)  # doctest: +SKIP
        >>> vae.generate(torch.tensor([3, 5]), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """

    networks = "encoder", "decoder"

    def __init__(
        self,
        pair: GenerativePair,
        tap: Tap | None,
        image_shape: Sequence[int],
        *,
        condition: Condition = "activation",
        latent: int = 16,
        width: int | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        beta: float = 1.0,
        consistency: float = 0.0,
        activations: Tensor | Activations | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        rate: float = 1e-3,
    ) -> None:
        super().__init__(pair, tap, image_shape, latent, condition, activations, preprocess)
        if likelihood is None:
            likelihood = "bernoulli" if self.image_shape[0] == 1 else "gaussian"
        check_choice("likelihood", likelihood, get_args(Likelihood))
        self.beta, self.rate = check_positive("beta", beta), check_positive("rate", rate)
        self.consistency = check_not_negative("consistency", consistency)
        if (encoder is None) != (decoder is None):
            present, missing = ("encoder", "decoder") if decoder is None else ("decoder", "encoder")
            raise ValueError(f"{missing} is None; expected a network, because {present} is one. Give both or neither")
        self.width = width = None if width is None else check_integer("width", width)
        self.likelihood: Likelihood = likelihood
        self.optimizer, self.scheduler = optimizer, scheduler
        self.own = encoder is not None
        if encoder is None or decoder is None:
            encoder, decoder = autoencoder(self.image_shape, pair.head.in_features, self.latent, width)
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is {described(module)}; expected a torch.nn.Module")
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log-variances (B, latent) of codes for images (B, C, H, W) and activations (B, d)."""
        out = self.encoder(x, self.standardize(h))
        if out.shape != (len(x), 2 * self.latent):
            raise ValueError(
                f"the output of the encoder has shape {tuple(out.shape)} for {len(x)} images; expected "
                f"({len(x)}, {2 * self.latent}), means and log-variances of codes"
            )
        mean, log_variance = out.chunk(2, dim=1)
        return mean, log_variance.clamp(-_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE)

    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] of codes (B, latent) and activations (B, d), with gradients."""
        return self._pixel_logits(z, h).sigmoid()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode images, with h = tap(x) and the mean of q(z|x, h) as z.

        Args:
            x: Images (B, C, H, W) in [0, 1].

        Returns:
            Images of the same shape.

        Raises:
            TypeError: Images are not floating.
            ValueError: There is no classifier, or images have a wrong shape or range.
        """
        self._check_images(x)
        x = x.to(self.standardize.mean)
        h = self.activations(x)
        return self._decoded(self.code_of(x, h, None), h)

    def code_of(self, x: Tensor, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the means (B, latent) of q(z|x, h)."""
        with _untouched(self.encoder):
            parts = zip(x.split(BATCH), h.split(BATCH), strict=True)
            return torch.cat([self.encode(*part)[0] for part in parts])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch: images alone, or images with activations or labels."""
        images, h, _ = self.read_batch(batch, batch_idx)
        metrics = self._metrics(images, h)
        for name, value in metrics.items():
            self._log(name, value, len(images))
        return metrics["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of a batch of validation images."""
        images, h, _ = self.read_batch(batch, batch_idx)
        self._log("val_loss", self._metrics(images, h)["loss"], len(images))

    def configure_optimizers(self) -> Any:
        """Return the optimizer of encoder and decoder, and its schedule."""
        parameters = [p for name in self.networks for p in getattr(self, name).parameters() if p.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(parameters)
        else:
            optimizer = torch.optim.Adam(parameters, lr=self.rate)
            if self.scheduler is None:
                steps = self.trainer.estimated_stepping_batches
                if not math.isfinite(steps) or steps < 1:
                    raise ValueError(
                        "the default schedule needs the length of the training: give the Trainer max_epochs or "
                        "max_steps, or the generator a scheduler of your own"
                    )
                schedule = LambdaLR(optimizer, lambda step: min(1.0, max(0.0, 2 - 2 * step / steps)))
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return optimizer_config(optimizer, self.scheduler)

    def config(self) -> dict[str, Any]:
        """Return JSON data from which encoder and decoder are rebuilt."""
        return {
            "image_shape": list(self.image_shape),
            "condition": self.condition,
            "latent": self.latent,
            "width": self.width,
            "likelihood": self.likelihood,
            "beta": self.beta,
            "consistency": self.consistency,
            "own_networks": self.own,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], pair: GenerativePair, **networks: nn.Module) -> ActivationVAE:
        """Make a generator from its `config`, without its weights, with the networks of the user, if any."""
        settings: dict[str, Any] = {name: value for name, value in config.items() if name != "own_networks"}
        return cls(pair, None, settings.pop("image_shape"), **(settings | networks))

    # --- private ----------------------------------------------------------------------------------------------

    def _metrics(self, images: Tensor, h: Tensor) -> dict[str, Tensor]:
        """Return the loss and its terms in nats per image, and the cosine with consistency."""
        mean, log_variance = self.encode(images, h)
        mean, log_variance = mean.float(), log_variance.float()
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        logits, images = self._pixel_logits(z.to(h), h).float(), images.float()
        if self.likelihood == "bernoulli":
            cross_entropy = F.binary_cross_entropy_with_logits(logits, images, reduction="none")
            reconstruction = cross_entropy.flatten(1).sum(1).mean()
        else:
            squared_error = F.mse_loss(logits.sigmoid(), images).clamp_min(_MIN_ERROR)
            reconstruction = 0.5 * images[0].numel() * (1 + (2 * math.pi * squared_error).log())
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        metrics = {"reconstruction": reconstruction, "divergence": divergence}
        loss = reconstruction + self.beta * divergence
        if self.consistency:
            metrics["cosine"] = self.agreement(logits.sigmoid(), h)
            loss = loss + self.consistency * (1 - metrics["cosine"])
        return {"loss": loss} | metrics

    def _pixel_logits(self, z: Tensor, h: Tensor) -> Tensor:
        logits: Tensor = self.decoder(z, self.standardize(h))
        if logits.shape != (len(z), *self.image_shape):
            raise ValueError(
                f"the output of the decoder has shape {tuple(logits.shape)}; expected "
                f"{(len(z), *self.image_shape)}, logits of pixels"
            )
        return logits
