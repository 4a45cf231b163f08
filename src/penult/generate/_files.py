"""A generator from its file, whatever kind it is."""

from __future__ import annotations

import os
from typing import Any

from penult import io
from penult.generate._gan import ActivationGAN
from penult.generate._generator import ActivationGenerator
from penult.generate._stored import KIND
from penult.generate._vae import ActivationVAE

__all__ = ["load"]

_KINDS: dict[str, type[ActivationGenerator]] = {each.__name__: each for each in (ActivationVAE, ActivationGAN)}


def load(path: str | os.PathLike[str], **options: Any) -> ActivationGenerator:
    """Read a generator of any kind that its ``save`` wrote; no classifier and no pickle are needed.

    Args:
        path: The file.
        options: As for the ``load`` of its class: ``tap``, ``preprocess``, ``bases``, ``device``, and networks of
            your own.

    Raises:
        FileNotFoundError: There is no such file.
        penult.io.FileFormatError: The file is damaged, foreign, or holds a generator that penult does not know.
        ValueError: It was made with networks of your own, and these are not given.

    Example:
        >>> load("missing.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: missing.safetensors does not exist
    """
    name = io.read(path, kind=KIND).metadata.get("class")
    if not isinstance(name, str) or name not in _KINDS:
        raise io.FileFormatError(f"{path} holds the generator {name!r}, which this penult does not know")
    return _KINDS[name].load(path, **options)
