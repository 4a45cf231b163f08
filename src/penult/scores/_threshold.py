"""From scores to decisions with a false alarm rate that holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from penult.activations import Activations, _ActivationSource
from penult.pair import GenerativePair
from penult.scores._pair_scores import density, directional, energy, max_logit, msp
from penult.scores._score import Score, drop_missing, resize

__all__ = ["Threshold"]

_OF_PAIRS = (density, directional, energy, max_logit, msp)


@final
class Threshold(nn.Module):
    r"""Calls an activation strange if its score is above nearly all those of familiar ones.

    With scores s_1 … s_n of familiar activations that the score was not fitted to, the p-value of another score s is

    .. math:: p(s) = \frac{1 + \#\{i : s_i \ge s\}}{n + 1},

    and what has p ≤ α is called strange. If that activation and the n are exchangeable, such as independent draws of
    one law, P(p ≤ α) ≤ α, whatever the law and the score (split conformal prediction). The guarantee is for the mean
    over such sets of n; `rate_bound` says how far the rate of one set may lie above it. It does not hold for other
    laws, such as a shifted domain: there it says how much stranger inputs became.

    References:
        Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005. Bates, Candès, Lei, Romano and Sesia,
        "Testing for Outliers with Conformal p-values", Annals of Statistics 2023.

    Args:
        score: Activations (B, d) to scores (B,), higher for stranger ones.
        calibration: Scores (n,) of familiar activations.
        false_alarm: α, the share of familiar activations that may be called strange.

    Its state dict holds the scores and α, as tensors, beside the state of the score; another threshold of the same
    score loads it, whatever its own n and α.

    Attributes:
        calibration: Sorted scores (n,).
        false_alarm: α.

    Raises:
        ValueError: α is not between 0 and 1, a score is NaN or no number, or n + 1 < 1/α: then nothing could be called
            strange.

    Example:
        >>> import penult
        >>> from penult.scores import energy
        >>> pair = GenerativePair(penult.Head(4 * torch.eye(3)))
        >>> h, _ = pair.sample((199,), generator=torch.Generator().manual_seed(0))
        >>> threshold = Threshold.fit(energy, h, pair=pair, false_alarm=0.05)
        >>> threshold
        Threshold(energy > -2.872, false alarms 0.05 of n=199, at most 0.078 with confidence 0.95)
        >>> threshold.p_value(torch.zeros(1, 3))
        tensor([0.0050])
    """

    calibration: Tensor

    def __init__(self, score: Callable[[Tensor], Tensor], calibration: Tensor, false_alarm: float = 0.05) -> None:
        super().__init__()
        _check(calibration, false_alarm)
        self.score = score
        self.false_alarm = float(false_alarm)
        self.register_buffer("calibration", calibration.detach().sort().values)

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        score: Score | Callable[..., Tensor],
        activations: Tensor | Activations,
        *,
        pair: GenerativePair | None = None,
        false_alarm: float = 0.05,
    ) -> Threshold:
        """A threshold from familiar activations that neither pair nor score was fitted to.

        Args:
            score: A fitted `Score`, a function such as `penult.scores.directional` together with a `pair`, or any
                function of activations (B, d).
            activations: Familiar ones (n, d), as a tensor or as `Activations`.
            pair: What the function takes first.
            false_alarm: The share of them that may be called strange.

        Returns:
            The threshold, which calls the score.

        Raises:
            TypeError: `activations` are neither a floating tensor nor `Activations`, a `pair` is given with a fitted
                score, or none with a score of pairs.
            ValueError: There are too few, or a score is NaN.
        """
        if pair is not None and isinstance(score, nn.Module):
            raise TypeError(f"a {type(score).__name__} is fitted already and takes no pair: leave pair out")
        if pair is None and score in _OF_PAIRS:
            raise TypeError(f"{_name(score)} is a score of a pair: give it, pair=pair")
        function = score if pair is None else _Bound(score, pair)
        found = [function(rows) for rows in _ActivationSource(activations, dtype="wide")]
        return cls(function, torch.cat(found), false_alarm)

    def get_extra_state(self) -> Tensor:
        """α for the state dict, in float64: a buffer would be rounded when the threshold moves to another dtype."""
        return torch.tensor(self.false_alarm, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """α of a state dict."""
        self.false_alarm = float(state)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        calibration, alarm = state.get(f"{prefix}calibration"), state.get(f"{prefix}_extra_state")
        if calibration is not None:
            _check(calibration, self.false_alarm if alarm is None else float(alarm))
            resize(self, "calibration", calibration, like=calibration)
        super()._load_from_state_dict(state, prefix, *args)
        drop_missing(args, f"{prefix}_extra_state")  # of a state that knew the scores alone

    @property
    def value(self) -> float:
        """The score above which an activation is called strange."""
        n = len(self.calibration)
        return float(self.calibration[n - self._allowed])

    @property
    def _allowed(self) -> int:
        """How many of the n + 1 may be at or above a score that is called strange: ⌊α(n + 1)⌋."""
        return math.floor(self.false_alarm * (len(self.calibration) + 1) + 1e-9)

    def forward(self, h: Tensor) -> Tensor:
        """Whether activations (B, d) are strange, (B,) of bool."""
        return self._reached(h) <= self._allowed

    def p_value(self, h: Tensor) -> Tensor:
        """P-values of activations (B, d), (B,) of float32; that of a NaN score is the least there is."""
        return self._reached(h) / (len(self.calibration) + 1)

    def rate_bound(self, confidence: float = 0.95) -> float:
        r"""What the false alarm rate of this very threshold does not exceed, at a confidence over sets of n.

        For scores without ties the rate of a threshold has the law Beta(k, n + 1 − k), k = ⌊α(n + 1)⌋.

        Args:
            confidence: Between 0 and 1.

        References:
            Vovk, "Conditional validity of inductive conformal predictors", ACML 2012.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1")
        n, k = len(self.calibration), self._allowed
        j = torch.arange(k, n + 1, dtype=torch.float64)
        ways = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
        low, high = 0.0, 1.0
        for _ in range(60):  # P(Beta(k, n + 1 - k) <= x) is that of at least k successes in n trials
            x = (low + high) / 2
            reached = (ways + j * math.log(x) + (n - j) * math.log1p(-x)).logsumexp(0).exp()
            low, high = (x, high) if float(reached) < confidence else (low, x)
        return high

    def _reached(self, h: Tensor) -> Tensor:
        """One more than how many familiar scores are at or above those of activations (B, d), (B,)."""
        scores = self.score(h).detach().to(self.calibration)
        below = torch.searchsorted(self.calibration, scores.contiguous())
        n = len(self.calibration)
        return 1 + n - below.masked_fill(scores.isnan(), n)

    def __repr__(self) -> str:
        """The rule and what it promises, on one line."""
        return (
            f"Threshold({_name(self.score)} > {self.value:.4g}, false alarms {self.false_alarm:.3g} of n="
            f"{len(self.calibration)}, at most {self.rate_bound():.2g} with confidence 0.95)"
        )


def _check(calibration: Tensor, false_alarm: float) -> None:
    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm is {false_alarm}; it must lie between 0 and 1")
    if calibration.dim() != 1 or not calibration.is_floating_point() or bool(calibration.isnan().any()):
        wrong = f", {int(calibration.isnan().sum())} of them NaN" if calibration.dim() == 1 else ""
        raise ValueError(
            f"scores of familiar activations are {calibration.dtype} of shape {tuple(calibration.shape)}{wrong}; "
            "expected one floating number each, (n,), and no NaN"
        )
    least = math.ceil(1 / false_alarm - 1e-9) - 1
    if len(calibration) < least:
        raise ValueError(
            f"{len(calibration)} familiar activations cannot keep false alarms to {false_alarm:g}: "
            f"give at least {least}, or allow more false alarms"
        )


@final
class _Bound(nn.Module):
    """A function of a pair and activations, with its pair."""

    def __init__(self, function: Callable[[GenerativePair, Tensor], Tensor], pair: GenerativePair) -> None:
        super().__init__()
        self.function, self.pair = function, pair

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self.pair, h.to(self.pair.head.weight.device))


def _name(score: object) -> str:
    if isinstance(score, _Bound | partial):
        score = score.function if isinstance(score, _Bound) else score.func
    return getattr(score, "__name__", type(score).__name__)
