"""Activations of a model: of one forward (`Tap`) or of a whole loader (`extract`)."""

from typing import TypeAlias

from penult.activations._activations import Activations
from penult.activations._extract import extract
from penult.activations._moments import ClassMoments, RunningMoments, Scatter, checked_moments
from penult.activations._source import ActivationSource
from penult.activations._tap import Tap, tap_in
from penult.activations._writer import checksum

__all__ = ["Activations", "Tap", "extract"]

# Lent to other rooms of the package; not public.
_ActivationSource = ActivationSource
_checksum = checksum
_checked_moments, _RunningMoments = checked_moments, RunningMoments
_ClassMoments: TypeAlias = ClassMoments
_Scatter: TypeAlias = Scatter
_tap_in = tap_in
