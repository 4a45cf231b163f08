"""The generative-discriminative pair: a head, a base measure, and the exact distribution of activations they define."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Categorical

from penult import io
from penult._checks import as_activations, as_size, described, integer_labels, usable_device
from penult._derived import DerivedTensors
from penult._row_blocks import readable
from penult.activations import Activations, _ActivationSource
from penult.bases import Base, Gaussian, Marginal, Sphere
from penult.distributions import Tilt
from penult.head import Head
from penult.special import in_full, in_range, outside_transforms, traced, working_dtype

__all__ = ["GenerativePair", "load"]

# Largest number of log posteriors that `estimate_prior` keeps; beyond it, every update computes them again.
_KEPT = 1 << 26
# Number of random activations whose posterior must survive the projection to the base.
_PROBES = 8


@final
class GenerativePair(DerivedTensors):
    r"""A softmax head read as the Bayes posterior of a generative model of its activations.

    With a base measure m and the centered rows w_y of the head,

    .. math:: p(h|y) &= \frac{e^{w_y \cdot h}\, m(h)}{M(w_y)}, &
              p(y) &= \frac{e^{b_y} M(w_y)}{Z}, \\
              p(h) &= \frac{m(h)}{Z} \sum_y e^{w_y \cdot h + b_y}, &
              M(w) &= \int e^{w \cdot h} m(dh),

    so that p(y|h) is exactly softmax(W h + b) for every base. This is a theorem about the pair; how closely the
    activations of a network follow the base has to be measured.

    Densities are computed in the precision of the activations, in float32 or wider even under autocast: bfloat16 has
    too few digits for log densities. They compile as whole graphs (``torch.compile(fullgraph=True)``) and work under
    ``torch.func``. Tensors derived from head and base are precomputed; they are inputs of the compiled graph.

    References:
        Seo, Lee and Kwak, "On The Distribution of Penultimate Activations of Classification Networks", UAI 2021.

    Args:
        head: The head. The pair refers to its weights and raises a RuntimeError once they changed. It looks at version
            counters, at up to 4096 values of each tensor, and at all values of a tensor that was replaced. Not seen
            are writes through ``.data`` or NumPy to other values only, any change while the pair runs compiled, and a
            model that was given other weights, unless it runs in a :class:`~penult.Tap` of this head.
        base: The base measure. Default: ``Sphere.from_head(head)``, which needs no data.

    Raises:
        TypeError: If ``head`` is not a :class:`Head` or ``base`` not a :class:`penult.bases.Base`.
        ValueError: If the base is for activations of another dimension, or ignores a part of activations that the head
            reads, or M is infinite at a row.

    Example:
        >>> head = Head(torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, -3.0]]))
        >>> pair = GenerativePair(head, Sphere(2.0))
        >>> g = torch.Generator().manual_seed(0)
        >>> h, y = pair.sample((1000,), generator=g)
        >>> h.shape, pair.given(y[:5]).log_prob(h[:5]).shape
        (torch.Size([1000, 2]), torch.Size([5]))
        >>> torch.allclose(pair.posterior(h).probs, head(h).softmax(-1), atol=1e-6)
        True
    """

    def __init__(self, head: Head, base: Base | None = None) -> None:
        super().__init__()
        if not isinstance(head, Head):
            raise TypeError(
                f"head is {described(head)}; expected a penult.Head. "
                "Make one with penult.find_head(model, inputs) or penult.Head(weight, bias)"
            )
        if base is not None and not isinstance(base, Base):
            raise TypeError(f"base is {described(base)}; expected a penult.bases.Base")
        self.head = head
        self.base = Sphere.from_head(head) if base is None else base
        d = self.base.in_features
        if d is not None and d != head.in_features:
            raise ValueError(
                f"base is for activations of dimension {d}, but the head takes {head.in_features}. "
                "Fit or build the base with this head"
            )
        self._check_projection()
        self._remember()

    # --- distributions --------------------------------------------------------------------------------------

    @property
    def prior(self) -> Categorical:
        """Class prior p(y) that head and base imply, a Categorical over K classes."""
        return Categorical(logits=self._log_evidence().to(self._dtype), validate_args=False)

    def given(self, y: Tensor | int) -> Tilt:
        """Return the distribution p(h|y) of the activations of classes.

        Args:
            y: Labels, any shape (*B,).

        Returns:
            Torch distribution of batch shape (*B,) and event shape (d,).

        Raises:
            TypeError: The labels are not integers.
            ValueError: A label is not in 0..K−1.
        """
        self._check_current()
        # The values are no constants of a compiled graph, so it does not check them.
        labels = integer_labels(y, None, self.head.num_classes, values=not traced(y))
        return self.base.tilt(self.head.centered_weight(labels.to(self.head.weight.device)))

    def posterior(self, h: Tensor) -> Categorical:
        """Return p(y|h), which equals softmax(head(h)): a Categorical of batch shape (*S,) for h (*S, d).

        For the ambient sphere of a LayerNorm head h is first moved to Σ h = 0, where all its activations lie.
        """
        h = as_activations(h, device=self.head.weight.device)
        with in_full(h.device):
            logits, dtype = self.head.centered_logits(self.read(h)), torch.promote_types(h.dtype, torch.float32)
            # Only differences of large logits fit into float32.
            logits = logits if logits.dtype == dtype else logits.log_softmax(-1).to(dtype)
            return Categorical(logits=logits, validate_args=False)

    def log_joint(self, h: Tensor) -> Tensor:
        """Return log p(y) + log p(h|y) for every class, (*S, d) → (*S, K)."""
        h = as_activations(h, device=self.head.weight.device)
        logits, log_density = self._terms(h)
        return (logits + log_density.unsqueeze(-1)).to(h.dtype)

    def log_prob(self, h: Tensor) -> Tensor:
        """Return the log density log p(h) = log m(h) + logsumexp(logits) − log Z, (*S, d) → (*S,).

        Relative to ``base.info.reference``; no (S, K, d) tensor is formed.
        """
        h = as_activations(h, device=self.head.weight.device)
        logits, log_density = self._terms(h)
        return (logits.logsumexp(-1) + log_density).to(h.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Sample activations and labels jointly: y from the prior, then h from p(h|y).

        With a :class:`Marginal` base, h is sampled from p(h) and then y from softmax(h).

        Args:
            sample_shape: Shape (*S,) of the samples.
            generator: Source of randomness. Default: the global one of torch.

        Returns:
            Activations (*S, d) and labels (*S,).
        """
        shape = as_size(sample_shape)
        weights = self._log_evidence().softmax(-1)
        count = shape.numel()
        with in_full(weights.device):
            if count and isinstance(self.base, Marginal) and self.base.implies(self.head):
                # Both orders give the same distribution, and this one rejects no samples.
                h, y = self.base.draw_joint(count, generator)
            else:
                y = (
                    torch.multinomial(weights, count, replacement=True, generator=generator)
                    if count
                    else torch.empty(0, dtype=torch.long, device=weights.device)
                )
                classes, index = y.unique(return_inverse=True)
                h = self.base.draw(self.head.centered_weight(classes), index, generator)
        return h.to(self.head.weight.dtype).reshape(*shape, self.head.in_features), y.reshape(shape)

    def with_prior(self, prior: Tensor | Categorical) -> GenerativePair:
        """Return a pair with the same p(h|y) and another class prior, for label shift.

        The bias of its head is b_y + log q_y − log p(y), with the new prior q.

        Args:
            prior: Positive class weights (K,), which need not sum to 1, or a Categorical.

        Returns:
            A new pair that shares W and the base.

        Raises:
            ValueError: The weights have a wrong shape or are not positive and finite.

        Example:
            >>> pair = GenerativePair(Head(torch.eye(3)), Sphere(2.0)).with_prior(torch.tensor([0.6, 0.3, 0.1]))
            >>> pair.prior.probs
            tensor([0.6000, 0.3000, 0.1000])
        """
        p = prior.probs if isinstance(prior, Categorical) else prior
        p = p if isinstance(p, Tensor) else torch.as_tensor(p, device="cpu")
        k = self.head.num_classes
        if p.shape != (k,) or not bool(((p > 0) & p.isfinite()).all()):
            values = f" with values from {float(p.min()):.4g} to {float(p.max()):.4g}" if p.numel() else ""
            raise ValueError(
                f"prior has shape {tuple(p.shape)}{values}; expected {k} positive, finite class weights ({k},). "
                "Leave a class that cannot occur out of the head"
            )
        evidence = self._log_evidence()
        shift = p.to(evidence).log() - p.to(evidence).sum().log() - evidence.log_softmax(-1)
        bias = self.head.full_bias.to(evidence) + shift
        return GenerativePair(self.head.with_bias(bias.to(self.head.weight.dtype)), self.base)

    @torch.no_grad()
    def estimate_prior(
        self, activations: Tensor | Activations, iterations: int = 1000, tolerance: float = 1e-7
    ) -> Categorical:
        r"""Estimate the class prior q of unlabelled activations with another class balance.

        Under label shift p(h|y) stays that of this pair and the class prior changes. Expectation maximisation finds
        the q of largest likelihood Σ_y q_y p(h|y); it needs the posteriors only:

        .. math:: q_y \leftarrow \frac{1}{N} \sum_i \frac{q_y\, p(y|h_i) / p(y)}{\sum_k q_k\, p(k|h_i) / p(k)} .

        The estimate relies on the pair's p(h|y), so calibrate the head first, with ``head.calibrate(logits, labels,
        biases=True)`` on held-out activations of the old class balance, and fit a :class:`Marginal` with this head: its
        prior is their mean posterior, whereas the prior that a sphere implies may differ from their class balance.

        References:
            Saerens, Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities",
            Neural Computation 2002. Alexandari, Kundaje and Shrikumar, "Maximum Likelihood with Bias-Corrected
            Calibration is Hard-To-Beat at Label Shift Adaptation", ICML 2020.

        Args:
            activations: Activations (N, d), N ≥ 2, as a tensor or as `Activations`, which may be larger than memory.
            iterations: Largest number of updates.
            tolerance: Updates end when no probability changes by as much.

        Returns:
            The prior, for :meth:`with_prior`. No probability is below 1e-10.

        Warns:
            UserWarning: The base was not fitted to activations, such as a sphere of the head alone.

        Raises:
            TypeError: ``activations`` is neither a floating tensor nor `Activations`.
            ValueError: ``activations`` has too few rows or a wrong shape, or is not finite.

        Example:
            >>> head, g = Head(4 * torch.eye(3)), torch.Generator().manual_seed(0)
            >>> pair = GenerativePair(head, Marginal.fit(head, 2 * torch.randn(600, 3, generator=g), kind="bank"))
            >>> h = pair.given(torch.tensor([0] * 80 + [1] * 15 + [2] * 5)).sample((20,), generator=g).reshape(-1, 3)
            >>> pair.estimate_prior(h).probs
            tensor([0.7988, 0.1485, 0.0527])
        """
        source = _ActivationSource(activations, self.head, min_rows=2)
        if not _knows_activations(self.base):
            warnings.warn(
                f"the base {self.base} was not fitted to activations, so that the old class prior is implied by the "
                "head alone, and the estimate may be far off even without a shift. Fit a base to activations of the "
                "old class balance, Marginal.fit(head, activations), with head = head.calibrate(logits, labels, "
                "biases=True)",
                UserWarning,
                stacklevel=3,
            )
        old = self._log_evidence().log_softmax(-1)

        def posteriors() -> Iterator[Tensor]:
            for rows in source:
                yield self.posterior(rows.to(self._dtype)).logits.to(old) - old

        fits_in_memory = len(source) * self.head.num_classes <= _KEPT
        kept = list(posteriors()) if fits_in_memory else None
        new = old
        for _ in range(iterations):
            parts = posteriors() if kept is None else kept
            update = torch.stack([(part + new).softmax(-1).sum(0) for part in parts]).sum(0) / len(source)
            update = update.clamp_min(1e-10)
            change = float((update - new.exp()).abs().max())
            new = update.log().log_softmax(-1)
            if change < tolerance:
                break
        return Categorical(logits=new.to(self._dtype), validate_args=False)

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write head and base to one safetensors file, which :func:`penult.load` reads without the model.

        The file is written under another name and renamed when it is complete.
        """
        tensors, metadata = to_parts(self)
        return io.write(path, tensors, "pair", metadata)

    # --- inside ---------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.head.weight.dtype, torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> GenerativePair:
        own = self.base.head if isinstance(self.base, Marginal) else None
        shared = own is not None and own.weight.data_ptr() == self.head.weight.data_ptr()
        super()._apply(fn, recurse)
        if own is not None and shared:
            # Pair and base have moved W separately; one copy of it is enough.
            own.weight = self.head.weight
        return self

    def _compute(self, make: Callable[[Any], Tensor]) -> Tensor:
        with in_full(self.head.weight.device), outside_transforms():
            return make(self)

    def _log_evidence(self) -> Tensor:
        """Return b_y + log M(w_y), (K,) in working precision."""
        return self.derived("log evidence", GenerativePair._make_log_evidence)

    def _make_log_evidence(self) -> Tensor:
        work = working_dtype(self.head.weight.device)
        parts = [self.base.log_mgf(rows.to(work)) for _, rows in self.head.centered_blocks()]
        evidence = self.head.full_bias.to(work) + torch.cat(parts)
        if not bool(evidence.isfinite().all()):
            y = int((~evidence.isfinite()).nonzero()[0])
            raise ValueError(
                f"log M of class {y} is {float(evidence[y])}; expected a finite number. "
                "Check the radius or scale of the base against the norm of W"
            )
        return evidence

    def _terms(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return w_y·h + b_y (*S, K) and log m(h) − log Z (*S,), whose sum is the log joint density."""
        # They are separate, since log m(h) can be in the thousands and adding it would round off digits of the logits.
        log_z = self._log_evidence().logsumexp(-1)
        h = self.read(h)
        with in_full(h.device):
            return self.head.centered_logits(h), self.base.log_prob(h) - log_z.to(h.dtype)

    def read(self, h: Tensor) -> Tensor:
        """Return h (*S, d) as the base reads it: in float32 or wider, and in float64 where float32 would overflow.

        Raises:
            TypeError: `h` is neither a floating-point tensor nor an array of floats.
            ValueError: Its last dimension is not that of the head.
        """
        self._check_current()
        h = as_activations(h, device=self.head.weight.device)
        if h.dim() < 1 or h.shape[-1] != self.head.in_features:
            raise ValueError(f"h has shape {tuple(h.shape)}; expected activations (..., {self.head.in_features})")
        with in_full(h.device):
            return self.base.project(in_range(h))

    @torch.no_grad()
    def _check_projection(self) -> None:
        """Raise unless projection to the base leaves the softmax of the head as it is, at random activations."""
        weight = self.head.weight
        if type(self.base).project is Base.project or not readable(weight):
            return
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(_PROBES, self.head.in_features, generator=generator, device="cpu").to(self.head.mean_row)
        # A LayerNorm gives activations whose sum is zero.
        h = h - h.mean(-1, keepdim=True) if self.head.norm == "layer" else h
        with in_full(h.device):
            full, projected = (self.head.centered_logits(rows) for rows in (h, self.base.project(h)))
        change, full = (logits - logits.mean(-1, keepdim=True) for logits in (projected - full, full))
        error = float(torch.linalg.vector_norm(change) / torch.linalg.vector_norm(full).clamp_min(1e-30))
        # Rows of half precision lie in the span of the rows that were rounded to them only up to that rounding.
        if error > max(1e-3, 8 * torch.finfo(weight.dtype).eps):
            raise ValueError(
                f"the base ignores a part of activations that this head reads: projection to its subspace changes "
                f"centered logits by {error:.2g} of their size, so that no posterior would be the softmax of the head. "
                "The subspace must contain the span of the centered rows: take head.span(), or make the base of this "
                "head with Sphere.from_head(head) or Sphere.fit(head, activations, ambient=False)"
            )


def _knows_activations(base: Base) -> bool:
    # Spheres of older files do not say whether they were fitted; several radii and a centre come from activations.
    shaped = isinstance(base, Sphere) and (base.radius.numel() > 1 or base.loc is not None)
    return shaped or base.info.needs_data or base.reference is not None


def load(
    path: str | os.PathLike[str],
    *,
    bases: Sequence[type[Base]] = (),
    device: str | torch.device = "cpu",
) -> GenerativePair:
    """Read a pair that :meth:`GenerativePair.save` wrote; it needs no model, and nothing is unpickled.

    Args:
        path: File.
        bases: Your own base classes that the file may contain, in addition to those of penult.
        device: Device of the tensors.

    Returns:
        The pair.

    Raises:
        FileNotFoundError: There is no such file.
        penult.io.FileFormatError: The file is damaged, of another program or of a newer schema, or its base class is
            neither one of penult's nor among ``bases``.
        TypeError, ValueError: `device` is no device, or cannot be used here.

    Example:
        >>> import tempfile, pathlib
        >>> pair = GenerativePair(Head(torch.eye(3)), Sphere(2.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pair.save(pathlib.Path(folder) / "toy.penult.safetensors")
        ...     print(load(path).base)
        Sphere(radius=2)
    """
    device = usable_device("device", device)
    file = io.read(path, kind="pair")
    # The pair is rebuilt on the CPU, so that an error of the device is not taken for a fault of the file.
    return from_parts(path, file.tensors, file.metadata, bases).to(device)


def to_parts(pair: GenerativePair) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors by name and JSON metadata of a pair, for a file that contains it."""
    pair._check_current()
    tensors = {f"head.{name}": t for name, t in pair.head.state_dict().items()}
    tensors |= {f"base.{name}": t for name, t in pair.base.state_dict().items()}
    base = {"class": type(pair.base).__name__, "config": pair.base.config()}
    if pair.base.reference is not None:
        base["reference"] = pair.base.reference
    return tensors, {"head": pair.head.config(), "base": base}


def from_parts(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Any, bases: Sequence[type[Base]] = ()
) -> GenerativePair:
    """Rebuild the pair of `to_parts` from the contents of a file; raises as :func:`load` does."""
    own_bases: tuple[type[Base], ...] = (Gaussian, Marginal, Sphere)
    known = {cls.__name__: cls for cls in (*own_bases, *bases)}
    name: Any
    try:
        description = metadata["base"]
        head_config, name, config = metadata["head"], description["class"], description["config"]
    except (KeyError, TypeError) as error:
        raise io.FileFormatError(f"{path}: the metadata of the pair lacks {error}; the file is damaged") from error
    if not isinstance(name, str) or name not in known:
        shown = name if isinstance(name, str) and name.isidentifier() else "..."
        raise io.FileFormatError(
            f"{path} holds the base {name!r}, which penult does not know; pass its class: load(path, bases=[{shown}])"
        )
    parts: dict[str, dict[str, Tensor]] = {"head": {}, "base": {}}
    for key, tensor in tensors.items():
        part, _, name_in_part = key.partition(".")
        # The tensors may be the file, mapped into memory: whoever writes to it would change the pair.
        parts.setdefault(part, {})[name_in_part] = tensor.clone()
    try:
        head = Head.from_config(head_config, parts["head"])
        base = known[name].from_config(config, parts["base"], head)
        # Older files have none.
        reference = description.get("reference")
        base.reference = reference if isinstance(reference, str) else None
        return GenerativePair(head, base)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise io.FileFormatError(f"{path}: head and base cannot be rebuilt from the file: {error}") from error
