"""Law checks for distributions, bases and pairs: what proves a base, for penult's own and for yours.

That a pair's posterior equals the softmax proves the wiring alone: M cancels in it, so a wrong M passes. What
a wrong M cannot pass are the laws below. Each check draws with a fixed seed, compares with a stated bar, and
raises :class:`AssertionError` with the table of laws when one fails.

Example:
    >>> import penult
    >>> report = check_base(penult.Sphere(2.0), penult.Head(torch.eye(3)))
    >>> report.passed
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from penult.bases import Base, Marginal, Sphere
from penult.head import Head
from penult.pair import GenerativePair
from penult.special import cosine_cdf

__all__ = ["Law", "LawReport", "check_base", "check_distribution", "check_pair"]

_Z = 4.0  # the bar on a z-score: one true law in 16,000 fails it by chance, and seeds are fixed
_STREAM = 30_000_000  # logits of draws of a marginal law for one class, about
_P = 1e-4  # the bar on a Kolmogorov-Smirnov p-value


@dataclass(frozen=True)
class Law:
    """One law and how well it holds.

    Attributes:
        name: What must hold.
        value: The measured statistic.
        bar: What it is held against.
        passed: Whether it holds.
    """

    name: str
    value: float
    bar: str
    passed: bool


@dataclass(frozen=True)
class LawReport:
    """The laws that a check looked at; prints as a table."""

    subject: str
    laws: tuple[Law, ...]

    @property
    def passed(self) -> bool:
        """Whether every law holds."""
        return all(law.passed for law in self.laws)

    def __str__(self) -> str:
        width = max((len(law.name) for law in self.laws), default=0)
        rows = [
            f"  {'ok  ' if law.passed else 'FAIL'}  {law.name:<{width}}  {law.value:10.3g}  ({law.bar})"
            for law in self.laws
        ]
        return "\n".join([self.subject, *rows])

    def _raise_unless_passed(self) -> LawReport:
        if not self.passed:
            raise AssertionError(str(self))
        return self


def check_distribution(
    distribution: Distribution, samples: int = 20_000, seed: int = 0, gradients: bool = True
) -> LawReport:
    """Check a distribution against the contract of torch.distributions.

    Shapes of samples and densities, support, reproducibility under ``generator=``, the global random state,
    ``expand``, and the mean against samples; ``rsample`` gradients reach every floating parameter.

    Args:
        distribution: Any distribution whose ``sample`` takes ``generator=``. One that has no density says so by an
            attribute ``has_density``.
        samples: Draws per batch entry.
        seed: Seed of the draws.
        gradients: Whether to check ``rsample``, where the distribution has it.

    Returns:
        The laws.

    Raises:
        AssertionError: If one fails.

    Example:
        >>> import penult
        >>> check_distribution(penult.VonMisesFisher(torch.eye(3), torch.tensor(4.0))).passed
        True
    """
    laws: list[Law] = []
    draw: Any = distribution.sample

    def seeded() -> torch.Generator:
        return torch.Generator(device=mean.device).manual_seed(seed)

    mean = distribution.mean
    state = torch.random.get_rng_state()
    x = draw((samples,), generator=seeded())
    again = draw((samples,), generator=seeded())
    laws.append(_fact("a generator reproduces samples", torch.equal(x, again)))
    laws.append(_fact("a generator leaves the global state", torch.equal(state, torch.random.get_rng_state())))
    event, batch = distribution.event_shape, distribution.batch_shape
    laws.append(_fact("sample shape is sample + batch + event", x.shape == Size((samples,)) + batch + event))
    laws.append(_fact("an empty sample shape draws one", draw(generator=seeded()).shape == batch + event))
    laws.append(
        _fact("no draws is an empty tensor", draw((0,), generator=seeded()).shape == Size((0,)) + batch + event)
    )
    wider = distribution.expand(Size((2,)) + batch)
    if getattr(distribution, "has_density", True):
        log_prob = distribution.log_prob(x)
        laws.append(_fact("log_prob shape is sample + batch", log_prob.shape == Size((samples,)) + batch))
        laws.append(_fact("log_prob is finite on samples", bool(log_prob.isfinite().all())))
        kept = torch.allclose(wider.log_prob(x[:1].unsqueeze(0))[0, 0], log_prob[0])
        laws.append(_fact("expand keeps the law", kept))
    else:
        kept = torch.equal(wider.mean[0], mean) and wider.batch_shape == Size((2,)) + batch
        laws.append(_fact("expand keeps the law", kept))
    support: Any = distribution.support
    laws.append(_fact("samples lie in the support", bool(support.check(x).all())))
    laws.append(_score("sample mean equals mean", x.double() - mean.double()))
    if gradients and distribution.has_rsample:
        laws.append(_fact("rsample gradients are finite", _rsample_gradients(distribution, seeded())))
    return LawReport(repr(distribution), tuple(laws))._raise_unless_passed()


def check_base(base: Base, head: Head | None = None, samples: int = 100_000, seed: int = 0) -> LawReport:
    """Check the laws that only a right M satisfies.

    With p(h|y) ∝ exp(w_y·h) m(h): p(h|y) integrates to one (by quadrature where the base offers a rule, else
    by importance sampling between tilts close to each other); the sample mean is ∇ log M; for joint draws
    (h, y) the class frequencies agree with softmax(head(h)); the posterior is the softmax; for a
    :class:`penult.Sphere` the laws of the radius and of the cosine hold too. A :class:`penult.Marginal` knows M at
    the head's rows alone, so that ratios between tilts of other rows are out; in their place its pair must give back
    the density that it was made of, and no class more or less than its share of it.

    Args:
        base: The base to check, in a precision of at least float32.
        head: The head whose rows tilt it. A random head of three classes when left out.
        samples: Draws for the Monte-Carlo laws, fewer where d is so large that they would fill memory.
        seed: Seed of head and draws.

    Returns:
        The laws.

    Raises:
        AssertionError: If one fails.
        ValueError: If no head is given and the base does not say its dimension.

    Example:
        >>> import penult
        >>> report = check_base(penult.Sphere(1.5), penult.Head(torch.eye(2)), samples=20_000)
        >>> print(report.laws[4].name, report.laws[4].passed)
        posterior equals softmax(head(h)) True
    """
    generator = torch.Generator().manual_seed(seed)
    if head is None:
        if base.in_features is None:
            raise ValueError("this base fits any dimension: pass a head, which has one")
        kind = next((b.dtype for b in base.buffers() if b.is_floating_point()), torch.get_default_dtype())
        head = Head(torch.randn(3, base.in_features, generator=generator).to(kind))
    samples = min(samples, max(1000, 50_000_000 // head.in_features))
    pair = GenerativePair(head, base)
    laws = list(_pair_laws(pair, samples, generator))
    classes = torch.linspace(0, head.num_classes - 1, min(head.num_classes, 4)).round().long()
    rows = head.centered_weight(classes)
    laws += _normalisation(base, rows)
    if isinstance(base, Marginal):
        laws += _marginal_laws(pair, classes, samples, generator)
    doubt = base.info.mgf_standard_error or 0.0
    for y, row in zip(classes.tolist(), rows, strict=True):
        tilt: Any = base.tilt(row)
        h = tilt.sample((_affordable(pair, y, samples),), generator=generator)
        laws.append(_mean_law(base, row, h, f"mean of p(h|{y}) is the gradient of log M", doubt))
        if base.info.exact_mgf:
            laws.append(_strong_law(base, row, samples, y, generator))
        if base.info.has_density and not isinstance(base, Marginal):
            laws.append(_neighbour(base, row, h, y, generator))
        if isinstance(base, Sphere):
            laws += _sphere_laws(base, row, h, y)
    return LawReport(f"{base.info.name} base with {head}", tuple(laws))._raise_unless_passed()


def check_pair(pair: GenerativePair, samples: int = 100_000, seed: int = 0) -> LawReport:
    """Check a pair by its own joint draws: posterior, class frequencies, and consistency of its densities.

    Args:
        pair: The pair.
        samples: Joint draws.
        seed: Seed of the draws.

    Returns:
        The laws.

    Raises:
        AssertionError: If one fails.

    Example:
        >>> import penult
        >>> check_pair(penult.GenerativePair(penult.Head(torch.eye(3)), penult.Sphere(2.0))).passed
        True
    """
    laws = tuple(_pair_laws(pair, samples, torch.Generator().manual_seed(seed)))
    return LawReport(f"pair of {pair.head} and {pair.base.info.name}", laws)._raise_unless_passed()


def _pair_laws(pair: GenerativePair, samples: int, generator: torch.Generator) -> list[Law]:
    k = pair.head.num_classes
    if torch.finfo(pair.head.weight.dtype).bits < 32:
        raise ValueError(f"laws are checked in at least float32; this head is {pair.head.weight.dtype}: use .float()")
    work = min(samples, max(1000, 20_000_000 // k))
    h, y = pair.sample((work,), generator=generator)
    softmax = pair.head(h).double().softmax(-1)
    exact = h.dtype == torch.float64
    error = float((pair.posterior(h).probs.double() - softmax).abs().max())
    tight = 1e-9 if exact else 1e-5
    prior = pair.prior.probs.double()
    doubt = pair.base.info.mgf_standard_error or 0.0
    return [
        *(_density_laws(pair, h, y, softmax, tight) if pair.base.info.has_density else ()),
        Law("posterior equals softmax(head(h))", error, f"<= {tight:g}", error <= tight),
        _frequencies("joint draws have the softmax's class frequencies", y, softmax, doubt),
        _frequencies("joint draws have the pair's prior", y, prior.expand(len(y), k)),
    ]


def _density_laws(pair: GenerativePair, h: Tensor, y: Tensor, softmax: Tensor, tight: float) -> list[Law]:
    """The densities of a pair agree with each other, at its own draws."""
    joint = pair.log_joint(h)
    scale = float(joint.abs().max())
    bayes_error = float((joint.double().softmax(-1) - softmax).abs().max())
    few, classes = slice(1000), y[:1000]
    bayes = pair.prior.logits[classes] + pair.given(classes).log_prob(h[few])
    gap = float((bayes - joint[few].gather(-1, classes.unsqueeze(-1)).squeeze(-1)).abs().max()) / max(1.0, scale)
    total = float((joint.double().logsumexp(-1) - pair.log_prob(h).double()).abs().max()) / max(1.0, scale)
    loose = 1e-12 if h.dtype == torch.float64 else 1e-6
    rounded = max(tight, 2 * torch.finfo(joint.dtype).eps * scale)  # log densities can be in the thousands
    return [
        _fact("log_prob is finite on the pair's own draws", bool(joint.isfinite().all())),
        Law("softmax of log_joint is the softmax", bayes_error, f"<= {rounded:.1g}", bayes_error <= rounded),
        Law("log_joint is log p(y) + log p(h|y)", gap, f"<= {loose * 10:g} of its size", gap <= loose * 10),
        Law("log_prob sums log_joint", total, f"<= {loose:g} of its size", total <= loose),
    ]


def _normalisation(base: Base, rows: Tensor) -> list[Law]:
    tilt = base.tilt(rows)
    error, before = math.inf, math.inf
    for nodes in (64, 128, 256, 512, 1024):  # until the rule itself has converged
        rule = base.quadrature(nodes)
        if rule is None:
            return []
        points, logs = rule
        mass = (tilt.log_prob(points.to(rows.dtype).unsqueeze(1)).double() + logs.double().unsqueeze(-1)).logsumexp(0)
        before, error = error, float(mass.abs().max())
        if abs(error - before) < 1e-11 or len(points) > 500_000:
            break
    bar = 1e-9 if rows.dtype == torch.float64 else 1e-4
    return [Law("p(h|y) integrates to one", error, f"<= {bar:g}", error <= bar)]


def _neighbour(base: Base, row: Tensor, h: Tensor, y: int, generator: torch.Generator) -> Law:
    """E_{p(h|w)}[p(h|w') / p(h|w)] = 1 for a w' close enough that the ratio has a small variance."""
    spread = float((h.double() @ row.double()).std())
    nearer = row * (1 - min(0.5, 0.5 / max(spread, 1e-12)))
    ratio = (base.tilt(nearer).log_prob(h).double() - base.tilt(row).log_prob(h).double()).exp()
    return _score(f"p(h|w') / p(h|{y}) has mean one", (ratio - 1).unsqueeze(-1))


def _marginal_laws(pair: GenerativePair, classes: Tensor, samples: int, generator: torch.Generator) -> list[Law]:
    """What follows from M alone: Z = Σ_y e^{b_y} M(w_y) is one; and p(h|y) / p(h) has mean one under the law p."""
    base = pair.base
    assert isinstance(base, Marginal)
    bar = 1e-9 if base.log_prior.dtype == pair.head.weight.dtype == torch.float64 else 1e-5
    rows = pair.head.centered_weight().double()
    log_z = float((pair.head.full_bias.double() + base.log_mgf(rows)).logsumexp(-1))
    laws = [Law("the classes' shares of the law add up", abs(log_z), f"<= {bar:g}", abs(log_z) <= bar)]
    h = base.law.sample(
        min(samples, max(1000, 20_000_000 // pair.head.num_classes)), generator, pair.prior.logits.device
    )
    prior = pair.prior.probs.double()
    known = classes[prior[classes] * len(h) >= 100]  # of a rarer class too few draws tell
    if len(known):
        ratio = pair.head(h.to(pair.head.weight)).double().softmax(-1)[:, known] / prior[known]
        laws.append(_score("p(h|y) / p(h) has mean one", ratio - 1, base.standard_error[known].double()))
    if base.info.has_density:
        few = h[:1000].to(pair.head.weight)
        own, theirs = pair.log_prob(few).double(), base.law.log_prob(few).double()
        off, bar = float((own - theirs).abs().max()), 1e-5 * max(1.0, float(theirs.abs().max()))
        laws.append(Law("the pair's p(h) is the law's own density", off, f"<= {bar:.1g}", off <= bar))
    return laws


def _affordable(pair: GenerativePair, y: int, samples: int) -> int:
    """Draws of a class; from a marginal law a rare class is dear."""
    if not isinstance(pair.base, Marginal):
        return samples
    return max(100, min(samples, int(_STREAM / pair.head.num_classes * float(pair.prior.probs[y]))))


def _mean_law(base: Base, row: Tensor, h: Tensor, name: str, doubt: float = 0.0) -> Law:
    """The sample mean against ∇ log M; where M is known to a relative ``doubt``, so is the mean, in deviations."""
    off = h.double() - _gradient(base, row).double()
    along = (off @ row.double()).unsqueeze(-1)  # where a wrong M shows most
    off = torch.cat([off, along], dim=-1)
    return _score(name, off, doubt * off.std(0))


def _strong_law(base: Base, row: Tensor, samples: int, y: int, generator: torch.Generator) -> Law:
    """The law of the mean for a multiple of the row at which one per cent of log M would be plain to see."""
    factor, drawn = 1.0, None
    while True:
        tilt: Any = base.tilt(factor * row)
        h = tilt.sample((samples,), generator)
        along = h.double() @ row.double()
        away = (along - along.median()).abs() > 1e-9 * along.abs().max()
        if drawn is not None and int(away.sum()) < 100:
            break  # too few draws show what varies, such as the far one of two points
        drawn = factor, h
        expected = 0.01 * float(along.mean().abs() / (along.std() + 1e-300)) * math.sqrt(samples)
        if expected >= 2 * _Z or factor >= 1 << 12:
            break
        factor *= 2
    factor, h = drawn
    return _mean_law(base, factor * row, h, f"the same for {factor:g} w_{y}")


def _gradient(base: Base, row: Tensor) -> Tensor:
    w = row.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(base.log_mgf(w), w)
    return gradient


def _sphere_laws(base: Sphere, row: Tensor, h: Tensor, y: int) -> list[Law]:
    u = base.read(h.double())
    r = torch.linalg.vector_norm(u, dim=-1)
    m = u.shape[-1]
    radius = base.radius.double()
    shares = base.radial_law(row.double().unsqueeze(0))[0]
    kappa = base.kappa(row.double().unsqueeze(0))[0]
    nearest = (r.unsqueeze(-1) - radius).abs().argmin(-1) if radius.numel() <= 512 else None
    laws = []
    if nearest is not None and radius.numel() > 1:
        hits = torch.nn.functional.one_hot(nearest, radius.numel()).double().cumsum(-1)
        largest = float((hits.mean(0) - shares.cumsum(-1)).abs().max()) * math.sqrt(len(r))
        p = _kolmogorov(largest)
        laws.append(Law(f"radii of p(h|{y}) follow their law", p, f"p > {_P:g}", p > _P))
    if m > 1 and float(kappa.min()) > 0:
        t = base.cosine(h.double(), row.double().expand(h.shape))
        p = _uniform(cosine_cdf(m, r * (kappa / radius)[0], t))
        laws.append(Law(f"cosines of p(h|{y}) follow their law", p, f"p > {_P:g}", p > _P))
    return laws


def _rsample_gradients(distribution: Distribution, generator: torch.Generator) -> bool:
    names = [n for n in distribution.arg_constraints if getattr(distribution, n).is_floating_point()]
    leaves = {n: getattr(distribution, n).detach().clone().requires_grad_() for n in names}
    build: Callable[..., Any] = type(distribution)
    x = build(**leaves).rsample((100,), generator=generator)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    gradients = torch.autograd.grad((x * direction).sum(), list(leaves.values()))
    return all(bool(g.isfinite().all()) and bool(g.abs().sum() > 0) for g in gradients)


def _fact(name: str, holds: bool) -> Law:
    return Law(name, float(holds), "holds", holds)


def _score(name: str, deviations: Tensor, doubt: Tensor | float = 0.0) -> Law:
    """The largest |z| of the column means of ``deviations`` (N, ...), each against zero known to ``doubt``."""
    flat = deviations.double().flatten(1)
    error = (flat.var(0) / len(flat) + torch.as_tensor(doubt, dtype=torch.float64).square()).sqrt()
    floor = 1e-7 * max(1.0, float(flat.abs().max())) + 1e-300  # rounding, where a column does not vary
    z = float((flat.mean(0).abs() / (error + floor)).max())
    bar = max(_Z, math.sqrt(2 * math.log(max(flat.shape[1], 1))) + 2)  # the largest of many is larger
    return Law(name, z, f"|z| < {bar:.2g}", z < bar)


def _frequencies(name: str, y: Tensor, p: Tensor, doubt: float = 0.0) -> Law:
    """The largest |z| of Σ 1[y ≤ k] − P(Y ≤ k) and Σ 1[y = k] − P(Y = k) over classes seen often enough.

    Shares of classes that are known to a relative ``doubt`` may be off by as much.
    """
    hits = torch.nn.functional.one_hot(y, p.shape[-1]).to(p)
    off = torch.cat([hits - p, (hits - p).cumsum(-1)], dim=-1).sum(0)
    upto = p.cumsum(-1)
    variance = torch.cat([p * (1 - p), upto * (1 - upto)], dim=-1).sum(0)
    known = variance >= 25  # below, a count is not normal
    variance = variance + (doubt * torch.cat([p, upto * (1 - upto)], dim=-1).sum(0)).square()
    z = float((off[known].abs() / variance[known].sqrt()).max()) if bool(known.any()) else 0.0
    bar = max(_Z, math.sqrt(2 * math.log(max(int(known.sum()), 1))) + 2)
    return Law(name, z, f"|z| < {bar:.2g}", z < bar)


def _uniform(values: Tensor) -> float:
    """Kolmogorov-Smirnov p-value of values (N,) against the uniform law."""
    ordered, n = values.sort().values, len(values)
    steps = torch.arange(n, dtype=ordered.dtype) / n
    largest = float(torch.maximum((ordered - steps).max(), (steps + 1 / n - ordered).max()))
    return _kolmogorov(largest * math.sqrt(n))


def _kolmogorov(x: float) -> float:
    """P(K > x) of the Kolmogorov law."""
    if x < 0.2:
        return 1.0
    total = math.fsum((1 if i % 2 else -1) * math.exp(-2 * i * i * x * x) for i in range(1, 101))
    return min(1.0, max(0.0, 2 * total))
