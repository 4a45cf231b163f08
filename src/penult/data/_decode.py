"""Conversion of encoded and raw images to tensors."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from penult.io import _contents

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Normalization", "PerChannel", "adapt", "decode", "suffixes"]

# Formats that Pillow decodes by itself. For others, such as EPS, it runs another program (Ghostscript).
_FORMATS = tuple("AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM QOI SGI TGA TIFF WEBP".split())
_GREY = ("1", "L", "LA", "La")
# Weights of ITU-R BT.601, as in Pillow.
_LUMA = (0.299, 0.587, 0.114)


def decode(data: bytes, mode: str | None, size: tuple[int, int] | None) -> Tensor:
    """Decode an image to float32 (C, H, W) in [0, 1].

    Raises:
        ImportError: Pillow is not installed.
        ValueError: The data are not an image, or its range of values is unknown.
    """
    formats = _formats()
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _pixels(image, mode, size)
    except UnidentifiedImageError:
        kind = _contents(data[:512])
        # Pillow identifies no image whose header is damaged.
        kind = None if kind is not None and kind.name.endswith(" image") else kind
        fault = "its format is unknown" if kind is None else f"it is {kind.name}"
        remedy = f". {kind.remedy}" if kind is not None and kind.remedy else ""
        raise ValueError(f"{fault}; expected one of {', '.join(formats)}{remedy}") from None
    except MemoryError:
        raise
    except Exception as error:
        # Decoders of damaged images raise errors of many types: SyntaxError, struct.error, IndexError and others.
        raise ValueError(str(error) or type(error).__name__) from error


def _formats() -> list[str]:
    """Return the formats that are decoded.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('images are read by Pillow: pip install "penult[data]"', name=error.name) from error
    Image.init()
    # The oldest supported Pillow does not know AVIF.
    return [name for name in _FORMATS if name in Image.OPEN]


def suffixes() -> frozenset[str]:
    """Return the suffixes of all formats that are decoded, in lower case.

    Raises:
        ImportError: Pillow is not installed.
    """
    formats = _formats()
    from PIL import Image

    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _pixels(image: Image.Image, mode: str | None, size: tuple[int, int] | None) -> Tensor:
    """Convert a Pillow image to a tensor."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of an unknown range; save it with 8 or 16 bits")
    # These modes have 16 bits, or 32 bits with 16 in use.
    deep = image.mode.startswith("I")
    if deep:
        image = image.convert("I")
        low, high = cast("tuple[int, int]", image.getextrema())
        if low < 0 or high > 65535:
            raise ValueError(f"its pixels run from {low} to {high}; expected 16 bits, 0 to 65535")
        image = image.convert("F")
    else:
        own = "L" if image.mode in _GREY else "RGB"
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = _on_white(image)
        if image.mode != (mode or own):
            image = image.convert(mode or own)
    if size is not None and size != (image.height, image.width):
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32 if deep else torch.uint8)
    pixels = raw.view(image.height, image.width, -1).permute(2, 0, 1)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(65535 if deep else 255)
    return pixels.repeat(3, 1, 1) if deep and mode == "RGB" else pixels


def _on_white(image: Image.Image) -> Image.Image:
    """Compose a partly transparent image with a white background."""
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def adapt(image: Tensor, mode: str | None, size: tuple[int, int] | None) -> Tensor:
    """Convert an image tensor, float32 (C, H, W), to a mode and size; the result is never a view.

    Raises:
        ValueError: `mode` is given and the image has neither 1 nor 3 channels.
    """
    if mode is not None and len(image) not in (1, 3):
        raise ValueError(f"it has {len(image)} channels; expected 1 or 3 for mode={mode!r}. Omit mode")
    if mode == "L" and len(image) == 3:
        image = (image * image.new_tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    elif mode == "RGB" and len(image) == 1:
        image = image.repeat(3, 1, 1)
    if size is not None and size != image.shape[1:]:
        image = functional.interpolate(image.unsqueeze(0), size, mode="bilinear", antialias=True).squeeze(0)
        # The weights of the interpolation sum to 1 only up to rounding.
        image = image.clamp(0, 1)
    return image


# --- Normalisation of images, channel by channel ------------------------------------------------------------


PerChannel = float | Sequence[float] | Tensor | None


@final
class Normalization(nn.Module):
    """Subtracts a mean and divides by a standard deviation, channel by channel.

    Args:
        mean: One number, or one for each channel. Default: 0.
        std: One positive number, or one for each channel. Default: 1.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is not finite, or a standard deviation is not positive.
    """

    def __init__(self, mean: PerChannel = None, std: PerChannel = None) -> None:
        super().__init__()
        self.mean = _numbers("mean", 0.0 if mean is None else mean)
        self.std = _numbers("std", 1.0 if std is None else std)
        if min(self.std) <= 0:
            raise ValueError(f"std is {std}; expected positive numbers")

    @classmethod
    def of(cls, mean: PerChannel, std: PerChannel) -> Normalization | None:
        """Return the normalisation with this mean and standard deviation; None if neither is given."""
        return None if mean is None and std is None else cls(mean, std)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (*B, C, H, W) in [0, 1] to images of the same shape.

        Raises:
            ValueError: There is another number of means or standard deviations than of channels.
        """
        channels = images.shape[-3]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                plural = "s" if channels > 1 else ""
                raise ValueError(
                    f"{name} has {len(values)} values, but the images have {channels} channel{plural}; expected one "
                    "value, or one for each channel. Convert the images with mode, or give other values"
                )
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def _numbers(name: str, values: float | Sequence[float] | Tensor) -> tuple[float, ...]:
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {values!r}; expected one number, or one for each channel") from None
    # One number for each channel is often given as (C, 1, 1), to be broadcast.
    per_channel = tuple(map(float, numbers.flatten()))
    if not per_channel or numbers.numel() != max(numbers.shape, default=1) or not all(map(math.isfinite, per_channel)):
        raise ValueError(f"{name} is {values}; expected one finite number, or one for each channel")
    return per_channel
