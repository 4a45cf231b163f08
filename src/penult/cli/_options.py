"""Annotated option types that several commands share; this file loads nothing but typer."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "AsJson",
    "BatchSize",
    "BiasKey",
    "Classes",
    "Confident",
    "Count",
    "Device",
    "Devices",
    "Fold",
    "HeadPath",
    "ImageColumn",
    "LabelColumn",
    "Mean",
    "Mode",
    "Model",
    "Network",
    "NetworkWeights",
    "NumNodes",
    "Pair",
    "Precision",
    "Seed",
    "Size",
    "Std",
    "Strategy",
    "WeightKey",
    "Weights",
    "Workers",
    "plain",
]

# --- networks, heads and pairs ------------------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Factory of the network, package.module:factory, called without arguments; or a .safetensors file that "
        "holds a head.",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="State dict for the network, .safetensors.")]
Network = Annotated[
    str | None, typer.Option("--model", help="Factory of the network that reads images, package.module:factory.")
]
NetworkWeights = Annotated[Path | None, typer.Option("--weights", help="State dict for the network, .safetensors.")]
HeadPath = Annotated[
    str | None, typer.Option("--path", help="Name of the head's module. Default: found by a forward pass.")
]
Fold = Annotated[bool, typer.Option(help="Fold a norm layer before the head into the head.")]
Pair = Annotated[
    str,
    typer.Argument(
        metavar="PAIR", help="Pair written by `penult fit`, *.penult.safetensors; or a .safetensors file with a head."
    ),
]
WeightKey = Annotated[str | None, typer.Option(help="Name of W in a .safetensors file.")]
BiasKey = Annotated[str | None, typer.Option(help="Name of b in a .safetensors file.")]

# --- images -------------------------------------------------------------------------------------------------

Size = Annotated[str | None, typer.Option(help="Size that images are scaled to, for example 224 or 32x48.")]
Mode = Annotated[str | None, typer.Option(help="Colour mode that images are converted to: L (grey) or RGB.")]
Mean = Annotated[str | None, typer.Option(help="Per-channel mean of images in 0..1, for example 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Per-channel standard deviation, for example 0.229,0.224,0.225.")]
ImageColumn = Annotated[
    str | None, typer.Option(help="Column of the images in parquet files, or their array in an .npz file.")
]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column of the labels in parquet files, or their array in an .npz file.")
]
BatchSize = Annotated[int, typer.Option(help="Images per batch.", min=1)]
Workers = Annotated[int, typer.Option(help="Number of processes that decode images.", min=0)]

# --- images to draw -----------------------------------------------------------------------------------------

Classes = Annotated[
    list[int] | None, typer.Option("--class", help="Class to draw images of; repeatable. Default: all classes.")
]
Count = Annotated[
    int | None,
    typer.Option("--count", "-n", help="Images per class. Default: 8, or 64 for a single class.", min=1),
]
Confident = Annotated[
    float | None,
    typer.Option(help="Keep only activations with p(y|h) above this: clearer images with less variety."),
]

# --- where and how to compute, and what to print ------------------------------------------------------------

Seed = Annotated[int, typer.Option(help="Seed for all random numbers.", min=0)]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1, mps.")]
Devices = Annotated[
    int | None, typer.Option(help="Number of devices per machine. Default: 1, or as started by torchrun.", min=1)
]
NumNodes = Annotated[int | None, typer.Option(help="Number of machines. Default: 1, or as started by torchrun.", min=1)]
Strategy = Annotated[str, typer.Option(help="Lightning strategy for several devices, for example ddp.")]
Precision = Annotated[str, typer.Option(help="Lightning precision, for example bf16-mixed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON; progress goes to stderr.")]


def plain(value: Any) -> Any:
    """Convert the value of an option to a value that JSON can hold."""
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value
