"""Part eight of the demo: outlier scores of unusual digits, and the false-alarm rate on usual ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penult import scores
from penult.activations import Tap
from penult.data import shift
from penult.demo.job import Job
from penult.scores import _hardly_separated

if TYPE_CHECKING:
    from penult.report import Section

__all__ = ["score_outliers"]

_FALSE_ALARM = 0.05
_CHOSEN = "composite"
# Sets of inputs whose scores are drawn as histograms.
_HISTOGRAMS = ("digits", "scrambled", "noise")
_PICTURES = 8


def score_outliers(job: Job) -> None:
    """Set a threshold on half of the test digits, and score the other half, changed digits, and noise."""
    from penult.report import scores as figures

    job.reporter.heading("Outlier scores")
    pair = job.pairs["R^d, elliptic"]
    score = job.score = scores.Composite.fit(pair, job.pool_activations)
    functions = {_CHOSEN: score} | {
        function.__name__: scores.PairScore(function, pair)
        for function in (scores.directional, scores.energy, scores.msp)
    }
    half = len(job.test.images) // 2
    calibration = job.test_activations.activations[:half]
    threshold = scores.Threshold.fit(score, calibration, false_alarm=_FALSE_ALARM)
    images = _input_sets(job.test.images[half:], job.generator(8))
    tap = Tap(job.model, job.head)
    with torch.no_grad():
        activations = {name: tap(inputs)[0] for name, inputs in images.items()}
        values = {name: {key: f(h) for key, f in functions.items()} for name, h in activations.items()}
    rates = {name: float(threshold(h).double().mean()) for name, h in activations.items()}
    separations = {
        name: {key: scores.separation(values["digits"][key], by_score[key]) for key in functions}
        for name, by_score in values.items()
        if name != "digits"
    }
    auroc = {name: {key: one.auroc for key, one in by_score.items()} for name, by_score in separations.items()}
    weak = [name for name, one in separations.items() if _hardly_separated(one[_CHOSEN], rates[name], _FALSE_ALARM)]
    job.results["scores"] = {
        "threshold": threshold.value,
        "false_alarm": _FALSE_ALARM,
        "false_alarm_bound": threshold.rate_bound(),
        "strange": rates,
        "auroc": auroc,
        "hardly_separated": weak,
    }
    columns = ["inputs", "above the threshold", *(f"AUROC {key}" for key in functions)]
    rows = [["digits", f"{rates['digits']:.1%}", *("" for _ in functions)]]
    rows += [[name, f"{rates[name]:.1%}", *(f"{v:.3f}" for v in by_score.values())] for name, by_score in auroc.items()]
    job.reporter.table(columns, rows)

    section = job.page.section(
        "Outlier scores",
        "The composite score is the sum of three: how improbable the *direction* of an activation is under an elliptic "
        "sphere, how far the activation is from the nearest class mean, and how uncertain the head is. It was fitted "
        "to the pool without labels. Half of the test digits set a threshold: on "
        f"average over such choices, at most {_FALSE_ALARM:.0%} of new digits like them are above it, for every "
        "network and score. The table shows the other half of the digits, the same digits rotated, blended with a "
        "texture or scrambled, and random noise.",
    )
    if weak:
        section.text(f"**The alarm hardly tells these from unchanged digits**: {', '.join(weak)}.")
    section.table(
        columns,
        rows,
        caption="Unchanged digits above the threshold are false alarms. With 95 % confidence, the false-alarm rate for "
        f"new digits is below {threshold.rate_bound():.1%}. AUROC: probability that an outlier has a higher score than "
        "a digit; 0.5 is chance. Directional is a part of composite; energy and msp (maximum softmax probability) are "
        "common scores from the logits.",
        align="l" + "r" * (len(columns) - 1),
    )
    section.figure(
        figures.spread({name: values[name][_CHOSEN] for name in _HISTOGRAMS}, threshold.value, f"{_CHOSEN} score"),
        caption="Composite score of unchanged digits, scrambled digits and noise; higher means a stranger input.",
        alt="Histograms of the score of digits, scrambled digits and noise, with the threshold. Digits have the lowest "
        "scores.",
    )
    strangest = values["digits"][_CHOSEN].argsort(descending=True)[:_PICTURES]
    p_values = threshold.p_value(activations["digits"][strangest])
    _pictures(section, images["digits"][strangest], job.test.labels[half:][strangest], p_values)


def _pictures(section: Section, images: Tensor, labels: Tensor, p_values: Tensor) -> None:
    """Add pictures of the digits with the highest scores to a section."""
    from penult.report.thumbnails import Thumbnail, gallery

    section.text(
        "These unchanged test digits have the highest scores. The p-value is the fraction of familiar digits that are "
        "at least as strange."
    )
    items: list[tuple[Any, int, float]] = list(zip(images, labels.tolist(), p_values.tolist(), strict=True))
    gallery(
        section,
        [
            Thumbnail(image, [f"label {label}", f"p {p:.3f}"], f"A digit with label {label}, p-value {p:.3f}")
            for image, label, p in items
        ],
    )


def _input_sets(digits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return digits, changed digits and noise, all (N, 1, 8, 8), from familiar to unfamiliar inputs."""
    quarters = F.unfold(digits, 4, stride=4)
    order = torch.rand(len(digits), 1, 4, generator=generator, device="cpu").argsort(-1).expand_as(quarters)
    return {
        "digits": digits,
        "rotated by 22°": shift(digits, "rotation", 0.25),
        "rotated by 45°": shift(digits, "rotation", 0.5),
        "light texture": shift(digits, "texture", 0.25),
        "heavy texture": shift(digits, "texture", 0.6),
        "scrambled": F.fold(quarters.gather(2, order), digits.shape[-2:], 4, stride=4),
        "noise": torch.rand(digits.shape, generator=generator, device="cpu"),
    }
