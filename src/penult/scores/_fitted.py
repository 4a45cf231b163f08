"""Outlier scores that are fitted to familiar activations, as others proposed them, to hold penult's own against."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from penult._checks import integer_labels
from penult.activations import Activations, _ActivationSource
from penult.head import Head
from penult.scores._pair_scores import raw_logits
from penult.scores._score import Score
from penult.special import in_double, in_full, working_dtype

__all__ = [
    "KNN",
    "Mahalanobis",
    "RelativeMahalanobis",
    "ViM",
    "class_moments",
    "labels_of",
    "least_distance",
    "whitener_of",
]


@final
class Mahalanobis(Score):
    r"""The least squared distance to a class mean, in deviations of the covariance that classes share.

    .. math:: \min_y\, (h - \mu_y)^\top \Sigma^{-1} (h - \mu_y)

    References:
        Lee, Lee, Lee and Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
        Attacks", NeurIPS 2018.

    Args:
        means: μ (K, d).
        covariance: Σ (d, d), positive definite.

    Raises:
        ValueError: Shapes do not fit, or Σ is not positive definite.

    Example:
        >>> Mahalanobis(torch.zeros(1, 2), torch.eye(2)).score(torch.tensor([[3.0, 4.0]]))
        tensor([25.])
    """

    means: Tensor
    whitener: Tensor
    _sizes: ClassVar[dict[str, int]] = {"means": 0}

    def __init__(self, means: Tensor, covariance: Tensor) -> None:
        super().__init__()
        if means.dim() != 2 or covariance.shape != (means.shape[1],) * 2:
            raise ValueError(
                f"means (K, d) and covariance (d, d) have shapes {tuple(means.shape)} and {tuple(covariance.shape)}"
            )
        self.register_buffer("means", means.detach())
        self.register_buffer("whitener", whitener_of(covariance))

    @classmethod
    def fit(
        cls, activations: Tensor | Activations, labels: Tensor | None = None, *, shrinkage: float = 1e-3
    ) -> Mahalanobis:
        """Class means and covariance of labelled activations.

        Args:
            activations: Familiar ones (N, d), as a tensor or as `Activations`.
            labels: (N,) integers; those of `Activations` when left out. A head's predictions will do.
            shrinkage: Share of the covariance that is replaced by a multiple of the identity with the same trace.

        Raises:
            TypeError: As for other fits; labels are no integers.
            ValueError: There are no labels, shapes do not fit, or the covariance is singular.
        """
        means, within, _, _ = class_moments(activations, labels_of(activations, labels), shrinkage)
        return cls(means, within)

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.means.shape[1]

    def score(self, h: Tensor) -> Tensor:
        """Squared distances (B,) of activations (B, d) to the nearest mean."""
        h = self._read(h)
        with in_full(h.device):
            return least_distance(h, self.means, self.whitener)


@final
class RelativeMahalanobis(Score):
    r"""`Mahalanobis`, less the squared distance to the mean of all, in deviations of all.

    .. math:: \min_y\, (h - \mu_y)^\top \Sigma^{-1} (h - \mu_y) - (h - \mu_0)^\top \Sigma_0^{-1} (h - \mu_0)

    References:
        Ren, Fort, Liu, Roy, Padhy and Lakshminarayanan, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD
        Detection", 2021.

    Args:
        means: μ (K, d).
        covariance: Σ (d, d), positive definite.
        mean: μ₀ (d,).
        total: Σ₀ (d, d), positive definite.

    Raises:
        ValueError: Shapes do not fit, or a covariance is not positive definite.

    Example:
        >>> score = RelativeMahalanobis(torch.ones(1, 2), torch.eye(2), torch.zeros(2), 4 * torch.eye(2))
        >>> score.score(torch.tensor([[1.0, 1.0]]))
        tensor([-0.5000])
    """

    means: Tensor
    whitener: Tensor
    mean: Tensor
    total_whitener: Tensor
    _sizes: ClassVar[dict[str, int]] = {"means": 0}

    def __init__(self, means: Tensor, covariance: Tensor, mean: Tensor, total: Tensor) -> None:
        super().__init__()
        d = means.shape[-1]
        if means.dim() != 2 or mean.shape != (d,) or covariance.shape != (d, d) or total.shape != (d, d):
            raise ValueError(
                f"means (K, d), covariance (d, d), mean (d,) and total (d, d) have shapes {tuple(means.shape)}, "
                f"{tuple(covariance.shape)}, {tuple(mean.shape)} and {tuple(total.shape)}"
            )
        self.register_buffer("means", means.detach())
        self.register_buffer("whitener", whitener_of(covariance))
        self.register_buffer("mean", mean.detach())
        self.register_buffer("total_whitener", whitener_of(total))

    @classmethod
    def fit(
        cls, activations: Tensor | Activations, labels: Tensor | None = None, *, shrinkage: float = 1e-3
    ) -> RelativeMahalanobis:
        """Class means and both covariances of labelled activations; arguments and errors as `Mahalanobis.fit`."""
        return cls(*class_moments(activations, labels_of(activations, labels), shrinkage))

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.means.shape[1]

    def score(self, h: Tensor) -> Tensor:
        """Differences of squared distances (B,) of activations (B, d)."""
        h = self._read(h)
        with in_full(h.device):
            own = least_distance(h, self.means, self.whitener)
            return own - least_distance(h, self.mean[None], self.total_whitener)


@final
class KNN(Score):
    """The Euclidean distance to the k-th nearest familiar activation, all of them scaled to norm 1.

    References:
        Sun, Ming, Zhu and Li, "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022.

    Args:
        bank: Familiar activations (N, d), N ≥ k.
        k: Which neighbour.

    Raises:
        ValueError: There are fewer than k.

    Example:
        >>> KNN(torch.eye(2), k=1).score(torch.tensor([[5.0, 0.0], [3.0, 4.0]]))
        tensor([0.0000, 0.6325])
    """

    bank: Tensor
    _sizes: ClassVar[dict[str, int]] = {"bank": 0}

    def __init__(self, bank: Tensor, k: int = 20) -> None:
        super().__init__()
        if bank.dim() != 2 or not 1 <= k <= len(bank):
            raise ValueError(f"bank has shape {tuple(bank.shape)}; expected (N, d) with N >= k = {k} >= 1")
        self.k = k
        self.register_buffer("bank", F.normalize(bank.detach(), dim=-1))

    @classmethod
    def fit(
        cls,
        activations: Tensor | Activations,
        *,
        k: int = 20,
        size: int = 50_000,
        generator: torch.Generator | None = None,
    ) -> KNN:
        """A bank of familiar activations, which needs no labels.

        Args:
            activations: Familiar ones (N, d), as a tensor or as `Activations`.
            k: Which neighbour.
            size: How many are kept at most; of more, a random choice.
            generator: Of the choice.

        Raises:
            TypeError: As for other fits.
            ValueError: There are fewer than k, or `size` is.
        """
        if size < k:
            raise ValueError(f"size is {size}, fewer than the k = {k} neighbours")
        total = len(activations)
        chosen = torch.arange(total)
        if total > size:
            device = None if generator is None else generator.device
            chosen = torch.randperm(total, generator=generator, device=device)[:size].sort().values.cpu()
        parts, start = [], 0
        for rows in _ActivationSource(activations, dtype="wide"):
            here = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
            parts.append(rows[here.to(rows.device)])
            start += len(rows)
        return cls(torch.cat(parts), k)

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.bank.shape[1]

    def score(self, h: Tensor) -> Tensor:
        """Distances (B,) of activations (B, d), in [0, 2]."""
        h = F.normalize(self._read(h), dim=-1)
        bank = self.bank.to(h.dtype)
        with in_full(h.device):
            return torch.cat([self._distances(rows, bank) for rows in h.split(1024)]) if len(h) else h.new_zeros(0)

    def _distances(self, rows: Tensor, bank: Tensor) -> Tensor:
        wide = bank.to(working_dtype(rows.device))  # in which products tell close neighbours apart
        nearest = (2 * rows.to(wide) @ wide.T - wide.square().sum(-1)).topk(self.k, dim=-1).indices
        apart = torch.stack([torch.linalg.vector_norm(rows - bank[index], dim=-1) for index in nearest.unbind(-1)])
        return apart.amax(0)

    def get_extra_state(self) -> Tensor:
        """K for the state dict."""
        return torch.tensor(self.k)

    def set_extra_state(self, state: Tensor) -> None:
        """K of a state dict."""
        self.k = int(state)

    def extra_repr(self) -> str:
        """Size of the bank and k, for ``print``."""
        return f"k={self.k}, bank={tuple(self.bank.shape)}"


@final
class ViM(Score):
    r"""Virtual-logit matching: the norm outside the principal space of familiar activations, beside the energy.

    .. math:: \alpha\, \|R^\top (h - o)\| - \log \sum_y e^{z_y}, \qquad o = -W^+ b,

    with R the directions in which familiar activations vary least about o, and α the mean of their largest logits
    over the mean of their norms there.

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

    origin: Tensor
    residual: Tensor
    alpha: Tensor
    _sizes: ClassVar[dict[str, int]] = {"residual": 1}

    def __init__(self, head: Head, residual: Tensor, alpha: float | Tensor) -> None:
        super().__init__()
        if residual.dim() != 2 or residual.shape[0] != head.in_features:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; expected ({head.in_features}, d - D)")
        self.head = head
        device = head.weight.device
        self.register_buffer("origin", _origin(head).to(device, working_dtype(device)))
        self.register_buffer("residual", residual.detach())
        self.register_buffer("alpha", torch.as_tensor(alpha, dtype=residual.dtype, device=residual.device))

    @classmethod
    @torch.no_grad()
    def fit(cls, head: Head, activations: Tensor | Activations, *, dims: int | None = None) -> ViM:
        """Principal space and scale of familiar activations, which need no labels.

        Args:
            head: The head.
            activations: Familiar ones (N, d), as a tensor or as `Activations`.
            dims: D, of the principal space. When left out, as its authors chose: 1000 from d = 2048, 512 from d = 768,
                half of d below.

        Raises:
            TypeError: As for other fits.
            ValueError: `dims` is not in 1..d − 1, or activations have another dimension than the head takes.
        """
        d = head.in_features
        dims = (1000 if d >= 2048 else 512 if d >= 768 else d // 2) if dims is None else dims
        if not 1 <= dims < d:
            raise ValueError(f"dims is {dims}; a principal space of d = {d} dimensions has from 1 to {d - 1}")
        origin = _origin(head)
        square = torch.zeros(d, d, dtype=torch.float64, device=origin.device)
        for rows in _ActivationSource(activations, dtype="wide"):
            if rows.shape[1] != d:
                raise ValueError(f"activations has {rows.shape[1]} features; the head takes {d}")
            apart = rows.to(origin) - origin
            square += apart.T @ apart
        residual = torch.linalg.eigh(square).eigenvectors[:, : d - dims]
        largest, norm = 0.0, 0.0
        for rows in _ActivationSource(activations, dtype="wide"):
            largest += float(in_double(raw_logits(head, rows.to(head.weight.device)).amax(-1)).sum())
            norm += float(torch.linalg.vector_norm((rows.to(origin) - origin) @ residual, dim=-1).sum())
        if not norm > 0:
            raise ValueError(f"all activations lie in {dims} dimensions: give fewer dims")
        if not largest > 0:
            raise ValueError(
                f"the mean of the largest logits is {largest / len(activations):.3g}; this score needs it above 0: "
                "centre the head (head.centered()), or take another score"
            )
        return cls(head, residual.to(head.weight), largest / norm)

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.head.in_features

    def score(self, h: Tensor) -> Tensor:
        """Scaled norms outside the principal space, less log-sums of logits, (B,)."""
        h = self._read(h)
        with in_full(h.device):
            outside = torch.linalg.vector_norm((h - self.origin.to(h.dtype)) @ self.residual.to(h.dtype), dim=-1)
        virtual = self.alpha.to(h.dtype) * outside
        found: Tensor = virtual - raw_logits(self.head, h).logsumexp(-1)
        return found

    def extra_repr(self) -> str:
        """The principal space, for ``print``."""
        return f"dims={self.in_features - self.residual.shape[1]}, alpha={float(self.alpha):.4g}"


def _origin(head: Head) -> Tensor:
    """The activation (d,) at which all logits are nought, or as near to it as can be, float64."""
    origin: Tensor = -torch.linalg.pinv(in_double(head.weight)) @ in_double(head.full_bias)
    return origin


# --- Means of classes, the covariance that they share, and distances to them in its deviations --------------


def labels_of(activations: Tensor | Activations, labels: Tensor | None) -> Tensor:
    """Labels (N,) that are given, or those of `Activations`.

    Raises:
        TypeError: They are no integers.
        ValueError: There are none.
    """
    if labels is None and isinstance(activations, Activations):
        labels = activations.labels
    if labels is None:
        raise ValueError(
            "class means need labels (N,), and there are none; the head's predictions will do: labels=acts.predicted"
        )
    return integer_labels(labels, (len(activations),))


def class_moments(activations: Tensor | Activations, labels: Tensor, shrinkage: float) -> tuple[Tensor, ...]:
    """Means (K, d) of classes that have rows, covariance within classes, mean (d,) and covariance of all."""
    classes, index = labels.unique(return_inverse=True)
    source = _ActivationSource(activations, labels=index, dtype="wide")
    sums: Any = None
    for rows, y in source.labelled():
        wide = in_double(rows)
        if sums is None:
            sums = wide.new_zeros(len(classes), rows.shape[1])
        sums.index_add_(0, y.to(wide.device), wide)
    counts = index.bincount(minlength=len(classes)).to(sums)
    means, mean = sums / counts.unsqueeze(-1), sums.sum(0) / counts.sum()
    within = sums.new_zeros(sums.shape[1], sums.shape[1])
    for rows, y in source.labelled():
        apart = in_double(rows) - means[y.to(means.device)]
        within += apart.T @ apart
    apart = means - mean
    total = (within + (apart * counts.unsqueeze(-1)).T @ apart) / counts.sum()
    found = means, _shrunk(within / counts.sum(), shrinkage), mean, _shrunk(total, shrinkage)
    return tuple(part.to(rows) for part in found)


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1]; got {shrinkage}")
    d = len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * covariance.trace() / d * torch.eye(d).to(covariance)


def whitener_of(covariance: Tensor) -> Tensor:
    """L⁻ᵀ (d, d) of Σ = LL', so that ‖x'L⁻ᵀ‖² is the squared distance."""
    root, failed = torch.linalg.cholesky_ex(in_double(covariance.detach()))
    if int(failed):
        raise ValueError(
            f"the covariance of shape {tuple(covariance.shape)} is not positive definite; give more activations than "
            "dimensions, or a shrinkage above 0"
        )
    eye = torch.eye(len(root)).to(root)
    inverse: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
    return inverse.T.contiguous().to(covariance)


def least_distance(h: Tensor, means: Tensor, whitener: Tensor) -> Tensor:
    """Least squared distance (B,) of rows (B, d) to means (K, d)."""
    middle = means.mean(0)  # near to all, so that products lose few digits
    rows = (h - middle.to(h.dtype)) @ whitener.to(h.dtype)
    centres = ((means - middle) @ whitener).to(h.dtype)
    nearest = (centres.square().sum(-1) - 2 * rows @ centres.T).argmin(-1)
    # Anew, since products lose digits where means are many deviations apart.
    apart: Tensor = (h - means.to(h.dtype)[nearest]) @ whitener.to(h.dtype)
    return apart.square().sum(-1)
