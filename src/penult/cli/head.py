"""``penult head``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from penult.cli._console import RichReporter
from penult.cli._models import device_of, is_file, load_head, load_model, load_pair, pair_path, running
from penult.cli._options import (
    AsJson,
    BiasKey,
    Device,
    Fold,
    HeadPath,
    Mean,
    Mode,
    Model,
    Seed,
    Size,
    Std,
    WeightKey,
    Weights,
)

__all__ = ["head"]


def head(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Images to run it on: parquet, folder, .npz or digits.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Random inputs in place of data, one is 3,224,224."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="How many inputs to run the model on.", min=1)] = 16,
    size: Size = None,
    mode: Mode = None,
    mean: Mean = None,
    std: Std = None,
    weights: Weights = None,
    path: HeadPath = None,
    fold: Fold = True,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    out: Annotated[Path | None, typer.Option(help="Write the pair that the head implies without data.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Find the head of a model, or read one from a file, and say what is known of it.

    Example: penult head mypackage.models:resnet --data test.parquet --out resnet.penult.safetensors
    """
    import torch

    from penult.cli._inputs import first_images, load_images
    from penult.head import find_head
    from penult.pair import GenerativePair

    reporter = RichReporter(stderr=as_json)
    if data is not None and shape is not None:
        raise ValueError("--data and --shape exclude each other: images, or random inputs in place of them")
    if out is not None:
        pair_path(out)
    if is_file(model):
        found = load_head(model, weight_key, bias_key)
    else:
        network = load_model(model, weights).to(device_of(device))
        if data is not None:
            dataset = load_images(data, size=size, mode=mode, mean=mean, std=std)
            batch = first_images(dataset, batch_size)
        elif shape is not None:
            try:
                extents = [int(part) for part in shape.split(",")]
            except ValueError:
                raise ValueError(f"--shape {shape!r} is no list of numbers such as 3,224,224") from None
            batch = torch.randn(batch_size, *extents, generator=torch.Generator().manual_seed(seed))
        else:
            raise ValueError(f"to find the head of {model} it has to run: give --data, or --shape for random inputs")
        with running(tuple(batch.shape)):
            found = find_head(network, batch.to(device_of(device)), path=path, fold=fold)
    facts: dict[str, Any] = {
        "classes": found.num_classes,
        "features": found.in_features,
        "rank": found.rank,
        "bias": found.bias is not None,
        "gauge": float(found.mean_row.norm()),
        "certificate": None if found.certificate is None else asdict(found.certificate),
    }
    reporter.line(str(found.certificate or found))
    reporter.line(f"  rank    {found.rank} dimensions of span(W), which is all that the softmax sees")
    if out is not None:
        in_file = is_file(model)
        pair = load_pair(model, weight_key, bias_key) if in_file else GenerativePair(found)
        facts["out"] = str(pair.save(out))
        reporter.line(f"{out}: {pair.base}")
        if found.norm is not None:
            reporter.line(
                f"the norm before the head holds |h| near {found.radius:.4g}; the radius above is the one whose draws "
                "are as confident as asked. penult fit takes the observed one"
            )
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
