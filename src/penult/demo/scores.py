"""Part eight: which digits are strange to the classifier, and how many familiar ones it takes for strange."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from penult import scores
from penult.activations import Tap
from penult.data import shift
from penult.demo.job import Job

__all__ = ["tell_strangers"]

_ALARM = 0.05
_SCORES = {"directional": scores.directional, "energy": scores.energy, "msp": scores.msp}


def tell_strangers(job: Job) -> None:
    """Set a threshold on half of the test digits, and judge the other half beside shifted and foreign ones."""
    from penult.report import scores as figures
    from penult.report import thumbnails

    job.reporter.heading("How familiar")
    pair = job.pairs["R^d, elliptic"]
    half = len(job.test.images) // 2
    familiar = job.test_activations.activations
    threshold = scores.Threshold.fit(scores.directional, familiar[:half], pair=pair, false_alarm=_ALARM)
    images = _sets(job.test.images[half:], job.generator(8))
    tap = Tap(job.model, job.head)
    with torch.no_grad():
        acts = {name: tap(each)[0] for name, each in images.items()}
    found = {name: {score: f(pair, h) for score, f in _SCORES.items()} for name, h in acts.items()}
    strange = {name: float(threshold(h).double().mean()) for name, h in acts.items()}
    own = found["digits"]
    parted = {
        name: {score: figures.separation(own[score], values) for score, values in each.items()}
        for name, each in found.items()
        if name != "digits"
    }
    job.results["scores"] = {
        "threshold": threshold.value,
        "false_alarm": _ALARM,
        "false_alarm_bound": threshold.rate_bound(),
        "strange": strange,
        "auroc": {name: {score: one.auroc for score, one in each.items()} for name, each in parted.items()},
    }
    columns = ["", "called strange", *(f"AUROC {score}" for score in _SCORES)]
    rows = [["digits", f"{strange['digits']:.1%}", *("" for _ in _SCORES)]]
    rows += [
        [name, f"{strange[name]:.1%}", *(f"{one.auroc:.3f}" for one in each.values())] for name, each in parted.items()
    ]
    job.reporter.table(columns, rows)

    section = job.page.section(
        "How familiar",
        "An elliptic sphere, fitted to the pool without labels, says how unlikely the *direction* of an activation is "
        f"at its norm. Half of the test digits set a threshold: at most {_ALARM:.0%} of new digits like them will be "
        "called strange, on average over such halves, whatever network and score. The other half is judged by it, and "
        "so is the same half rotated, behind a texture, scrambled, and noise of the same size.",
    )
    section.table(
        columns,
        rows,
        caption="AUROC: how often a stranger has the higher score than a digit, 0.5 by chance. Digits above the "
        f"threshold are false alarms; with 95 % confidence their rate stays below {threshold.rate_bound():.1%}.",
        align="l" + "r" * (len(columns) - 1),
    )
    shown = {name: found[name]["directional"] for name in ("digits", "scrambled", "noise")}
    section.figure(
        figures.spread(shown, threshold.value, "directional score, higher is stranger"),
        caption="The directional score of digits that it was not fitted to, beside scrambled ones and noise.",
        alt="Histograms of the score of digits, scrambled digits and noise, with the threshold; digits lie left.",
    )
    section.text("The strangest of the test digits, with the share of familiar digits that are at least as strange:")
    strangest = own["directional"].argsort(descending=True)[:8]
    p = threshold.p_value(acts["digits"][strangest]).tolist()
    labels = job.test.labels[half:]
    thumbnails.gallery(
        section,
        [
            thumbnails.Thumbnail(
                images["digits"][row], [f"a {labels[row]}", f"p {value:.3f}"], f"A {labels[row]}, p-value {value:.3f}"
            )
            for row, value in zip(strangest.tolist(), p, strict=True)
        ],
    )


def _sets(digits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Digits, and what the classifier was not made for, more and more of it; all (N, 1, 8, 8)."""
    quarters = functional.unfold(digits, 4, stride=4)
    order = torch.rand(len(digits), 1, 4, generator=generator).argsort(-1).expand_as(quarters)
    return {
        "digits": digits,
        "rotated by 22°": shift(digits, "rotation", 0.25),
        "rotated by 45°": shift(digits, "rotation", 0.5),
        "light texture": shift(digits, "texture", 0.25),
        "heavy texture": shift(digits, "texture", 0.6),
        "scrambled": functional.fold(quarters.gather(2, order), digits.shape[-2:], 4, stride=4),
        "noise": torch.rand(digits.shape, generator=generator),
    }
