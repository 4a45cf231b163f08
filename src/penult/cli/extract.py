"""``penult extract``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penult.cli._console import RichReporter, print_json, tell
from penult.cli._launch import Launch
from penult.cli._models import folder_path, is_file
from penult.cli._options import (
    AsJson,
    BatchSize,
    Device,
    Devices,
    Fold,
    HeadPath,
    ImageColumn,
    ImageOptions,
    LabelColumn,
    Mean,
    Mode,
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


class StorageDtype(str, Enum):
    """Data types that activations can be stored in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def extract(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Factory of the network, package.module:factory, called without arguments."
        ),
    ],
    data: Annotated[str, typer.Argument(help="Images: a parquet file, glob or folder; an image folder; .npz; digits.")],
    out: Annotated[Path, typer.Option(help="Folder for the activations; a killed run resumes there.")],
    batch_size: BatchSize = 128,
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
    dtype: Annotated[
        StorageDtype, typer.Option(help="Data type of stored activations and logits.")
    ] = StorageDtype.float32,
    pre_activation: Annotated[
        bool, typer.Option("--pre-activation", help="Store the input of the ReLU right before the head.")
    ] = False,
    shard_size: Annotated[
        float, typer.Option(help="Size of a shard in MiB: a killed run loses at most one.", min=0.001)
    ] = 16.0,
    overwrite: Annotated[bool, typer.Option(help="Replace other activations in the folder.")] = False,
    device: Device = "cpu",
    devices: Devices = None,
    num_nodes: NumNodes = None,
    strategy: Strategy = "auto",
    as_json: AsJson = False,
) -> None:
    """Run a network on images and store its activations, logits and labels in shards.

    The head is stored with the activations, so that `penult fit` needs nothing else.

    With --devices, processes share the images (extra train); resume a stopped run with the same number of processes.

    Example: penult extract mypackage.models:resnet "train-*.parquet" --out activations/ --dtype float16
    """
    import torch
    from torch.utils.data import DataLoader

    from penult import io
    from penult.activations import Tap
    from penult.activations import extract as run
    from penult.cli._inputs import NetworkOptions, first_images, keep_matching_labels, number_as_network, of_one_size
    from penult.cli._stored import write_row_names
    from penult.pair import GenerativePair

    launch = Launch(device, devices, num_nodes, strategy)
    reporter = RichReporter(stderr=as_json, silent=launch.rank > 0)
    folder_path(out)
    if is_file(model):
        raise ValueError(f"{model} is a file, but the network has to run; give package.module:factory")
    dataset = ImageOptions.of(context.params).read(data)
    options = NetworkOptions.of(context.params, model, "MODEL")
    classifier = options.open(first_images(dataset, data), launch.device, reporter)
    head = classifier.head
    number_as_network(classifier.network, {data: dataset}, reporter)
    names = keep_matching_labels(dataset, data, head.num_classes, reporter)
    shards = [] if overwrite else sorted(path.name for path in out.glob("activations-*.safetensors"))
    complete = (out / io.INDEX_NAME).exists() and not overwrite
    if complete:
        reporter.line(
            f"{out} is complete; only the first batch is computed, to compare. --overwrite computes all of it again"
        )
    elif shards:
        reporter.line(f"{out} holds {len(shards)} whole shards of a run that was stopped; resuming after them")
    group = launch.start()
    if group is not None:
        reporter.line(
            f"{launch.devices * launch.num_nodes} processes share the batches; the bar shows the first process"
        )
    with of_one_size(data):
        acts = run(
            Tap(classifier.network, head),
            DataLoader(dataset, batch_size=batch_size, num_workers=workers),
            out,
            dtype=None if dtype is StorageDtype.float32 else getattr(torch, dtype.value),
            pre_activation=pre_activation,
            class_names=names,
            shard_size=round(shard_size * 2**20),
            overwrite=overwrite,
            progress=launch.rank == 0,
            group=group,
        )
    if launch.rank:
        return
    head.class_names, head.preprocessing = acts.class_names, acts.preprocessing
    GenerativePair(head).save(out / HEAD_FILE)
    write_row_names(dataset.row_names, out, acts)
    reporter.line(f"{out}: {acts}")
    if acts.labels is not None:
        _report_accuracy(acts, reporter)
    rectified = head.certificate is not None and head.certificate.rectified
    if rectified and not pre_activation:
        reporter.line("a ReLU stands right before the head; for penult fit, store its input with --pre-activation")
    if as_json:
        results = {"out": str(out), "samples": len(acts), "features": acts.in_features, "classes": acts.num_classes}
        results |= {"labels": acts.labels is not None, "dtype": dtype.value, "pre_activation": pre_activation}
        print_json(results | {"resumed_after_shards": len(shards), "was_complete": complete})


def _report_accuracy(acts: Activations, reporter: RichReporter) -> None:
    """Print the accuracy of the network on labels, with a warning where it is at chance level."""
    from penult.cli._inputs import guessing, label_accuracy

    accuracy, at_chance = label_accuracy(acts)
    if at_chance:
        tell(f"warning: {guessing('the network', accuracy, acts.num_classes)}. penult needs no labels")
    else:
        reporter.line(f"the network predicts {accuracy:.1%} of the labels")
