"""How close a pair comes to real activations: :func:`compare` one, or :func:`choose` among bases.

Every pair is exact: its posterior is the softmax of its head, whatever the base. That says nothing of whether
activations look like its draws, which is what is measured here, next to what real activations get against other
real ones. Two-sample tests need scikit-learn (extra ``data``).
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
