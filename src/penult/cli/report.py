"""``penult report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penult.cli._console import RichReporter, print_json, warnings_as_lines
from penult.cli._models import device_of, load_pair_and_score, same_source
from penult.cli._options import (
    AsJson,
    BatchSize,
    BiasKey,
    Device,
    Fold,
    HeadPath,
    ImageColumn,
    LabelColumn,
    Mean,
    Mode,
    Network,
    NetworkWeights,
    Pair,
    Seed,
    Size,
    Std,
    WeightKey,
    Workers,
)
from penult.cli._scores import Reference, Score, score_of

__all__ = ["report"]


def report(
    context: typer.Context,
    pair: Pair,
    data: Annotated[
        str,
        typer.Option(
            metavar="FAMILIAR",
            help="Inputs of the kind that the network is meant for, and that it was not trained on: a folder that "
            "`penult extract` wrote, or an .npz or .safetensors file with activations or features (N, d) and "
            "optionally logits and labels; or, with --model, images: a parquet file, glob or folder, an image folder, "
            ".npz or digits.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the page, .html.")],
    ood: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]OTHER", help="Other inputs to compare with, in the same forms; repeatable."),
    ] = None,
    name: Score = None,
    reference: Reference = None,
    false_alarm: Annotated[float, typer.Option(help="Fraction of familiar inputs that may be called strange.")] = 0.05,
    fitted: Annotated[
        bool, typer.Option("--fitted", help="State on the page that the pair was fitted to these very inputs.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="Title of the page. Default: made of the pair's file name.")] = None,
    model: Network = None,
    weights: NetworkWeights = None,
    batch_size: BatchSize = 128,
    workers: Workers = 0,
    size: Size = None,
    mode: Mode = None,
    mean: Mean = None,
    std: Std = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    path: HeadPath = None,
    fold: Fold = True,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write a page about a pair: its head and distributions, how real its samples are, and which inputs are strange.

    A random half of FAMILIAR sets the threshold above which an input is called strange; the other half and all of OTHER
    are judged. With images, the most and the least familiar are shown. The page is one file that loads nothing. Needs
    the extras report and data.

    Example: penult report net.penult.safetensors --data acts-test/ --ood noise=acts-noise/ --out page.html

    Example: penult report net.penult.safetensors --data test.parquet --ood other/ --model mynets:net --out page.html
    """
    # A missing extra is reported before the work.
    from penult._extras import extra
    from penult.cli._inputs import InputsReader
    from penult.report.pair import FAMILIAR, build

    extra("sklearn.metrics", "scikit-learn measures what a page about a pair shows")
    reporter = RichReporter(stderr=as_json)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is {out}; expected a page, for example {out.with_suffix('.html')}")
    sources = _named_sources(ood or [], FAMILIAR)
    for key, source in sources.items():
        if same_source(source, data):
            raise ValueError(f"--ood {key} and --data are the same inputs; give others, or leave --ood out")
    with warnings_as_lines():
        loaded, stored = load_pair_and_score(pair, weight_key, bias_key, device_of(device))
        reader = InputsReader(loaded, pair, context.params, reporter)
        fitted_to = None if reference is None else reader.read(reference, labels=True).activations
        chosen = score_of(loaded, name, stored, fitted_to)
        reporter.line(f"score: {chosen.reason}; higher is stranger")
        familiar = reader.read(data, labels=True)
        others = {key: reader.read(source) for key, source in sources.items()}
        page, results = build(
            loaded,
            familiar.activations,
            {key: inputs.activations for key, inputs in others.items()},
            images=familiar.images,
            other_images={key: inputs.images for key, inputs in others.items() if inputs.images is not None},
            score=chosen.score,
            false_alarm=false_alarm,
            seed=seed,
            fitted=fitted,
            title=title or f"{_stem(pair)}: a head and its pair",
            footer="Made by `penult report`. Every figure on this page was computed by that run.",
            progress=True,
        )
    results["out"] = str(page.write(out))
    reporter.line(
        f"of {results['judged']} familiar inputs {_called_strange(results['false_alarm_measured'], results['judged'])} "
        "are called strange; the bound "
        f"is {results['false_alarm']:.1%} on average over such sets of {results['calibrated_on']}, and "
        f"{results['false_alarm_bound']:.1%} for this one at 95% confidence"
    )
    if results["others"]:
        reporter.table(
            ("other inputs", "count", "called strange", "AUROC", "FPR at 95% TPR"),
            [
                (
                    key,
                    other["count"],
                    _called_strange(other["strange"], other["count"]),
                    f"{own['auroc']:.4f}",
                    f"{own['fpr95']:.1%}",
                )
                for key, other in results["others"].items()
                for own in (other["scores"][results["score"]],)
            ],
        )
    for key, other in results["others"].items():
        if other["hardly_separated"]:
            better = other["better_score"]
            reporter.line(
                f"the alarm hardly tells {key} from the familiar inputs; "
                + (
                    f"{better} does better (AUROC {other['scores'][better]['auroc']:.3f})"
                    if better
                    else "none of the compared scores does better"
                )
            )
    reporter.line(f"{out}")
    if as_json:
        print_json(results)


def _called_strange(rate: float, count: int) -> str:
    return f"{rate:.1%}" if rate * count > 0.5 else "none"


def _stem(pair: str) -> str:
    return Path(pair).name.removesuffix(".safetensors").removesuffix(".penult")


def _named_sources(ood: list[str], taken: str) -> dict[str, str]:
    """Return sources by the names that the page gives them: NAME=SOURCE, or else the last part of the source.

    Raises:
        ValueError: A name is empty, or used twice.
    """
    sources: dict[str, str] = {}
    for text in ood:
        name, equals, source = text.partition("=")
        # A path may have an equals sign in it.
        if not equals or Path(text).exists():
            name, source = Path(text).stem or text, text
        name = name.strip()
        if not name or not source:
            raise ValueError(f"--ood is {text!r}; expected a source, or NAME=SOURCE")
        if name in sources or name == taken:
            raise ValueError(f"--ood {text!r}: the name {name!r} is taken; give another one: --ood NAME={source}")
        sources[name] = source
    return sources
