"""``penult score``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from penult.cli._scores import Chosen, Reference, Score, ScoreName, score_of
from penult.cli._table import check_table, files_and_rows, row_of, shown_row, write_table

if TYPE_CHECKING:
    from torch import Tensor

    from penult.activations import Activations
    from penult.cli._table import Column
    from penult.data import _RowNames
    from penult.pair import GenerativePair
    from penult.scores import Score as StoredScore
    from penult.scores import Threshold

__all__ = ["FalseAlarm", "score"]

_QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "most": 1.0}
_SHOWN = 5  # Inputs with the highest and with the lowest scores.
_FALSE_ALARM = 0.05
_MOST = 0.5  # Fraction of inputs that are called strange below which an alarm works only in part.
_LOGITS = 1 << 24  # Logits that are computed together.


FalseAlarm = Annotated[
    float | None,
    typer.Option(help=f"Fraction of familiar inputs that may be called strange. Default: {_FALSE_ALARM}."),
]


def score(
    context: typer.Context,
    pair: Pair,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Folder that `penult extract` wrote, or an .npz or .safetensors file with activations or features "
            "(N, d) and optionally logits and labels; or, with --model, images: a parquet file, glob or folder, an "
            "image folder, .npz or digits.",
        ),
    ],
    name: Score = None,
    reference: Reference = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FAMILIAR",
            help="Familiar inputs, in the forms of DATA, that neither network nor pair was fitted to: they set a "
            "threshold and give p-values.",
        ),
    ] = None,
    false_alarm: FalseAlarm = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Table with a row for each input, .csv, .parquet or .npz: index, file, row, score, p_value, strange, "
            "verdict, predicted, class_name, confidence. In .csv, text that may be a formula gets an apostrophe "
            "in front."
        ),
    ] = None,
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
    """Score how strange each input is to a network: higher is stranger.

    With --calibrate, an input is called strange if its score is above nearly all scores of familiar inputs. The rate of
    false alarms is then at most --false-alarm, on average over such sets of familiar inputs.

    Example: penult score net.penult.safetensors acts-new/ --calibrate acts-familiar/ --out scores.csv

    Example: penult score net.penult.safetensors photos/ --model mynets:net --weights net.safetensors --score energy
    """
    from penult.activations import _ActivationSource
    from penult.cli._inputs import InputsReader
    from penult.scores import Threshold, _check_calibration

    reporter = RichReporter(stderr=as_json)
    if out is not None:
        check_table(out)
    if false_alarm is not None and calibrate is None:
        raise ValueError("--false-alarm goes with --calibrate, which sets the threshold")
    if reference is not None and calibrate is not None and same_source(reference, calibrate):
        raise ValueError(
            f"--reference and --calibrate are both {calibrate}, but scores of the inputs that a score was fitted to "
            "are too low for a threshold; give other familiar inputs"
        )
    if calibrate is not None and same_source(calibrate, data):
        raise ValueError(
            f"--calibrate and DATA are both {data}, but inputs must not set their own threshold; give other familiar "
            "inputs"
        )
    with warnings_as_lines():
        loaded, stored = load_pair_and_score(pair, weight_key, bias_key, device_of(device))
        reader = InputsReader(loaded, pair, context.params, reporter)
        fitted_to = None if reference is None else reader.read(reference, labels=True).activations
        with reporter.waiting("fitting the score") if fitted_to is not None else nullcontext():
            chosen = score_of(loaded, name, stored, fitted_to)
        reporter.line(f"score: {chosen.reason}; higher is stranger")
        threshold = familiar = None
        if calibrate is not None:
            familiar = reader.read(calibrate, labels=True).activations
            _check_calibration(chosen.score, _ActivationSource(familiar).digest)
            with reporter.waiting(f"scoring {len(familiar)} familiar activations"):
                familiar_scores = _Scores.compute(loaded, chosen.score, familiar, None).score
            # Scores are computed once: the threshold is one of scores, not of activations.
            alarm = _FALSE_ALARM if false_alarm is None else false_alarm
            threshold = Threshold(lambda scores: scores, familiar_scores, alarm)
        inputs = reader.read(data, labels=True)
        acts = inputs.activations
        with reporter.waiting(f"scoring {len(acts)} activations"):
            scores = _Scores.compute(loaded, chosen.score, acts, threshold)
    results = {"data": data, "count": len(scores.score), "score": chosen.name.value, "why": chosen.reason}
    names = loaded.head.class_names or _class_names(familiar, acts)
    table = _table(scores, inputs.row_names, names)
    results |= _summary(scores, table) | _verdicts(scores, calibrate, threshold)
    if familiar is not None:
        sides = (familiar, familiar_scores), (acts, scores.score)
        results |= _separation(loaded, chosen, stored, sides, results)
    if out is not None:
        results["out"] = str(write_table(out, table))
    _report_scores(results, reporter)
    if out is not None:
        reporter.line(f"{out}: {len(acts)} rows")
    if as_json:
        print_json(results)


@dataclass(frozen=True)
class _Scores:
    """The columns of the table: tensors (N,) on the CPU, None without a calibration."""

    index: Tensor
    score: Tensor
    p_value: Tensor | None
    strange: Tensor | None
    predicted: Tensor
    confidence: Tensor

    @classmethod
    def compute(
        cls,
        pair: GenerativePair,
        function: Callable[[Tensor], Tensor],
        acts: Activations,
        threshold: Threshold | None,
    ) -> _Scores:
        """Score activations in blocks."""
        import torch

        from penult.activations import _ActivationSource
        from penult.scores import _raw_logits

        parts = []
        with torch.no_grad():
            for block in _ActivationSource(acts, dtype="wide"):
                for rows in block.to(pair.head.weight.device).split(max(1, _LOGITS // pair.head.num_classes)):
                    top = _raw_logits(pair.head, rows).softmax(-1).max(-1)
                    parts.append((function(rows).cpu(), top.indices.cpu(), top.values.cpu()))
            score, predicted, confidence = (torch.cat(columns) for columns in zip(*parts, strict=True))
            if bool(score.isnan().any()):
                raise ValueError(f"the score of {int(score.isnan().sum())} inputs is NaN; give another --score")
            p_value = strange = None
            if threshold is not None:
                calibrated = score.to(threshold.calibration)
                p_value, strange = threshold.p_value(calibrated).cpu(), threshold(calibrated).cpu()
        return cls(torch.arange(len(score), device="cpu"), score, p_value, strange, predicted, confidence)


def _table(scores: _Scores, row_names: _RowNames | None, names: tuple[str, ...] | None) -> dict[str, Column]:
    """Return the columns of the table; names are those of the network's classes."""
    files, rows = files_and_rows(row_names, len(scores.score))
    strange = scores.strange
    return {
        "index": scores.index,
        "file": files,
        "row": rows,
        "score": scores.score,
        "p_value": scores.p_value,
        "strange": strange,
        "verdict": None if strange is None else ["outlier" if one else "familiar" for one in strange.tolist()],
        "predicted": scores.predicted,
        "class_name": None if names is None else [names[number] for number in scores.predicted.tolist()],
        "confidence": scores.confidence,
    }


def _summary(scores: _Scores, table: Mapping[str, Column]) -> dict[str, Any]:
    """Return quantiles, and the rows of the table with the highest and the lowest scores."""
    order = scores.score.argsort(stable=True)
    ends = {"strangest": order.flip(0)[:_SHOWN], "most_familiar": order[:_SHOWN]}
    return {"quantiles": _quantiles(scores.score)} | {
        end: [row_of(table, i) for i in rows.tolist()] for end, rows in ends.items()
    }


def _quantiles(values: Tensor) -> dict[str, float]:
    # torch.quantile refuses more than 2**24 values.
    ordered = values.double().sort().values
    return {name: float(ordered[round(level * (len(ordered) - 1))]) for name, level in _QUANTILES.items()}


def _verdicts(scores: _Scores, calibrate: str | None, threshold: Threshold | None) -> dict[str, Any]:
    """Return the results that a calibration adds."""
    if threshold is None or scores.strange is None:
        return {}
    return {
        "calibrate": calibrate,
        "calibration_count": len(threshold.calibration),
        "calibration_quantiles": _quantiles(threshold.calibration),
        "threshold": threshold.value,
        "false_alarm": threshold.false_alarm,
        "false_alarm_bound": threshold.rate_bound(),
        "strange": int(scores.strange.sum()),
        "strange_share": float(scores.strange.double().mean()),
    }


def _separation(
    pair: GenerativePair,
    chosen: Chosen,
    stored: StoredScore | None,
    sides: tuple[tuple[Activations, Tensor], tuple[Activations, Tensor]],
    results: Mapping[str, Any],
) -> dict[str, Any]:
    """Return how well the score separates the inputs from familiar ones, and which score does better if it hardly does.

    Args:
        pair: The pair.
        chosen: The score.
        stored: Score that the file of the pair holds.
        sides: Activations and their scores, of familiar inputs and of the inputs.
        results: Results with the fraction of inputs that are called strange.
    """
    from penult import scores
    from penult.scores import _better_score, _hardly_separated

    familiar, inputs = sides
    separations = {chosen.name: scores.separation(familiar[1], inputs[1])}
    own = separations[chosen.name]
    hardly = _hardly_separated(own, results["strange_share"], results["false_alarm"])
    # Other scores are computed only if they are needed.
    if hardly:
        names = [ScoreName.energy, ScoreName.msp]
        names += [ScoreName.directional] if scores.usual(pair) is scores.directional else []
        others = [score_of(pair, name) for name in names]
        others += [] if stored is None else [score_of(pair, None, stored)]
        for other in others:
            if other.name not in separations:
                values = (_Scores.compute(pair, other.score, acts, None).score for acts, _ in sides)
                separations[other.name] = scores.separation(*values)
    by_name = {name.value: one for name, one in separations.items()}
    return {
        "auroc": own.auroc,
        "hardly_separated": hardly,
        "better_score": _better_score(by_name, chosen.name.value) if hardly else None,
        "aurocs": {name: one.auroc for name, one in by_name.items()},
    }


def _separation_in_words(results: Mapping[str, Any]) -> str:
    """Return the sentence on whether the alarm tells the inputs from familiar ones."""
    data, calibrate = results["data"], results["calibrate"]
    auroc = f"AUROC {results['auroc']:.3f}; 0.5 is chance"
    if not results["hardly_separated"]:
        in_part = " in part" if results["strange_share"] < _MOST else ""
        return f"the alarm tells {data} from {calibrate}{in_part} ({auroc})"
    better = results["better_score"]
    return (
        f"the alarm hardly tells {data} from {calibrate} ({auroc}), as it should be if the inputs are familiar. If "
        "they are not, "
        + (
            f"--score {better} does better (AUROC {results['aurocs'][better]:.3f})"
            if better
            else f"neither {results['score']} nor the other scores of the pair see them"
        )
    )


def _class_names(familiar: Activations | None, acts: Activations) -> tuple[str, ...] | None:
    """Return the names of the network's classes.

    Strange inputs may have as many classes as the network and be of none of them, so names count only where the network
    predicts the labels better than by guessing.
    """
    from penult.cli._inputs import label_accuracy

    for candidate in (familiar, acts):
        names = None if candidate is None else candidate.class_names
        if (
            candidate is not None
            and names is not None
            and (candidate.labels is None or not label_accuracy(candidate)[1])
        ):
            return names
    return None


def _report_scores(results: Mapping[str, Any], reporter: RichReporter) -> None:
    """Print quantiles, the strangest and the most familiar inputs, and the verdict."""
    from penult.scores import _share_in_words

    calibrated = "threshold" in results
    rows = [(results["data"], results["count"], *(f"{value:.4g}" for value in results["quantiles"].values()))]
    if calibrated:
        quantiles = results["calibration_quantiles"].values()
        rows.insert(0, (results["calibrate"], results["calibration_count"], *(f"{value:.4g}" for value in quantiles)))
    reporter.table(("scores of", "inputs", *_QUANTILES), rows)
    for title, key in (("strangest", "strangest"), ("most familiar", "most_familiar")):
        reporter.table(
            (title, "score", *(["p-value"] if calibrated else []), "predicted", "confidence"),
            [
                (
                    shown_row(row["file"], row["row"], row["index"]),
                    f"{row['score']:.4g}",
                    *([f"{row['p_value']:.4f}"] if calibrated else []),
                    row["predicted"] if row["class_name"] is None else row["class_name"],
                    f"{row['confidence']:.3f}",
                )
                for row in results[key]
            ],
        )
    if not calibrated:
        reporter.line("No threshold set; pass --calibrate FAMILIAR to get one, with p-values.")
        return
    reporter.line(_separation_in_words(results))
    reporter.line(
        f"strange: {_share_in_words(results['strange'], results['count'])}, with a score above "
        f"{results['threshold']:.4g}"
    )
    reporter.line(
        f"of familiar inputs like those of {results['calibrate']}, at most {_percent(results['false_alarm'])} are "
        f"called strange on average over such sets of {results['calibration_count']}; with this set, at most "
        f"{_percent(results['false_alarm_bound'])} at 95% confidence. There is no such bound if network or pair were "
        "fitted to these inputs, or for inputs of another kind"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}%"
