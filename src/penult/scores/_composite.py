"""The recommended outlier score: a sum of standardised direction, distance and certainty, or what a pair allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, final, overload

import torch
from torch import Tensor

from penult._checks import described
from penult.activations import Activations, _ActivationSource
from penult.bases import Sphere, _check_trim, _direction_log_prob_at, _fit_chart, _radial_table, _typical_rows
from penult.head import Head
from penult.pair import GenerativePair
from penult.scores._mahalanobis import class_moments, predictions
from penult.scores._pair_scores import by_blocks, directional, energy, raw_logits
from penult.scores._score import Score, Shape, as_score
from penult.special import in_double, in_full, working_dtype

__all__ = ["Composite", "usual"]

# Fewest reference activations: each of the two folds needs a covariance.
_MIN_ROWS = 20
# Class means are used if there are on average at least so many rows for each predicted class: with one row each, rows
# say nothing of the spread within classes.
_ROWS_PER_CLASS = 1.1


def combined(parts: Tensor) -> Tensor:
    """Return the score (B,) of standardised parts (B, 3): their sum."""
    return parts.sum(-1)


@final
class Composite(Score):
    r"""The recommended score, without labels: the sum of a direction, a distance and a certainty, each standardised.

    .. math:: D(h) &= -\log p(u / r \,|\, r) \\
              M(h) &= \min_y\, (\hat h - \mu_y)^\top \Sigma^{-1} (\hat h - \mu_y), \qquad \hat h = h / \|h\| \\
              P(h) &= \log \Big(1 - \max_y p(y|h)\Big) - \log \max_y p(y|h)

    D is `directional` on an elliptic sphere, M is `Mahalanobis` with ``normalize=True`` and predictions for labels, and
    P has the order of `msp`; both covariances are shrunk with ``"oas"``. They fail on different outliers: D on
    activations with short norms and few reference rows, M close to the classes, P far from them.

    Each part has its mean subtracted and is divided by its standard deviation over reference activations. For both, D
    and M are fitted to one half of these and computed of the other half, and vice versa, because a covariance of N ≤ 2d
    rows makes their own distances much smaller than those of other rows.

    Make one with :meth:`fit`. The three parts share one product with W and one with the matrix that makes both
    covariances diagonal.

    Attributes:
        head: The head.
        loc: Centre of the elliptic sphere (d,).
        whitener: Matrix V (d, d): V'(h − loc) has the norm r of the sphere's chart, and V'Σ V is diagonal.
        scale: Square roots of that diagonal (d,).
        means: V'μ_y / scale (C, d) of the C classes that were predicted.
        table: Table of the mass of the classes by radius.
        center: Means (3,) of the parts.
        deviation: Standard deviations (3,) of the parts.

    References:
        Mueller and Hein, "Mahalanobis++: Improving OOD Detection via Feature Normalization", ICML 2025. Chen, Wiesel,
        Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE Transactions on Signal Processing
        2010.

    Example:
        >>> head = Head(4 * torch.eye(3))
        >>> g = torch.Generator().manual_seed(0)
        >>> familiar = torch.eye(3).repeat(200, 1) + 0.2 * torch.randn(600, 3, generator=g)
        >>> Composite.fit(head, familiar).score(torch.tensor([[1.0, 0.1, 0.0], [0.5, 0.5, 0.5]])).round(decimals=1)
        tensor([-1.2000, 13.9000])
    """

    kind = "composite"
    _has_head = True
    PARTS: ClassVar[tuple[str, ...]] = ("direction", "distance", "certainty")
    """Names of the parts, in the order of :meth:`parts`."""

    head: Head
    loc: Tensor
    whitener: Tensor
    scale: Tensor
    means: Tensor
    table: Tensor
    center: Tensor
    deviation: Tensor
    _shapes: ClassVar[dict[str, Shape]] = {
        "loc": ("d",),
        "whitener": ("d", "d"),
        "scale": ("d",),
        "means": ("C", "d"),
        "table": ("T", 8),
        "center": (3,),
        "deviation": (3,),
    }

    def __init__(self, head: Head, **tensors: Tensor) -> None:
        super().__init__()
        self.head = head
        for name in self._shapes:
            # A score that is read from a file computes the same to the bit: there tensors are contiguous.
            self.register_buffer(name, tensors[name].contiguous())

    @classmethod
    @torch.no_grad()
    def fit(
        cls, pair_or_head: GenerativePair | Head, activations: Tensor | Activations, *, trim: float = 0.0
    ) -> Composite:
        """Fit the parts and their scales to unlabelled activations.

        Args:
            pair_or_head: The head, or a pair; only its head is used.
            activations: Reference activations (N, d), N ≥ 20 and d ≥ 2, as a tensor or as `Activations`. If a half of
                them has almost as many predicted classes as rows, M has one mean for all classes.
            trim: Fraction of the activations that the fit leaves out, as in :meth:`penult.Sphere.fit`. 0.2 if some of
                them may be outliers.

        Raises:
            TypeError: `pair_or_head` is neither, or `activations` are neither a floating tensor nor `Activations`.
            ValueError: `activations` has too few rows or a wrong shape, or is not finite; or a part is the same for all
                of them; or `trim` is not at least 0 and below 0.5.
        """
        head = pair_or_head.head if isinstance(pair_or_head, GenerativePair) else pair_or_head
        if not isinstance(head, Head):
            raise TypeError(f"pair_or_head is {described(head)}; expected a penult.GenerativePair or a penult.Head")
        _check_trim(trim)
        if head.in_features < 2:
            raise ValueError(
                "the head takes activations of dimension 1, which have no directions; expected at least 2 dimensions. "
                "Use penult.scores.energy"
            )
        source = _ActivationSource(activations, head, min_rows=_MIN_ROWS, dtype="wide")
        kept = _typical_rows(head, source, trim, "oas") if trim else source
        labels = predictions(source)
        halves = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0), device="cpu").chunk(2)
        folds = [kept.only(half) for half in halves]
        if any(len(fold) < _ROWS_PER_CLASS * _num_classes(fold, labels) for fold in folds):
            labels = torch.zeros_like(labels)
        score = cls._unscaled(head, kept, labels)
        crossed = [
            cls._unscaled(head, fold, labels, halvings=0)._raw_parts_of(other)
            for fold, other in (folds, reversed(folds))
        ]
        values = in_double(torch.cat(crossed))
        center, deviation = values.mean(0), values.std(0)
        for name, spread in zip(cls.PARTS, deviation.tolist(), strict=True):
            if not spread > 0:
                raise ValueError(
                    f"the {name} of all {len(kept)} activations is the same; expected different activations"
                )
        score.center.copy_(center)
        score.deviation.copy_(deviation)
        return score._fitted_to(source)

    @classmethod
    def _unscaled(cls, head: Head, source: _ActivationSource, labels: Tensor, **options: Any) -> Composite:
        """Fit the parts to rows; their means and standard deviations are left at 0 and 1."""
        chart = _fit_chart(head, source, "elliptic", True, "oas")
        moments = class_moments(source, labels, "oas", normalize=True)
        assert chart.loc is not None
        assert chart.scale_tril is not None
        # With the covariance LL' of the sphere and L⁻¹ΣL⁻ᵀ = QΓQ', V = L⁻ᵀQ makes the first the identity, the second Γ.
        root = chart.scale_tril
        half = torch.linalg.solve_triangular(root, moments.within, upper=False)
        variances, rotation = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
        if not float(variances[0]) > 0:
            raise ValueError(
                f"the covariance of {len(source)} activations of norm 1 is singular; give more activations, or others"
            )
        whitener = torch.linalg.solve_triangular(root.T, rotation, upper=True)
        device, dtype = head.weight.device, torch.promote_types(head.weight.dtype, torch.float32)
        tensors = {
            "loc": chart.loc,
            "whitener": whitener,
            "scale": variances.sqrt(),
            "means": moments.means @ whitener / variances.sqrt(),
            "center": torch.zeros(3, device="cpu"),
            "deviation": torch.ones(3, device="cpu"),
        }
        table = _radial_table(*chart.seen(head), **options)
        return cls(head, table=table, **{name: tensor.to(device, dtype) for name, tensor in tensors.items()})

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.head.in_features

    def score(self, h: Tensor) -> Tensor:
        """Return the scores (B,) of activations (B, d), in standard deviations of the parts."""
        return as_score(combined(self._standardised(self._read(h))), h)

    def parts(self, h: Tensor) -> Tensor:
        """Return the standardised direction, distance and certainty (B, 3) of activations (B, d).

        Example:
            >>> h = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
            >>> Composite.fit(Head(torch.eye(2)), h).parts(h).shape
            torch.Size([200, 3])
        """
        return as_score(self._standardised(self._read(h)), h)

    def _standardised(self, h: Tensor) -> Tensor:
        parts = self._raw_parts(h)
        return (parts - self.center.to(parts)) / self.deviation.to(parts)

    def _raw_parts_of(self, source: _ActivationSource) -> Tensor:
        return torch.cat([self._raw_parts(self._read(rows)) for rows in source])

    def _raw_parts(self, h: Tensor) -> Tensor:
        """Return D, M and P (B, 3) of activations (B, d)."""
        with in_full(h.device):
            return by_blocks(self._block, h, self.head)

    def _block(self, h: Tensor) -> Tensor:
        logits = raw_logits(self.head, h)
        largest, index = logits.max(-1, keepdim=True)
        # The exact sum of all other classes, also where the largest one leaves no digits for them.
        others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
        largest = largest.squeeze(-1)
        certainty = others - largest
        log_partition = torch.logaddexp(others, largest) - h @ self.head.mean_row.to(h.dtype)

        whitener, scale = self.whitener.to(h.dtype), self.scale.to(h.dtype)
        v = h @ whitener
        direction = -_direction_log_prob_at(log_partition, v - self.loc.to(h.dtype) @ whitener, self.table)

        norms = torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp_min(1e-12)
        distance = _squared_distance_to_nearest(v / (norms * scale), self.means.to(h.dtype))
        return torch.stack([direction.to(h.dtype), distance, certainty.to(h.dtype)], dim=-1)

    def _apply(self, fn: Any, recurse: bool = True) -> Composite:
        table = self.table

        # Half precision has too few digits for a whitening matrix, and float32 for masses in the thousands.
        def wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            narrow = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return tensor.to(moved.device) if narrow else moved

        super()._apply(wide, recurse)
        device = self.loc.device
        self.table = table.to(device, working_dtype(device))
        return self

    def extra_repr(self) -> str:
        """Return the sizes and the scales of the parts, for ``print``."""
        scales = zip(self.PARTS, self.center.tolist(), self.deviation.tolist(), strict=True)
        shown = ", ".join(f"{name} {center:.3g} ± {deviation:.2g}" for name, center, deviation in scales)
        return f"classes={len(self.means)}, {shown}"


def _num_classes(source: _ActivationSource, labels: Tensor) -> int:
    """Return the number of different labels (N,) of the rows that are left in a source."""
    return len(torch.cat([y for _, y in source.with_labels(labels).labelled()]).unique())


def _squared_distance_to_nearest(rows: Tensor, means: Tensor) -> Tensor:
    """Return the squared distances (B,) of whitened rows (B, d) to the nearest of whitened means (C, d)."""
    # Products lose fewer digits for values close to 0.
    center = means.mean(0)
    rows, means = rows - center, means - center
    nearest = torch.addmm(-means.square().sum(-1) / 2, rows, means.T).argmax(-1)
    # A difference keeps the digits that these products lose where means are many deviations apart.
    distances: Tensor = (rows - means[nearest]).square().sum(-1)
    return distances


@overload
def usual(pair: GenerativePair) -> Callable[[GenerativePair, Tensor], Tensor]: ...


@overload
def usual(pair: GenerativePair, activations: Tensor | Activations) -> Callable[..., Tensor]: ...


def usual(pair: GenerativePair, activations: Tensor | Activations | None = None) -> Callable[..., Tensor]:
    """Return the recommended score: a `Composite` fitted to activations, else what the pair alone allows.

    Without activations that is `directional` on a sphere in at least two dimensions, else `energy`. In one dimension,
    such as the span of two classes, a direction is only a sign, which separates the classes; and activations of
    dimension 1 allow no more than `energy` either.

    Args:
        pair: The pair.
        activations: Reference activations (N, d), N ≥ 20, as a tensor or as `Activations`.

    Returns:
        A fitted score of activations, or one of the functions of a pair. All that takes scores takes both.

    Example:
        >>> pair = GenerativePair(Head(torch.eye(3)))
        >>> usual(pair).__name__
        'directional'
        >>> type(usual(pair, torch.randn(100, 3, generator=torch.Generator().manual_seed(0)))).__name__
        'Composite'
    """
    if activations is not None and pair.head.in_features > 1:
        return Composite.fit(pair, activations)
    base = pair.base
    return directional if isinstance(base, Sphere) and base.seen_dim(pair.head) > 1 else energy
