"""Argument checks: one for each kind of fault, with one exception type and one wording.

Messages read ``<what> is <got>; expected <want>. <What to do.>`` A wrong type or dtype is a TypeError, a wrong shape or
value is a ValueError. Each check takes the name that the caller's user knows the argument by.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from penult._row_blocks import blocks

__all__ = [
    "as_activations",
    "as_size",
    "check_between",
    "check_bias",
    "check_choice",
    "check_finite",
    "check_floating",
    "check_integer",
    "check_labels",
    "check_not_negative",
    "check_positive",
    "check_seed",
    "check_shares",
    "check_weight",
    "class_names_tuple",
    "described",
    "index_of",
    "integer_labels",
    "is_chance_level",
    "tensor_of",
    "unreadable",
    "usable_device",
    "with_remedy",
]

_Error = TypeVar("_Error", bound=Exception)


def described(value: Any) -> str:
    """Describe a value of a wrong type for a message: by the dtype of a tensor, or by the name of the type."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Remedy:
    """Advice to pass a parameter, stored in parts so that a caller can write another name for the parameter.

    Attributes:
        reason: The message without the parameter.
        parameter: Name of the parameter.
        purpose: The effect of a parameter that is a flag, such as "start again"; empty for one that names a choice.
    """

    reason: str
    parameter: str
    purpose: str


def with_remedy(error: _Error, parameter: str, purpose: str = "") -> _Error:
    """Append ", or pass PARAMETER=True to PURPOSE", or "; pass one with PARAMETER="; keep the parts as ``remedy``."""
    reason = str(error)
    vars(error)["remedy"] = Remedy(reason, parameter, purpose)
    text = f", or pass {parameter}=True to {purpose}" if purpose else f"; pass one with {parameter}="
    error.args = (reason + text,)
    return error


# --- numbers ------------------------------------------------------------------------------------------------

# Numbers of other kinds, such as those of NumPy, are admitted. The checks return them as Python's own, because
# arithmetic in float32 or int64, generators and JSON treat the others in another way.


def check_integer(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """Return a value as an int; raise unless it is an integer (bool is not) from `low` to `high`."""
    want = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; expected {want}")
    if int(value) < low or (high is not None and int(value) > high):
        raise ValueError(f"{name} is {value}; expected {want}")
    return int(value)


def check_seed(seed: Any) -> int:
    """Return a seed as an int; raise unless it is an integer that generators of torch take."""
    return check_integer("seed", seed, -(1 << 63), (1 << 64) - 1)


def _number(name: str, value: Any, want: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; expected {want}")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return a number as a float; raise unless it is positive and finite."""
    want = "a positive, finite number"
    number = _number(name, value, want)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} is {value}; expected {want}")
    return number


def check_not_negative(name: str, value: Any) -> float:
    """Return a number as a float; raise unless it is finite and at least 0."""
    want = "a finite number of at least 0"
    number = _number(name, value, want)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} is {value}; expected {want}")
    return number


def check_between(name: str, value: Any, low: float = 0, high: float = 1, *, inclusive: bool = False) -> float:
    """Return a number as a float; raise unless it lies between two others; `inclusive` allows the two as well."""
    want = (
        f"a number from {low:g} to {high:g}" if inclusive else f"a number between {low:g} and {high:g}, neither of them"
    )
    number = _number(name, value, want)
    if not (low < number < high or (inclusive and number in (low, high))):
        raise ValueError(f"{name} is {value}; expected {want}")
    return number


def check_shares(shares: Sequence[Any]) -> tuple[float, ...]:
    """Return fractions of a data set as floats; raise unless they are positive and sum to at most 1."""
    want = "positive numbers that sum to at most 1, one argument each: split(0.8, 0.2)"
    numbers = tuple(_number(f"shares[{i}]", share, want) for i, share in enumerate(shares))
    if not numbers or not min(numbers) > 0 or not sum(numbers) <= 1 + 1e-6:
        raise ValueError(f"shares is {numbers}; expected {want}")
    return numbers


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, choices))}")


def as_size(shape: Any) -> torch.Size:
    """Return a shape as a torch.Size; an integer n stands for (n,), as in NumPy.

    Raises:
        TypeError: The shape is neither an integer nor a sequence of integers.
    """
    return torch.Size((int(shape),)) if isinstance(shape, numbers.Integral) else torch.Size(shape)


# --- tensors ------------------------------------------------------------------------------------------------


# Float8 and narrower dtypes only store numbers: torch computes no sums, comparisons or checks in them.
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def unreadable(tensor: Tensor) -> tuple[str, str] | None:
    """Return why a tensor is not a dense array of real floating-point numbers, and the remedy; None if it is one."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "not initialised (a lazy parameter)", "Run the model once on a batch"
    if tensor.is_nested:
        return "a nested tensor", "Pad it with torch.nested.to_padded_tensor(x, 0.0)"
    if tensor.layout != torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.')} tensor", "Use x.to_dense()"
    if tensor.is_quantized:
        return f"a quantised {tensor.dtype} tensor", "Use x.dequantize()"
    if tensor.is_complex():
        return f"a complex {tensor.dtype} tensor", "Take real numbers from it, for example x.real or x.abs()"
    if not tensor.is_floating_point():
        return described(tensor), "Use x.float() if its values are what you mean"
    if tensor.dtype not in _FLOATS:
        return described(tensor), "Use x.to(torch.bfloat16), with the scale of the format if it has one"
    return None


def tensor_of(value: Any, device: torch.device | str | None = None) -> Tensor | None:
    """Return a tensor as it is, an array of another library as a tensor, and None for other types.

    Arrays are not copied, except those that torch does not take as they are: with negative strides, or with the byte
    order of another machine. A masked array is refused, because a tensor has no mask.

    Args:
        value: Tensor, NumPy array, object with ``__dlpack__``, ``__array__`` or ``__cuda_array_interface__``, or other.
        device: Device of the tensor for a NumPy array, which has none. Default: the CPU.
    """
    if isinstance(value, Tensor):
        return value
    numpy = sys.modules.get("numpy")
    try:
        if hasattr(value, "__dlpack__") and not (numpy is not None and isinstance(value, numpy.ndarray)):
            # An array knows its device.
            return torch.utils.dlpack.from_dlpack(value)
        if hasattr(value, "__cuda_array_interface__"):
            return torch.as_tensor(value, device="cuda")
        if not hasattr(value, "__array__") or (numpy is not None and isinstance(value, numpy.ma.MaskedArray)):
            return None
        array = value.__array__()
        if min(array.strides, default=0) < 0 or not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            # The package writes to no tensor of a caller, so that arrays need not be writable.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.as_tensor(array, device="cpu" if device is None else device)
    except (TypeError, ValueError, RuntimeError, BufferError):
        return None


def as_activations(
    value: Any, name: str = "h", shape: str = "(*S, d)", device: torch.device | str | None = None
) -> Tensor:
    """Return activations or logits as a floating-point tensor: a tensor is returned as it is, an array as one.

    Args:
        value: Tensor, NumPy array, or any other array that torch takes without a copy. Lists are none.
        name: Name of the value in messages.
        shape: Expected shape in messages; it is not checked.
        device: Device of the tensor for a NumPy array, which has none. Default: the CPU.

    Raises:
        TypeError: It is of another type or dtype.
    """
    tensor = tensor_of(value, device)
    if tensor is None or not tensor.is_floating_point():
        # A set of activations holds the tensor that is wanted.
        remedy = f"{name}.activations" if hasattr(type(value), "activations") else None
        raise TypeError(
            f"{name} is {described(value if tensor is None else tensor)}; expected a floating-point tensor or array "
            f"{shape}. Pass {remedy or f'torch.as_tensor({name}, dtype=torch.float32)'}"
        )
    return tensor


def check_floating(name: str, value: Any, shape: str) -> None:
    """Raise a TypeError unless a value is a floating-point tensor; `shape` is the expected shape in the message."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex() or value.is_quantized):
        raise TypeError(f"{name} is {described(value)}; expected a floating-point tensor {shape}")
    if (fault := unreadable(value)) is not None:
        raise TypeError(f"{name} is {fault[0]}; expected a floating-point tensor {shape}. {fault[1]}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise unless all values of a tensor are finite; the message says how many are not and where the first is."""
    count, first, start = 0, [0], 0
    for block in blocks(tensor):
        wrong = (~block.isfinite()).nonzero()
        if len(wrong) and not count:
            first = [start + int(wrong[0, 0]), *wrong[0, 1:].tolist()]
        count += len(wrong)
        start += len(block)
    if count:
        raise ValueError(f"{name} holds {count} values that are NaN or infinite, the first at index {first}")


def usable_device(name: str, device: Any) -> torch.device:
    """Return a device; raise if it does not exist or cannot be used on this machine.

    Raises:
        TypeError: `device` is neither a device nor the name of one.
        ValueError: The device cannot be used on this machine.
    """
    want = 'a device of this machine, such as "cpu"'
    try:
        found_device = torch.device(device)
        torch.empty(0, device=found_device)
    except TypeError:
        raise TypeError(f"{name} is {described(device)}; expected {want}") from None
    # Builds of torch without a kind of device raise an AssertionError or a NotImplementedError.
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is {str(device)!r}, which cannot be used here ({reason}); expected {want}") from error
    if found_device.type == "meta":
        raise ValueError(f"{name} is 'meta', which holds no values; expected {want}")
    return found_device


# --- labels -------------------------------------------------------------------------------------------------

# Indexing with uint8 selects a mask in PyTorch, and narrow integers overflow in arithmetic, so labels are widened.
_INTEGERS = frozenset(
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {getattr(torch, name) for name in ("uint16", "uint32", "uint64") if hasattr(torch, name)}
)


def integer_labels(
    labels: Any,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    *,
    name: str = "labels",
    offset: int = 0,
    values: bool = True,
    remedy: str = "",
) -> Tensor:
    """Check labels and return them as an int64 tensor on their own device.

    Args:
        labels: Tensor of any integer dtype, or any argument of ``torch.as_tensor`` that gives one.
        shape: Required shape; None for any.
        num_classes: K, for labels in 0..K-1; None for any values.
        name: Name of the labels in messages.
        offset: Number added to the index that a message names.
        values: Whether to check the values; on an accelerator that waits for the device.
        remedy: What to do about labels that are out of range, as a sentence.

    Raises:
        TypeError: The labels are not integers.
        ValueError: The labels have another shape, or a label is out of range.
    """
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} is {described(labels)}; expected a tensor of integer class indices") from None
        if not labels.numel():
            labels = labels.to(torch.int64)
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name} is {described(labels)}; expected a tensor of integer class indices")
    if shape is not None and labels.shape != torch.Size(shape):
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}; expected {tuple(shape)}, one class index for each row"
        )
    wide: Tensor = labels.to(torch.int64)
    if num_classes is not None and values:
        flat = wide.flatten()
        wrong = (flat < 0) | (flat >= num_classes)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            where = f"{name}[{offset + first}]" if wide.ndim else name
            raise ValueError(
                f"{where} is {int(flat[first])}, out of range ({int(wrong.sum())} such labels); expected 0 to "
                f"{num_classes - 1}. The head has {num_classes} classes" + (f". {remedy}" if remedy else "")
            )
    return wide


def index_of(index: Any) -> Any:
    """Convert an integer index to int64, since torch takes uint8 for a mask; return any other index unchanged."""
    return index.to(torch.int64) if isinstance(index, Tensor) and index.dtype in _INTEGERS else index


def check_labels(labels: Any, logits_shape: torch.Size, offset: int = 0, remedy: str = "") -> None:
    """Raise unless labels are an integer tensor with one label in 0..K-1 for each row of logits (..., K)."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is {described(labels)}; expected a tensor of integer class indices")
    integer_labels(labels, logits_shape[:-1], logits_shape[-1], offset=offset, remedy=remedy)


def class_names_tuple(names: Any, num_classes: int | None = None, name: str = "class_names") -> tuple[str, ...]:
    """Return the names of classes in the order of the classes.

    Args:
        names: One name for each class: a sequence, or a mapping of class numbers to names, such as ``id2label`` of a
            configuration of Hugging Face. The numbers may be text, as JSON has them.
        num_classes: K; None for any number.
        name: Name of the argument in messages.

    Raises:
        TypeError: `names` is neither a sequence nor a mapping, or a name is not a string.
        ValueError: The class numbers are not 0 to K - 1, or the number of names is not K.
    """
    if isinstance(names, Mapping):
        names = _in_order(names, name)
    # A string is a sequence, too: of its letters. A set has no order.
    if isinstance(names, str | bytes | Set) or not isinstance(names, Iterable):
        raise TypeError(
            f"{name} is {described(names)}; expected a sequence of names, or a mapping of class numbers to names"
        )
    texts = tuple(names)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{number}] is {text!r}; expected a string")
    if num_classes is not None and len(texts) != num_classes:
        raise ValueError(f"{name} has {len(texts)} names; expected {num_classes}, one for each class")
    return tuple(map(str, texts))


def _in_order(names: Mapping[Any, Any], argument: str) -> list[Any]:
    """Return the values of a mapping whose keys are the numbers 0 to K - 1, in that order."""
    try:
        by_number = {
            int(key) if isinstance(key, str) else operator.index(key): name
            for key, name in names.items()
            if not isinstance(key, bool)
        }
    except (TypeError, ValueError):
        by_number = {}
    if len(by_number) != len(names) or sorted(by_number) != list(range(len(names))):
        shown = ", ".join(map(repr, [*names][:3])) + (", ..." if len(names) > 3 else "")
        # Such as label2id of Hugging Face, or class_to_idx of torchvision.
        inverted = all(isinstance(key, str) and isinstance(name, int) for key, name in names.items())
        raise ValueError(
            f"{argument} is a mapping with the keys {shown}; expected the class numbers 0 to "
            f"{max(len(names) - 1, 0)}, each with its name{'. Pass the inverse mapping' * inverted}"
        )
    return [by_number[number] for number in range(len(names))]


def is_chance_level(accuracy: float, count: int, num_classes: int) -> bool:
    """Whether an accuracy over `count` rows is at most three standard errors above that of guessing."""
    chance = 1 / num_classes
    return accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / count)


# --- heads --------------------------------------------------------------------------------------------------


def check_weight(weight: Tensor, empty_rows: bool = False) -> None:
    """Raise unless W is a finite floating tensor (K, d), K >= 2; some rows may be zero if `empty_rows`."""
    check_floating("weight", weight, "(K, d)")
    if weight.is_meta:
        raise ValueError(
            "weight is on the meta device, which holds no values; expected a tensor in memory. Load the weights first"
        )
    if weight.ndim != 2 or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (K, d), one row for each class")
    if weight.shape[0] == 1:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, one row (K = 1): a single-logit (sigmoid) head is not a "
            "softmax head. The two-class head of the same sigmoid, for row w and bias c, is "
            "Head(torch.stack([-w / 2, w / 2]), torch.stack([-c / 2, c / 2]))"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected at least two rows, one for each class")
    check_finite("weight", weight)
    zero = torch.cat([~rows.any(dim=1) for rows in blocks(weight)]).nonzero().flatten().tolist()
    if zero and not (empty_rows and len(zero) < len(weight)):
        names = ", ".join(map(str, zero[:8])) + (f" and {len(zero) - 8} more" if len(zero) > 8 else "")
        raise ValueError(
            f"the rows of weight for class {names} are all zero: such classes were never trained (padding, for "
            "example). Drop them from weight and bias"
        )


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Raise unless b is None, or finite, (K,), and of the dtype and device of W."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias is {described(bias)}; expected a tensor (K,) or None")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected {tuple(weight.shape[:1])} for a weight of shape "
            f"{tuple(weight.shape)}"
        )
    if bias.dtype != weight.dtype or bias.device != weight.device:
        raise ValueError(
            f"bias is {bias.dtype} on {bias.device}; expected {weight.dtype} on {weight.device}, as weight. Use "
            "bias.to(weight)"
        )
    check_finite("bias", bias)
