"""``penult fit``."""

from __future__ import annotations

import json
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from penult.cli._console import RichReporter, warnings_as_lines
from penult.cli._launch import Launch
from penult.cli._models import load_head, pair_path
from penult.cli._options import AsJson, BiasKey, Device, Devices, NumNodes, Seed, Strategy, WeightKey
from penult.cli.extract import HEAD_FILE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from penult.activations import Activations
    from penult.bases import Base
    from penult.head import Head

__all__ = ["fit"]

_APART = 0.05  # confidences of draws and of stored activations
_CHECKED = 1000  # activations that have to agree with the head, and draws that are judged


class BaseName(str, Enum):
    """Bases that can be fitted without labels."""

    auto = "auto"
    sphere = "sphere"
    centered = "centered"
    elliptic = "elliptic"
    gaussian = "gaussian"
    mixture = "mixture"
    by_class = "class"
    flow = "flow"
    bank = "bank"


_SHAPES: dict[BaseName, Literal["round", "centered", "elliptic"]] = {
    BaseName.sphere: "round",
    BaseName.centered: "centered",
    BaseName.elliptic: "elliptic",
}
_MARGINALS: dict[BaseName, Literal["mixture", "class", "flow", "bank"]] = {
    BaseName.mixture: "mixture",
    BaseName.by_class: "class",
    BaseName.flow: "flow",
    BaseName.bank: "bank",
}
_OPTIONS = {  # those that only some bases have
    "components": (BaseName.mixture,),
    "dims": (BaseName.mixture, BaseName.by_class),
    "ambient": tuple(_SHAPES),
    "trim": (BaseName.elliptic,),
}


def fit(
    activations: Annotated[Path, typer.Argument(help="Folder that `penult extract` wrote.")],
    out: Annotated[Path, typer.Option(help="The pair, e.g. resnet.penult.safetensors.")],
    base: Annotated[BaseName, typer.Option(help="What all classes share.")] = BaseName.mixture,
    components: Annotated[int | None, typer.Option(help="Gaussians of a mixture.", min=1)] = None,
    dims: Annotated[
        int | None, typer.Option(help="Principal components of mixture and class; the rest is noise.", min=1)
    ] = None,
    ambient: Annotated[
        bool | None,
        typer.Option(
            "--ambient/--no-ambient", help="Spheres in all of R^d (default), or in span(W).", show_default=False
        ),
    ] = None,
    trim: Annotated[
        float | None,
        typer.Option(
            help="Share of the strangest activations that an elliptic sphere leaves out; 0.2 for a dirty pool."
        ),
    ] = None,
    prior_from: Annotated[
        Path | None,
        typer.Option(help="Folder of activations with another balance of classes; the pair takes the prior of these."),
    ] = None,
    head: Annotated[Path | None, typer.Option(help="File with the head, if not the one in the folder.")] = None,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    seed: Seed = 0,
    device: Device = "cpu",
    devices: Devices = None,
    num_nodes: NumNodes = None,
    strategy: Strategy = "auto",
    as_json: AsJson = False,
) -> None:
    """Fit a base measure to stored activations, without labels, and write the pair.

    Every base makes an exact pair with the head. They differ in size, and in how close draws come to real activations.

    mixture: Gaussians, fitted by expectation maximisation to all classes at once. A good first choice.

    class: one Gaussian for each class, in closed form.

    flow: a normalizing flow, trained for seconds to minutes (extra flow).

    bank: the activations themselves, drawn with replacement. The file then holds real activations.

    sphere, centered, elliptic, gaussian: one shape for all classes. sphere is that of Seo, Lee and Kwak (2021).

    auto: fits them to two thirds, compares with the rest, and fits the recommended one to all (extra data).

    Where a ReLU stands right before the head, extract with --pre-activation: draws of the first three get exact zeros.

    Example: penult fit activations/ --base auto --out resnet.penult.safetensors

    Example: penult fit activations/ --components 200 --dims 32 --out resnet.penult.safetensors
    """
    import torch

    from penult.pair import GenerativePair
    from penult.processes import Processes

    launch = Launch(device, devices, num_nodes, strategy)
    reporter = RichReporter(stderr=as_json, silent=launch.rank > 0)
    pair_path(out)
    options = {"components": components, "dims": dims, "ambient": ambient, "trim": trim}
    options = {name: value for name, value in options.items() if value is not None}
    _check_options(base, options)
    file = activations / HEAD_FILE if head is None else head
    acts, found = _read(activations, file, weight_key, bias_key)
    others = None if prior_from is None else _read(prior_from, file, weight_key, bias_key)[0]
    found = found.to(launch.device)
    group = launch.start()
    facts: dict[str, Any] = {"out": str(out), "base": base.value, "samples": len(acts)}
    if len(acts) < 2 * acts.in_features and base is not BaseName.bank:
        reporter.line(
            f"only {len(acts)} activations for d = {acts.in_features}: what is fitted is mostly assumed; "
            f"{10 * acts.in_features} and more tell it"
        )
    with warnings_as_lines(launch.rank > 0):
        _warn_of_rectified(base, found, acts, activations)
        if base is BaseName.auto:
            from penult.realism import choose

            if launch.rank == 0:
                ranking = choose(found, acts, seed=seed, progress=True)
                reporter.line(str(ranking))
                base = BaseName(ranking.best)
                facts |= {"base": base.value, "ranking": ranking.to_dict()}
            base = Processes(group).first(base)
        with reporter.waiting(f"fitting the {base.value} base to {len(acts)} activations"):
            fitted = _fitted(base, found, acts, seed, options, group)
        if launch.rank:
            return
        pair = GenerativePair(found, fitted)
        if others is not None:
            pair = pair.with_prior(pair.estimate_prior(others))
            facts["prior_from"] = str(prior_from)
    judged = _sample(acts if others is None else others)
    generator = torch.Generator(found.weight.device).manual_seed(seed)
    drawn, labels = pair.sample((_CHECKED,), generator=generator)
    confidence, predicted = pair.head(drawn).softmax(-1).max(-1)
    real = pair.head(_as_read(judged).to(found.weight)).double().softmax(-1).amax(-1)
    prior = pair.prior.probs
    facts |= {
        "prior": prior.tolist(),
        "effective_classes": float(pair.prior.entropy().exp()),
        "draws_accuracy": float((predicted == labels).double().mean()),
        "draws_confidence": float(confidence.double().mean()),
        "stored_confidence": float(real.mean()),
    }
    pair.save(out)
    reporter.line(f"{out}: {fitted}")
    if base is BaseName.bank:
        reporter.line("it holds real activations: whoever reads the file has them")
    source = "implied prior" if others is None else f"prior of the {len(others)} activations of {prior_from}"
    reporter.line(
        f"{source} from {float(prior.min()):.3g} to {float(prior.max()):.3g}, as spread as "
        f"{facts['effective_classes']:.1f} of {len(prior)} classes; pair.with_prior(p) sets another"
    )
    apart = abs(facts["draws_confidence"] - facts["stored_confidence"])
    reporter.line(
        f"the head is right on {facts['draws_accuracy']:.1%} of {_CHECKED} draws, with mean confidence "
        f"{facts['draws_confidence']:.3f}; on stored activations its confidence is {facts['stored_confidence']:.3f}"
        + (f". They are far apart, and draws a poor stand-in{_remedy(base)}" if apart > _APART else "")
    )
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


def _remedy(base: BaseName) -> str:
    return "; for penult score it is the one to keep" if base is BaseName.elliptic else ": try --base auto"


def _check_options(base: BaseName, options: dict[str, Any]) -> None:
    """Refuse options that the base does not have."""
    for name in options:
        if base not in _OPTIONS[name]:
            flag = "--ambient/--no-ambient" if name == "ambient" else f"--{name}"
            kinds = " or ".join(kind.value for kind in _OPTIONS[name])
            if base is BaseName.auto:
                raise ValueError(f"--base auto compares bases as they are; {flag} goes with --base {kinds}")
            raise ValueError(f"the {base.value} base has no {flag}; it goes with --base {kinds}")


def _read(folder: Path, file: Path, weight_key: str | None, bias_key: str | None) -> tuple[Activations, Head]:
    """The activations of a folder and the head in a file, which has to make the logits stored with them."""
    from penult.activations import Activations

    if folder.is_file():
        raise ValueError(
            f"{folder} is a file; activations come of penult extract package.module:factory {folder} --out acts/, and "
            "that folder is what to fit to"
        )
    acts = Activations.open(folder)
    if not file.exists():
        raise ValueError(f"{file} does not exist; give the head that the activations belong to: --head FILE")
    found = load_head(file, weight_key, bias_key)
    if (acts.num_classes, acts.in_features) != (found.num_classes, found.in_features):
        raise ValueError(
            f"{file} holds a head of shape {(found.num_classes, found.in_features)}, but the activations of "
            f"{folder} have {acts.in_features} features and {acts.num_classes} logits"
        )
    part = _sample(acts)
    if not len(part):
        raise ValueError(f"{folder} holds no activations")
    logits = found(_as_read(part).to(found.weight)).softmax(-1)
    error = float((logits - part.logits.to(logits).softmax(-1)).abs().max())
    if error > (1e-3 if acts.dtype.itemsize >= 4 else 0.05):
        raise ValueError(
            f"the head in {file} does not make the stored logits of {folder}: their softmaxes differ by up to "
            f"{error:.2g}. A norm layer that was folded belongs to the head: use the head that extract wrote"
        )
    return acts, found


def _sample(acts: Activations) -> Activations:
    """Rows from all over a set, which may be sorted by class."""
    import torch

    return acts[torch.linspace(0, len(acts) - 1, min(len(acts), _CHECKED), dtype=torch.float64).long()]


def _as_read(acts: Activations) -> Any:
    """What the head reads (N, d): of pre-activations their positive part."""
    return acts.activations.clamp_min(0) if acts.pre_activation else acts.activations


def _warn_of_rectified(base: BaseName, head: Head, acts: Activations, folder: Path) -> None:
    """Say, in words of the command line, what `Marginal.fit` would say in Python's."""
    rectified = head.certificate is not None and head.certificate.rectified and not acts.pre_activation
    if rectified and base not in (BaseName.bank, BaseName.gaussian, *_SHAPES):
        warnings.warn(
            f"a ReLU stands right before this head, and {folder} holds what comes after it: a law fitted to that has "
            "no exact zeros, and is easily told from it. penult extract --pre-activation stores what to fit to",
            UserWarning,
            stacklevel=2,
        )
        warnings.filterwarnings("ignore", "a ReLU stands right before this head, and these activations")


def _fitted(
    base: BaseName, head: Head, acts: Activations, seed: int, options: dict[str, Any], group: ProcessGroup | None
) -> Base:
    from penult.bases import Gaussian, Marginal, Sphere

    if base is BaseName.gaussian:
        return Gaussian.fit(head, acts, group=group)
    if base in _SHAPES:
        return Sphere.fit(head, acts, shape=_SHAPES[base], group=group, **options)
    return Marginal.fit(head, acts, kind=_MARGINALS[base], seed=seed, group=group, **options)
