"""The generative-discriminative pair: a head, a base measure, and the exact law of activations they define."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Size, Tensor, nn
from torch.distributions import Categorical

from penult import io
from penult._row_blocks import version_of
from penult.activations import Activations, _ActivationSource
from penult.bases import Base, Gaussian, Marginal, Sphere
from penult.distributions import Tilt
from penult.head import Head
from penult.special import in_full, outside_transforms, working_dtype

__all__ = ["GenerativePair", "load"]

_TABLE = "_table_"  # before the name of what is derived, as torch.compile reads it: an attribute each, not one dict
_KEPT = 1 << 26  # log posteriors that estimate_prior keeps; beyond, each update computes them again


@final
class GenerativePair(nn.Module):
    r"""A softmax head read as the Bayes posterior of a generative model of its activations.

    With a base measure m and the centered rows w_y of the head,

    .. math:: p(h|y) &= \frac{e^{w_y \cdot h}\, m(h)}{M(w_y)}, &
              p(y) &= \frac{e^{b_y} M(w_y)}{Z}, \\
              p(h) &= \frac{m(h)}{Z} \sum_y e^{w_y \cdot h + b_y}, &
              M(w) &= \int e^{w \cdot h} m(dh),

    so that p(y|h) is exactly softmax(W h + b), whatever the base. Exactness is a theorem and says nothing of
    how closely the activations of a network follow the base: that has to be measured.

    Laws are computed in the precision of the activations, float32 at least, whatever torch.autocast says: its eight
    bits would leave a log density none after the point. They compile as whole graphs and map
    (``torch.compile(fullgraph=True)``, ``torch.func``); what follows from head and base alone is computed while a graph
    is captured, and is no part of it.

    References:
        Seo, Lee and Kwak, "On The Distribution of Penultimate Activations of Classification Networks", UAI 2021.

    Args:
        head: The head. Its weights are held by reference; when they change under the pair, the pair says so by a
            RuntimeError (edits through ``.data`` cannot be seen, nor any change by code that ``torch.compile`` made).
        base: The base measure; ``Sphere.from_head(head)``, which needs no data, when left out.

    Raises:
        TypeError: If ``head`` is not a :class:`Head` or ``base`` not a :class:`penult.bases.Base`.
        ValueError: If the base is for activations of another dimension, or M is infinite at a row.

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
                f"head must be a penult.Head, got {type(head).__name__}; "
                "make one with penult.find_head(model, inputs) or penult.Head(weight, bias)"
            )
        if base is not None and not isinstance(base, Base):
            raise TypeError(f"base must be a penult.bases.Base, got {type(base).__name__}")
        self.head = head
        self.base = Sphere.from_head(head) if base is None else base
        d = self.base.in_features
        if d is not None and d != head.in_features:
            raise ValueError(
                f"the base is for activations of dimension {d}, but the head takes {head.in_features}; "
                "fit or build the base with this head"
            )
        self._remember()

    # --- laws -----------------------------------------------------------------------------------------------

    @property
    def prior(self) -> Categorical:
        """p(y), which W, b and the base imply, a Categorical over K classes."""
        return Categorical(logits=self._log_evidence().to(self._dtype), validate_args=False)

    def given(self, y: Tensor | int) -> Tilt:
        """The law p(h|y) of the activations of classes.

        Args:
            y: Labels, any shape (*B,).

        Returns:
            Torch distribution of batch shape (*B,) and event shape (d,).

        Raises:
            ValueError: If a label is not an integer in 0..K−1.
        """
        self._check_current()
        return self.base.tilt(self.head.centered_weight(self._labels(y)))

    def posterior(self, h: Tensor) -> Categorical:
        """p(y|h) by Bayes' rule, equal to softmax(head(h)): Categorical of batch shape (*S,) for h (*S, d)."""
        with in_full(h.device):
            return Categorical(logits=self.head.centered_logits(self.read(h)), validate_args=False)

    def log_joint(self, h: Tensor) -> Tensor:
        """Log p(y) + log p(h|y) for every class, (*S, d) → (*S, K)."""
        logits, log_density = self._terms(h)
        return (logits + log_density.unsqueeze(-1)).to(h.dtype)

    def log_prob(self, h: Tensor) -> Tensor:
        """Marginal log density log p(h) = log m(h) + logsumexp(logits) − log Z, (*S, d) → (*S,).

        Relative to ``base.info.reference``; no (S, K, d) tensor is formed.
        """
        logits, log_density = self._terms(h)
        return (logits.logsumexp(-1) + log_density).to(h.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Joint draws: y from the prior, then h from p(h|y); of a :class:`Marginal` h ~ p(h), then y from softmax(h).

        Args:
            sample_shape: Shape (*S,) of the draws.
            generator: Source of randomness, or None for torch's default.

        Returns:
            Activations (*S, d) and labels (*S,).
        """
        shape = Size(sample_shape)
        weights = self._log_evidence().softmax(-1)
        count = shape.numel()
        with in_full(weights.device):
            if count and isinstance(self.base, Marginal) and self.base.implies(self.head):
                h, y = self.base.draw_joint(count, generator)  # either order is the same law, and here no draw is lost
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
        """The same p(h|y) under another class prior: b_y + log p_y − log p(y), for label shift.

        Args:
            prior: Positive class weights (K,), normalised here, or a Categorical.

        Returns:
            A new pair that shares W and the base.

        Raises:
            ValueError: If the weights have a wrong shape or are not positive and finite.

        Example:
            >>> pair = GenerativePair(Head(torch.eye(3)), Sphere(2.0)).with_prior(torch.tensor([0.6, 0.3, 0.1]))
            >>> pair.prior.probs
            tensor([0.6000, 0.3000, 0.1000])
        """
        p = prior.probs if isinstance(prior, Categorical) else torch.as_tensor(prior)
        k = self.head.num_classes
        if p.shape != (k,) or not bool(((p > 0) & p.isfinite()).all()):
            raise ValueError(
                f"prior must hold {k} positive, finite class weights ({k},); got shape {tuple(p.shape)}"
                + (f" with values from {float(p.min()):.4g} to {float(p.max()):.4g}" if p.numel() else "")
                + "; a class that cannot occur belongs out of the head"
            )
        evidence = self._log_evidence()
        shift = p.to(evidence).log() - p.to(evidence).sum().log() - evidence.log_softmax(-1)
        bias = self.head.full_bias.to(evidence) + shift
        return GenerativePair(self.head.with_bias(bias.to(self.head.weight.dtype)), self.base)

    @torch.no_grad()
    def estimate_prior(
        self, activations: Tensor | Activations, iterations: int = 1000, tolerance: float = 1e-7
    ) -> Categorical:
        r"""The class prior q under which unlabelled activations of another class balance are most likely.

        Label shift: p(h|y) is that of this pair, the balance of classes is not. The likelihood of Σ_y q_y p(h|y) is
        maximised by expectation maximisation, for which posteriors are enough:

        .. math:: q_y \leftarrow \frac{1}{N} \sum_i \frac{q_y\, p(y|h_i) / p(y)}{\sum_k q_k\, p(k|h_i) / p(k)} .

        It is as good as the pair's p(h|y) are, so calibrate the head first (:meth:`Head.calibrate`), and fit a
        :class:`Marginal` to activations of the old balance: its prior is their mean posterior, whereas a sphere
        implies one that they need not follow.

        References:
            Saerens, Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities",
            Neural Computation 2002. Alexandari, Kundaje and Shrikumar, "Maximum Likelihood with Bias-Corrected
            Calibration is Hard-To-Beat at Label Shift Adaptation", ICML 2020.

        Args:
            activations: Activations (N, d), N ≥ 2, as a tensor or as `Activations`, which may be larger than memory.
            iterations: Updates, at most.
            tolerance: Largest change of a probability below which the updates end.

        Returns:
            The prior, for :meth:`with_prior`. No probability is below 1e-10.

        Raises:
            TypeError: If ``activations`` is neither a floating tensor nor `Activations`.
            ValueError: If ``activations`` is too few, has a wrong shape or is not finite.

        Example:
            >>> pair = GenerativePair(Head(4 * torch.eye(3)), Sphere(2.0))
            >>> g = torch.Generator().manual_seed(0)
            >>> h = pair.given(torch.tensor([0] * 80 + [1] * 15 + [2] * 5)).sample((20,), generator=g).reshape(-1, 3)
            >>> pair.estimate_prior(h).probs
            tensor([0.8003, 0.1494, 0.0503])
        """
        source = _ActivationSource(activations, self.head, min_rows=2)
        old = self._log_evidence().log_softmax(-1)

        def posteriors() -> Iterator[Tensor]:
            for rows in source:
                yield self.posterior(rows.to(self._dtype)).logits.to(old) - old

        small = len(source) * self.head.num_classes <= _KEPT
        kept = list(posteriors()) if small else None
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
        """Write head and base to one safetensors file; :func:`penult.load` reads it without the model.

        The file appears under its name only when it is whole.
        """
        tensors, metadata = to_parts(self)
        return io.write(path, tensors, "pair", metadata)

    # --- inside ---------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.head.weight.dtype, torch.float32)

    def _remember(self) -> None:
        self._head_version: tuple[int, ...] | None = self.head.version
        self._forget()

    def _forget(self) -> None:
        self._derived: dict[str, tuple[list[tuple[Tensor, int]], Tensor]] = {}
        for name in [name for name in self.__dict__ if name.startswith(_TABLE)]:
            delattr(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._head_version = None  # a copy counts the changes of its tensors anew
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> GenerativePair:
        self._check_current()
        own = self.base.head if isinstance(self.base, Marginal) else None
        shared = own is not None and own.weight.data_ptr() == self.head.weight.data_ptr()
        super()._apply(fn, recurse)
        if own is not None and shared:
            own.weight = self.head.weight  # moved apart by now, but W shall take memory once
        self._remember()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._head_version = None  # children load after this; the first use remembers what they hold
        self._forget()

    def _check_current(self) -> None:
        if torch.compiler.is_compiling():
            return
        if self._head_version is None:
            self._remember()
        elif self.head.version != self._head_version:
            raise RuntimeError(
                "the head's weights changed after this pair was made, so its prior and densities no longer "
                "belong to them; make a new GenerativePair (and fit a base that was fitted), or build it on "
                "head.clone() to keep the old weights"
            )

    def _labels(self, y: Tensor | int) -> Tensor:
        y = torch.as_tensor(y, device=self.head.weight.device)
        k = self.head.num_classes
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"labels must be integers, got {y.dtype}")
        if not torch.compiler.is_compiling() and y.numel() and not bool(((y >= 0) & (y < k)).all()):
            bad = y[(y < 0) | (y >= k)].flatten()[0]
            raise ValueError(f"label {int(bad)} is out of range: the head has {k} classes, 0..{k - 1}")
        return y

    def derived(self, name: str, make: Callable[[GenerativePair], Tensor]) -> Tensor:
        """A tensor that follows from head and base: made once, and again only after a tensor of them changed.

        Where torch.compile traces, it is made at once, from the tensors themselves, and is an input of the graph; a
        graph follows it when code that is not compiled makes it anew.

        Args:
            name: What it is called among those of this pair.
            make: Makes it of this pair; a function of a module or a class, so that torch.compile can call it.

        Raises:
            RuntimeError: The head's weights changed after the pair was made.
        """
        self._check_current()
        if torch.compiler.is_compiling():
            self._keep(name, make)
            table: Tensor = getattr(self, _TABLE + name.replace(" ", "_"))
            return table
        return self._kept(name, make)

    def _kept(self, name: str, make: Callable[[GenerativePair], Tensor]) -> Tensor:
        kept, buffers = self._derived.get(name), list(self.base.buffers())
        if any(torch._C._functorch.is_functorch_wrapped_tensor(b) for b in (*buffers, *self.head.buffers())):
            return make(self)  # of tensors that a transform replaced, and so not to be kept
        versions = [version_of(b) for b in buffers]
        if kept is None or not _same(kept[0], buffers, versions):
            with torch.no_grad(), in_full(self.head.weight.device), outside_transforms():
                table = make(self)
            # The tensors themselves are kept: another one may have the id of one that is gone.
            kept = self._derived[name] = list(zip(buffers, versions, strict=True)), table
            setattr(self, _TABLE + name.replace(" ", "_"), table)
        return kept[1]

    def _keep(self, name: str, make: Callable[[GenerativePair], Tensor]) -> None:
        """Make a table if it is not kept yet; torch.compile runs this while it traces, and reads the table after it."""
        self._kept(name, make)

    _keep._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's own way imports all of it

    def _log_evidence(self) -> Tensor:
        """b_y + log M(w_y), (K,) in working precision."""
        return self.derived("log evidence", GenerativePair._make_log_evidence)

    def _make_log_evidence(self) -> Tensor:
        work = working_dtype(self.head.weight.device)
        parts = [self.base.log_mgf(rows.to(work)) for _, rows in self.head.centered_blocks()]
        evidence = self.head.full_bias.to(work) + torch.cat(parts)
        if not bool(evidence.isfinite().all()):
            y = int((~evidence.isfinite()).nonzero()[0])
            raise ValueError(
                f"log M of class {y} is {float(evidence[y])}: the base gives this head's rows no finite mass; "
                "check the radius or scale of the base against the norm of W"
            )
        return evidence

    def _terms(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """w_y·h + b_y (*S, K) and log m(h) − log Z (*S,), whose sum is the log joint density.

        Kept apart, since log m(h) can be in the thousands and would cost the logits their digits.
        """
        log_z = self._log_evidence().logsumexp(-1)
        with in_full(h.device):
            h = self.read(h)
            return self.head.centered_logits(h), self.base.log_prob(h) - log_z.to(h.dtype)

    def read(self, h: Tensor) -> Tensor:
        """H (*S, d) as the base reads it, in at least float32.

        Raises:
            ValueError: `h` is not floating, or of another dimension than the head's.
        """
        self._check_current()
        if h.dim() < 1 or h.shape[-1] != self.head.in_features or not h.is_floating_point():
            raise ValueError(
                f"h is {h.dtype} of shape {tuple(h.shape)}; "
                f"expected floating activations (..., {self.head.in_features})"
            )
        with in_full(h.device):
            return self.base.project(h.to(torch.promote_types(h.dtype, torch.float32)))


def _same(kept: list[tuple[Tensor, int]], buffers: list[Tensor], versions: list[int]) -> bool:
    """Whether these are the very tensors that were kept, and have not changed since; nobody knows in inference mode."""
    if len(kept) != len(buffers):
        return False
    pairs = zip(kept, buffers, versions, strict=True)
    return all(b is old and version == seen >= 0 for (old, seen), b, version in pairs)


def load(
    path: str | os.PathLike[str],
    *,
    bases: Sequence[type[Base]] = (),
    device: str | torch.device = "cpu",
) -> GenerativePair:
    """Read a pair that :meth:`GenerativePair.save` wrote. Neither the model nor any pickle is needed.

    Args:
        path: The file.
        bases: Your own base classes that the file may hold, beside penult's.
        device: Where to put the tensors.

    Returns:
        The pair.

    Raises:
        FileNotFoundError: If there is no such file.
        penult.io.FileFormatError: If the file is damaged, foreign, of a newer schema, or holds a base class
            that is neither penult's nor among ``bases``.

    Example:
        >>> import tempfile, pathlib
        >>> pair = GenerativePair(Head(torch.eye(3)), Sphere(2.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pair.save(pathlib.Path(folder) / "toy.penult.safetensors")
        ...     print(load(path).base)
        Sphere(radius=2)
    """
    file = io.read(path, kind="pair", device=device)
    return from_parts(path, file.tensors, file.metadata, bases)


def to_parts(pair: GenerativePair) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and JSON facts of a pair, for a file that holds it, or that holds more."""
    pair._check_current()
    tensors = {f"head.{name}": t for name, t in pair.head.state_dict().items()}
    tensors |= {f"base.{name}": t for name, t in pair.base.state_dict().items()}
    base = {"class": type(pair.base).__name__, "config": pair.base.config()}
    return tensors, {"head": pair.head.config(), "base": base}


def from_parts(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Any, bases: Sequence[type[Base]] = ()
) -> GenerativePair:
    """The pair of `to_parts`, read from a file; raises as :func:`load`."""
    own: tuple[type[Base], ...] = (Gaussian, Marginal, Sphere)
    known = {cls.__name__: cls for cls in (*own, *bases)}
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
        room, _, rest = key.partition(".")
        parts.setdefault(room, {})[rest] = tensor
    try:
        head = Head.from_config(head_config, parts["head"])
        base = known[name].from_config(config, parts["base"], head)
        return GenerativePair(head, base)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise io.FileFormatError(f"{path}: head and base cannot be rebuilt from the file: {error}") from error
