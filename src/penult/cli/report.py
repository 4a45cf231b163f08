"""``penult report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from penult.cli._console import RichReporter, warnings_as_lines
from penult.cli._models import device_of, load_pair
from penult.cli._options import (
    AsJson,
    BatchSize,
    BiasKey,
    Device,
    Fold,
    HeadPath,
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
from penult.cli.score import ScoreName, same_source, score_of

__all__ = ["report"]


def report(
    context: typer.Context,
    pair: Pair,
    data: Annotated[
        str,
        typer.Option(
            metavar="FAMILIAR",
            help="Inputs such as the network is meant for, that it was not trained on: a folder that penult extract "
            "wrote; or images, with --model: a parquet file, glob or folder, an image folder, .npz or digits.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, name.html.")],
    ood: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]OTHER", help="Other inputs to hold against them, in the same forms; repeatable."),
    ] = None,
    name: Annotated[
        ScoreName | None,
        typer.Option("--score", help="Which score. Default: directional on a sphere, else energy."),
    ] = None,
    false_alarm: Annotated[float, typer.Option(help="Share of familiar inputs that may be called strange.")] = 0.05,
    fitted: Annotated[
        bool, typer.Option("--fitted", help="The pair was fitted to these very inputs; the page then says so.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="Name of the page; else the pair's file.")] = None,
    model: Network = None,
    weights: NetworkWeights = None,
    batch_size: BatchSize = 128,
    workers: Workers = 0,
    size: Size = None,
    mode: Mode = None,
    mean: Mean = None,
    std: Std = None,
    path: HeadPath = None,
    fold: Fold = True,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write one page on a pair: its head and laws, how real its draws are, and which inputs are strange to it.

    Half of FAMILIAR, chosen at random, sets the threshold above which an input is called strange; the other half and
    all of OTHER are judged. With images, the most and the least familiar are shown. The page is one file that loads
    nothing. Needs the extras report and data.

    Example: penult report net.penult.safetensors --data acts-test/ --ood noise=acts-noise/ --out page.html

    Example: penult report net.penult.safetensors --data test.parquet --ood other/ --model mynets:net --out page.html
    """
    from penult._extras import extra
    from penult.cli._inputs import InputsReader
    from penult.report.pair import FAMILIAR, build  # a missing extra is better said before the work

    extra("sklearn.metrics", "a page on a pair is measured with scikit-learn")
    reporter = RichReporter(stderr=as_json)
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out} is a page, so name it such as {out.with_suffix('.html')}")
    named = _named(ood or [], FAMILIAR)
    for each, source in named.items():
        if same_source(source, data):
            raise ValueError(f"--ood {each} and --data are the same inputs; give others, or leave --ood out")
    with warnings_as_lines():
        law = load_pair(pair, weight_key, bias_key).to(device_of(device))
        function, why = score_of(law, name)
        reporter.line(f"score: {why}; higher is stranger")
        reader = InputsReader(law, pair, reporter, model, context.params, seed)
        familiar = reader.read(data, labels=True)
        others = {each: reader.read(source) for each, source in named.items()}
        page, facts = build(
            law,
            familiar.activations,
            {each: found.activations for each, found in others.items()},
            images=familiar.images,
            other_images={each: found.images for each, found in others.items() if found.images is not None},
            score=function,
            false_alarm=false_alarm,
            seed=seed,
            fitted=fitted,
            title=title or f"{_stem(pair)}: a head and its pair",
            footer="Made by `penult report`. Every figure on this page was computed by that run.",
            progress=True,
        )
    reporter.line(
        f"of {facts['judged']} familiar inputs {facts['false_alarm_measured']:.1%} are called strange; at most "
        f"{facts['false_alarm']:.1%} were to be, on average over such sets of {facts['calibrated_on']}, and at "
        f"most {facts['false_alarm_bound']:.1%} for this one with 95% confidence"
    )
    if facts["others"]:
        reporter.table(
            ("other inputs", "count", "called strange", "AUROC", "FPR at 95% TPR"),
            [
                (each, one["count"], f"{one['strange']:.1%}", f"{own['auroc']:.4f}", f"{own['fpr95']:.1%}")
                for each, one in facts["others"].items()
                for own in (one["scores"][facts["score"]],)
            ],
        )
    facts["out"] = str(page.write(out))
    reporter.line(f"{out}")
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


def _stem(pair: str) -> str:
    return Path(pair).name.removesuffix(".safetensors").removesuffix(".penult")


def _named(ood: list[str], taken: str) -> dict[str, str]:
    """Sources by the names that the page gives them: NAME=SOURCE, or else the last part of the source.

    Raises:
        ValueError: A name is empty, or used twice.
    """
    found: dict[str, str] = {}
    for each in ood:
        name, equals, source = each.partition("=")
        if not equals or Path(each).exists():  # a path may have an equals sign in it
            name, source = Path(each).stem or each, each
        name = name.strip()
        if not name or not source:
            raise ValueError(f"--ood {each!r} is neither a source nor NAME=SOURCE")
        if name in found or name == taken:
            raise ValueError(f"--ood {each!r}: the name {name!r} is taken; give another one: --ood NAME={source}")
        found[name] = source
    return found
