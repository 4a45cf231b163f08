"""Annotated option types that several commands share; this file loads nothing but typer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from penult.data import ImageDataset, _Normalization

__all__ = [
    "AsJson",
    "BatchSize",
    "BiasKey",
    "Classes",
    "Confident",
    "Count",
    "Device",
    "Devices",
    "Fold",
    "HeadPath",
    "ImageColumn",
    "ImageOptions",
    "LabelColumn",
    "Mean",
    "Mode",
    "Model",
    "Network",
    "NetworkWeights",
    "NumNodes",
    "Pair",
    "Precision",
    "Seed",
    "Size",
    "Std",
    "Strategy",
    "WeightKey",
    "Weights",
    "Workers",
    "plain",
    "with_recorded",
]

# --- networks, heads and pairs ------------------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Factory of the network, package.module:factory, called without arguments; or a .safetensors file that "
        "holds a head.",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="State dict for the network, .safetensors.")]
Network = Annotated[
    str | None, typer.Option("--model", help="Factory of the network that reads images, package.module:factory.")
]
NetworkWeights = Annotated[Path | None, typer.Option("--weights", help="State dict for the network, .safetensors.")]
HeadPath = Annotated[
    str | None, typer.Option("--path", help="Name of the head's module. Default: found by a forward pass.")
]
Fold = Annotated[bool, typer.Option(help="Fold a norm layer before the head into the head.")]
Pair = Annotated[
    str,
    typer.Argument(
        metavar="PAIR", help="Pair written by `penult fit`, *.penult.safetensors; or a .safetensors file with a head."
    ),
]
WeightKey = Annotated[str | None, typer.Option(help="Name of W in a .safetensors file.")]
BiasKey = Annotated[str | None, typer.Option(help="Name of b in a .safetensors file.")]

# --- images -------------------------------------------------------------------------------------------------

Size = Annotated[str | None, typer.Option(help="Size that images are scaled to, for example 224 or 32x48.")]
Mode = Annotated[str | None, typer.Option(help="Colour mode that images are converted to: L (grey) or RGB.")]
Mean = Annotated[str | None, typer.Option(help="Per-channel mean of images in 0..1, for example 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Per-channel standard deviation, for example 0.229,0.224,0.225.")]
ImageColumn = Annotated[
    str | None, typer.Option(help="Column of the images in parquet files, or their array in an .npz file.")
]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column of the labels in parquet files, or their array in an .npz file.")
]
BatchSize = Annotated[int, typer.Option(help="Images per batch.", min=1)]
Workers = Annotated[int, typer.Option(help="Number of processes that decode images.", min=0)]

# --- images to draw -----------------------------------------------------------------------------------------

Classes = Annotated[
    list[int] | None, typer.Option("--class", help="Class to draw images of; repeatable. Default: all classes.")
]
Count = Annotated[
    int | None,
    typer.Option("--count", "-n", help="Images per class. Default: 8, or 64 for a single class.", min=1),
]
Confident = Annotated[
    float | None,
    typer.Option(help="Keep only activations with p(y|h) above this: clearer images with less variety."),
]

# --- where and how to compute, and what to print ------------------------------------------------------------

Seed = Annotated[int, typer.Option(help="Seed for all random numbers.", min=0)]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1, mps.")]
Devices = Annotated[
    int | None, typer.Option(help="Number of devices per machine. Default: 1, or as started by torchrun.", min=1)
]
NumNodes = Annotated[int | None, typer.Option(help="Number of machines. Default: 1, or as started by torchrun.", min=1)]
Strategy = Annotated[str, typer.Option(help="Lightning strategy for several devices, for example ddp.")]
Precision = Annotated[str, typer.Option(help="Lightning precision, for example bf16-mixed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON; progress goes to stderr.")]


def plain(value: Any) -> Any:
    """Convert the value of an option to a value that JSON can hold."""
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


# --- options that say how images are read -------------------------------------------------------------------


@dataclass(frozen=True)
class ImageOptions:
    """The options --size, --mode, --mean, --std, --image-column and --label-column."""

    size: str | None
    mode: str | None
    mean: str | None
    std: str | None
    image_column: str | None
    label_column: str | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ImageOptions:
        """Select these options from all options of a command."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})

    def read(self, source: str, normalized: bool = True) -> ImageDataset:
        """Read a data set; with `normalized=False` images stay in [0, 1], as before --mean and --std."""
        from penult.data import read

        mean, std = (self._mean, self._std) if normalized else (None, None)
        return read(source, size=_size(self.size), mode=self.mode, mean=mean, std=std, **self._columns(source))

    def _columns(self, source: str) -> dict[str, str]:
        """Return the columns by the names that the reader of the data set has for them."""
        path = Path(source)
        is_npz = path.suffix.lower() == ".npz"
        names = ("images", "labels") if is_npz else ("image", "label")
        columns = dict(zip(names, (self.image_column, self.label_column), strict=True))
        given = {name: column for name, column in columns.items() if column is not None}
        if given and (source == "digits" or (path.is_dir() and not any(path.rglob("*.parquet")))):
            raise ValueError(
                f"{source} has no columns; --image-column and --label-column are for parquet files and for the arrays "
                "of .npz files. Leave them out"
            )
        return given

    @property
    def normalization(self) -> _Normalization | None:
        """The normalisation by --mean and --std; None if neither is given."""
        from penult.data import _Normalization

        return _Normalization.of(self._mean, self._std)

    @property
    def _mean(self) -> list[float] | None:
        return _per_channel("--mean", self.mean)

    @property
    def _std(self) -> list[float] | None:
        std = _per_channel("--std", self.std)
        if std is not None and min(std) <= 0:
            raise ValueError(f"--std is {self.std}; expected positive numbers")
        return std


def _per_channel(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} is {text!r}; expected one number, or one per channel such as 0.485,0.456,0.406"
        ) from None


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.lower().replace("x", ",").split(",")]
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
    except (ValueError, IndexError):
        raise ValueError(f"--size is {text!r}; expected one number, or HEIGHTxWIDTH") from None


# --- what was recorded of the network's inputs --------------------------------------------------------------


def with_recorded(options: Mapping[str, Any], recorded: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """Return the options of a command, with what was recorded of the network's inputs where they say nothing.

    Args:
        options: All options of the command.
        recorded: ``preprocessing`` of a head, or None if nothing is known.
        source: Name of the file or folder that records it, for messages.

    Raises:
        ValueError: An option says otherwise.
    """
    changed = dict(options)
    kind = None if recorded is None else recorded.get("inputs")
    if recorded is None or kind not in _READ:
        return changed
    for other, names in _READ.items():
        given = [name for name in names if other != kind and options.get(name) is not None]
        if given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} is for {other}, but {source} is of a network that reads {kind}; leave "
                "it out"
            )
    for name in _READ[kind]:
        if name not in options or name not in recorded:
            continue
        own, known = _parsed(name, options[name]), _as_parsed(name, recorded[name])
        # Images of several sizes, or of several modes, are read as they are.
        if known is None and name in ("size", "mode"):
            continue
        if own is None:
            changed[name] = None if known is None else _text(name, known)
        elif not _same(own, known):
            expected = "none" if known is None else _text(name, known)
            raise ValueError(
                f"--{name.replace('_', '-')} is {options[name]}; expected {expected}, as recorded in {source}: the "
                "inputs of its network are prepared so. Leave the option out"
            )
    return changed


# Options for each kind of inputs.
_READ = {"images": ("size", "mode", "mean", "std"), "text": ("text", "tokenizer", "max_length")}


def _parsed(name: str, value: Any) -> Any:
    """Return the value of an option as it is recorded."""
    if value is None or name not in ("size", "mean", "std"):
        return value
    if name == "size":
        size = _size(value)
        return [size, size] if isinstance(size, int) else list(size or ())
    return _per_channel(f"--{name}", value)


def _as_parsed(name: str, known: Any) -> Any:
    """Return a recorded value; ValueError if a file has one of another type."""
    wrong = known is not None and (
        not isinstance(known, list) or not all(isinstance(number, int | float) for number in known)
        if name in ("size", "mean", "std")
        else not isinstance(known, int if name == "max_length" else str)
    )
    if wrong:
        raise ValueError(f"the recorded preprocessing has {name} = {known!r}, which no version of penult writes")
    return known


def _text(name: str, known: Any) -> Any:
    """Return a recorded value as the option gives it."""
    if not isinstance(known, list):
        return known
    return ("x" if name == "size" else ",").join(map(str, known))


def _same(own: Any, known: Any) -> bool:
    """Whether two values are the same; one number stands for all channels."""
    if not isinstance(own, list) or not isinstance(known, list):
        return bool(own == known)
    count = max(len(own), len(known))
    pairs = zip(own * (count // len(own)), known * (count // max(len(known), 1)), strict=False)
    return len(own) in (1, count) and len(known) in (1, count) and all(abs(a - b) <= 1e-6 for a, b in pairs)
