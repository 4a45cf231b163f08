"""Distributions of activations, with the interface of torch.distributions."""

from penult.distributions._positive import NEXT_TO_ZERO
from penult.distributions._sampling import around, cosine_complement
from penult.distributions.bank import Bank
from penult.distributions.constraints import NormalizeTransform, sphere
from penult.distributions.normalizing_flow import NormalizingFlow
from penult.distributions.principal_mixture import PrincipalMixture
from penult.distributions.tilt import Tilt
from penult.distributions.von_mises_fisher import VonMisesFisher

__all__ = ["Bank", "NormalizeTransform", "NormalizingFlow", "PrincipalMixture", "Tilt", "VonMisesFisher", "sphere"]

# Lent to other rooms of the package; not public.
_NEXT_TO_ZERO = NEXT_TO_ZERO
_around = around
_cosine_complement = cosine_complement
