"""Check of any distribution against the contract of torch.distributions."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)

from penult.testing._estimates import Subject, estimates
from penult.testing._laws import Law, LawReport, fact, score

__all__ = ["check_distribution", "wrapped"]


def check_distribution(
    distribution: Distribution,
    samples: int = 20_000,
    seed: int = 0,
    gradients: bool = True,
    without: Collection[str] = (),
) -> LawReport:
    r"""Check a distribution against the contract of torch.distributions.

    These properties are tested:

    - Shapes of samples and densities for sample and batch shapes. Samples are in the support, and parameters satisfy
      their constraints. Values and parameters that are NaN are refused with ``validate_args``. The density of a value
      does not depend on the other values in the call.
    - ``expand``, also of an expanded distribution: parameters, moments, densities, and independent samples.
    - ``generator=`` (or the global seed, if there is no such argument) reproduces samples, and leaves the global random
      state unchanged.
    - Mean, variance and entropy agree with samples. The density integrates to one, in up to 8 dimensions, if torch has
      a bijection to the support: with a normal density q in its coordinates, :math:`E[q(x)/p(x)] = 1`.
    - ``kl_divergence``, if it is registered: 0 to itself, never negative, the mean of :math:`\log p - \log p'`.
    - Gradients of densities in parameters and values agree with finite differences in float64; gradients of
      ``rsample``, of each sample, agree with the gradient of the mean and the second moment.
    - ``Independent``, ``MixtureSameFamily`` and ``TransformedDistribution`` accept it. ``repr``, copies and pickles
      work. Single precision agrees with double precision.

    Laws that compare with samples have the limit \|z\| < 4, or slightly more if many numbers are compared at once.
    Properties that a distribution does not have, such as an entropy, are not tested.

    Args:
        distribution: Any distribution. If it has no density, it must have an attribute ``has_density`` that is False.
            Gradients, divergences and precisions are tested if its class can be rebuilt from the attributes in its
            ``arg_constraints`` and from attributes that have the names of its other arguments.
        samples: Number of samples for each batch entry.
        seed: Seed of the samples.
        gradients: Whether to test the gradients of densities and of ``rsample``, if the distribution has it.
        without: Names of laws to leave out, for example that of the variance for torch's VonMises, whose variance is
            by definition a circular one.

    Returns:
        The laws.

    Raises:
        AssertionError: A law fails; the message is the table of all laws, in which failures are marked. A law whose
            computation raises an error counts as failed.

    Example:
        >>> import penult
        >>> check_distribution(penult.VonMisesFisher(torch.eye(3), torch.tensor(4.0)), samples=5000).passed
        True
        >>> class Wrong(torch.distributions.Normal):
        ...     def entropy(self):
        ...         return super().entropy() + 0.1
        >>> check_distribution(Wrong(0.0, 1.0))
        Traceback (most recent call last):
        AssertionError: ...FAIL  entropy is the mean of -log_prob...
    """
    subject = Subject(distribution, seed)
    state = torch.random.get_rng_state()
    x = subject.draw((samples,))
    unchanged = torch.equal(state, torch.random.get_rng_state())
    laws = [
        fact("a generator reproduces samples", torch.equal(x, subject.draw((samples,)))),
        fact("a generator leaves the global state", unchanged),
    ]
    groups: dict[str, Callable[[], Iterator[Law]]] = {
        "shapes": lambda: _shapes(subject, x),
        "constraints": lambda: _constraints(subject, x),
        "expand": lambda: _expanded(subject, x),
        "densities": lambda: _densities(subject, x),
        "copies": lambda: _copies(subject, x),
        "estimates": lambda: estimates(subject, x, gradients),
        "wrapping": lambda: wrapped(subject, x),
    }
    for name, group in groups.items():
        try:
            laws += group()
        # A law that cannot be computed fails, and the other laws are still reported.
        except Exception as error:
            message = str(error).split("\n")[0][:200]
            laws.append(Law(f"{name} can be computed", float("nan"), f"{type(error).__name__}: {message}", False))
    kept_laws = tuple(law for law in laws if law.name not in without)
    return LawReport(repr(distribution), kept_laws).raise_unless_passed()


def _shapes(subject: Subject, x: Tensor) -> Iterator[Law]:
    law, batch, event = subject.law, subject.law.batch_shape, subject.law.event_shape
    yield fact("sample shape is sample + batch + event", x.shape == x.shape[:1] + batch + event)
    for shape, name in (
        ((), "an empty sample shape draws one"),
        ((0,), "no draws is an empty tensor"),
        ((2, 3), "sample shapes have any number of dimensions"),
    ):
        try:
            drawn = subject.draw(shape)
        except RuntimeError:
            # torch's own Categorical raises an error for no samples.
            if shape == (0,):
                continue
            raise
        yield fact(name, drawn.shape == Size(shape) + batch + event)
        if law.has_rsample:
            yield fact(f"rsample: {name}", subject.draw(shape, path=True).shape == Size(shape) + batch + event)
    if law.has_rsample:
        yield fact("rsample draws what sample does", torch.allclose(subject.draw((5,), path=True), subject.draw((5,))))
    yield fact("draws differ", len(x) < 2 or not torch.equal(x[0], x[1]) or not subject.continuous)
    if batch.numel() > 1 and subject.continuous and event:
        rows = x.reshape(len(x), batch.numel(), -1).double()
        yield _unrelated("entries of a batch are drawn independently", rows)


def _unrelated(name: str, rows: Tensor) -> Law:
    """Test that the first coordinates of entries (N, B, ...) of a batch do not correlate with those of the first."""
    first = rows[:, :, 0] - rows[:, :, 0].mean(0)
    first = first / first.std(0).clamp_min(1e-300)
    return score(name, first[:, 1:] * first[:, :1])


def _constraints(subject: Subject, x: Tensor) -> Iterator[Law]:
    law: Any = subject.law
    yield fact("samples lie in the support", bool(law.support.check(x).all()))
    satisfied = all(
        bool(constraint.check(getattr(law, name)).all())
        for name, constraint in law.arg_constraints.items()
        if not constraints.is_dependent(constraint) and isinstance(getattr(law, name, None), Tensor)
    )
    yield fact("parameters satisfy arg_constraints", satisfied)
    for name, value in subject.parameters.items():
        if value.is_floating_point():
            wrong = torch.full_like(value, torch.nan)
            refused = _refuses(partial(subject.rebuilt, {name: wrong}, validate_args=True))
            yield fact(f"validate_args refuses {name} that is NaN", refused)
    if subject.dense and subject.parameters and x.is_floating_point():
        valid = subject.rebuilt({}, validate_args=True)
        yield fact("validate_args refuses values that are NaN", _refuses(lambda: valid.log_prob(x[0] * torch.nan)))
        if law.event_shape:
            longer = torch.cat([x[0], x[0][..., :1]], dim=-1)
            yield fact("values of another event shape are refused", _refuses(lambda: valid.log_prob(longer)))


def _refuses(call: Callable[[], object]) -> bool:
    """Whether a call raises a ValueError or RuntimeError."""
    try:
        call()
    except (ValueError, RuntimeError):
        return True
    return False


def _expanded(subject: Subject, x: Tensor) -> Iterator[Law]:
    law, batch = subject.law, subject.law.batch_shape
    wide: Any = law.expand(Size((2,)) + batch)
    wider: Any = wide.expand(Size((3, 2)) + batch)
    kept = type(wide) is type(law) and wide.event_shape == law.event_shape and wide.batch_shape == Size((2,)) + batch
    yield fact("expand keeps class and event shape", kept and wider.batch_shape == Size((3, 2)) + batch)
    for name in ("mean", "variance", "stddev", "mode", "entropy"):
        own = _statistic(law, name)
        if own is not None:
            once, twice = _statistic(wide, name), _statistic(wider, name)
            same = all(value is not None and _agree(value, own.expand(value.shape)) for value in (once, twice))
            shaped = once is not None and once.shape == Size((2,)) + own.shape
            yield fact(f"expand keeps {name}", same and shaped)
    for name, value in subject.parameters.items():
        expanded = getattr(wide, name)
        # Parameters that the whole batch shares keep their shape.
        has_batch = expanded.shape == Size((2,)) + value.shape
        yield fact(f"expand keeps {name}", _agree(expanded, value.expand(expanded.shape) if has_batch else value))
    if subject.dense:
        density = law.log_prob(x[:3])
        wide_density, wider_density = wide.log_prob(x[:3].unsqueeze(1)), wider.log_prob(x[:3, None, None])
        same = _agree(wide_density, density.unsqueeze(1).expand(wide_density.shape))
        same = same and _agree(wider_density, density[:, None, None].expand(wider_density.shape))
        yield fact("expand keeps the law", same)
    drawn = subject.draw((1000,), wider)
    yield fact("an expanded law has its sample shape", drawn.shape == Size((1000, 3, 2)) + batch + law.event_shape)
    yield fact("expanded entries have draws of their own", not torch.equal(drawn[:, 0, 0], drawn[:, 0, 1]))
    yield fact("draws of an expanded law lie in the support", bool(wider.support.check(drawn).all()))
    mean = _statistic(law, "mean")
    if mean is not None and bool(mean.isfinite().all()):
        yield score("expanded draws have the mean", drawn.double().mean((1, 2)) - mean.double())


def _statistic(law: Distribution, name: str) -> Tensor | None:
    """Return a property such as the mean, or the entropy, if the distribution has it."""
    try:
        attribute = getattr(law, name)
        value: Tensor = attribute() if callable(attribute) else attribute
    except (NotImplementedError, AttributeError):
        return None
    return value


def _agree(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def _densities(subject: Subject, x: Tensor) -> Iterator[Law]:
    law, batch, event = subject.law, subject.law.batch_shape, subject.law.event_shape
    if not subject.dense:
        return
    log_prob = law.log_prob(x)
    yield fact("log_prob shape is sample + batch", log_prob.shape == x.shape[:1] + batch)
    yield fact("log_prob is finite on samples", bool(log_prob.isfinite().all()))
    alone = torch.stack([law.log_prob(value) for value in x[:4]])
    yield fact("log_prob of a value is the same alone", _agree(alone, log_prob[:4]))
    one = x[0][(0,) * len(batch)]
    spread = one.expand(batch + event)
    yield fact("log_prob broadcasts a value over the batch", _agree(law.log_prob(one), law.log_prob(spread)))
    many = law.log_prob(x[:6].reshape(2, 3, *x.shape[1:]))
    yield fact("log_prob takes sample shapes", _agree(many, log_prob[:6].reshape(2, 3, *batch)))
    if law.has_enumerate_support:
        total = law.log_prob(law.enumerate_support()).double().logsumexp(0).abs().max()
        yield Law("probabilities add up to one", float(total), "|log| < 1e-5", float(total) < 1e-5)


def _copies(subject: Subject, x: Tensor) -> Iterator[Law]:
    law = subject.law
    yield fact("repr names the class", type(law).__name__ in repr(law))
    for name, again in (("a deep copy", copy.deepcopy(law)), ("a pickle", pickle.loads(pickle.dumps(law)))):
        yield fact(f"{name} draws the same", torch.equal(subject.draw((5,), again), subject.draw((5,))))
        if subject.dense:
            yield fact(f"{name} has the same log_prob", torch.equal(again.log_prob(x[:5]), law.log_prob(x[:5])))
    floating = {name: value for name, value in subject.parameters.items() if value.is_floating_point()}
    if subject.dense and floating and subject.device.type != "mps" and x.is_floating_point():
        single = subject.rebuilt({name: value.detach().float() for name, value in floating.items()})
        double = subject.rebuilt({name: value.detach().float().double() for name, value in floating.items()})
        value = x[:200].float()
        exact = double.log_prob(value.double())
        error = float(((single.log_prob(value).double() - exact).abs() / exact.abs().clamp_min(1)).max())
        yield Law("single precision agrees with double", error, "< 1e-3", error < 1e-3)


# --- A distribution inside torch's own ----------------------------------------------------------------------


def wrapped(subject: Subject, x: Tensor) -> Iterator[Law]:
    """Test Independent, MixtureSameFamily and TransformedDistribution of a distribution, if they accept it."""
    law: Any = subject.law
    if not law.batch_shape:
        law, x = law.expand(Size((3,))), x[: len(x) // 3 * 3].reshape(-1, 3, *law.event_shape)
    x = x[:20]
    event, last = law.event_shape, law.batch_shape[-1]
    whole = Independent(law, 1, validate_args=False)
    yield fact("Independent has its shapes", whole.event_shape == Size((last,)) + event)
    if not subject.dense:
        return
    density = law.log_prob(x)
    yield _close("Independent sums densities", whole.log_prob(x), density.sum(-1))
    try:
        yield _close("Independent sums entropies", whole.entropy(), law.entropy().sum(-1))
    except NotImplementedError:
        pass
    logits = torch.linspace(-1, 1, last, dtype=density.dtype, device=density.device).expand(law.batch_shape)
    mixture = MixtureSameFamily(Categorical(logits=logits), law, validate_args=False)
    one = x.select(-1 - len(event), 0)
    densities = law.log_prob(one.unsqueeze(-1 - len(event)))
    yield _close(
        "MixtureSameFamily mixes densities", mixture.log_prob(one), (densities + logits.log_softmax(-1)).logsumexp(-1)
    )
    with torch.random.fork_rng():
        drawn = mixture.sample((4,))
    yield fact("MixtureSameFamily draws", drawn.shape == Size((4,)) + law.batch_shape[:-1] + event)
    support = law.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real:
        moved = TransformedDistribution(law, AffineTransform(1.0, 2.0, event_dim=len(event)), validate_args=False)
        expected = density - event.numel() * math.log(2.0)
        yield _close("TransformedDistribution moves densities", moved.log_prob(1 + 2 * x), expected)


def _close(name: str, value: Tensor, expected: Tensor) -> Law:
    """Test that two tensors agree up to a relative error of 1e-4."""
    if value.shape != expected.shape:
        return fact(name, False)
    error = float(((value - expected).abs() / expected.abs().clamp_min(1)).max())
    return Law(name, error, "<= 1e-4", error <= 1e-4)
