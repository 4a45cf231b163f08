"""Reader of any data set of images, and the digits of scikit-learn."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import Any

import torch

from penult._extras import extra
from penult.data._dataset import ImageDataset, Images
from penult.data._folder import folder, images_among
from penult.data._npz import Arrays, npz
from penult.data._parquet import is_parquet, parquet
from penult.data._splits import counted, files_below
from penult.io import _other_kind, _user_path

__all__ = ["digits", "read"]


def read(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], **options: Any) -> ImageDataset:
    """Read a data set of images with the reader for its kind.

    Args:
        source: ``"digits"``; a ``.parquet`` file, a glob or a list of such files (``"data/train-*.parquet"``), or a
            folder with such files, also in a subfolder, for `parquet`; another folder, for `folder`; an ``.npz`` file,
            for `npz`. A path that exists is no glob, and suffixes may be in upper case.
        options: Options of that reader: ``mode``, ``size``, ``mean``, ``std`` and ``transform`` for all of them.

    Returns:
        The images, which are decoded at access.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: `source` is none of these, or a folder contains both images and, in another folder, parquet files.
            Readers raise further errors.

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
    path = _user_path(source)
    if path.is_dir():
        files = files_below(path)
        parquet_files = [file for file in files if is_parquet(file)]
        if not parquet_files:
            return folder(path, **options)
        # Rows of parquet files may refer to images below their folder.
        folders = {file.parent for file in parquet_files}
        if others := [image for image in images_among(files) if folders.isdisjoint(image.parents)]:
            raise ValueError(
                f"{path} contains {counted(parquet_files, path)} of parquet and {counted(others, path)} of images; "
                f"expected one of them. Read {min(folders)} or {others[0].parent}"
            )
        return parquet(path, **options)
    if path.exists():
        reader = parquet if is_parquet(path) else npz if path.suffix.lower() == ".npz" else None
        if reader is not None:
            return reader(path, **options)
    elif glob.has_magic(str(path)):
        return parquet(path, **options)
    expected = 'expected "digits", a .parquet file, glob or folder, a folder of images, or an .npz file'
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {os.fspath(source)!r}; {expected}")
    kind = _other_kind(path, expected.removeprefix("expected ")) if path.is_file() else None
    raise ValueError(kind or f"{os.fspath(source)!r} is not a data set that penult can read; {expected}")


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
    images = torch.tensor(bunch.images, dtype=torch.float32, device="cpu").unsqueeze(1) / 16
    return Images(images, torch.tensor(bunch.target, device="cpu"), tuple(map(str, range(10))))
