"""Stored activations that commands read, and checks that they belong to a head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from penult.activations import Activations
    from penult.cli._console import RichReporter
    from penult.data import _RowNames
    from penult.head import Head

__all__ = [
    "check_logits",
    "check_recorded",
    "check_shape",
    "guessing",
    "is_stored",
    "label_accuracy",
    "open_activations",
    "row_names",
    "spread_rows",
    "write_row_names",
]

_CHECKED = 1000  # Activations that checks look at.


def is_stored(source: Path) -> bool:
    """Return whether a source of inputs is a folder of activations, or a file that holds some."""
    from penult import io
    from penult.data import _holds_activations

    if source.is_dir():
        return (source / io.INDEX_NAME).exists() or any(source.glob("activations-*.safetensors"))
    return _holds_activations(source)


def open_activations(folder: Path, head: Head | None = None) -> Activations:
    """Open a folder that `penult extract` wrote, or read an .npz or safetensors file of activations.

    Args:
        folder: The folder or file.
        head: Head that computes the logits of a file without logits.

    Raises:
        ValueError: It is another file, holds no activations, or is damaged.
    """
    from penult.activations import Activations
    from penult.data import _holds_activations, _read_activations

    if _holds_activations(folder):
        acts = _read_activations(folder, head)
        if not len(acts):
            raise ValueError(f"{folder} holds no activations")
        return acts
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file; expected an .npz or .safetensors file with activations or features, or a folder that "
            f"penult extract wrote: penult extract package.module:factory {folder} --out acts/"
        )
    acts = Activations.open(folder)
    if not len(acts):
        raise ValueError(f"{folder} holds no activations")
    return acts


def row_names(folder: Path, acts: Activations, reporter: RichReporter) -> _RowNames | None:
    """Return the names of stored rows, None if they are unknown; a line says so if they are those of other rows."""
    from penult import io
    from penult.data import _RowNames

    if folder.is_file():
        return _RowNames([folder.name], [len(acts)])
    stored = _RowNames.load(folder)
    if stored is None:
        return None
    names, digest = stored
    if len(names) != len(acts) or digest != io.read_index(folder, "activations").metadata.get("digest"):
        reporter.line(f"the names of rows in {folder} are those of other activations, so rows are numbered")
        return None
    return names


def write_row_names(names: _RowNames, folder: Path, acts: Activations) -> None:
    """Write names of rows to a folder of activations, unless the activations are not one for each row."""
    from penult import io

    # One image has several activations in a segmentation network, for example.
    if len(names) == len(acts):
        names.save(folder, io.read_index(folder, "activations").metadata.get("digest"))


def spread_rows(acts: Activations, most: int = _CHECKED) -> Activations:
    """Return at most `most` evenly spaced rows: a set may be sorted by class."""
    return acts[torch.linspace(0, len(acts) - 1, min(len(acts), most), dtype=torch.float64, device="cpu").long()]


def label_accuracy(acts: Activations) -> tuple[float, bool]:
    """Return the accuracy of the network on some labels of its activations, and whether that is at chance level."""
    from penult._checks import is_chance_level

    some = spread_rows(acts)
    assert some.labels is not None
    accuracy = float(some.predicted.eq(some.labels).double().mean())
    return accuracy, is_chance_level(accuracy, len(some), acts.num_classes)


def guessing(network: str, accuracy: float, num_classes: int) -> str:
    """Return the warning that a network predicts labels no better than by guessing."""
    return (
        f"{network} predicts {accuracy:.1%} of the labels, no better than guessing. Check that the labels are numbers "
        f"of its own {num_classes} classes, that it is trained (--weights), and that images are preprocessed as in its "
        "training (--mean, --std, --size)"
    )


def check_shape(num_classes: int, in_features: int, source: str, head: Head, head_source: str) -> None:
    """Raise unless activations or a network have the dimension and the classes of a head."""
    if (num_classes, in_features) != (head.num_classes, head.in_features):
        raise ValueError(
            f"{source} has activations of dimension {in_features} and {num_classes} classes; expected dimension "
            f"{head.in_features} and {head.num_classes} classes, as the head in {head_source}. Give the head or pair "
            "of this network"
        )


def check_logits(acts: Activations, source: str, head: Head, head_source: str, exact: bool = False) -> None:
    """Raise unless a head gives the logits that are stored with activations.

    Args:
        acts: The activations.
        source: Their source, for the message.
        head: The head.
        head_source: Its source, for the message.
        exact: Whether the softmaxes have to agree. Otherwise the logits may differ by a temperature, and by a number
            for each class (another prior).
    """
    part = spread_rows(acts)
    h = part.activations.clamp_min(0) if part.pre_activation else part.activations
    logits, stored = head(h.to(head.weight)).double().cpu(), part.logits.double().cpu()
    if exact:
        compared, scale = "softmaxes", 1.0
        error = float((logits.softmax(-1) - stored.softmax(-1)).abs().max())
    else:
        compared, scale = "logits", max(float(_centered(stored).abs().max()), 1e-6)
        error = float(_centered(stored - logits * head.temperature).abs().max())
    # Comparisons with NaN are false, so this refuses NaN as well.
    if not error <= (1e-3 if acts.dtype.itemsize >= 4 else 0.05) * scale:
        raise ValueError(
            f"the head in {head_source} does not give the logits stored in {source}: {compared} differ by up to "
            f"{error:.3g}. Give the head or pair of this very network, with the same --fold as the activations"
        )


def _centered(logits: Tensor) -> Tensor:
    logits = logits - logits.mean(1, keepdim=True)
    return logits - logits.mean(0)


def check_recorded(
    recorded: Mapping[str, Any] | None, source: str, expected: Mapping[str, Any] | None, head_source: str
) -> None:
    """Raise unless the inputs of two sources were prepared in the same way, as far as both record it."""
    if recorded is None or expected is None:
        return
    for name in [name for name in recorded if name in expected]:
        own, other = recorded[name], expected[name]
        # A size or mode is None where images have several; one number stands for all channels.
        unknown = name in ("size", "mode") and None in (own, other)
        same = own == other or (
            isinstance(own, list)
            and isinstance(other, list)
            and 1 in (len(own), len(other))
            and len({*own, *other}) == 1
        )
        if not unknown and not same:
            raise ValueError(
                f"the inputs of {source} were prepared with {name} = {own}; expected {other}, as in {head_source}. "
                "Extract the activations again with the preprocessing of the network"
            )
