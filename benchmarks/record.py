"""Origin of the results in every results file, and writing these files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import penult

__all__ = ["load", "machine", "short", "versions", "write"]


def short(value: float, digits: int = 4) -> float:
    """A number rounded to a few significant digits, for the file."""
    return float(f"{value:.{digits}g}")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, penult and what else took part."""
    found = {"python": platform.python_version(), "penult": penult.__version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": model, "cores": os.cpu_count(), "system": system, "threads_used": torch.get_num_threads()}


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write aside and rename, so that a run stopped here leaves the older file whole."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: Path | None, benchmark: str, layout: int) -> dict[str, Any]:
    """What an earlier run left behind: a results file of this benchmark and layout, or an empty one."""
    results: dict[str, Any] = {}
    if path is not None and path.exists():
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as reason:
            raise SystemExit(f"{path} is not a results file ({reason}); remove it") from None
    if results.get("layout") != layout:
        return {"benchmark": benchmark, "layout": layout, "sections": {}}
    return results
