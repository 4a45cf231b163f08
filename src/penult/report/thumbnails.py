"""Small pictures of inputs with lines of text below them, embedded in a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from penult.report.page import Section

__all__ = ["Thumbnail", "gallery", "png"]

# The longer side of the PNG has between half of this number of pixels and this number.
_SIDE = 96
# The longer side on the page, in CSS pixels.
_SHOWN = 72


class Thumbnail(NamedTuple):
    """A picture and its text.

    Attributes:
        image: (C, H, W) or (H, W), C = 1 or 3; floats in [0, 1] or uint8. Other floats are rescaled to [0, 1].
        lines: Lines of text below the picture; the first is bold.
        alt: One sentence with the same content, for readers who cannot see the picture.
    """

    image: Any
    lines: Sequence[str]
    alt: str


def gallery(section: Section, pictures: Sequence[Thumbnail]) -> Section:
    """Add pictures to a section, in rows that wrap at the width of the page. All text is escaped.

    Raises:
        ValueError: An image has another shape.

    Example:
        >>> from penult.report import Page
        >>> page = Page("Inputs")
        >>> picture = Thumbnail(torch.rand(1, 8, 8), ["cat", "p 0.04"], "An image taken for a cat, p-value 0.04")
        >>> section = gallery(page.section("Outliers"), [picture])
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
    """Return an image as PNG, with its width and height; small images are magnified, large ones scaled down.

    Args:
        image: An image, as in `Thumbnail`.

    Raises:
        ValueError: The image is neither grey nor in colour.

    Example:
        >>> data, width, height = png(torch.zeros(1, 8, 16))
        >>> data[1:4], width, height
        (b'PNG', 96, 48)
    """
    from PIL import Image  # matplotlib requires pillow

    pixels = image.detach().cpu().numpy() if hasattr(image, "detach") else np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)
    elif pixels.ndim != 2:
        raise ValueError(f"the image of a thumbnail has shape {pixels.shape}; expected (H, W), (1, H, W) or (3, H, W)")
    if pixels.dtype != np.uint8:
        values = np.nan_to_num(pixels.astype(float))
        low, high = values.min(), values.max()
        if low < -1e-3 or high > 1 + 1e-3:
            # Most likely the image was normalized for a network.
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
