"""A page on a pair: its head, its exact properties, the realism of its samples, and outlier scores of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penult import scores
from penult._checks import check_between, check_seed, described
from penult._extras import extra
from penult.activations import Activations, _ActivationSource
from penult.pair import GenerativePair
from penult.report import _pair_sections as sections
from penult.report._pair_scores import FAMILIAR, Images, ScoredSet, Scores, familiarity, pictured
from penult.report._pair_sections import class_cosines
from penult.report.page import Page
from penult.scores import _bound, _raw_logits, _score_name

__all__ = ["FAMILIAR", "PairPage", "build", "class_cosines", "page"]

# Smallest number of familiar activations.
_MIN_FAMILIAR = 40
# Logits that are computed at once.
_LOGITS = 1 << 24
# Limits of the difference between posterior and softmax in double and in single precision.
_LIMIT_DOUBLE, _LIMIT_SINGLE = 1e-9, 1e-5
# Scores that the chosen score is compared with.
_COMMON_SCORES: dict[str, Callable[[GenerativePair, Tensor], Tensor]] = {
    "energy": scores.energy,
    "max logit": scores.max_logit,
    "msp": scores.msp,
}

Score = Callable[..., Tensor]
Functions = dict[str, Callable[[Tensor], Tensor]]


class PairPage(Page):
    """A page on a pair.

    Attributes:
        results: The numbers on the page, for JSON.
    """

    results: dict[str, Any]


@torch.no_grad()
def page(
    pair: GenerativePair,
    familiar: Activations,
    others: Mapping[str, Activations] | None = None,
    *,
    images: Images | None = None,
    other_images: Mapping[str, Images] | None = None,
    score: Score | None = None,
    false_alarm: float = 0.05,
    seed: int = 0,
    fitted: bool = False,
    title: str = "A head and its pair",
    footer: str | None = None,
    progress: bool = False,
) -> PairPage:
    """Make a page on a pair from activations of its network. Needs the extras ``report`` and ``data``.

    The page describes the head, checks the exact properties of the pair, shows the classes with the most similar rows,
    compares samples with real activations (`penult.realism.compare`), and scores other inputs. Half of the familiar
    activations, chosen at random, set the threshold of a `penult.scores.Threshold`; the other half tests it. The same
    arguments give the same page.

    Args:
        pair: The pair.
        familiar: Activations of inputs that the network is meant for, at least 40, which neither network nor pair were
            fitted to. Their labels and class names are used if they have any.
        others: Activations of other inputs by name, which are compared with the familiar ones.
        images: The familiar inputs, one for each activation, for pictures of the most and the least familiar: a
            sequence or map-style data set of images (C, H, W), or of tuples that begin with one; C is 1 or 3.
        other_images: The inputs of `others` in the same form, by name.
        score: A fitted `penult.scores.Score`, any function of activations (B, d), or a function of a pair such as
            `penult.scores.energy`. Default: `penult.scores.usual(pair)`.
        false_alarm: Fraction of familiar activations that may be above the threshold.
        seed: Seed of all random choices and samples. The global random state is not changed.
        fitted: Whether the base was fitted to these familiar activations; the page then warns that its numbers are too
            good.
        title: Title of the page.
        footer: Last line of the page.
        progress: Whether a progress bar is shown on stderr while realism is measured.

    Returns:
        The page; `Page.write` writes it to a file.

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: An argument has a wrong type.
        ValueError: Activations do not fit the head, are too few, all the same or not finite; the name of a set is
            empty or taken; the number of images differs from that of activations; or a score is NaN.

    Example:
        >>> head = penult.Head(4 * torch.eye(3))
        >>> h, y = penult.GenerativePair(head).sample((145,), generator=torch.Generator().manual_seed(0))
        >>> pair = penult.GenerativePair(head, penult.Sphere.fit(head, h[:100], shape="elliptic"))
        >>> familiar = penult.Activations(h[100:], head(h[100:]), y[100:])
        >>> noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
        >>> report = page(pair, familiar, {"noise": penult.Activations(noise, head(noise))})
        >>> [section.title for section in report.sections][:2]
        ['The head', 'Identity and laws']
    """
    extra("sklearn.metrics", "a page on a pair is measured with scikit-learn")
    others, other_images = dict(others or {}), dict(other_images or {})
    _check(pair, familiar, others, images, other_images, false_alarm)
    seed = check_seed(seed)
    scored = _scored(pair, {FAMILIAR: familiar, **others}, score, false_alarm, seed)
    names = familiar.class_names or tuple(map(str, range(pair.head.num_classes)))
    report = PairPage(
        title,
        subtitle="penult report",
        lead=f"The softmax head of a classifier with {pair.head.num_classes} classes, together with a base measure "
        f"(here *{pair.base.info.name}*), is a generative model of the activations that the head reads. This page "
        "shows which of its properties are exact, how realistic its samples are, and which inputs look strange to it.",
        footer=footer,
    )
    own = scored.sets[FAMILIAR]
    sections.head(report, pair)
    report.results = {
        "base": pair.base.info.name,
        "classes": pair.head.num_classes,
        "features": pair.head.in_features,
        "familiar": len(familiar),
        "laws": sections.laws(report, pair, own.posterior, (own.gap, own.gap_limit), own.stored_gap, seed),
    }
    sections.geometry(report, pair.head, names, seed)
    report.results["realism"] = sections.realism(
        report, pair, familiar, own.predicted, names, seed=seed, fitted=fitted, progress=progress
    )
    own_digest = getattr(scores.usual(pair) if score is None else score, "_fitted_digest", None)
    fitted_score = own_digest is not None and own_digest == own.digest
    report.results |= familiarity(report, scored, fitted or pair.base.reference == own.digest, fitted_score)
    all_images = ({} if images is None else {FAMILIAR: images}) | other_images
    if all_images:
        pictured(report, scored, all_images, names, familiar.labels)
    return report


def build(*args: Any, **options: Any) -> tuple[PairPage, dict[str, Any]]:
    """Return the page of `page`, which takes the same arguments, and its numbers for JSON."""
    report = page(*args, **options)
    return report, report.results


def _scored(
    pair: GenerativePair, sets: Mapping[str, Activations], score: Score | None, false_alarm: float, seed: int
) -> Scores:
    """Score all sets, and set the threshold on half of the familiar one."""
    score_name, functions = _score_functions(pair, score)
    scored_sets = {name: _read(pair, name, activations, functions) for name, activations in sets.items()}
    familiar = scored_sets[FAMILIAR]
    num_familiar = len(familiar.predicted)
    if familiar.constant:
        raise ValueError(
            f"all {num_familiar} familiar activations are the same; expected activations of different inputs, such as "
            "those that penult.extract returns"
        )
    order = torch.randperm(num_familiar, generator=torch.Generator().manual_seed(seed), device="cpu")
    half = -(-num_familiar // 2)
    calibration, judged = order[:half].sort().values, order[half:].sort().values
    threshold = scores.Threshold(_identity, familiar.scores[score_name][calibration], false_alarm)
    rows = {name: torch.arange(len(scored_set.predicted), device="cpu") for name, scored_set in scored_sets.items()}
    return Scores(scored_sets, rows | {FAMILIAR: judged}, score_name, threshold)


def _identity(values: Tensor) -> Tensor:
    return values


def _read(pair: GenerativePair, name: str, activations: Activations, functions: Functions) -> ScoredSet:
    """Read a set once, in blocks, and return its scores and predictions."""
    head = pair.head
    parts: dict[str, list[Tensor]] = {score: [] for score in functions}
    confidences, predictions = [], []
    posterior = torch.zeros(head.num_classes, dtype=torch.float64, device="cpu")
    gap, stored_gap, limit = 0.0, 0.0, 0.0
    first, constant, start = None, True, 0
    source = _ActivationSource(activations, name=f"the set {name!r}", dtype="wide")
    try:
        for block in source:
            first = block[0] if first is None else first
            constant = constant and bool((block == first).all())
            for rows in block.to(head.weight.device).split(max(1, _LOGITS // head.num_classes)):
                p = _raw_logits(head, rows).softmax(-1)
                stored = activations[start : start + len(rows)].logits.to(p).softmax(-1)
                start += len(rows)
                limit = _LIMIT_DOUBLE if p.dtype == torch.float64 else _LIMIT_SINGLE
                gap = max(gap, float((pair.posterior(rows).probs.to(p) - p).abs().max()))
                stored_gap = max(stored_gap, float((stored - p).abs().max()))
                posterior += p.cpu().double().sum(0)
                confidence, predicted = p.max(-1)
                confidences.append(confidence.cpu())
                predictions.append(predicted.cpu())
                for score, function in functions.items():
                    parts[score].append(function(rows).detach().cpu())
    except ValueError as error:
        raise ValueError(f"the set {name!r}: {error}") from error
    values = {score: torch.cat(blocks) for score, blocks in parts.items()}
    _check_scores(name, len(activations), values)
    return ScoredSet(
        scores=values,
        predicted=torch.cat(predictions),
        confidence=torch.cat(confidences),
        posterior=posterior / len(activations),
        gap=gap,
        gap_limit=limit,
        stored_gap=stored_gap,
        constant=constant,
        digest=source.digest,
    )


def _check_scores(name: str, count: int, values: Mapping[str, Tensor]) -> None:
    for score, tensor in values.items():
        num_nan = int(tensor.isnan().sum())
        if tensor.shape != (count,) or num_nan:
            raise ValueError(
                f"the score {score} of the set {name!r} has shape {tuple(tensor.shape)} and {num_nan} NaN; expected "
                f"({count},) without NaN, one number for each activation"
            )


def _score_functions(pair: GenerativePair, score: Score | None) -> tuple[str, Functions]:
    """Return the name of the chosen score, and the functions of this and the common scores by name."""
    score = scores.usual(pair) if score is None else score
    name = _score_name(score).replace("_", " ")
    others: dict[str, Callable[..., Tensor]] = dict(_COMMON_SCORES)
    if isinstance(score, scores.Composite):
        # The third part has the order of msp.
        others |= {f"{part} alone": _part(score, i) for i, part in enumerate(score.PARTS[:2])}
    elif scores.usual(pair) is scores.directional:
        others["directional"] = scores.directional
    common = {other: _bound(function, pair) for other, function in others.items() if other != name}
    return name, {name: _bound(score, pair)} | common


def _part(score: scores.Composite, index: int) -> Callable[[Tensor], Tensor]:
    return lambda h: score.parts(h)[:, index]


def _check(
    pair: GenerativePair,
    familiar: Activations,
    others: Mapping[str, Activations],
    images: Images | None,
    other_images: Mapping[str, Images],
    false_alarm: float,
) -> None:
    if not isinstance(pair, GenerativePair):
        raise TypeError(f"pair is {described(pair)}; expected a penult.GenerativePair")
    if FAMILIAR in {name.strip() for name in others} or not all(name.strip() for name in others):
        raise ValueError(
            f"the names of others are {list(others)}; expected names that are neither empty nor {FAMILIAR!r}"
        )
    sets = {FAMILIAR: familiar, **others}
    for name, activations in sets.items():
        _check_fits(pair, name, activations)
    check_between("false_alarm", false_alarm)
    need = max(_MIN_FAMILIAR, 2 * (math.ceil(1 / false_alarm - 1e-9) - 1) - 1)
    if len(familiar) < need:
        raise ValueError(
            f"there are {len(familiar)} familiar activations; expected at least {need}, because half of them set the "
            f"threshold for a false-alarm rate of {false_alarm:g}. Give more"
            + ("" if need == _MIN_FAMILIAR else ", or allow more false alarms")
        )
    if unknown := [name for name in other_images if name not in others]:
        raise ValueError(f"other_images has {unknown[0]!r}; expected only names of other sets, {list(others)}")
    for name, pictures in {FAMILIAR: images, **other_images}.items():
        if pictures is not None and len(pictures) != len(sets[name]):
            raise ValueError(
                f"the set {name!r} has {len(sets[name])} activations and {len(pictures)} images; expected one image "
                "for each activation"
            )


def _check_fits(pair: GenerativePair, name: str, activations: Activations) -> None:
    if not isinstance(activations, Activations):
        raise TypeError(
            f"the set {name!r} is {described(activations)}; expected penult.Activations, such as "
            "penult.Activations(h, head(h), labels)"
        )
    expected = pair.head.in_features, pair.head.num_classes
    if (activations.in_features, activations.num_classes) != expected:
        raise ValueError(
            f"the set {name!r} has dimension {activations.in_features} and {activations.num_classes} classes, but the "
            f"head reads {expected[0]} and has {expected[1]}. Give activations of the pair's network"
        )
