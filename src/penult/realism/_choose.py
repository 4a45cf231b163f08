"""Which base for a head and its activations."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from penult._progress import Progress, reporting
from penult.activations import Activations
from penult.bases import Base
from penult.head import Head
from penult.pair import GenerativePair
from penult.realism._candidates import CANDIDATES, Candidate
from penult.realism._compare import measure
from penult.realism._examined import Examined, examine
from penult.realism._ranking import Ranked, Ranking, recommend
from penult.realism._rows import Labelled, halves, read_labels
from penult.realism._tests import require_sklearn

__all__ = ["choose"]

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
    mine, other = Labelled(head, rest, held.labels[held_out]), Labelled(head, rows, held.labels[fitting])
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


def _limit(fitted: Labelled) -> Tensor:
    """Half of the rows of each class (K,), by labels and by the head's own account.

    A bank without replacement then has two rows for each that it has to give.
    """
    head = fitted.head
    worth = torch.zeros(head.num_classes, dtype=torch.float64)
    for h, _ in fitted:
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
