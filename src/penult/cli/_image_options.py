"""Options of commands that say how images are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from penult.data import ImageDataset, _Normalization, read

__all__ = ["ImageOptions"]


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
