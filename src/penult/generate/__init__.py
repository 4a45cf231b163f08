"""Class-conditional images from a classifier: generators that are conditioned on its activations.

    >>> import torch, penult
    >>> images = penult.data.digits().images
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))
    >>> head = penult.find_head(model, images[:8])
    >>> tap = penult.Tap(model, head)
    >>> bank = penult.Marginal.fit(head, penult.extract(tap, [images]), kind="bank")
    >>> vae = penult.generate.ActivationVAE(penult.GenerativePair(head, bank), tap, image_shape=(1, 8, 8))
    >>> vae.generate(torch.tensor([0, 1, 2])).shape
    torch.Size([3, 1, 8, 8])

Generators are LightningModules and need the extra ``train``; the measures of quality need torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from penult.generate._frechet import frechet_distance
from penult.generate.quality import Judge, Quality, quality

if TYPE_CHECKING:
    from penult.generate._files import load
    from penult.generate._gan import ActivationGAN
    from penult.generate._generator import ActivationGenerator
    from penult.generate._vae import ActivationVAE

_ROOMS = {  # they load Lightning
    "ActivationGAN": "_gan", "ActivationGenerator": "_generator", "ActivationVAE": "_vae", "load": "_files",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"penult.generate.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'penult.generate' has no attribute {name!r}")


__all__ = [
    "ActivationGAN", "ActivationGenerator", "ActivationVAE", "Judge", "Quality", "frechet_distance", "load", "quality",
]  # fmt: skip
