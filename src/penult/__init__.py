"""penult: the generative model inside a trained classifier.

A classifier's last linear layer defines a density of the activations it reads for each class, given a base measure.
:class:`GenerativePair` is that distribution: exact densities, samples, a prior and a posterior.

    >>> import torch, penult
    >>> pair = penult.GenerativePair(penult.Head(torch.eye(3)), penult.Sphere(4.0))
    >>> pair.given(2).sample((5,)).shape
    torch.Size([5, 3])
"""

import importlib
from typing import TYPE_CHECKING, Any

from penult._version import __version__ as __version__

if TYPE_CHECKING:
    from penult import bases, distributions, io, scores, special
    from penult.activations import Activations, Tap, extract
    from penult.bases import Gaussian, Marginal, Sphere
    from penult.distributions import VonMisesFisher
    from penult.head import Head, HeadCertificate, HeadNotFoundError, HeadPart, find_head
    from penult.moments import Moments
    from penult.pair import GenerativePair, load

# Rooms and names are imported on first use, so that `import penult` and `penult --help` stay quick.
_ROOMS = (
    "activations", "bases", "data", "demo", "distill", "distributions", "generate", "head", "io", "moments", "pair",
    "processes", "realism", "report", "scores", "special", "testing",
)  # fmt: skip
_NAMES = {
    "Activations": "activations",
    "Gaussian": "bases",
    "GenerativePair": "pair",
    "Head": "head",
    "HeadCertificate": "head",
    "HeadNotFoundError": "head",
    "HeadPart": "head",
    "Marginal": "bases",
    "Moments": "moments",
    "Sphere": "bases",
    "Tap": "activations",
    "VonMisesFisher": "distributions",
    "extract": "activations",
    "find_head": "head",
    "load": "pair",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"penult.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"penult.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'penult' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_NAMES})


__all__ = [
    "Activations",
    "Gaussian",
    "GenerativePair",
    "Head",
    "HeadCertificate",
    "HeadNotFoundError",
    "HeadPart",
    "Marginal",
    "Moments",
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
