"""Choice of a base for a head and its activations."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from penult._checks import as_activations, check_seed, described
from penult._progress import Progress, reporting
from penult.activations import Activations, _ActivationSource
from penult.bases import Base, Gaussian, Marginal, Sphere
from penult.distributions import Bank
from penult.head import Head
from penult.pair import GenerativePair
from penult.realism._compare import RealStatistics, measure, measure_real
from penult.realism._matched_rows import labelled_source, source_with_labels, split_by_class
from penult.realism._result import Comparison, Realism, columns, jsonable, number
from penult.realism._two_sample import require_sklearn

__all__ = ["CANDIDATES", "Candidate", "Ranked", "Ranking", "choose", "recommend"]

# --- ranking and recommendation -----------------------------------------------------------------------------


# How much worse than the best candidate a smaller base may be: in AUC, and in the energy coefficient.
_AUC_MARGIN = 0.03
_ENERGY_MARGIN = 0.01


@dataclass(frozen=True)
class Ranked:
    """Result for one candidate.

    Attributes:
        name: Name of the candidate.
        base: Name of its base; empty if it failed.
        auc: AUC of each test; empty if it failed.
        worst_auc: The largest of these AUCs.
        energy: Energy coefficient.
        floats: Number of values that the base stores.
        seconds: Time of the fit; not used for ranking.
        error: Reason why the candidate could not be fitted or compared; None if it could.
        realism: The complete comparison.
    """

    name: str
    base: str = ""
    auc: Mapping[str, float] = field(default_factory=dict)
    worst_auc: float | None = None
    energy: float | None = None
    floats: int | None = None
    seconds: float | None = field(default=None, compare=False)
    error: str | None = None
    realism: Realism | None = field(default=None, repr=False)

    @property
    def distance(self) -> float:
        """How far the largest AUC is above 0.5; 1 if the candidate failed."""
        return 1.0 if self.worst_auc is None else max(self.worst_auc - 0.5, 0.0)


@dataclass(frozen=True)
class Ranking:
    """Candidates from the most to the least realistic, failed ones last; ``print`` shows a table.

    Attributes:
        best: Name of the recommended candidate.
        reason: Reason for the recommendation, in a sentence with the numbers.
        rows: The candidates.
        real: Real activations against other real ones, the result of a perfect base.
        fitted_rows: Number of rows that each candidate was fitted to.
        held_out_rows: Number of rows that it was compared with.
    """

    best: str
    reason: str
    rows: tuple[Ranked, ...]
    real: Comparison
    fitted_rows: int
    held_out_rows: int

    def __getitem__(self, name: str) -> Ranked:
        """Return the candidate with a name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"there is no candidate {name!r}, only {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON, with the `Realism` of each candidate; numbers that are not finite are None."""
        result: dict[str, Any] = jsonable(self)
        for entry, row in zip(result["rows"], self.rows, strict=True):
            entry["realism"] = None if row.realism is None else row.realism.to_dict()
        return result

    def __str__(self) -> str:
        names = list(self.real.auc)
        table = [["candidate", *(f"AUC {name}" for name in names), "largest", "energy", "floats", "seconds", ""]]
        for row in self.rows:
            if row.error is not None:
                table.append([row.name, *["-"] * (len(names) + 4), ""])
                continue
            table.append(
                [
                    row.name,
                    *(number(row.auc[name]) for name in names),
                    number(row.worst_auc),
                    number(row.energy, 4),
                    "-" if row.floats is None else f"{row.floats:,}",
                    number(row.seconds, 1),
                    "<- best" if row.name == self.best else "",
                ]
            )
        aucs = [number(self.real.auc[name]) for name in names]
        worst = number(self.real.auc[self.real.worst])
        table.append(["real activations", *aucs, worst, number(self.real.energy, 4), "-", "-", ""])
        failed = [f"{row.name} could not be compared: {row.error}" for row in self.rows if row.error is not None]
        lines = [line.rstrip() for line in columns(table)]
        first = f"bases fitted to {self.fitted_rows} activations and compared with {self.held_out_rows} others"
        return "\n".join([first, *lines, *failed, self.reason])


def recommend(rows: list[Ranked], real: Comparison) -> tuple[str, str, tuple[Ranked, ...]]:
    """Return the name of the recommended candidate, the reason, and all candidates in order.

    The recommended candidate is the smallest base, in floats, whose largest AUC is within 0.03 of the best candidate's
    (or of real activations, if these have a larger one) and, among these, whose energy coefficient is within 0.01 of
    the smallest. The second condition decides if a classifier separates the samples of all bases almost perfectly.
    """
    order = [row for row in rows if row.error is None]
    order.sort(key=lambda row: (round(row.distance, 2), row.energy, row.floats, row.name))
    first = order[0]
    real_distance = max(real.auc[real.worst] - 0.5, 0.0)
    smallest_distance = max(min(row.distance for row in order), real_distance)
    close = [row for row in order if row.distance <= smallest_distance + _AUC_MARGIN]
    smallest_energy = min(_energy(row) for row in close)
    close = [row for row in close if _energy(row) <= smallest_energy + _ENERGY_MARGIN]
    best = min(close, key=lambda row: (row.floats, order.index(row)))
    reason = f"{best.name} stores {best.floats:,} floats; {_figures(best)}"
    if best is first:
        reason += ", the closest to real activations"
        smaller = [row for row in order if row is not best and (row.floats or 0) < (best.floats or 0)]
        if smaller:
            reason += f"; the closest smaller one is {smaller[0].name}, largest AUC {number(smaller[0].worst_auc)}"
            reason += f", energy {number(smaller[0].energy, 4)}"
    else:
        reason += f", close to {first.name} with {first.floats:,} floats: {_figures(first)}"
    reason += f". Real against real: {number(real.auc[real.worst])}."
    if best.distance > 0.25:
        reason += " No candidate comes close: a classifier separates the samples of each from real activations."
    return best.name, reason, (*order, *(row for row in rows if row.error is not None))


def _energy(row: Ranked) -> float:
    return float("inf") if row.energy is None else row.energy


def _figures(row: Ranked) -> str:
    test = max(row.auc, key=lambda name: row.auc[name])
    return f"largest AUC {number(row.worst_auc)} ({test}), energy {number(row.energy, 4)}"


# --- default candidates -------------------------------------------------------------------------------------


Candidate: TypeAlias = Callable[[Head, Tensor | Activations], Base]
"""Fits a base to activations without labels: (head, activations) → base."""


def _sphere(head: Head, rows: Tensor | Activations, shape: Literal["round", "elliptic"] = "round") -> Base:
    return Sphere.fit(head, rows, shape=shape)


def _gaussian(head: Head, rows: Tensor | Activations) -> Base:
    return Gaussian.fit(head, rows)


def _marginal(head: Head, rows: Tensor | Activations, kind: Any) -> Base:
    return Marginal.fit(head, rows, kind=kind)


def _bank(head: Head, rows: Tensor | Activations) -> Base:
    """Fit a bank without replacement: a row sampled twice could be in both training and test rows of a classifier."""
    bank = Marginal.fit(head, rows, kind="bank").distribution
    return Marginal(head, Bank(bank.activations, replacement=False, rectified=bank.rectified))


CANDIDATES: Mapping[str, Candidate] = MappingProxyType(
    {
        "sphere": _sphere,
        "elliptic": partial(_sphere, shape="elliptic"),
        "gaussian": _gaussian,
        "class": partial(_marginal, kind="class"),
        "mixture": partial(_marginal, kind="mixture"),
        "flow": partial(_marginal, kind="flow"),
        "bank": _bank,
    }
)
"""Default candidates of :func:`choose`: the round sphere of the original paper, the elliptic sphere, the full Gaussian,
and the kinds of :class:`penult.Marginal`, with a bank without replacement. The flow needs the extra ``flow``, and is
left out if that is not installed."""


# Fraction of the rows that candidates are fitted to. It is above one half because a bank without replacement needs
# more rows than are sampled from it.
_FITTED = 2 / 3


@torch.no_grad()
def choose(
    head: Head,
    activations: Tensor | Activations,
    labels: Tensor | Sequence[int] | None = None,
    *,
    candidates: Mapping[str, Candidate] | None = None,
    seed: int = 0,
    max_per_class: int = 400,
    progress: Progress | bool | None = None,
) -> Ranking:
    """Fit candidate bases to two thirds of the activations, compare each with the others, and recommend one.

    Candidates are ranked by the largest of the three AUCs of :func:`compare` (to two digits), then by the energy
    coefficient. The recommended candidate is the smallest base, in floats, whose largest AUC is within 0.03 of the best
    candidate's (or of real activations, if these have a larger one) and, among these, whose energy coefficient is
    within 0.01 of the smallest. Afterwards fit the recommended base to all activations; the ranking stores no bases.

    Args:
        head: The head.
        activations: Activations (N, d), preferably of inputs that the network was not trained on. For `Activations`
            with ``pre_activation``, marginals are fitted to u and sample max(u, 0); other bases use max(u, 0).
        labels: Their classes (N,), only for the comparison, as in :func:`compare`; they are not used for fitting.
        candidates: Functions ``fit(head, activations) -> Base`` by name. Default: `CANDIDATES`. They get a tensor if
            ``activations`` is one, else `Activations`.
        seed: Seed of the split, of samples and of tests. No global random state is touched.
        max_per_class: Most rows of a class to compare.
        progress: True for a bar on stderr, or a function of the number of finished candidates and of all candidates.

    Warns:
        UserWarning: The accuracy of the head is at chance level.

    Raises:
        ImportError: scikit-learn is not installed (``pip install "penult[data]"``).
        TypeError: An argument has a wrong type.
        ValueError: Shapes, labels or values do not fit the head, there are too few rows, or all candidates fail. If
            only some fail, the ranking lists them with the reason.

    Example:
        >>> head = penult.Head(3 * torch.eye(3))
        >>> h = torch.randn(900, 3, generator=torch.Generator().manual_seed(0))
        >>> few = {name: CANDIDATES[name] for name in ("sphere", "gaussian")}
        >>> ranking = choose(head, h, candidates=few)
        >>> [row.name for row in ranking.rows], ranking["gaussian"].floats
        (['gaussian', 'sphere'], 12)
    """
    require_sklearn()
    if not isinstance(head, Head):
        raise TypeError(f"head is {described(head)}; expected a penult.Head. See penult.find_head")
    if candidates is None:
        missing = () if importlib.util.find_spec("zuko") else ("flow",)
        candidates = {name: fit for name, fit in CANDIDATES.items() if name not in missing}
    if not candidates:
        raise ValueError("there are no candidates; pass name to fit(head, activations) -> Base, or None for CANDIDATES")
    seed = check_seed(seed)
    if not isinstance(activations, Activations):
        activations = as_activations(activations, "activations", "(N, d) or penult.Activations")
    generator = torch.Generator(head.weight.device).manual_seed(seed)
    source, label_origin = source_with_labels(head, activations, labels, generator)
    fit_index, test_index = split_by_class(source.labels, _FITTED, torch.Generator().manual_seed(seed))
    fit_rows, test_rows = (_rows_at(activations, index) for index in (fit_index, test_index))
    if len(fit_rows) < 2 or len(test_rows) < 1:
        raise ValueError(f"{len(source)} activations are too few to split; pass more")
    fit_source = labelled_source(fit_rows, head, source.labels[fit_index])
    test_source = labelled_source(test_rows, head, source.labels[test_index])
    real = measure_real(test_source, label_origin, fit_source, seed, max_per_class, limits=_limits(fit_source))
    ranked = []
    with reporting(progress or False, streams=False, unit="candidates") as report:
        for done, (name, fit) in enumerate(candidates.items(), start=1):
            ranked.append(_ranked(name, fit, head, fit_rows, real, seed))
            report(done, len(candidates))
    if all(row.error is not None for row in ranked):
        reasons = "; ".join(f"{row.name}: {row.error}" for row in ranked)
        raise ValueError(f"no candidate could be fitted and compared. {reasons}")
    tests = real.two_sample_tests(seed)
    real_comparison = tests.average or tests.pooled
    best, reason, order = recommend(ranked, real_comparison)
    return Ranking(best, reason, order, real_comparison, len(fit_index), len(test_index))


def _rows_at(activations: Tensor | Activations, index: Tensor) -> Tensor | Activations:
    return activations[index.to(activations.device)] if isinstance(activations, Tensor) else activations[index]


def _limits(source: _ActivationSource) -> Tensor:
    """Return half the number of rows of each class (K,): by labels, or as expected by the head if that is less.

    A bank without replacement then has twice as many rows of a class as are sampled from it.
    """
    head = source.head
    expected_counts = torch.zeros(head.num_classes, dtype=torch.float64, device="cpu")
    for h in source:
        expected_counts += head(h.to(head.weight.dtype)).float().softmax(-1).cpu().double().sum(0)
    counts = torch.bincount(source.labels, minlength=head.num_classes)
    return (torch.minimum(expected_counts, counts.double()) / 2).ceil().long()


def _ranked(
    name: str, fit: Candidate, head: Head, rows: Tensor | Activations, real: RealStatistics, seed: int
) -> Ranked:
    """Fit a candidate and compare it with the real activations."""
    start = time.perf_counter()
    try:
        # A candidate may train by gradients.
        with torch.enable_grad():
            base = fit(head, rows)
        seconds = time.perf_counter() - start
        if not isinstance(base, Base):
            raise TypeError(f"it returned {described(base)}, not a penult.bases.Base")
        result = measure(GenerativePair(head, base), real, seed)
    # A candidate may raise any error, and the other candidates are still compared.
    except Exception as error:
        return Ranked(name, error=f"{type(error).__name__}: {error}")
    return Ranked(
        name,
        base=result.base,
        auc=result.auc,
        worst_auc=result.worst_auc,
        energy=result.energy,
        floats=_floats(base, head),
        seconds=seconds,
        realism=result,
    )


def _floats(base: Base, head: Head) -> int:
    """Return the number of values that a base stores, without those of the head."""
    count = getattr(base, "num_parameters", None)
    if isinstance(count, int):
        return count
    of_head = {t.data_ptr() for t in (head.weight, head.bias) if t is not None}
    return sum(t.numel() for t in base.state_dict().values() if isinstance(t, Tensor) and t.data_ptr() not in of_head)
