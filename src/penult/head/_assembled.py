"""Heads that a model assembles from several products: chosen or joined classes, and weighted sums of logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from penult._row_blocks import rows_in_double
from penult.head._match import class_axes, is_log_softmax, relative_error
from penult.head._record import Candidate
from penult.special import in_double

__all__ = ["Assembly", "assemblies"]

# Numbers of products whose classes are compared with those of the logits, and whose sums are tried, at most.
_MAX_PRODUCTS, _MAX_SUMMANDS = 1024, 8

# Number of values of the logits that are compared; all of them are compared with the final head.
_MAX_VALUES = 2**22


@dataclass(frozen=True, eq=False)
class Assembly:
    """One affine map of several activations, concatenated, that gives the logits.

    Attributes:
        parts: One product for each of the different activations; h is theirs, concatenated.
        sources: All products that W and b were computed from.
        weight: (K, d), d the sum of the widths of the parts.
        bias: (K,), or None.
        class_axis: Axis of the classes in the model's own output.
        log_softmax: Whether a log-softmax follows.
        residual: As that of a `Match`.
    """

    parts: tuple[Candidate, ...]
    sources: tuple[Candidate, ...]
    weight: Tensor
    bias: Tensor | None
    class_axis: int
    log_softmax: bool
    residual: float

    @property
    def h(self) -> Tensor:
        """The concatenated activations (*S, d)."""
        return torch.cat([part.product.h.to(self.weight.dtype) for part in self.parts], dim=-1)


@dataclass(frozen=True, eq=False)
class _Term:
    """A summand of the logits: W (K, d) and b (K,) that are computed from those of a product, and its h."""

    candidate: Candidate
    weight: Tensor
    bias: Tensor | None


def assemblies(candidates: Sequence[Candidate], logits: Tensor) -> Iterator[Assembly]:
    """Yield the assemblies that may give a model's logits; a second batch has to confirm them.

    Args:
        candidates: All products of the model, of any number of classes.
        logits: The model's output.
    """
    for axis in class_axes(logits, logits.shape[-1]) if logits.ndim < 3 else (-1, 1):
        target = logits.movedim(axis, -1)
        usable = [candidate for candidate in candidates if candidate.product.h.shape[:-1] == target.shape[:-1]]
        usable = sorted(usable, key=lambda candidate: candidate.number)[-_MAX_PRODUCTS:]
        rows = target.reshape(-1, target.shape[-1])
        step = max(1, min(len(rows) // 2, math.ceil(rows.numel() / _MAX_VALUES)))
        z = in_double(rows[::step])
        # Classes that the model masks or adds have the same logit for all samples.
        varies = (z != z[0]).any(0) if len(z) > 1 else z[0].isfinite()
        if not bool(varies.any()):
            continue
        constants = z[0].masked_fill(varies, 0.0)
        if (terms := _chosen_classes(usable, z, varies, step)) is not None:
            yield _assembly(terms, constants, usable, target, axis, log_softmax=False)
        summands = [candidate for candidate in usable if candidate.product.weight.shape[0] == z.shape[1]]
        for after in (False, True) if is_log_softmax(target) else (False,):
            for weights, shift in _weighted_sums(summands, z, varies, step, centred=after):
                terms = []
                for candidate, weight in weights:
                    factor = torch.where(varies, weight, 0.0).to(candidate.product.weight)
                    bias = candidate.product.bias
                    rows = candidate.product.weight * factor[:, None]
                    terms.append(_Term(candidate, rows, None if bias is None else bias * factor))
                yield _assembly(terms, constants + shift, usable, target, axis, log_softmax=after)


def _chosen_classes(candidates: Sequence[Candidate], z: Tensor, varies: Tensor, step: int) -> list[_Term] | None:
    """Find each class of every step-th row of the logits, z (N, K), among the rows of the products, or return None.

    The columns of all products are compared by two random projections of the samples, which needs no product to be
    computed again.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(z), 2, generator=generator, dtype=z.dtype, device="cpu").to(z.device)
    wanted = z.T @ directions
    missing = varies.clone()
    parts: list[tuple[Candidate, Tensor, Tensor]] = []
    rows_of = [(candidate, _find_rows(candidate, directions, wanted, step)) for candidate in candidates]
    while bool(missing.any()):
        # Of the products with most of the missing classes, the last one.
        counts = [int(((rows >= 0) & missing).sum()) for _, rows in rows_of]
        if not counts or max(counts) == 0:
            return None
        best = max(range(len(counts)), key=lambda i: (counts[i], i))
        candidate, rows = rows_of[best]
        classes = ((rows >= 0) & missing).nonzero().flatten()
        parts.append((candidate, classes, rows[classes]))
        missing[classes] = False
    terms = []
    for candidate, classes, rows in sorted(parts, key=lambda part: part[0].number):
        weight, bias = candidate.product.weight, candidate.product.bias
        new = weight.new_zeros(z.shape[1], weight.shape[1])
        new[classes] = weight[rows]
        shift = None if bias is None else bias.new_zeros(z.shape[1]).index_copy(0, classes, bias[rows])
        terms.append(_Term(candidate, new, shift))
    return terms


def _find_rows(candidate: Candidate, directions: Tensor, wanted: Tensor, step: int) -> Tensor:
    """Return, for each class (K,), the row of a product whose projections (K, 2) are those wanted; -1 for none."""
    product = candidate.product
    h = in_double(product.h.reshape(-1, product.h.shape[-1])[::step]).to(directions.device)
    projected = h.T @ directions
    values = torch.cat([rows.to(projected.device) @ projected for rows in rows_in_double(product.weight)])
    if product.bias is not None:
        values += in_double(product.bias).to(values.device)[:, None] * directions.sum(0)
    slack = 16 * max(1e-6, torch.finfo(product.weight.dtype).eps) * float(wanted.abs().max())
    order = values[:, 0].argsort()
    after = torch.searchsorted(values[order, 0].contiguous(), wanted[:, 0].contiguous())
    nearest = order[torch.stack([(after - 1).clamp(min=0), after.clamp(max=len(order) - 1)])]
    errors = (values[nearest] - wanted).abs().amax(-1)
    best = errors.argmin(0, keepdim=True)
    rows = nearest.gather(0, best).squeeze(0)
    return rows.masked_fill(errors.gather(0, best).squeeze(0) > slack, -1)


def _weighted_sums(
    candidates: Sequence[Candidate], z: Tensor, varies: Tensor, step: int, *, centred: bool
) -> Iterator[tuple[list[tuple[Candidate, float]], Tensor]]:
    """Yield sums of two or more products, with weights and a shift (K,), that may be the logits z (N, K)."""
    if len(candidates) < 2:
        return
    columns: list[Tensor] = []
    summands: list[Candidate] = []
    for candidate in reversed(candidates):
        product = candidate.product
        h = product.h.reshape(-1, product.h.shape[-1])[::step]
        values = in_double(candidate.values(h)).to(z.device)
        if bool(values.isfinite().all()) and not any(torch.equal(values, other) for other in columns):
            columns.append(values)
            summands.append(candidate)
        if len(columns) == _MAX_SUMMANDS:
            break
    if len(columns) < 2:
        return
    eps = max(candidate.eps for candidate in summands)
    for shifted in (False, True):
        # The equations, without the constants that a shift or a log-softmax takes up.
        design, target = torch.stack(columns, -1)[:, varies], z[:, varies]
        if centred:
            design, target = design - design.mean(1, keepdim=True), target - target.mean(1, keepdim=True)
        if shifted:
            design, target = design - design.mean(0), target - target.mean(0)
        design, target = design.flatten(end_dim=1), target.flatten()
        num_equations = len(target) - (int(varies.sum()) if shifted else 0)
        gram, moments, energy = design.T @ design, design.T @ target, float(target.square().sum())
        for size in range(2, len(columns) + 1):
            if num_equations <= size:
                break
            for subset in map(list, combinations(range(len(columns)), size)):
                weights = torch.linalg.lstsq(gram[subset][:, subset], moments[subset], driver="gelsd").solution
                error = (design[:, subset] @ weights - target).square().sum()
                share = (weights.abs() * gram.diagonal()[subset].sqrt()).min()
                # A product that adds next to nothing is not a part.
                if float(error) > max(1e-6, eps**2) * energy or float(share) < 1e-3 * math.sqrt(energy):
                    continue
                # Weights such as 1/2 for a mean of two are exact.
                rounded = (weights * size).round() / size
                weights = torch.where((weights - rounded).abs() <= max(1e-5, eps / 4), rounded, weights)
                pairs = [(summands[i], float(weight)) for i, weight in zip(subset, weights, strict=True)]
                pairs.sort(key=lambda pair: pair[0].number)
                shift = torch.zeros_like(z[0])
                if shifted:
                    remainder = z - (torch.stack([columns[i] for i in subset], -1) @ weights)
                    shift = remainder.mean(0).masked_fill(~varies, 0.0)
                yield pairs, shift


def _assembly(
    terms: Sequence[_Term], shift: Tensor, candidates: Sequence[Candidate], target: Tensor, axis: int, log_softmax: bool
) -> Assembly:
    """Join terms to one head of their activations: those of equal activations are added, the others concatenated."""
    sources = [term.candidate for term in terms]
    groups: list[list[_Term]] = []
    for term in _without_updates(terms, candidates):
        h = term.candidate.product.h
        same = next((group for group in groups if torch.equal(group[0].candidate.product.h, h)), None)
        if same is None:
            groups.append([term])
        else:
            same.append(term)
    dtype = terms[0].weight.dtype
    for one, other in pairwise(terms):
        dtype = torch.promote_types(dtype, torch.promote_types(one.weight.dtype, other.weight.dtype))
    weight = torch.cat([sum((term.weight.to(dtype) for term in g[1:]), g[0].weight.to(dtype)) for g in groups], dim=1)
    biases = [term.bias.to(dtype) for group in groups for term in group if term.bias is not None]
    biases += [shift.to(weight)] if bool(shift.any()) else []
    bias = sum(biases[1:], biases[0]) if biases else None
    parts = tuple(group[0].candidate for group in groups)
    h = torch.cat([part.product.h.to(dtype) for part in parts], dim=-1)
    guess = F.linear(h, weight, bias)
    residual = relative_error(guess.log_softmax(-1) if log_softmax else guess, target)
    return Assembly(parts, tuple(sources), weight, bias, axis, log_softmax, residual)


def _without_updates(terms: Sequence[_Term], candidates: Sequence[Candidate]) -> list[_Term]:
    """Write a low-rank update B (A h) of a head that reads h as (B A) h."""
    direct = {id(term.candidate): term.candidate.product.h for term in terms}
    new = []
    for term in terms:
        h = term.candidate.product.h
        for inner in candidates:
            product = inner.product
            if product.weight.shape[0] != h.shape[-1] or inner.number >= term.candidate.number:
                continue
            others = [other for other in terms if other is not term]
            base = next((o for o in others if torch.equal(direct[id(o.candidate)], product.h)), None)
            if base is not None and torch.equal(inner.values().to(h.dtype), h):
                bias = None if product.bias is None else term.weight @ product.bias
                bias = term.bias if bias is None else bias if term.bias is None else bias + term.bias
                term = _Term(base.candidate, term.weight @ product.weight, bias)
                break
        new.append(term)
    return new
