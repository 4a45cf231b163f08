"""Readers of image data sets."""

from penult.data.digits import Images, digits

__all__ = ["Images", "digits"]
