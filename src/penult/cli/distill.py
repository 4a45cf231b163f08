"""``penult distill``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from penult.cli._console import RichReporter
from penult.cli._launch import Launch
from penult.cli._options import (
    AsJson,
    BiasKey,
    Device,
    Devices,
    Fold,
    HeadPath,
    ImageColumn,
    LabelColumn,
    Mean,
    Mode,
    NumNodes,
    Precision,
    Seed,
    Size,
    Std,
    Strategy,
    WeightKey,
    Weights,
    Workers,
)

__all__ = ["distill"]


class Kind(str, Enum):
    """Losses of the student."""

    soft = "soft"
    activation = "activation"
    hinted = "hinted"


def distill(
    context: typer.Context,
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER",
            help="Pair, *.penult.safetensors, or another .safetensors file with a head: the teacher's network is not "
            "needed. Or the network, package.module:factory, which is run on the images once.",
        ),
    ],
    student: Annotated[str, typer.Option(help="Factory of the student's network, package.module:factory.")],
    data: Annotated[str, typer.Option(help="Images: a parquet file, glob or folder; an image folder; .npz; digits.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; a killed run resumes there.")],
    val: Annotated[
        str | None, typer.Option(help="Labelled images for evaluation. Default: a tenth of --data, held out.")
    ] = None,
    pair: Annotated[
        Path | None, typer.Option(help="Pair of the teacher's network, with a base fitted to the teacher's domain.")
    ] = None,
    kind: Annotated[Kind, typer.Option(help="Loss: soft targets, activations, or activations with hints.")] = Kind.soft,
    temperature: Annotated[float, typer.Option(help="Temperature of soft targets.")] = 4.0,
    weight: Annotated[float, typer.Option(help="Weight of soft targets, 0 to 1; labels get the rest.")] = 0.9,
    strength: Annotated[float, typer.Option(help="Weight of activations, relative to labels.")] = 5.0,
    hint: Annotated[float, typer.Option(help="Weight of hints, relative to labels.", min=1e-6)] = 5.0,
    epochs: Annotated[int, typer.Option(help="Number of epochs.", min=1)] = 20,
    batch_size: Annotated[int, typer.Option(help="Images per batch, on each device.", min=2)] = 64,
    rate: Annotated[float, typer.Option(help="Learning rate of AdamW; the schedule rises to twice this rate.")] = 3e-3,
    workers: Workers = 0,
    size: Size = None,
    mode: Mode = None,
    mean: Mean = None,
    std: Std = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    weights: Weights = None,
    path: HeadPath = None,
    fold: Fold = True,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another distillation in the folder.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    devices: Devices = None,
    num_nodes: NumNodes = None,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
    as_json: AsJson = False,
) -> None:
    """Distil a teacher into a student, which learns the teacher's predictions as far as they can be trusted.

    With a file, the head of the teacher is all that is needed: the student learns its outputs on typical activations.

    With a network, each image's target is mixed with the network's output on it. The weight of that output depends on
    the network's accuracy on the labels, on whether it is right on the image, and on how typical the activation is of
    its class.

    OUT gets student.safetensors, the page index.html, log.json and checkpoints. Lightning trains (extra train): after a
    kill, the same command resumes and gives the same student.

    Example: penult distill resnet.penult.safetensors --student mynets:small --data "target-*.parquet" --out run/

    Example: penult distill mynets:resnet --weights resnet.safetensors --student mynets:small --data photos/ --out run/
    """
    from penult.cli._distill_train import train

    launch = Launch(device, devices, num_nodes, strategy)
    train(context.params, launch, RichReporter(stderr=as_json, silent=launch.rank > 0))
