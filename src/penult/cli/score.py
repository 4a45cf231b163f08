"""``penult score``."""

from __future__ import annotations

import csv
import io as memory
import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Size,
    Std,
    WeightKey,
    Workers,
)

if TYPE_CHECKING:
    from torch import Tensor

    from penult.activations import Activations
    from penult.pair import GenerativePair
    from penult.scores import Threshold

__all__ = ["ScoreName", "same_source", "score", "score_of"]

_QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "most": 1.0}
_SHOWN = 5  # inputs at either end
_FALSE_ALARM = 0.05
_LOGITS = 1 << 24  # at a time


class ScoreName(str, Enum):
    """Scores that a pair gives without a fit of their own."""

    directional = "directional"
    energy = "energy"
    max_logit = "max-logit"
    msp = "msp"
    density = "density"


FalseAlarm = Annotated[
    float | None,
    typer.Option(help=f"Share of familiar inputs that may be called strange. Default: {_FALSE_ALARM}."),
]


def score(
    context: typer.Context,
    pair: Pair,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder that penult extract wrote; or images, with --model: a parquet file, glob or folder, an "
            "image folder, .npz or digits.",
        ),
    ],
    name: Annotated[
        ScoreName | None,
        typer.Option("--score", help="Which score. Default: directional on a sphere, else energy."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FAMILIAR",
            help="Familiar inputs, in the forms of DATA, that neither network nor pair was fitted to: with them come "
            "p-values and a verdict.",
        ),
    ] = None,
    false_alarm: FalseAlarm = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a row for each input, .csv or .npz: index, score, p_value, strange, predicted, ..."),
    ] = None,
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
    seed: Annotated[int, typer.Option(help="Seed of what the model's factory and network draw.", min=0)] = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Say how strange each input is to a network: higher is stranger.

    With --calibrate, an input is called strange if its score is above nearly all scores of familiar ones; the rate of
    false alarms is then what --false-alarm asks for, on average over such familiar sets.

    Example: penult score net.penult.safetensors acts-new/ --calibrate acts-familiar/ --out scores.csv

    Example: penult score net.penult.safetensors photos/ --model mynets:net --weights net.safetensors --score energy
    """
    from penult.cli._inputs import InputsReader
    from penult.scores import Threshold

    reporter = RichReporter(stderr=as_json)
    if out is not None and out.suffix not in (".csv", ".npz"):
        raise ValueError(f"--out {out}: scores are written to a table, name.csv, or to arrays, name.npz")
    if false_alarm is not None and calibrate is None:
        raise ValueError("--false-alarm goes with --calibrate: familiar inputs say which scores are usual")
    if calibrate is not None and same_source(calibrate, data):
        raise ValueError(
            f"--calibrate and DATA are both {data}: what is judged must not set the threshold; give other familiar "
            "inputs"
        )
    alarm = _FALSE_ALARM if false_alarm is None else false_alarm
    with warnings_as_lines():
        law = load_pair(pair, weight_key, bias_key).to(device_of(device))
        function, why = score_of(law, name)
        reporter.line(f"score: {why}; higher is stranger")
        reader = InputsReader(law, pair, reporter, model, context.params, seed)
        threshold = familiar = None
        if calibrate is not None:
            familiar = reader.read(calibrate, labels=True).activations
            with reporter.waiting(f"scoring {len(familiar)} familiar activations"):
                usual = _Scored.of(law, function, familiar, None).score
            threshold = Threshold(_itself, usual, alarm)  # of scores, which are computed once
        acts = reader.read(data, labels=True).activations
        with reporter.waiting(f"scoring {len(acts)} activations"):
            found = _Scored.of(law, function, acts, threshold)
    facts = _facts(found, data, calibrate, threshold, why, function)
    _tell(found, facts, _names(familiar, acts), threshold, calibrate, reporter)
    if out is not None:
        facts["out"] = str(_write(out, found))
        reporter.line(f"{out}: {len(acts)} rows")
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


def score_of(pair: GenerativePair, name: ScoreName | None) -> tuple[Callable[[GenerativePair, Tensor], Tensor], str]:
    """The score of a name, or the one that fits the base, and why it is that one.

    Raises:
        ValueError: The base does not give it.
    """
    from penult import scores
    from penult.bases import Sphere

    base = pair.base
    sphere = base if isinstance(base, Sphere) else None
    what = f"{'an' if base.info.name[0] in 'aeiou' else 'a'} {base.info.name}"
    if name is ScoreName.directional and sphere is None:
        raise ValueError(
            f"--score directional needs a pair on a sphere, and the base of this one is {what}: penult fit --base "
            "elliptic makes one; or leave --score out"
        )
    if name is ScoreName.density and not base.info.has_density:
        raise ValueError(f"--score density needs a density, which this base, {what}, does not have; leave --score out")
    if name is not None:
        why = f"{name.value}, as asked"
    elif scores.usual(pair) is scores.energy:
        reason = (
            "without a law of directions: penult fit --base elliptic gives one, and mostly tells more"
            if sphere is None
            else "in one dimension, which has two directions"
        )
        name, why = ScoreName.energy, f"energy, since the base is {what} {reason}"
    else:
        name, why = ScoreName.directional, f"directional, since the base is {what}"
        if sphere is not None and sphere.scale_tril is None:
            why += "; penult fit --base elliptic makes a sphere that tells more"
    found: Callable[[GenerativePair, Tensor], Tensor] = getattr(scores, name.value.replace("-", "_"))
    return found, why


@dataclass(frozen=True)
class _Scored:
    """What is written of each input: tensors (N,) on the CPU."""

    score: Tensor
    predicted: Tensor
    confidence: Tensor
    p_value: Tensor | None
    strange: Tensor | None

    @classmethod
    def of(
        cls,
        pair: GenerativePair,
        function: Callable[[GenerativePair, Tensor], Tensor],
        acts: Activations,
        threshold: Threshold | None,
    ) -> _Scored:
        import torch

        from penult.activations import _ActivationSource
        from penult.scores import _raw_logits

        parts = []
        with torch.no_grad():
            for block in _ActivationSource(acts, dtype="wide"):
                for rows in block.to(pair.head.weight.device).split(max(1, _LOGITS // pair.head.num_classes)):
                    top = _raw_logits(pair.head, rows).softmax(-1).max(-1)
                    parts.append((function(pair, rows).cpu(), top.indices.cpu(), top.values.cpu()))
            score, predicted, confidence = (torch.cat(each) for each in zip(*parts, strict=True))
            if bool(score.isnan().any()):
                raise ValueError(
                    f"the score of {int(score.isnan().sum())} inputs is not a number; take another --score"
                )
            if threshold is None:
                return cls(score, predicted, confidence, None, None)
            on = score.to(threshold.calibration)
            return cls(score, predicted, confidence, threshold.p_value(on).cpu(), threshold(on).cpu())

    def columns(self) -> dict[str, Tensor | None]:
        """By the name that files give them, in their order."""
        import torch

        return {
            "index": torch.arange(len(self.score)),
            "score": self.score,
            "p_value": self.p_value,
            "strange": self.strange,
            "predicted": self.predicted,
            "confidence": self.confidence,
        }

    def row(self, index: int) -> dict[str, Any]:
        return {name: None if column is None else column[index].item() for name, column in self.columns().items()}


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _itself(scores: Tensor) -> Tensor:
    return scores


def same_source(one: str, other: str) -> bool:
    """Whether two sources of inputs are one."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def _names(familiar: Activations | None, acts: Activations) -> tuple[str, ...] | None:
    """Names of the classes of the network: strange inputs may have as many classes, and be none of them."""
    from penult.cli._inputs import right_answers

    for each in (familiar, acts):
        if each is not None and each.class_names is not None and (each.labels is None or not right_answers(each)[1]):
            return each.class_names
    return None


def _facts(
    found: _Scored,
    data: str,
    calibrate: str | None,
    threshold: Threshold | None,
    why: str,
    function: Callable[..., Any],
) -> dict[str, Any]:
    order = found.score.argsort(stable=True)
    facts: dict[str, Any] = {
        "data": data,
        "count": len(order),
        "score": function.__name__.replace("_", "-"),
        "why": why,
        "quantiles": _quantiles(found.score),
        "strangest": [found.row(int(i)) for i in order.flip(0)[:_SHOWN]],
        "most_familiar": [found.row(int(i)) for i in order[:_SHOWN]],
    }
    if threshold is not None and found.strange is not None:
        facts |= {
            "calibrate": calibrate,
            "calibration_count": len(threshold.calibration),
            "calibration_quantiles": _quantiles(threshold.calibration),
            "threshold": threshold.value,
            "false_alarm": threshold.false_alarm,
            "false_alarm_bound": threshold.rate_bound(),
            "strange": int(found.strange.sum()),
            "strange_share": float(found.strange.double().mean()),
        }
    return facts


def _quantiles(values: Tensor) -> dict[str, float]:
    ordered = values.double().sort().values  # torch.quantile refuses more than 2**24
    places = {name: round(share * (len(ordered) - 1)) for name, share in _QUANTILES.items()}
    return {name: float(ordered[place]) for name, place in places.items()}


def _tell(
    found: _Scored,
    facts: dict[str, Any],
    names: tuple[str, ...] | None,
    threshold: Threshold | None,
    calibrate: str | None,
    reporter: RichReporter,
) -> None:
    rows = [(facts["data"], facts["count"], *(f"{value:.4g}" for value in facts["quantiles"].values()))]
    if threshold is not None:
        usual = facts["calibration_quantiles"].values()
        rows.insert(0, (calibrate, facts["calibration_count"], *(f"{value:.4g}" for value in usual)))
    reporter.table(("scores of", "inputs", *_QUANTILES), rows)
    shown = {"strangest": facts["strangest"], "most familiar": facts["most_familiar"]}
    for title, picked in shown.items():
        reporter.table(
            (title, "score", *(["p-value"] if threshold is not None else []), "predicted", "confidence"),
            [
                (
                    f"index {row['index']}",
                    f"{row['score']:.4g}",
                    *([f"{row['p_value']:.4f}"] if threshold is not None else []),
                    row["predicted"] if names is None else names[row["predicted"]],
                    f"{row['confidence']:.3f}",
                )
                for row in picked
            ],
        )
    if threshold is not None:
        reporter.line(
            f"strange: {facts['strange']} of {facts['count']} ({facts['strange_share']:.1%}), whose score is above "
            f"{facts['threshold']:.4g}"
        )
        reporter.line(
            f"of familiar inputs that are like those of {calibrate}, at most {_percent(facts['false_alarm'])} are "
            f"called strange on average over such sets of {facts['calibration_count']}; with this very set, at most "
            f"{_percent(facts['false_alarm_bound'])} at 95% confidence. Nothing is promised if network or pair were "
            "fitted to them, or for inputs of another kind"
        )
    else:
        reporter.line("what is strange is for you to say: --calibrate FAMILIAR sets a threshold, and gives p-values")


def _write(out: Path, found: _Scored) -> Path:
    from penult import io

    if out.suffix == ".csv":
        return io.write_bytes(out, _csv(found))
    from penult._extras import extra

    numpy = extra("numpy", f"--out {out} is written by NumPy")
    buffer = memory.BytesIO()
    numpy.savez(buffer, **{name: column.numpy() for name, column in found.columns().items() if column is not None})
    return io.write_bytes(out, buffer.getvalue())


def _csv(found: _Scored) -> bytes:
    """A table with all columns, those that ask for a calibration empty without one."""
    columns = found.columns()
    digits = 17 if found.score.dtype.itemsize > 4 else 9  # which give the number back
    cells = [
        [""] * len(found.score) if column is None else [_cell(value, digits) for value in column.tolist()]
        for column in columns.values()
    ]
    text = memory.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*cells, strict=True))
    return text.getvalue().encode()


def _cell(value: float, digits: int) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"
