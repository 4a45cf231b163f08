"""Reader of any data set of images, and the digits of scikit-learn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from penult._extras import extra
from penult.data._dataset import ImageDataset, Images
from penult.data._folder import folder
from penult.data._npz import Arrays, npz
from penult.data._parquet import parquet

__all__ = ["digits", "read"]


def read(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], **options: Any) -> ImageDataset:
    """Read a data set of images with the reader for its kind.

    Args:
        source: ``"digits"``; a ``.parquet`` file, a glob or a list of such files (``"data/train-*.parquet"``), or a
            folder with such files, for `parquet`; another folder, for `folder`; an ``.npz`` file, for `npz`.
        options: Options of that reader: ``mode``, ``size`` and ``transform`` for all of them.

    Returns:
        The images, which are decoded at access.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: `source` is none of these. Readers raise further errors.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> images, labels = next(iter(DataLoader(read("digits", size=16, mode="RGB"), batch_size=64)))
        >>> images.shape, labels.shape
        (torch.Size([64, 3, 16, 16]), torch.Size([64]))
    """
    if source == "digits":
        images, labels, names = digits()
        return ImageDataset(Arrays(images, "digits"), labels, names, **options)
    if not isinstance(source, str | os.PathLike):
        return parquet(source, **options)
    path = Path(source)
    if path.is_dir():
        return (parquet if any(path.glob("[!.]*.parquet")) else folder)(path, **options)
    if path.suffix == ".parquet":
        return parquet(source, **options)
    if path.suffix == ".npz":
        return npz(path, **options)
    expected = 'expected "digits", a .parquet file, glob or folder, a folder of images, or an .npz file'
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {os.fspath(source)!r}; {expected}")
    raise ValueError(f"{os.fspath(source)!r} is not a data set that penult can read; {expected}")


# --- Handwritten digits of scikit-learn, which need no download ---------------------------------------------


def digits() -> Images:
    """Return the 1797 handwritten digits of 8×8 pixels in scikit-learn (Alpaydin and Kaynak, 1998).

    Returns:
        Images (1797, 1, 8, 8) in [0, 1].

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> train, test = digits().split(0.8, 0.2)
        >>> train.images.shape, test.images.shape
        (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]))
    """
    bunch = extra("sklearn.datasets", "the digits come with scikit-learn").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return Images(images, torch.tensor(bunch.target), tuple(map(str, range(10))))
