"""What ``penult generate`` shows: images that are drawn, grids of them, a summary on the terminal, and a page."""

from __future__ import annotations

import io as memory
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penult import io
from penult._extras import extra
from penult.cli._console import RichReporter
from penult.cli._models import device_of
from penult.cli._training import SETTINGS_FILE
from penult.generate import load
from penult.report.generate import COLUMNS

if TYPE_CHECKING:
    pass

__all__ = ["GENERATOR_FILE", "PILLOW", "draw", "generator_in", "grid"]

GENERATOR_FILE = "generator.safetensors"
PILLOW = "grids are written by Pillow"
_CELL = 56  # pixels of a grid
_GAP = 2
_MOST_PIXELS = 10**8


def grid(images: Tensor, columns: int) -> bytes:
    """A PNG of images (N, C, H, W) in [0, 1] in rows, enlarged where they are small, with white between them.

    Raises:
        ImportError: Pillow is missing.
        ValueError: Images are neither grey nor in colour, or too many for a picture.
    """
    count, channels, height, width = images.shape
    scale = max(1, -(-_CELL // max(height, width)))
    tall, wide, rows = height * scale, width * scale, -(-count // columns)
    size = (rows * (tall + _GAP) + _GAP, columns * (wide + _GAP) + _GAP)
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels make no picture: write them to an .npz")
    if size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(f"a grid of {count} images has {size[1]}×{size[0]} pixels: ask for fewer, or write an .npz")
    sheet = torch.full((*size, channels), 255, dtype=torch.uint8)
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    for position, image in enumerate(pixels):
        row, column = divmod(position, columns)
        top, left = _GAP + row * (tall + _GAP), _GAP + column * (wide + _GAP)
        sheet[top : top + tall, left : left + wide] = image
    mode, data = "L" if channels == 1 else "RGB", sheet.numpy().tobytes()
    buffer = memory.BytesIO()
    extra("PIL.Image", PILLOW).frombytes(mode, size[::-1], data).save(buffer, "PNG")
    return buffer.getvalue()


def generator_in(source: str) -> Path | None:
    """The file of a generator that a folder or file holds; None for a file of something else.

    Raises:
        ValueError: There is no such file or folder, or the folder holds no generator.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / GENERATOR_FILE).exists():
            what = "a training that was stopped" if (path / SETTINGS_FILE).exists() else "no generator"
            raise ValueError(
                f"{source} holds {what}: there is no {GENERATOR_FILE} to draw from. To train, or to go on, give the "
                "pair (penult fit writes it), --model, --images and --out"
            )
        return path / GENERATOR_FILE
    if not path.exists():
        raise ValueError(
            f"SOURCE {source} does not exist; it is a pair that penult fit wrote, which is trained on, or what a "
            "training wrote, to draw from. The classifier goes to --model"
        )
    try:
        return path if io.read(path).kind == "generator" else None
    except io.FileFormatError:
        return None  # the training says what it is


def draw(
    file: Path,
    out: Path,
    classes: Sequence[int] | None,
    count: int | None,
    confident: float | None,
    seed: int,
    device: str,
    reporter: RichReporter,
) -> dict[str, Any]:
    """Draw images of classes from a generator's file, to a grid or to arrays."""
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: images are drawn to a grid, name.png, or to arrays, name.npz")
    extra("PIL.Image", PILLOW) if out.suffix == ".png" else extra("numpy", "it writes arrays")
    where = device_of(device)
    generator = load(file, device=where)
    asked = list(classes or range(generator.pair.head.num_classes))
    each = count or (COLUMNS if len(asked) > 1 else COLUMNS**2)
    y = torch.tensor(asked, device=where).repeat_interleave(each)
    columns = each if len(asked) > 1 else math.ceil(each**0.5)
    images = generator.generate(y, confident, generator=torch.Generator(where).manual_seed(seed)).float().cpu()
    if out.suffix == ".png":
        data = grid(images, columns)
    else:
        buffer = memory.BytesIO()
        numpy = extra("numpy", "it writes arrays")
        numpy.savez_compressed(buffer, images=images.numpy(), labels=y.cpu().numpy())
        data = buffer.getvalue()
    io.write_bytes(out, data)
    of = f"{each} of each of {len(asked)} classes" if len(asked) > 1 else f"all of class {asked[0]}"
    reporter.line(f"{out}: {len(images)} images, {of}")
    return {
        "out": str(out),
        "source": str(file),
        "images": len(images),
        "classes": asked,
        "of_each": each,
        "shape": list(images.shape[1:]),
        "confident": confident,
        "stored_activations": generator.stored_activations,
        "seed": seed,
    }
