"""How well scores separate outliers from familiar inputs: curves of one score, and tables of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penult._checks import check_between
from penult.activations import Activations, _ActivationSource
from penult.pair import GenerativePair
from penult.scores._protocol import bound, check_calibration, score_name

__all__ = ["Comparison", "Separation", "better_score", "compare", "hardly_separated", "separation", "share_in_words"]

# An alarm hardly works on a set below this AUROC, or if it catches less than so many times the false alarms.
_WEAK_AUROC, _WEAK_GAIN = 0.6, 2.0


@dataclass(frozen=True)
class Separation:
    """How well a score separates outliers from familiar inputs, over all thresholds.

    Attributes:
        auroc: Probability that an outlier has a higher score than a familiar input, plus half the probability that both
            have the same score. 0.5 is chance.
        aupr: Average precision with outliers as positives, Σ (change of the detection rate) × (fraction of outliers
            among all inputs above the threshold). Chance is the fraction of outliers among all inputs.
        fpr95: Fraction of outliers that are not above the lowest threshold with at most 5 % false alarms: the rate of
            false positives at 95 % true positives, with familiar inputs as positives.
        standard_error: Standard error of `auroc` (DeLong); NaN if there is only one input of a kind.
        alarms: Fractions of familiar inputs at or above each threshold (false-alarm rates), float64, ascending from 0.
        hits: Fractions of outliers at or above each threshold (detection rates), float64.
    """

    auroc: float
    aupr: float
    fpr95: float
    standard_error: float
    alarms: Tensor
    hits: Tensor

    def detected(self, false_alarm: float = 0.05) -> float:
        """Return the fraction of outliers above the lowest threshold with at most this rate of false alarms.

        Example:
            >>> separation([0.1, 0.2, 0.3, 0.4], [0.35, 0.8]).detected(0.25)
            1.0
        """
        allowed = self.alarms <= check_between("false_alarm", false_alarm) + 1e-12
        return float(self.hits[allowed].max())

    def __repr__(self) -> str:
        """Return the figures, without the curve."""
        return f"Separation(auroc={self.auroc:.4f} ± {self.standard_error:.4f}, fpr95={self.fpr95:.4f})"


def separation(familiar: Any, outliers: Any) -> Separation:
    """Measure how well a score separates outliers from familiar inputs.

    Equal scores count half. Infinite scores are allowed.

    Args:
        familiar: Scores (N,) of familiar inputs, as a tensor, an array or a sequence. Higher means more unusual.
        outliers: Scores (M,) of outliers.

    Raises:
        TypeError: One of the two is no sequence of numbers.
        ValueError: One of the two is empty, not one-dimensional or contains NaN.

    References:
        DeLong, DeLong and Clarke-Pearson, "Comparing the Areas under Two or More Correlated Receiver Operating
        Characteristic Curves", Biometrics 1988, for the standard error.

    Example:
        >>> measured = separation([0.1, 0.2, 0.3, 0.4], [0.35, 0.8])
        >>> measured.auroc, measured.fpr95
        (0.875, 0.5)
    """
    sides = _vector("familiar inputs", familiar), _vector("outliers", outliers)
    values, index = torch.cat(sides).unique(return_inverse=True)
    n, m = (len(side) for side in sides)
    # Counts by distinct score, from the highest to the lowest.
    at_familiar, at_outliers = (
        part.bincount(minlength=len(values)).flip(0).double() for part in (index[:n], index[n:])
    )
    alarms, hits = at_familiar.cumsum(0), at_outliers.cumsum(0)
    # Fractions of familiar inputs below each score, and of outliers above it, with half of the ties.
    below, above = (n - alarms + at_familiar / 2) / n, (hits - at_outliers / 2) / m
    auroc = float((at_outliers * below).sum() / m)
    variances = [
        float((counts * (part - auroc).square()).sum() / (size - 1) / size) if size > 1 else math.nan
        for counts, part, size in ((at_outliers, below, m), (at_familiar, above, n))
    ]
    zero = alarms.new_zeros(1)
    alarms_from_0, hits_from_0 = torch.cat([zero, alarms / n]), torch.cat([zero, hits / m])
    return Separation(
        auroc=auroc,
        aupr=float((at_outliers / m * hits / (hits + alarms)).sum()),
        fpr95=1 - float(hits_from_0[alarms_from_0 <= 0.05 + 1e-12].max()),
        standard_error=math.sqrt(sum(variances)),
        alarms=alarms_from_0,
        hits=hits_from_0,
    )


def _vector(name: str, scores: Any) -> Tensor:
    try:
        values = torch.as_tensor(scores, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"scores of {name} are a {type(scores).__name__}; expected numbers (N,)") from None
    num_nan = int(values.isnan().sum())
    if values.ndim != 1 or not len(values) or num_nan:
        raise ValueError(
            f"scores of {name} have shape {tuple(values.shape)} and {num_nan} NaN; expected at least one score (N,) "
            "and no NaN"
        )
    return values


@dataclass(frozen=True)
class Comparison:
    """Separations of several sets of outliers by several scores; `print` shows a table.

    ``penult.report.scores.comparison`` draws it.

    Attributes:
        separations: `Separation` by name of the score, then of the set.
        num_familiar: Number of familiar inputs.
    """

    separations: Mapping[str, Mapping[str, Separation]]
    num_familiar: int

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets of outliers."""
        return tuple(next(iter(self.separations.values())))

    @property
    def best(self) -> str:
        """Name of the score with the highest mean AUROC over the sets."""
        return max(self.separations, key=self.mean_auroc)

    def mean_auroc(self, score: str) -> float:
        """Return the mean AUROC of a score over the sets."""
        by_set = self.separations[score].values()
        return sum(one.auroc for one in by_set) / len(by_set)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a row for each score and set, for JSON or a data frame.

        Example:
            >>> h = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
            >>> rows = compare({"norm": lambda h: h.norm(dim=-1)}, h, {"far": 9 * h}).to_dicts()
            >>> rows[0]["score"], rows[0]["outliers"], round(rows[0]["auroc"], 2)
            ('norm', 'far', 1.0)
        """
        figures = ("auroc", "standard_error", "aupr", "fpr95")
        return [
            {"score": score, "outliers": name} | {figure: getattr(one, figure) for figure in figures}
            for score, by_set in self.separations.items()
            for name, one in by_set.items()
        ]

    def __str__(self) -> str:
        """Return the table: AUROC / FPR95 of each score (rows) and set (columns)."""
        table = [["AUROC / FPR95", *self.sets, "mean"]]
        for score, by_set in self.separations.items():
            figures = torch.tensor([(one.auroc, one.fpr95) for one in by_set.values()], device="cpu").double()
            cells = torch.cat([figures, figures.mean(0, keepdim=True)]).tolist()
            table.append([score, *(f"{auroc:.3f} / {fpr95:.3f}" for auroc, fpr95 in cells)])
        # The mean of one set says nothing more.
        table = table if len(self.sets) > 1 else [row[:-1] for row in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
        return "\n".join(lines)


@torch.no_grad()
def compare(
    scores: Mapping[str, Callable[..., Tensor]] | Iterable[Callable[..., Tensor]],
    familiar: Tensor | Activations,
    outliers: Mapping[str, Tensor | Activations],
    *,
    pair: GenerativePair | None = None,
) -> Comparison:
    """Compare how well scores separate outliers from familiar inputs.

    Args:
        scores: Scores by name, or scores alone: fitted ones, functions of activations (B, d) of your own, or functions
            of a pair such as `directional`.
        familiar: Activations (N, d) of familiar inputs to which no score was fitted.
        outliers: Activations (M, d) by name of the set.
        pair: The pair, for functions of one.

    Raises:
        TypeError: A score cannot be called, or takes a pair and there is none; or activations are of a wrong type.
        ValueError: There is no score or no set; two scores have one name; a score is NaN, or not one number for each
            row; or the familiar activations are those that a score, or the base of its pair, was fitted to.

    Example:
        >>> from penult.scores import KNN, Mahalanobis
        >>> g = torch.Generator().manual_seed(0)
        >>> h = torch.randn(600, 8, generator=g)
        >>> scores = [KNN.fit(h[:300]), Mahalanobis.fit(h[:300], torch.zeros(300, dtype=torch.long))]
        >>> found = compare(scores, h[300:], {"long": 3 * h[:300], "shifted": h[:300] + 2})
        >>> print(found)
        AUROC / FPR95  long           shifted        mean
        KNN            0.423 / 0.983  0.624 / 1.000  0.523 / 0.992
        Mahalanobis    0.999 / 0.003  0.999 / 0.000  0.999 / 0.002
        >>> found.best
        'Mahalanobis'
    """
    named = list(scores.items()) if isinstance(scores, Mapping) else [(score_name(score), score) for score in scores]
    names = [name for name, _ in named]
    if not named or not outliers:
        raise ValueError(f"there are {len(named)} scores and {len(outliers)} sets of outliers; expected one or more")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several scores have the name {repeated[0]}; expected different ones. Pass a dict of scores")
    functions = {name: bound(score, pair) for name, score in named}
    sources = {"familiar": _ActivationSource(familiar, name="familiar", dtype="wide")}
    width = sources["familiar"].in_features
    sets = {name: _ActivationSource(rows, name=f"outliers[{name!r}]", dtype="wide") for name, rows in outliers.items()}
    for name, source in sets.items():
        if source.in_features != width:
            raise ValueError(f"outliers[{name!r}] has {source.in_features} features; expected {width}, as familiar has")
    for function in functions.values():
        check_calibration(function, sources["familiar"].digest, "familiar")
    separations = {}
    for name, function in functions.items():
        own = _scores_of(name, function, sources["familiar"])
        separations[name] = {key: separation(own, _scores_of(name, function, rows)) for key, rows in sets.items()}
    return Comparison(separations, len(sources["familiar"]))


def _scores_of(name: str, function: Callable[[Tensor], Tensor], source: _ActivationSource) -> Tensor:
    parts = []
    for rows in source:
        scores = torch.as_tensor(function(rows), device="cpu")
        if scores.shape != rows.shape[:1]:
            raise ValueError(
                f"the score {name} of {len(rows)} activations has shape {tuple(scores.shape)}; expected one number for "
                "each"
            )
        parts.append(scores.double())
    values = torch.cat(parts)
    if num_nan := int(values.isnan().sum()):
        raise ValueError(f"the score {name} is NaN for {num_nan} of {len(values)} activations; expected numbers")
    return values


# --- verdicts in words --------------------------------------------------------------------------------------


def hardly_separated(one: Separation, detected: float, false_alarm: float) -> bool:
    """Whether an alarm hardly works on a set of outliers.

    That is so if the AUROC is below 0.6, or if the fraction of detected outliers is below twice the rate of false
    alarms that was asked for.
    """
    return one.auroc < _WEAK_AUROC or detected < _WEAK_GAIN * false_alarm


def better_score(separations: Mapping[str, Separation], chosen: str) -> str | None:
    """Return the name of the score that separates a set best, if it is better than the chosen one beyond chance.

    The difference has to be above twice the larger standard error, and the AUROC at least 0.6.
    """
    own = separations[chosen]
    best = max(separations, key=lambda name: separations[name].auroc)
    one = separations[best]
    errors = [error for error in (own.standard_error, one.standard_error) if not math.isnan(error)]
    margin = 2 * max(errors, default=0.0)
    return best if one.auroc >= _WEAK_AUROC and one.auroc - own.auroc > margin else None


def share_in_words(count: int, total: int) -> str:
    """Return a count and its share; for a count of 0, the bound of the share at 95 % confidence in place of 0 %.

    Example:
        >>> share_in_words(3, 60), share_in_words(0, 60)
        ('3 of 60 (5.0 %)', 'none of 60 (below 4.9 % with 95 % confidence)')
    """
    if count:
        return f"{count} of {total} ({100 * count / total:.1f} %)"
    return f"none of {total} (below {100 * (1 - 0.05 ** (1 / max(total, 1))):.2g} % with 95 % confidence)"
