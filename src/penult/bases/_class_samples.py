"""Class draws from a marginal law: draw activations, draw their classes, and keep what is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from penult.head import Head
from penult.special import in_double, outside_transforms, working_dtype

__all__ = ["MOST_DRAWS", "RowIndex", "accept", "block_size", "class_means", "expected_posterior", "pick"]

MOST_DRAWS = 1 << 28  # expected for one call, at most
_ELEMENTS = 1 << 23  # activations and logits in memory at a time


def block_size(head: Head) -> int:
    """How many activations to look at at a time."""
    return max(256, _ELEMENTS // (head.in_features + head.num_classes))


def accept(
    head: Head,
    draw: Callable[[int], Tensor],
    classes: Tensor,
    counts: Tensor,
    prior: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Activations of classes: those h of a stream h ~ p, y ~ softmax(h) with the right y, first come first kept.

    Args:
        head: The head.
        draw: Gives (n, d) independent draws of p.
        classes: Different classes (R,).
        counts: How many draws of each (R,).
        prior: Their probabilities E_p[softmax] (R,); they decide how many are drawn at a time, and nothing else.
        generator: Source of randomness for the classes, or None for torch's default.

    Returns:
        (sum of counts, d), those of the first class first.

    Raises:
        ValueError: If the draws of a class are expected to take more than `MOST_DRAWS` of the law.
        RuntimeError: If they take a hundred times what was expected, so that the prior cannot be right.
    """
    expected = in_double(counts) / in_double(prior)
    if float(expected.max()) > MOST_DRAWS:
        worst = int(expected.argmax())
        raise ValueError(
            f"class {int(classes[worst])} has prior {float(prior[worst]):.2g} under this base: "
            f"{int(counts[worst])} draws of it would take some {float(expected[worst]):.1g} draws of activations. Ask "
            "for fewer, fit the base to activations among which the class occurs, or keep them as a Bank, which draws "
            "any class at once"
        )
    kept: list[list[Tensor]] = [[] for _ in classes]
    missing, size, drawn = counts.tolist(), block_size(head), 0
    most = max(1 << 20, 100 * float(expected.max()))
    while any(missing):
        wanted = [r for r, number in enumerate(missing) if number]
        likely = max(missing[r] / float(prior[r]) for r in wanted)
        if drawn > most:
            raise RuntimeError(
                f"{drawn} draws gave too few of class {int(classes[wanted[0]])}, which should have prior "
                f"{float(prior[wanted[0]]):.2g}: the prior of this base is not that of its law; fit the base anew"
            )
        h = draw(min(size, max(math.ceil(1.05 * likely) + 32, drawn // 16)))  # more, where they were long in vain
        drawn += len(h)
        p = _posterior(head, h, classes[wanted]).cumsum(-1)
        u = torch.rand(len(h), 1, dtype=p.dtype, device=p.device, generator=generator)
        label = (p <= u).sum(-1)  # len(wanted) for all other classes
        parts = h[label.argsort(stable=True)].split(label.bincount(minlength=len(wanted) + 1).tolist())
        for r, part in zip(wanted, parts, strict=False):
            part = part[: missing[r]]
            kept[r].append(part.clone())  # the whole block would stay in memory with it
            missing[r] -= len(part)
    return torch.cat([part for parts in kept for part in parts])


def pick(
    head: Head, rows: Tensor, classes: Tensor, counts: Tensor, replacement: bool, generator: torch.Generator | None
) -> Tensor:
    """Activations of classes from finitely many rows: row i of class y with probability ∝ softmax_y(h_i).

    Args:
        head: The head.
        rows: Activations (N, d).
        classes: Different classes (R,).
        counts: How many draws of each (R,).
        replacement: Whether a row may serve a class more than once.
        generator: Source of randomness, or None for torch's default.

    Returns:
        (sum of counts, d), those of the first class first.

    Raises:
        ValueError: If, without replacement, more rows of a class are asked for than the rows are worth of it.
    """
    parts = []
    dtype, work = torch.promote_types(rows.dtype, torch.float32), working_dtype(rows.device)
    blocks = rows.split(block_size(head))
    total = torch.cat([head.centered_logits(block.to(dtype)).logsumexp(-1) for block in blocks])
    at_once = max(1, _ELEMENTS // len(rows))
    for batch, numbers in zip(classes.split(at_once), counts.split(at_once), strict=True):
        weight, bias = head.centered_weight(batch).to(dtype), head.full_bias[batch].to(dtype)
        logits = torch.cat([block.to(dtype) @ weight.T + bias for block in blocks])
        share = (logits - total.unsqueeze(-1)).to(work).exp().T
        for y, n, p in zip(batch.tolist(), numbers.tolist(), share, strict=True):
            worth = float(p.sum())
            if not replacement and n > math.ceil(worth):
                raise ValueError(
                    f"{n} draws of class {y} without replacement were asked of a Bank that is worth {worth:.1f} rows "
                    "of it; ask for fewer, or allow replacement"
                )
            parts.append(torch.multinomial(p, n, replacement=replacement, generator=generator))
    return rows[torch.cat(parts)]


def expected_posterior(head: Head, blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of softmax(head(h)) over activations (K,), and its standard error relative to it (K,)."""
    total = square = None
    count = 0
    for h in blocks:
        p, work = head.centered_logits(h).softmax(-1), working_dtype(h.device)
        first, second = p.sum(0, dtype=work), p.square().sum(0, dtype=work)
        total = first if total is None else total + first
        square = second if square is None else square + second
        count += len(h)
    assert total is not None
    assert square is not None
    mean = total / total.sum()  # which is the count, but for rounding
    tiny = torch.finfo(mean.dtype).tiny
    return mean, ((square / count - mean.square()).clamp_min(0) / count).sqrt() / mean.clamp_min(tiny)


def class_means(head: Head, blocks: Iterable[Tensor], classes: Tensor) -> Tensor:
    """Σ_i softmax_y(h_i) h_i / Σ_i softmax_y(h_i) for classes (R,): the mean of p(h|y), (R, d)."""
    mass = total = None
    for h in blocks:
        p = _posterior(head, h, classes)
        mass = p.sum(0) if mass is None else mass + p.sum(0)
        part = p.T @ h.to(p.dtype)
        total = part if total is None else total + part
    assert mass is not None
    assert total is not None
    return total / mass.unsqueeze(-1)


def _posterior(head: Head, h: Tensor, classes: Tensor) -> Tensor:
    """Softmax_y(head(h)) of classes (R,), (n, R), in the precision in which small probabilities add up."""
    logits = head.centered_logits(h)
    log_p = logits[:, classes] - logits.logsumexp(-1, keepdim=True)
    return log_p.to(working_dtype(h.device)).exp()


# --- Which class of a head a given row belongs to -----------------------------------------------------------


_SEARCHED = 4  # neighbours looked at on either side of a row's place


class RowIndex:
    """Finds rows of a head among its centered rows, in O(log K) each and without a second W.

    Rows are ordered by their product with one fixed vector; those of equal product are compared in full.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._weight, self._version = head.weight, head.version
        d = head.in_features
        # No random numbers, which torch.func.vmap would refuse.
        with nullcontext() if torch.compiler.is_compiling() else outside_transforms():
            self._probe = torch.sin(torch.arange(1, d + 1, dtype=torch.float64).square())
            keys = torch.cat([self._keys(rows) for _, rows in head.centered_blocks()])
            self._keys_sorted, self._order = keys.sort()

    def current(self, head: Head) -> bool:
        """Whether it is that of this head as it is now."""
        same = self._head is head and self._weight is head.weight
        return same and (torch.compiler.is_compiling() or self._version == head.version)  # no versions while it traces

    def classes(self, weight: Tensor) -> Tensor:
        """The classes of rows (*B, d), (*B,); −1 for a row that is not the head's."""
        rows = weight.detach().reshape(-1, weight.shape[-1])
        narrow = min(rows.dtype, self._head.weight.dtype, key=lambda dtype: dtype.itemsize)
        eps = torch.finfo(torch.promote_types(narrow, torch.float32)).eps
        place = torch.searchsorted(self._keys_sorted, self._keys(rows))
        found = torch.full_like(place, -1)
        nearest = torch.full_like(place, torch.inf, dtype=torch.float32)
        for step in range(-_SEARCHED, _SEARCHED):
            candidate = self._order[(place + step).clamp(0, len(self._order) - 1)]
            theirs = self._head.centered_weight(candidate)
            off = (rows.to(theirs.dtype) - theirs).abs().amax(-1).float()
            # Rows are differences with the mean row, whose rounding they carry.
            scale = theirs.abs().amax(-1) + self._head.mean_row.abs().amax()
            better = (off <= 16 * eps * scale) & (off < nearest)
            found, nearest = torch.where(better, candidate, found), torch.where(better, off, nearest)
        return found.reshape(weight.shape[:-1])

    def _keys(self, rows: Tensor) -> Tensor:
        if rows.device.type == "mps":
            return (rows.cpu().double() @ self._probe).float().to(rows.device)
        return rows.double() @ self._probe.to(rows.device)
