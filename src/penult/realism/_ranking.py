"""Bases in order of realism, and the one to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penult.realism._result import Comparison, Realism, jsonable
from penult.realism._table import columns, number

__all__ = ["Ranked", "Ranking", "recommend"]

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
