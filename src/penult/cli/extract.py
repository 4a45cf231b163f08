"""``penult extract``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penult.cli._console import RichReporter, tell
from penult.cli._launch import Launch
from penult.cli._models import folder_path, is_file, load_model, running
from penult.cli._options import (
    AsJson,
    BatchSize,
    Device,
    Devices,
    Fold,
    HeadPath,
    Mean,
    Mode,
    Model,
    NumNodes,
    Size,
    Std,
    Strategy,
    Weights,
    Workers,
)

if TYPE_CHECKING:
    from penult.activations import Activations

__all__ = ["HEAD_FILE", "extract"]

HEAD_FILE = "head.penult.safetensors"


class Precision(str, Enum):
    """How numbers are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def extract(
    model: Model,
    data: Annotated[str, typer.Argument(help="Images: a parquet file, glob or folder; an image folder; .npz; digits.")],
    out: Annotated[Path, typer.Option(help="Folder for the activations; a run that was killed continues there.")],
    batch_size: BatchSize = 128,
    workers: Workers = 0,
    size: Size = None,
    mode: Mode = None,
    mean: Mean = None,
    std: Std = None,
    weights: Weights = None,
    path: HeadPath = None,
    fold: Fold = True,
    dtype: Annotated[Precision, typer.Option(help="How to store activations and logits.")] = Precision.float32,
    pre_activation: Annotated[
        bool, typer.Option("--pre-activation", help="Store what the ReLU right before the head reads.")
    ] = False,
    shard_size: Annotated[float, typer.Option(help="MiB of a shard; what a kill can cost.", min=0.001)] = 16.0,
    overwrite: Annotated[bool, typer.Option(help="Start anew where the folder holds other activations.")] = False,
    device: Device = "cpu",
    devices: Devices = None,
    num_nodes: NumNodes = None,
    strategy: Strategy = "auto",
    as_json: AsJson = False,
) -> None:
    """Run a data set through a model and store its activations, logits and labels in shards.

    The folder also gets the head that the activations belong to, so that `penult fit` needs nothing else.

    With --devices, processes share the images (extra train); a run that was stopped goes on with as many.

    Example: penult extract mypackage.models:resnet "train-*.parquet" --out activations/ --dtype float16
    """
    import torch

    from penult import io
    from penult.activations import Tap
    from penult.activations import extract as run
    from penult.cli._inputs import batches_of, first_images, labels_fit, load_images, of_one_size
    from penult.head import find_head
    from penult.pair import GenerativePair

    launch = Launch(device, devices, num_nodes, strategy)
    reporter = RichReporter(stderr=as_json, silent=launch.rank > 0)
    folder_path(out)
    if is_file(model):
        raise ValueError(
            f"{model} is a file; to extract activations the network has to run: give package.module:factory"
        )
    network = load_model(model, weights).to(launch.device)
    dataset = load_images(data, size=size, mode=mode, mean=mean, std=std)
    with of_one_size(data):
        batch = first_images(dataset, 16)
    with running(tuple(batch.shape)):
        head = find_head(network, batch.to(launch.device), path=path, fold=fold)
    reporter.line(str(head.certificate))
    known = labels_fit(dataset, data, head.num_classes, reporter)
    if not known:
        dataset.labels = None
    before = [] if overwrite else sorted(path.name for path in out.glob("activations-*.safetensors"))
    complete = (out / io.INDEX_NAME).exists() and not overwrite
    if complete:
        reporter.line(
            f"{out} is complete: nothing is computed but its first batch, to compare; --overwrite starts anew"
        )
    elif before:
        reporter.line(f"{out} holds {len(before)} whole shards of a run that was stopped: resuming after them")
    group = launch.start()
    if group is not None:
        reporter.line(f"{launch.devices * launch.num_nodes} processes share the batches; the bar shows those of one")
    with of_one_size(data):
        acts = run(
            Tap(network, head),
            batches_of(dataset, batch_size, workers),
            out,
            dtype=None if dtype is Precision.float32 else getattr(torch, dtype.value),
            pre_activation=pre_activation,
            class_names=dataset.class_names if known else None,
            shard_size=round(shard_size * 2**20),
            overwrite=overwrite,
            progress=launch.rank == 0,
            group=group,
        )
    if launch.rank:
        return
    GenerativePair(head).save(out / HEAD_FILE)
    reporter.line(f"{out}: {acts}")
    if acts.labels is not None:
        _tell_accuracy(acts, out, reporter)
    rectified = head.certificate is not None and head.certificate.rectified
    if rectified and not pre_activation:
        reporter.line("a ReLU stands right before the head: for penult fit, --pre-activation stores what it reads")
    if as_json:
        facts = {"out": str(out), "samples": len(acts), "features": acts.in_features, "classes": acts.num_classes}
        facts |= {"labels": acts.labels is not None, "dtype": dtype.value, "pre_activation": pre_activation}
        typer.echo(json.dumps(facts | {"resumed_after_shards": len(before), "was_complete": complete}, indent=2))


def _tell_accuracy(acts: Activations, out: Path, reporter: RichReporter) -> None:
    """Say how often a network gives the labels, and warn where that is no more often than by guessing."""
    from penult.cli._inputs import right_answers

    right, guessed = right_answers(acts)
    if guessed:
        tell(
            f"warning: the network gives {right:.1%} of the labels in {out}, as by guessing: are they numbers of its "
            f"own {acts.num_classes} classes, is it trained (--weights), and are the images as in its training "
            "(--mean, --std, --size)? Without labels all of this works too"
        )
    else:
        reporter.line(f"the network gives {right:.1%} of the labels")
