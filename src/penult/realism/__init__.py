"""Comparison of pairs with real activations: :func:`compare` a pair, or :func:`choose` among bases.

Every pair has the softmax of its head as posterior, with any base. Its samples need not resemble real activations:
this package measures whether they do, and compares real activations with other real ones in the same way. Two-sample
tests need scikit-learn (extra ``data``).
"""

import sys

from penult.realism import _choose
from penult.realism._choose import CANDIDATES, Candidate, Ranked, Ranking, choose
from penult.realism._compare import compare
from penult.realism._result import (
    Calibration,
    ClassRealism,
    Collapse,
    Comparison,
    Histogram,
    Prior,
    Realism,
    Spread,
    TiltIdentity,
)
from penult.realism._statistics import energy_coefficient
from penult.realism._two_sample import two_sample_auc

__all__ = [
    "CANDIDATES",
    "Calibration",
    "Candidate",
    "ClassRealism",
    "Collapse",
    "Comparison",
    "Histogram",
    "Prior",
    "Ranked",
    "Ranking",
    "Realism",
    "Spread",
    "TiltIdentity",
    "choose",
    "compare",
    "energy_coefficient",
    "two_sample_auc",
]

# Pickles that earlier versions wrote name these modules.
sys.modules["penult.realism._ranking"] = _choose
