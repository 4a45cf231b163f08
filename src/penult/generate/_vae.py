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

from penult._checks import check_positive
from penult.activations import Activations, Tap
from penult.generate._generator import AT_ONCE, ActivationGenerator, Condition
from penult.generate._lightning import scheduled
from penult.generate._networks import autoencoder
from penult.head import _untouched
from penult.pair import GenerativePair

__all__ = ["ActivationVAE", "Likelihood"]

Likelihood = Literal["bernoulli", "gaussian"]

_TINY = 1e-6  # mean squared error of a pixel, at least
_LOG_VARIANCE = 12.0  # of a code, at most


@final
class ActivationVAE(ActivationGenerator):
    r"""A variational autoencoder p(x|z, h) of images, conditioned on a classifier's penultimate activations.

    It is trained on images with h = tap(x), by the evidence lower bound

    .. math:: \log p(x|h) \ge E_{q(z|x,h)}[\log p(x|z,h)] - \beta\, KL(q(z|x,h) \,\|\, N(0, I)),

    for which no labels are needed: the classifier has them. Images of class y come of h ~ p(h|y), the pair's law, and
    z ~ N(0, I). The law decides everything: with a bank or a mixture of activations of unlabelled images it beats a
    one-hot conditional autoencoder in fidelity and variety; with the von Mises-Fisher law of the head alone it does
    not (see the guide).

    What is said of an image is in h, so that z is hardly used where the activations are rich: the decoder inverts the
    classifier. Images are as sure to be of class y as draws of p(h|y) are, which is the classifier's own accuracy;
    ``generate(y, confident=0.95)`` keeps the clear cases.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014. Sohn, Lee and Yan, "Learning Structured
        Output Representation using Deep Conditional Generative Models", NeurIPS 2015. Rybkin, Daniilidis and Levine,
        "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021. Hou, Shen, Sun and Qiu, "Deep Feature
        Consistent Variational Autoencoder", WACV 2017.

    Args:
        pair: The law of activations that images are generated from. A :class:`~penult.Marginal` of activations of the
            images to train on, or of others like them, is what works.
        tap: The classifier, ``penult.Tap(model, head)``. It is not trained, and left as it is; it goes with the
            generator to another device, but no cast reaches it. None with activations in the batches, with
            ``condition="label"``, or for a generator that only generates.
        image_shape: (C, H, W). Images are floats in [0, 1].
        condition: ``"activation"`` trains on h = tap(x); batches are images, or images and their activations; labels
            behind them are not looked at.
            ``"label"`` trains on h ~ p(h|y), as the paper has it; batches are (images, labels).
        latent: Numbers of a code z.
        width: Units of a hidden layer (400), or channels of the first convolution (64), of the default networks.
        encoder: A network of your own, (images, condition (B, d)) → (B, 2 latent), means and log-variances.
        decoder: A network of your own, (z, condition (B, d)) → (B, C, H, W), logits of pixels.
        likelihood: ``"bernoulli"``, cross-entropy of pixels, the default of grey images; ``"gaussian"``, squares with
            the deviation that fits best, the default of others.
        beta: Weight of the divergence.
        consistency: Weight of 1 − cosine between tap(decode(z, h)) and h, in nats an image: feature consistency.
        activations: What the condition's mean and scale are taken from; draws of the pair when left out, which does
            for laws that were fitted to data.
        preprocess: What brings images in [0, 1] to what the classifier takes, such as a normalisation or a resize; it
            has to be differentiable for `consistency`.
        optimizer: What makes an optimiser of parameters, such as ``functools.partial(torch.optim.SGD, lr=0.1)``. When
            left out, Adam, whose rate falls to zero over the second half of the training.
        scheduler: What makes a scheduler of an optimiser, stepped once an epoch; it takes the place of that fall.
        rate: Learning rate of the default.

    Attributes:
        history: A dict of ``epoch`` and mean ``loss``, ``reconstruction``, ``divergence`` in nats an image for each
            epoch, ``cosine`` with consistency, and ``val_loss`` where there is validation.

    Raises:
        ImportError: Lightning is not installed.
        TypeError: `pair` is no pair, `tap` no tap, or a network no module.
        ValueError: An option is out of range; pair and tap are of different heads; one network alone is given.

    Example:
        >>> import lightning, penult
        >>> images = penult.data.digits().images
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> head = penult.find_head(model, images[:8])  # of a classifier that was trained, in earnest
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
        if likelihood not in (None, *get_args(Likelihood)):
            raise ValueError(f"likelihood must be 'bernoulli' or 'gaussian', got {likelihood!r}")
        for name, value in (("beta", beta), ("rate", rate)):
            check_positive(name, value)
        if not (isinstance(consistency, int | float) and 0 <= consistency < math.inf):
            raise ValueError(f"consistency must be a number of at least 0, got {consistency!r}")
        if (encoder is None) != (decoder is None):
            given = "an encoder" if decoder is None else "a decoder"
            raise ValueError(f"{given} alone is given; networks of your own come as a pair, encoder and decoder")
        if width is not None:
            check_positive("width", width)
        self.likelihood: Likelihood = likelihood or ("bernoulli" if self.image_shape[0] == 1 else "gaussian")
        self.width, self.beta, self.consistency = width, float(beta), float(consistency)
        self.optimizer, self.scheduler, self.rate = optimizer, scheduler, float(rate)
        self.own = encoder is not None
        if encoder is None or decoder is None:
            encoder, decoder = autoencoder(self.image_shape, pair.head.in_features, self.latent, width)
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is a {type(module).__name__}, not an nn.Module")
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and activations (B, d) to means and log-variances of codes, each (B, latent)."""
        out = self.encoder(x, self.standardize(h))
        if out.shape != (len(x), 2 * self.latent):
            raise ValueError(
                f"the encoder gives {tuple(out.shape)} for {len(x)} images; expected ({len(x)}, {2 * self.latent}), "
                "means and log-variances of codes"
            )
        mean, log_variance = out.chunk(2, dim=1)
        return mean, log_variance.clamp(-_LOG_VARIANCE, _LOG_VARIANCE)

    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Codes (B, latent) and activations (B, d) to images (B, C, H, W) in [0, 1], part of the autograd graph."""
        return self._pixels(z, h).sigmoid()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Images as they come back: h = tap(x), z the mean of q(z|x, h).

        Args:
            x: Images (B, C, H, W) in [0, 1].

        Returns:
            Images of the same shape.

        Raises:
            ValueError: There is no classifier, or images of a wrong shape or range.
        """
        self._check_images(x)
        x = x.to(self.standardize.mean)
        h = self.activations(x)
        return self._decoded(self.code_of(x, h, None), h)

    def code_of(self, x: Tensor, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """The means of q(z|x, h) (B, latent)."""
        with _untouched(self.encoder):
            parts = zip(x.split(AT_ONCE), h.split(AT_ONCE), strict=True)
            return torch.cat([self.encode(*part)[0] for part in parts])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch: images, alone or with labels behind them."""
        images, h, _ = self.read_batch(batch, batch_idx)
        figures = self._figures(images, h)
        for name, value in figures.items():
            self._log(name, value, len(images))
        return figures["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The loss on a batch of other images."""
        images, h, _ = self.read_batch(batch, batch_idx)
        self._log("val_loss", self._figures(images, h)["loss"], len(images))

    def configure_optimizers(self) -> Any:
        """The optimiser of encoder and decoder, and its schedule."""
        parameters = [p for name in self.networks for p in getattr(self, name).parameters() if p.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(parameters)
        else:
            optimizer = torch.optim.Adam(parameters, lr=self.rate)
            if self.scheduler is None:
                steps = self.trainer.estimated_stepping_batches
                if not math.isfinite(steps) or steps < 1:
                    raise ValueError(
                        "the rate falls towards the end of the training, which has to be known: give the Trainer "
                        "max_epochs or max_steps, or the generator a scheduler of your own"
                    )
                fall = LambdaLR(optimizer, lambda step: min(1.0, max(0.0, 2 - 2 * step / steps)))
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": fall, "interval": "step"}}
        return scheduled(optimizer, self.scheduler)

    def config(self) -> dict[str, Any]:
        """JSON facts that rebuild encoder and decoder."""
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
        """A generator as `config` says, its weights still to be loaded; with networks of the user's own if it had."""
        settings: dict[str, Any] = {name: value for name, value in config.items() if name != "own_networks"}
        return cls(pair, None, settings.pop("image_shape"), **(settings | networks))

    # --- inside -----------------------------------------------------------------------------------------------

    def _figures(self, images: Tensor, h: Tensor) -> dict[str, Tensor]:
        """Terms of the bound in nats an image."""
        mean, log_variance = self.encode(images, h)
        mean, log_variance = mean.float(), log_variance.float()
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        pixels, images = self._pixels(z.to(h), h).float(), images.float()
        if self.likelihood == "bernoulli":
            cross_entropy = F.binary_cross_entropy_with_logits(pixels, images, reduction="none")
            reconstruction = cross_entropy.flatten(1).sum(1).mean()
        else:
            square = F.mse_loss(pixels.sigmoid(), images).clamp_min(_TINY)
            reconstruction = 0.5 * images[0].numel() * (1 + (2 * math.pi * square).log())
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        figures = {"reconstruction": reconstruction, "divergence": divergence}
        loss = reconstruction + self.beta * divergence
        if self.consistency:
            figures["cosine"] = self.agreement(pixels.sigmoid(), h)
            loss = loss + self.consistency * (1 - figures["cosine"])
        return {"loss": loss} | figures

    def _pixels(self, z: Tensor, h: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(z, self.standardize(h))
        if pixels.shape != (len(z), *self.image_shape):
            raise ValueError(
                f"the decoder gives {tuple(pixels.shape)}; expected {(len(z), *self.image_shape)}, logits of pixels"
            )
        return pixels
