"""Packages of the extra ``data``, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["extra"]


def extra(module: str, what: str) -> Any:
    """A module of the extra ``data``.

    Raises:
        ImportError: It is not installed; the message says what needs it and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{what}: pip install "penult[data]"', name=error.name) from error
