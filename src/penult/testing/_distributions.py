"""The contract of torch.distributions, as a check of any distribution."""

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

    What a user of torch relies on, and what can be told from outside:

    - Shapes of draws and densities over sample and batch shapes; draws in the support, parameters within their
      constraints; values and parameters that are NaN refused with ``validate_args``; a density that does not depend on
      what else is evaluated with it.
    - ``expand``, of an expanded distribution as well: parameters, moments, densities, and draws of their own.
    - Draws reproduced by ``generator=`` (by the global seed where there is no such argument), and the global random
      state left alone by it.
    - Mean, variance and entropy against draws; a density that integrates to one, in up to 8 dimensions, where torch
      has a bijection to the support: with a normal density q in its coordinates, :math:`E[q(x)/p(x)] = 1`.
    - ``kl_divergence``, where it is registered: 0 to itself, never negative, the mean of :math:`\log p - \log p'`.
    - Gradients of densities in parameters and values against differences in float64; those of ``rsample``, per draw,
      against the gradient of the mean and the second moment.
    - ``Independent``, ``MixtureSameFamily`` and ``TransformedDistribution`` around it; ``repr``, copies, pickles;
      single against double precision.

    Laws that compare with draws have the bar \|z\| < 4, somewhat more where many numbers are compared at once. What a
    distribution does not have, such as an entropy, is left out.

    Args:
        distribution: Any distribution. One that has no density says so by an attribute ``has_density``. Gradients,
            divergences and precisions are looked at where its class makes it again from its ``arg_constraints`` and
            other arguments of their names.
        samples: Draws per batch entry.
        seed: Seed of the draws.
        gradients: Whether to check those of ``rsample``, where the distribution has it, and of densities.
        without: Names of laws that are left out, such as that of the variance for torch's VonMises, whose variance is
            one of angles on purpose.

    Returns:
        The laws.

    Raises:
        AssertionError: If one fails; the message is the table of all laws, those that fail marked. A law whose
            computation raises an error fails with it.

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
    kept = torch.equal(state, torch.random.get_rng_state())
    laws = [
        fact("a generator reproduces samples", torch.equal(x, subject.draw((samples,)))),
        fact("a generator leaves the global state", kept),
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
        except Exception as error:  # a law that cannot be looked at is broken, and the others are still told
            said = str(error).split("\n")[0][:200]
            laws.append(Law(f"{name} can be computed", float("nan"), f"{type(error).__name__}: {said}", False))
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
            if shape == (0,):
                continue  # torch's own Categorical cannot
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
    """Correlations of the first coordinates of entries (N, B, ...) of a batch with those of the first entry."""
    first = rows[:, :, 0] - rows[:, :, 0].mean(0)
    first = first / first.std(0).clamp_min(1e-300)
    return score(name, first[:, 1:] * first[:, :1])


def _constraints(subject: Subject, x: Tensor) -> Iterator[Law]:
    law: Any = subject.law
    yield fact("samples lie in the support", bool(law.support.check(x).all()))
    held = all(
        bool(constraint.check(getattr(law, name)).all())
        for name, constraint in law.arg_constraints.items()
        if not constraints.is_dependent(constraint) and isinstance(getattr(law, name, None), Tensor)
    )
    yield fact("parameters satisfy arg_constraints", held)
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
        own = _asked(law, name)
        if own is not None:
            theirs = (_asked(wide, name), _asked(wider, name))
            same = all(each is not None and _agree(each, own.expand(each.shape)) for each in theirs)
            shaped = theirs[0] is not None and theirs[0].shape == Size((2,)) + own.shape
            yield fact(f"expand keeps {name}", same and shaped)
    for name, value in subject.parameters.items():
        found = getattr(wide, name)
        grown = found.shape == Size((2,)) + value.shape  # others are shared by the whole batch
        yield fact(f"expand keeps {name}", _agree(found, value.expand(found.shape) if grown else value))
    if subject.dense:
        density = law.log_prob(x[:3])
        once, twice = wide.log_prob(x[:3].unsqueeze(1)), wider.log_prob(x[:3, None, None])
        same = _agree(once, density.unsqueeze(1).expand(once.shape))
        yield fact("expand keeps the law", same and _agree(twice, density[:, None, None].expand(twice.shape)))
    drawn = subject.draw((1000,), wider)
    yield fact("an expanded law has its sample shape", drawn.shape == Size((1000, 3, 2)) + batch + law.event_shape)
    yield fact("expanded entries have draws of their own", not torch.equal(drawn[:, 0, 0], drawn[:, 0, 1]))
    yield fact("draws of an expanded law lie in the support", bool(wider.support.check(drawn).all()))
    mean = _asked(law, "mean")
    if mean is not None and bool(mean.isfinite().all()):
        yield score("expanded draws have the mean", drawn.double().mean((1, 2)) - mean.double())


def _asked(law: Distribution, name: str) -> Tensor | None:
    """A property or an entropy, if it has it."""
    try:
        found = getattr(law, name)
        value: Tensor = found() if callable(found) else found
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
    alone = torch.stack([law.log_prob(each) for each in x[:4]])
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


# --- A distribution inside of torch's own -------------------------------------------------------------------


def wrapped(subject: Subject, x: Tensor) -> Iterator[Law]:
    """Independent, MixtureSameFamily and TransformedDistribution, where they take it."""
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
    each = law.log_prob(one.unsqueeze(-1 - len(event)))
    yield _close(
        "MixtureSameFamily mixes densities", mixture.log_prob(one), (each + logits.log_softmax(-1)).logsumexp(-1)
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


def _close(name: str, found: Tensor, expected: Tensor) -> Law:
    if found.shape != expected.shape:
        return fact(name, False)
    error = float(((found - expected).abs() / expected.abs().clamp_min(1)).max())
    return Law(name, error, "<= 1e-4", error <= 1e-4)
