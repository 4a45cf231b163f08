"""penult: the generative model inside a trained classifier.

A classifier's last linear layer already defines the density of the activations it reads, class by class.
:class:`GenerativePair` gives that law a name: exact densities, samples, a prior and a posterior.

    >>> import torch, penult
    >>> pair = penult.GenerativePair(penult.Head(torch.eye(3)), penult.Sphere(4.0))
    >>> pair.given(2).sample((5,)).shape
    torch.Size([5, 3])
"""

import importlib
from typing import Any

from penult import bases, distributions, io, scores, special
from penult.activations import Activations, Tap, extract
from penult.bases import Gaussian, Marginal, Sphere
from penult.distributions import VonMisesFisher
from penult.head import Head, HeadCertificate, HeadNotFoundError, find_head
from penult.pair import GenerativePair, load

__version__ = "0.1.0"

_ROOMS = ("data", "demo", "distill", "generate", "realism", "report", "testing")  # loaded when they are first asked for


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"penult.{name}")
    raise AttributeError(f"module 'penult' has no attribute {name!r}")


__all__ = [
    "Activations",
    "Gaussian",
    "GenerativePair",
    "Head",
    "HeadCertificate",
    "HeadNotFoundError",
    "Marginal",
    "Sphere",
    "Tap",
    "VonMisesFisher",
    "bases",
    "distributions",
    "extract",
    "find_head",
    "io",
    "load",
    "scores",
    "special",
]
