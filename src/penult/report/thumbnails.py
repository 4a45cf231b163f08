"""Small pictures of inputs, inside the page, each with what is said of it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from penult.report.page import Section

__all__ = ["Thumbnail", "gallery", "png"]

_SIDE = 96  # pixels of the longer side, at most; half of it at least
_SHOWN = 72  # CSS pixels


class Thumbnail(NamedTuple):
    """A picture and what is said of it.

    Attributes:
        image: (C, H, W) or (H, W), C = 1 or 3; floats in [0, 1] or bytes. Other floats are stretched to that.
        lines: what stands below it, one line each; the first is strong.
        alt: the same in a sentence, for those who don't see it.
    """

    image: Any
    lines: Sequence[str]
    alt: str


def gallery(section: Section, pictures: Sequence[Thumbnail]) -> Section:
    """Add pictures in rows, as many in each as there is room for. All text is escaped.

    Raises:
        ValueError: an image has another shape.

    Example:
        >>> from penult.report import Page
        >>> page = Page("Inputs")
        >>> picture = Thumbnail(torch.rand(1, 8, 8), ["cat", "p 0.04"], "An image taken for a cat, p-value 0.04")
        >>> section = gallery(page.section("Strange"), [picture])
        >>> 'alt="An image taken for a cat, p-value 0.04"' in page.html()
        True
    """
    items = []
    for picture in pictures:
        data, width, height = png(picture.image)
        scale = _SHOWN / max(width, height)
        items.append(
            {
                "data": base64.b64encode(data).decode(),
                "alt": picture.alt,
                "width": max(1, round(width * scale)),
                "height": max(1, round(height * scale)),
                "pixelated": max(_size(picture.image)) < _SIDE // 2,
                "lines": picture.lines,
            }
        )
    return section.pictures(items)


def png(image: Any) -> tuple[bytes, int, int]:
    """An image as PNG, and its width and height: small ones with each pixel a square, large ones made smaller.

    Args:
        image: as of a `Thumbnail`.

    Raises:
        ValueError: it is neither grey nor in colour.

    Example:
        >>> data, width, height = png(torch.zeros(1, 8, 16))
        >>> data[1:4], width, height
        (b'PNG', 96, 48)
    """
    from PIL import Image  # which matplotlib brings

    pixels = image.detach().cpu().numpy() if hasattr(image, "detach") else np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)
    elif pixels.ndim != 2:
        raise ValueError(f"a thumbnail is of an image (H, W), (1, H, W) or (3, H, W), not of shape {pixels.shape}")
    if pixels.dtype != np.uint8:
        values = np.nan_to_num(pixels.astype(float))
        low, high = values.min(), values.max()
        if low < -1e-3 or high > 1 + 1e-3:  # such as what was normalised for a network
            values = (values - low) / (high - low or 1)
        pixels = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
    longest = max(pixels.shape[:2])
    if longest <= _SIDE // 2:
        times = _SIDE // longest
        pixels = pixels.repeat(times, 0).repeat(times, 1)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_SIDE, _SIDE))
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), picture.width, picture.height


def _size(image: Any) -> tuple[int, int]:
    return tuple(image.shape[-2:])
