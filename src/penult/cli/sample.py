"""``penult sample``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from penult.cli._console import RichReporter
from penult.cli._models import device_of, folder_path, load_pair
from penult.cli._options import AsJson, BiasKey, Device, Seed, WeightKey
from penult.cli.extract import HEAD_FILE

__all__ = ["sample"]

_MANY = 1_000_000  # draws, seconds of them


def sample(
    pair: Annotated[str, typer.Argument(metavar="PAIR", help="A *.penult.safetensors, or a file that holds a head.")],
    out: Annotated[Path, typer.Option(help="Folder for the activations, as `penult extract` writes them.")],
    count: Annotated[int, typer.Option("--count", "-n", help="How many; of each --class.", min=1)] = 1000,
    classes: Annotated[
        list[int] | None, typer.Option("--class", help="Draw of this class (repeatable); else y ~ the implied prior.")
    ] = None,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    overwrite: Annotated[bool, typer.Option(help="Replace activations that the folder holds.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw activations and labels from a pair.

    Example: penult sample resnet.penult.safetensors -n 500 --class 3 --class 5 --out drawn/
    """
    import torch

    from penult.activations import Activations
    from penult.bases import Marginal

    reporter = RichReporter(stderr=as_json)
    law = load_pair(pair, weight_key, bias_key).to(device_of(device))
    generator = torch.Generator(device_of(device)).manual_seed(seed)
    if classes:
        labels = torch.tensor(classes, device=device_of(device)).repeat_interleave(count)
        if isinstance(law.base, Marginal) and (needed := law.base.draws_for(labels)) > _MANY:
            reporter.line(f"these classes are rare: some {needed:.2g} activations are drawn to find them")
        h = law.given(labels).sample((), generator=generator)
    else:
        h, labels = law.sample((count,), generator=generator)
    logits = law.head(h)
    acts = Activations(h.cpu(), logits.cpu(), labels.cpu())
    acts.save(folder_path(out), overwrite=overwrite)
    law.save(out / HEAD_FILE)
    confidence, predicted = logits.softmax(-1).max(-1)
    facts = {
        "out": str(out),
        "samples": len(acts),
        "accuracy": float((predicted == labels).double().mean()),
        "confidence": float(confidence.double().mean()),
        "norm": float(torch.linalg.vector_norm(h.double(), dim=-1).mean()),
    }
    reporter.line(f"{out}: {acts}")
    reporter.line(
        f"the head is right on {facts['accuracy']:.1%} of them, with mean confidence {facts['confidence']:.1%}; "
        f"mean norm {facts['norm']:.4g}"
    )
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
