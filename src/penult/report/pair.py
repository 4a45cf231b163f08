"""A page on one pair: what its head knows, how real its draws are, and which inputs are strange to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penult import scores
from penult._extras import extra
from penult.activations import Activations, _ActivationSource
from penult.pair import GenerativePair
from penult.report import _pair_sections as sections
from penult.report._pair_scores import FAMILIAR, Images, ScoredSet, familiarity, pictured
from penult.report.page import Page
from penult.scores import _raw_logits

__all__ = ["FAMILIAR", "build", "page"]

_FEWEST = 40  # familiar activations
_LOGITS = 1 << 24  # at a time
_COMPARED: dict[str, Callable[[GenerativePair, Tensor], Tensor]] = {
    "energy": scores.energy,
    "max logit": scores.max_logit,
    "msp": scores.msp,
}

Score = Callable[[GenerativePair, Tensor], Tensor] | scores.Score


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
) -> Page:
    """A page on a pair, from activations of its network. Needs the extras ``report`` and ``data``.

    It says what the head is; checks the pair's laws; shows which classes are alike, how close draws come to real
    activations (`penult.realism.compare`) and how strange other inputs are. Half of the familiar activations, chosen at
    random, set the threshold of a `penult.scores.Threshold`; the other half is judged by it. The same arguments give
    the same page.

    Args:
        pair: The pair.
        familiar: Activations of inputs such as the network is meant for, at least 40 that neither network nor pair were
            fitted to. Their labels, where they have some, and their class names are used.
        others: Name to activations of other inputs, which are held against them.
        images: The familiar inputs, one for each activation, for pictures of the most and the least familiar: a
            sequence or map-style data set of images (C, H, W), or of tuples that begin with one; C is 1 or 3.
        other_images: The same of the others, by name.
        score: A function of a pair and activations such as `penult.scores.energy`, or a fitted `penult.scores.Score`;
            None for `penult.scores.usual`.
        false_alarm: The share of familiar activations that may be called strange.
        seed: Seed of halves, choices and draws. No global random state is touched.
        fitted: Whether the base was fitted to these very familiar activations; the page then says that it flatters.
        title: The page's name.
        footer: Its last line.

    Returns:
        The page, for `Page.write`.

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: An argument is of another kind.
        ValueError: Activations do not fit the head, are too few, all the same or not finite; a name is taken; there is
            not one image for each activation; or the score is NaN.

    Example:
        >>> head = penult.Head(4 * torch.eye(3))
        >>> h, y = penult.GenerativePair(head).sample((145,), generator=torch.Generator().manual_seed(0))
        >>> pair = penult.GenerativePair(head, penult.Sphere.fit(head, h[:100], shape="elliptic"))
        >>> familiar = penult.Activations(h[100:], head(h[100:]), y[100:])
        >>> noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
        >>> found = page(pair, familiar, {"noise": penult.Activations(noise, head(noise))})
        >>> [section.title for section in found.sections][:2]
        ['The head', 'Identity and laws']
    """
    return build(
        pair,
        familiar,
        others,
        images=images,
        other_images=other_images,
        score=score,
        false_alarm=false_alarm,
        seed=seed,
        fitted=fitted,
        title=title,
        footer=footer,
    )[0]


@torch.no_grad()
def build(
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
) -> tuple[Page, dict[str, Any]]:
    """The page of `page`, and its figures as JSON can hold them.

    Args:
        pair: As of `page`, like all that follow.
        familiar: As there.
        others: As there.
        images: As there.
        other_images: As there.
        score: As there.
        false_alarm: As there.
        seed: As there.
        fitted: As there.
        title: As there.
        footer: As there.
        progress: A bar on stderr while realism is measured.
    """
    extra("sklearn.metrics", "a page on a pair is measured with scikit-learn")
    others, other_images = dict(others or {}), dict(other_images or {})
    _check(pair, familiar, others, images, other_images, false_alarm)
    chosen, functions = _functions(pair, score)
    sets = {FAMILIAR: _read(pair, FAMILIAR, familiar, functions)}
    sets |= {name: _read(pair, name, acts, functions) for name, acts in others.items()}
    own = sets[FAMILIAR]
    if own.constant:
        raise ValueError(
            f"all {len(familiar)} familiar activations are the same; give activations of different inputs, as "
            "penult.extract makes them"
        )
    names = familiar.class_names or tuple(map(str, range(pair.head.num_classes)))
    order = torch.randperm(len(familiar), generator=torch.Generator().manual_seed(seed))
    half = -(-len(order) // 2)
    calibrating, judged = order[:half].sort().values, order[half:].sort().values
    threshold = scores.Threshold(_itself, own.scores[chosen][calibrating], false_alarm)

    made = Page(
        title,
        subtitle="penult report",
        lead=f"What a softmax head over {pair.head.num_classes} classes knows of its activations, with a base of the "
        f"kind *{pair.base.info.name}*: what is exact, how real its draws are, and which inputs are strange to it.",
        footer=footer,
    )
    sections.head(made, pair)
    facts: dict[str, Any] = {
        "base": pair.base.info.name,
        "classes": pair.head.num_classes,
        "features": pair.head.in_features,
        "familiar": len(familiar),
        "laws": sections.laws(made, pair, own.posterior, (own.gap, own.bar), own.stored_gap, seed),
    }
    sections.geometry(made, pair.head, names, seed)
    facts["realism"] = sections.realism(made, pair, familiar, own.predicted, names, seed, fitted, progress)
    keep = {name: judged if name == FAMILIAR else torch.arange(len(each.predicted)) for name, each in sets.items()}
    facts |= familiarity(made, sets, keep, chosen, threshold, fitted)
    pictures = ({FAMILIAR: images} if images is not None else {}) | other_images
    if pictures:
        pictured(made, sets, keep, chosen, threshold, pictures, names, familiar)
    return made, facts


def _read(
    pair: GenerativePair, name: str, acts: Activations, functions: Mapping[str, Callable[[Tensor], Tensor]]
) -> ScoredSet:
    """Go through a set once."""
    head = pair.head
    rows_of: dict[str, list[Tensor]] = {each: [] for each in functions}
    tops, total, gap, stored_gap = [], torch.zeros(head.num_classes, dtype=torch.float64), 0.0, 0.0
    first, constant, start, bar = None, True, 0, 0.0
    step = max(1, _LOGITS // head.num_classes)
    try:
        for block in _ActivationSource(acts, dtype="wide"):
            first = block[0] if first is None else first
            constant = constant and bool((block == first).all())
            for rows in block.to(head.weight.device).split(step):
                p = _raw_logits(head, rows).softmax(-1)
                stored = acts[start : start + len(rows)].logits.to(p).softmax(-1)
                start += len(rows)
                bar = 1e-9 if p.dtype == torch.float64 else 1e-5
                gap = max(gap, float((pair.posterior(rows).probs.to(p) - p).abs().max()))
                stored_gap = max(stored_gap, float((stored - p).abs().max()))
                total += p.cpu().double().sum(0)
                tops.append(tuple(each.cpu() for each in p.max(-1)))
                for each, function in functions.items():
                    rows_of[each].append(function(rows).detach().cpu())
    except ValueError as error:
        raise ValueError(f"the set {name!r}: {error}") from error
    found = {each: torch.cat(parts) for each, parts in rows_of.items()}
    for each, values in found.items():
        if values.shape != (len(acts),) or bool(values.isnan().any()):
            raise ValueError(
                f"the score {each} gives {int(values.isnan().sum())} NaN for the {len(acts)} activations of {name!r}, "
                f"in the shape {tuple(values.shape)}; it must give one number each"
            )
    confidence, predicted = (torch.cat(parts) for parts in zip(*tops, strict=True))
    return ScoredSet(found, predicted, confidence, total / len(acts), gap, bar, stored_gap, constant)


def _functions(pair: GenerativePair, score: Score | None) -> tuple[str, dict[str, Callable[[Tensor], Tensor]]]:
    """The score that is asked for, under its name, beside those that it is compared with."""
    if score is None:
        score = scores.usual(pair)
    if isinstance(score, scores.Score):
        name, own = type(score).__name__, score.score
    elif callable(score):
        given = score
        name = str(getattr(given, "__name__", type(given).__name__)).replace("_", " ")

        def own(h: Tensor) -> Tensor:
            return given(pair, h)
    else:
        raise TypeError(
            f"score is a {type(score).__name__}; give a function such as penult.scores.energy, or a fitted Score"
        )

    def bound(function: Callable[[GenerativePair, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda h: function(pair, h)

    return name, {name: own} | {each: bound(function) for each, function in _COMPARED.items() if each != name}


def _check(
    pair: GenerativePair,
    familiar: Activations,
    others: Mapping[str, Activations],
    images: Images | None,
    other_images: Mapping[str, Images],
    false_alarm: float,
) -> None:
    if not isinstance(pair, GenerativePair):
        raise TypeError(f"pair must be a penult.GenerativePair, got {type(pair).__name__}")
    if FAMILIAR in {name.strip() for name in others} or not all(name.strip() for name in others):
        raise ValueError(f"other sets need names of their own, not {list(others)}: {FAMILIAR!r} is the first one's")
    shape = pair.head.in_features, pair.head.num_classes
    for name, acts in {FAMILIAR: familiar, **others}.items():
        if not isinstance(acts, Activations):
            raise TypeError(
                f"the set {name!r} must be penult.Activations, got {type(acts).__name__}: "
                "Activations(h, head(h), labels) makes them"
            )
        if (acts.in_features, acts.num_classes) != shape:
            raise ValueError(
                f"the set {name!r} has dimension {acts.in_features} and {acts.num_classes} classes, but the head reads "
                f"{shape[0]} and has {shape[1]}: give activations of the pair's network"
            )
    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm is {false_alarm}; it must lie between 0 and 1")
    need = max(_FEWEST, 2 * (math.ceil(1 / false_alarm - 1e-9) - 1) - 1)
    if len(familiar) < need:
        raise ValueError(
            f"there are {len(familiar)} familiar activations; half of them set the threshold, and for false alarms of "
            f"{false_alarm:g} at least {need} are needed"
            + ("" if need == _FEWEST else ": give more, or allow more false alarms")
        )
    for name in other_images:
        if name not in others:
            raise ValueError(f"other_images has {name!r}, which is not among the other sets {list(others)}")
    for name, given in {FAMILIAR: images, **other_images}.items():
        count = len(familiar if name == FAMILIAR else others[name])
        if given is not None and len(given) != count:
            raise ValueError(f"the set {name!r} has {count} activations and {len(given)} images; give one for each")


def _itself(found: Tensor) -> Tensor:
    return found
