"""The marginal: any law of unlabelled activations, paired with the head that labels its draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from penult._row_blocks import mean_row_of
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

_SAMPLES = 1 << 18  # from which the prior is estimated
_OPERATIONS, _LOGITS = 1 << 36, 1 << 26  # that this may take
_FLOATS = 36_000  # of the covariances of a mixture
_FEW_ZEROS = 0.05  # exact zeros that a law of positive numbers may pass over
_BANK = 1 << 25  # floats that a bank keeps, at most: 128 MiB


class Marginal(Base):
    r"""A law p(h) of unlabelled activations, any law, as the marginal of an exact pair.

    .. math:: p(h|y) = \frac{p(h)\, \mathrm{softmax}_y(W h + b)}{p(y)}, \qquad
              p(y) = E_p[\mathrm{softmax}_y(W h + b)], \qquad
              m(h) = \frac{p(h)}{\sum_y e^{w_y \cdot h + b_y}} .

    Joint draws are h ~ p with y ~ softmax(h), so that whatever fits unlabelled activations well gives class
    conditional draws that are as good, and no normaliser is needed. The price is that p(y), and with it log M at the
    head's rows, is an expectation: it is estimated once from ``samples`` draws (exactly, for a
    :class:`~penult.distributions.Bank`), with ``info.mgf_standard_error``. Other rows than the head's are refused.

    Draws of a class are draws of p that the softmax puts into it, so that one draw of class y costs about 1/p(y) draws
    of p (from a bank, none are lost). Draws for many classes share one stream: draws are sorted into classes, and
    the rare ones topped up.

    Args:
        head: The head. Its W is held by reference; the pair has to be of this head, or of one that differs from it in
            its bias alone. When W changes, fit anew: the base says so by a RuntimeError.
        distribution: Any torch Distribution of batch shape () and event shape (d,), or any object with a ``sample``
            method like one. Without ``log_prob`` densities raise an error; everything else works. A
            ``torch.nn.Module`` moves with the base and is part of its state dict.
        samples: Draws that the prior is estimated from, at most 2²⁸; None for 262 144, fewer where K is
            above 256.
        seed: Seed of these draws. The global random state is not touched.

    Raises:
        TypeError: If ``head`` is no `Head` or ``distribution`` cannot be sampled.
        ValueError: If the draws have another dimension than the head's, or are not finite; if a class has no share in
            them; or a number is out of range.

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
            raise TypeError(f"head must be a penult.Head, got {type(head).__name__}: Marginal(head, distribution)")
        if not isinstance(distribution, Sampler):
            raise TypeError(
                f"distribution is a {type(distribution).__name__}, which has no method sample; give a torch "
                "Distribution of activations, or fit one: Marginal.fit(head, activations)"
            )
        batch = getattr(distribution, "batch_shape", torch.Size())
        if len(batch):
            raise ValueError(
                f"the distribution has batch shape {tuple(batch)} and event shape "
                f"{tuple(getattr(distribution, 'event_shape', ()))}; expected () and ({head.in_features},): wrap it in "
                "torch.distributions.Independent"
            )
        if samples is not None:
            _check_integer("samples", samples, 2, 1 << 28)
        _check_integer("seed", seed, -(1 << 63), (1 << 63) - 1)
        k, d = head.num_classes, head.in_features
        affordable = max(1 << 12, min(_SAMPLES, _LOGITS // k, _OPERATIONS // (k * d)))
        self._hold(head, head.full_bias.clone(), Law(distribution), samples or affordable, seed)
        prior, error = self._estimate()
        self.register_buffer("log_prior", prior.log())
        self.register_buffer("standard_error", error)

    def _hold(self, head: Head, bias: Tensor, law: Law, samples: int, seed: int) -> None:
        # A head of its own, since a pair under another prior has another bias; and no submodule, since the pair holds
        # W, and its state dict shall have it once.
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
        """Fit a law to unlabelled activations, which may be larger than memory.

        Args:
            head: The head, calibrated if labels are at hand (:meth:`Head.calibrate`): the softmax decides which class
                a draw belongs to.
            activations: Activations (N, d), N ≥ 2, as a tensor or as `Activations`.
            kind: ``"mixture"``, a :class:`~penult.distributions.PrincipalMixture` by expectation maximisation: close
                to the bank in 38 k floats at d = 64, and what to start with. ``"class"``, one Gaussian a class in
                principal components, with the head's probabilities for labels, in closed form. ``"flow"``, a
                normalizing flow (extra ``flow``). ``"bank"``, the activations themselves, as they are stored, a
                random sample of them where they are more than 33 million floats.
            components: Components of ``"mixture"`` (other kinds do not look at it), at most one for 20 activations.
                None for as many as there are classes, but at least 32 and at most 100.
            dims: Principal components of ``"mixture"`` and ``"class"``; the rest is isotropic noise. None for 64, or
                as many as keep the covariances within 36 000 floats, but at least 24.
            rectified: Whether ``activations`` are pre-activations u, whose law is fitted, and whose draws max(u, 0)
                the head reads: that gives the exact zeros of a network with a ReLU right before its head. None
                means yes for `Activations` extracted with ``pre_activation=True``, and for a tensor with negative
                numbers where the head's certificate says that a ReLU stands there.
            positive: Whether ``"mixture"`` and ``"class"`` are laws of positive activations, see
                :class:`~penult.distributions.PrincipalMixture`. None means yes where no activation is negative and at
                most one in twenty is zero, as after ReLU and average pooling.
            seed: Seed of the fit, and of the estimate of the prior.
            group: Processes of ``torch.distributed`` that share the work. Each calls with the same arguments, reads its
                own part of ``activations``, and gets the same fit, that of one process to rounding of
                sums; a ``"flow"`` is fitted in each to a sample of at most 33 million floats.

        Returns:
            The base. ``base.distribution`` is the law.

        Warns:
            UserWarning: If a ReLU stands right before the head and ``activations`` come after it.

        Raises:
            ImportError: If ``"flow"`` is asked for and zuko is not installed (``pip install "penult[flow]"``).
            TypeError: If ``activations`` is neither a floating tensor nor `Activations`.
            ValueError: If ``activations`` is too few, has a wrong shape, is not finite or constant; if ``rectified``
                contradicts it; or an option is unknown.

        Example:
            >>> head = Head(torch.eye(3))
            >>> h = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
            >>> Marginal.fit(head, h, components=4)
            Marginal(PrincipalMixture(4 components in 3 of 3 dimensions, 53 floats), standard_error=...)
        """
        if kind not in get_args(MarginalKind):
            raise ValueError(f"kind must be 'mixture', 'class', 'flow' or 'bank'; got {kind!r}")
        source = _ActivationSource(activations, head, min_rows=2, group=group)
        source.rectified = _rectified(head, source, rectified, kind)
        if positive is None:
            positive = not source.rectified and source.minimum >= 0 and source.zeros <= _FEW_ZEROS

        def some() -> Tensor:
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
            rows = source.stored if group is None else some()
            law = NormalizingFlow.fit(rows, rectified=source.rectified, seed=seed)
        else:
            law = Bank(some(), rectified=source.rectified, validate_args=False)
        return cls(head, law, seed=seed)

    @property
    def head(self) -> Head:
        """The head that labels the draws: W of the one that it was fitted with, and the bias of that time."""
        return self._heads[0]

    @property
    def distribution(self) -> Any:
        """The law p of unlabelled activations."""
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
            source="any law of activations is the marginal of an exact pair",
            mgf_standard_error=float(self.standard_error.max()),
            has_density=density,
        )

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.head.in_features

    @property
    def num_parameters(self) -> int:
        """How many floats the law takes."""
        count = getattr(self.distribution, "num_parameters", None)
        return sum(t.numel() for t in self.law.state_dict().values()) if count is None else int(count)

    def log_mgf(self, weight: Tensor) -> Tensor:
        """Log M(w_y) = log E_p[softmax_y] − b_y for centered rows of the head (*B, d), (*B,).

        Its gradient is the mean E[h|y], estimated from the draws that the prior was estimated from; there is no second
        derivative.

        Raises:
            ValueError: If a row is not the head's.
        """
        y = self._classes(weight)
        value = (self.log_prior[y] - self.head.full_bias.to(self.log_prior)[y]).to(weight.dtype)
        if weight.requires_grad and torch.is_grad_enabled():
            classes, index = y.unique(return_inverse=True)
            mean = class_means(self.head, self._reference(), classes)[index].to(weight.dtype)
            value = value + ((weight - weight.detach()) * mean).sum(-1)
        return value

    def log_prob(self, h: Tensor) -> Tensor:
        """Log m(h) = log p(h) − logsumexp of the centered logits, at h (*S, d): (*S,).

        A law of positive activations is read next to zero where a coordinate is exactly zero.

        Raises:
            ValueError: If the law has no density.
        """
        self._check_features(h, "h")
        self._check_current()
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        return self.law.log_prob(h) - self.head.centered_logits(h).logsumexp(-1)

    def draw(self, weight: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """One activation of the class of ``weight[i]`` for each i of ``index`` (N,): (N, d)."""
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
            h = accept(self.head, self._draws(generator), classes, counts, prior, generator)
        grouped = torch.empty_like(h)
        grouped[inverse.argsort(stable=True)] = h
        return grouped.to(torch.promote_types(weight.dtype, torch.float32))

    def implies(self, head: Head) -> bool:
        """Whether the pair of ``head`` and this base has p itself for its marginal: its bias is that of this head."""
        shift = head.full_bias - self.head.full_bias
        return bool((shift == shift[0]).all())

    def draws_for(self, y: Tensor) -> float:
        """About how many activations have to be drawn for one of each of the classes ``y`` (N,)."""
        if isinstance(self.distribution, Bank):
            return float(len(y))
        return float((y.bincount(minlength=self.head.num_classes) / self.log_prior.exp()).max())

    def draw_joint(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Activations h ~ p (N, d) with classes y ~ softmax(h) (N,), whatever their classes: none is drawn in vain."""
        law, size = self._draws(generator), block_size(self.head)
        h = law(count)
        labels = [
            torch.multinomial(self.head.centered_logits(rows).softmax(-1), 1, generator=generator).squeeze(-1)
            for rows in h.split(size)
        ]
        return h, torch.cat(labels)

    def config(self) -> dict[str, Any]:
        """JSON facts that, with the buffers and the head, rebuild this base."""
        return {"law": self.law.describe(), "samples": self._samples, "seed": self._seed}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], head: Head) -> Marginal:
        """Rebuild a saved base of a pair with ``head``."""
        parts = {name.removeprefix("law."): tensor for name, tensor in tensors.items() if name.startswith("law.")}
        base = cls.__new__(cls)
        Base.__init__(base)
        _check_integer("samples", config["samples"], 2, 1 << 28)
        _check_integer("seed", config["seed"], -(1 << 63), (1 << 63) - 1)
        law = Law.rebuild(config["law"], parts)
        if tuple(law.sampler.event_shape) != (head.in_features,):
            raise ValueError(f"the law is of {tuple(law.sampler.event_shape)}, and the head of ({head.in_features},)")
        base._hold(head, tensors["bias"].to(head.weight), law, config["samples"], config["seed"])
        for name in ("log_prior", "standard_error"):
            value = tensors[name]
            if value.shape != (head.num_classes,) or not value.is_floating_point() or not bool(value.isfinite().all()):
                raise ValueError(
                    f"{name} is {value.dtype} of shape {tuple(value.shape)}; expected {head.num_classes} finite numbers"
                )
            base.register_buffer(name, value)
        if abs(float(in_double(base.log_prior).logsumexp(-1))) > 1e-3 or bool((base.standard_error < 0).any()):
            raise ValueError("log_prior is no normalised prior, or standard_error is negative")
        return base

    def extra_repr(self) -> str:
        """The law and how well the prior is known, for ``print``."""
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
        rows = self.head.weight  # which those of the pair's head may have been loaded into
        self.head.mean_row = mean_row_of(rows).to(rows.device, self.head.mean_row.dtype)
        self._settle()

    def _settle(self) -> None:
        """After a move or a load: the head has the bias of the buffers, and both are taken for current."""
        self.head.bias = self.bias.to(self.head.weight)
        self._index, self._head_version = None, None

    def _check_current(self) -> None:
        if torch.compiler.is_compiling():
            return
        if self._head_version is None:
            self._head_version = self.head.version
        elif self.head.version != self._head_version:
            raise RuntimeError(
                "the head's weights changed after this base was made, so that its prior and the classes of its draws "
                "no longer belong to them; fit a new base, or make it with head.clone() to keep the old weights"
            )

    def _draws(self, generator: torch.Generator | None) -> Callable[[int], Tensor]:
        return lambda count: self.law.sample(count, generator, self.head.weight.device)

    def _reference(self) -> Iterator[Tensor]:
        """The activations that the prior is estimated from, the same at each call: all of a bank."""
        law, size = self.distribution, block_size(self.head)
        if isinstance(law, Bank):
            yield from (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in law.rows.split(size))
            return
        draw = self._draws(torch.Generator(self.head.weight.device).manual_seed(self._seed))
        for start in range(0, self._samples, size):
            yield draw(min(size, self._samples - start))

    def _checked(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        for h in blocks:
            if h.dim() != 2 or h.shape[1] != self.in_features or not bool(h.isfinite().all()):
                what = "hold NaN or infinity" if h.shape[1:] == (self.in_features,) else f"have shape {tuple(h.shape)}"
                raise ValueError(f"draws of {self.distribution} {what}; expected finite (n, {self.in_features})")
            yield h

    @torch.no_grad()
    def _estimate(self) -> tuple[Tensor, Tensor]:
        prior, error = expected_posterior(self.head, self._checked(self._reference()))
        if isinstance(self.distribution, Bank):
            error = torch.zeros_like(error)
        if not bool((prior > 0).all()):
            y = int((prior <= 0).nonzero()[0])
            raise ValueError(
                f"class {y} has probability 0 for all draws of {self.distribution}, so that it has no law under this "
                "base; fit to activations among which the class occurs"
            )
        return prior, error

    def _classes(self, weight: Tensor) -> Tensor:
        """The classes of rows (*B, d), (*B,)."""
        self._check_features(weight, "weight")
        self._check_current()
        if self._index is None or not self._index.current(self.head):
            self._index = RowIndex(self.head)
        y = self._index.classes(weight)
        if not traced(weight) and bool((y < 0).any()):
            raise ValueError(
                f"{int((y < 0).sum())} of {y.numel()} rows are not rows of the head that this base was made with, and "
                "a marginal has a law for these alone: tilt by head.centered_weight(y), and fit the base anew for "
                "another head or temperature"
            )
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_head_version": None}  # a copy counts the changes of its tensors anew


def _dims(components: int) -> int:
    """As many principal components, up to 64, as keep that many covariances and means within the floats."""
    return max([24, *(m for m in range(25, 65) if components * (1 + m + m * (m + 1) // 2) <= _FLOATS)])


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}; got {value!r}")


def _rectified(head: Head, source: _ActivationSource, asked: bool | None, kind: str) -> bool:
    """Whether stored activations are pre-activations, see `Marginal.fit`."""
    relu = head.certificate is not None and head.certificate.rectified
    if source.declared and asked is False:
        raise ValueError("these Activations are pre-activations (pre_activation=True): leave rectified=False out")
    if asked and source.minimum >= 0:
        raise ValueError(
            f"rectified=True fits pre-activations, but of these activations none is negative (least "
            f"{source.minimum:.3g}): they are rectified already. Extract what comes before: "
            "penult.extract(tap, loader, pre_activation=True)"
        )
    if asked is None and relu and source.minimum >= 0 and kind != "bank":
        warnings.warn(
            "a ReLU stands right before this head, and these activations come after it: a law fitted to them has no "
            "exact zeros, and is easily told from them. Extract penult.extract(tap, loader, pre_activation=True) and "
            "fit to that, or pass rectified=False to have it so",
            UserWarning,
            stacklevel=3,
        )
    return source.rectified if asked is None else asked
