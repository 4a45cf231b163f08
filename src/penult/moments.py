"""Moments of labelled activations: sums that add up over owners and days, and the exact Gaussian pair they define."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Categorical

from penult import io
from penult._checks import (
    as_activations,
    check_choice,
    check_integer,
    class_names_tuple,
    described,
    tensor_of,
)
from penult.activations import Activations, _checked_moments, _ClassMoments, _RunningMoments, _Scatter
from penult.bases import Gaussian, _check_shrinkage, _Shrinkage, _shrunk
from penult.head import Head, _certificate_of_no_model
from penult.pair import GenerativePair

__all__ = ["Moments"]


@final
class Moments:
    r"""Number, mean and scatter of the activations of each class: all that linear discriminant analysis needs.

    For class y with rows h_i, these are n_y, μ_y = Σ h_i / n_y and S_y = Σ (h_i − μ_y)(h_i − μ_y)', in float64. With
    ``scatter="pooled"`` only S = Σ_y S_y is kept. Moments of different rows add up, in any order, to those of all rows:
    owners, shards and days are merged without their rows. They give a head where there was none:

    .. math:: \Sigma = \operatorname{shrunk}(S / N), \qquad w_y = \Sigma^{-1} (\mu_y - m), \qquad
              p(h|y) = N(\mu_y, \Sigma), \qquad p(y) = n_y / N,

    an exact pair with a :class:`penult.Gaussian` base, see :meth:`pair`.

    Moments are not anonymous: the mean of a single row is that row, and with N < d each row can be told from others.

    References:
        Fisher, "The Use of Multiple Measurements in Taxonomic Problems", Annals of Eugenics 1936. Chan, Golub and
        LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician 1983, for the updates.

    Args:
        counts: n (K,), integers.
        means: μ (K, d); those of classes without rows are not read.
        scatter_matrix: S (d, d), or S_y of each class (K, d, d).
        class_names: K different names, or None.

    Attributes:
        class_names: The names, or None.
        dtype: Dtype of pairs: that of the activations or means, float32 or wider.

    Raises:
        TypeError: A value is no tensor or array of numbers, or a name no string.
        ValueError: Shapes do not agree; a count or a variance is negative; a value is not finite; names are repeated.

    Example:
        >>> h, y = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 0.0], [5.0, 4.0]]), torch.tensor([0, 0, 1, 1])
        >>> moments = Moments.of(h[:3], y[:3], 2) + Moments.of(h[3:], y[3:], 2)
        >>> moments.means.tolist()
        [[1.0, 1.0], [5.0, 2.0]]
        >>> moments.pair(shrinkage=0.0).prior.probs
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self, counts: Tensor, means: Tensor, scatter_matrix: Tensor, class_names: Sequence[str] | None = None
    ) -> None:
        self._sums = _checked_moments(counts, means, scatter_matrix)
        self.class_names = None if class_names is None else _unique_names(class_names, self.num_classes)
        self.dtype = torch.promote_types(as_activations(means).dtype, torch.float32)

    @classmethod
    def _of(cls, sums: _ClassMoments, dtype: torch.dtype, class_names: tuple[str, ...] | None) -> Moments:
        moments = cls.__new__(cls)
        moments._sums, moments.dtype, moments.class_names = sums, dtype, class_names
        return moments

    @classmethod
    def of(
        cls,
        h: Any,
        y: Any = None,
        num_classes: int | None = None,
        scatter: _Scatter = "pooled",
        *,
        class_names: Sequence[str] | None = None,
    ) -> Moments:
        """Compute the moments of labelled activations, which may be larger than memory.

        Args:
            h: Activations (N, d) as a tensor, an array or `Activations`; or an iterable of batches, such as a loader,
                each a pair (h, y) or `Activations` with labels, which is read once.
            y: Labels (N,) of any integer dtype. Default: those of the `Activations` or batches.
            num_classes: K. Default: the number of names; that of the `Activations`; or one more than the largest label.
            scatter: ``"pooled"``, one matrix (d, d) for all classes; or ``"class"``, one for each, so that classes can
                be forgotten without their rows.
            class_names: K different names, by which moments with other lists of classes are merged. Default: those of
                the `Activations`.

        Raises:
            TypeError: ``h`` or ``y`` has a wrong type.
            ValueError: There are no rows or no labels, a label is out of range, or a value is not finite.

        Example:
            >>> batches = [(torch.randn(8, 3), torch.tensor([0, 1] * 4)) for _ in range(5)]
            >>> Moments.of(batches, num_classes=2, scatter="class")
            Moments(N=40, d=3, K=2, scatter='class')
        """
        check_choice("scatter", scatter, ("pooled", "class"))
        whole = isinstance(h, Activations) or tensor_of(h) is not None
        if not whole and (y is not None or not isinstance(h, Iterable)):
            raise TypeError(
                f"h is {described(h)}; expected activations (N, d) with labels y, penult.Activations, or a loader of "
                "batches (h, y) without y"
            )
        if isinstance(h, Activations):
            num_classes = h.num_classes if num_classes is None and class_names is None else num_classes
            class_names = h.class_names if class_names is None else class_names
        num_classes = None if num_classes is None else check_integer("num_classes", num_classes)
        names = None if class_names is None else _unique_names(class_names, num_classes)
        num_classes = num_classes if names is None else len(names)
        sums = _RunningMoments(scatter, num_classes)
        if whole:
            sums.add(h, y, min_rows=1)
        else:
            for batch in h:
                sums.add_batch(batch)
        return cls._of(*sums.result(), names)

    # --- merging --------------------------------------------------------------------------------------------

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the rows of both. Classes are matched by name, or by number where both have no names.

        Warns:
            UserWarning: Both are of the same rows, which then count twice.

        Raises:
            ValueError: Dimensions or kinds of scatter differ, or one has names and the other has none.
        """
        if not isinstance(other, Moments):
            return NotImplemented
        if self.in_features != other.in_features:
            raise ValueError(
                f"the others are of dimension {other.in_features}; expected {self.in_features}. Merge moments of "
                "one network"
            )
        if self.scatter != other.scatter:
            raise ValueError(
                f"one scatter is {self.scatter!r} and the other {other.scatter!r}; expected the same. Call "
                ".pooled() of both"
            )
        if self.digest is not None and self.digest == other.digest:
            warnings.warn(
                "both moments are of the same rows, which then count twice. Add each set of rows once",
                UserWarning,
                stacklevel=2,
            )
        names, positions = _merged_names(self, other)
        k = max(self.num_classes, int(positions.max()) + 1)
        own = torch.arange(self.num_classes, device="cpu")
        sums = self._sums.spread(own, k).plus(other._sums.spread(positions, k))
        return Moments._of(sums, torch.promote_types(self.dtype, other.dtype), names)

    def __radd__(self, other: Any) -> Moments:
        # The built-in sum begins with 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def forget(self, h: Any, y: Any = None) -> Moments:
        """Return the moments without classes, or without rows, as if they had never been counted.

        A class that is forgotten keeps its number, with no rows, so that other moments still add up.

        Args:
            h: Classes to forget: a number, a name, or several of them. Or activations (M, d) to forget, with labels
                ``y``, which must be rows that were counted.
            y: Labels (M,) of the rows, or one label for all of them.

        Raises:
            TypeError: A class is neither a number nor a name.
            ValueError: There is no such class; the scatter is pooled and no rows are given; or the rows are not among
                those that were counted, as far as moments tell.

        Example:
            >>> h, y = torch.randn(90, 4), torch.arange(90) % 3
            >>> moments = Moments.of(h, y, 3, scatter="class").forget(1)
            >>> moments.counts, moments.classes
            (tensor([30,  0, 30]), tensor([0, 2]))
        """
        if y is None:
            if (rows := tensor_of(h)) is not None and rows.is_floating_point():
                raise ValueError("y is None; expected the labels of the rows h. Pass moments.forget(h, y)")
            gone = torch.zeros(self.num_classes, dtype=torch.bool, device="cpu")
            gone[self._numbers(h)] = True
            return Moments._of(self._sums.without(gone), self.dtype, self.class_names)
        if isinstance(y, int | str):
            h = h if isinstance(h, Activations) else as_activations(h, shape="(M, d)")
            y = torch.full((len(h),), self._numbers(y)[0], device="cpu")
        given = Moments.of(h, y, self.num_classes, self.scatter)
        if given.in_features != self.in_features:
            raise ValueError(f"h has dimension {given.in_features}; expected {self.in_features}")
        return Moments._of(self._sums.minus(given._sums), self.dtype, self.class_names)

    def pooled(self) -> Moments:
        """Return the moments with the scatters of all classes added up.

        Example:
            >>> Moments.of(torch.randn(9, 2), torch.arange(9) % 3, 3, scatter="class").pooled()
            Moments(N=9, d=2, K=3, scatter='pooled')
        """
        return Moments._of(self._sums.pooled(), self.dtype, self.class_names)

    def with_class_names(self, class_names: Sequence[str]) -> Moments:
        """Return the moments with K different names of the classes."""
        return Moments._of(self._sums, self.dtype, _unique_names(class_names, self.num_classes))

    # --- the pair -------------------------------------------------------------------------------------------

    def covariance(self, shrinkage: _Shrinkage = "oas") -> Tensor:
        """Return the covariance Σ (d, d), float64, of all classes: S / N with a part replaced by a multiple of I.

        Args:
            shrinkage: That part, from 0 to 1; or ``"oas"``, for N − K independent rows (Chen, Wiesel, Eldar and Hero
                2010).

        Raises:
            ValueError: There are no rows, or the shrinkage is out of range.
        """
        shrinkage = _check_shrinkage(shrinkage)
        if not len(self):
            raise ValueError("there are no rows; expected one or more")
        return _shrunk(self._sums.pooled().matrix / len(self), shrinkage, max(1, len(self) - len(self.classes)))

    def pair(
        self,
        shrinkage: _Shrinkage = "oas",
        prior: Tensor | Categorical | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> GenerativePair:
        """Return the pair of linear discriminant analysis: p(h|y) = N(μ_y, Σ), and a head that follows from it.

        Args:
            shrinkage: Part of the covariance that is replaced by a multiple of the identity, see :meth:`covariance`.
            prior: Positive class weights, one for each of ``classes``. Default: the shares of the classes.
            dtype: Dtype of head and base. Default: that of the activations, float32 or wider. A covariance that is
                almost singular needs float64.

        Returns:
            The pair, on the CPU. Row i of its head is for class ``classes[i]``.

        Warns:
            UserWarning: There are fewer rows than dimensions, or a class has fewer than two rows. Classes without rows
                are left out of the head.

        Raises:
            ValueError: Fewer than two classes have rows, all means are equal, the covariance is singular, or the prior
                has a wrong shape or is not positive.

        Example:
            >>> g = torch.Generator().manual_seed(0)
            >>> y = torch.arange(300) % 3
            >>> h = torch.randn(300, 5, generator=g) + 4 * torch.eye(3, 5)[y]
            >>> pair = Moments.of(h, y, 3).pair()
            >>> pair.posterior(h).probs.argmax(-1).eq(y).double().mean() > 0.95
            tensor(True)
        """
        classes = self.classes
        if len(classes) < 2:
            raise ValueError(f"{len(classes)} classes have rows; expected at least 2. Add moments of other classes")
        self._warn(stacklevel=3, whole=True)
        means, n = self.means[classes], self.counts[classes].double()
        log_prior = _log_prior(prior, classes, n)
        # The mean of the class means, so that the centered rows of the head are its rows.
        loc = means.mean(0)
        covariance = self.covariance(shrinkage)
        if not bool((means != loc).any()):
            raise ValueError("the means of all classes are equal, so that no head can separate the classes")
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            raise ValueError(
                f"the covariance of {len(self)} rows of dimension {self.in_features} is singular with "
                f"shrinkage={shrinkage!r}; expected a positive definite one. Pass a larger shrinkage, or more rows"
            )
        weight = torch.cholesky_solve((means - loc).T, factor).T
        dtype = self.dtype if dtype is None else dtype
        check_choice("dtype", dtype, (torch.float32, torch.float64))
        base = Gaussian(loc.to(dtype), covariance.to(dtype))
        base.reference = self.digest
        # From the rounded tensors, so that rounding them does not change the prior.
        weight = weight.to(dtype).contiguous()
        rows = torch.cat([block for _, block in Head._of_model(weight, None).centered_blocks()])
        bias = log_prior - base.log_mgf(rows.double())
        # A mean in the middle of the others has a row of zeros, which the constructor takes for an untrained class.
        head = Head._of_model(weight, (bias - bias.mean()).to(dtype))
        how = shrinkage if isinstance(shrinkage, str) else f"{shrinkage:.4g}"
        origin = f"linear discriminant analysis of the moments of {len(self)} labelled activations, shrinkage {how}"
        head.certificate = _certificate_of_no_model(head, "moments", origin, len(self))
        return GenerativePair(head, base)

    # --- facts ----------------------------------------------------------------------------------------------

    @property
    def counts(self) -> Tensor:
        """Numbers of rows n (K,), int64."""
        return self._sums.counts

    @property
    def means(self) -> Tensor:
        """Class means μ (K, d), float64; zero for classes without rows."""
        return self._sums.means

    @property
    def scatter_matrix(self) -> Tensor:
        """S (d, d) or S_y (K, d, d), float64."""
        return self._sums.matrix

    @property
    def scatter(self) -> _Scatter:
        """``"pooled"`` or ``"class"``."""
        return "class" if self._sums.by_class else "pooled"

    @property
    def num_classes(self) -> int:
        """K, with classes that have no rows."""
        return len(self.counts)

    @property
    def in_features(self) -> int:
        """The dimension d."""
        return self.means.shape[1]

    @property
    def classes(self) -> Tensor:
        """Numbers (K',) of the classes that have rows, in order; those of the rows of the pair's head."""
        return self.counts.nonzero().flatten()

    @property
    def digest(self) -> str | None:
        """Digest of the whole set of rows in float32; None if it is not known."""
        return None if self._sums.hashes is None else f"{len(self)}-{int(self._sums.hashes.sum()) % 2**64:016x}"

    def __len__(self) -> int:
        """Return the number of rows N."""
        return int(self.counts.sum())

    def __repr__(self) -> str:
        """Return the sizes."""
        return f"Moments(N={len(self)}, d={self.in_features}, K={self.num_classes}, scatter={self.scatter!r})"

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the moments to one safetensors file, which :meth:`load` reads; no pickle is involved.

        Warns:
            UserWarning: There are fewer rows than dimensions, or a class has a single row: the file then gives rows
                away.
        """
        self._warn(stacklevel=3, whole=False)
        tensors = {"counts": self.counts, "means": self.means, "scatter_matrix": self.scatter_matrix}
        if self._sums.hashes is not None:
            tensors["hashes"] = self._sums.hashes
        names = None if self.class_names is None else list(self.class_names)
        dtype = str(self.dtype).removeprefix("torch.")
        return io.write(path, tensors, "moments", {"class_names": names, "dtype": dtype})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read moments that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            penult.io.FileFormatError: The file is damaged, of another kind or program, or of a newer schema.

        Example:
            >>> import tempfile
            >>> moments = Moments.of(torch.randn(9, 2), torch.arange(9) % 3, 3)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     print(Moments.load(moments.save(f"{folder}/m.safetensors")))
            Moments(N=9, d=2, K=3, scatter='pooled')
        """
        file = io.read(path, kind="moments")
        try:
            # The tensors may be the file, mapped into memory: whoever writes to it would change them.
            tensors = {name: tensor.clone() for name, tensor in file.tensors.items()}
            dtype = {"float32": torch.float32, "float64": torch.float64}[file.metadata["dtype"]]
            sums = _checked_moments(
                tensors["counts"], tensors["means"], tensors["scatter_matrix"], tensors.get("hashes")
            )
            names = file.metadata["class_names"]
            return cls._of(sums, dtype, None if names is None else _unique_names(names, len(sums.counts)))
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise io.FileFormatError(f"{path}: the moments cannot be rebuilt from the file: {error}") from error

    # --- inside ---------------------------------------------------------------------------------------------

    def _warn(self, stacklevel: int, whole: bool) -> None:
        """Warn of rows that moments give away, and of classes without a scatter where a pair is made of the `whole`."""
        if 0 < len(self) < self.in_features:
            warnings.warn(
                f"there are {len(self)} rows of dimension {self.in_features}; with fewer rows than dimensions, "
                "anyone who reads moments or pair can tell of each row whether it was counted. Keep them as private",
                UserWarning,
                stacklevel=stacklevel,
            )
        for number, fault in ((1, "a single row, which is its mean"), (0, "no rows, and is not in the head")):
            few = (self.counts == number).nonzero().flatten().tolist()
            if few and (whole or number):
                named = [str(k) if self.class_names is None else repr(self.class_names[k]) for k in few[:8]]
                more = f" and {len(few) - 8} more" if len(few) > 8 else ""
                warnings.warn(
                    f"class {', '.join(named)}{more} has {fault}; expected two rows or more of each class",
                    UserWarning,
                    stacklevel=stacklevel,
                )

    def _numbers(self, classes: Any) -> list[int]:
        """Return the numbers of classes, which are given as numbers or names."""
        classes = classes.tolist() if isinstance(classes, Tensor) else classes
        several = isinstance(classes, Iterable) and not isinstance(classes, str)
        numbers = []
        for value in classes if several else [classes]:
            if isinstance(value, str):
                if value not in (names := self.class_names or ()):
                    raise ValueError(
                        f"there is no class {value!r}; expected one of {', '.join(names[:8]) or 'numbers'}"
                    )
                numbers.append(names.index(value))
            else:
                numbers.append(check_integer("class", value, 0, self.num_classes - 1))
        return numbers


def _unique_names(class_names: Sequence[str], num_classes: int | None = None) -> tuple[str, ...]:
    names = class_names_tuple(class_names, num_classes)
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"class_names has {repeated!r} twice; expected different names, by which classes are merged")
    return names


def _merged_names(one: Moments, two: Moments) -> tuple[tuple[str, ...] | None, Tensor]:
    """Return the names of the classes of both, and the numbers among them of the classes of the second."""
    if (one.class_names is None) != (two.class_names is None):
        raise ValueError(
            "one of the moments has class names and the other has none, so that their classes cannot be matched. Call "
            ".with_class_names(names) of the other"
        )
    if one.class_names is None or two.class_names is None:
        return None, torch.arange(two.num_classes, device="cpu")
    names = tuple(dict.fromkeys((*one.class_names, *two.class_names)))
    number = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([number[name] for name in two.class_names], dtype=torch.int64, device="cpu")


def _log_prior(prior: Tensor | Categorical | None, classes: Tensor, counts: Tensor) -> Tensor:
    """Return the logarithm of the class prior (K',) in float64. Default: the shares."""
    if prior is None:
        return (counts / counts.sum()).log()
    weights = prior.probs if isinstance(prior, Categorical) else prior
    weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
    if weights.shape != classes.shape or not bool(((weights > 0) & weights.isfinite()).all()):
        raise ValueError(
            f"prior has shape {tuple(weights.shape)}; expected {len(classes)} positive, finite class weights, one for "
            "each class that has rows"
        )
    return (weights / weights.sum()).log()
