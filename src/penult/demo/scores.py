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

if TYPE_CHECKING:
    from penult.report import Section

__all__ = ["score_outliers"]

_FALSE_ALARM = 0.05
_SCORES = {"directional": scores.directional, "energy": scores.energy, "msp": scores.msp}
# Sets of inputs whose scores are drawn as histograms.
_HISTOGRAMS = ("digits", "scrambled", "noise")
_PICTURES = 8


def score_outliers(job: Job) -> None:
    """Set a threshold on half of the test digits, and score the other half, changed digits, and noise."""
    from penult.report import scores as figures

    job.reporter.heading("Outlier scores")
    pair = job.pairs["R^d, elliptic"]
    half = len(job.test.images) // 2
    calibration = job.test_activations.activations[:half]
    threshold = scores.Threshold.fit(scores.directional, calibration, pair=pair, false_alarm=_FALSE_ALARM)
    images = _input_sets(job.test.images[half:], job.generator(8))
    tap = Tap(job.model, job.head)
    with torch.no_grad():
        activations = {name: tap(inputs)[0] for name, inputs in images.items()}
    values = {name: {score: f(pair, h) for score, f in _SCORES.items()} for name, h in activations.items()}
    rates = {name: float(threshold(h).double().mean()) for name, h in activations.items()}
    auroc = {
        name: {score: figures.separation(values["digits"][score], by_score[score]).auroc for score in _SCORES}
        for name, by_score in values.items()
        if name != "digits"
    }
    job.results["scores"] = {
        "threshold": threshold.value,
        "false_alarm": _FALSE_ALARM,
        "false_alarm_bound": threshold.rate_bound(),
        "strange": rates,
        "auroc": auroc,
    }
    columns = ["inputs", "above the threshold", *(f"AUROC {score}" for score in _SCORES)]
    rows = [["digits", f"{rates['digits']:.1%}", *("" for _ in _SCORES)]]
    rows += [[name, f"{rates[name]:.1%}", *(f"{v:.3f}" for v in by_score.values())] for name, by_score in auroc.items()]
    job.reporter.table(columns, rows)

    section = job.page.section(
        "Outlier scores",
        "The directional score measures how improbable the *direction* of an activation is, given its norm, under an "
        "elliptic sphere that was fitted to the pool without labels. Half of the test digits set a threshold: on "
        f"average over such choices, at most {_FALSE_ALARM:.0%} of new digits like them are above it, for every "
        "network and score. The table shows the other half of the digits, the same digits rotated, blended with a "
        "texture or scrambled, and random noise.",
    )
    section.table(
        columns,
        rows,
        caption="Unchanged digits above the threshold are false alarms. With 95 % confidence, the false-alarm rate for "
        f"new digits is below {threshold.rate_bound():.1%}. AUROC: probability that an outlier has a higher score than "
        "a digit; 0.5 is chance. Energy and msp (maximum softmax probability) are common scores from the logits.",
        align="l" + "r" * (len(columns) - 1),
    )
    section.figure(
        figures.spread(
            {name: values[name]["directional"] for name in _HISTOGRAMS}, threshold.value, "directional score"
        ),
        caption="Directional score of unchanged digits, scrambled digits and noise; higher means a stranger input.",
        alt="Histograms of the score of digits, scrambled digits and noise, with the threshold. Digits have the lowest "
        "scores.",
    )
    strangest = values["digits"]["directional"].argsort(descending=True)[:_PICTURES]
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
