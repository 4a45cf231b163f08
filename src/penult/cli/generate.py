"""``penult generate``."""

from __future__ import annotations

import json
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from penult.cli import sources
from penult.cli.console import RichReporter

__all__ = ["generate"]

_DRAWING = "classes", "count"
_BOTH = "context", "source", "out", "confident", "seed", "device", "as_json"


class Kind(str, Enum):
    """What makes images of activations."""

    vae = "vae"


class Condition(str, Enum):
    """What a generator is trained on."""

    activation = "activation"
    label = "label"


def generate(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="To train: a *.penult.safetensors of penult fit, or another file that holds a head. To draw: the "
            "folder that a training wrote, or its generator.safetensors.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="To train: a folder. To draw: a grid, .png, or arrays, .npz.")
    ],
    confident: Annotated[
        float | None, typer.Option(help="Keep activations with p(y|h) above it: clearer images, of less variety.")
    ] = None,
    classes: Annotated[
        list[int] | None, typer.Option("--class", help="Draw images of this class (repeatable); else of all.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", help="Images to draw of each class; else 8, or 64 of one alone.", min=1),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The classifier's network, package.module:factory.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A .safetensors state dict for the classifier that the factory makes.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="To train on: a parquet file, glob or folder; an image folder; .npz; digits. Labels are "
            "needed with --condition label only."
        ),
    ] = None,
    val: Annotated[str | None, typer.Option(help="Images to judge by; else a tenth of the others is held out.")] = None,
    kind: Annotated[Kind, typer.Option(help="A variational autoencoder.")] = Kind.vae,
    condition: Annotated[
        Condition, typer.Option(help="Train on what the classifier makes of each image, or on draws for its label.")
    ] = Condition.activation,
    epochs: Annotated[int, typer.Option(help="How often all images are seen.", min=1)] = 30,
    batch_size: Annotated[int, typer.Option(help="Images at a time, on each device.", min=2)] = 100,
    rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    latent: Annotated[int, typer.Option(help="Numbers of a code z.", min=1)] = 16,
    width: Annotated[
        int | None, typer.Option(help="Units of a layer (400), or channels of the first convolution (64).", min=1)
    ] = None,
    beta: Annotated[float, typer.Option(help="Weight of the divergence of codes.")] = 1.0,
    consistency: Annotated[
        float, typer.Option(help="Weight of what the classifier makes of generated images, in nats an image.")
    ] = 0.0,
    size: sources.Size = None,
    mode: sources.Mode = None,
    mean: Annotated[
        str | None, typer.Option(help="Subtracted from images in 0..1 for classifier and judge, e.g. 0.485,0.456,0.406")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="For these, images are divided by it, e.g. 0.229,0.224,0.225.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="An independent classifier to judge by, package.module:factory; else the classifier itself."),
    ] = None,
    judge_weights: Annotated[Path | None, typer.Option(help="A .safetensors state dict for the judge.")] = None,
    path: sources.HeadPath = None,
    fold: sources.Fold = True,
    weight_key: sources.WeightKey = None,
    bias_key: sources.BiasKey = None,
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option(help="Start anew where the folder holds another generator.")] = False,
    seed: sources.Seed = 0,
    device: sources.Device = "cpu",
    devices: Annotated[int, typer.Option(help="How many devices of a machine.", min=1)] = 1,
    num_nodes: Annotated[int, typer.Option(help="How many machines.", min=1)] = 1,
    strategy: Annotated[str, typer.Option(help="Lightning's strategy for several devices, such as ddp.")] = "auto",
    precision: Annotated[str, typer.Option(help="Lightning's precision, such as bf16-mixed.")] = "32-true",
    as_json: sources.AsJson = False,
) -> None:
    """Train a generator of images on a classifier's activations, or draw images of classes from one.

    With a pair, a generator is trained on images, without their labels; what it makes of draws of p(h|y) are images of
    class y. The law that the pair holds decides how good they are: fit one to activations of such images.

    OUT gets generator.safetensors, the page index.html, log.json, samples as the training goes, and checkpoints.
    Training goes by Lightning (extra train): the same command continues after a kill, and gives the same generator.

    With a folder that a training wrote, images are drawn; no classifier is needed.

    Example: penult extract mynets:net photos/ --out acts/, then penult fit acts/ --out net.penult.safetensors

    Example: penult generate net.penult.safetensors --model mynets:net --images photos/ --out run/

    Example: penult generate run/ --class 7 -n 64 -o grid.png
    """
    values = locals()
    from penult.cli import generation, generation_told  # which load torch and Lightning

    reporter = RichReporter(stderr=as_json)
    given = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    }
    file = generation_told.generator_in(source)
    if file is not None:
        _refuse([flag for name, flag in given.items() if name not in (*_DRAWING, *_BOTH)], "training", source, "drawn")
        facts = generation_told.draw(file, out, classes, count, confident, seed, device, reporter)
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
        return
    _refuse([flag for name, flag in given.items() if name in _DRAWING], "drawing", source, "trained")
    for flag, value in (("--model", model), ("--images", images)):
        if value is None:
            raise ValueError(
                f"to train on {source}, {flag} is needed: the classifier, package.module:factory, goes to --model and "
                "the images to --images. To draw, give the folder that a training wrote"
            )
    if judge_weights is not None and judge is None:
        raise ValueError("--judge-weights goes with --judge, package.module:factory")
    asked = {field.name: values[field.name] for field in fields(generation.Order)}
    asked |= {"kind": kind.value, "condition": condition.value}
    generation.train(generation.Order(**asked), as_json, reporter)


def _refuse(flags: list[str], work: str, source: str, done: str) -> None:
    """Raise if options of the other use of the command are given."""
    if flags:
        one, what = len(flags) == 1, "from" if done == "drawn" else "on"
        raise ValueError(
            f"{', '.join(flags)} {'goes' if one else 'go'} with {work}, but {source} is {done} {what}: leave "
            f"{'it' if one else 'them'} out"
        )
