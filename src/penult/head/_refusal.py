"""Errors for models without a softmax head, with the nearest candidates and the likely cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from penult._checks import unreadable
from penult.head._assembled import Assembly
from penult.head._certificate import HeadNotFoundError
from penult.head._foreign import attribute, in_memory, is_real
from penult.head._match import Match
from penult.head._model import is_scripted
from penult.head._record import Candidate, Steps

__all__ = ["are_probabilities", "not_confirmed_error", "not_found_error", "refuse_other_tasks"]

_SIGMOID = (
    "For a sigmoid head with row w (d,) and bias c, use penult.Head(torch.stack([-w / 2, w / 2]), "
    "torch.stack([-c / 2, c / 2]))"
)


def refuse_other_tasks(model: nn.Module, logits: Tensor) -> None:
    """Raise if the output is not an array of logits, or if no softmax belongs to it.

    Models with a single logit for each sample, or with labels that do not exclude each other, have no softmax.
    """
    if (fault := unreadable(logits)) is not None:
        raise TypeError(
            f"the model's output is {fault[0]}; expected a floating-point tensor of logits. {fault[1]}, or let the "
            "model return its logits"
        )
    if not in_memory(logits):
        raise TypeError(
            f"the model's output is a {type(logits).__name__} on {logits.device}, which holds no values; expected "
            "logits in memory. Load the weights of the model first, and convert tensors of other packages"
        )
    if not logits.numel():
        raise ValueError(
            f"the model's output has shape {tuple(logits.shape)}, which holds no logits; expected at least one row. "
            "Give a batch of at least one sample"
        )
    rows = logits.reshape(-1, logits.shape[-1] if logits.ndim else 1)
    never = (rows == -torch.inf).all(0)
    if bool(never.any()) and not bool(never.all()):
        classes = never.nonzero().flatten().tolist()
        names = ", ".join(map(str, classes[:8])) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
        raise ValueError(
            f"the model's output is -inf for class {names} in every row; expected finite logits. Let the model return "
            "them without these classes, or with a number such as -1e9 in place of -inf"
        )
    if logits.ndim == 0 or max(logits.shape[-1], logits.shape[1] if logits.ndim > 2 else 0) < 2:
        raise HeadNotFoundError(
            f"the model's output has shape {tuple(logits.shape)}: one logit a sample (a sigmoid or a regression) is "
            f"no softmax. {_SIGMOID}"
        )
    configs = (attribute(module, "config") for module in model.modules())
    problems = [attribute(config, "problem_type") for config in configs]
    problem = next((kind for kind in problems if isinstance(kind, str)), None)
    if problem == "regression":
        raise HeadNotFoundError("the model's config says problem_type='regression': its outputs are no logits")
    if problem == "multi_label_classification":
        raise HeadNotFoundError(
            "the model's config says problem_type='multi_label_classification': its classes do not exclude each other, "
            f"so that each has a sigmoid of its own and no softmax is their posterior. {_SIGMOID}, one a class"
        )


def not_found_error(
    model: nn.Module,
    logits: Tensor,
    ranked: Sequence[Match],
    candidates: Mapping[int, Sequence[Candidate]],
    path: str | None,
    tolerance: float,
    steps: Steps,
) -> HeadNotFoundError:
    """Return the error that names the three nearest candidates and the likely cause."""
    shape = tuple(logits.shape)
    best: dict[Candidate, Match] = {}
    for match in ranked:
        best.setdefault(match.candidate, match)
    if best:
        evidence = "nearest: " + "; ".join(described_match(match) for match in list(best.values())[:3])
    else:
        row_counts = ", ".join(
            f"{k} ({group[-1].path or 'the model itself'})" for k, group in list(candidates.items())[-6:]
        )
        evidence = f"no product has that number of classes; numbers of rows of the products: {row_counts or 'none'}"
    subject = "no linear map of one activation" if path is None else f"nothing computed in {path!r}"
    scripted = [name for name, module in model.named_modules() if is_scripted(module)]
    unseen = f" The module {scripted[0]!r} is TorchScript, so its computation cannot be watched." if scripted else ""
    return HeadNotFoundError(
        f"{subject} reproduces the logits of shape {shape} within tolerance {tolerance:g} ({evidence}). "
        f"{_unread_weight(model, logits) or _likely_cause(logits, list(best.values()), steps)}{unseen} "
        "If W and b are known, build penult.Head(weight, bias) from them"
    )


def not_confirmed_error(head: str, residual: float | None, tolerance: float) -> HeadNotFoundError:
    """Return the error for a head that does not reproduce the second batch, or was not tested on it."""
    if residual is None:
        return HeadNotFoundError(
            f"{head} reproduces the logits only with fitted numbers (a scale, a shift, weights), which needs a second "
            "batch to confirm, and this batch in reverse order gives the model nothing new: give several different "
            "samples"
        )
    return HeadNotFoundError(
        f"{head} reproduces the logits of this batch but not those of a second one (residual {residual:.2g}, "
        f"tolerance {tolerance:g}): the operations after it depend on the model's input"
    )


def described_match(match: Match) -> str:
    """Describe a match by its module, shape and residual."""
    product, extra = match.candidate.product, ""
    if match.layout.positions != "same":
        extra += f", positions {match.layout.positions}"
    if match.scale != 1:
        extra += f", scale {match.scale:.4g}"
    if match.shift is not None:
        extra += ", shifted"
    where = match.candidate.path or "(the model itself)"
    classes, features = product.weight.shape
    return f"{where} ({product.kind} {features}->{classes}{extra}) residual {match.residual:.2g}"


def described_assembly(assembly: Assembly) -> str:
    """Describe the products of an assembly by their modules."""
    paths = dict.fromkeys(repr(candidate.path or "(the model itself)") for candidate in assembly.sources)
    return f"an affine map of the concatenated activations of {', '.join(paths)}"


def are_probabilities(output: Tensor) -> bool:
    """Whether no value is negative and the values sum to 1 over the classes."""
    z = output.float()
    sums = [z.sum(axis) for axis in ({-1, 1} if z.ndim > 2 else {-1})]
    return bool((z >= 0).all()) and any(bool(((s - 1).abs() <= 1e-2).all()) for s in sums)


def _unread_weight(model: nn.Module, logits: Tensor) -> str | None:
    """Name a weight with one row for each class that cannot be read, such as a quantised one; None if there is none."""
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        # A tensor of another package may raise any error when it is asked for its shape.
        try:
            unread = not is_real(weight) and weight.ndim >= 2 and weight.shape[0] in logits.shape[1:]
        except Exception:
            continue
        # Complex and integer tensors are arrays, and their type is no sign of a head.
        if unread and not in_memory(weight):
            kind = type(weight.data if type(weight) is nn.Parameter else weight).__name__
            return (
                f"The weight {name!r} of shape {tuple(weight.shape)} is a {kind} whose values cannot be read (a "
                "quantised or offloaded weight, or a tensor subclass), so its products are not compared. If it is the "
                "head's, put a plain tensor in its place, such as weight.dequantize(); the other layers may stay so."
            )
    return None


def _likely_cause(logits: Tensor, best: Sequence[Match], steps: Steps) -> str:
    """Return the cause as far as the functions that ran and the values of the output show it."""
    z = logits.float()
    squashed_by = steps.squashed_by
    if z.ndim == 1:
        return "The output is one number for each sample (a sigmoid or a regression), not a softmax."
    if are_probabilities(z):
        return "The output is probabilities (a softmax inside the model): return the logits."
    if squashed_by == "sigmoid" and bool(((z >= 0) & (z <= 1)).all()):
        return (
            "The output lies in 0..1 (a sigmoid inside the model, as for labels that do not exclude each other; they "
            "have no softmax)."
        )
    if steps.unread is not None:
        before = "" if squashed_by is None else f"{squashed_by} and then "
        scale = " (it may be a scale that depends on the input)" if steps.unread in ("mul", "rmul", "multiply") else ""
        return (
            f"After the last product that is read, the model applies {before}{steps.unread}, which is not read as a "
            f"product of activations with one matrix{scale}. If it is one, compute it by nn.Linear, torch.matmul or "
            "torch.einsum."
        )
    if squashed_by is not None and best:
        return (
            f"After the last product the model applies {squashed_by} (a soft cap, an activation after the head): "
            "return what comes before it."
        )
    for match in best:
        values = _product_values(match)
        if values is not None and _is_monotone(values, logits.movedim(match.layout.class_axis, -1)):
            return (
                f"The output is a function of each value of {match.candidate.path or 'the model itself'} (a soft cap, "
                "a ReLU): return what comes before it."
            )
    if not best:
        return (
            "The cause is not known. Typical causes: a head that is more than one matrix for each position (a "
            "convolution wider than one pixel), distances to prototypes, a quantised head."
        )
    return (
        "The cause is not known. Typical causes: a scale that depends on the input, a soft cap or an activation after "
        "the head, several heads averaged, a quantised head."
    )


def _product_values(match: Match) -> Tensor | None:
    """Return the output of the product, classes last; None if its positions are not those of the logits."""
    if match.layout.positions != "same":
        return None
    return match.candidate.values()


def _is_monotone(values: Tensor, logits: Tensor) -> bool:
    """Whether larger values always have larger or equal logits, in at least eight values."""
    if values.numel() != logits.numel():
        return False
    order = values.flatten().float().argsort()[:: max(1, values.numel() // 100_000)]
    z = logits.flatten().float()[order]
    slack = 1e-5 * float(z.abs().max())
    return len(order) >= 8 and bool((z.diff() >= -slack).all())
