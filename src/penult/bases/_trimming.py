"""Fits that survive outliers in what they are fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from penult.bases._pool import Pool

__all__ = ["trimmed"]

_GROWTH = (0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1)  # from half of the rows to all that are to be kept


def trimmed(pool: Pool, trim: float, fitted: Callable[[Pool], Callable[[Tensor], Tensor]]) -> Pool:
    """The rows that are least strange to a fit to them: from half of all, growing to a share 1 − trim.

    Each step fits to what was kept and keeps what is then least strange (Rousseeuw and Van Driessen, "A Fast Algorithm
    for the Minimum Covariance Determinant Estimator", Technometrics 1999, call it a concentration step).

    Args:
        pool: Activations.
        trim: The share to leave out, in (0, 0.5).
        fitted: From a pool to what tells how strange rows (n, d) are to a fit to it, (n,).
    """
    rest = pool
    for share in _GROWTH:
        strangeness = fitted(rest)
        order = pool.processes.gather(torch.cat([strangeness(rows) for rows in pool])).argsort(stable=True)
        rest = pool.only(order[: max(2, math.ceil(len(pool) * (0.5 + share * (0.5 - trim))))])
    return rest
