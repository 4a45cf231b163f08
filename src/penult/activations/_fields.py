"""Fields of a batch: inputs that the model takes, labels, and fields that are neither."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from penult._checks import described, is_chance_level, tensor_of

__all__ = ["IGNORED", "FieldReader", "Fields", "check_mask", "check_not_row_numbers", "labels_among"]

IGNORED = -100
"""Label of samples that are left out, as in torch.nn.functional.cross_entropy."""

_LABEL_KEYS = ("labels", "label", "targets", "target", "y")
# Names that libraries use for the input of a model, which may itself know it by another name.
_INPUT_KEYS = frozenset(
    {"pixel_values", "images", "image", "imgs", "img", "inputs", "input", "data", "features", "input_ids", "x", "X"}
)
# Fewest labels that are called row numbers because they are 0, 1, 2, ...
_MIN_ROW_NUMBERS = 8


class Fields(NamedTuple):
    """Inputs of the model and labels of one batch.

    Attributes:
        args: Inputs by position.
        kwargs: Inputs by keyword.
        labels: Labels, or None.
        mask: Attention mask, or None.
        ids: Token ids, or None.
        choices: Where several entries of a tuple may be the labels, these entries by their position; else empty.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Any = None
    mask: Tensor | None = None
    ids: Tensor | None = None
    choices: Mapping[int, Tensor] = {}


class FieldReader:
    """Splits batches into their fields, by the signature of the model's forward where a batch is a mapping."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = _parameters_of(model)
        self._warned = False

    def __call__(self, batch: Any) -> Fields:
        """Return the fields of a batch.

        Raises:
            TypeError: The batch is of another kind, a single sample, or a mapping whose inputs are not known.
        """
        if isinstance(batch, Mapping):
            fields = self._of_mapping(batch)
        elif isinstance(batch, tuple | list) and batch:
            fields = _of_tuple(batch)
        else:
            tensor = tensor_of(batch)
            fields = None if tensor is None else Fields((tensor,), {})
        if fields is None:
            kind = described(batch)
            if isinstance(batch, Mapping):
                kind += f" with keys {list(batch)} and no input tensor"
            elif isinstance(batch, tuple | list) and batch:
                kind += f" that begins with {described(batch[0])}"
            raise TypeError(f"batch is {kind}; expected a tensor, (tensor, labels), or a dict of tensors and labels")
        if isinstance(fields.labels, int) or (isinstance(fields.labels, Tensor) and not fields.labels.ndim):
            raise TypeError(
                "batch has a single number as its label, as one sample of a data set has; expected labels (B,). "
                "Pass batches: torch.utils.data.DataLoader(dataset, batch_size=64)"
            )
        return fields

    def _of_mapping(self, batch: Mapping[str, Any]) -> Fields | None:
        names = [key for key in _LABEL_KEYS if key in batch]
        if len(names) > 1:
            raise TypeError(
                f"batch has labels under {' and '.join(map(repr, names))}; expected one of them. Pass tuples: "
                f"((batch[INPUT], batch[{names[0]!r}]) for batch in loader)"
            )
        label = names[0] if names else None
        tensors = {key: tensor for key, value in batch.items() if (tensor := tensor_of(value)) is not None}
        labels = None if label is None else tensors.pop(label, batch[label])
        if not tensors:
            return None
        args, kwargs = self._inputs(tensors, list(batch), label)
        unused = [key for key, value in tensors.items() if key not in kwargs and all(value is not x for x in args)]
        if unused and label is None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{', '.join(map(repr, unused))} of the batches are not passed to the model, whose forward does not "
                f"take them, and there are no labels: these are read from {', '.join(map(repr, _LABEL_KEYS))}",
                UserWarning,
                stacklevel=6,
            )
        return Fields(args, kwargs, labels, tensors.get("attention_mask"), tensors.get("input_ids"))

    def _inputs(
        self, tensors: dict[str, Tensor], keys: list[str], label: str | None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return the inputs by position and by keyword: those that the forward names, or one of a usual name."""
        if len(tensors) == 1:
            return tuple(tensors.values()), {}
        if self._parameters is None:
            return (), tensors
        kwargs = {key: value for key, value in tensors.items() if key in self._parameters}
        missing = [name for name, required in self._parameters.items() if required and name not in kwargs]
        if kwargs and not missing:
            return (), kwargs
        usual = [key for key in tensors if key not in kwargs and key in _INPUT_KEYS]
        # The input by position is the first parameter.
        first = next(iter(self._parameters), None)
        if len(usual) == 1 and missing in ([], [first]) and first not in kwargs:
            return (tensors[usual[0]],), kwargs
        pair = "batch[INPUT]" if label is None else f"(batch[INPUT], batch[{label!r}])"
        raise TypeError(
            f"batch has the keys {keys}, and the model's forward takes {list(self._parameters)}; expected one input, "
            f"or inputs under the names of the forward. Pass the input alone: ({pair} for batch in loader)"
        )


def _parameters_of(model: nn.Module) -> dict[str, bool] | None:
    """Return the names of the parameters of a forward, each with whether it is required; None if it takes any."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    # Some callables have no signature.
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    return {parameter.name: parameter.default is parameter.empty for parameter in named}


def _of_tuple(batch: tuple[Any, ...] | list[Any]) -> Fields | None:
    first, *others = batch
    tensor = tensor_of(first)
    if tensor is None:
        return None
    entries = [value if (array := tensor_of(value)) is None else array for value in others]
    integers = {
        position: value
        for position, value in enumerate(entries, start=1)
        if isinstance(value, Tensor) and value.dtype != torch.bool and not value.dtype.is_floating_point
    }
    if len(entries) > 1 and integers and list(integers) != [1]:
        return Fields((tensor,), {}, next(iter(integers.values())), choices=integers)
    return Fields((tensor,), {}, entries[0] if entries else None)


def labels_among(choices: Mapping[int, Tensor], logits: Tensor) -> int:
    """Return which of several entries of a batch are the labels, by their values and the model's predictions.

    Row numbers do not repeat, and a model does not predict them. Labels do one or the other.

    Args:
        choices: Integer tensors by position.
        logits: (*S, K).

    Raises:
        ValueError: None of them, or more than one, is like labels.
    """
    predicted = logits.argmax(-1).cpu()
    like_labels = [position for position, values in choices.items() if _like_labels(values.cpu(), predicted, logits)]
    if len(like_labels) != 1:
        raise ValueError(
            f"batch has integers in the entries {' and '.join(map(str, choices))} (counted from 0), and their values "
            "do not tell labels from row numbers; expected (input, labels). Pass pairs: ((batch[0], batch[i]) for "
            "batch in loader), where i is the entry with the labels"
        )
    if like_labels != [1]:
        warnings.warn(
            f"the labels are taken from entry {like_labels[0]} of the batches (counted from 0): its values repeat or "
            "are predicted by the model, and those of the other integer entries are not",
            UserWarning,
            stacklevel=5,
        )
    return like_labels[0]


def _like_labels(values: Tensor, predicted: Tensor, logits: Tensor) -> bool:
    if values.shape != predicted.shape:
        return False
    known = values != IGNORED
    labels, num_classes = values[known].to(torch.int64), logits.shape[-1]
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        return False
    accuracy = float((labels == predicted[known]).double().mean())
    return len(labels.unique()) < len(labels) or not is_chance_level(accuracy, len(labels), num_classes)


def check_not_row_numbers(labels: Tensor, logits: Tensor) -> None:
    """Warn if labels (M,) of the first batch are the row numbers, and the model predicts them no better than chance.

    With one row for each class in order, they are labels: row numbers would reach K only by coincidence, and those of a
    next batch are out of range, which is an error.
    """
    count = len(labels)
    if count == logits.shape[-1]:
        return
    if count < _MIN_ROW_NUMBERS or not torch.equal(labels, torch.arange(count, device=labels.device)):
        return
    accuracy = float((logits.flatten(end_dim=-2).argmax(-1).cpu() == labels.cpu()).double().mean())
    if is_chance_level(accuracy, count, logits.shape[-1]):
        warnings.warn(
            f"the labels of the first batch are 0 to {count - 1} in order, and the model predicts {accuracy:.1%} of "
            "them: are they row numbers? If so, pass (input, labels), or the input alone; if they are classes of the "
            "first images, ignore this warning",
            UserWarning,
            stacklevel=5,
        )


def check_mask(mask: Tensor, logits: torch.Size) -> None:
    """Raise a ValueError if an attention mask (B, T) belongs to other tokens than logits of shape (B, T', K).

    A prompt that was learned, or image patches, may stand before the tokens, so that padding cannot be told from them.
    """
    if mask.ndim == 2 and len(logits) == 3 and mask.shape[0] == logits[0] and mask.shape[1] != logits[1]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the model gives logits for {logits[1]} positions of "
            f"each sample; expected {tuple(logits[:2])}. The model adds or removes positions (a learned prompt, image "
            "patches), so the mask does not say which are padding. Pass labels of shape "
            f"{tuple(logits[:2])}, which are {IGNORED} at each position to leave out"
        )
