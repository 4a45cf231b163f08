"""Base measures: what all classes of a head share."""

from penult.bases.base import Base, BaseInfo
from penult.bases.gaussian import Gaussian
from penult.bases.marginal import Marginal
from penult.bases.sphere import Sphere
from penult.distributions import Bank as Bank  # the empirical case of a marginal

__all__ = ["Base", "BaseInfo", "Gaussian", "Marginal", "Sphere"]
