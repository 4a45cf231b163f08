"""Networks of generators: encoders, decoders and discriminators."""

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

# Most pixels of grey images for networks without convolutions.
_PIXELS = 1024
_WIDTH = {"mlp": 400, "conv": 64, "adversarial grey": 16, "adversarial colour": 32}
# Power iterations for a new layer.
_ITERATIONS, _TINY = 15, 1e-12
# Features of the discriminator.
_FEATURES = 128


def check_image_shape(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape (channels, height, width), or raise a ValueError."""
    shape = tuple(image_shape)
    if len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"image_shape is {image_shape!r}; expected (channels, height, width), such as (1, 28, 28)")
    return shape


def autoencoder(
    image_shape: tuple[int, int, int], features: int, latent: int, width: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """Make an encoder and a decoder for small images.

    For grey images of up to 1024 pixels they have two hidden layers of 400 units. For others they have convolutions
    that halve an image until its shorter side is 4 to 7 pixels.

    Args:
        image_shape: (C, H, W).
        features: Dimension d of the condition.
        latent: Dimension of the code.
        width: Units of a hidden layer (400), or channels of the first convolution (64).

    Returns:
        Modules (images, condition) → (B, 2 latent) and (z, condition) → (B, C, H, W).

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
    """Make a generator and a discriminator for small images.

    Args:
        image_shape: (C, H, W).
        features: Dimension d of the condition.
        latent: Dimension of the code.
        width: Channels of the layer next to the image. Default: 16 for grey images, 32 for others.
        bounded: Whether the discriminator's layers have spectral norm 1.

    Returns:
        Modules (z, condition) → (B, C, H, W) and (images, condition) → (B,).

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
    """Encoder with two hidden layers, whose input is all pixels and the condition.

    Args:
        image_shape: (C, H, W).
        features: Dimension of the condition.
        latent: Dimension of the code.
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
        """Map images (B, C, H, W) and conditions (B, d) to means and log-variances (B, 2 latent)."""
        out: Tensor = self.layers(torch.cat([images.flatten(1), condition], 1))
        return out


@final
class MLPDecoder(nn.Module):
    """Decoder with two hidden layers, from a code and the condition to all pixels.

    Args:
        image_shape: (C, H, W).
        features: Dimension of the condition.
        latent: Dimension of the code.
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
        """Map codes (B, latent) and conditions (B, d) to logits of pixels (B, C, H, W)."""
        out: Tensor = self.layers(torch.cat([z, condition], 1))
        return out


@final
class ConvEncoder(nn.Module):
    """Encoder with strided convolutions and a hidden layer, whose input includes the condition.

    Args:
        image_shape: (C, H, W).
        features: Dimension of the condition.
        latent: Dimension of the code.
        width: Channels after the first convolution; each further one doubles them.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int, latent: int, width: int) -> None:
        super().__init__()
        halvings, height, columns = _halvings(image_shape)
        channels = [image_shape[0], *(width << level for level in range(halvings))]
        layers: list[nn.Module] = []
        for inside, outside in pairwise(channels):
            layers += [nn.Conv2d(inside, outside, 4, 2, 1), nn.GroupNorm(_groups(outside), outside), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        hidden = 4 * width
        self.layers = nn.Sequential(
            nn.Linear(channels[-1] * height * columns + features, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
        )

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Map images (B, C, H, W) and conditions (B, d) to means and log-variances (B, 2 latent)."""
        out: Tensor = self.layers(torch.cat([self.convolutions(images), condition], 1))
        return out


@final
class ConvDecoder(nn.Module):
    """Decoder with a linear layer of code and condition, and transposed convolutions that double the image.

    Args:
        image_shape: (C, H, W).
        features: Dimension of the condition.
        latent: Dimension of the code.
        width: Channels before the last convolution; each earlier one has twice as many.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int, latent: int, width: int) -> None:
        super().__init__()
        halvings, height, columns = _halvings(image_shape)
        channels = [*(width << level for level in reversed(range(halvings))), image_shape[0]]
        self.grid = channels[0], height, columns
        self.layer = nn.Linear(latent + features, channels[0] * height * columns)
        layers: list[nn.Module] = []
        for inside, outside in pairwise(channels):
            layers += [
                nn.GroupNorm(_groups(inside), inside), nn.SiLU(), nn.ConvTranspose2d(inside, outside, 4, 2, 1),
            ]  # fmt: skip
        self.convolutions = nn.Sequential(*layers)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Map codes (B, latent) and conditions (B, d) to logits of pixels (B, C, H, W)."""
        grid = F.silu(self.layer(torch.cat([z, condition], 1))).view(-1, *self.grid)
        out: Tensor = self.convolutions(grid)
        return out


@final
class Bounded(nn.Module):
    """A linear or convolutional layer with spectral norm 1: its weight is divided by its spectral norm.

    Power iterations update the norm in training. The result is that of
    ``torch.nn.utils.parametrizations.spectral_norm``, but this module can be pickled.

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
        """The weight with spectral norm 1."""
        weight = self.layer.weight
        with torch.autocast(weight.device.type, enabled=False):
            return weight / torch.dot(self.left.clone(), weight.flatten(1) @ self.right.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with the normalized weight."""
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
    """Projection discriminator: the score of an image x with a condition is ψ·φ(x) + ⟨φ(x), V condition⟩.

    The network φ consists of strided convolutions and a linear layer of 128 units; the vector ψ and the matrix V are
    learned.

    References:
        Miyato and Koyama, "cGANs with Projection Discriminator", ICLR 2018.

    Args:
        image_shape: (C, H, W).
        features: Dimension of the condition.
        width: Channels after the first convolution; each further one doubles them.
        bounded: Whether all layers have spectral norm 1.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int, width: int, bounded: bool = False) -> None:
        super().__init__()
        halvings, height, columns = _halvings(image_shape)
        channels = [image_shape[0], *(width << level for level in range(halvings))]
        norm = Bounded if bounded else nn.Identity()
        layers: list[nn.Module] = []
        for inside, outside in pairwise(channels):
            layers += [norm(nn.Conv2d(inside, outside, 4, 2, 1)), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), norm(nn.Linear(channels[-1] * height * columns, _FEATURES)), nn.LeakyReLU(0.1)
        )
        self.score = norm(nn.Linear(_FEATURES, 1))
        self.project = norm(nn.Linear(features, _FEATURES, bias=False))

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] and conditions (B, d) to scores (B,), high for matching real images."""
        features = self.layers(2 * images - 1)
        out: Tensor = self.score(features).squeeze(1) + (features * self.project(condition)).sum(1)
        return out


def _groups(channels: int) -> int:
    return next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)


def _halvings(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return how often an image can be halved, and the height and width after that."""
    _, height, width = image_shape
    count = 0
    while min(height, width) >= 8:
        if height % 2 or width % 2:
            raise ValueError(
                f"images of {image_shape[1]}×{image_shape[2]} pixels cannot be halved until the shorter side is below "
                "8: resize them, for example to 32×32 or 64×64, or give networks of your own"
            )
        height, width, count = height // 2, width // 2, count + 1
    if not count:
        raise ValueError(
            f"images of {image_shape[1]}×{image_shape[2]} pixels are too small for convolutions; expected at least 8 "
            "pixels on the shorter side. Resize them, for example to 32×32 or 64×64, or give networks of your own"
        )
    return count, height, width
