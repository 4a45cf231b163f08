"""Outlier scores, and thresholds with a guaranteed false alarm rate.

A higher score always means a more unusual activation. These scores are functions of a pair and activations:

- `directional`: how unlikely the direction of h is, given its norm. It needs a sphere.
- `energy`, `max_logit`, `msp`: common scores of the model's own logits.
- `density`: the negative log density of the pair.

`Composite`, `Mahalanobis`, `RelativeMahalanobis`, `KNN` and `ViM` are modules that are fitted to reference activations,
without labels. Start with `Composite`, or with `usual`, which returns the recommended score.

A score is anything that maps activations (B, d) to scores (B,): a fitted `Score`, a function of your own, or, together
with a pair, a function of it. `Threshold` turns any score into an outlier test with a guaranteed false alarm rate, and
`compare` compares scores:

    >>> import torch, penult
    >>> head, g = penult.Head(4 * torch.eye(3)), torch.Generator().manual_seed(0)
    >>> familiar = torch.eye(3).repeat(200, 1) + 0.2 * torch.randn(600, 3, generator=g)
    >>> score = Composite.fit(head, familiar[:300])
    >>> threshold = Threshold.fit(score, familiar[300:], false_alarm=0.05)
    >>> threshold(torch.tensor([[1.0, 0.1, 0.0], [0.5, 0.5, 0.5]])).tolist()
    [False, True]
"""

import sys

from penult.scores import _pair_scores
from penult.scores._comparison import (
    Comparison,
    Separation,
    better_score,
    compare,
    hardly_separated,
    separation,
    share_in_words,
)
from penult.scores._composite import Composite, usual
from penult.scores._fitted import KNN, ViM
from penult.scores._mahalanobis import Mahalanobis, RelativeMahalanobis
from penult.scores._pair_scores import density, directional, energy, max_logit, msp, raw_logits
from penult.scores._protocol import (
    PairScore,
    bound,
    check_calibration,
    load,
    save,
    score_from_state,
    score_name,
    score_state,
    stored_score,
)
from penult.scores._score import Score
from penult.scores._threshold import Threshold

__all__ = [
    "KNN",
    "Comparison",
    "Composite",
    "Mahalanobis",
    "PairScore",
    "RelativeMahalanobis",
    "Score",
    "Separation",
    "Threshold",
    "ViM",
    "compare",
    "density",
    "directional",
    "energy",
    "load",
    "max_logit",
    "msp",
    "save",
    "separation",
    "usual",
]

# Lent to other rooms of the package; not public.
_raw_logits = raw_logits
_bound, _check_calibration = bound, check_calibration
_score_name, _score_state, _score_from_state = score_name, score_state, score_from_state
_stored_score = stored_score
_better_score, _hardly_separated, _share_in_words = better_score, hardly_separated, share_in_words

# Pickles that earlier versions wrote name these modules.
sys.modules["penult.scores._of_pairs"] = _pair_scores
