r"""Scalar special functions of the unit sphere in R^dim, exact to any derivative.

The von Mises-Fisher law with concentration κ tilts the uniform law of the sphere by exp(κ t), t the cosine
to its mean direction. All of it follows from the moment generating function of t,

.. math:: F(\kappa) &= \log E\,e^{\kappa t} = \log {}_0F_1(; d/2; \kappa^2/4) \\
          &= \log\,[\Gamma(\nu+1) (2/\kappa)^\nu I_\nu(\kappa)],\qquad \nu = d/2 - 1,

which is smooth, even and zero at κ = 0. Its derivatives are F' = A (the mean of t) and F'' = V (its variance).
F is evaluated by Debye's uniform expansion at an order of at least 20 and, below dimension 42, a downward
recurrence whose terms are all positive; nothing under- or overflows, and errors stay relative (DLMF 10.41,
10.29; Amos 1974). float16, bfloat16 and float32 inputs are computed in float64 and rounded once; a device
without float64 takes a float32 route (F to 3e-6, A to 4e-7).
"""

from penult.special._cosine import cosine_cdf, cosine_log_prob, cosine_shift, gauss_legendre
from penult.special._moments import (
    concentration,
    cosine_variance,
    log_sphere_area,
    log_sphere_mgf,
    log_sphere_mgf_deficit,
    mean_resultant_deficit,
    mean_resultant_length,
)
from penult.special._precision import in_double, in_full, outside_transforms, traced, working_dtype

__all__ = [
    "concentration",
    "cosine_cdf",
    "cosine_log_prob",
    "cosine_shift",
    "cosine_variance",
    "gauss_legendre",
    "in_double",
    "in_full",
    "log_sphere_area",
    "log_sphere_mgf",
    "log_sphere_mgf_deficit",
    "mean_resultant_deficit",
    "mean_resultant_length",
    "outside_transforms",
    "traced",
    "working_dtype",
]
