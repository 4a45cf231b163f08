"""Readers of image data sets."""

from penult.data._digits import Images, digits

__all__ = ["Images", "digits"]
