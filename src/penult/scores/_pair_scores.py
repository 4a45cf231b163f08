"""Outlier scores that are functions (pair, h) → (B,), higher for more unusual activations.

Scores are computed and returned in at least float32, also for h of half precision and under torch.autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from penult._checks import as_activations
from penult.bases import Sphere
from penult.head import Head
from penult.pair import GenerativePair
from penult.scores._score import as_score
from penult.special import in_full, in_range, traced

__all__ = ["by_blocks", "density", "directional", "energy", "max_logit", "msp", "raw_logits"]

# Activations or logits of a block, and its fewest rows: each block reads all of W.
_VALUES, _FEWEST_ROWS = 1 << 20, 256


def directional(pair: GenerativePair, h: Tensor) -> Tensor:
    r"""Return how unlikely the direction of h is among activations of its norm: −log p(u / r | r).

    The norm r = ‖u‖ and the direction are those of the chart u = L⁻¹U(h − loc) of the pair's sphere, in m dimensions:

    .. math:: -\log p(u / r \,|\, r) = T(r) - \log \sum_y e^{w_y \cdot h + b_y} + \log \mathrm{area}(S^{m-1}),
              \qquad T(r) = \log \sum_y e^{b'_y + F_m(r \|w'_y\|)},

    with centered rows w, rows w' = L'U w and biases b' = b + w·loc in the chart, and F_m =
    :func:`penult.special.log_sphere_mgf` in dimension m. This is the energy minus the energy
    that is expected at this norm, so a large norm alone does not lower the score. T is tabulated once for each pair.

    Use an elliptic sphere that was fitted to at least a few hundred activations, which need no labels: see
    :meth:`penult.Sphere.fit` and the guide on outliers.

    Args:
        pair: A pair whose base is a :class:`~penult.Sphere`.
        h: Activations (*S, d).

    Returns:
        (*S,), in nats, relative to the surface measure of the unit sphere.

    Raises:
        TypeError: The base is not a sphere, or `h` is not floating.
        ValueError: `h` has another dimension.

    Example:
        >>> pair = GenerativePair(Head(torch.eye(3)), Sphere(4.0))
        >>> directional(pair, torch.tensor([[4.0, 0.0, 0.0], [3.0, 3.0, 3.0]]))
        tensor([2.3148, 4.6351])
    """
    base = pair.base
    if not isinstance(base, Sphere):
        raise TypeError(
            f"base is a {type(base).__name__}, which has no distribution of directions; expected a Sphere. Use "
            "penult.GenerativePair(head, penult.Sphere.fit(head, activations, shape='elliptic'))"
        )
    table = pair.derived("radial table", _radial_table)
    h = as_activations(h, device=pair.head.weight.device)
    with in_full(h.device):
        read = pair.read(h)
        return as_score(-by_blocks(lambda rows: base.direction_log_prob(pair.head, rows, table), read, pair.head), h)


def energy(pair: GenerativePair, h: Tensor) -> Tensor:
    r"""Return the negative log-sum-exp of the logits, −log Σ_y e^{z_y}.

    For a head with centered rows it is log m(h) − log p(h) up to a constant, so activations with a large norm get a
    low score.

    References:
        Liu, Wang, Owens and Li, "Energy-based Out-of-distribution Detection", NeurIPS 2020.

    Args:
        pair: The pair; only its head is used.
        h: Activations (*S, d).

    Returns:
        (*S,).

    Raises:
        TypeError: `h` is neither a floating-point tensor nor an array of floats.
        ValueError: `h` has another dimension.

    Example:
        >>> energy(GenerativePair(Head(torch.eye(3)), Sphere(2.0)), torch.tensor([[9.0, 0.0, 0.0]]))
        tensor([-9.0002])
    """
    return as_score(-by_blocks(lambda rows: raw_logits(pair.head, rows).logsumexp(-1), h, pair.head), h)


def max_logit(pair: GenerativePair, h: Tensor) -> Tensor:
    """Return the negative largest logit, −max_y z_y.

    References:
        Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022.

    Args:
        pair: The pair; only its head is used.
        h: Activations (*S, d).

    Returns:
        (*S,).

    Raises:
        TypeError: `h` is neither a floating-point tensor nor an array of floats.
        ValueError: `h` has another dimension.

    Example:
        >>> max_logit(GenerativePair(Head(torch.eye(3)), Sphere(2.0)), torch.tensor([[9.0, 0.0, 0.0]]))
        tensor([-9.])
    """
    return as_score(-raw_logits(pair.head, h).amax(-1), h)


def msp(pair: GenerativePair, h: Tensor) -> Tensor:
    """Return one minus the largest class probability, 1 − max_y softmax_y(z), without loss of digits near 0.

    References:
        Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
        Networks", ICLR 2017.

    Args:
        pair: The pair; only its head is used.
        h: Activations (*S, d).

    Returns:
        (*S,), in [0, 1 − 1/K].

    Raises:
        TypeError: `h` is neither a floating-point tensor nor an array of floats.
        ValueError: `h` has another dimension.

    Example:
        >>> msp(GenerativePair(Head(torch.eye(3)), Sphere(2.0)), torch.tensor([[30.0, 0.0, 0.0]]))
        tensor([1.8715e-13])
    """

    def odds(rows: Tensor) -> Tensor:
        logits = raw_logits(pair.head, rows)
        largest, index = logits.max(-1, keepdim=True)
        return (logits - largest).exp().scatter(-1, index, 0.0).sum(-1)

    others = by_blocks(odds, h, pair.head)
    return as_score(others / (1 + others), h)


def density(pair: GenerativePair, h: Tensor) -> Tensor:
    """Return the negative log density −log p(h) of the pair, relative to ``pair.base.info.reference``.

    Outliers often have small norms, where most densities are high: prefer `directional`.

    Args:
        pair: The pair.
        h: Activations (*S, d).

    Returns:
        (*S,), in nats.

    Raises:
        TypeError: `h` is neither a floating-point tensor nor an array of floats.
        ValueError: `h` has another dimension.

    Example:
        >>> import penult
        >>> pair = GenerativePair(Head(torch.eye(2)), penult.Gaussian(torch.zeros(2), torch.eye(2)))
        >>> density(pair, torch.zeros(1, 2))
        tensor([2.0879])
    """
    return as_score(-pair.log_prob(pair.read(h)), h)


def raw_logits(head: Head, h: Tensor) -> Tensor:
    """Return the model's own logits (*S, K) of activations (*S, d), in float32, or in float64 where that overflows."""
    h = as_activations(h, device=head.weight.device)
    wide = in_range(h)
    with in_full(h.device):
        if wide.dtype == head.weight.dtype:
            logits: Tensor = head(wide)
            return logits
        return head.centered_logits(wide) + (wide @ head.mean_row.to(wide.dtype)).unsqueeze(-1)


def by_blocks(function: Callable[[Tensor], Tensor], h: Tensor, head: Head) -> Tensor:
    """Return a function of activations, which of many rows (B, d) is computed in blocks that fit into a cache."""
    # A compiler sees one block, whose size it need not know.
    num_rows = max(_FEWEST_ROWS, _VALUES // max(head.weight.shape))
    if not isinstance(h, Tensor) or h.dim() != 2 or traced(h) or len(h) <= num_rows:
        return function(h)
    return torch.cat([function(rows) for rows in h.split(num_rows)])


def _radial_table(pair: GenerativePair) -> Tensor:
    base = pair.base
    assert isinstance(base, Sphere)
    return base.radial_table(pair.head)
