"""``penult draw``, and grids of images."""

from __future__ import annotations

import io as memory
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penult.cli._console import RichReporter, print_json
from penult.cli._models import device_of
from penult.cli._options import AsJson, Classes, Confident, Count, Device, Seed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GENERATOR_FILE", "PILLOW", "draw", "draw_images", "generator_in", "grid"]

GENERATOR_FILE = "generator.safetensors"
PILLOW = "Pillow writes grids of images"
_COLUMNS = 8  # Images in a row, where there are rows for several classes.
_CELL = 56  # Smallest size of an image, in pixels.
_GAP = 2  # White pixels between images.
_MOST_PIXELS = 10**8


def draw(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Folder that `penult generate` wrote, or its generator.safetensors."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Grid of images, .png; or arrays, .npz.")],
    classes: Classes = None,
    count: Count = None,
    confident: Confident = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw images of classes from a trained generator.

    The classifier is not needed. An .npz gets `images` (N, C, H, W) in 0..1 and `labels` (N,).

    Example: penult draw run/ --class 7 -n 64 -o grid.png

    Example: penult draw run/generator.safetensors --class 3 --class 5 --confident 0.9 -o images.npz
    """
    file = generator_in(source)
    if file is None:
        raise ValueError(
            f"{source} holds no generator; give the folder that penult generate wrote, or its {GENERATOR_FILE}"
        )
    results = draw_images(file, out, classes, count, confident, seed, device, RichReporter(stderr=as_json))
    if as_json:
        print_json(results)


def generator_in(source: str) -> Path | None:
    """Return the generator's file of a folder, or the file itself; None for a file of another kind.

    Raises:
        ValueError: There is no such file or folder, or the folder holds no generator.
    """
    from penult import io
    from penult.cli._training import SETTINGS_FILE

    path = Path(source)
    if path.is_dir():
        if not (path / GENERATOR_FILE).exists():
            state = "a training that was stopped" if (path / SETTINGS_FILE).exists() else "no generator"
            raise ValueError(
                f"{source} holds {state}: there is no {GENERATOR_FILE} to draw from. To train or resume, call penult "
                "generate with the pair (penult fit writes it), --model, --images and --out"
            )
        return path / GENERATOR_FILE
    if not path.exists():
        raise ValueError(
            f"{source} does not exist; give a pair that penult fit wrote to train on, or a folder that penult generate "
            "wrote to draw from. The classifier goes to --model"
        )
    try:
        return path if io.read(path).kind == "generator" else None
    except io.FileFormatError:
        # The training says what is wrong with a file that is no generator.
        return None


def draw_images(
    file: Path,
    out: Path,
    classes: Sequence[int] | None,
    count: int | None,
    confident: float | None,
    seed: int,
    device: str,
    reporter: RichReporter,
) -> dict[str, Any]:
    """Draw images from a generator's file, write them to a grid or to arrays, and return the results for --json."""
    import torch

    from penult import io
    from penult._extras import extra
    from penult.generate import load

    if out.suffix.lower() not in (".png", ".npz"):
        raise ValueError(f"--out {out}: images are written to a grid, name.png, or to arrays, name.npz")
    extra("PIL.Image", PILLOW) if out.suffix.lower() == ".png" else extra("numpy", "NumPy writes arrays")
    torch_device = device_of(device)
    generator = load(file, device=torch_device)
    labels = list(classes or range(generator.pair.head.num_classes))
    count_per_class = count or (_COLUMNS if len(labels) > 1 else _COLUMNS**2)
    columns = count_per_class if len(labels) > 1 else math.ceil(count_per_class**0.5)
    y = torch.tensor(labels, device=torch_device).repeat_interleave(count_per_class)
    random = torch.Generator(torch_device).manual_seed(seed)
    images = generator.generate(y, confident, generator=random).float().cpu()
    if out.suffix.lower() == ".png":
        data = grid(images, columns)
    else:
        buffer = memory.BytesIO()
        extra("numpy", "NumPy writes arrays").savez_compressed(buffer, images=images.numpy(), labels=y.cpu().numpy())
        data = buffer.getvalue()
    io.write_bytes(out, data)
    shares = f"{count_per_class} for each of {len(labels)} classes" if len(labels) > 1 else f"all of class {labels[0]}"
    reporter.line(f"{out}: {len(images)} images, {shares}")
    return {
        "out": str(out),
        "source": str(file),
        "images": len(images),
        "classes": labels,
        "of_each": count_per_class,
        "shape": list(images.shape[1:]),
        "confident": confident,
        "stored_activations": generator.stored_activations,
        "seed": seed,
    }


def grid(images: Tensor, columns: int) -> bytes:
    """Return a PNG of images (N, C, H, W) in [0, 1] in rows; small images are enlarged, with white between them.

    Raises:
        ImportError: Pillow is missing.
        ValueError: Images are neither grey nor in colour, or the grid would be too large.
    """
    import torch

    from penult._extras import extra

    count, channels, height, width = images.shape
    scale = max(1, -(-_CELL // max(height, width)))
    cell_height, cell_width, rows = height * scale, width * scale, -(-count // columns)
    size = (rows * (cell_height + _GAP) + _GAP, columns * (cell_width + _GAP) + _GAP)
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; expected 1 or 3 for a grid. Write them to an .npz")
    if size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(
            f"a grid of {count} images has {size[1]}×{size[0]} pixels, too many: draw fewer, or write an .npz"
        )
    sheet = torch.full((*size, channels), 255, dtype=torch.uint8, device="cpu")
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    for position, image in enumerate(pixels):
        row, column = divmod(position, columns)
        top, left = _GAP + row * (cell_height + _GAP), _GAP + column * (cell_width + _GAP)
        sheet[top : top + cell_height, left : left + cell_width] = image
    mode, data = "L" if channels == 1 else "RGB", sheet.numpy().tobytes()
    buffer = memory.BytesIO()
    extra("PIL.Image", PILLOW).frombytes(mode, size[::-1], data).save(buffer, "PNG")
    return buffer.getvalue()
