"""Sections of the page on a pair that are about scores, and the pictures of inputs at either end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from penult.activations import Activations
from penult.report import scores as figures
from penult.report._pair_sections import labels_of, share
from penult.report.page import Page
from penult.report.thumbnails import Thumbnail, gallery
from penult.scores import Threshold

__all__ = ["FAMILIAR", "Images", "ScoredSet", "familiarity", "pictured"]

FAMILIAR = "familiar"  # what the first set is called

_DRAWN = 5  # sets in a figure
_THUMBNAILS = 8  # at either end
_LETTERS = 60  # of a name above them

Images = Sequence[Any] | Any  # of items (C, H, W), or tuples that begin with one


@dataclass(frozen=True)
class ScoredSet:
    """What is known of one set, on the CPU: scores (N,) by name, predictions (N,), mean posterior (K,)."""

    scores: dict[str, Tensor]
    predicted: Tensor
    confidence: Tensor
    posterior: Tensor
    gap: float  # from the pair's posterior to the softmax of its head
    bar: float  # which that gap has to keep in the precision that it is computed in
    stored_gap: float  # from that to the softmax of the logits that are stored
    constant: bool


def familiarity(
    made: Page,
    sets: Mapping[str, ScoredSet],
    keep: Mapping[str, Tensor],
    chosen: str,
    threshold: Threshold,
    fitted: bool,
) -> dict[str, Any]:
    """The section on scores, the threshold and how it fared; and its figures."""
    shown = labels_of(sets)
    values = {name: each.scores[chosen][keep[name]] for name, each in sets.items()}
    strange = {name: threshold(each.to(threshold.calibration)) for name, each in values.items()}
    rates = {name: float(each.double().mean()) for name, each in strange.items()}
    alarm, bound = threshold.false_alarm, threshold.rate_bound()
    n, judged = len(threshold.calibration), len(values[FAMILIAR])
    section = made.section(
        "How familiar",
        f"The score is *{chosen}*; higher is stranger. {n} familiar activations, chosen at random, set the threshold, "
        f"and the other {judged} are judged by it. Of inputs like these it calls at most {share(alarm)} strange, on "
        f"average over such sets of {n}; the rate of this very threshold lies below {share(bound)} at 95 % confidence. "
        "That holds for any network and score, as long as inputs are like the familiar ones and neither pair nor "
        "network were fitted to these. It says nothing of how many strange inputs are found.",
    )
    if fitted:
        section.text(
            "**The base was fitted to these very activations**, so that false alarms may be more than it says."
        )
    section.facts(
        {
            "threshold": threshold.value,
            "false alarms, asked": share(alarm),
            "false alarms, measured": share(rates[FAMILIAR]),
        }
    )
    drawn = [FAMILIAR, *[name for name in sets if name != FAMILIAR][:_DRAWN]]
    first = "" if len(drawn) == len(sets) else f" The first {_DRAWN} of {len(sets) - 1} other sets."
    section.figure(
        figures.spread({shown[name]: values[name] for name in drawn}, threshold.value, f"{chosen} score"),
        caption=f"The score of the judged familiar inputs{' and of others' if len(sets) > 1 else ''}; the outermost "
        f"bars also hold what lies beyond.{first}",
        alt=f"Histograms of {chosen} for {', '.join(drawn)}, with the threshold at {threshold.value:.4g}.",
    )
    rows = [
        [
            name,
            len(values[name]),
            int(strange[name].sum()),
            share(rates[name]),
            share(_error(rates[name], values[name])),
        ]
        for name in sets
    ]
    section.table(
        ["set", "inputs", "called strange", "share", "± standard error"],
        rows,
        caption=f"What is above the threshold. Of the judged familiar inputs {share(rates[FAMILIAR])} are, where at "
        f"most {share(alarm)} was asked for.",
        align="lrrrr",
    )
    facts: dict[str, Any] = {
        "score": chosen,
        "threshold": threshold.value,
        "false_alarm": alarm,
        "false_alarm_bound": bound,
        "false_alarm_measured": rates[FAMILIAR],
        "calibrated_on": n,
        "judged": judged,
        "others": {},
    }
    if len(sets) == 1:
        return facts
    parted = {
        name: {each: figures.separation(sets[FAMILIAR].scores[each][keep[FAMILIAR]], of) for each, of in own.items()}
        for name, own in ((name, one.scores) for name, one in sets.items() if name != FAMILIAR)
    }
    section.figure(
        figures.roc({shown[name]: parted[name][chosen] for name in drawn[1:]}),
        caption=f"What each threshold on {chosen} finds of strange inputs, and what it costs in false alarms.{first}",
        alt="ROC curves: " + "; ".join(f"{name} has an area of {parted[name][chosen].auroc:.3f}" for name in drawn[1:]),
    )
    section.table(
        ["set", "score", "AUROC", "FPR at 95 % TPR"],
        [
            [name, f"**{each}**" if each == chosen else each, f"{one.auroc:.4f}", share(one.fpr95)]
            for name, found in parted.items()
            for each, one in found.items()
        ],
        caption="The chosen score beside the usual ones of the head's own logits. AUROC: how often a strange input has "
        "the higher score than a familiar one, 0.5 by chance. FPR at 95 % TPR: the share of strange inputs that pass "
        "for familiar where 95 % of familiar ones do.",
        align="llrr",
    )
    facts["others"] = {
        name: {
            "count": len(values[name]),
            "strange": rates[name],
            "scores": {each: {"auroc": one.auroc, "fpr95": one.fpr95} for each, one in found.items()},
        }
        for name, found in parted.items()
    }
    return facts


def _error(rate: float, values: Tensor) -> float:
    return math.sqrt(rate * (1 - rate) / len(values))


def pictured(
    made: Page,
    sets: Mapping[str, ScoredSet],
    keep: Mapping[str, Tensor],
    chosen: str,
    threshold: Threshold,
    pictures: Mapping[str, Images],
    names: Sequence[str],
    familiar: Activations,
) -> None:
    """The section of the inputs at either end of the score."""
    section = made.section(
        "Most and least familiar inputs",
        "Below each input stand the class that the head takes it for and its p-value: the share of familiar inputs "
        "that are at least as strange. Of the familiar set only those that are judged are looked at.",
    )
    for name, images in pictures.items():
        one = sets[name]
        order = keep[name][one.scores[chosen][keep[name]].argsort(stable=True)]
        ends = order[:_THUMBNAILS], order[_THUMBNAILS:].flip(0)[:_THUMBNAILS]
        labels = familiar.labels if name == FAMILIAR else None
        for what, places in zip(("most familiar", "least familiar"), ends, strict=True):
            if not len(places):
                continue
            shown = name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…"
            section.text(f"The {what} of {'the familiar inputs' if name == FAMILIAR else f'“{shown}”'}:")
            p = threshold.p_value(one.scores[chosen][places].to(threshold.calibration)).tolist()
            gallery(
                section,
                [
                    _thumbnail(images[place], name, place, one, chosen, p_value, names, labels)
                    for place, p_value in zip(places.tolist(), p, strict=True)
                ],
            )


def _thumbnail(
    item: Any,
    name: str,
    place: int,
    one: ScoredSet,
    chosen: str,
    p_value: float,
    names: Sequence[str],
    labels: Tensor | None,
) -> Thumbnail:
    guess, value = names[int(one.predicted[place])], float(one.scores[chosen][place])
    true = None if labels is None else names[int(labels[place])]
    lines = [guess, f"p {p_value:.3f}", *([f"label {true}"] if true not in (None, guess) else [])]
    alt = (
        f"Input {place} of {name}, taken for {guess} at {float(one.confidence[place]):.2f}, "
        f"{chosen} {value:.4g}, p-value {p_value:.3f}" + ("" if true is None else f", label {true}")
    )
    return Thumbnail(item[0] if isinstance(item, tuple | list) else item, lines, alt)
