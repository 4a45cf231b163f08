"""Choice of an outlier score by name, kept with a pair, or fitted to reference activations."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from penult.activations import Activations
    from penult.pair import GenerativePair
    from penult.scores import Score as StoredScore

__all__ = ["Chosen", "Reference", "Score", "ScoreName", "score_of"]


class ScoreName(str, Enum):
    """Scores of the library: those that a pair gives, and those that are fitted to reference activations."""

    composite = "composite"
    directional = "directional"
    energy = "energy"
    max_logit = "max-logit"
    msp = "msp"
    density = "density"
    mahalanobis = "mahalanobis"
    relative_mahalanobis = "relative-mahalanobis"
    knn = "knn"
    vim = "vim"


Score = Annotated[
    ScoreName | None,
    typer.Option(
        "--score",
        help="Score to compute. Default: composite where --reference is given; else the score that the file of the "
        "pair holds, as penult fit writes it; else directional for a sphere, and energy for other bases.",
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="REFERENCE",
        help="Familiar inputs, in the forms of DATA, that a score is fitted to: composite, mahalanobis, "
        "relative-mahalanobis, knn or vim.",
    ),
]


class Chosen(NamedTuple):
    """A score of activations (B, d), its name, and the reason for the choice."""

    score: Callable[[Tensor], Tensor]
    name: ScoreName
    reason: str


def score_of(
    pair: GenerativePair,
    name: ScoreName | None,
    stored: StoredScore | None = None,
    reference: Activations | None = None,
) -> Chosen:
    """Return the score with the given name, or the recommended score.

    Args:
        pair: The pair.
        name: Name that the user gave.
        stored: Score that the file of the pair holds.
        reference: Activations to fit the score to.

    Raises:
        ValueError: The score cannot be computed with this base, or it has to be fitted and there are no activations.
    """
    from penult import scores
    from penult.scores import _bound, _score_name

    fits = _fits()
    if reference is not None:
        wanted = name or ScoreName.composite
        if wanted not in fits:
            raise ValueError(f"--score {wanted.value} is not fitted to activations; leave --reference out")
        fitted = fits[wanted](pair, reference)
        return Chosen(fitted, wanted, f"{wanted.value}, fitted to {len(reference)} activations of --reference")
    if stored is not None:
        kind = ScoreName[_score_name(stored) if isinstance(stored, scores.PairScore) else stored.kind]
        if name in (None, kind):
            return Chosen(stored, kind, f"{kind.value}, which the file of the pair holds")
    if name in fits:
        raise ValueError(
            f"--score {name.value} has to be fitted: give familiar activations with --reference"
            + (", or a pair of penult fit, which holds a composite score" if name is ScoreName.composite else "")
        )
    name, reason = _score_of_pair(pair, name)
    return Chosen(_bound(getattr(scores, name.name), pair), name, reason)


def _fits() -> dict[ScoreName, Callable[[GenerativePair, Activations], StoredScore]]:
    """Return the fits of scores by name."""
    from penult import scores

    return {
        ScoreName.composite: scores.Composite.fit,
        # Activations of norm 1 make it far better.
        ScoreName.mahalanobis: lambda pair, acts: scores.Mahalanobis.fit(acts, head=pair.head, normalize=True),
        ScoreName.relative_mahalanobis: lambda pair, acts: scores.RelativeMahalanobis.fit(acts, head=pair.head),
        ScoreName.knn: lambda pair, acts: scores.KNN.fit(acts),
        ScoreName.vim: lambda pair, acts: scores.ViM.fit(pair.head, acts),
    }


def _score_of_pair(pair: GenerativePair, name: ScoreName | None) -> tuple[ScoreName, str]:
    """Return the name of a score that is a function of the pair, and the reason for the choice."""
    from penult import scores
    from penult.bases import Sphere

    base = pair.base
    sphere = base if isinstance(base, Sphere) else None
    base_name = f"{'an' if base.info.name[0] in 'aeiou' else 'a'} {base.info.name}"
    if name is ScoreName.directional and sphere is None:
        raise ValueError(
            f"--score directional needs a pair on a sphere, but the base is {base_name}. Fit one with penult fit "
            "--base elliptic, or leave --score out"
        )
    if name is ScoreName.density and not base.info.has_density:
        raise ValueError(f"--score density needs a density, which {base_name} does not have; leave --score out")
    if name is not None:
        return name, f"{name.value}, as given by --score"
    better = "a pair of penult fit holds a fitted score that detects more, or give --reference FAMILIAR to fit one"
    if scores.usual(pair) is scores.energy:
        directions = "without directions" if sphere is None else "in one dimension, which has two directions only"
        return ScoreName.energy, f"energy, since the base is {base_name} {directions}; {better}"
    return ScoreName.directional, f"directional, since the base is {base_name}; {better}"
