"""``penult generate``."""

from __future__ import annotations

import json
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

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
    Mode,
    NumNodes,
    Precision,
    Seed,
    Size,
    Strategy,
    WeightKey,
    Workers,
    plain,
)
from penult.cli.draw import draw_images, generator_in

__all__ = ["KINDS", "generate"]

# Of each kind: the options that it alone has, and those whose default is its own; None is what fits the others.
KINDS: dict[str, dict[str, Any]] = {
    "vae": {"batch_size": 100, "rate": 1e-3, "latent": 16, "width": None, "consistency": 0.0, "beta": 1.0},
    "gan": {"batch_size": 64, "rate": 2e-3, "latent": 32, "width": None, "consistency": 1.0,
            "loss": None, "drawn": 0.0},
}  # fmt: skip

_DRAWING = "classes", "count"
_BOTH = "context", "source", "out", "confident", "seed", "device", "as_json"


class Kind(str, Enum):
    """What makes images of activations."""

    vae = "vae"
    gan = "gan"


class Condition(str, Enum):
    """What a generator is trained on."""

    activation = "activation"
    label = "label"


class Adversarial(str, Enum):
    """What generator and discriminator minimise."""

    non_saturating = "non-saturating"
    hinge = "hinge"


def _of(name: str) -> str:
    """The default of each kind that has an option, for its help."""
    held = {kind: options[name] for kind, options in KINDS.items() if name in options}
    shown = [(kind, f"{value:g}") for kind, value in held.items()]
    if len(shown) < len(KINDS):
        return ", ".join(f"With --kind {kind} only; default {value}." for kind, value in shown)
    return "Default: " + ", ".join(f"{value} with {kind}" for kind, value in shown) + "."


def generate(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Pair written by `penult fit`, *.penult.safetensors; or a .safetensors file with a head. To draw: see "
            "`penult draw`.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder to write to; a killed run resumes there. To draw: .png or .npz."),
    ],
    confident: Annotated[
        float | None,
        typer.Option(help="Also judge and show images of activations with p(y|h) above this."),
    ] = None,
    classes: Annotated[list[int] | None, typer.Option("--class", help="Only to draw: see `penult draw`.")] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", help="Only to draw: see `penult draw`.", min=1)] = None,
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
    kind: Annotated[
        Kind, typer.Option(help="A variational autoencoder, or a generative adversarial network.")
    ] = Kind.vae,
    condition: Annotated[
        Condition, typer.Option(help="Train on what the classifier makes of each image, or on draws for its label.")
    ] = Condition.activation,
    epochs: Annotated[int, typer.Option(help="How often all images are seen.", min=1)] = 30,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Images at a time, on each device. {_of('batch_size')}", min=2)
    ] = None,
    rate: Annotated[float | None, typer.Option(help=f"Learning rate of Adam. {_of('rate')}")] = None,
    latent: Annotated[int | None, typer.Option(help=f"Numbers of a code z. {_of('latent')}", min=1)] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Units of a layer, or channels of the convolution next to the image. Default: 400 or 64 with vae; 16, "
            "or 32 in colour, with gan.",
            min=1,
        ),
    ] = None,
    consistency: Annotated[
        float | None,
        typer.Option(
            help="Weight of what the classifier makes of generated images, in nats an image with vae. "
            + _of("consistency")
        ),
    ] = None,
    beta: Annotated[float | None, typer.Option(help=f"Weight of the divergence of codes. {_of('beta')}")] = None,
    loss: Annotated[
        Adversarial | None,
        typer.Option(
            help="What generator and discriminator minimise. With --kind gan only; default hinge for activations "
            "of grey images, else non-saturating."
        ),
    ] = None,
    drawn: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the images generated in training that are made of draws of the pair's law, the others of "
            f"activations of images. {_of('drawn')}",
        ),
    ] = None,
    store_activations: Annotated[
        bool,
        typer.Option(
            "--store-activations",
            help="Write a bank of real activations as it is; else a mixture fitted to it takes its place.",
        ),
    ] = False,
    size: Size = None,
    mode: Mode = None,
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
    path: HeadPath = None,
    fold: Fold = True,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    workers: Workers = 0,
    overwrite: Annotated[bool, typer.Option(help="Start anew where the folder holds another generator.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    devices: Devices = None,
    num_nodes: NumNodes = None,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
    as_json: AsJson = False,
) -> None:
    """Train a generator of images on a classifier's activations.

    With a pair, a generator is trained on images, without their labels; what it makes of draws of p(h|y) are images of
    class y. The law that the pair holds decides how good they are: fit one to activations of such images.

    OUT gets generator.safetensors, the page index.html, log.json, samples as the training goes, and checkpoints.
    What is judged and shown is what the file holds: no activation of a real image, unless --store-activations is given.
    Training goes by Lightning (extra train): the same command continues after a kill, and gives the same generator.

    `penult draw` draws images from the trained generator. `penult generate RUN -o grid.png` does the same.

    Example: penult extract mynets:net photos/ --out acts/, then penult fit acts/ --out net.penult.safetensors

    Example: penult generate net.penult.safetensors --model mynets:net --images photos/ --out run/

    Example: penult generate net.penult.safetensors --model mynets:net --images photos/ --kind gan --out run/

    Example: penult draw run/ --class 7 -n 64 -o grid.png
    """
    values: dict[str, Any] = dict(locals())
    launch = Launch(device, devices, num_nodes, strategy)
    reporter = RichReporter(stderr=as_json, silent=launch.rank > 0)
    given = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    }
    file = generator_in(source)
    if file is not None:
        training = [flag for name, flag in given.items() if name not in (*_DRAWING, *_BOTH)]
        _refuse(training, "training", f"{source} is drawn from")
        facts = draw_images(file, out, classes, count, confident, seed, device, reporter)
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
        return
    from penult.cli import _generate_train  # which loads Lightning and the report

    _refuse([flag for name, flag in given.items() if name in _DRAWING], "drawing", f"{source} is trained on")
    own = KINDS[kind.value]
    for other, options in KINDS.items():
        foreign = [flag for name, flag in given.items() if name in options and name not in own]
        _refuse(foreign, f"--kind {other}", f"the kind is {kind.value}")
    if condition is Condition.label:
        drawing = [flag for name, flag in given.items() if name == "drawn"]
        _refuse(drawing, "--condition activation", "with label all activations are drawn")
    for flag, value in (("--model", model), ("--images", images)):
        if value is None:
            raise ValueError(
                f"to train on {source}, {flag} is needed: the classifier, package.module:factory, goes to --model and "
                "the images to --images. To draw, give the folder that a training wrote"
            )
    if judge_weights is not None and judge is None:
        raise ValueError("--judge-weights goes with --judge, package.module:factory")
    chosen = {name: default if values[name] is None else plain(values[name]) for name, default in own.items()}
    values |= {"kind": kind.value, "condition": condition.value, "batch_size": chosen.pop("batch_size"), "own": chosen}
    values["launch"] = launch
    asked = {field.name: values[field.name] for field in fields(_generate_train.Order)}
    _generate_train.train(_generate_train.Order(**asked), as_json, reporter)


def _refuse(flags: list[str], work: str, but: str) -> None:
    """Raise if options are given that go with something else."""
    if flags:
        one = len(flags) == 1
        raise ValueError(
            f"{', '.join(flags)} {'goes' if one else 'go'} with {work}, but {but}: leave {'it' if one else 'them'} out"
        )
