"""Marginal base: any distribution of unlabelled activations, with labels from the head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from penult._checks import check_choice, check_integer, described, index_of
from penult._row_blocks import mean_row_of, readable
from penult.activations import Activations, _ActivationSource
from penult.bases._class_samples import RowIndex, accept, block_size, class_means, expected_posterior, pick
from penult.bases._distribution_module import Law, Sampler
from penult.bases.base import Base, BaseInfo
from penult.distributions import Bank, NormalizingFlow, PrincipalMixture
from penult.head import Head
from penult.special import in_double, traced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Marginal", "MarginalKind"]

MarginalKind = Literal["mixture", "class", "flow", "bank"]

# Default number of samples that the prior is estimated from. It is smaller if the estimate would take more operations
# or logits than these.
_SAMPLES = 1 << 18
_OPERATIONS, _LOGITS = 1 << 36, 1 << 26
_MOST_SAMPLES = 1 << 28
# Number of floats of the covariances of a mixture.
_FLOATS = 36_000
# Fraction of exact zeros up to which a distribution of positive activations is fitted by default.
_FEW_ZEROS = 0.05
# Largest number of floats of a bank: 128 MiB.
_BANK = 1 << 25


class Marginal(Base):
    r"""Any distribution p(h) of unlabelled activations, as the marginal of an exact pair.

    .. math:: p(h|y) = \frac{p(h)\, \mathrm{softmax}_y(W h + b)}{p(y)}, \qquad
              p(y) = E_p[\mathrm{softmax}_y(W h + b)], \qquad
              m(h) = \frac{p(h)}{\sum_y e^{w_y \cdot h + b_y}} .

    Joint samples are h ~ p with y ~ softmax(h). The samples of the classes are therefore as good as p, and need no
    normaliser. The prior p(y), and with it log M at the head's rows, is an expectation: it is estimated once from
    ``samples`` samples, with ``info.mgf_standard_error`` (for a :class:`~penult.distributions.Bank` it is exact). log M
    is known at the rows of the head only.

    Samples of a class are samples of p with this label, so that one sample of class y takes about 1/p(y) samples of p
    (of a bank, one). Samples of several classes share the samples of p; more are made until the rare classes have
    enough.

    Args:
        head: The head. The base refers to its W. The pair must have this head, or one that differs from it only in the
            bias. When W changes, the base raises a RuntimeError; fit a new one.
        distribution: Any torch Distribution of batch shape () and event shape (d,), or an object with such a ``sample``
            method. Without ``log_prob`` densities raise an error, and everything else works. A ``torch.nn.Module``
            moves with the base and is part of its state dict.
        samples: Number of samples that the prior is estimated from, at most 2²⁸. Default: 262 144, or fewer if K is
            above 256.
        seed: Seed of these samples. The global random state is not changed.

    Raises:
        TypeError: ``head`` is not a `Head`, ``distribution`` cannot be sampled, or a number is of a wrong type.
        ValueError: The samples have another dimension than the head, or are not finite; a class has probability 0 for
            all of them; or a number is out of range.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> head = Head(torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, -2.0]]))
        >>> base = Marginal(head, Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
        >>> pair = penult.GenerativePair(head, base)
        >>> h, y = pair.sample((1000,), generator=torch.Generator().manual_seed(0))
        >>> h.shape, bool((pair.posterior(h).probs.gather(1, y[:, None]).mean() > 0.5))
        (torch.Size([1000, 2]), True)
        >>> torch.allclose(pair.log_prob(h), base.distribution.log_prob(h), atol=1e-4)
        True
    """

    log_prior: Tensor
    standard_error: Tensor
    bias: Tensor

    def __init__(self, head: Head, distribution: Sampler, *, samples: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(head, Head):
            raise TypeError(f"head is {described(head)}; expected a penult.Head, as in Marginal(head, distribution)")
        if not isinstance(distribution, Sampler):
            raise TypeError(
                f"distribution is {described(distribution)}, which has no method sample; expected a torch Distribution "
                "of activations. Marginal.fit(head, activations) fits one"
            )
        batch = getattr(distribution, "batch_shape", torch.Size())
        if len(batch):
            raise ValueError(
                f"distribution has batch shape {tuple(batch)} and event shape "
                f"{tuple(getattr(distribution, 'event_shape', ()))}; expected () and ({head.in_features},). Wrap it in "
                "torch.distributions.Independent"
            )
        if samples is not None:
            samples = check_integer("samples", samples, 2, _MOST_SAMPLES)
        seed = check_integer("seed", seed, -(1 << 63), (1 << 63) - 1)
        k, d = head.num_classes, head.in_features
        affordable = max(1 << 12, min(_SAMPLES, _LOGITS // k, _OPERATIONS // (k * d)))
        self._hold(head, head.full_bias.clone(), Law(distribution), samples or affordable, seed)
        prior, error = self._estimate()
        self.register_buffer("log_prior", prior.log())
        self.register_buffer("standard_error", error)

    def _hold(self, head: Head, bias: Tensor, law: Law, samples: int, seed: int) -> None:
        # The base has a head of its own, since a pair with another prior has another bias. It is no submodule, since
        # the state dict of the pair contains W already.
        own = head.with_bias(bias)
        own.weight, own.mean_row = head.weight, head.mean_row
        self._heads = (own,)
        self.register_buffer("bias", own.bias)
        self._head_version: tuple[int, ...] | None = own.version
        self.law = law
        self._samples, self._seed = samples, seed
        self._index: RowIndex | None = None

    @classmethod
    def fit(
        cls,
        head: Head,
        activations: Tensor | Activations,
        kind: MarginalKind = "mixture",
        components: int | None = None,
        dims: int | None = None,
        rectified: bool | None = None,
        positive: bool | None = None,
        seed: int = 0,
        group: ProcessGroup | None = None,
    ) -> Marginal:
        """Fit a distribution to unlabelled activations, which may be larger than memory.

        Args:
            head: The head, which labels the samples. If you have labels, calibrate it first (:meth:`Head.calibrate`).
            activations: Activations (N, d), N ≥ 2, as a tensor or as `Activations`.
            kind: ``"mixture"``, a :class:`~penult.distributions.PrincipalMixture` by expectation maximisation: close to
                the bank with 38 k floats at d = 64, and a good first choice. ``"class"``, one Gaussian for each class
                in principal components, with the head's probabilities as labels, in closed form. ``"flow"``, a
                normalizing flow (extra ``flow``). ``"bank"``, the activations as they are stored, or a random sample of
                them with 33 million floats if there are more.
            components: Components of ``"mixture"``, at most one for 20 activations. Default: the number of classes, but
                at least 32 and at most 100.
            dims: Principal components of ``"mixture"`` and ``"class"``; other directions are isotropic noise. Default:
                64, or fewer (at least 24) to keep the covariances within 36 000 floats.
            rectified: Whether ``activations`` are pre-activations u. Their distribution is fitted, and the head reads
                samples max(u, 0), which have the exact zeros of a network with a ReLU right before its head. Default:
                True for `Activations` extracted with ``pre_activation=True``, and for a tensor with negative numbers if
                the head's certificate says that there is such a ReLU.
            positive: Whether ``"mixture"`` and ``"class"`` are distributions of positive activations, see
                :class:`~penult.distributions.PrincipalMixture`. Default: True if no activation is negative and at most
                one in twenty is zero, as after ReLU and average pooling.
            seed: Seed of the fit, and of the estimate of the prior.
            group: Processes of ``torch.distributed`` that share the work. Each makes the same call, reads its own part
                of ``activations``, and gets the same fit, equal to that of one process up to the rounding of sums. Each
                fits a ``"flow"`` to a sample of at most 33 million floats.

        Returns:
            The base. ``base.distribution`` is the fitted distribution.

        Warns:
            UserWarning: A ReLU stands right before the head and ``activations`` are its outputs.

        Raises:
            ImportError: ``"flow"`` is asked for and zuko is not installed (``pip install "penult[flow]"``).
            TypeError: ``activations`` is neither a floating tensor nor `Activations`.
            ValueError: ``activations`` has too few rows or a wrong shape, is not finite or is constant; ``rectified``
                contradicts the activations; or an option is out of range.

        Example:
            >>> head = Head(torch.eye(3))
            >>> h = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
            >>> Marginal.fit(head, h, components=4)
            Marginal(PrincipalMixture(4 components in 3 of 3 dimensions, 53 floats), standard_error=...)
        """
        check_choice("kind", kind, get_args(MarginalKind))
        seed = check_integer("seed", seed, -(1 << 63), (1 << 63) - 1)
        source = _ActivationSource(activations, head, min_rows=2, group=group)
        source.rectified = _rectified(head, source, rectified, kind)
        if positive is None:
            positive = not source.rectified and source.minimum >= 0 and source.zeros <= _FEW_ZEROS

        def subset() -> Tensor:
            return source.sample(max(1, _BANK // head.in_features), torch.Generator().manual_seed(seed))

        law: Sampler
        if kind == "mixture":
            count = min(max(32, head.num_classes), 100) if components is None else components
            law = PrincipalMixture.fit(
                source.stored,
                count,
                _dims(count) if dims is None else dims,
                source.rectified,
                positive,
                seed,
                group=group,
            )
        elif kind == "class":
            count = _dims(head.num_classes) if dims is None else dims
            law = PrincipalMixture.from_posterior(
                source.stored, source.posterior, count, source.rectified, positive, group=group
            )
        elif kind == "flow":
            rows = source.stored if group is None else subset()
            law = NormalizingFlow.fit(rows, rectified=source.rectified, seed=seed)
        else:
            law = Bank(subset(), rectified=source.rectified, validate_args=False)
        base = cls(head, law, seed=seed)
        base.reference = source.digest
        return base

    @property
    def head(self) -> Head:
        """Head that labels the samples, with the bias that it had when the base was made."""
        return self._heads[0]

    @property
    def distribution(self) -> Any:
        """Distribution p of unlabelled activations."""
        return self.law.sampler

    @property
    def info(self) -> BaseInfo:
        """Facts about this measure."""
        law = self.distribution
        names: dict[type, str] = {Bank: "bank", PrincipalMixture: "mixture", NormalizingFlow: "flow"}
        name = names.get(type(law), type(law).__name__)
        orthant = bool(getattr(law, "rectified", False)) or getattr(law, "softness", None) is not None
        density = self.law.has_density
        return BaseInfo(
            name=f"marginal {name}",
            reference="Lebesgue measure" if density else "none: it has no density",
            support=f"{len(law)} points" if isinstance(law, Bank) else "orthant" if orthant else "R^d",
            needs_data=True,
            exact_mgf=False,
            source="any distribution of activations is the marginal of an exact pair",
            mgf_standard_error=float(self.standard_error.max()),
            has_density=density,
        )

    @property
    def in_features(self) -> int:
        """Dimension d of activations."""
        return self.head.in_features

    @property
    def num_parameters(self) -> int:
        """Number of floats of the distribution."""
        count = getattr(self.distribution, "num_parameters", None)
        return sum(t.numel() for t in self.law.state_dict().values()) if count is None else int(count)

    def log_mgf(self, weight: Tensor) -> Tensor:
        """Return log M(w_y) = log E_p[softmax_y] − b_y for centered rows (*B, d) of the head: (*B,).

        Its gradient is the mean E[h|y], estimated from the same samples as the prior; there is no second derivative.

        Raises:
            ValueError: A row is not in the head.
        """
        y = self._classes(weight)
        value = (self.log_prior[y] - self.head.full_bias.to(self.log_prior)[y]).to(weight.dtype)
        if weight.requires_grad and torch.is_grad_enabled():
            classes, index = y.unique(return_inverse=True)
            mean = class_means(self.head, self._reference(), classes)[index].to(weight.dtype)
            value = value + ((weight - weight.detach()) * mean).sum(-1)
        return value

    def log_prob(self, h: Tensor) -> Tensor:
        """Return log m(h) = log p(h) − logsumexp of the centered logits, at h (*S, d): (*S,).

        In a distribution of positive activations, exact zeros are replaced by a value close to zero.

        Raises:
            ValueError: The distribution has no density.
        """
        self._check_features(h, "h")
        self._check_current()
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        return self.law.log_prob(h) - self.head.centered_logits(h).logsumexp(-1)

    def draw(self, weight: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample one activation of the class of ``weight[i]`` for each i of ``index`` (N,): (N, d)."""
        index = index_of(index)
        y = self._classes(weight)[index]
        classes, inverse = y.unique(return_inverse=True)
        counts = inverse.bincount(minlength=len(classes))
        law = self.distribution
        if not len(y):
            h = weight.new_empty(0, self.in_features)
        elif isinstance(law, Bank):
            h = pick(self.head, law.rows, classes, counts, law.replacement, generator)
        else:
            prior = self.log_prior[classes].exp()
            h = accept(self.head, self._stream(generator), classes, counts, prior, generator)
        grouped = torch.empty_like(h)
        grouped[inverse.argsort(stable=True)] = h
        return grouped.to(torch.promote_types(weight.dtype, torch.float32))

    def implies(self, head: Head) -> bool:
        """Return whether the pair of ``head`` and this base has p as its distribution of activations.

        This is so if the biases of ``head`` and of the base's own head differ by a constant only.
        """
        shift = head.full_bias - self.head.full_bias
        return bool((shift == shift[0]).all())

    def draws_for(self, y: Tensor) -> float:
        """Return the expected number of samples of p that it takes to get samples of the classes ``y`` (N,)."""
        if isinstance(self.distribution, Bank):
            return float(len(y))
        return float((y.bincount(minlength=self.head.num_classes) / self.log_prior.exp()).max())

    def draw_joint(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Sample activations h ~ p (N, d) and classes y ~ softmax(h) (N,); no sample of p is rejected."""
        law, size = self._stream(generator), block_size(self.head)
        h = law(count)
        labels = [
            torch.multinomial(self.head.centered_logits(rows).softmax(-1), 1, generator=generator).squeeze(-1)
            for rows in h.split(size)
        ]
        return h, torch.cat(labels)

    def config(self) -> dict[str, Any]:
        """Return a dictionary for JSON, from which :meth:`from_config` rebuilds the base, given buffers and head."""
        return {"law": self.law.describe(), "samples": self._samples, "seed": self._seed}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], head: Head) -> Marginal:
        """Rebuild a saved base of a pair with ``head``."""
        parts = {name.removeprefix("law."): tensor for name, tensor in tensors.items() if name.startswith("law.")}
        base = cls.__new__(cls)
        Base.__init__(base)
        check_integer("samples", config["samples"], 2, _MOST_SAMPLES)
        check_integer("seed", config["seed"], -(1 << 63), (1 << 63) - 1)
        law = Law.rebuild(config["law"], parts)
        if tuple(law.sampler.event_shape) != (head.in_features,):
            raise ValueError(
                f"distribution has event shape {tuple(law.sampler.event_shape)}; expected ({head.in_features},)"
            )
        base._hold(head, tensors["bias"].to(head.weight), law, config["samples"], config["seed"])
        base.bias = tensors["bias"]
        for name in ("log_prior", "standard_error"):
            value = tensors[name]
            if value.shape != (head.num_classes,) or not value.is_floating_point() or not bool(value.isfinite().all()):
                raise ValueError(
                    f"{name} is {value.dtype} of shape {tuple(value.shape)}; expected {head.num_classes} finite numbers"
                )
            base.register_buffer(name, value)
        if abs(float(in_double(base.log_prior).logsumexp(-1))) > 1e-3 or bool((base.standard_error < 0).any()):
            raise ValueError("log_prior is not normalised, or standard_error is negative")
        return base

    def extra_repr(self) -> str:
        """Return the distribution and the standard error of the prior, for ``print``."""
        return f"{self.distribution}, standard_error={float(self.standard_error.max()):.2g}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    # --- inside ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Marginal:
        super()._apply(fn, recurse)
        self.head._apply(fn, recurse)
        self._settle()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # The pair's head shares this tensor and may have loaded new values into it.
        rows = self.head.weight
        self.head.mean_row = mean_row_of(rows).to(rows.device, self.head.mean_row.dtype)
        self._settle()

    def _settle(self) -> None:
        """Set the head's bias from the buffer after a move or a load, and accept the present version of the head."""
        self.head.bias = self.bias.to(self.head.weight)
        self._index, self._head_version = None, None

    def _check_current(self) -> None:
        if not readable(self.head.weight):
            return
        if self._head_version is None:
            self._head_version = self.head.version
        elif self.head.version != self._head_version:
            raise RuntimeError(
                "the head's weights changed after this base was made, so that its prior and the classes of its samples "
                "no longer belong to them. Fit a new base, or make it with head.clone() to keep the old weights"
            )

    def _stream(self, generator: torch.Generator | None) -> Callable[[int], Tensor]:
        return lambda count: self.law.sample(count, generator, self.head.weight.device)

    def _reference(self) -> Iterator[Tensor]:
        """Iterate over the activations that the prior is estimated from, the same each time; for a bank, its rows."""
        law, size = self.distribution, block_size(self.head)
        if isinstance(law, Bank):
            yield from (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in law.rows.split(size))
            return
        draw = self._stream(torch.Generator(self.head.weight.device).manual_seed(self._seed))
        for start in range(0, self._samples, size):
            yield draw(min(size, self._samples - start))

    def _checked(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        for h in blocks:
            if h.dim() != 2 or h.shape[1] != self.in_features or not bool(h.isfinite().all()):
                fault = "hold NaN or infinity" if h.shape[1:] == (self.in_features,) else f"have shape {tuple(h.shape)}"
                raise ValueError(
                    f"samples of {self.distribution} {fault}; expected finite numbers (n, {self.in_features})"
                )
            yield h

    @torch.no_grad()
    def _estimate(self) -> tuple[Tensor, Tensor]:
        prior, error = expected_posterior(self.head, self._checked(self._reference()))
        if isinstance(self.distribution, Bank):
            error = torch.zeros_like(error)
        if not bool((prior > 0).all()):
            y = int((prior <= 0).nonzero()[0])
            raise ValueError(
                f"class {y} has probability 0 for all samples of {self.distribution}, so that p(h|y) does not exist. "
                "Fit to activations in which the class occurs"
            )
        return prior, error

    def _classes(self, weight: Tensor) -> Tensor:
        """Return the classes (*B,) of rows (*B, d); raise a ValueError for rows that are not in the head."""
        self._check_features(weight, "weight")
        self._check_current()
        if self._index is None or not self._index.current(self.head):
            self._index = RowIndex(self.head)
        y = self._index.classes(weight)
        if not traced(weight) and bool((y < 0).any()):
            raise ValueError(
                f"{int((y < 0).sum())} of {y.numel()} rows are not rows of the head that this base was made with; "
                "expected rows of head.centered_weight(y). Fit the base again for another head or temperature"
            )
        return y

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of a copy count their changes from 0.
        return {**self.__dict__, "_index": None, "_head_version": None}


def _dims(components: int) -> int:
    """Return the number of principal components (24 to 64) that keeps all covariances and means within `_FLOATS`."""
    return max([24, *(m for m in range(25, 65) if components * (1 + m + m * (m + 1) // 2) <= _FLOATS)])


def _rectified(head: Head, source: _ActivationSource, asked: bool | None, kind: str) -> bool:
    """Return whether stored activations are pre-activations, see `Marginal.fit`."""
    relu = head.certificate is not None and head.certificate.rectified
    if source.declared and asked is False:
        raise ValueError(
            "rectified is False, but activations are pre-activations (pre_activation=True); expected True or None"
        )
    if asked and source.minimum >= 0:
        raise ValueError(
            f"rectified is True, but the smallest activation is {source.minimum:.3g}; expected pre-activations, some "
            "of them negative. Extract them with penult.extract(tap, loader, pre_activation=True)"
        )
    if asked is None and relu and source.minimum >= 0 and kind != "bank":
        warnings.warn(
            "a ReLU stands right before this head, and these activations are its outputs. A distribution fitted to "
            "them has no exact zeros, so that a classifier separates its samples easily. Fit to "
            "penult.extract(tap, loader, pre_activation=True), or pass rectified=False to fit to the outputs",
            UserWarning,
            stacklevel=3,
        )
    return source.rectified if asked is None else asked
