"""``penult sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penult.cli._console import RichReporter, print_json
from penult.cli._models import device_of, folder_path, load_pair
from penult.cli._options import AsJson, BiasKey, Device, Pair, Seed, WeightKey
from penult.cli.extract import HEAD_FILE

__all__ = ["sample"]

_MANY = 1_000_000  # Proposals that take seconds.


def sample(
    pair: Pair,
    out: Annotated[Path, typer.Option(help="Folder for the activations, in the format of `penult extract`.")],
    count: Annotated[
        int, typer.Option("--count", "-n", help="Number of samples; with --class, of each class.", min=1)
    ] = 1000,
    classes: Annotated[
        list[int] | None,
        typer.Option("--class", help="Class to sample from; repeatable. Default: classes from the pair's prior."),
    ] = None,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    overwrite: Annotated[bool, typer.Option(help="Replace other activations in the folder.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Sample activations and labels from a pair.

    Example: penult sample resnet.penult.safetensors -n 500 --class 3 --class 5 --out samples/
    """
    import torch

    from penult.activations import Activations
    from penult.bases import Marginal

    reporter = RichReporter(stderr=as_json)
    loaded = load_pair(pair, weight_key, bias_key).to(device_of(device))
    generator = torch.Generator(device_of(device)).manual_seed(seed)
    if classes:
        labels = torch.tensor(classes, device=device_of(device)).repeat_interleave(count)
        if isinstance(loaded.base, Marginal) and (proposals := loaded.base.draws_for(labels)) > _MANY:
            reporter.line(f"these classes are rare: about {proposals:.2g} activations are sampled to find enough")
        h = loaded.given(labels).sample((), generator=generator)
    else:
        h, labels = loaded.sample((count,), generator=generator)
    logits = loaded.head(h)
    acts = Activations(h.cpu(), logits.cpu(), labels.cpu())
    acts.save(folder_path(out), overwrite=overwrite)
    loaded.save(out / HEAD_FILE)
    confidence, predicted = logits.softmax(-1).max(-1)
    results = {
        "out": str(out),
        "samples": len(acts),
        "accuracy": float((predicted == labels).double().mean()),
        "confidence": float(confidence.double().mean()),
        "norm": float(torch.linalg.vector_norm(h.double(), dim=-1).mean()),
    }
    reporter.line(f"{out}: {acts}")
    reporter.line(
        f"the head is right on {results['accuracy']:.1%} of them, with mean confidence {results['confidence']:.1%}; "
        f"mean norm {results['norm']:.4g}"
    )
    if as_json:
        print_json(results)
