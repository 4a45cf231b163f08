"""Outlier scores by nearest neighbours and by the space outside the principal components."""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from penult._checks import check_integer
from penult.activations import Activations, _ActivationSource
from penult.head import Head

# Pickles that earlier versions wrote look for these classes here.
from penult.scores._mahalanobis import Mahalanobis as Mahalanobis
from penult.scores._mahalanobis import RelativeMahalanobis as RelativeMahalanobis
from penult.scores._pair_scores import raw_logits
from penult.scores._score import Score, Shape, as_score
from penult.special import in_double, in_full, in_range, traced, working_dtype

__all__ = ["KNN", "ViM"]

# Squared distances of unit vectors that products leave a thousandth of, or less, as an error.
_CLOSE = {torch.float32: 2.0**-10, torch.float64: 2.0**-36}


@final
class KNN(Score):
    """Euclidean distance to the k-th nearest reference activation, with all activations scaled to norm 1.

    References:
        Sun, Ming, Zhu and Li, "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022.

    Args:
        bank: Reference activations (N, d), N ≥ k.
        k: Rank of the neighbour.

    Raises:
        TypeError: k is not an integer.
        ValueError: k < 1, or there are fewer than k activations.

    Example:
        >>> KNN(torch.eye(2), k=1).score(torch.tensor([[5.0, 0.0], [3.0, 4.0]]))
        tensor([0.0000, 0.6325])
    """

    kind = "knn"
    _needs_extra = True
    bank: Tensor
    _shapes: ClassVar[dict[str, Shape]] = {"bank": ("N", "d")}

    def __init__(self, bank: Tensor, k: int = 20) -> None:
        super().__init__()
        k = check_integer("k", k)
        if bank.dim() != 2 or k > len(bank):
            raise ValueError(f"bank has shape {tuple(bank.shape)}; expected (N, d) with N >= k = {k}")
        self.k = k
        self.register_buffer("bank", F.normalize(in_range(bank.detach(), "bank"), dim=-1).to(bank.dtype))

    @classmethod
    def fit(
        cls,
        activations: Tensor | Activations,
        *,
        k: int = 20,
        size: int = 50_000,
        generator: torch.Generator | None = None,
    ) -> KNN:
        """Fill the bank with activations, which need no labels.

        Args:
            activations: Reference activations (N, d), as a tensor or as `Activations`.
            k: Rank of the neighbour.
            size: Largest size of the bank; a random subset is taken of more activations.
            generator: Generator for the random subset.

        Raises:
            TypeError: `activations` are neither a floating tensor nor `Activations`, or k is not an integer.
            ValueError: k < 1, or there are fewer than k activations, or `size` < k.
        """
        k = check_integer("k", k)
        if size < k:
            raise ValueError(f"size is {size}; expected at least k = {k}")
        source = _ActivationSource(activations, dtype="wide")
        total = len(source)
        chosen = torch.arange(total, device="cpu")
        if total > size:
            device = None if generator is None else generator.device
            chosen = torch.randperm(total, generator=generator, device=device)[:size].sort().values.cpu()
        parts, start = [], 0
        for rows in source:
            chosen_here = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
            parts.append(rows[chosen_here.to(rows.device)])
            start += len(rows)
        return cls(torch.cat(parts), k)._fitted_to(source)

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.bank.shape[1]

    def score(self, h: Tensor) -> Tensor:
        """Return the distances (B,) of activations (B, d), in [0, 2].

        Squared distances come from products in the precision of the rows. Those below 1/1024 (in float64 2⁻³⁶), where
        products have too few digits left, are computed from differences, of neighbours found in float64: the relative
        error is below 1e-3.
        """
        rows = as_score(F.normalize(self._read(h), dim=-1), h)
        bank = self.bank.to(rows.dtype)
        with in_full(rows.device):
            parts = [self._distances(part, bank) for part in rows.split(1024)]
            return torch.cat(parts) if parts and len(rows) else rows.new_zeros(0)

    def _distances(self, rows: Tensor, bank: Tensor) -> Tensor:
        # A compiler cannot branch on values.
        if traced(rows):
            return self._close_distances(rows, bank)
        squares = 2 - 2 * (rows @ bank.T).topk(self.k, dim=-1).values[:, -1]
        close = squares < _CLOSE[rows.dtype]
        # The root has no derivative at 0, and could be of a negative number.
        distances = squares.masked_fill(close, 1).sqrt()
        if bool(close.any()):
            distances = distances.index_put((close,), self._close_distances(rows[close], bank))
        return distances

    def _close_distances(self, rows: Tensor, bank: Tensor) -> Tensor:
        """Return distances from differences, of neighbours that products in a wider dtype find."""
        wide = bank.to(working_dtype(rows.device))
        nearest = (2 * rows.to(wide) @ wide.T - wide.square().sum(-1)).topk(self.k, dim=-1).indices
        distances = torch.stack([torch.linalg.vector_norm(rows - bank[index], dim=-1) for index in nearest.unbind(-1)])
        return distances.amax(0)

    def get_extra_state(self) -> Tensor:
        """Return k for the state dict."""
        return torch.tensor(self.k, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Set k from a state dict."""
        k = int(state)
        # The bank is loaded before k.
        if not 1 <= k <= len(self.bank):
            raise ValueError(f"k is {k}; expected 1 to {len(self.bank)}, the number of activations in the bank")
        self.k = k

    def extra_repr(self) -> str:
        """Return k and the size of the bank, for ``print``."""
        return f"k={self.k}, bank={tuple(self.bank.shape)}"


@final
class ViM(Score):
    r"""Virtual-logit matching: the scaled norm outside the principal space of reference activations, plus the energy.

    .. math:: \alpha\, \|R^\top (h - o)\| - \log \sum_y e^{z_y}, \qquad o = -W^+ b,

    where the columns of R are the directions in which reference activations vary least about o, and α is the mean of
    their largest logits divided by the mean of ‖R'(h − o)‖.

    References:
        Wang, Li, Feng and Zhang, "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022.

    Args:
        head: The head.
        residual: R (d, d − D), orthonormal columns.
        alpha: α.

    Raises:
        ValueError: Shapes do not fit.

    Example:
        >>> head = Head(torch.eye(3))
        >>> ViM(head, torch.eye(3)[:, 2:], alpha=2.0).score(torch.tensor([[0.0, 0.0, 5.0]]))
        tensor([4.9866])
    """

    kind = "vim"
    _has_head = True
    head: Head
    origin: Tensor
    residual: Tensor
    alpha: Tensor
    _shapes: ClassVar[dict[str, Shape]] = {"origin": ("d",), "residual": ("d", "R"), "alpha": ()}

    def __init__(self, head: Head, residual: Tensor, alpha: float | Tensor) -> None:
        super().__init__()
        if residual.dim() != 2 or residual.shape[0] != head.in_features:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; expected ({head.in_features}, d - D)")
        self.head = head
        device = head.weight.device
        self.register_buffer("origin", _origin(head).to(device, working_dtype(device)))
        self.register_buffer("residual", residual.detach().contiguous())
        self.register_buffer("alpha", torch.as_tensor(alpha, dtype=residual.dtype, device=residual.device))

    @classmethod
    @torch.no_grad()
    def fit(cls, head: Head, activations: Tensor | Activations, *, dims: int | None = None) -> ViM:
        """Fit the principal space and α to activations, which need no labels.

        Args:
            head: The head.
            activations: Reference activations (N, d), as a tensor or as `Activations`.
            dims: D, dimension of the principal space. Default, as in the paper: 1000 for d ≥ 2048, 512 for d ≥ 768,
                d // 2 for smaller d.

        Raises:
            TypeError: `activations` are neither a floating tensor nor `Activations`, or `dims` is not an integer.
            ValueError: `dims` is not in 1..d − 1, or activations have another dimension than the head.
        """
        d = head.in_features
        dims = (1000 if d >= 2048 else 512 if d >= 768 else d // 2) if dims is None else dims
        dims = check_integer("dims", dims, 1, d - 1)
        source = _ActivationSource(activations, dtype="wide")
        if source.in_features != d:
            raise ValueError(f"activations has {source.in_features} features; expected {d}, as the head has")
        origin = _origin(head)
        scatter = torch.zeros(d, d, dtype=torch.float64, device=origin.device)
        for rows in source:
            deviations = rows.to(origin) - origin
            scatter += deviations.T @ deviations
        residual = torch.linalg.eigh(scatter).eigenvectors[:, : d - dims]
        sum_of_largest_logits, sum_of_norms = 0.0, 0.0
        for rows in source:
            sum_of_largest_logits += float(in_double(raw_logits(head, rows.to(head.weight.device)).amax(-1)).sum())
            sum_of_norms += float(torch.linalg.vector_norm((rows.to(origin) - origin) @ residual, dim=-1).sum())
        if not sum_of_norms > 0:
            raise ValueError(f"all activations lie in {dims} dimensions: give fewer dims")
        if not sum_of_largest_logits > 0:
            raise ValueError(
                f"the mean of the largest logits is {sum_of_largest_logits / len(source):.3g}; expected a positive "
                "mean. Center the head (head.centered()), or use another score"
            )
        return cls(head, residual.to(head.weight), sum_of_largest_logits / sum_of_norms)._fitted_to(source)

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.head.in_features

    def score(self, h: Tensor) -> Tensor:
        """Return scaled norms outside the principal space minus log-sum-exps of logits, (B,)."""
        wide = self._read(h)
        with in_full(wide.device):
            deviations = (wide - self.origin.to(wide.dtype)) @ self.residual.to(wide.dtype)
        virtual_logit: Tensor = self.alpha.to(wide.dtype) * torch.linalg.vector_norm(deviations, dim=-1)
        return as_score(virtual_logit - raw_logits(self.head, wide).logsumexp(-1), h)

    def extra_repr(self) -> str:
        """Return the dimension of the principal space and α, for ``print``."""
        return f"dims={self.in_features - self.residual.shape[1]}, alpha={float(self.alpha):.4g}"


def _origin(head: Head) -> Tensor:
    """Return the activation (d,) at which the sum of the squared logits is smallest, in float64."""
    origin: Tensor = -torch.linalg.pinv(in_double(head.weight)) @ in_double(head.full_bias)
    return origin
