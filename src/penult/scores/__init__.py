"""Outlier scores, and thresholds with a guaranteed false alarm rate.

A higher score always means a more unusual activation. These scores are functions of a pair and activations:

- `directional`: how unlikely the direction of h is, given its norm. Start with this one; it needs a sphere.
- `energy`, `max_logit`, `msp`: common scores of the model's own logits.
- `density`: the negative log density of the pair.
- `usual` returns the recommended one for a pair.

`Mahalanobis`, `RelativeMahalanobis`, `KNN` and `ViM` are modules that are fitted to reference activations. A
`Threshold` turns any score into an outlier test with a guaranteed false alarm rate:

    >>> import torch, penult
    >>> head = penult.Head(4 * torch.eye(3))
    >>> familiar, _ = penult.GenerativePair(head).sample((600,), generator=torch.Generator().manual_seed(0))
    >>> pair = penult.GenerativePair(head, penult.Sphere.fit(head, familiar[:300], shape="elliptic"))
    >>> threshold = Threshold.fit(directional, familiar[300:], pair=pair, false_alarm=0.05)
    >>> threshold(torch.tensor([[-1.0, -1.0, 2.0], [-1.0, -1.0, -1.0]])).tolist()
    [False, True]
"""

import sys

from penult.scores import _pair_scores
from penult.scores._comparison import Comparison, Separation, compare, separation
from penult.scores._composite import Composite
from penult.scores._fitted import KNN, ViM
from penult.scores._mahalanobis import Mahalanobis, RelativeMahalanobis
from penult.scores._pair_scores import density, directional, energy, max_logit, msp, raw_logits, usual
from penult.scores._protocol import PairScore, bound, check_calibration, load, save, score_from_state, score_state
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
_score_state, _score_from_state = score_state, score_from_state

# Pickles that earlier versions wrote name these modules.
sys.modules["penult.scores._of_pairs"] = _pair_scores
