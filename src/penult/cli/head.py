"""``penult head``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penult.cli._console import RichReporter, print_json
from penult.cli._models import device_of, is_file, load_head, load_pair, pair_path
from penult.cli._options import (
    AsJson,
    BiasKey,
    Device,
    Fold,
    HeadPath,
    ImageColumn,
    ImageOptions,
    LabelColumn,
    Mean,
    Mode,
    Model,
    Seed,
    Size,
    Std,
    WeightKey,
    Weights,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["head"]


def head(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="Images to run the network on: parquet, folder, .npz or digits.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Shape of random inputs to run the network on instead, for example 3,224,224.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of inputs to run the network on.", min=1)] = 16,
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
    out: Annotated[Path | None, typer.Option(help="File for a pair made from the head alone, without data.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Find the head of a network, or read one from a file, and print its properties.

    Example: penult head mypackage.models:resnet --data test.parquet --out resnet.penult.safetensors
    """
    from penult.pair import GenerativePair

    reporter = RichReporter(stderr=as_json)
    if data is not None and shape is not None:
        raise ValueError("--data and --shape exclude each other; give images, or the shape of random inputs")
    if out is not None:
        pair_path(out)
    if is_file(model):
        found_head = load_head(model, weight_key, bias_key)
    else:
        from penult.cli._inputs import NetworkOptions

        options = NetworkOptions.of(context.params, model, "MODEL")
        network = options.load(device_of(device))
        found_head = options.find_head(network, _inputs(context.params).to(device_of(device)))
    results: dict[str, Any] = {
        "classes": found_head.num_classes,
        "features": found_head.in_features,
        "rank": found_head.rank,
        "bias": found_head.bias is not None,
        "gauge": float(found_head.mean_row.norm()),
        "certificate": None if found_head.certificate is None else asdict(found_head.certificate),
    }
    reporter.line(str(found_head.certificate or found_head))
    if not is_file(model) and weights is None:
        reporter.line("  weights as the factory makes them; pass --weights for trained ones")
    reporter.line(f"  rank    {found_head.rank} dimensions of span(W), which the softmax depends on")
    if out is not None:
        pair = load_pair(model, weight_key, bias_key) if is_file(model) else GenerativePair(found_head)
        results["out"] = str(pair.save(out))
        reporter.line(f"{out}: {pair.base}")
        if found_head.norm is not None:
            reporter.line(
                f"the norm before the head keeps |h| near {found_head.radius:.4g}; the radius above is instead chosen "
                "for the default confidence of samples. penult fit takes the observed radius"
            )
    if as_json:
        print_json(results)


def _inputs(options: Mapping[str, Any]) -> Tensor:
    """Return the inputs to run the network on: images of --data, or random tensors of --shape."""
    import torch

    from penult.cli._inputs import first_images

    if options["data"] is not None:
        return first_images(ImageOptions.of(options).read(options["data"]), options["data"], options["batch_size"])
    shape = options["shape"]
    if shape is None:
        raise ValueError(f"{options['model']} has to run so that its head is found: give --data, or --shape")
    try:
        extents = [int(part) for part in shape.split(",")]
    except ValueError:
        raise ValueError(f"--shape is {shape!r}; expected numbers such as 3,224,224") from None
    return torch.randn(
        options["batch_size"], *extents, generator=torch.Generator().manual_seed(options["seed"]), device="cpu"
    )
