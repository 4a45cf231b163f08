"""Generators of class-conditional images, conditioned on the activations of a classifier.

    >>> import torch, penult
    >>> images = penult.data.digits().images
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))
    >>> head = penult.find_head(model, images[:8])
    >>> tap = penult.Tap(model, head)
    >>> bank = penult.Marginal.fit(head, penult.extract(tap, [images]), kind="bank")
    >>> vae = penult.generate.ActivationVAE(penult.GenerativePair(head, bank), tap, image_shape=(1, 8, 8))
    >>> vae.generate(torch.tensor([0, 1, 2])).shape
    torch.Size([3, 1, 8, 8])

Generators are LightningModules and need the extra ``train``; `quality` and `Judge` only need torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from penult.generate import _classifier
from penult.generate._image_metrics import frechet_distance
from penult.generate._quality import Judge, Quality, quality

if TYPE_CHECKING:
    from penult.generate._gan import ActivationGAN
    from penult.generate._generator import ActivationGenerator
    from penult.generate._vae import ActivationVAE

# These load Lightning, so they are imported on first use.
_LAZY = {"ActivationGAN": "_gan", "ActivationGenerator": "_generator", "ActivationVAE": "_vae"}
_KINDS = "ActivationVAE", "ActivationGAN"


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"penult.generate.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'penult.generate' has no attribute {name!r}")


def load(path: str | os.PathLike[str], **options: Any) -> ActivationGenerator:
    """Read a saved generator of any class, without a classifier and without pickle.

    Args:
        path: The file.
        options: As for the ``load`` of its class: ``tap``, ``preprocess``, ``bases``, ``device``, and networks of
            your own.

    Raises:
        FileNotFoundError: There is no such file.
        penult.io.FileFormatError: The file is damaged, of another kind, or its generator class is unknown.
        ValueError: The generator has networks of your own, and these are not given.

    Example:
        >>> load("missing.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: missing.safetensors does not exist
    """
    from penult import io
    from penult.generate._file import KIND

    name = io.read(path, kind=KIND).metadata.get("class")
    if name not in _KINDS:
        raise io.FileFormatError(f"{path} holds a generator of class {name!r}; expected {' or '.join(_KINDS)}")
    generator_class: type[ActivationGenerator] = __getattr__(name)
    return generator_class.load(path, **options)


__all__ = [
    "ActivationGAN", "ActivationGenerator", "ActivationVAE", "Judge", "Quality", "frechet_distance", "load", "quality",
]  # fmt: skip

# Pickles that earlier versions wrote name these modules.
sys.modules["penult.generate._sight"] = _classifier
