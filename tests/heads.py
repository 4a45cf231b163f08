"""Heads that laws are checked on."""

import torch

from penult import Head


def random_head(classes, features, *, seed=0, bias=True, unequal=False, dtype=torch.float64, norm=None):
    """A random head whose rows have norm ``norm`` (about 1 by default), unequal by a factor of up to 10."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, features, generator=g, dtype=torch.float64) / features**0.5
    if norm is not None:
        weight = weight / torch.linalg.vector_norm(weight, dim=-1, keepdim=True) * norm
    if unequal:
        weight = weight * torch.logspace(-0.5, 0.5, classes, dtype=torch.float64).unsqueeze(-1)
    b = torch.randn(classes, generator=g, dtype=torch.float64) if bias else None
    return Head(weight.to(dtype), None if b is None else b.to(dtype))
