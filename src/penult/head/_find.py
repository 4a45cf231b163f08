"""The head found by evidence: what the model called, and what reproduces its logits."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from penult.head._certificate import HeadCertificate, HeadNotFoundError, Support
from penult.head._checks import check_finite
from penult.head._head import Head
from penult.head._model import (
    evaluating,
    first_input,
    is_view,
    linear_at,
    logits_of,
    normalized,
    same_view,
    unwrap,
)
from penult.head._rows import rows_in_double, version_of

__all__ = ["find_head"]

_PASS_THROUGH = (
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
)


def find_head(
    model: nn.Module,
    *args: Any,
    path: str | None = None,
    tolerance: float = 1e-4,
    fold: bool = True,
    **kwargs: Any,
) -> Head:
    """Find the linear layer that makes a model's logits, and prove it.

    The model runs once on a small batch, in eval mode and without gradients; every ``nn.Linear`` call whose
    output has the shape of the logits is a candidate, its logits are computed again from W, b and the
    observed input, and the one that reproduces the model's logits is the head. Names play no part. The
    model's training flags, buffers, hooks and the random number generators are left as they were.

    Where a LayerNorm or RMSNorm stands right before the head (Dropout, Identity, Flatten and views such as
    a class token apart), its affine part is folded into the head: the weight becomes W diag(gamma), the bias
    b + W beta, in at least float32 and in storage of its own, and h is the normalised vector.

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
        HeadNotFoundError: No candidate reproduces the logits; the nearest are named with their residuals.
        TypeError: `model` is no module, or its output holds no logits.
        ValueError: `path` names no ``nn.Linear`` of the model, the logits are not finite, or the layer found
            is no softmax head (see `Head`).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(), nn.Linear(8, 3))
        >>> head = find_head(model, torch.randn(5, 4))
        >>> head.certificate.path, head.certificate.folded, head.norm
        ('3', 'LayerNorm', 'layer')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nn.Module")
    model = unwrap(model)
    wanted = None if path is None else linear_at(model, path)
    with evaluating(model), _kept_rng(model), torch.inference_mode(False), torch.no_grad():
        with _Recorder(model) as recorder:
            logits = logits_of(model(*args, **kwargs))
        if logits.ndim == 0 or logits.shape[-1] < 2:
            raise HeadNotFoundError(
                f"the model's output has shape {tuple(logits.shape)}: one logit a sample (a sigmoid or a "
                "regression) is no softmax. For a sigmoid head with row w (d,) and bias c, use "
                "penult.Head(torch.stack([-w / 2, w / 2]), torch.stack([-c / 2, c / 2]))"
            )
        check_finite("the model's output", logits)
        ranked = [
            (_residual(call.h, call.module.weight, call.module.bias, logits), call)
            for call in reversed(recorder.calls[logits.shape])  # of equals, the last call is the head
            if wanted is None or call.module is wanted
        ]
        ranked.sort(key=lambda pair: pair[0])
        if not ranked or ranked[0][0] > tolerance:
            raise HeadNotFoundError(_not_found(logits, ranked, recorder, path, tolerance))
        residual, call = ranked[0]
        head, h = Head(call.module.weight, call.module.bias), call.h
        if fold and (folded := _folded(call, logits, tolerance)) is not None:
            head, h, residual = folded
        head.certificate = _certify(head, h, residual, call, call.path if path is None else path)
        return head


@dataclass(frozen=True, eq=False)
class _Norm:
    """One call of a norm layer."""

    path: str
    module: nn.LayerNorm | nn.RMSNorm
    x: Tensor
    output: Tensor
    versions: tuple[int, int]

    def feature(self, h: Tensor) -> Tensor | None:
        """What stands in for h if h is this call's output, untouched since: the same without affine part."""
        if (version_of(self.x), version_of(self.output)) != self.versions or not is_view(h, self.output):
            return None
        wide = torch.promote_types(self.x.dtype, torch.float32)
        return same_view(h, self.output, normalized(self.module, self.x.to(wide)))


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of an nn.Linear: a candidate."""

    path: str
    module: nn.Linear
    index: int
    h: Tensor
    before: str | None
    norm: tuple[_Norm, Tensor] | None  # the norm layer that made h, and h without its affine part


class _Recorder(AbstractContextManager["_Recorder"]):
    """Watches one forward: what every nn.Linear was given, and which module had made it."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._hooks = ExitStack()
        self._count: Counter[nn.Module] = Counter()
        # Which module made a tensor: by storage and version, so that views count as the tensor, and what an
        # in-place operation made of it does not. A weak reference frees the memory but keeps the address.
        self._makers: dict[tuple[StorageWeakRef, int], str] = {}
        # Bounded, because each holds tensors; the head, and what feeds it, are among the latest.
        self._norms: deque[_Norm] = deque(maxlen=8)
        self.calls: defaultdict[torch.Size, deque[_Call]] = defaultdict(lambda: deque(maxlen=8))

    def __enter__(self) -> _Recorder:
        with ExitStack() as hooks:
            for module in self._names:
                hooks.callback(module.register_forward_hook(self._hook, with_kwargs=True).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = first_input(args, kwargs)
        if isinstance(module, nn.Linear) and x is not None and isinstance(output, Tensor):
            self._record_call(module, x, output)
        elif _is_norm(module) and x is not None:
            versions = (version_of(x), version_of(output))
            self._norms.append(_Norm(self._names[module], module, x, output, versions))
        maker = self._maker(x) if isinstance(module, _PASS_THROUGH) else type(module).__name__
        for tensor in _tensors(output):
            # A container ends after its last layer and returns the same tensor: the first maker stays.
            if maker is not None and (key := _identity(tensor)) is not None:
                self._makers.setdefault(key, maker)

    def _record_call(self, module: nn.Linear, h: Tensor, output: Tensor) -> None:
        features = ((norm, norm.feature(h)) for norm in reversed(self._norms))
        call = _Call(
            path=self._names[module],
            module=module,
            index=self._count[module],
            h=h.detach().clone(),  # the model may change it in place later on
            before=self._maker(h),
            norm=next(((norm, z) for norm, z in features if z is not None), None),
        )
        self._count[module] += 1
        self.calls[output.shape].append(call)

    def _maker(self, tensor: Tensor | None) -> str | None:
        key = None if tensor is None else _identity(tensor)
        return None if key is None else self._makers.get(key)


def _is_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm | nn.RMSNorm]:
    """Whether it is a norm over the last dimension; subclasses may do what they like."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return type(module) in (nn.LayerNorm, nn.RMSNorm) and len(module.normalized_shape) == 1
    return False


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping):
        output = list(output.values())
    values = output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, Tensor)]


def _identity(tensor: Tensor) -> tuple[StorageWeakRef, int] | None:
    if tensor.layout != torch.strided:
        return None  # sparse tensors have no storage
    return StorageWeakRef(tensor.untyped_storage()), version_of(tensor)


def _kept_rng(model: nn.Module) -> AbstractContextManager[None]:
    tensors = chain(model.parameters(), model.buffers())
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    return torch.random.fork_rng(devices=devices)


def _residual(h: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> float:
    if weight.shape != (logits.shape[-1], h.shape[-1]) or not weight.is_floating_point():
        return math.inf  # a packed (quantised) weight
    wide = torch.promote_types(logits.dtype, torch.float32)
    error = (F.linear(h, weight, bias).to(wide) - logits.to(wide)).abs().max().item()
    return math.inf if math.isnan(error) else error / max(1.0, logits.abs().max().item())


def _folded(call: _Call, logits: Tensor, tolerance: float) -> tuple[Head, Tensor, float] | None:
    """The head that reads h before gamma and beta, that h and the residual; None if that is not proved."""
    if call.norm is None or call.h.shape[-1] != call.norm[0].output.shape[-1]:
        return None
    norm, z = call.norm[0].module, call.norm[1]
    weight: Tensor = call.module.weight.detach()
    bias: Tensor | None = call.module.bias
    wide = torch.promote_types(weight.dtype, torch.float32)
    gamma, beta = norm.weight, getattr(norm, "bias", None)
    if beta is not None:
        shift = torch.cat([rows @ beta.to(rows) for rows in rows_in_double(weight)])
        bias = shift if bias is None else shift + bias.to(shift)
    if gamma is not None:
        weight = weight.to(wide) * gamma.to(wide)
    head = Head(
        weight.to(wide),
        None if bias is None else bias.to(wide).to(weight.device),
        norm="rms" if isinstance(norm, nn.RMSNorm) else "layer",
    )
    residual = _residual(z, head.weight, head.bias, logits)
    # The model rounds what the fold leaves exact, which half precision shows.
    accepted = residual <= max(tolerance, 4 * torch.finfo(logits.dtype).eps)
    return (head, z, residual) if accepted else None


def _certify(head: Head, h: Tensor, residual: float, call: _Call, path: str) -> HeadCertificate:
    norms = torch.linalg.vector_norm(h.to(torch.promote_types(h.dtype, torch.float32)), dim=-1)
    shortest, longest = norms.min().item(), norms.max().item()
    minimum, maximum = h.min().item(), h.max().item()
    support: Support = "reals"
    if longest - shortest <= 1e-3 * longest and (head.norm is not None or abs(longest - 1) <= 1e-3):
        support = "sphere"
    elif head.norm is not None:
        support = "ball"
    elif call.before in ("Tanh", "Softsign"):
        support = "cube"
    elif call.before in ("ReLU6", "Hardtanh", "Sigmoid", "Hardsigmoid"):
        support = "box"
    elif minimum >= 0:
        support = "orthant"
    folded: dict[str | None, Literal["LayerNorm", "RMSNorm"]] = {"layer": "LayerNorm", "rms": "RMSNorm"}
    return HeadCertificate(
        path=path,
        kind="linear",
        scale=1.0,
        residual=residual,
        shape=(head.num_classes, head.in_features),
        bias=head.bias is not None,
        before=call.before,
        support=support,
        zeros=(h == 0).sum().item() / h.numel(),
        norms=(shortest, longest),
        minimum=minimum,
        maximum=maximum,
        gauge=head.mean_row.float().norm().item(),
        folded=folded.get(head.norm),
        samples=norms.numel(),
        norm_path=call.norm[0].path if call.norm is not None and head.norm is not None else None,
        call=call.index,
    )


def _not_found(
    logits: Tensor,
    ranked: list[tuple[float, _Call]],
    recorder: _Recorder,
    path: str | None,
    tolerance: float,
) -> str:
    shape = tuple(logits.shape)
    if ranked:
        nearest = "; ".join(
            f"{call.path or '(the model itself)'} ({call.h.shape[-1]}->{shape[-1]}) residual {residual:.2g}"
            for residual, call in ranked[:3]
        )
        seen = f"nearest: {nearest}"
    else:
        shapes = ", ".join(str(tuple(size)) for size in list(recorder.calls)[-6:]) or "none"
        seen = f"no call of one gave that shape; the shapes that nn.Linear calls gave: {shapes}"
    subject = (
        "no nn.Linear of the model reproduces" if path is None else f"the nn.Linear at path {path!r} does not reproduce"
    )
    return (
        f"{subject} the logits of shape {shape} within tolerance {tolerance:g} ({seen}). Typical causes: a "
        "softmax inside the model (return the logits), a scale or soft-cap after the head (undo it), two "
        "heads averaged or a LoRA update beside the head (merge them), a head that is no nn.Linear. If W and "
        "b are known, build penult.Head(weight, bias) from them"
    )
