"""``penult generate``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from penult.cli._console import RichReporter, print_json
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

# For each kind, the options of its class and their defaults; None where the default depends on the images.
KINDS: dict[str, dict[str, Any]] = {
    "vae": {"batch_size": 100, "rate": 1e-3, "latent": 16, "width": None, "consistency": 0.0, "beta": 1.0},
    "gan": {"batch_size": 64, "rate": 2e-3, "latent": 32, "width": None, "consistency": 1.0,
            "loss": None, "drawn": 0.0},
}  # fmt: skip

# Parameters of drawing alone, and of both drawing and training.
_DRAWING = "classes", "count"
_COMMON = "context", "source", "out", "confident", "seed", "device", "as_json"


class Kind(str, Enum):
    """Kinds of generators."""

    vae = "vae"
    gan = "gan"


class Condition(str, Enum):
    """Condition of a generator in training: the activation of each image, or a sample of p(h|y) for its label."""

    activation = "activation"
    label = "label"


class Adversarial(str, Enum):
    """Losses of generator and discriminator."""

    non_saturating = "non-saturating"
    hinge = "hinge"


def _default(name: str) -> str:
    """Return the default of an option for each kind that has it, for the help."""
    defaults = {kind: f"{options[name]:g}" for kind, options in KINDS.items() if name in options}
    if len(defaults) < len(KINDS):
        return ", ".join(f"With --kind {kind} only. Default: {default}." for kind, default in defaults.items())
    return "Default: " + ", ".join(f"{default} with {kind}" for kind, default in defaults.items()) + "."


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
        typer.Option(help="Also evaluate and show images generated from activations with p(y|h) above this."),
    ] = None,
    classes: Annotated[list[int] | None, typer.Option("--class", help="Only to draw: see `penult draw`.")] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", help="Only to draw: see `penult draw`.", min=1)] = None,
    model: Annotated[
        str | None, typer.Option(help="Factory of the classifier's network, package.module:factory.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="State dict for the classifier, .safetensors.")] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Images to train on: a parquet file, glob or folder; an image folder; .npz; digits. Labels are needed "
            "with --condition label only."
        ),
    ] = None,
    val: Annotated[
        str | None, typer.Option(help="Images for evaluation. Default: a tenth of --images, held out.")
    ] = None,
    kind: Annotated[Kind, typer.Option(help="Variational autoencoder, or generative adversarial network.")] = Kind.vae,
    condition: Annotated[
        Condition,
        typer.Option(help="Train on the activation of each image, or on activations sampled from p(h|y) of its label."),
    ] = Condition.activation,
    epochs: Annotated[int, typer.Option(help="Number of epochs.", min=1)] = 30,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Images per batch, on each device. {_default('batch_size')}", min=2)
    ] = None,
    rate: Annotated[float | None, typer.Option(help=f"Learning rate of Adam. {_default('rate')}")] = None,
    latent: Annotated[int | None, typer.Option(help=f"Dimension of the code z. {_default('latent')}", min=1)] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Units per layer, or channels of the convolution next to the image. Default: 400 or 64 with vae; 16, "
            "or 32 in colour, with gan.",
            min=1,
        ),
    ] = None,
    consistency: Annotated[
        float | None,
        typer.Option(
            help="Weight of the loss between activations that are given and those of the generated images, in nats per "
            "image with vae. " + _default("consistency")
        ),
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help=f"Weight of the divergence of codes from N(0, I). {_default('beta')}")
    ] = None,
    loss: Annotated[
        Adversarial | None,
        typer.Option(
            help="Loss of generator and discriminator. With --kind gan only. Default: hinge for activations of grey "
            "images, else non-saturating."
        ),
    ] = None,
    drawn: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Fraction of generator inputs drawn from p(h|y) instead of taken from real images. "
            + _default("drawn"),
        ),
    ] = None,
    store_activations: Annotated[
        bool,
        typer.Option(
            "--store-activations",
            help="Store the real activations of a bank. Default: store a mixture that is fitted to them.",
        ),
    ] = False,
    size: Size = None,
    mode: Mode = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Per-channel mean, for classifier and judge only, for example 0.485,0.456,0.406."),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            help="Per-channel standard deviation, for classifier and judge only, for example 0.229,0.224,0.225."
        ),
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Factory of an independent classifier for evaluation, package.module:factory. Default: the classifier."
        ),
    ] = None,
    judge_weights: Annotated[Path | None, typer.Option(help="State dict for the judge, .safetensors.")] = None,
    path: HeadPath = None,
    fold: Fold = True,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    workers: Workers = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace another generator in the folder.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    devices: Devices = None,
    num_nodes: NumNodes = None,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
    as_json: AsJson = False,
) -> None:
    """Train a generator of images on a classifier's activations.

    The generator is trained on images, without their labels, to map an activation h and a random code z to an image.
    From samples of p(h|y) it then makes images of class y. Their quality depends on the base of the pair: fit it to
    activations of such images.

    OUT gets generator.safetensors, the page index.html, log.json, samples drawn during the training, and checkpoints.
    The file holds no activation of a real image, unless --store-activations is given. Lightning trains (extra train):
    after a kill, the same command resumes and gives the same generator.

    `penult draw` draws images from the trained generator. `penult generate RUN -o grid.png` does the same.

    Example: penult extract mynets:net photos/ --out acts/, then penult fit acts/ --out net.penult.safetensors

    Example: penult generate net.penult.safetensors --model mynets:net --images photos/ --out run/

    Example: penult generate net.penult.safetensors --model mynets:net --images photos/ --kind gan --out run/

    Example: penult draw run/ --class 7 -n 64 -o grid.png
    """
    launch = Launch(device, devices, num_nodes, strategy)
    reporter = RichReporter(stderr=as_json, silent=launch.rank > 0)
    given = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    }
    file = generator_in(source)
    if file is not None:
        training = [option for name, option in given.items() if name not in (*_DRAWING, *_COMMON)]
        _refuse(training, "training", f"{source} is a trained generator")
        results = draw_images(file, out, classes, count, confident, seed, device, reporter)
        if as_json:
            print_json(results)
        return
    _check_training(context.params, given)
    own = KINDS[kind.value]
    chosen = {name: plain(context.params[name]) for name in own}
    chosen = {name: own[name] if value is None else value for name, value in chosen.items()}
    options = {**context.params, "batch_size": chosen.pop("batch_size")}
    # This loads Lightning and the report, which drawing does not need.
    from penult.cli._generate_train import train

    train(options, chosen, launch, reporter)


def _check_training(options: Mapping[str, Any], given: Mapping[str, str]) -> None:
    """Raise for options that do not apply to training, and for options that are missing.

    Args:
        options: All options of the command.
        given: Options on the command line, by parameter name.
    """
    source, kind = options["source"], options["kind"].value
    _refuse([option for name, option in given.items() if name in _DRAWING], "drawing", f"{source} is trained on")
    for other_kind, names in KINDS.items():
        foreign = [option for name, option in given.items() if name in names and name not in KINDS[kind]]
        _refuse(foreign, f"--kind {other_kind}", f"the kind is {kind}")
    if options["condition"] is Condition.label:
        drawn = [option for name, option in given.items() if name == "drawn"]
        _refuse(drawn, "--condition activation", "with label all activations are drawn")
    for option, value in (("--model", options["model"]), ("--images", options["images"])):
        if value is None:
            raise ValueError(
                f"{option} is needed to train on {source}: --model gives the classifier, package.module:factory, and "
                "--images the images. To draw images, give the folder of a trained generator to penult draw"
            )
    if options["judge_weights"] is not None and options["judge"] is None:
        raise ValueError("--judge-weights goes with --judge, package.module:factory")


def _refuse(options: list[str], purpose: str, contrast: str) -> None:
    """Raise if options are given that apply to something else only."""
    if options:
        one = len(options) == 1
        raise ValueError(
            f"{', '.join(options)} {'goes' if one else 'go'} with {purpose}, but {contrast}: leave "
            f"{'it' if one else 'them'} out"
        )
