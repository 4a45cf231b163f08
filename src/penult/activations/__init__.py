"""Activations: tap them out of a model, one forward at a time or over a whole loader."""

from penult.activations._activations import Activations
from penult.activations._extract import extract
from penult.activations._tap import Tap

__all__ = ["Activations", "Tap", "extract"]
