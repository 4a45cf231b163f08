"""Laws of bases and of their pairs with heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from penult._checks import check_seed
from penult.bases import Base, Marginal, Sphere
from penult.head import Head
from penult.pair import GenerativePair
from penult.special import cosine_cdf
from penult.testing._laws import Law, LawReport, Z, fact, frequencies, kolmogorov, score, uniform

__all__ = ["check_base", "check_pair"]

# Number of logits that sampling one class of a `Marginal` may need, approximately.
_STREAM = 30_000_000
# The bar on a Kolmogorov-Smirnov p-value.
_P = 1e-4


def check_base(base: Base, head: Head | None = None, samples: int = 100_000, seed: int = 0) -> LawReport:
    """Check the laws that only a right M satisfies.

    With p(h|y) ∝ exp(w_y·h) m(h): p(h|y) integrates to one (by quadrature if the base has a rule, otherwise by
    importance sampling between tilts that are close to each other); the sample mean is ∇ log M; for joint samples
    (h, y) the class frequencies agree with softmax(head(h)); the posterior is the softmax; for a
    :class:`penult.Sphere` the radius and the cosine have the right distributions. A :class:`penult.Marginal` knows M
    only at the rows of the head, so ratios between tilts of other rows cannot be tested. Instead, the density of its
    pair must be that of its distribution, and the classes must have the right parts of it.

    Args:
        base: The base to check, in a precision of at least float32.
        head: The head whose rows tilt it. Default: a random head of three classes.
        samples: Number of samples for the Monte-Carlo laws; fewer are used if d is so large that they would not fit in
            memory.
        seed: Seed of head and samples.

    Returns:
        The laws.

    Raises:
        AssertionError: A law fails.
        ValueError: No head is given and the base has no fixed dimension, or the head has half precision.

    Example:
        >>> import penult
        >>> report = check_base(penult.Sphere(1.5), penult.Head(torch.eye(2)), samples=20_000)
        >>> print(report.laws[4].name, report.laws[4].passed)
        posterior equals softmax(head(h)) True
    """
    generator = torch.Generator().manual_seed(check_seed(seed))
    if head is None:
        if base.in_features is None:
            raise ValueError("head is None and this base has no fixed dimension; pass a head")
        kind = next((b.dtype for b in base.buffers() if b.is_floating_point()), torch.get_default_dtype())
        head = Head(torch.randn(3, base.in_features, generator=generator, device="cpu").to(kind))
    samples = min(samples, max(1000, 50_000_000 // head.in_features))
    pair = GenerativePair(head, base)
    laws = list(_pair_laws(pair, samples, generator))
    classes = torch.linspace(0, head.num_classes - 1, min(head.num_classes, 4), device="cpu").round().long()
    rows = head.centered_weight(classes)
    laws += _normalisation(base, rows)
    if isinstance(base, Marginal):
        laws += _marginal_laws(pair, classes, samples, generator)
    doubt = base.info.mgf_standard_error or 0.0
    for y, row in zip(classes.tolist(), rows, strict=True):
        tilt: Any = base.tilt(row)
        h = tilt.sample((_affordable_samples(pair, y, samples),), generator=generator)
        laws.append(_mean_law(base, row, h, f"mean of p(h|{y}) is the gradient of log M", doubt))
        if base.info.exact_mgf:
            laws.append(_mean_law_of_multiple(base, row, samples, y, generator))
        if base.info.has_density and not isinstance(base, Marginal):
            laws.append(_ratio_law(base, row, h, y))
        if isinstance(base, Sphere):
            laws += _sphere_laws(base, row, h, y)
    return LawReport(f"{base.info.name} base with {head}", tuple(laws)).raise_unless_passed()


def check_pair(pair: GenerativePair, samples: int = 100_000, seed: int = 0) -> LawReport:
    """Check a pair by its own joint samples: posterior, class frequencies, and consistency of its densities.

    Args:
        pair: The pair.
        samples: Number of joint samples.
        seed: Seed of the samples.

    Returns:
        The laws.

    Raises:
        AssertionError: A law fails.
        ValueError: The head has half precision.

    Example:
        >>> import penult
        >>> check_pair(penult.GenerativePair(penult.Head(torch.eye(3)), penult.Sphere(2.0))).passed
        True
    """
    laws = tuple(_pair_laws(pair, samples, torch.Generator().manual_seed(check_seed(seed))))
    return LawReport(f"pair of {pair.head} and {pair.base.info.name}", laws).raise_unless_passed()


def _pair_laws(pair: GenerativePair, samples: int, generator: torch.Generator) -> list[Law]:
    """Test the posterior, the class frequencies of joint samples, and the densities."""
    k = pair.head.num_classes
    if torch.finfo(pair.head.weight.dtype).bits < 32:
        raise ValueError(f"the head is {pair.head.weight.dtype}; expected at least float32. Use .float()")
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
        frequencies("joint draws have the softmax's class frequencies", y, softmax, doubt),
        frequencies("joint draws have the pair's prior", y, prior.expand(len(y), k)),
    ]


def _density_laws(pair: GenerativePair, h: Tensor, y: Tensor, softmax: Tensor, tight: float) -> list[Law]:
    """Test that the densities of a pair agree with each other, at its own samples."""
    joint = pair.log_joint(h)
    scale = float(joint.abs().max())
    bayes_error = float((joint.double().softmax(-1) - softmax).abs().max())
    few, classes = slice(1000), y[:1000]
    bayes = pair.prior.logits[classes] + pair.given(classes).log_prob(h[few])
    gap = float((bayes - joint[few].gather(-1, classes.unsqueeze(-1)).squeeze(-1)).abs().max()) / max(1.0, scale)
    total = float((joint.double().logsumexp(-1) - pair.log_prob(h).double()).abs().max()) / max(1.0, scale)
    loose = 1e-12 if h.dtype == torch.float64 else 1e-6
    # Log densities can be in the thousands, so their rounding errors can be large.
    rounded = max(tight, 2 * torch.finfo(joint.dtype).eps * scale)
    return [
        fact("log_prob is finite on the pair's own draws", bool(joint.isfinite().all())),
        Law("softmax of log_joint is the softmax", bayes_error, f"<= {rounded:.1g}", bayes_error <= rounded),
        Law("log_joint is log p(y) + log p(h|y)", gap, f"<= {loose * 10:g} of its size", gap <= loose * 10),
        Law("log_prob sums log_joint", total, f"<= {loose:g} of its size", total <= loose),
    ]


def _normalisation(base: Base, rows: Tensor) -> list[Law]:
    """Test by quadrature that p(h|y) integrates to one; no law if the base has no rule."""
    tilt = base.tilt(rows)
    error, before = math.inf, math.inf
    # The number of nodes grows until the rule has converged.
    for nodes in (64, 128, 256, 512, 1024):
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


def _ratio_law(base: Base, row: Tensor, h: Tensor, y: int) -> Law:
    """Test E_{p(h|w)}[p(h|w') / p(h|w)] = 1 for a w' close enough to w that the ratio has a small variance."""
    spread = float((h.double() @ row.double()).std())
    nearer = row * (1 - min(0.5, 0.5 / max(spread, 1e-12)))
    ratio = (base.tilt(nearer).log_prob(h).double() - base.tilt(row).log_prob(h).double()).exp()
    return score(f"p(h|w') / p(h|{y}) has mean one", (ratio - 1).unsqueeze(-1))


def _marginal_laws(pair: GenerativePair, classes: Tensor, samples: int, generator: torch.Generator) -> list[Law]:
    """Test that Z = Σ_y e^{b_y} M(w_y) is one, and that p(h|y) / p(h) has mean one under p(h)."""
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
    # For rarer classes there are too few samples.
    known = classes[prior[classes] * len(h) >= 100]
    if len(known):
        ratio = pair.head(h.to(pair.head.weight)).double().softmax(-1)[:, known] / prior[known]
        laws.append(score("p(h|y) / p(h) has mean one", ratio - 1, base.standard_error[known].double()))
    if base.info.has_density:
        few = h[:1000].to(pair.head.weight)
        density, expected = pair.log_prob(few).double(), base.law.log_prob(few).double()
        off, bar = float((density - expected).abs().max()), 1e-5 * max(1.0, float(expected.abs().max()))
        laws.append(Law("the pair's p(h) is the law's own density", off, f"<= {bar:.1g}", off <= bar))
    return laws


def _affordable_samples(pair: GenerativePair, y: int, samples: int) -> int:
    """Return the number of samples of a class; fewer for rare classes of a `Marginal`, which needs rejection."""
    if not isinstance(pair.base, Marginal):
        return samples
    return max(100, min(samples, int(_STREAM / pair.head.num_classes * float(pair.prior.probs[y]))))


def _mean_law(base: Base, row: Tensor, h: Tensor, name: str, doubt: float = 0.0) -> Law:
    """Test that the sample mean is ∇ log M; ``doubt`` is the relative standard error of M."""
    off = h.double() - _gradient(base, row).double()
    # A wrong M changes the mean along the row most.
    along = (off @ row.double()).unsqueeze(-1)
    off = torch.cat([off, along], dim=-1)
    return score(name, off, doubt * off.std(0))


def _mean_law_of_multiple(base: Base, row: Tensor, samples: int, y: int, generator: torch.Generator) -> Law:
    """Test the sample mean for a multiple of the row that is large enough to detect an error of 1 % of log M."""
    factor, last = 1.0, None
    while True:
        tilt: Any = base.tilt(factor * row)
        h = tilt.sample((samples,), generator)
        along = h.double() @ row.double()
        away = (along - along.median()).abs() > 1e-9 * along.abs().max()
        # Too few samples differ from the median, for example those of the rarer of two points.
        if last is not None and int(away.sum()) < 100:
            break
        last = factor, h
        expected = 0.01 * float(along.mean().abs() / (along.std() + 1e-300)) * math.sqrt(samples)
        if expected >= 2 * Z or factor >= 1 << 12:
            break
        factor *= 2
    factor, h = last
    return _mean_law(base, factor * row, h, f"the same for {factor:g} w_{y}")


def _gradient(base: Base, row: Tensor) -> Tensor:
    """Return the gradient of log M(w) at a row w, which is the mean of the tilt by w."""
    w = row.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(base.log_mgf(w), w)
    return gradient


def _sphere_laws(base: Sphere, row: Tensor, h: Tensor, y: int) -> list[Law]:
    """Test the distributions of the radius and of the cosine of a `Sphere`."""
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
        p = kolmogorov(largest)
        laws.append(Law(f"radii of p(h|{y}) follow their law", p, f"p > {_P:g}", p > _P))
    if m > 1 and float(kappa.min()) > 0:
        t = base.cosine(h.double(), row.double().expand(h.shape))
        p = uniform(cosine_cdf(m, r * (kappa / radius)[0], t))
        laws.append(Law(f"cosines of p(h|{y}) follow their law", p, f"p > {_P:g}", p > _P))
    return laws
