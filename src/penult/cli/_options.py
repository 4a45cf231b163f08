"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass

__all__ = [
    "AsJson",
    "BiasKey",
    "Device",
    "Fold",
    "HeadPath",
    "Mean",
    "Mode",
    "Model",
    "Seed",
    "Size",
    "Std",
    "WeightKey",
    "Weights",
]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:factory, which is imported and called; or a .safetensors file that holds a head.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.", min=0)]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON; progress goes to stderr.")]
Weights = Annotated[Path | None, typer.Option(help="A .safetensors state dict for the model that the factory makes.")]
HeadPath = Annotated[str | None, typer.Option("--path", help="Name of the head's module, if known.")]
Fold = Annotated[bool, typer.Option(help="Fold a norm layer before the head into it.")]
WeightKey = Annotated[str | None, typer.Option(help="Name of W in a .safetensors file.")]
BiasKey = Annotated[str | None, typer.Option(help="Name of b in a .safetensors file.")]
Size = Annotated[str | None, typer.Option(help="Resize images to this, e.g. 224 or 32x48.")]
Mode = Annotated[str | None, typer.Option(help="Convert images to L (grey) or RGB.")]
Mean = Annotated[str | None, typer.Option(help="Subtracted from images in 0..1, e.g. 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Images are divided by it, e.g. 0.229,0.224,0.225.")]
