"""Outlier scores by Mahalanobis distances to class means, and the moments of classes that they need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from penult._checks import integer_labels
from penult.activations import Activations, _ActivationSource
from penult.bases import _check_shrinkage, _Shrinkage, _shrunk
from penult.head import Head
from penult.scores._pair_scores import raw_logits
from penult.scores._score import Score, Shape, as_score
from penult.special import in_double, in_full

__all__ = [
    "ClassMoments",
    "Mahalanobis",
    "RelativeMahalanobis",
    "class_moments",
    "predictions",
    "whitening_matrix",
]


class _ClassDistance(Score):
    """Score by Mahalanobis distances to class means, of activations as they are or scaled to norm 1.

    Attributes:
        normalize: Whether activations are scaled to norm 1 first.
    """

    normalize: bool = False
    means: Tensor

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.means.shape[1]

    def _read(self, h: Tensor) -> Tensor:
        wide = super()._read(h)
        return F.normalize(wide, dim=-1) if self.normalize else wide

    def get_extra_state(self) -> Tensor:
        """Return whether activations are normalised, for the state dict."""
        return torch.tensor(self.normalize, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Set from a state dict whether activations are normalised."""
        self.normalize = bool(state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The state of a score that does not normalise is as earlier versions wrote it.
        if not self.normalize:
            del destination[f"{prefix}_extra_state"]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.normalize = self.normalize and f"{prefix}_extra_state" in state
        super()._load_from_state_dict(state, prefix, *args)

    def extra_repr(self) -> str:
        """Return the number of means, and whether activations are normalised, for ``print``."""
        return f"means={tuple(self.means.shape)}, normalize={self.normalize}"


@final
class Mahalanobis(_ClassDistance):
    r"""Squared Mahalanobis distance to the nearest class mean, with one covariance for all classes.

    .. math:: \min_y\, (h - \mu_y)^\top \Sigma^{-1} (h - \mu_y)

    With ``normalize=True`` the same of h / ‖h‖ (Mahalanobis++). Norms differ between inputs far more than a normal
    distribution allows, so that this is usually much better.

    References:
        Lee, Lee, Lee and Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
        Attacks", NeurIPS 2018. Mueller and Hein, "Mahalanobis++: Improving OOD Detection via Feature Normalization",
        ICML 2025.

    Args:
        means: μ (K, d).
        covariance: Σ (d, d), positive definite.
        normalize: Whether activations are scaled to norm 1 first.

    Raises:
        ValueError: Shapes do not fit, or Σ is not positive definite.

    Example:
        >>> Mahalanobis(torch.zeros(1, 2), torch.eye(2)).score(torch.tensor([[3.0, 4.0]]))
        tensor([25.])
    """

    kind = "mahalanobis"
    whitener: Tensor
    _shapes: ClassVar[dict[str, Shape]] = {"means": ("K", "d"), "whitener": ("d", "d")}

    def __init__(self, means: Tensor, covariance: Tensor, *, normalize: bool = False) -> None:
        super().__init__()
        if means.dim() != 2 or covariance.shape != (means.shape[1],) * 2:
            raise ValueError(
                f"means (K, d) and covariance (d, d) have shapes {tuple(means.shape)} and {tuple(covariance.shape)}"
            )
        self.normalize = normalize
        self.register_buffer("means", means.detach())
        self.register_buffer("whitener", whitening_matrix(covariance))

    @classmethod
    def fit(
        cls,
        activations: Tensor | Activations,
        labels: Tensor | None = None,
        *,
        head: Head | None = None,
        normalize: bool = False,
        shrinkage: _Shrinkage = "oas",
    ) -> Mahalanobis:
        """Fit class means and the shared covariance to activations, with labels or predictions for labels.

        Args:
            activations: Reference activations (N, d), as a tensor or as `Activations`.
            labels: Integer labels (N,). Default: those of `Activations`; else the classes that `head` predicts; else
                those that the logits of `Activations` predict. Classes without rows have no mean.
            head: The head, for predictions.
            normalize: Whether activations are scaled to norm 1 first (Mahalanobis++).
            shrinkage: Fraction of the covariance that is replaced by a multiple of the identity with the same trace.
                ``"oas"`` takes the fraction of oracle approximating shrinkage, for N − K rows (Chen, Wiesel, Eldar and
                Hero, "Shrinkage Algorithms for MMSE Covariance Estimation", 2010).

        Raises:
            TypeError: `activations` are neither a floating tensor nor `Activations`, or labels are not integers.
            ValueError: There are neither labels nor predictions, shapes do not fit, or the covariance is singular.
        """
        source, index = _labelled_source(activations, labels, head)
        means, within, _, _ = _like_rows(class_moments(source, index, shrinkage, normalize), source)
        return cls(means, within, normalize=normalize)._fitted_to(source)

    def score(self, h: Tensor) -> Tensor:
        """Return the squared distances (B,) of activations (B, d) to the nearest mean."""
        wide = self._read(h)
        with in_full(wide.device):
            return as_score(_squared_distance_to_nearest(wide, self.means, self.whitener), h)


@final
class RelativeMahalanobis(_ClassDistance):
    r"""`Mahalanobis` minus the squared Mahalanobis distance to the mean of all classes, with the total covariance.

    .. math:: \min_y\, (h - \mu_y)^\top \Sigma^{-1} (h - \mu_y) - (h - \mu_0)^\top \Sigma_0^{-1} (h - \mu_0)

    References:
        Ren, Fort, Liu, Roy, Padhy and Lakshminarayanan, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD
        Detection", 2021.

    Args:
        means: μ (K, d).
        covariance: Σ (d, d), positive definite.
        mean: μ₀ (d,).
        total: Σ₀ (d, d), positive definite.
        normalize: Whether activations are scaled to norm 1 first.

    Raises:
        ValueError: Shapes do not fit, or a covariance is not positive definite.

    Example:
        >>> score = RelativeMahalanobis(torch.ones(1, 2), torch.eye(2), torch.zeros(2), 4 * torch.eye(2))
        >>> score.score(torch.tensor([[1.0, 1.0]]))
        tensor([-0.5000])
    """

    kind = "relative_mahalanobis"
    whitener: Tensor
    mean: Tensor
    total_whitener: Tensor
    _shapes: ClassVar[dict[str, Shape]] = {
        "means": ("K", "d"),
        "whitener": ("d", "d"),
        "mean": ("d",),
        "total_whitener": ("d", "d"),
    }

    def __init__(
        self, means: Tensor, covariance: Tensor, mean: Tensor, total: Tensor, *, normalize: bool = False
    ) -> None:
        super().__init__()
        d = means.shape[-1]
        if means.dim() != 2 or mean.shape != (d,) or covariance.shape != (d, d) or total.shape != (d, d):
            raise ValueError(
                f"means (K, d), covariance (d, d), mean (d,) and total (d, d) have shapes {tuple(means.shape)}, "
                f"{tuple(covariance.shape)}, {tuple(mean.shape)} and {tuple(total.shape)}"
            )
        self.normalize = normalize
        self.register_buffer("means", means.detach())
        self.register_buffer("whitener", whitening_matrix(covariance))
        self.register_buffer("mean", mean.detach())
        self.register_buffer("total_whitener", whitening_matrix(total))

    @classmethod
    def fit(
        cls,
        activations: Tensor | Activations,
        labels: Tensor | None = None,
        *,
        head: Head | None = None,
        normalize: bool = False,
        shrinkage: _Shrinkage = "oas",
    ) -> RelativeMahalanobis:
        """Fit means and covariances to activations; arguments and errors as for `Mahalanobis.fit`."""
        source, index = _labelled_source(activations, labels, head)
        moments = _like_rows(class_moments(source, index, shrinkage, normalize), source)
        return cls(*moments, normalize=normalize)._fitted_to(source)

    def score(self, h: Tensor) -> Tensor:
        """Return the differences of squared distances (B,) of activations (B, d)."""
        wide = self._read(h)
        with in_full(wide.device):
            to_class = _squared_distance_to_nearest(wide, self.means, self.whitener)
            return as_score(to_class - _squared_distance_to_nearest(wide, self.mean[None], self.total_whitener), h)


# --- class means, their shared covariance, and Mahalanobis distances ----------------------------------------


class ClassMoments(NamedTuple):
    """Moments of activations and of their classes, float64.

    Attributes:
        means: Means (C, d) of the classes that have rows.
        within: Covariance (d, d) within classes, shrunk.
        mean: Mean (d,) of all rows.
        total: Covariance (d, d) of all rows, shrunk.
    """

    means: Tensor
    within: Tensor
    mean: Tensor
    total: Tensor


def _labelled_source(
    activations: Tensor | Activations, labels: Tensor | None, head: Head | None
) -> tuple[_ActivationSource, Tensor]:
    """Return the rows, and their labels (N,): those given, those of `Activations`, or predictions."""
    source = _ActivationSource(activations, head, dtype="wide")
    if labels is None and isinstance(activations, Activations):
        labels = activations.labels
    if labels is None and head is not None:
        labels = predictions(source)
    if labels is None and isinstance(activations, Activations):
        labels = activations.predicted
    if labels is None:
        raise ValueError(
            "labels is None; expected integer labels (N,). Predictions of the head work as well: pass head=head, or "
            "labels=acts.predicted"
        )
    return source, integer_labels(labels, (len(source),))


def predictions(source: _ActivationSource) -> Tensor:
    """Return the classes (N,) that the head of a source predicts, on the CPU."""
    return torch.cat([raw_logits(source.head, rows).argmax(-1).cpu() for rows in source])


def class_moments(source: _ActivationSource, labels: Tensor, shrinkage: _Shrinkage, normalize: bool) -> ClassMoments:
    """Return the moments of rows with labels (N,), where N counts all rows that the source was made of."""
    shrinkage = _check_shrinkage(shrinkage)
    classes, index = labels.unique(return_inverse=True)
    source = source.with_labels(index)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, y in source.labelled():
            wide = in_double(F.normalize(rows, dim=-1) if normalize else rows)
            yield wide, y.to(wide.device)

    sums = counts = None
    for rows, y in blocks():
        if sums is None or counts is None:
            sums, counts = rows.new_zeros(len(classes), rows.shape[1]), rows.new_zeros(len(classes))
        sums.index_add_(0, y, rows)
        counts += y.bincount(minlength=len(classes))
    assert sums is not None
    assert counts is not None
    # The labels may be of more rows than the source has.
    seen = counts > 0
    means, mean = sums / counts.clamp_min(1).unsqueeze(-1), sums.sum(0) / counts.sum()
    within = sums.new_zeros(sums.shape[1], sums.shape[1])
    for rows, y in blocks():
        deviations = rows - means[y]
        within += deviations.T @ deviations
    num_rows, num_classes = len(source), int(seen.sum())
    deviations = (means - mean)[seen]
    total = (within + (deviations * counts[seen].unsqueeze(-1)).T @ deviations) / num_rows
    # Deviations from the means of their own classes are those of as many independent rows fewer.
    within = _shrunk(within / num_rows, shrinkage, num_rows - num_classes)
    return ClassMoments(means[seen], within, mean, _shrunk(total, shrinkage, num_rows))


def _like_rows(moments: ClassMoments, source: _ActivationSource) -> Iterator[Tensor]:
    """Yield moments in the dtype and on the device of the rows."""
    example = next(iter(source))
    return (part.to(example) for part in moments)


def whitening_matrix(covariance: Tensor) -> Tensor:
    """Return L⁻ᵀ (d, d) of Σ = LL', so that ‖x'L⁻ᵀ‖² is a squared Mahalanobis distance."""
    root, failed = torch.linalg.cholesky_ex(in_double(covariance.detach()))
    if int(failed):
        raise ValueError(
            f"the covariance of shape {tuple(covariance.shape)} is not positive definite; give several activations of "
            "each class and more activations than dimensions, or a larger shrinkage"
        )
    eye = torch.eye(len(root), device="cpu").to(root)
    inverse: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
    return inverse.T.contiguous().to(covariance)


def _squared_distance_to_nearest(h: Tensor, means: Tensor, whitener: Tensor) -> Tensor:
    """Return the squared Mahalanobis distances (B,) of rows (B, d) to the nearest of means (K, d)."""
    # Products lose fewer digits for values close to 0.
    center = means.mean(0)
    rows = (h - center.to(h.dtype)) @ whitener.to(h.dtype)
    whitened_means = ((means - center) @ whitener).to(h.dtype)
    nearest = (whitened_means.square().sum(-1) - 2 * rows @ whitened_means.T).argmin(-1)
    # Differences keep the digits that these products lose where means are many deviations apart.
    deviations: Tensor = (h - means.to(h.dtype)[nearest]) @ whitener.to(h.dtype)
    return deviations.square().sum(-1)
