"""Whether a folder of activations was made from the model and loader at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from penult._row_blocks import blocks
from penult.activations._blocks import Block, Memory, load
from penult.head import Head

__all__ = ["check_batch", "check_record", "checksum", "refusal"]


def checksum(head: Head) -> str:
    """SHA-256 of W and b."""
    digest = hashlib.sha256()
    for tensor in (head.weight, head.full_bias):
        for rows in blocks(tensor):
            digest.update(save({"rows": rows.cpu().contiguous()}))
    return digest.hexdigest()


def refusal(folder: Path, reason: str) -> ValueError:
    """The error where a folder holds what is not asked for."""
    return ValueError(
        f"{folder} holds activations that this call would not give: {reason}. To resume, use the same model, arguments "
        "and loader (shuffle=False); else give another folder, or overwrite=True to start anew"
    )


def check_record(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise unless what is known now was so when the folder was written."""
    stored = {"pre_activation": False, **stored}  # which is not written where it is so
    differing = [name for name in now if stored.get(name) != now[name]]
    if differing:
        reason = ", ".join(
            "the head has other weights"
            if name == "head"
            else f"{name} is {stored.get(name)} there and {now[name]} now"
            for name in differing
        )
        raise refusal(folder, reason)


def check_batch(folder: Path, number: int, stored: Block, now: Memory) -> None:
    """Raise unless a batch has come out as it was stored, up to the rounding of another machine."""
    was = load(stored)
    eps = max(torch.finfo(x.dtype).eps for x in (was.activations, was.logits))
    same = (
        len(was) == len(now)
        and (was.labels is None or now.labels is None or torch.equal(was.labels, now.labels))
        and all(
            _close(*pair, max(1e-3, 8 * eps)) for pair in ((was.activations, now.activations), (was.logits, now.logits))
        )
    )
    if not same:
        raise refusal(folder, f"batch {number} (counted from 0) has other activations, logits or labels")


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.double(), b.double()
    scale = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_zeros(())
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * float(scale), equal_nan=True)
