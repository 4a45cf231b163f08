"""``penult fit``."""

from __future__ import annotations

import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from penult.cli._console import RichReporter, print_json, warnings_as_lines
from penult.cli._launch import Launch
from penult.cli._models import load_head, pair_path
from penult.cli._options import AsJson, BiasKey, Device, Devices, NumNodes, Seed, Strategy, WeightKey
from penult.cli.extract import HEAD_FILE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from penult.activations import Activations
    from penult.bases import Base
    from penult.head import Head
    from penult.pair import GenerativePair

__all__ = ["fit"]

_CONFIDENCE_GAP = 0.05  # Confidences of samples and of stored activations that differ by more are pointed out.
_SAMPLES = 1000


class BaseName(str, Enum):
    """Base measures that can be fitted without labels."""

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
# Options that only some bases have.
_OPTIONS = {
    "components": (BaseName.mixture,),
    "dims": (BaseName.mixture, BaseName.by_class),
    "ambient": tuple(_SHAPES),
    "trim": (BaseName.elliptic,),
}


def fit(
    out: Annotated[Path, typer.Option(help="File for the pair, for example resnet.penult.safetensors.")],
    activations: Annotated[
        Path | None,
        typer.Argument(
            help="Folder that `penult extract` wrote; or, with --head, an .npz or .safetensors file with activations "
            "or features (N, d), and optionally logits and labels."
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(help="File of `penult moments` to make the pair of, in place of activations and a head."),
    ] = None,
    shrinkage: Annotated[
        str,
        typer.Option(help="With --moments: part of the covariance that is a multiple of the identity; 0 to 1, or oas."),
    ] = "oas",
    base: Annotated[BaseName, typer.Option(help="Base measure, shared by all classes.")] = BaseName.mixture,
    components: Annotated[int | None, typer.Option(help="Number of Gaussians of a mixture.", min=1)] = None,
    dims: Annotated[
        int | None,
        typer.Option(
            help="Number of principal components of mixture and class; other directions get isotropic noise.", min=1
        ),
    ] = None,
    ambient: Annotated[
        bool | None,
        typer.Option(
            "--ambient/--no-ambient", help="Sphere in all of R^d (default), or in span(W).", show_default=False
        ),
    ] = None,
    trim: Annotated[
        float | None,
        typer.Option(
            help="Fraction of outliers that the fit of an elliptic sphere leaves out, for example 0.2 if the "
            "activations contain many."
        ),
    ] = None,
    prior_from: Annotated[
        Path | None,
        typer.Option(help="Activations to estimate the prior of the classes from, in the same forms."),
    ] = None,
    score: Annotated[
        bool,
        typer.Option(
            "--score/--no-score",
            help="Whether to fit the outlier score composite to the same activations, and to keep it with the pair for "
            "penult score and penult report.",
        ),
    ] = True,
    head: Annotated[
        Path | None, typer.Option(help="File with the head. Default: the head stored in the folder of activations.")
    ] = None,
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

    With every base, the pair has exactly the softmax of the head as its posterior. Bases differ in size, and in how
    close their samples come to real activations.

    mixture: Gaussians, fitted by expectation maximisation to all classes at once. A good first choice.

    class: one Gaussian per class, in closed form.

    flow: a normalizing flow, trained for seconds to minutes (extra flow).

    bank: the activations themselves, sampled with replacement. The file then holds real activations.

    sphere, centered, elliptic, gaussian: one shape for all classes. sphere is that of Seo, Lee and Kwak (2021).

    --moments: the pair of linear discriminant analysis, with its own head; one Gaussian for all classes.

    auto: fits all bases to two thirds of the activations, compares their samples with the other third, and fits the
    best base to all activations (extra data).

    Where a ReLU stands right before the head, extract with --pre-activation: samples of mixture, class and flow then
    have exact zeros.

    Example: penult fit activations/ --base auto --out resnet.penult.safetensors

    Example: penult fit activations/ --components 200 --dims 32 --out resnet.penult.safetensors

    Example: penult fit --moments moments.safetensors --out lda.penult.safetensors
    """
    import torch

    from penult.cli._inputs import spread_rows
    from penult.pair import GenerativePair
    from penult.processes import Processes

    launch = Launch(device, devices, num_nodes, strategy)
    reporter = RichReporter(stderr=as_json, silent=launch.rank > 0)
    pair_path(out)
    if moments is not None:
        others = (activations, head, prior_from, components, dims, ambient, trim)
        if any(value is not None for value in others) or base not in (BaseName.mixture, BaseName.gaussian):
            raise ValueError(
                "--moments takes the place of activations, head and base, which is a Gaussian; leave out ACTIVATIONS "
                "and the options of the others"
            )
        _fit_moments(moments, shrinkage, out, reporter, as_json)
        return
    if shrinkage != "oas":
        raise ValueError("--shrinkage goes with --moments; leave it out")
    if activations is None:
        raise ValueError("no activations are given; expected a folder of penult extract, or --moments FILE")
    options = {"components": components, "dims": dims, "ambient": ambient, "trim": trim}
    options = {name: value for name, value in options.items() if value is not None}
    _check_options(base, options)
    file = activations / HEAD_FILE if head is None else head
    acts, fitted_head = _read(activations, file, weight_key, bias_key)
    prior_acts = None if prior_from is None else _read(prior_from, file, weight_key, bias_key)[0]
    if prior_from is not None:
        fitted_head = _calibrated(fitted_head, acts, activations, reporter)
    fitted_head = fitted_head.to(launch.device)
    group = launch.start()
    results: dict[str, Any] = {"out": str(out), "base": base.value, "samples": len(acts)}
    if len(acts) < 2 * acts.in_features and base is not BaseName.bank:
        reporter.line(
            f"there are only {len(acts)} activations of dimension {acts.in_features}, so most of the fit follows from "
            f"its assumptions; give {10 * acts.in_features} or more"
        )
    with warnings_as_lines(launch.rank > 0):
        _warn_of_rectified(base, fitted_head, acts, activations)
        if base is BaseName.auto:
            from penult.realism import choose

            if launch.rank == 0:
                ranking = choose(fitted_head, acts, seed=seed, progress=True)
                reporter.line(str(ranking))
                base = BaseName(ranking.best)
                results |= {"base": base.value, "ranking": ranking.to_dict()}
            base = Processes(group).first(base)
        with reporter.waiting(f"fitting the {base.value} base to {len(acts)} activations"):
            fitted_base = _fit(base, fitted_head, acts, seed, options, group)
        if launch.rank:
            return
        pair = GenerativePair(fitted_head, fitted_base)
        if prior_acts is not None:
            pair = pair.with_prior(pair.estimate_prior(prior_acts))
            results["prior_from"] = str(prior_from)
    part = spread_rows(acts if prior_acts is None else prior_acts)
    h = part.activations.clamp_min(0) if part.pre_activation else part.activations
    stored_confidence = pair.head(h.to(fitted_head.weight)).double().softmax(-1).amax(-1)
    generator = torch.Generator(fitted_head.weight.device).manual_seed(seed)
    samples, labels = pair.sample((_SAMPLES,), generator=generator)
    confidence, predicted = pair.head(samples).softmax(-1).max(-1)
    prior = pair.prior.probs
    results |= {
        "prior": prior.tolist(),
        "effective_classes": float(pair.prior.entropy().exp()),
        "draws_accuracy": float((predicted == labels).double().mean()),
        "draws_confidence": float(confidence.double().mean()),
        "stored_confidence": float(stored_confidence.mean()),
    }
    results["score"] = _save(pair, acts, out, score, 0.0 if trim is None else trim, reporter)
    reporter.line(f"{out}: {fitted_base}" + (f", and the outlier score {results['score']}" if results["score"] else ""))
    if base is BaseName.bank:
        reporter.line("the file holds real activations: whoever can read it can read them")
    _report_prior(results, None if prior_acts is None else f"{len(prior_acts)} activations of {prior_from}", reporter)
    _report_confidence(results, base, reporter)
    if as_json:
        print_json(results)


def _save(
    pair: GenerativePair, acts: Activations, out: Path, score: bool, trim: float, reporter: RichReporter
) -> str | None:
    """Write the pair, with an outlier score if wanted and possible, and return the name of the score."""
    from penult import scores

    if score:
        try:
            with reporter.waiting(f"fitting the outlier score to {len(acts)} activations"):
                fitted = scores.Composite.fit(pair, acts, trim=trim)
        # There are too few activations or dimensions, or all activations are the same: a pair may still be of use.
        except ValueError as error:
            reporter.line(f"the file holds no outlier score: {error}")
        else:
            scores.save(out, fitted, pair)
            return fitted.kind
    pair.save(out)
    return None


def _report_prior(results: dict[str, Any], source: str | None, reporter: RichReporter) -> None:
    prior = results["prior"]
    reporter.line(
        f"{'implied prior' if source is None else f'prior of the {source}'} from {min(prior):.3g} to {max(prior):.3g}, "
        f"with the entropy of {results['effective_classes']:.1f} of {len(prior)} classes; pair.with_prior(p) sets "
        "another"
    )


def _report_confidence(results: dict[str, Any], base: BaseName, reporter: RichReporter) -> None:
    """Print how confident the head is on samples and on stored activations, with a remedy where these differ."""
    gap = abs(results["draws_confidence"] - results["stored_confidence"])
    remedy = "penult score does not depend on it" if base is BaseName.elliptic else "try --base auto"
    reporter.line(
        f"the head is right on {results['draws_accuracy']:.1%} of {_SAMPLES} samples, with mean confidence "
        f"{results['draws_confidence']:.3f}; on stored activations its confidence is "
        f"{results['stored_confidence']:.3f}"
        + (f". The two differ much, so samples are unlike real activations: {remedy}" if gap > _CONFIDENCE_GAP else "")
    )


def _check_options(base: BaseName, options: dict[str, Any]) -> None:
    """Raise for options that the base does not have."""
    for name in options:
        if base not in _OPTIONS[name]:
            flag = "--ambient/--no-ambient" if name == "ambient" else f"--{name}"
            kinds = " or ".join(kind.value for kind in _OPTIONS[name])
            if base is BaseName.auto:
                raise ValueError(f"--base auto compares bases with default options; {flag} goes with --base {kinds}")
            raise ValueError(f"the {base.value} base has no {flag}; it goes with --base {kinds}")


def _read(folder: Path, file: Path, weight_key: str | None, bias_key: str | None) -> tuple[Activations, Head]:
    """Open activations, and load the head of a file, which has to give the stored logits."""
    from penult.cli._inputs import check_logits, check_recorded, check_shape, open_activations

    if not file.exists():
        # A missing folder, or a file of something else, is the first fault.
        if not folder.is_file():
            open_activations(folder)
        owner = f"{folder} holds no head" if folder.is_file() and file.name == HEAD_FILE else f"{file} does not exist"
        raise ValueError(f"{owner}; give the head that the activations belong to: --head FILE")
    head = load_head(file, weight_key, bias_key)
    acts = open_activations(folder, head)
    check_shape(acts.num_classes, acts.in_features, str(folder), head, str(file))
    check_logits(acts, str(folder), head, str(file), exact=True)
    check_recorded(acts.preprocessing, str(folder), head.preprocessing, str(file))
    head.class_names = head.class_names or acts.class_names
    head.preprocessing = head.preprocessing or acts.preprocessing
    return acts, head


def _calibrated(head: Head, acts: Activations, folder: Path, reporter: RichReporter) -> Head:
    """Calibrate temperature and biases of a head, on which an estimated prior relies, where there are labels."""
    from penult.cli._inputs import spread_rows

    if acts.labels is None:
        reporter.line(f"{folder} has no labels, so the prior is estimated with the biases of the head as they are")
        return head
    some = spread_rows(acts)
    assert some.labels is not None
    try:
        calibrated = head.calibrate(some.logits, some.labels, biases=True)
    # The labels allow no calibration, as where all predictions are right: the data of the training.
    except ValueError as error:
        reporter.line(f"the head is not calibrated, so the prior is estimated with its biases as they are: {error}")
        return head
    reporter.line(
        f"head calibrated with {len(some)} labels of {folder}: temperature {calibrated.temperature:.3g}, and one bias "
        "for each class"
    )
    return calibrated


def _warn_of_rectified(base: BaseName, head: Head, acts: Activations, folder: Path) -> None:
    """Warn in terms of the command line, in place of the warning of `Marginal.fit`."""
    rectified = head.certificate is not None and head.certificate.rectified and not acts.pre_activation
    if rectified and base not in (BaseName.bank, BaseName.gaussian, *_SHAPES):
        warnings.warn(
            f"a ReLU stands right before this head, and {folder} holds its output. A distribution fitted to that has "
            "no exact zeros, unlike real activations. Store the input of the ReLU: penult extract --pre-activation",
            UserWarning,
            stacklevel=2,
        )
        warnings.filterwarnings("ignore", "a ReLU stands right before this head, and these activations")


def _fit(
    base: BaseName, head: Head, acts: Activations, seed: int, options: dict[str, Any], group: ProcessGroup | None
) -> Base:
    from penult.bases import Gaussian, Marginal, Sphere

    if base is BaseName.gaussian:
        return Gaussian.fit(head, acts, group=group)
    if base in _SHAPES:
        return Sphere.fit(head, acts, shape=_SHAPES[base], group=group, **options)
    return Marginal.fit(head, acts, kind=_MARGINALS[base], seed=seed, group=group, **options)


def _fit_moments(file: Path, shrinkage: str, out: Path, reporter: RichReporter, as_json: bool) -> None:
    """Write the pair of moments."""
    from penult.moments import Moments

    try:
        part: Any = shrinkage if shrinkage == "oas" else float(shrinkage)
    except ValueError:
        raise ValueError(f"--shrinkage is {shrinkage!r}; expected a number from 0 to 1, or oas") from None
    moments = Moments.load(file)
    with warnings_as_lines():
        pair = moments.pair(shrinkage=part)
    pair.save(out)
    reporter.line(str(pair.head.certificate))
    reporter.line(f"{out}: {pair.base}")
    prior = pair.prior
    classes = moments.classes.tolist()
    results = {
        "out": str(out),
        "base": "gaussian",
        "samples": len(moments),
        "classes": classes if moments.class_names is None else [moments.class_names[k] for k in classes],
        "prior": prior.probs.tolist(),
        "effective_classes": float(prior.entropy().exp()),
    }
    _report_prior(results, None, reporter)
    if as_json:
        print_json(results)
