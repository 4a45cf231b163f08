"""Samples of classes from a marginal distribution, by sampling activations and then their labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from penult._row_blocks import readable
from penult.head import Head
from penult.special import in_double, outside_transforms, working_dtype

__all__ = ["MOST_DRAWS", "RowIndex", "accept", "block_size", "class_means", "expected_posterior", "pick"]

# Largest expected number of samples of the marginal for one call.
MOST_DRAWS = 1 << 28
# Number of floats of activations and logits that are in memory at a time.
_ELEMENTS = 1 << 23


def block_size(head: Head) -> int:
    """Return the number of activations to process at a time."""
    return max(256, _ELEMENTS // (head.in_features + head.num_classes))


def accept(
    head: Head,
    draw: Callable[[int], Tensor],
    classes: Tensor,
    counts: Tensor,
    prior: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Sample activations of classes by rejection: from a stream h ~ p, y ~ softmax(h), keep the first of each class.

    Args:
        head: The head.
        draw: Function n -> (n, d) of independent samples of p.
        classes: Different classes (R,).
        counts: Number of samples of each (R,).
        prior: Probabilities E_p[softmax] (R,) of these classes. They only determine how many samples of p are made at
            a time.
        generator: Source of randomness for the labels. Default: the global one of torch.

    Returns:
        (sum of counts, d), those of the first class first.

    Raises:
        ValueError: The samples of a class are expected to take more than `MOST_DRAWS` samples of p.
        RuntimeError: The samples take a hundred times the expected number, so the prior cannot be right.
    """
    expected = in_double(counts) / in_double(prior)
    if float(expected.max()) > MOST_DRAWS:
        worst = int(expected.argmax())
        raise ValueError(
            f"class {int(classes[worst])} has prior {float(prior[worst]):.2g} under this base: {int(counts[worst])} "
            f"samples of it would take about {float(expected[worst]):.1g} samples of the marginal. Sample fewer, fit "
            "the base to activations in which the class occurs, or keep them as a Bank, which rejects no samples"
        )
    kept: list[list[Tensor]] = [[] for _ in classes]
    missing, size, drawn = counts.tolist(), block_size(head), 0
    most = max(1 << 20, 100 * float(expected.max()))
    while any(missing):
        wanted = [r for r, number in enumerate(missing) if number]
        likely = max(missing[r] / float(prior[r]) for r in wanted)
        if drawn > most:
            raise RuntimeError(
                f"{drawn} samples contain too few of class {int(classes[wanted[0]])}; expected a fraction of "
                f"{float(prior[wanted[0]]):.2g}. The prior of this base is not that of its distribution: fit the base "
                "again"
            )
        # The number grows with the samples made so far, in case the class is rarer than its prior.
        h = draw(min(size, max(math.ceil(1.05 * likely) + 32, drawn // 16)))
        drawn += len(h)
        p = _posterior(head, h, classes[wanted]).cumsum(-1)
        u = torch.rand(len(h), 1, dtype=p.dtype, device=p.device, generator=generator)
        # All classes that are not wanted have the label len(wanted).
        label = (p <= u).sum(-1)
        parts = h[label.argsort(stable=True)].split(label.bincount(minlength=len(wanted) + 1).tolist())
        for r, part in zip(wanted, parts, strict=False):
            part = part[: missing[r]]
            # A view would keep the whole block in memory.
            kept[r].append(part.clone())
            missing[r] -= len(part)
    return torch.cat([part for parts in kept for part in parts])


def pick(
    head: Head, rows: Tensor, classes: Tensor, counts: Tensor, replacement: bool, generator: torch.Generator | None
) -> Tensor:
    """Sample rows of a finite set for classes: row i for class y with probability ∝ softmax_y(h_i).

    Args:
        head: The head.
        rows: Activations (N, d).
        classes: Different classes (R,).
        counts: Number of samples of each (R,).
        replacement: Whether a row may be sampled more than once for a class.
        generator: Source of randomness. Default: the global one of torch.

    Returns:
        (sum of counts, d), those of the first class first.

    Raises:
        ValueError: Without replacement, more samples of a class are asked for than the head expects rows of it, which
            is the sum of its probabilities over the rows.
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
            expected = float(p.sum())
            if not replacement and n > math.ceil(expected):
                raise ValueError(
                    f"the number of samples of class {y} without replacement is {n}; expected at most "
                    f"{math.ceil(expected)}, since the head expects {expected:.1f} rows of this class in the Bank. "
                    "Sample fewer, or allow replacement"
                )
            parts.append(torch.multinomial(p, n, replacement=replacement, generator=generator))
    return rows[torch.cat(parts)]


def expected_posterior(head: Head, blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of softmax(head(h)) over activations (K,), and its relative standard error (K,)."""
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
    # The sum equals the count up to rounding, which this division removes.
    mean = total / total.sum()
    tiny = torch.finfo(mean.dtype).tiny
    return mean, ((square / count - mean.square()).clamp_min(0) / count).sqrt() / mean.clamp_min(tiny)


def class_means(head: Head, blocks: Iterable[Tensor], classes: Tensor) -> Tensor:
    """Return the mean Σ_i softmax_y(h_i) h_i / Σ_i softmax_y(h_i) of p(h|y) for classes (R,): (R, d)."""
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
    """Return softmax_y(head(h)) of classes (R,): (n, R), in a precision that can sum small probabilities."""
    logits = head.centered_logits(h)
    log_p = logits[:, classes] - logits.logsumexp(-1, keepdim=True)
    return log_p.to(working_dtype(h.device)).exp()


# --- The class of a row of W --------------------------------------------------------------------------------


# Number of neighbours on either side that a row is compared with.
_NEIGHBOURS = 4


class RowIndex:
    """Index that finds the class of a centered row of a head, in O(log K) time and without a copy of W.

    Rows are sorted by their product with a fixed vector; rows with close products are compared in all entries.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._weight, self._version = head.weight, head.version
        d = head.in_features
        # The vector is not random, since torch.func.vmap refuses random numbers.
        with nullcontext() if torch.compiler.is_compiling() else outside_transforms():
            self._probe = torch.sin(torch.arange(1, d + 1, dtype=torch.float64, device="cpu").square())
            keys = torch.cat([self._keys(rows) for _, rows in head.centered_blocks()])
            self._keys_sorted, self._order = keys.sort()

    def current(self, head: Head) -> bool:
        """Return whether this is the index of a head in its current version."""
        same = self._head is head and self._weight is head.weight
        # Versions are not known while torch.compile traces.
        return same and (not readable(head.weight) or self._version == head.version)

    def classes(self, weight: Tensor) -> Tensor:
        """Return the classes (*B,) of rows (*B, d); −1 for a row that is not in the head."""
        rows = weight.detach().reshape(-1, weight.shape[-1])
        narrow = min(rows.dtype, self._head.weight.dtype, key=lambda dtype: dtype.itemsize)
        eps = torch.finfo(torch.promote_types(narrow, torch.float32)).eps
        position = torch.searchsorted(self._keys_sorted, self._keys(rows))
        classes = torch.full_like(position, -1)
        smallest = torch.full_like(position, torch.inf, dtype=torch.float32)
        for step in range(-_NEIGHBOURS, _NEIGHBOURS):
            candidate = self._order[(position + step).clamp(0, len(self._order) - 1)]
            head_rows = self._head.centered_weight(candidate)
            error = (rows.to(head_rows.dtype) - head_rows).abs().amax(-1).float()
            # Centered rows have the rounding errors of the mean row, which was subtracted.
            scale = head_rows.abs().amax(-1) + self._head.mean_row.abs().amax()
            better = (error <= 16 * eps * scale) & (error < smallest)
            classes, smallest = torch.where(better, candidate, classes), torch.where(better, error, smallest)
        return classes.reshape(weight.shape[:-1])

    def _keys(self, rows: Tensor) -> Tensor:
        if rows.device.type == "mps":
            return (rows.cpu().double() @ self._probe).float().to(rows.device)
        return rows.double() @ self._probe.to(rows.device)
