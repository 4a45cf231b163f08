"""Laws of distributions that are tested by samples and by finite differences."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, MultivariateNormal, biject_to, constraints, kl_divergence, transform_to

from penult._checks import check_seed
from penult.bases import Base
from penult.distributions import Tilt
from penult.testing._laws import Law, fact, score

__all__ = ["Subject", "estimates", "takes_generator"]

# Densities with respect to other measures are tested by check_base.
_LEBESGUE = "Lebesgue measure"
# Largest dimension in which samples can show that a density integrates to one.
_DIMS = 8
# Step of finite differences, in float64.
_STEP = 1e-6
# Number of samples whose gradients are tested.
_PATHS = 4000


def estimates(subject: Subject, x: Tensor, gradients: bool) -> Iterator[Law]:
    """Test moments, entropy, normalisation, divergences and gradients."""
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
    """Return a moment in float64, if the distribution has it and it is finite."""
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
    """Test E_p[q / p] = 1 for a density q that is narrower than p, so that the ratio has a finite variance."""
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
    # The median, because tails may be heavy.
    spread = (flat - middle).abs().median(0).values.clamp_min(1e-12)
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
        samples = value if p is here else subject.draw((len(x),), other)
        difference = (p.log_prob(samples) - q.log_prob(samples)).double()
        yield score(f"the divergence {name} another law is the mean of log p - log q", difference - divergence)


def _log_prob_gradients(subject: Subject, x: Tensor) -> Iterator[Law]:
    """Test gradients by central differences, along one direction of all free parameters and one of the value."""
    value = x[:50].double()
    step = torch.zeros((), dtype=torch.float64, device=x.device, requires_grad=True)
    slope = _derivative(subject.moved(step).log_prob(value).sum(), step)
    with torch.no_grad():
        above, below = (subject.moved(s).log_prob(value).sum() for s in (_STEP, -_STEP))
    yield _slope("the gradient of log_prob in the parameters is that of differences", slope, above, below)
    law = subject.moved(0.0)
    try:
        move = transform_to(law.support)
        start = move.inv(value)
    except NotImplementedError:
        return
    along = subject.normal(start.shape, seed=3)
    if not torch.allclose(move(start), value, rtol=1e-6, atol=1e-9):
        return
    slope = _derivative(law.log_prob(move(start + step * along)).sum(), step)
    above, below = (law.log_prob(move(start + s * along)).sum() for s in (_STEP, -_STEP))
    yield _slope("the gradient of log_prob in the value is that of differences", slope, above.detach(), below.detach())


def _derivative(value: Tensor, at: Tensor) -> Tensor | None:
    """Return the derivative by autograd, or None if the value does not depend on `at`."""
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, at, retain_graph=True, allow_unused=True)[0]


def _slope(name: str, slope: Tensor | None, above: Tensor, below: Tensor) -> Law:
    """Test a derivative by the central difference of two values."""
    expected = float(above - below) / (2 * _STEP)
    rounding = 1e-15 * max(abs(float(above)), 1.0) / _STEP
    off = math.inf if slope is None else abs(float(slope) - expected)
    bar = 1e-4 * max(1.0, abs(expected)) + 10 * rounding
    return Law(name, off, f"<= {bar:.1g}", off <= bar)


def _paths(subject: Subject) -> Iterator[Law]:
    """Test the gradients of samples from rsample against the gradients of the moments.

    Each sample has its own copy of the parameters, so that its gradient is known.
    """
    law = subject.law
    paths = max(200, min(_PATHS, 4_000_000 // max(1, (law.batch_shape + law.event_shape).numel())))
    steps = torch.zeros(paths, dtype=torch.float64, device=subject.device, requires_grad=True)
    x = subject.draw((), subject.moved(steps), path=True)
    weights = subject.normal(law.batch_shape + law.event_shape, seed=4)
    for name, power in (("the mean", 1), ("the second moment", 2)):
        expected = _moment_slope(subject, weights, power)
        if expected is None:
            continue
        slopes = _derivative((x.pow(power) * weights).sum(), steps)
        if slopes is None:
            yield Law(f"rsample gradients are those of {name}", math.inf, "there are none", False)
            continue
        yield fact(f"rsample gradients of {name} are finite", bool(slopes.isfinite().all()))
        yield score(f"rsample gradients are those of {name}", (slopes - expected).unsqueeze(-1))


def _moment_slope(subject: Subject, weights: Tensor, power: int) -> float | None:
    """Return the derivative of a moment by finite differences, because moments need not be differentiable."""
    values = []
    for step in (1e-4, -1e-4):
        law = subject.moved(step)
        mean, variance = _moment(law, "mean"), _moment(law, "variance")
        if mean is None or (power == 2 and variance is None):
            return None
        moment = mean if power == 1 or variance is None else mean.square() + variance
        values.append(float((moment * weights).sum()))
    return (values[0] - values[1]) / 2e-4


# --- Seeded samples of any distribution, and the same distribution with other parameters --------------------


def takes_generator(distribution: Distribution) -> bool:
    """Whether `sample` takes a generator, as in penult; torch's own distributions use the global random state."""
    return "generator" in inspect.signature(distribution.sample).parameters


class Subject:
    """A distribution that is checked.

    Args:
        distribution: The distribution.
        seed: Seed of the samples.
    """

    def __init__(self, distribution: Distribution, seed: int) -> None:
        self.law, self._seed = distribution, check_seed(seed)
        # Read before any property is computed, because torch's distributions cache these as attributes.
        given = [name for name in distribution.arg_constraints if isinstance(vars(distribution).get(name), Tensor)]
        self.device = next((vars(distribution)[name].device for name in given), torch.device("cpu"))
        self._arguments, self.parameters = self._recipe(given)
        self.continuous = not bool(getattr(distribution.support, "is_discrete", False))
        self.dense = bool(getattr(distribution, "has_density", True))

    def draw(self, shape: tuple[int, ...], law: Any = None, *, path: bool = False, seed: int | None = None) -> Tensor:
        """Sample this distribution, or another, from the same seed; by ``rsample`` if ``path``."""
        law, seed = self.law if law is None else law, self._seed if seed is None else seed
        method = law.rsample if path else law.sample
        if takes_generator(law):
            samples: Tensor = method(Size(shape), generator=torch.Generator(self.device).manual_seed(seed))
            return samples
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            samples = method(Size(shape))
        return samples

    def normal(self, shape: Size, seed: int = 1) -> Tensor:
        """Return standard normal numbers in float64, independent of those of the distribution."""
        generator = torch.Generator().manual_seed(self._seed + seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(self.device)

    def rebuilt(self, parameters: Mapping[str, Tensor], validate_args: bool = False) -> Any:
        """Return a distribution of the same class with other parameters and the same other arguments."""
        dtype = next((value.dtype for value in parameters.values() if value.is_floating_point()), None)
        # Tensors that are not parameters get the dtype of the parameters.
        arguments = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value
            for name, value in self._arguments.items()
        }
        kind: Any = type(self.law)
        return kind(**{**arguments, **parameters}, validate_args=validate_args)

    def free(self) -> dict[str, tuple[Any, Tensor]]:
        """Return the parameters that can be varied.

        Returns:
            For each name, the map from unconstrained numbers to the parameter, and the numbers (float64) that give its
            value. Parameters at an end of their range, such as a concentration of 0, are left out.
        """
        free: dict[str, tuple[Any, Tensor]] = {}
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
                free[name] = move, start
        return free

    def moved(self, step: float | Tensor) -> Any:
        """Return the distribution with its free parameters moved by a step, or steps (N,), in a random direction."""
        free = self.free()
        along = {name: self.normal(start.shape, seed=7 + i) for i, (name, (_, start)) in enumerate(free.items())}

        def at(name: str) -> Tensor:
            move, start = free[name]
            steps = torch.as_tensor(step, dtype=torch.float64, device=start.device)
            value: Tensor = move(start + steps.reshape(steps.shape + (1,) * start.dim()) * along[name])
            return value

        fixed = {name: value.detach().double() for name, value in self.parameters.items() if value.is_floating_point()}
        return self.rebuilt({**fixed, **{name: at(name) for name in free}})

    def _recipe(self, given: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return arguments that rebuild the distribution, and the parameters among them; empty if that fails."""
        accepted = [
            n for n in inspect.signature(type(self.law).__init__).parameters if n not in ("self", "validate_args")
        ]
        options = {
            n: getattr(self.law, n) for n in accepted if n not in self.law.arg_constraints and hasattr(self.law, n)
        }
        names = [name for name in given if name in accepted]
        # Some parameters are equivalent, such as probs and logits, and a class accepts only one of them.
        for count in range(len(names), -1, -1):
            for some in itertools.combinations(names, count):
                parameters = {name: vars(self.law)[name] for name in some}
                try:
                    again = type(self.law)(**options, **parameters, validate_args=False)
                except (TypeError, ValueError, RuntimeError):
                    continue
                if again.batch_shape == self.law.batch_shape and again.event_shape == self.law.event_shape:
                    return {**options, **parameters}, parameters
        return {}, {}
