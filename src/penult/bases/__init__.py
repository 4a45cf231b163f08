"""Base measures: what all classes of a head share."""

from penult.bases.base import Base, BaseInfo
from penult.bases.gaussian import Gaussian
from penult.bases.marginal import Marginal
from penult.bases.sphere import Sphere

__all__ = ["Base", "BaseInfo", "Gaussian", "Marginal", "Sphere"]
