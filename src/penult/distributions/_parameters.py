"""What the parameters of a principal mixture have to be, and what is said of others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penult.special import working_dtype

__all__ = ["check_parameters", "check_values"]


def check_parameters(given: dict[str, Tensor]) -> None:
    """Raise unless all are floating tensors of one dtype, by a TypeError, and their shapes agree, by a ValueError."""
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating tensor, got {kind}; use torch.tensor(..., dtype=...)")
    if len({value.dtype for value in given.values()}) > 1:
        kinds = ", ".join(f"{name} {value.dtype}" for name, value in given.items())
        raise TypeError(f"the parameters must have one dtype, got {kinds}")
    m, d = given["components"].shape if given["components"].dim() == 2 else (0, 0)
    c = len(given["logits"]) if given["logits"].dim() == 1 else 0
    expected = {
        "loc": (d,),
        "components": (m, d),
        "logits": (c,),
        "means": (c, m),
        "scale_tril": (c, m, m),
        "residual_scale": (),
        "softness": (d,),
    }
    if not 1 <= m <= d or c < 1 or any(tuple(value.shape) != expected[name] for name, value in given.items()):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise ValueError(
            f"the shapes do not agree: {shapes}; expected loc (d,), components (m, d), logits (C,), means (C, m), "
            "scale_tril (C, m, m), residual_scale () and softness (d,) with 1 <= m <= d and C >= 1"
        )


def check_values(given: dict[str, Tensor]) -> None:
    """Raise unless they are finite, some component has a weight, the softness is positive and the plane orthonormal.

    The rest is said by the constraints of torch.distributions.
    """
    for name, value in given.items():
        if not bool((value.isfinite() | (value.isneginf() if name == "logits" else False)).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    if not bool((given["logits"] > -math.inf).any()):
        raise ValueError("logits leave every component out: all are -inf")
    if "softness" in given and not bool((given["softness"] > 0).all()):
        raise ValueError(f"softness must be positive, or None; its least is {float(given['softness'].min()):.4g}")
    plane = given["components"].detach().to(working_dtype(given["components"].device))
    error = float((plane @ plane.mT - torch.eye(len(plane), dtype=plane.dtype, device=plane.device)).abs().max())
    tolerance = max(1e-6, 20 * torch.finfo(given["components"].dtype).eps)
    if error > tolerance:
        raise ValueError(
            f"components must have orthonormal rows; their products differ from the identity by {error:.4g}: "
            "torch.linalg.qr(components.mT).Q.mT spans the same plane"
        )
