"""Base measures, which all classes of a head share."""

import sys
from typing import TypeAlias

from penult.bases import _distribution_module
from penult.bases._radial import direction_log_prob_at, radial_table
from penult.bases._sphere_fit import check_trim, fit_chart, typical_rows
from penult.bases._tilted_gaussian import Shrinkage, check_shrinkage, shrunk
from penult.bases.base import Base, BaseInfo
from penult.bases.gaussian import Gaussian
from penult.bases.marginal import Marginal
from penult.bases.sphere import Sphere

# A Marginal of a Bank is the empirical distribution.
from penult.distributions import Bank as Bank

__all__ = ["Base", "BaseInfo", "Gaussian", "Marginal", "Sphere"]

# Lent to other rooms of the package; not public.
_check_shrinkage, _shrunk = check_shrinkage, shrunk
_check_trim, _fit_chart, _typical_rows = check_trim, fit_chart, typical_rows
_direction_log_prob_at, _radial_table = direction_log_prob_at, radial_table
_Shrinkage: TypeAlias = Shrinkage

# Pickles that earlier versions wrote name these modules.
sys.modules["penult.bases._laws"] = _distribution_module
