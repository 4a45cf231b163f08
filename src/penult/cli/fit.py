"""``penult fit``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from penult.cli import sources
from penult.cli.console import RichReporter
from penult.cli.extract import HEAD_FILE

__all__ = ["fit"]

_CHECKED = 1000  # activations that have to agree with the head


class BaseName(str, Enum):
    """Bases that can be fitted without labels."""

    sphere = "sphere"
    centered = "centered"
    elliptic = "elliptic"
    gaussian = "gaussian"


def fit(
    activations: Annotated[Path, typer.Argument(help="Folder that `penult extract` wrote.")],
    out: Annotated[Path, typer.Option(help="The pair, e.g. resnet.penult.safetensors.")],
    base: Annotated[BaseName, typer.Option(help="What all classes share.")] = BaseName.elliptic,
    ambient: Annotated[bool, typer.Option(help="Spheres in all of R^d; --no-ambient: in span(W).")] = True,
    head: Annotated[Path | None, typer.Option(help="File with the head, if not the one in the folder.")] = None,
    weight_key: sources.WeightKey = None,
    bias_key: sources.BiasKey = None,
    as_json: sources.AsJson = False,
) -> None:
    """Fit a base measure to stored activations, without labels, and write the pair.

    Example: penult fit activations/ --base elliptic --out resnet.penult.safetensors
    """
    import torch

    from penult.activations import Activations
    from penult.bases import Base, Gaussian, Sphere
    from penult.pair import GenerativePair

    reporter = RichReporter(stderr=as_json)
    sources.pair_path(out)
    acts = Activations.open(activations)
    file = activations / HEAD_FILE if head is None else head
    if not file.exists():
        raise ValueError(f"{file} does not exist; give the head that the activations belong to: --head FILE")
    found = sources.load_head(file, weight_key, bias_key)
    if (acts.num_classes, acts.in_features) != (found.num_classes, found.in_features):
        raise ValueError(
            f"{file} holds a head of shape {(found.num_classes, found.in_features)}, but the activations of "
            f"{activations} have {acts.in_features} features and {acts.num_classes} logits"
        )
    part = acts[:_CHECKED]
    logits = found(part.activations.to(found.weight)).softmax(-1)
    error = float((logits - part.logits.to(logits).softmax(-1)).abs().max())
    if error > (1e-3 if acts.dtype.itemsize >= 4 else 0.05):
        raise ValueError(
            f"the head in {file} does not make the stored logits of {activations}: their softmaxes differ by up to "
            f"{error:.2g}. A norm layer that was folded belongs to the head: use the head that extract wrote"
        )
    fitted: Base
    if base is BaseName.gaussian:
        fitted = Gaussian.fit(found, acts)
    else:
        shapes: dict[BaseName, Literal["round", "centered", "elliptic"]] = {
            BaseName.sphere: "round",
            BaseName.centered: "centered",
            BaseName.elliptic: "elliptic",
        }
        fitted = Sphere.fit(found, acts, shape=shapes[base], ambient=ambient)
    pair = GenerativePair(found, fitted)
    pair.save(out)
    prior = pair.prior.probs
    effective = float(pair.prior.entropy().exp())
    reporter.line(f"{out}: {fitted}")
    reporter.line(
        f"implied prior from {float(prior.min()):.3g} to {float(prior.max()):.3g}, as spread as {effective:.1f} of "
        f"{len(prior)} classes; pair.with_prior(p) sets another"
    )
    drawn, labels = pair.sample((_CHECKED,), generator=torch.Generator(found.weight.device).manual_seed(0))
    confidence, predicted = found(drawn).softmax(-1).max(-1)
    facts = {
        "draws_accuracy": float((predicted == labels).double().mean()),
        "draws_confidence": float(confidence.double().mean()),
        "stored_confidence": float(part.logits.double().softmax(-1).amax(-1).mean()),
    }
    reporter.line(
        f"the head is right on {facts['draws_accuracy']:.1%} of {_CHECKED} draws, with mean confidence "
        f"{facts['draws_confidence']:.3f}; on the stored activations its confidence is "
        f"{facts['stored_confidence']:.3f}. Far apart, the base is a poor stand-in: try others, and --no-ambient"
    )
    if as_json:
        facts |= {"effective_classes": effective}
        about = {"out": str(out), "base": base.value, "samples": len(acts), "prior": prior.tolist()}
        typer.echo(json.dumps(about | facts, indent=2))
