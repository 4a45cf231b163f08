"""Number, mean and scatter of the rows of each class: running sums of blocks, and their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from penult._checks import check_finite, described, integer_labels, tensor_of
from penult._row_blocks import row_hashes
from penult.activations._activations import Activations
from penult.activations._source import ActivationSource
from penult.special import in_double

__all__ = ["ClassMoments", "RunningMoments", "Scatter", "checked_moments"]

Scatter = Literal["pooled", "class"]
# Number of values of a block of rows in float64, so that memory does not grow with the number of rows.
_VALUES = 1 << 19
# A sum of squares that is known to be at least zero may be below it by this fraction of its terms, by rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Moments of the rows of K classes.

    Means and scatters are updated by differences, as in Chan, Golub and LeVeque (1983), so that large means do not
    cancel.

    Attributes:
        counts: (K,), int64.
        means: (K, d), float64; zero for classes without rows.
        matrix: Sums of products of deviations from the class means: of all rows (d, d), or of each class (K, d, d).
        hashes: Sums of the hashes of the rows of each class (K,) modulo 2^64, or None.
    """

    counts: Tensor
    means: Tensor
    matrix: Tensor
    hashes: Tensor | None = None

    @property
    def by_class(self) -> bool:
        """Whether there is a matrix for each class."""
        return self.matrix.ndim == 3

    def spread(self, positions: Tensor, num_classes: int) -> ClassMoments:
        """Return the moments with class i at number ``positions[i]`` of `num_classes` classes."""

        def placed(tensor: Tensor) -> Tensor:
            wider = tensor.new_zeros(num_classes, *tensor.shape[1:])
            wider[positions] = tensor
            return wider

        return ClassMoments(
            placed(self.counts),
            placed(self.means),
            placed(self.matrix) if self.by_class else self.matrix,
            None if self.hashes is None else placed(self.hashes),
        )

    def plus(self, other: ClassMoments) -> ClassMoments:
        """Return the moments of the rows of both, which have the same classes."""
        n, m = self.counts.double(), other.counts.double()
        total = (n + m).clamp_min(1)
        difference = torch.where(((n > 0) & (m > 0)).unsqueeze(-1), other.means - self.means, 0.0)
        both = self.means + difference * (m / total).unsqueeze(-1)
        means = torch.where((n > 0).unsqueeze(-1), both, other.means)
        matrix = self.matrix + other.matrix + self._outer(difference, n * m / total)
        hashes = None if self.hashes is None or other.hashes is None else self.hashes + other.hashes
        return ClassMoments(self.counts + other.counts, means, matrix, hashes)

    def minus(self, rows: ClassMoments) -> ClassMoments:
        """Return the moments without rows that were counted.

        Raises:
            ValueError: The rows cannot have been counted.
        """
        counts, wrong = self.counts - rows.counts, "the rows are not among those that were counted"
        if int(counts.min()) < 0:
            k = int(counts.argmin())
            raise ValueError(f"{wrong}: class {k} has {int(self.counts[k])} rows, and {int(rows.counts[k])} are given")
        hashes = None if self.hashes is None or rows.hashes is None else self.hashes - rows.hashes
        all_gone = (counts == 0) & (rows.counts > 0)
        if hashes is not None and bool(hashes[all_gone].any()):
            k = int((all_gone & (hashes != 0)).nonzero()[0])
            raise ValueError(f"{wrong}: other rows were counted for class {k}. Pass the rows as they were counted")
        n, m, left = self.counts.double(), rows.counts.double(), counts.double()
        difference = torch.where(((m > 0) & (left > 0)).unsqueeze(-1), rows.means - self.means, 0.0)
        means = self.means - difference * (m / left.clamp_min(1)).unsqueeze(-1)
        matrix = self.matrix - rows.matrix - self._outer(difference, n * m / left.clamp_min(1))
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        largest = float(self.matrix.diagonal(dim1=-2, dim2=-1).amax())
        if float(diagonal.min()) < -_ROUNDING * largest:
            raise ValueError(f"{wrong}: the others would have a negative variance. Pass the rows as they were counted")
        # Rounding leaves a scatter where no rows, or single ones, have one.
        diagonal.clamp_min_(0)
        if self.by_class:
            matrix = matrix.masked_fill((counts < 2)[:, None, None], 0.0)
        elif int(counts.max()) < 2:
            matrix = torch.zeros_like(matrix)
        return ClassMoments(counts, means.masked_fill((counts == 0).unsqueeze(-1), 0.0), matrix, hashes)

    def without(self, gone: Tensor) -> ClassMoments:
        """Return the moments without the rows of classes, given by a mask (K,).

        Raises:
            ValueError: The matrix is that of all rows, and a class has a scatter, which a single row has not.
        """
        if not self.by_class and bool((scattered := gone & (self.counts > 1)).any()):
            raise ValueError(
                f"the scatter is pooled, and holds the rows of class {int(scattered.nonzero()[0])} together with all "
                "others; pass its rows: moments.forget(h, y). Moments with scatter='class' forget a class without them"
            )
        return ClassMoments(
            self.counts.masked_fill(gone, 0),
            self.means.masked_fill(gone.unsqueeze(-1), 0.0),
            self.matrix.masked_fill(gone[:, None, None], 0.0) if self.by_class else self.matrix,
            None if self.hashes is None else self.hashes.masked_fill(gone, 0),
        )

    def pooled(self) -> ClassMoments:
        """Return the moments with the matrices of all classes added up."""
        matrix = self.matrix.sum(0) if self.by_class else self.matrix
        return ClassMoments(self.counts, self.means, matrix, self.hashes)

    def _outer(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return the summands of Σ_y weight_y row_y row_y' for rows (K, d), (K, d, d), or their sum (d, d)."""
        scaled = rows * weights.sqrt().unsqueeze(-1)
        return scaled.unsqueeze(-1) * scaled.unsqueeze(-2) if self.by_class else scaled.T @ scaled


def checked_moments(counts: Any, means: Any, scatter_matrix: Any, hashes: Tensor | None = None) -> ClassMoments:
    """Return moments that were computed elsewhere, or read from a file."""
    given = {"counts": counts, "means": means, "scatter_matrix": scatter_matrix}
    tensors = {}
    for name, value in given.items():
        tensor = tensor_of(value)
        integers = tensor is not None and not (tensor.is_floating_point() or tensor.is_complex())
        if tensor is None or tensor.dtype is torch.bool or integers != (name == "counts"):
            kind = "integers (K,)" if name == "counts" else "a floating-point tensor or array"
            raise TypeError(f"{name} is {described(value if tensor is None else tensor)}; expected {kind}")
        tensors[name] = tensor.detach().cpu().to(torch.int64 if name == "counts" else torch.float64)
    n, mu, s = tensors.values()
    k, d = mu.shape if mu.ndim == 2 else (0, 0)
    if not k or not d or n.shape != (k,) or tuple(s.shape) not in ((d, d), (k, d, d)):
        raise ValueError(
            f"counts has shape {tuple(n.shape)}, means {tuple(mu.shape)} and scatter_matrix {tuple(s.shape)}; expected "
            "(K,), (K, d) and (d, d) or (K, d, d)"
        )
    if int(n.min()) < 0:
        raise ValueError(f"counts has the value {int(n.min())}; expected numbers of rows, 0 or more")
    mu = mu.masked_fill((n == 0).unsqueeze(-1), 0.0)
    check_finite("means", mu)
    check_finite("scatter_matrix", s)
    variances, asymmetry = s.diagonal(dim1=-2, dim2=-1), float((s - s.mT).abs().max())
    if float(variances.min()) < 0 or asymmetry > 1e-6 * float(variances.max()):
        raise ValueError(
            f"scatter_matrix has a smallest diagonal entry of {float(variances.min()):.3g} and differs from its "
            f"transpose by {asymmetry:.3g}; expected sums of squares and products, which are symmetric"
        )
    if hashes is not None and (hashes.shape, hashes.dtype) != (n.shape, torch.int64):
        raise ValueError(f"hashes has shape {tuple(hashes.shape)} and dtype {hashes.dtype}; expected int64 ({k},)")
    return ClassMoments(n, mu, s, hashes)


class RunningMoments:
    """Counts, means and scatter that blocks of rows are added to, on the device of the rows."""

    def __init__(self, scatter: Scatter, num_classes: int | None) -> None:
        self._scatter, self._fixed = scatter, num_classes
        self._dtype: torch.dtype | None = None
        self._counts = self._means = self._matrix = self._hashes = torch.empty(0, device="cpu")

    def add(self, h: Any, y: Any, min_rows: int) -> None:
        """Add rows (n, d) with labels (n,)."""
        if y is None and isinstance(h, Activations):
            y = h.labels
        if y is None:
            raise ValueError("y is None; expected integer labels (N,), one for each activation")
        source = ActivationSource(h, labels=integer_labels(y, name="y"), name="h", min_rows=min_rows)
        if not len(source):
            return
        low, high = int(source.labels.min()), int(source.labels.max())
        if low < 0 or (self._fixed is not None and high >= self._fixed):
            wrong, want = (
                (low, "0 or more") if low < 0 else (high, f"0 to {(self._fixed or 0) - 1}, for K={self._fixed}")
            )
            raise ValueError(f"y has the label {wrong}; expected {want}. Leave rows of other classes out")
        self._grow(source.in_features, high + 1 if self._fixed is None else self._fixed)
        self._dtype = source.dtype if self._dtype is None else torch.promote_types(self._dtype, source.dtype)
        size, start = max(1, _VALUES // source.in_features), 0
        for stored in source.stored:
            for rows in stored.split(size):
                labels = source.labels[start : start + len(rows)].to(rows.device)
                start += len(rows)
                hashes = row_hashes(rows)
                wide = in_double(rows.clamp_min(0) if source.rectified else rows)
                self._add_block(wide, labels.to(wide.device), hashes.to(wide.device))

    def add_batch(self, batch: Any) -> None:
        """Add a batch of a loader: a pair (h, y), or `Activations`."""
        if isinstance(batch, Activations):
            self.add(batch, batch.labels, min_rows=0)
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            h, y = batch
            self.add(h, y, min_rows=0)
        else:
            raise TypeError(
                f"a batch is {described(batch)}; expected a pair (h, y) of activations (n, d) and labels (n,). Write a "
                "generator that yields such pairs"
            )

    def _grow(self, dim: int, num_classes: int) -> None:
        if self._dtype is None:
            self._counts = torch.zeros(0, dtype=torch.int64, device="cpu")
            self._hashes = self._counts.clone()
            self._means = torch.zeros(0, dim, dtype=torch.float64, device="cpu")
            shape = (dim, dim) if self._scatter == "pooled" else (0, dim, dim)
            self._matrix = torch.zeros(shape, dtype=torch.float64, device="cpu")
        elif self._means.shape[1] != dim:
            raise ValueError(f"h has dimension {dim}; expected {self._means.shape[1]}, as in the batches before it")
        if (more := num_classes - len(self._counts)) > 0:
            self._counts, self._hashes = (torch.cat([t, t.new_zeros(more)]) for t in (self._counts, self._hashes))
            self._means = torch.cat([self._means, self._means.new_zeros(more, dim)])
            if self._scatter == "class":
                self._matrix = torch.cat([self._matrix, self._matrix.new_zeros(more, dim, dim)])

    def _add_block(self, rows: Tensor, labels: Tensor, hashes: Tensor) -> None:
        self._counts, self._means, self._matrix, self._hashes = (
            tensor.to(rows.device) for tensor in (self._counts, self._means, self._matrix, self._hashes)
        )
        classes, index = labels.unique(return_inverse=True)
        m = index.bincount(minlength=len(classes)).double()
        means = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, index, rows) / m.unsqueeze(-1)
        centred = rows - means[index]
        # The rounding error of a mean that is large against the deviations from it.
        correction = torch.zeros_like(means).index_add_(0, index, centred) / m.unsqueeze(-1)
        means, centred = means + correction, centred - correction[index]
        n = self._counts[classes].double()
        difference = torch.where((n > 0).unsqueeze(-1), means - self._means[classes], 0.0)
        between = difference * (n * m / (n + m)).sqrt().unsqueeze(-1)
        if self._scatter == "pooled":
            self._matrix += centred.T @ centred
            self._matrix += between.T @ between
        else:
            parts = centred[index.argsort(stable=True)].split(m.long().tolist())
            for k, part, step in zip(classes.tolist(), parts, between, strict=True):
                self._matrix[k] += part.T @ part
                self._matrix[k] += torch.outer(step, step)
        moved = self._means[classes] + difference * (m / (n + m)).unsqueeze(-1)
        self._means[classes] = torch.where((n > 0).unsqueeze(-1), moved, means)
        self._counts[classes] += m.long()
        self._hashes.index_add_(0, labels, hashes)

    def result(self) -> tuple[ClassMoments, torch.dtype]:
        """Return the moments of all rows so far, and the widest dtype of the rows."""
        if self._dtype is None:
            raise ValueError("h has no rows; expected labelled activations")
        # Products of rounded numbers may differ between the two halves of a matrix.
        matrix = (self._matrix + self._matrix.mT) / 2
        parts = (tensor.cpu() for tensor in (self._counts, self._means, matrix, self._hashes))
        return ClassMoments(*parts), torch.promote_types(self._dtype, torch.float32)
