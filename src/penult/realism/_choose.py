"""Which base for a head and its activations."""

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

from penult._progress import Progress, reporting
from penult.activations import Activations, _ActivationSource
from penult.bases import Base, Gaussian, Marginal, Sphere
from penult.distributions import Bank
from penult.head import Head
from penult.pair import GenerativePair
from penult.realism._compare import Examined, examine, measure
from penult.realism._matched_rows import halves, labelled_source, read_labels
from penult.realism._result import Comparison, Realism, columns, jsonable, number
from penult.realism._two_sample import require_sklearn

__all__ = ["CANDIDATES", "Candidate", "Ranked", "Ranking", "choose", "recommend"]

# --- Bases in order of realism, and the one to take ---------------------------------------------------------


_AUC = 0.03  # what a smaller law may lose in AUC,
_ENERGY = 0.01  # and in the energy coefficient


@dataclass(frozen=True)
class Ranked:
    """One candidate.

    Attributes:
        name: The candidate's name.
        base: Name of its base; empty where it failed.
        auc: AUC of each test; empty where it failed.
        worst_auc: The largest of them: the base by the test that tells it best.
        energy: Energy coefficient.
        floats: Numbers that the base keeps.
        seconds: What fitting took; never looked at in ranking.
        error: Why it could not be fitted or compared; None where it could.
        realism: All that was measured.
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
        """How far the largest AUC is above 0.5."""
        return 1.0 if self.worst_auc is None else max(self.worst_auc - 0.5, 0.0)


@dataclass(frozen=True)
class Ranking:
    """Candidates from the most to the least realistic, those that failed last; ``print`` shows a table.

    Attributes:
        best: Name of the recommended candidate.
        reason: Why, in a sentence with the numbers.
        rows: The candidates.
        real: Real activations against other real ones: what a perfect base would get.
        fitted_rows: Rows that each candidate was fitted to.
        held_out_rows: Rows that it was compared with.
    """

    best: str
    reason: str
    rows: tuple[Ranked, ...]
    real: Comparison
    fitted_rows: int
    held_out_rows: int

    def __getitem__(self, name: str) -> Ranked:
        """The candidate of a name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"there is no candidate {name!r}, only {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with every candidate's `Realism`; numbers that are not finite are None."""
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
    """The recommended candidate, the reason, and all candidates in order.

    The smallest law is taken whose largest AUC is within 0.03 of the best candidate's, where no candidate counts as
    better than real activations are; and, of these, whose energy coefficient is within 0.01 of the least. The second
    condition decides where every law is told apart so well that AUCs say no more.
    """
    order = [row for row in rows if row.error is None]
    order.sort(key=lambda row: (round(row.distance, 2), row.energy, row.floats, row.name))
    first = order[0]
    floor = max(real.auc[real.worst] - 0.5, 0.0)
    reached = max(min(row.distance for row in order), floor)
    close = [row for row in order if row.distance <= reached + _AUC]
    least = min(_energy(row) for row in close)
    close = [row for row in close if _energy(row) <= least + _ENERGY]
    best = min(close, key=lambda row: (row.floats, order.index(row)))
    reason = f"{best.name} keeps {best.floats:,} floats; {_told(best)}"
    if best is first:
        reason += ", the closest to real activations"
        smaller = [row for row in order if row is not best and (row.floats or 0) < (best.floats or 0)]
        if smaller:
            reason += f"; the closest smaller one is {smaller[0].name}, largest AUC {number(smaller[0].worst_auc)}"
            reason += f", energy {number(smaller[0].energy, 4)}"
    else:
        reason += f", close to what {first.name} reaches with {first.floats:,} floats: {_told(first)}"
    reason += f". Real against real: {number(real.auc[real.worst])}."
    if best.distance > 0.25:
        reason += " No candidate comes close: a classifier tells the draws of each from real activations."
    return best.name, reason, (*order, *(row for row in rows if row.error is not None))


def _energy(row: Ranked) -> float:
    return float("inf") if row.energy is None else row.energy


def _told(row: Ranked) -> str:
    test = max(row.auc, key=lambda name: row.auc[name])
    told = f"the best test ({test}) tells its draws with an AUC of {number(row.worst_auc)}"
    return f"{told}; energy {number(row.energy, 4)}"


# --- Bases to choose from -----------------------------------------------------------------------------------


Candidate: TypeAlias = Callable[[Head, Tensor | Activations], Base]
"""Fits a base to activations without labels: (head, activations) → base."""


def _sphere(head: Head, rows: Tensor | Activations, shape: Literal["round", "elliptic"] = "round") -> Base:
    return Sphere.fit(head, rows, shape=shape)


def _gaussian(head: Head, rows: Tensor | Activations) -> Base:
    return Gaussian.fit(head, rows)


def _marginal(head: Head, rows: Tensor | Activations, kind: Any) -> Base:
    return Marginal.fit(head, rows, kind=kind)


def _bank(head: Head, rows: Tensor | Activations) -> Base:
    """A row drawn twice would lie in both halves of a test, and give the draws away."""
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
"""What :func:`choose` fits by default: the original paper's round sphere, the elliptic sphere, the full Gaussian, and
the kinds of :class:`penult.Marginal`, its bank without replacement. The flow needs the extra ``flow``, and is left
out where that is not installed."""


_FITTED = 2 / 3  # of the rows; a bank without replacement needs more rows than it has to give


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
    """Fit candidate bases to two thirds of the activations, compare each with the rest, and recommend one.

    Candidates are ranked by the largest AUC among the three of :func:`compare` (to two digits), then by the
    energy coefficient. Recommended is the smallest law, in floats, whose largest AUC is within 0.03 of the best (where
    no candidate counts as better than real activations are) and, of these, whose energy coefficient is within 0.01 of
    the least. Fit it to all activations then; the ranking keeps no bases.

    Args:
        head: The head.
        activations: Activations (N, d) that the network was not trained on, best of all. For `Activations` with
            ``pre_activation``, marginals are fitted to u and draw max(u, 0); other bases are fitted to max(u, 0).
        labels: Their classes (N,), for the comparison alone, as in :func:`compare`; fitting never sees them.
        candidates: Name to ``fit(head, activations) -> Base``; `CANDIDATES` when left out. What they are given is a
            tensor if ``activations`` is one, else `Activations`.
        seed: Seed of the split, of draws and of tests. No global random state is touched.
        max_per_class: Rows of a class to compare, at most.
        progress: True for a bar on stderr, or what to call with the number of candidates done and of all.

    Warns:
        UserWarning: If the head gives the labels no more often than by guessing.

    Raises:
        ImportError: If scikit-learn is not installed (``pip install "penult[data]"``).
        TypeError: If an argument is of a wrong kind.
        ValueError: If shapes, labels or values do not fit the head, there are too few rows, or every candidate fails.
            One that fails alone is listed with its reason.

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
        raise TypeError(f"head must be a penult.Head, got {type(head).__name__}; see penult.find_head")
    if candidates is None:
        missing = () if importlib.util.find_spec("zuko") else ("flow",)
        candidates = {name: fit for name, fit in CANDIDATES.items() if name not in missing}
    if not candidates:
        raise ValueError("there are no candidates; pass name to fit(head, activations) -> Base, or None for CANDIDATES")
    generator = torch.Generator(head.weight.device).manual_seed(seed)
    held, source = read_labels(head, activations, labels, generator)
    fitting, held_out = halves(held.labels, _FITTED, torch.Generator().manual_seed(seed))
    rows, rest = (_picked(activations, index) for index in (fitting, held_out))
    if len(rows) < 2 or len(rest) < 1:
        raise ValueError(f"{len(held)} activations are too few to split; pass more")
    mine, other = labelled_source(rest, head, held.labels[held_out]), labelled_source(rows, head, held.labels[fitting])
    real = examine(mine, source, other, seed, max_per_class, limit=_limit(other))
    ranked = []
    with reporting(progress or False, streams=False, unit="candidates") as report:
        for done, (name, fit) in enumerate(candidates.items(), start=1):
            ranked.append(_ranked(name, fit, head, rows, real, seed))
            report(done, len(candidates))
    if all(row.error is not None for row in ranked):
        reasons = "; ".join(f"{row.name}: {row.error}" for row in ranked)
        raise ValueError(f"no candidate could be fitted and compared. {reasons}")
    sides = real.tell_apart(seed)
    against = sides.average or sides.pooled
    best, reason, order = recommend(ranked, against)
    return Ranking(best, reason, order, against, len(fitting), len(held_out))


def _picked(activations: Tensor | Activations, index: Tensor) -> Tensor | Activations:
    return activations[index.to(activations.device)] if isinstance(activations, Tensor) else activations[index]


def _limit(fitted: _ActivationSource) -> Tensor:
    """Half of the rows of each class (K,), by labels and by the head's own account.

    A bank without replacement then has two rows for each that it has to give.
    """
    head = fitted.head
    worth = torch.zeros(head.num_classes, dtype=torch.float64)
    for h in fitted:
        worth += head(h.to(head.weight.dtype)).float().softmax(-1).cpu().double().sum(0)
    counts = torch.bincount(fitted.labels, minlength=head.num_classes)
    return (torch.minimum(worth, counts.double()) / 2).ceil().long()


def _ranked(name: str, fit: Candidate, head: Head, rows: Tensor | Activations, real: Examined, seed: int) -> Ranked:
    start = time.perf_counter()
    try:
        with torch.enable_grad():  # a candidate may train
            base = fit(head, rows)
        seconds = time.perf_counter() - start
        if not isinstance(base, Base):
            raise TypeError(f"it gave a {type(base).__name__}, not a penult.bases.Base")
        result = measure(GenerativePair(head, base), real, seed)
    except Exception as error:  # whatever a candidate raises, the others are still worth comparing
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
    """Numbers that a base keeps beside the head."""
    count = getattr(base, "num_parameters", None)
    if isinstance(count, int):
        return count
    own = {id(t) for t in (head.weight, head.bias)} | {t.data_ptr() for t in (head.weight, head.bias) if t is not None}
    return sum(t.numel() for t in base.state_dict().values() if isinstance(t, Tensor) and t.data_ptr() not in own)
