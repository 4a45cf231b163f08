"""The head found by evidence: what the model computed, and what reproduces its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penult._checks import check_finite
from penult._row_blocks import blocks, rows_in_double
from penult.head._capture import capture
from penult.head._certificate import HeadCertificate, Support
from penult.head._head import Head
from penult.head._match import Match, axes_of, matches, relative_error
from penult.head._model import compiled_parts_eager, logits_of, submodule, untouched, unwrap
from penult.head._origin import Norm, Origin, gains, invertible, without_gain
from penult.head._record import Candidate, Recorder
from penult.head._refusal import are_probabilities, not_confirmed, not_found, refuse_other_tasks

__all__ = ["find_head"]

_TRIES = 3  # fitted candidates that a second batch is spent on


def find_head(
    model: nn.Module,
    *args: Any,
    path: str | None = None,
    tolerance: float = 1e-4,
    fold: bool = True,
    **kwargs: Any,
) -> Head:
    """Find the linear map that makes a model's logits, and prove it.

    The model runs on a small batch, in eval mode and without gradients, while every product of activations with one
    matrix is recorded: linear layers and functions, matmul, addmm, einsum, pointwise convolutions, cosines. Each
    with as many rows as there are logits is a candidate; the logits are computed again from its W, b and h, and the
    one that reproduces them is the head. Names play no part. A scale and a bias added later are fitted; a mean over
    positions, a position picked from each sample, and a resized map are recognised, since they commute with the
    head. The head then has to reproduce a second batch: the first one reversed, its floats times 0.7. The model's
    training flags, buffers, hooks and the random number generators are left as they were.

    Where a LayerNorm or RMSNorm stands right before the head (dropout, casts, views such as a class token, and a
    mean over positions apart), its gain and offset are folded into the head: the weight becomes W diag(gamma), the
    bias b + W beta, in at least float32 and in storage of its own, and h is the normalised vector.

    Args:
        model: Any classifier. DataParallel, DistributedDataParallel and torch.compile wrappers are opened.
        *args: What the model takes: a small batch.
        path: Name of the head's module, if known. It is put to the same proof.
        tolerance: Largest residual to accept, relative to max(1, max abs(logits)).
        fold: Whether to fold a norm layer before the head.
        **kwargs: What the model takes by keyword.

    Returns:
        The head, with its ``certificate``.

    Raises:
        HeadNotFoundError: Nothing reproduces the logits, or no softmax reads them (one logit, multi-label); the three
            nearest candidates are named with their residuals, and the likely cause.
        TypeError: `model` is no module or cannot be watched (TorchScript, FSDP), its output holds no logits, or it
            takes no mapping by position, and is given one.
        ValueError: `path` names no module of the model, the logits are not finite, or the layer found
            is no softmax head (see `Head`).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(), nn.Linear(8, 3))
        >>> head = find_head(model, torch.randn(5, 4))
        >>> head.certificate.path, head.certificate.folded, head.norm
        ('3', 'LayerNorm', 'layer')
    """
    model = unwrap(model)
    wanted = None if path is None else submodule(model, path)
    with untouched(model), compiled_parts_eager(model):
        with Recorder(model) as recorder:
            try:
                output = model(*args, **kwargs)
            except Exception as error:
                if not any(isinstance(value, Mapping) for value in args):
                    raise
                raise TypeError(
                    f"the model takes no mapping by position ({type(error).__name__}: {error}); "
                    "what a processor or tokeniser gives goes by keyword: find_head(model, **batch), without labels"
                ) from error
            logits = logits_of(output)
        squashed_by = recorder.squashed_by(logits) or ("a softmax" if are_probabilities(logits) else None)
        logits = logits.detach()
        refuse_other_tasks(model, logits)
        check_finite("the model's output", logits)
        candidates = [
            candidate
            for group in recorder.candidates.values()
            for candidate in reversed(group)  # of equals, the last call is the head
            if wanted is None or _belongs(model, wanted, candidate)
        ]
        everything: list[Match] = []
        for fit in (False, True):
            found = [match for candidate in candidates for match in matches(candidate, logits, fit=fit)]
            found.sort(key=lambda match: match.residual)
            # Where values are small even a soft cap looks affine, so that what was seen to run decides.
            good = [match for match in found if not squashed_by and match.residual <= _slack(tolerance, logits, match)]
            good.sort(key=lambda match: (match.scale != 1) + (match.shift is not None))
            refused: list[tuple[Match, float | None]] = []
            for match in good[:_TRIES]:
                head = _head_of(model, match, logits, tolerance, fold, recorder)
                second = _second_residual(model, head, match, args, kwargs)
                if second <= _slack(tolerance, logits, match) if second is not None else not match.fitted:
                    return _certified(head, confirmed=second, path=path, model=model)
                refused.append((match, second))
            if refused:
                raise not_confirmed(*refused[0], tolerance)
            everything += found
        everything.sort(key=lambda match: match.residual)
        raise not_found(model, logits, everything, recorder.candidates, path, tolerance, squashed_by)


def _slack(tolerance: float, logits: Tensor, match: Match) -> float:
    """The tolerance, or what half precision rounds away where any part of the head is computed in it."""
    parts = (logits, match.candidate.product.h, match.candidate.product.weight)
    return max(tolerance, *(2 * torch.finfo(part.dtype).eps for part in parts))


def _belongs(model: nn.Module, wanted: nn.Module, candidate: Candidate) -> bool:
    """Whether a product was computed in a module, or with its weight."""
    inside = model.get_submodule(candidate.path) in set(wanted.modules())
    return inside or _name_of(wanted, candidate.product.weight) is not None


def _name_of(module: nn.Module, tensor: Tensor) -> str | None:
    """Name of the parameter or buffer that a tensor shows all of."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.numel() == tensor.numel() and value.data_ptr() == tensor.data_ptr() and value.device == tensor.device:
            return name
    return None


def _head_of(model: nn.Module, match: Match, logits: Tensor, tolerance: float, fold: bool, recorder: Recorder) -> Head:
    """The head that a match stands for, with its certificate."""
    product, layout = match.candidate.product, match.layout
    target = logits.movedim(layout.class_axis, -1)
    weight = product.weight.detach()
    bias = None if product.bias is None else product.bias.detach()
    values = torch.nn.functional.linear(product.h, weight, bias)
    h = layout.apply(product.h, values, target)
    if match.scale != 1:
        weight, bias = weight * match.scale, None if bias is None else bias * match.scale
    if match.shift is not None:
        shift = _known(model, match.shift, tolerance).to(weight)
        bias = shift if bias is None else bias + shift
    head, residual, norm = Head._of_model(weight, bias, sources=_sources(model, match, None)), match.residual, None
    if fold and (folded := _folded(model, head, h, match, target, tolerance)) is not None:
        head, h, residual, norm = folded
    head.certificate = _certify(model, match, head, h, target, residual, norm, recorder)
    return head


def _sources(model: nn.Module, match: Match, norm: Norm | None) -> list[Tensor]:
    """The model's tensors that a head was computed from, so that it can tell when they change."""
    tensors = {id(x): x for x in (match.candidate.product.operand, match.candidate.product.bias) if x is not None}
    if norm is not None:
        tensors |= {id(x): x for x in model.get_submodule(norm.path).parameters()}
    path = match.candidate.path
    if match.fitted or _name_of(model, match.candidate.product.weight) is None:
        # A scale, or what W was computed from, is among what the module has of its own.
        tensors |= {id(x): x for x in model.get_submodule(path).parameters(recurse=path != "")}
    return list(tensors.values())


def _known(model: nn.Module, shift: Tensor, tolerance: float) -> Tensor:
    """The model's own parameter if a fitted shift is one, since that is exact."""
    for value in (*model.parameters(), *model.buffers()):
        if value.shape == shift.shape and value.is_floating_point():
            if relative_error(value.detach().to(shift), shift) <= tolerance:
                return value.detach()
    return shift


def _second_residual(
    model: nn.Module, head: Head, match: Match, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float | None:
    """The residual on the batch reversed; None if the model does not take it, or sees nothing new in it."""
    assert head.certificate is not None
    args, kwargs = pytree.tree_map_only(Tensor, _reversed, (args, kwargs))
    try:
        h, logits = capture(model, head.certificate, args, kwargs)
    except Exception:  # whatever a model says to a batch that it was not meant for
        return None
    first = match.candidate.product.h
    if h.shape[-1] == first.shape[-1] and h.numel() == first.numel() and head.certificate.folded is None:
        if torch.equal(h.reshape(first.shape), first):
            return None
    guess = head(h.to(head.weight.dtype))
    return relative_error(guess.log_softmax(-1) if head.certificate.log_softmax else guess, logits)


def _reversed(x: Tensor) -> Tensor:
    """A batch of the same shapes that looks different: images upside down and paler, texts read backwards."""
    if x.ndim == 0 or x.is_complex():
        return x
    if x.is_floating_point():
        return 0.7 * x.flip(tuple(range(min(1, x.ndim - 1), x.ndim)))
    backwards = x.flip(1) if x.ndim > 1 else x
    return x.flatten().roll(1).view_as(x) if torch.equal(backwards, x) else backwards


def _folded(
    model: nn.Module, head: Head, h: Tensor, match: Match, logits: Tensor, tolerance: float
) -> tuple[Head, Tensor, float, Norm] | None:
    """The head that reads h before gain and offset, that h, the residual and the norm; None if that is not proved."""
    norm, direct = _norm_before(match.candidate.origin)
    # The head has to read the normalised axis, and all of it.
    if norm is None or h.shape[-1] != norm.width or match.candidate.stride not in (1, norm.stride):
        return None
    gain, offset = gains(model.get_submodule(norm.path), norm.unit_offset)
    if not invertible(gain, offset, h.dtype):
        return None
    z = without_gain(h, gain, offset)
    if not _on_ball(z, norm.kind, h.dtype):
        return None
    weight, wide = head.weight, torch.promote_types(head.weight.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(wide)
    if offset is not None:
        shift = torch.cat([rows @ offset.to(rows) for rows in rows_in_double(weight)]).to(weight.device)
        bias = (shift if bias is None else shift + bias.to(shift)).to(wide)
    weight = weight.to(wide) if gain is None else weight.to(wide) * gain.to(wide)
    direct = direct and match.layout.positions in ("same", "swapped", "picked")
    new = Head._of_model(weight, bias, norm=norm.kind if direct else None, sources=_sources(model, match, norm))
    guess = new(z.to(wide))
    residual = relative_error(guess.log_softmax(-1) if match.log_softmax else guess, logits)
    # The model rounds what the fold leaves exact, which half precision shows.
    return (new, z, residual, norm) if residual <= _slack(tolerance, logits, match) else None


def _norm_before(origin: Origin | None) -> tuple[Norm | None, bool]:
    """The norm that made a tensor, or that its average was taken of; and whether it did so directly."""
    if origin is None or origin.norm is not None:
        return None if origin is None else origin.norm, True
    return None if origin.pooled is None else origin.pooled.norm, False


def _on_ball(z: Tensor, kind: Literal["layer", "rms"], dtype: torch.dtype) -> bool:
    """Whether z can be what a norm gives, or a mean of it: the norm's own axis was read, not another."""
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
    candidate, layout = match.candidate, match.layout
    norms = torch.linalg.vector_norm(h.to(torch.promote_types(h.dtype, torch.float32)), dim=-1)
    low, high = h.min().item(), h.max().item()
    name, operand = _name_of(model, candidate.product.weight), candidate.product.operand
    if layout.positions == "picked":  # the whole forward is watched
        call = recorder.before_in_model(candidate, by_address=name is not None)
    else:
        call = recorder.before(candidate, by_address=name is not None)
    return HeadCertificate(
        path=candidate.path,
        kind="cosine" if norm is None and _is_cosine(norms, candidate.product.weight) else candidate.product.kind,
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
        operand=isinstance(operand, nn.Parameter),
        call=call,
        forward_call=recorder.before_in_model(candidate, by_operand=isinstance(operand, nn.Parameter)),
        class_axis=layout.class_axis,
        axes=axes_of(logits.ndim, layout.class_axis, layout.positions),
        positions=layout.positions,
        shifted=match.shift is not None,
        log_softmax=match.log_softmax,
        empty=sum(int((~rows.any(dim=1)).sum()) for rows in blocks(candidate.product.weight)),
        unit_offset=norm is not None and norm.unit_offset,
        rectified=candidate.rectified and norm is None and layout.positions in ("same", "swapped", "picked"),
    )


def _is_cosine(norms: Tensor, weight: Tensor) -> bool:
    """Whether activations and rows have norm 1."""
    unit = bool(((norms - 1).abs() <= 1e-3).all())
    return unit and all(bool(((rows.norm(dim=1) - 1).abs() <= 1e-3).all()) for rows in rows_in_double(weight))


def _support(
    origin: Origin | None, norm: Norm | None, direct: bool, low: float, high: float, norms: Tensor, features: int
) -> Support:
    """Where the activations lie, by what made them and what was seen."""
    names = {each.name.lower().rstrip("_") for each in (origin, origin and origin.pooled) if each is not None}
    shortest, longest = norms.min().item(), norms.max().item()
    if norm is not None:
        radius = features**0.5
        return "sphere" if direct and max(longest - radius, radius - shortest) <= 1e-3 * radius else "ball"
    alike = longest - shortest <= 1e-3 * longest
    scaled = norms.numel() > 1 and origin is not None and origin.scaled
    if alike and (abs(longest - 1) <= 1e-3 or scaled or (origin is not None and origin.normalized)):
        return "sphere"
    if names & {"tanh", "softsign"} and -1 <= low and high <= 1:
        return "cube"
    if names & {"relu6", "hardtanh", "sigmoid", "hardsigmoid"}:
        return "box"
    return "orthant" if low >= 0 else "reals"


def _certified(head: Head, *, confirmed: float | None, path: str | None, model: nn.Module) -> Head:
    """The head with what the second batch said, under the name that the user gave its module."""
    assert head.certificate is not None
    head.certificate = dataclasses.replace(head.certificate, confirmed=confirmed)
    if path is not None and model.get_submodule(path) is model.get_submodule(head.certificate.path):
        head.certificate = dataclasses.replace(head.certificate, path=path)
    return head
