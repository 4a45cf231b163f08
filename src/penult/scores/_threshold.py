"""Thresholds for outlier scores, with a guaranteed false alarm rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from penult._checks import as_activations, check_between
from penult.activations import Activations, _ActivationSource
from penult.pair import GenerativePair
from penult.scores._protocol import PairScore, bound, check_calibration, score_name
from penult.scores._score import Score, drop_missing, resize

__all__ = ["Threshold"]


@final
class Threshold(nn.Module):
    r"""Outlier test: an activation is an outlier if its score is above nearly all calibration scores.

    With scores s_1 … s_n of calibration activations that the score was not fitted to, the p-value of another score s is

    .. math:: p(s) = \frac{1 + \#\{i : s_i \ge s\}}{n + 1},

    and an activation with p ≤ α is an outlier. If that activation and the n calibration activations are exchangeable,
    such as independent samples of one distribution, P(p ≤ α) ≤ α for any distribution and any score (split conformal
    prediction). The guarantee is for the mean over calibration sets of size n; `rate_bound` bounds the rate of a single
    set. It does not hold for samples of another distribution, such as a shifted domain: there the rate of outliers
    measures the shift.

    References:
        Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005. Bates, Candès, Lei, Romano and Sesia,
        "Testing for Outliers with Conformal p-values", Annals of Statistics 2023.

    Args:
        score: Function from activations (B, d) to scores (B,), higher for more unusual ones.
        calibration: Scores (n,) of the calibration activations.
        false_alarm: α, the largest acceptable fraction of false alarms.

    Its state dict holds the calibration scores and α as tensors, in addition to the state of the score. A threshold of
    the same score with any n and α can load it.

    Attributes:
        calibration: Sorted scores (n,).
        false_alarm: α.

    Raises:
        TypeError: α is not a number, or the scores are not floating.
        ValueError: α is not between 0 and 1, the scores are not of shape (n,), one is NaN, or n + 1 < 1/α:
            then no score could be above the threshold.

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
        calibration = as_activations(calibration, "calibration", "(n,)")
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
        """Compute a threshold from calibration activations, to which neither pair nor score was fitted.

        Args:
            score: A fitted `Score`, any function or module that maps activations (B, d) to scores (B,), or a function
                of a pair such as `penult.scores.directional`.
            activations: Calibration activations (n, d), as a tensor or as `Activations`.
            pair: The pair, for a function of one; other scores ignore it.
            false_alarm: The largest acceptable fraction of false alarms.

        Returns:
            The threshold, which calls the score.

        Raises:
            TypeError: `activations` are neither a floating tensor nor `Activations`, the score cannot be called, or the
                pair of a function of a pair is missing.
            ValueError: There are too few activations, a score is NaN, or the activations are the very set that the
                score, or the base that it depends on, was fitted to. A part of that set is not noticed.
        """
        function = bound(score, pair)
        source = _ActivationSource(activations, dtype="wide")
        check_calibration(function, source.digest)
        scores = [function(rows) for rows in source]
        return cls(function, torch.cat(scores), false_alarm)

    def get_extra_state(self) -> Tensor:
        """Return α for the state dict, as float64."""
        # A buffer would be rounded when the threshold moves to another dtype.
        return torch.tensor(self.false_alarm, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Set α from a state dict."""
        self.false_alarm = float(state)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        calibration, alarm = state.get(f"{prefix}calibration"), state.get(f"{prefix}_extra_state")
        if calibration is not None:
            _check(calibration, self.false_alarm if alarm is None else float(alarm))
            resize(self, "calibration", calibration.shape, calibration.dtype)
        super()._load_from_state_dict(state, prefix, *args)
        # Earlier versions stored the calibration scores without α.
        drop_missing(args, f"{prefix}_extra_state")

    @property
    def value(self) -> float:
        """The score above which an activation is an outlier."""
        n = len(self.calibration)
        return float(self.calibration[n - self._max_rank])

    @property
    def _max_rank(self) -> int:
        """Largest rank of an outlier's score among n + 1 scores in descending order: ⌊α(n + 1)⌋."""
        return math.floor(self.false_alarm * (len(self.calibration) + 1) + 1e-9)

    def forward(self, h: Tensor) -> Tensor:
        """Return whether activations (B, d) are outliers, (B,) of bool."""
        return self._rank(h) <= self._max_rank

    def p_value(self, h: Tensor) -> Tensor:
        """Return the p-values of activations (B, d), (B,) of float32; a NaN score gets the smallest one."""
        # A quotient of integers would be of the default dtype, which may have half precision.
        return self._rank(h).float() / (len(self.calibration) + 1)

    def rate_bound(self, confidence: float = 0.95) -> float:
        r"""Return an upper bound of the false alarm rate of this threshold, at a confidence over calibration sets.

        For scores without ties the rate of a threshold follows Beta(k, n + 1 − k), k = ⌊α(n + 1)⌋.

        Args:
            confidence: Between 0 and 1.

        References:
            Vovk, "Conditional validity of inductive conformal predictors", ACML 2012.
        """
        confidence = check_between("confidence", confidence)
        n, k = len(self.calibration), self._max_rank
        j = torch.arange(k, n + 1, dtype=torch.float64, device="cpu")
        log_binomial = (
            torch.lgamma(torch.tensor(n + 1.0, device="cpu").double()) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
        )
        # P(Beta(k, n + 1 - k) <= x) is the probability of at least k successes in n trials; bisect for its quantile.
        low, high = 0.0, 1.0
        for _ in range(60):
            x = (low + high) / 2
            probability = (log_binomial + j * math.log(x) + (n - j) * math.log1p(-x)).logsumexp(0).exp()
            low, high = (x, high) if float(probability) < confidence else (low, x)
        return high

    def _rank(self, h: Tensor) -> Tensor:
        """Return one more than the number of calibration scores at or above those of activations (B, d), (B,)."""
        h = as_activations(h, shape="(B, d)", device=self.calibration.device)
        scores = self.score(h).detach().to(self.calibration)
        below = torch.searchsorted(self.calibration, scores.contiguous())
        n = len(self.calibration)
        return 1 + n - below.masked_fill(scores.isnan(), n)

    def __repr__(self) -> str:
        """Return the threshold and its guarantee, on one line."""
        return (
            f"Threshold({score_name(self.score)} > {self.value:.4g}, false alarms {self.false_alarm:.3g} of n="
            f"{len(self.calibration)}, at most {self.rate_bound():.2g} with confidence 0.95)"
        )


def _check(calibration: Tensor, false_alarm: float) -> None:
    false_alarm = check_between("false_alarm", false_alarm)
    if calibration.dim() != 1 or not calibration.is_floating_point() or bool(calibration.isnan().any()):
        wrong = f", {int(calibration.isnan().sum())} of them NaN" if calibration.dim() == 1 else ""
        raise ValueError(
            f"scores of familiar activations are {calibration.dtype} of shape {tuple(calibration.shape)}{wrong}; "
            "expected a floating-point tensor (n,) without NaN"
        )
    min_scores = math.ceil(1 / false_alarm - 1e-9) - 1
    if len(calibration) < min_scores:
        raise ValueError(
            f"{len(calibration)} familiar activations cannot keep false alarms to {false_alarm:g}: "
            f"give at least {min_scores}, or allow more false alarms"
        )


# Pickles of earlier versions have these names.
_ScoreWithPair = _Bound = PairScore
