"""Lazy import of packages of the extra ``data``."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["extra"]


def extra(module: str, purpose: str) -> Any:
    """Import and return a module of the extra ``data``.

    Args:
        module: Full name of the module.
        purpose: What the module is needed for; the message of the error begins with it.

    Raises:
        ImportError: The package is not installed; the message gives the purpose and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose}: pip install "penult[data]"', name=error.name) from error
