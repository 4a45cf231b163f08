"""Search for the head of a model: among all matrix products of a forward pass, the one that gives the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penult._checks import check_finite
from penult._row_blocks import blocks, rows_in_double
from penult.head._assembled import Assembly, assemblies
from penult.head._capture import capture
from penult.head._certificate import UNMIXED, HeadCertificate, HeadNotFoundError, HeadPart, Kind, Support
from penult.head._foreign import in_memory, is_real, own_arguments
from penult.head._head import Head
from penult.head._match import Match, axes_of, matches, relative_error
from penult.head._model import compiled_parts_eager, logits_of, parameter_name, submodule, tensors_at, untouched, unwrap
from penult.head._origin import Norm, Origin, gain_and_offset, invertible, without_gain
from penult.head._pieces import joined_candidates
from penult.head._products import Product
from penult.head._record import Candidate, Recorder, Steps
from penult.head._refusal import (
    are_probabilities,
    described_assembly,
    described_match,
    not_confirmed_error,
    not_found_error,
    refuse_other_tasks,
)

__all__ = ["find_head"]

# Number of candidates that are tested on a second batch, at most.
_TRIES = 3


def find_head(
    model: nn.Module,
    *args: Any,
    path: str | None = None,
    tolerance: float = 1e-4,
    fold: bool = True,
    **kwargs: Any,
) -> Head:
    """Find the linear map that gives a model's logits, and verify it.

    The model runs on a small batch, in eval mode and without gradients, while every product of activations with one
    matrix is recorded: linear layers and functions, matmul, addmm, bmm, einsum, h * W summed over an axis, pointwise
    convolutions, cosines. Products whose number of rows is the number of logits are candidates. The logits are computed
    again from the W, b and h of each candidate, and the one that reproduces them is the head. Names are not used. A
    scale and a bias added later are fitted. A mean over positions, a position picked from each sample, and a resized
    map are recognised, because they commute with the head. Tensors that are not dense arrays of real numbers (complex,
    integer, nested, sparse, quantised, offloaded) are not read, and do no harm elsewhere in the model. The head must
    then reproduce a second batch: the first one reversed, with floats multiplied by 0.7. The model's training flags,
    buffers and hooks and the random number generators are restored, and it gets copies of lists, dicts and other
    objects among the arguments, such as caches.

    The rows of several calls of the head may be concatenated. The model may also assemble its logits from several
    products: sums and means with constant weights, classes joined from several layers, chosen, reordered, or padded
    with constants. Such a head reads the activations of all its products, concatenated, and the certificate lists them
    as ``parts``.

    If a LayerNorm or RMSNorm is right before the head (ignoring dropout, casts, views such as a class token, and a
    mean over positions), its gain and offset are folded into the head: the weight becomes W diag(gamma), the bias
    b + W beta, in at least float32 and in its own storage, and h is the normalised vector.

    Args:
        model: Any classifier. DataParallel, DistributedDataParallel and torch.compile wrappers are removed.
        *args: Positional arguments of the model, with a small batch.
        path: Name of the head's module, if known. It is verified in the same way.
        tolerance: Largest residual to accept, relative to max abs(logits).
        fold: Whether to fold a norm layer before the head.
        **kwargs: Keyword arguments of the model.

    Returns:
        The head, with its ``certificate``.

    Raises:
        HeadNotFoundError: No products reproduce the logits, or the model has no softmax (one logit, multi-label). The
            message names the three nearest candidates with their residuals, and the likely cause.
        TypeError: `model` is not a module or cannot be watched (TorchScript, torch.export, FSDP), has lazy layers
            without weights, its output holds no logits (or complex numbers or integers), or it failed on a mapping
            that was passed by position.
        ValueError: `path` is not a module of the model, the logits are not finite, or the layer is not a valid
            softmax head (see `Head`).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(), nn.Linear(8, 3))
        >>> head = find_head(model, torch.randn(5, 4))
        >>> head.certificate.path, head.certificate.folded, head.norm
        ('3', 'LayerNorm', 'layer')
    """
    model = unwrap(model)
    named_module = None if path is None else submodule(model, path)
    with untouched(model), compiled_parts_eager(model):
        with Recorder(model) as recorder:
            try:
                own_args, own_kwargs = own_arguments(args, kwargs)
                output = model(*own_args, **own_kwargs)
            except Exception as error:
                if not any(isinstance(value, Mapping) for value in args):
                    raise
                raise TypeError(
                    f"the model takes no mapping by position ({type(error).__name__}: {error}). "
                    "Pass the output of a processor or tokeniser by keyword: find_head(model, **batch), without labels"
                ) from error
            logits = logits_of(output)
        logits = logits.detach()
        refuse_other_tasks(model, logits)
        check_finite("the model's output", logits)
        steps = recorder.steps_to(logits)
        if steps.squashed_by is None and are_probabilities(logits):
            steps = Steps("a softmax")

        def limit(match: Match | Assembly) -> float:
            return _residual_limit(tolerance, logits, match)

        # Of equal candidates, the last call is the head.
        single_calls = [
            candidate
            for group in recorder.candidates.values()
            for candidate in reversed(group)
            if named_module is None or _is_computed_in(model, named_module, candidate)
        ]
        candidates = [*single_calls, *joined_candidates(single_calls, logits)]
        all_matches: list[Match] = []
        refusals: list[HeadNotFoundError] = []
        for fit in (False, True):
            new_matches = [match for candidate in candidates for match in matches(candidate, logits, fit=fit)]
            new_matches.sort(key=lambda match: match.residual)
            # For small values even a soft cap looks affine, so a recorded function decides against every match.
            good = [match for match in new_matches if not steps.squashed_by and match.residual <= limit(match)]
            good.sort(key=lambda match: (match.scale != 1) + (match.shift is not None))
            for match in good[:_TRIES]:
                head = _build_head(model, match, logits, tolerance, fold, recorder)
                second = _second_residual(model, head, match.candidate.product.h, args, kwargs)
                if second <= limit(match) if second is not None else not match.fitted:
                    return _complete_certificate(head, confirmed=second, path=path, model=model)
                refusals.append(not_confirmed_error(described_match(match), second, tolerance))
            if refusals:
                break
            all_matches += new_matches
        for assembly in () if steps.squashed_by else assemblies(single_calls, logits):
            if assembly.residual <= limit(assembly):
                head = _build_assembled_head(model, assembly, logits, recorder)
                second = _second_residual(model, head, assembly.h, args, kwargs)
                if second is not None and second <= limit(assembly):
                    return _complete_certificate(head, confirmed=second, path=path, model=model)
                refusals.append(not_confirmed_error(described_assembly(assembly), second, tolerance))
        if refusals:
            raise refusals[0]
        all_matches.sort(key=lambda match: match.residual)
        raise not_found_error(model, logits, all_matches, recorder.candidates, path, tolerance, steps)


def _residual_limit(tolerance: float, logits: Tensor, match: Match | Assembly) -> float:
    """Return the largest accepted residual: the tolerance, or more if part of the head has half precision."""
    candidates = (match.candidate,) if isinstance(match, Match) else match.sources
    return max(tolerance, 2 * torch.finfo(logits.dtype).eps, *(2 * candidate.eps for candidate in candidates))


def _is_computed_in(model: nn.Module, module: nn.Module, candidate: Candidate) -> bool:
    """Whether a product was computed in a module, or with its weight."""
    inside = model.get_submodule(candidate.path) in set(module.modules())
    return inside or parameter_name(module, candidate.product.weight) is not None


def _build_head(
    model: nn.Module, match: Match, logits: Tensor, tolerance: float, fold: bool, recorder: Recorder
) -> Head:
    """Build the head of a match, with its certificate."""
    product, layout = match.candidate.product, match.layout
    summands = recorder.paths_beside(match.candidate, logits)
    target = logits.movedim(layout.class_axis, -1)
    weight = product.weight.detach()
    bias = None if product.bias is None else product.bias.detach()
    values = match.candidate.values()
    h = layout.apply(product.h, values, target)
    if match.scale != 1:
        weight, bias = weight * match.scale, None if bias is None else bias * match.scale
    if match.shift is not None:
        shift = _exact_shift(model, match.shift, tolerance).to(weight)
        bias = shift if bias is None else bias + shift
    head = Head._of_model(weight, bias, sources=_source_tensors(model, match, None, summands))
    residual, norm = match.residual, None
    if fold and (folded := _fold_norm(model, head, h, match, target, tolerance, summands)) is not None:
        head, h, residual, norm = folded
    head.certificate = _certify(model, match, head, h, target, residual, norm, recorder)
    return head


def _source_tensors(model: nn.Module, match: Match, norm: Norm | None, summands: Sequence[str]) -> list[Tensor]:
    """Return the model's tensors that a head is computed from, so that the head can detect changes of them.

    Args:
        model: The model.
        match: The head.
        norm: The folded norm layer.
        summands: Modules of products that are added to that of the head. They add nothing now, but may later.
    """
    tensors = {id(x): x for x in (match.candidate.product.operand, match.candidate.product.bias) if x is not None}
    if norm is not None:
        tensors |= {id(x): x for x in model.get_submodule(norm.path).parameters()}
    path = match.candidate.path
    if match.fitted or parameter_name(model, match.candidate.product.weight) is None:
        # The parameters of the module include the scale, or the tensors that W was computed from.
        tensors |= tensors_at(model, path)
    for summand in summands:
        tensors |= tensors_at(model, summand)
    return list(tensors.values())


def _build_assembled_head(model: nn.Module, assembly: Assembly, logits: Tensor, recorder: Recorder) -> Head:
    """Build a head that the model assembles from several products, with its certificate."""
    tensors: dict[int, Tensor] = {}
    for candidate in assembly.sources:
        tensors |= {id(x): x for x in (candidate.product.operand, candidate.product.bias) if x is not None}
        if parameter_name(model, candidate.product.weight) is None:
            tensors |= tensors_at(model, candidate.path)
    head = Head._of_model(assembly.weight, assembly.bias, sources=list(tensors.values()))
    first = assembly.parts[0]
    parts = tuple(_part(model, candidate, recorder) for candidate in assembly.parts)
    names = list(dict.fromkeys("the input" if c.origin is None else c.origin.name for c in assembly.parts))
    origin = first.origin if len(names) == 1 else None
    norms, low, high = _observed(assembly.h)
    paths = [candidate.path.split(".") for candidate in assembly.sources]
    common = [names[0] for names in takewhile(lambda names: len({*names}) == 1, zip(*paths, strict=False))]
    head.certificate = HeadCertificate(
        path=".".join(common),
        kind=first.product.kind,
        scale=1.0,
        residual=assembly.residual,
        shape=(head.num_classes, head.in_features),
        bias=head.bias is not None,
        before=None if names == ["the input"] else ", ".join(names),
        support=_support(origin, None, False, low, high, norms, head.in_features),
        zeros=(assembly.h == 0).sum().item() / assembly.h.numel(),
        norms=(norms.min().item(), norms.max().item()),
        minimum=low,
        maximum=high,
        gauge=head.mean_row.float().norm().item(),
        folded=None,
        samples=norms.numel(),
        forward_call=parts[0].forward_call,
        class_axis=assembly.class_axis,
        axes=axes_of(logits.ndim, assembly.class_axis, "same"),
        log_softmax=assembly.log_softmax,
        empty=sum(int((~rows.any(dim=1)).sum()) for rows in blocks(assembly.weight)),
        rectified=all(candidate.rectified for candidate in assembly.parts),
        parts=parts,
    )
    return head


def _part(model: nn.Module, candidate: Candidate, recorder: Recorder) -> HeadPart:
    """Return how a tap recognises the product of a candidate."""
    product = candidate.product
    classes, features = product.weight.shape
    name = parameter_name(model, product.weight)
    by_operand = name is not None and isinstance(product.operand, nn.Parameter)
    return HeadPart(
        path=candidate.path,
        kind=product.kind,
        shape=(classes, features),
        weight=name,
        weight_first=product.first,
        operand=by_operand,
        forward_call=recorder.earlier_calls_in_model(candidate, by_operand=by_operand),
    )


def _observed(h: Tensor) -> tuple[Tensor, float, float]:
    """Return the norms of activations and their smallest and largest coordinate."""
    norms = torch.linalg.vector_norm(h.to(torch.promote_types(h.dtype, torch.float32)), dim=-1)
    return norms, h.min().item(), h.max().item()


def _exact_shift(model: nn.Module, shift: Tensor, tolerance: float) -> Tensor:
    """Return the parameter of the model that a fitted shift approximates, or the fitted shift if there is none."""
    for value in (*model.parameters(), *model.buffers()):
        if is_real(value) and value.shape == shift.shape:
            if relative_error(value.detach().to(shift), shift) <= tolerance:
                return value.detach()
    return shift


def _second_residual(
    model: nn.Module, head: Head, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float | None:
    """Return the residual on the reversed batch; None if the model raises an error, or h is the `first` one again."""
    assert head.certificate is not None
    # A model may raise any error for a batch that it was not written for, and so may a tensor that cannot be reversed.
    try:
        args, kwargs = pytree.tree_map_only(Tensor, _reversed, (args, kwargs))
        h, logits = capture(model, head.certificate, args, kwargs)
    except Exception:
        return None
    if h.shape[-1] == first.shape[-1] and h.numel() == first.numel() and head.certificate.folded is None:
        if torch.equal(h.reshape(first.shape), first):
            return None
    guess = head(h.to(head.weight.dtype))
    return relative_error(guess.log_softmax(-1) if head.certificate.log_softmax else guess, logits)


def _reversed(x: Tensor) -> Tensor:
    """Return a different batch of the same shapes: images upside down and darker, texts in reverse order."""
    if x.ndim == 0:
        return x
    if x.is_nested:
        # Nested tensors have no flip, so their samples are reversed one by one.
        return torch.nested.as_nested_tensor([_reversed(sample) for sample in x.unbind()], layout=x.layout)
    if x.layout != torch.strided:
        return 0.7 * x
    if x.is_floating_point() or x.is_complex():
        # Float8 has no arithmetic.
        wide = x if x.is_complex() or is_real(x) else x.float()
        return (0.7 * wide.flip(tuple(range(min(1, x.ndim - 1), x.ndim)))).to(x.dtype)
    backwards = x.flip(1) if x.ndim > 1 else x
    return x.flatten().roll(1).view_as(x) if torch.equal(backwards, x) else backwards


def _fold_norm(
    model: nn.Module, head: Head, h: Tensor, match: Match, logits: Tensor, tolerance: float, summands: Sequence[str]
) -> tuple[Head, Tensor, float, Norm] | None:
    """Return the head with the gain and offset of the norm layer before it multiplied into W and added to b.

    Returns:
        The new head; its activations h, which are the normalised vectors; its largest error on the logits (the residual
        of `HeadCertificate`); and the norm layer. None if there is no norm layer, or if that error is too large.
    """
    norm, direct = _norm_before(match.candidate.origin)
    # The head must read the whole normalised axis.
    if norm is None or h.shape[-1] != norm.width or match.candidate.stride not in (1, norm.stride):
        return None
    module = model.get_submodule(norm.path)
    if any(not in_memory(parameter) for parameter in module.parameters(recurse=False)):
        # The gain is in memory only while the norm runs, so a tap could not read it.
        return None
    gain, offset = gain_and_offset(module, norm.unit_offset)
    if not invertible(gain, offset, h.dtype):
        return None
    z = without_gain(h, gain, offset)
    if not _is_within_ball(z, norm.kind, h.dtype):
        return None
    weight, wide = head.weight, torch.promote_types(head.weight.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(wide)
    if offset is not None:
        shift = torch.cat([rows @ offset.to(rows) for rows in rows_in_double(weight)]).to(weight.device)
        bias = (shift if bias is None else shift + bias.to(shift)).to(wide)
    weight = weight.to(wide) if gain is None else weight.to(wide) * gain.to(wide)
    direct = direct and match.layout.positions in UNMIXED
    sources = _source_tensors(model, match, norm, summands)
    new = Head._of_model(weight, bias, norm=norm.kind if direct else None, sources=sources)
    guess = new(z.to(wide))
    residual = relative_error(guess.log_softmax(-1) if match.log_softmax else guess, logits)
    # The model rounds the output of the norm and the folded head does not; in half precision the difference is large.
    return (new, z, residual, norm) if residual <= _residual_limit(tolerance, logits, match) else None


def _norm_before(origin: Origin | None) -> tuple[Norm | None, bool]:
    """Return the norm layer that a tensor comes from; True if the tensor is its output, False for an average."""
    if origin is None or origin.norm is not None:
        return None if origin is None else origin.norm, True
    return None if origin.pooled is None else origin.pooled.norm, False


def _is_within_ball(z: Tensor, kind: Literal["layer", "rms"], dtype: torch.dtype) -> bool:
    """Whether z can be the output of a norm, or a mean of such outputs; it cannot if the head reads another axis."""
    slack = max(1e-3, 8 * torch.finfo(dtype).eps)
    d = z.shape[-1]
    inside = bool((torch.linalg.vector_norm(z, dim=-1) <= (1 + slack) * d**0.5).all())
    return inside and (kind == "rms" or bool((z.mean(-1).abs() <= slack).all()))


def _certify(
    model: nn.Module,
    match: Match,
    head: Head,
    h: Tensor,
    logits: Tensor,
    residual: float,
    norm: Norm | None,
    recorder: Recorder,
) -> HeadCertificate:
    """Return the certificate of a head, without the residual on the second batch."""
    candidate, layout = match.candidate, match.layout
    norms, low, high = _observed(h)
    part = _part(model, candidate, recorder)
    name = part.weight
    # For a picked position, `capture` watches the whole forward, and otherwise only the module of the head.
    if layout.positions == "picked":
        call = recorder.earlier_calls_in_model(candidate, by_address=name is not None)
    else:
        call = recorder.earlier_calls_in_module(candidate, by_address=name is not None)
    return HeadCertificate(
        path=candidate.path,
        kind=_kind(candidate.product, norms, norm),
        scale=match.scale,
        residual=residual,
        shape=(head.num_classes, head.in_features),
        bias=head.bias is not None,
        before=None if candidate.origin is None else candidate.origin.name,
        support=_support(candidate.origin, norm, head.norm is not None, low, high, norms, h.shape[-1]),
        zeros=(h == 0).sum().item() / h.numel(),
        norms=(norms.min().item(), norms.max().item()),
        minimum=low,
        maximum=high,
        gauge=head.mean_row.float().norm().item(),
        folded=None if norm is None else ("LayerNorm" if norm.kind == "layer" else "RMSNorm"),
        samples=norms.numel(),
        norm_path=None if norm is None else norm.path,
        weight=name,
        weight_first=candidate.product.first,
        operand=part.operand,
        call=call,
        forward_call=part.forward_call,
        class_axis=layout.class_axis,
        axes=axes_of(logits.ndim, layout.class_axis, layout.positions),
        positions=layout.positions,
        shifted=match.shift is not None,
        log_softmax=match.log_softmax,
        empty=sum(int((~rows.any(dim=1)).sum()) for rows in blocks(candidate.product.weight)),
        unit_offset=norm is not None and norm.unit_offset,
        rectified=candidate.rectified and norm is None and layout.positions in UNMIXED,
    )


def _kind(product: Product, norms: Tensor, norm: Norm | None) -> Kind:
    """Return the kind of a head's product: a cosine, also if it is computed by another call; else that of the call."""
    # Calls of their own kind are recognised by it.
    if norm is None and product.kind not in ("bmm", "sum") and _is_cosine(norms, product.weight):
        return "cosine"
    return product.kind


def _is_cosine(norms: Tensor, weight: Tensor) -> bool:
    """Whether all activations and rows have norm 1."""
    unit = bool(((norms - 1).abs() <= 1e-3).all())
    return unit and all(bool(((rows.norm(dim=1) - 1).abs() <= 1e-3).all()) for rows in rows_in_double(weight))


def _support(
    origin: Origin | None, norm: Norm | None, direct: bool, low: float, high: float, norms: Tensor, features: int
) -> Support:
    """Return the set in which the activations lie, by their origin and their observed values."""
    origins = (origin, origin and origin.pooled)
    names = {operation.name.lower().rstrip("_") for operation in origins if operation is not None}
    shortest, longest = norms.min().item(), norms.max().item()
    if norm is not None:
        radius = features**0.5
        return "sphere" if direct and max(longest - radius, radius - shortest) <= 1e-3 * radius else "ball"
    equal_norms = longest - shortest <= 1e-3 * longest
    scaled = norms.numel() > 1 and origin is not None and origin.scaled
    if equal_norms and (abs(longest - 1) <= 1e-3 or scaled or (origin is not None and origin.normalized)):
        return "sphere"
    if names & {"tanh", "softsign"} and -1 <= low and high <= 1:
        return "cube"
    if names & {"relu6", "hardtanh", "sigmoid", "hardsigmoid"}:
        return "box"
    return "orthant" if low >= 0 else "reals"


def _complete_certificate(head: Head, *, confirmed: float | None, path: str | None, model: nn.Module) -> Head:
    """Add the residual on the second batch to the certificate, and the name by which the user knows the module."""
    assert head.certificate is not None
    head.certificate = dataclasses.replace(head.certificate, confirmed=confirmed)
    if path is not None and model.get_submodule(path) is model.get_submodule(head.certificate.path):
        head.certificate = dataclasses.replace(head.certificate, path=path)
    return head
