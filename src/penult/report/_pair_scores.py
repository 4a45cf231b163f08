"""Sections of the page on a pair about outlier scores, with pictures of the inputs at both ends of the score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from penult.report import scores as figures
from penult.report.markup import percent, shorten
from penult.report.page import Page, Section
from penult.report.thumbnails import Thumbnail, gallery
from penult.scores import Separation, Threshold, _better_score, _hardly_separated, _share_in_words, separation

__all__ = ["FAMILIAR", "Images", "ScoredSet", "Scores", "familiarity", "pictured"]

# Name of the set of familiar inputs.
FAMILIAR = "familiar"

# Other sets in one figure.
_SHOWN_SETS = 5
# Fraction of a set that an alarm has to detect to work, and not only in part.
_MOST = 0.5
# Pictures at each end of the score.
_PICTURES = 8
# Letters of the name of a set above pictures, and in figures.
_LETTERS, _FIGURE_LETTERS = 60, 28

# A sequence of images (C, H, W), or of tuples that begin with one.
Images = Sequence[Any] | Any


@dataclass(frozen=True)
class ScoredSet:
    """One set of inputs as read by the pair; tensors are on the CPU.

    Attributes:
        scores: Scores (N,) by name.
        predicted: Predicted classes (N,).
        confidence: Largest class probabilities (N,).
        posterior: Mean class probabilities (K,).
        gap: Largest difference between the pair's posterior and the softmax of its head.
        gap_limit: Limit of `gap` in the precision of the computation.
        stored_gap: Largest difference between the softmax of the head and that of the stored logits.
        constant: Whether all activations are the same.
        digest: Digest of the activations.
    """

    scores: dict[str, Tensor]
    predicted: Tensor
    confidence: Tensor
    posterior: Tensor
    gap: float
    gap_limit: float
    stored_gap: float
    constant: bool
    digest: str


@dataclass(frozen=True)
class Scores:
    """Scores of all sets, and the threshold of one of the scores.

    Attributes:
        sets: Sets by name; the first is the familiar one.
        rows: Numbers of the rows of each set that are compared with the threshold.
        name: Name of the score that the threshold belongs to.
        threshold: The threshold, which takes scores instead of activations.
    """

    sets: Mapping[str, ScoredSet]
    rows: Mapping[str, Tensor]
    name: str
    threshold: Threshold

    @property
    def others(self) -> list[str]:
        """Names of all sets but the familiar one."""
        return [name for name in self.sets if name != FAMILIAR]

    def of(self, set_name: str, score: str | None = None) -> Tensor:
        """Return one score of the compared rows of a set. Default: the score of the threshold."""
        return self.sets[set_name].scores[score or self.name][self.rows[set_name]]

    def num_above(self, set_name: str) -> int:
        """Return the number of compared rows of a set that are above the threshold."""
        return int(self.threshold(self.of(set_name).to(self.threshold.calibration)).sum())

    def rate(self, set_name: str) -> float:
        """Return the fraction of compared rows of a set that are above the threshold."""
        return self.num_above(set_name) / len(self.rows[set_name])

    def separations(self, set_name: str) -> dict[str, Separation]:
        """Return how well each score separates a set from the familiar one, by name of the score."""
        return {
            score: separation(self.of(FAMILIAR, score), self.of(set_name, score))
            for score in self.sets[set_name].scores
        }


def labels_of(names: Sequence[str], letters: int = _FIGURE_LETTERS) -> dict[str, str]:
    """Return labels for names in a figure, all different and none of them "threshold" or "chance".

    Example:
        >>> labels_of(["familiar", "chance", "noise"], letters=6)
        {'familiar': 'famil…', 'chance': 'chance (2)', 'noise': 'noise'}
    """
    labels: dict[str, str] = {}
    taken = {"threshold", "chance"}
    for name in names:
        label = plain = shorten(name, letters)
        numbers = count(2)
        while label in taken:
            label = f"{plain} ({next(numbers)})"
        labels[name] = label
        taken.add(label)
    return labels


def familiarity(page: Page, scored: Scores, fitted: bool, fitted_score: bool) -> dict[str, Any]:
    """Add the section on outlier scores and the threshold, and return its numbers for JSON.

    Args:
        page: The page.
        scored: Scores of all sets.
        fitted: Whether the base was fitted to the familiar activations.
        fitted_score: Whether the score was.
    """
    threshold = scored.threshold
    alarm, bound = threshold.false_alarm, threshold.rate_bound()
    calibrated_on, judged = len(threshold.calibration), len(scored.rows[FAMILIAR])
    separations = {name: scored.separations(name) for name in scored.others}
    weak = [name for name, by_score in separations.items() if _is_weak(scored, name, by_score)]
    better = {name: _better_score(separations[name], scored.name) for name in weak}
    section = page.section("Outlier scores", _verdict(scored, separations, better))
    section.text(
        f"Each input gets a score, *{scored.name}*; a higher score means a stranger input. Inputs above a threshold "
        f"are called strange. {calibrated_on} familiar activations, chosen at random, set the threshold; the other "
        f"{judged} test it. On average over such choices, at most {percent(alarm)} of new familiar inputs are called "
        f"strange (the false-alarm rate). For this threshold, the rate is below {percent(bound)} with 95 % confidence. "
        "This holds for every network and score, provided that new inputs are like the familiar ones and that neither "
        "network, pair nor score was fitted to these. It does not say how many outliers are detected."
    )
    if fitted or fitted_score:
        what = "score" if fitted_score else "base"
        section.text(
            f"**The {what} was fitted to these very activations**, so the false-alarm rate for new inputs may be "
            "higher."
        )
    section.facts(
        {
            "threshold": threshold.value,
            "false-alarm rate, requested": percent(alarm),
            "false alarms, measured": _share_in_words(scored.num_above(FAMILIAR), judged),
        }
    )
    _histograms(section, scored)
    _rates(section, scored)
    if separations:
        _detection(section, scored, separations)
    return {
        "score": scored.name,
        "threshold": threshold.value,
        "false_alarm": alarm,
        "false_alarm_bound": bound,
        "false_alarm_measured": scored.rate(FAMILIAR),
        "calibrated_on": calibrated_on,
        "judged": judged,
        "others": {
            name: {
                "count": len(scored.rows[name]),
                "strange": scored.rate(name),
                "hardly_separated": name in weak,
                "better_score": better.get(name),
                "scores": {
                    score: {"auroc": one.auroc, "standard_error": one.standard_error, "fpr95": one.fpr95}
                    for score, one in by_score.items()
                },
            }
            for name, by_score in separations.items()
        },
    }


def _is_weak(scored: Scores, name: str, by_score: Mapping[str, Separation]) -> bool:
    return _hardly_separated(by_score[scored.name], scored.rate(name), scored.threshold.false_alarm)


def _verdict(
    scored: Scores, separations: Mapping[str, Mapping[str, Separation]], better: Mapping[str, str | None]
) -> str:
    """Return paragraphs on whether the alarm works: on all sets, then on each set on which it hardly does.

    Args:
        scored: Scores of all sets.
        separations: Separations by name of the set and of the score.
        better: Name of a better score or None, by name of the sets on which the alarm hardly works.
    """
    if not separations:
        return "**Whether the alarm detects outliers was not measured**: there are no other inputs to measure it on."
    alarms = _share_in_words(scored.num_above(FAMILIAR), len(scored.rows[FAMILIAR]))
    num_sets, num_weak = len(separations), len(better)
    num_partial = sum(scored.rate(name) < _MOST for name in separations if name not in better)
    counts = {"works": num_sets - num_partial - num_weak, "works in part": num_partial, "hardly works": num_weak}
    counts = {words: count for words, count in counts.items() if count}
    if num_sets == 1:
        first = f"**The alarm {next(iter(counts))}.**"
    elif len(counts) == 1:
        first = f"**The alarm {next(iter(counts))} on all {num_sets} other sets.**"
    else:
        listed = ", ".join(f"{words} on {count}" for words, count in counts.items())
        first = f"**Of {num_sets} other sets, the alarm {listed}.**"
    lines = [f"{first} False alarms on familiar inputs: {alarms}."]
    names = labels_of(list(separations), _LETTERS)
    strong = [name for name in separations if name not in better]
    if strong:
        rates = ", ".join(f"{percent(scored.rate(name))} of “{names[name]}”" for name in strong[:_SHOWN_SETS])
        more = f" and {len(strong) - _SHOWN_SETS} more" if len(strong) > _SHOWN_SETS else ""
        lines.append(f"It detects {rates}{more}.")
    for name, best in better.items():
        own = separations[name][scored.name]
        count = _share_in_words(scored.num_above(name), len(scored.rows[name]))
        lines.append(
            f"“{names[name]}” is hardly told apart from familiar inputs: {count} are above the threshold, where "
            f"{percent(scored.threshold.false_alarm)} of familiar inputs may be (AUROC {own.auroc:.3f}; 0.5 is "
            "chance). "
            + (
                f"*{best}* does better (AUROC {separations[name][best].auroc:.3f})."
                if best
                else "None of the compared scores does better."
            )
        )
    return "\n\n".join(lines)


def _shown_sets(scored: Scores) -> tuple[list[str], str]:
    """Return the names of the other sets that figures show, and a sentence if these are not all."""
    shown = scored.others[:_SHOWN_SETS]
    if len(shown) == len(scored.others):
        return shown, ""
    return shown, f" Only the first {_SHOWN_SETS} of {len(scored.others)} other sets are shown."


def _histograms(section: Section, scored: Scores) -> None:
    shown, note = _shown_sets(scored)
    labels, value = labels_of(list(scored.sets)), scored.threshold.value
    section.figure(
        figures.spread({labels[name]: scored.of(name) for name in (FAMILIAR, *shown)}, value, f"{scored.name} score"),
        caption=f"The score of the familiar inputs that test the threshold{' and of other inputs' if shown else ''}. "
        f"The outermost bars include all scores beyond them.{note}",
        alt=f"Histograms of the {scored.name} score for {', '.join((FAMILIAR, *shown))}, with the threshold at "
        f"{value:.4g}.",
    )


def _rates(section: Section, scored: Scores) -> None:
    rows = []
    for name in scored.sets:
        num_inputs, num_above = len(scored.rows[name]), scored.num_above(name)
        low, high = _interval(num_above, num_inputs)
        rate = percent(num_above / num_inputs) if num_above else "none"
        rows.append([name, num_inputs, num_above, rate, f"{percent(low)} to {percent(high)}"])
    section.table(
        ["set", "inputs", "above the threshold", "rate", "95 % interval"],
        rows,
        caption="Inputs above the threshold. The rate of the familiar set is the measured false-alarm rate; "
        f"{percent(scored.threshold.false_alarm)} was requested."
        + (" The rates of other sets are detection rates." if scored.others else "")
        + " The intervals (Wilson) contain the rate of further inputs of the same kind.",
        align="lrrrr",
    )


def _interval(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's interval of a rate at 95 % confidence."""
    z2, rate = 1.959964**2, count / total
    center, half = rate + z2 / (2 * total), math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * total)) / total)
    return max(0.0, (center - half) / (1 + z2 / total)), min(1.0, (center + half) / (1 + z2 / total))


def _detection(section: Section, scored: Scores, separations: Mapping[str, Mapping[str, Separation]]) -> None:
    shown, note = _shown_sets(scored)
    labels = labels_of(list(scored.sets))
    curves = {name: separations[name][scored.name] for name in shown}
    section.figure(
        figures.roc({labels[name]: curve for name, curve in curves.items()}),
        caption=f"Detection rate over false-alarm rate for all thresholds on {scored.name}.{note}",
        alt="ROC curves: " + "; ".join(f"{name} has an AUROC of {curve.auroc:.3f}" for name, curve in curves.items()),
    )
    section.table(
        ["set", "score", "AUROC", "FPR at 95 % TPR"],
        [
            [name, f"**{score}**" if score == scored.name else score, f"{one.auroc:.4f}", percent(one.fpr95)]
            for name, by_score in separations.items()
            for score, one in by_score.items()
        ],
        caption="The chosen score (bold) and common scores from the logits of the head. AUROC: probability that an "
        "outlier has a higher score than a familiar input; 0.5 is chance. FPR at 95 % TPR: fraction of outliers below "
        "the threshold that 95 % of familiar inputs are below.",
        align="llrr",
    )


# --- pictures -----------------------------------------------------------------------------------------------


def pictured(
    page: Page, scored: Scores, images: Mapping[str, Images], names: Sequence[str], labels: Tensor | None
) -> None:
    """Add the section with pictures of the most and the least familiar inputs of each set.

    Args:
        page: The page.
        scored: Scores of all sets.
        images: Images of a set by its name.
        names: K names of classes.
        labels: Labels of the familiar inputs, if known.
    """
    section = page.section(
        "Most and least familiar inputs",
        "Below each input are its predicted class and its p-value, the fraction of familiar inputs that are at least "
        "as strange. Of the familiar set, only inputs that test the threshold are shown.",
    )
    for set_name, set_images in images.items():
        rows = scored.rows[set_name][scored.of(set_name).argsort(stable=True)]
        set_label = "the familiar set" if set_name == FAMILIAR else f"“{shorten(set_name, _LETTERS)}”"
        set_labels = labels if set_name == FAMILIAR else None
        ends = {"most": rows[:_PICTURES], "least": rows[_PICTURES:].flip(0)[:_PICTURES]}
        for end, shown in ends.items():
            if not len(shown):
                continue
            section.text(f"The {end} familiar inputs of {set_label}:")
            thumbnails = [
                _thumbnail(scored, set_name, row, set_images[row], names, set_labels) for row in shown.tolist()
            ]
            gallery(section, thumbnails)


def _thumbnail(
    scored: Scores, set_name: str, row: int, item: Any, names: Sequence[str], labels: Tensor | None
) -> Thumbnail:
    """Return the picture of one input, with its prediction, p-value and label."""
    scored_set = scored.sets[set_name]
    score = scored_set.scores[scored.name][row]
    p_value = float(scored.threshold.p_value(score.unsqueeze(0).to(scored.threshold.calibration)))
    prediction, confidence = names[int(scored_set.predicted[row])], float(scored_set.confidence[row])
    label = None if labels is None else names[int(labels[row])]
    lines = [prediction, f"p {p_value:.3f}", *([f"label {label}"] if label not in (None, prediction) else [])]
    alt = (
        f"Input {row} of {set_name}, classified as {prediction} with probability {confidence:.2f}, "
        f"{scored.name} {float(score):.4g}, p-value {p_value:.3f}" + ("" if label is None else f", label {label}")
    )
    return Thumbnail(item[0] if isinstance(item, tuple | list) else item, lines, alt)
