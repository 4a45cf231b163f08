"""Laws of distributions that are told from draws, and from differences."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, MultivariateNormal, biject_to, constraints, kl_divergence, transform_to

from penult.bases import Base
from penult.distributions import Tilt
from penult.testing._laws import Law, fact, score

__all__ = ["Subject", "estimates", "takes_generator"]

_LEBESGUE = "Lebesgue measure"  # what other densities refer to is for check_base
_DIMS = 8  # in which a normal density next to a law is told from it by draws
_STEP = 1e-6  # of differences, in float64
_PATHS = 4000  # draws whose gradients are looked at


def estimates(subject: Subject, x: Tensor, gradients: bool) -> Iterator[Law]:
    """Moments, entropy, normalisation, divergences and gradients."""
    yield from _moments(subject, x)
    if subject.dense:
        yield from _entropy(subject, x)
        yield from _normalisation(subject, x)
        yield from _divergence(subject, x)
    if gradients and subject.device.type != "mps" and subject.free():
        if subject.dense and subject.continuous:
            yield from _log_prob_gradients(subject, x)
        if subject.law.has_rsample:
            yield from _paths(subject)


def _moments(subject: Subject, x: Tensor) -> Iterator[Law]:
    wide = x.double()
    mean = _moment(subject.law, "mean")
    if mean is None:
        return
    yield score("sample mean equals mean", wide - mean)
    variance = _moment(subject.law, "variance")
    if variance is not None:
        yield score("sample variance equals variance", (wide - mean).square() - variance)


def _moment(law: Any, name: str) -> Tensor | None:
    """In float64, if the law has it and it is finite."""
    try:
        value: Tensor = getattr(law, name).double()
    except (NotImplementedError, AttributeError):
        return None
    return value if bool(value.isfinite().all()) else None


def _entropy(subject: Subject, x: Tensor) -> Iterator[Law]:
    try:
        entropy = subject.law.entropy().double()
    except NotImplementedError:
        return
    yield score("entropy is the mean of -log_prob", -subject.law.log_prob(x).double() - entropy)


def _normalisation(subject: Subject, x: Tensor) -> Iterator[Law]:
    """E_p[q / p] = 1 for a density q that is narrower than p, so that the ratio has a variance."""
    law: Any = subject.law
    dims = law.event_shape.numel()
    known = not isinstance(law, Tilt) or not isinstance(law.base, Base) or law.base.info.reference == _LEBESGUE
    if not subject.continuous or dims > _DIMS or not known:
        return
    try:
        free = biject_to(law.support)
        z = free.inv(x.double())
        stretch = free.log_abs_det_jacobian(z, x.double())
    except (NotImplementedError, RuntimeError):
        return
    flat = z.reshape(*x.shape[: 1 + len(law.batch_shape)], -1)
    if not bool(flat.isfinite().all()):
        return
    middle = flat.median(0).values
    spread = (flat - middle).abs().median(0).values.clamp_min(1e-12)  # of the bulk, whatever the tails
    scale = torch.diag_embed(0.7 * spread)
    q = MultivariateNormal(middle, scale_tril=scale, validate_args=False).log_prob(flat)
    extra = stretch.dim() - (1 + len(law.batch_shape))
    stretch = stretch.sum(tuple(range(-extra, 0))) if extra > 0 else stretch
    ratio = (q - stretch - law.log_prob(x).double()).exp()
    if float((ratio.std(0) / ratio.mean(0)).max()) < 0.02 * math.sqrt(len(x)):
        yield score("the density integrates to one", ratio - 1)


def _divergence(subject: Subject, x: Tensor) -> Iterator[Law]:
    law: Any = subject.law
    try:
        own = kl_divergence(law, law).double()
    except NotImplementedError:
        return
    scale = float(law.log_prob(x[:100]).abs().max())
    bar = 1e-5 * max(1.0, scale)
    yield Law(
        "the divergence to itself is zero", float(own.abs().max()), f"<= {bar:.1g}", float(own.abs().max()) <= bar
    )
    if not subject.free():
        return
    here, other = subject.moved(0.0), subject.moved(0.3)
    value = x.double() if x.is_floating_point() else x
    for p, q, name in ((here, other, "to"), (other, here, "from")):
        divergence = kl_divergence(p, q).double()
        yield fact(f"the divergence {name} another law is not negative", bool((divergence >= -1e-9).all()))
        drawn = value if p is here else subject.draw((len(x),), other)
        difference = (p.log_prob(drawn) - q.log_prob(drawn)).double()
        yield score(f"the divergence {name} another law is the mean of log p - log q", difference - divergence)


def _log_prob_gradients(subject: Subject, x: Tensor) -> Iterator[Law]:
    """Against central differences, along one direction of all free parameters at once, and one of the value."""
    value = x[:50].double()
    step = torch.zeros((), dtype=torch.float64, device=x.device, requires_grad=True)
    found = _derivative(subject.moved(step).log_prob(value).sum(), step)
    with torch.no_grad():
        above, below = (subject.moved(s).log_prob(value).sum() for s in (_STEP, -_STEP))
    yield _slope("the gradient of log_prob in the parameters is that of differences", found, above, below)
    law = subject.moved(0.0)
    try:
        move = transform_to(law.support)
        start = move.inv(value)
    except NotImplementedError:
        return
    along = subject.normal(start.shape, seed=3)
    if not torch.allclose(move(start), value, rtol=1e-6, atol=1e-9):
        return
    found = _derivative(law.log_prob(move(start + step * along)).sum(), step)
    above, below = (law.log_prob(move(start + s * along)).sum() for s in (_STEP, -_STEP))
    yield _slope("the gradient of log_prob in the value is that of differences", found, above.detach(), below.detach())


def _derivative(value: Tensor, at: Tensor) -> Tensor | None:
    """None where the value does not depend on it, as far as autograd knows."""
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, at, retain_graph=True, allow_unused=True)[0]


def _slope(name: str, found: Tensor | None, above: Tensor, below: Tensor) -> Law:
    expected = float(above - below) / (2 * _STEP)
    rounding = 1e-15 * max(abs(float(above)), 1.0) / _STEP
    off = math.inf if found is None else abs(float(found) - expected)
    bar = 1e-4 * max(1.0, abs(expected)) + 10 * rounding
    return Law(name, off, f"<= {bar:.1g}", off <= bar)


def _paths(subject: Subject) -> Iterator[Law]:
    """Each of many draws has its own copy of the parameters, so that the gradient of each is known."""
    law = subject.law
    paths = max(200, min(_PATHS, 4_000_000 // max(1, (law.batch_shape + law.event_shape).numel())))
    steps = torch.zeros(paths, dtype=torch.float64, device=subject.device, requires_grad=True)
    x = subject.draw((), subject.moved(steps), path=True)
    weights = subject.normal(law.batch_shape + law.event_shape, seed=4)
    for name, power in (("the mean", 1), ("the second moment", 2)):
        expected = _moment_slope(subject, weights, power)
        if expected is None:
            continue
        found = _derivative((x.pow(power) * weights).sum(), steps)
        if found is None:
            yield Law(f"rsample gradients are those of {name}", math.inf, "there are none", False)
            continue
        yield fact(f"rsample gradients of {name} are finite", bool(found.isfinite().all()))
        yield score(f"rsample gradients are those of {name}", (found - expected).unsqueeze(-1))


def _moment_slope(subject: Subject, weights: Tensor, power: int) -> float | None:
    """By differences: what a law says of its moments need not have a gradient."""
    values = []
    for step in (1e-4, -1e-4):
        law = subject.moved(step)
        mean, variance = _moment(law, "mean"), _moment(law, "variance")
        if mean is None or (power == 2 and variance is None):
            return None
        moment = mean if power == 1 or variance is None else mean.square() + variance
        values.append(float((moment * weights).sum()))
    return (values[0] - values[1]) / 2e-4


# --- What a check needs of any distribution: seeded draws, and the same law of other parameters -------------


def takes_generator(distribution: Distribution) -> bool:
    """Whether it draws from a generator, as penult's do; torch's own know the global random state alone."""
    return "generator" in inspect.signature(distribution.sample).parameters


class Subject:
    """A distribution under a check.

    Args:
        distribution: The distribution.
        seed: Seed of its draws.
    """

    def __init__(self, distribution: Distribution, seed: int) -> None:
        self.law, self._seed = distribution, seed
        # Before anything is asked of it: torch's keep what they compute among their attributes.
        given = [name for name in distribution.arg_constraints if isinstance(vars(distribution).get(name), Tensor)]
        self.device = next((vars(distribution)[name].device for name in given), torch.device("cpu"))
        self._arguments, self.parameters = self._recipe(given)
        self.continuous = not bool(getattr(distribution.support, "is_discrete", False))
        self.dense = bool(getattr(distribution, "has_density", True))

    def draw(self, shape: tuple[int, ...], law: Any = None, *, path: bool = False, seed: int | None = None) -> Tensor:
        """Draws of this law, or of another, always from the same seed; by ``rsample`` on a ``path`` of gradients."""
        law, seed = self.law if law is None else law, self._seed if seed is None else seed
        method = law.rsample if path else law.sample
        if takes_generator(law):
            drawn: Tensor = method(Size(shape), generator=torch.Generator(self.device).manual_seed(seed))
            return drawn
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            drawn = method(Size(shape))
        return drawn

    def normal(self, shape: Size, seed: int = 1) -> Tensor:
        """Standard normal numbers in float64, which are the check's own."""
        generator = torch.Generator().manual_seed(self._seed + seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device)

    def rebuilt(self, parameters: Mapping[str, Tensor], validate_args: bool = False) -> Any:
        """The law of its class with other parameters, the rest of its arguments as they are."""
        dtype = next((value.dtype for value in parameters.values() if value.is_floating_point()), None)
        rest = {  # tensors that are no parameters, in the dtype of those that are
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value
            for name, value in self._arguments.items()
        }
        kind: Any = type(self.law)
        return kind(**{**rest, **parameters}, validate_args=validate_args)

    def free(self) -> dict[str, tuple[Any, Tensor]]:
        """Parameters that can move: by name, the map from free numbers to them, and those that give what it has.

        In float64. Left out are those at an end of their range, such as a concentration of 0.
        """
        found: dict[str, tuple[Any, Tensor]] = {}
        for name, value in self.parameters.items():
            constraint = self.law.arg_constraints[name]
            if constraints.is_dependent(constraint) or constraint.is_discrete or not value.is_floating_point():
                continue
            try:
                move = transform_to(constraint)
                start = move.inv(value.detach().double())
                kept = torch.allclose(move(start), value.double(), rtol=1e-4, atol=1e-6)
            except (NotImplementedError, RuntimeError):
                continue
            if kept and bool(start.isfinite().all()):
                found[name] = move, start
        return found

    def moved(self, step: float | Tensor) -> Any:
        """The law, its free parameters moved along one random direction; where the step has a batch (N,), so has it."""
        free = self.free()
        along = {name: self.normal(start.shape, seed=7 + i) for i, (name, (_, start)) in enumerate(free.items())}

        def at(name: str) -> Tensor:
            move, start = free[name]
            pace = torch.as_tensor(step, dtype=torch.float64, device=start.device)
            value: Tensor = move(start + pace.reshape(pace.shape + (1,) * start.dim()) * along[name])
            return value

        rest = {name: value.detach().double() for name, value in self.parameters.items() if value.is_floating_point()}
        return self.rebuilt({**rest, **{name: at(name) for name in free}})

    def _recipe(self, given: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Arguments that make this law again, and those among them that are parameters; none where that fails."""
        accepted = [
            n for n in inspect.signature(type(self.law).__init__).parameters if n not in ("self", "validate_args")
        ]
        options = {
            n: getattr(self.law, n) for n in accepted if n not in self.law.arg_constraints and hasattr(self.law, n)
        }
        names = [name for name in given if name in accepted]
        for count in range(len(names), -1, -1):  # of equivalent ones, such as probs and logits, there may be several
            for some in itertools.combinations(names, count):
                parameters = {name: vars(self.law)[name] for name in some}
                try:
                    again = type(self.law)(**options, **parameters, validate_args=False)
                except (TypeError, ValueError, RuntimeError):
                    continue
                if again.batch_shape == self.law.batch_shape and again.event_shape == self.law.event_shape:
                    return {**options, **parameters}, parameters
        return {}, {}
