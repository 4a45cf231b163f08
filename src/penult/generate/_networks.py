"""Networks that turn images and conditions into codes or scores, and codes and conditions into images."""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

__all__ = [
    "Bounded", "ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder", "ProjectionDiscriminator", "adversaries",
    "autoencoder", "check_image_shape",
]  # fmt: skip

_PIXELS = 1024  # of grey images, up to which all pixels are read at once
_WIDTH = {"mlp": 400, "conv": 64, "adversarial grey": 16, "adversarial colour": 32}
_ITERATIONS, _TINY = 15, 1e-12  # of power iterations, at first
_SCORED = 128  # features that a discriminator scores images by


def check_image_shape(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width), or a ValueError."""
    shape = tuple(image_shape)
    if len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"image_shape is {image_shape!r}; it is (channels, height, width), such as (1, 28, 28)")
    return shape


def autoencoder(
    image_shape: tuple[int, int, int], features: int, latent: int, width: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """An encoder and a decoder that fit small images.

    Grey images of up to 1024 pixels get two hidden layers of 400 units, others convolutions that halve an image until
    its shorter side is 4 to 7 pixels.

    Args:
        image_shape: (C, H, W).
        features: Numbers of a condition, d.
        latent: Numbers of a code.
        width: Units of a hidden layer, or channels of the first convolution (64).

    Returns:
        Modules with the calls (images, condition) → (B, 2 latent) and (z, condition) → (B, C, H, W).

    Raises:
        ValueError: Convolutions cannot halve that shape often enough.

    Example:
        >>> encode, decode = autoencoder((3, 32, 32), features=64, latent=32)
        >>> h = torch.randn(5, 64)
        >>> encode(torch.rand(5, 3, 32, 32), h).shape, decode(torch.randn(5, 32), h).shape
        (torch.Size([5, 64]), torch.Size([5, 3, 32, 32]))
    """
    if image_shape[0] == 1 and image_shape[1] * image_shape[2] <= _PIXELS:
        hidden = width or _WIDTH["mlp"]
        return MLPEncoder(image_shape, features, latent, hidden), MLPDecoder(image_shape, features, latent, hidden)
    channels = width or _WIDTH["conv"]
    return ConvEncoder(image_shape, features, latent, channels), ConvDecoder(image_shape, features, latent, channels)


def adversaries(
    image_shape: tuple[int, int, int], features: int, latent: int, width: int | None = None, bounded: bool = False
) -> tuple[nn.Module, nn.Module]:
    """A generator and a discriminator that fit small images.

    Args:
        image_shape: (C, H, W).
        features: Numbers of a condition, d.
        latent: Numbers of a code.
        width: Channels next to the image, 16 of grey images and 32 of others.
        bounded: Whether the discriminator's layers have a spectral norm of one.

    Returns:
        Modules with the calls (z, condition) → (B, C, H, W) and (images, condition) → (B,).

    Raises:
        ValueError: Convolutions cannot halve that shape often enough.

    Example:
        >>> generate, score = adversaries((3, 32, 32), features=64, latent=32)
        >>> images, h = generate(torch.randn(5, 32), torch.randn(5, 64)), torch.randn(5, 64)
        >>> images.shape, score(images, h).shape
        (torch.Size([5, 3, 32, 32]), torch.Size([5]))
    """
    channels = width or _WIDTH["adversarial grey" if image_shape[0] == 1 else "adversarial colour"]
    return (
        ConvDecoder(image_shape, features, latent, channels),
        ProjectionDiscriminator(image_shape, features, channels, bounded),
    )


@final
class MLPEncoder(nn.Module):
    """Two hidden layers over all pixels and the condition.

    Args:
        image_shape: (C, H, W).
        features: Numbers of a condition.
        latent: Numbers of a code.
        width: Units of a hidden layer.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int, latent: int, width: int) -> None:
        super().__init__()
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.layers = nn.Sequential(
            nn.Linear(pixels + features, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 2 * latent),
        )  # fmt: skip

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Images (B, C, H, W) and conditions (B, d) to means and log-variances (B, 2 latent)."""
        out: Tensor = self.layers(torch.cat([images.flatten(1), condition], 1))
        return out


@final
class MLPDecoder(nn.Module):
    """Two hidden layers from a code and the condition to all pixels.

    Args:
        image_shape: (C, H, W).
        features: Numbers of a condition.
        latent: Numbers of a code.
        width: Units of a hidden layer.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int, latent: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent + features, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, image_shape[0] * image_shape[1] * image_shape[2]),
            nn.Unflatten(1, image_shape),
        )  # fmt: skip

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Codes (B, latent) and conditions (B, d) to logits of pixels (B, C, H, W)."""
        out: Tensor = self.layers(torch.cat([z, condition], 1))
        return out


@final
class ConvEncoder(nn.Module):
    """Strided convolutions, and a hidden layer where the condition comes in.

    Args:
        image_shape: (C, H, W).
        features: Numbers of a condition.
        latent: Numbers of a code.
        width: Channels after the first convolution; they double with each.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int, latent: int, width: int) -> None:
        super().__init__()
        halvings, height, breadth = _halvings(image_shape)
        channels = [image_shape[0], *(width << level for level in range(halvings))]
        layers: list[nn.Module] = []
        for inside, outside in pairwise(channels):
            layers += [nn.Conv2d(inside, outside, 4, 2, 1), nn.GroupNorm(_groups(outside), outside), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        hidden = 4 * width
        self.layers = nn.Sequential(
            nn.Linear(channels[-1] * height * breadth + features, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
        )

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Images (B, C, H, W) and conditions (B, d) to means and log-variances (B, 2 latent)."""
        out: Tensor = self.layers(torch.cat([self.convolutions(images), condition], 1))
        return out


@final
class ConvDecoder(nn.Module):
    """A hidden layer of a code and the condition, and convolutions that double the image.

    Args:
        image_shape: (C, H, W).
        features: Numbers of a condition.
        latent: Numbers of a code.
        width: Channels before the last convolution; they double with each before it.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int, latent: int, width: int) -> None:
        super().__init__()
        halvings, height, breadth = _halvings(image_shape)
        channels = [*(width << level for level in reversed(range(halvings))), image_shape[0]]
        self.grid = channels[0], height, breadth
        self.layer = nn.Linear(latent + features, channels[0] * height * breadth)
        layers: list[nn.Module] = []
        for inside, outside in pairwise(channels):
            layers += [
                nn.GroupNorm(_groups(inside), inside), nn.SiLU(), nn.ConvTranspose2d(inside, outside, 4, 2, 1),
            ]  # fmt: skip
        self.convolutions = nn.Sequential(*layers)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Codes (B, latent) and conditions (B, d) to logits of pixels (B, C, H, W)."""
        grid = F.silu(self.layer(torch.cat([z, condition], 1))).view(-1, *self.grid)
        out: Tensor = self.convolutions(grid)
        return out


@final
class Bounded(nn.Module):
    """A linear or convolutional layer, its weight over its spectral norm, which power iterations follow in training.

    It does what ``torch.nn.utils.parametrizations.spectral_norm`` does, and can be pickled.

    References:
        Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.

    Args:
        layer: The layer.
    """

    left: Tensor
    right: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        matrix = layer.weight.detach().flatten(1)
        self.register_buffer("left", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("right", torch.zeros_like(matrix[0]))
        for _ in range(_ITERATIONS):
            self._iterate()

    @property
    def weight(self) -> Tensor:
        """The weight as it is used, of spectral norm 1."""
        whole = self.layer.weight
        with torch.autocast(whole.device.type, enabled=False):
            return whole / torch.dot(self.left.clone(), whole.flatten(1) @ self.right.clone())

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        if self.training:
            self._iterate()
        out: Tensor = functional_call(self.layer, {"weight": self.weight}, x)
        return out

    @torch.no_grad()
    def _iterate(self) -> None:
        matrix = self.layer.weight.flatten(1)
        with torch.autocast(matrix.device.type, enabled=False):
            self.right.copy_(F.normalize(matrix.T @ self.left, dim=0, eps=_TINY))
            self.left.copy_(F.normalize(matrix @ self.right, dim=0, eps=_TINY))


@final
class ProjectionDiscriminator(nn.Module):
    """Strided convolutions and a layer of 128 units φ(x); the score of a pair is ψ·φ(x) + ⟨φ(x), V condition⟩.

    References:
        Miyato and Koyama, "cGANs with Projection Discriminator", ICLR 2018.

    Args:
        image_shape: (C, H, W).
        features: Numbers of a condition.
        width: Channels after the first convolution; they double with each.
        bounded: Whether all layers have a spectral norm of one.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int, width: int, bounded: bool = False) -> None:
        super().__init__()
        halvings, height, breadth = _halvings(image_shape)
        channels = [image_shape[0], *(width << level for level in range(halvings))]
        norm = Bounded if bounded else nn.Identity()
        layers: list[nn.Module] = []
        for inside, outside in pairwise(channels):
            layers += [norm(nn.Conv2d(inside, outside, 4, 2, 1)), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), norm(nn.Linear(channels[-1] * height * breadth, _SCORED)), nn.LeakyReLU(0.1)
        )
        self.score = norm(nn.Linear(_SCORED, 1))
        self.project = norm(nn.Linear(features, _SCORED, bias=False))

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] and conditions (B, d) to scores (B,), high where they belong together."""
        seen = self.layers(2 * images - 1)
        out: Tensor = self.score(seen).squeeze(1) + (seen * self.project(condition)).sum(1)
        return out


def _groups(channels: int) -> int:
    return next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)


def _halvings(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """How often an image is halved, and the height and width that are left."""
    _, height, width = image_shape
    count = 0
    while min(height, width) >= 8:
        if height % 2 or width % 2:
            raise ValueError(
                f"images of {image_shape[1]}×{image_shape[2]} pixels cannot be halved until the shorter side is below "
                "8: resize them, such as to 32×32 or 64×64, or give networks of your own"
            )
        height, width, count = height // 2, width // 2, count + 1
    if not count:
        raise ValueError(f"colour images of {image_shape[1]}×{image_shape[2]} pixels are too small for convolutions")
    return count, height, width
