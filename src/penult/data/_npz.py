"""Images that are arrays: in an ``.npz`` file, or in memory."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penult._extras import extra
from penult.data._dataset import ImageDataset, Size, Transform

__all__ = ["Arrays", "npz"]

_MOST = 1032  # times its size, to which deflate can unpack at the very most
_PARTNERS = {"images": "labels", "image": "label", "x": "y", "data": "target"}


class Arrays:
    """Images (N, C, H, W) by number: uint8, or floating in [0, 1]."""

    def __init__(self, images: Tensor, name: str) -> None:
        self._images, self._name = images, name

    def __len__(self) -> int:
        return len(self._images)

    def __str__(self) -> str:
        return self._name

    def image(self, index: int) -> Tensor:
        image = self._images[index]
        pixels = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return pixels.div_(255) if image.dtype == torch.uint8 else pixels

    def where(self, index: int) -> str:
        return f"image {index} of {self._name}"


def npz(
    path: str | os.PathLike[str],
    *,
    images: str | None = None,
    labels: str | None = None,
    channels: str | None = None,
    mode: str | None = None,
    size: Size = None,
    transform: Transform = None,
) -> ImageDataset:
    """Read images from arrays in a NumPy ``.npz`` file; nothing in it is unpickled.

    Images are uint8, or floating in [0, 1], or bool. Their shape is (N, H, W), (N, H, W, C) or (N, C, H, W); which of
    the two is seen where C is 1 or 3. They are kept in memory: uint8 as it is, the others as float32.

    Args:
        path: The file.
        images: Key of the images; found by itself if one array alone is called ``images``, ``image``, ``x`` or
            ``data``, with or without more words as in ``x_train``, or else ``arr_0``.
        labels: Key of the labels (N,) or (N, 1); found by itself if it is that of the images with ``labels``,
            ``label``, ``y`` or ``target`` in its place, or else ``arr_1``. Without it there are no labels.
        channels: ``"first"`` or ``"last"`` for images (N, C, H, W) or (N, H, W, C) of any C.
        mode: As in `ImageDataset`.
        size: As in `ImageDataset`.
        transform: As in `ImageDataset`.

    Returns:
        The images in the file's order.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: NumPy is not installed.
        ValueError: The file is damaged or holds Python objects, a key is missing or cannot be told, the shape is
            none of the above or several of them, values are out of range, or labels do not fit the images.

    Example:
        >>> import numpy, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/some.npz"
        ...     numpy.savez(path, x=numpy.zeros((5, 4, 6, 3), dtype="uint8"), y=numpy.arange(5))
        ...     dataset = npz(path, mode="L")
        >>> dataset[2][0].shape, dataset[2][1]
        (torch.Size([1, 4, 6]), 2)
    """
    arrays = _arrays(Path(path), images, labels)
    try:
        tensor = _images(arrays[0], channels)
    except ValueError as error:
        raise ValueError(f"the images of {path} {error}") from None
    targets = None if arrays[1] is None else _labels(arrays[1], path)
    return ImageDataset(Arrays(tensor, str(path)), targets, mode=mode, size=size, transform=transform)


def _arrays(path: Path, images: str | None, labels: str | None) -> tuple[Any, Any]:
    """The arrays of images and labels."""
    extra("numpy", f"{path} is read by NumPy")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            images = _key([*members], images, path)
            labels = _partner(images, [*members]) if labels is None else _key([*members], labels, path)
            return _array(archive, members[images]), None if labels is None else _array(archive, members[labels])
    except _NoKeyError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # BadZipFile, EOFError, "Object arrays cannot be loaded", zlib.error, ...
        raise ValueError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from error


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    """An array of an archive, for which memory is taken only once what it claims to hold can be there."""
    from numpy.lib import format as layout

    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in a way that NumPy never writes; write it with numpy.savez_compressed")
    with archive.open(member) as opened:
        version = layout.read_magic(opened)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of version {version} of the format, which only structured arrays need")
        header = layout.read_array_header_1_0 if version == (1, 0) else layout.read_array_header_2_0
        shape, _, dtype = header(opened)
        claimed = opened.tell() + math.prod(shape) * dtype.itemsize
    most = _MOST * os.stat(str(archive.filename)).st_size
    if not dtype.hasobject and (claimed != member.file_size or claimed > most):
        raise ValueError(f"{name} claims to hold {dtype} of shape {shape}, which its size cannot be; write it again")
    with archive.open(member) as opened:
        return layout.read_array(opened, allow_pickle=False)


class _NoKeyError(Exception):
    """The file is sound, but an array is missing, or which one is meant cannot be told."""


def _key(keys: list[str], wanted: str | None, path: Path) -> str:
    """The key that is wanted, or that of the images."""
    if wanted is not None:
        if wanted not in keys:
            raise _NoKeyError(f"{path} has no array {wanted!r}; it has {', '.join(keys) or 'none'}")
        return wanted
    found = [key for key in keys if not _PARTNERS.keys().isdisjoint(key.lower().split("_"))]
    found = found or [key for key in keys if key == "arr_0"]
    if len(found) == 1:
        return found[0]
    what = f"several arrays may be the images: {', '.join(found)}" if found else "no array is called images or x"
    raise _NoKeyError(f"in {path} {what}; name one with images= (and labels=) out of {', '.join(keys) or 'none'}")


def _partner(images: str, keys: list[str]) -> str | None:
    """The key of the labels that go with images."""
    wanted = "_".join(_PARTNERS.get(word, word) for word in images.lower().split("_"))
    wanted = "arr_1" if images == "arr_0" else wanted
    return next((key for key in keys if key.lower() == wanted and key != images), None)


def _images(array: Any, channels: str | None) -> Tensor:
    """The array as (N, C, H, W), uint8 or float32."""
    if array.dtype == bool or array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f"hold values outside [0, 1] ({array.min():.3g} to {array.max():.3g}); scale them")
        tensor = torch.tensor(array.astype("float32"))
    elif array.dtype == "uint8":
        tensor = torch.tensor(array)
    else:
        raise ValueError(f"are {array.dtype}; expected uint8, or floating in [0, 1]")
    if channels not in (None, "first", "last"):
        raise ValueError(f'cannot be read with channels={channels!r}; it must be "first", "last" or None')
    shape = tuple(tensor.shape)
    if 0 in shape[1:]:
        raise ValueError(f"have shape {shape}, so that they have no pixel")
    if tensor.ndim == 3 and channels is None:
        return tensor.unsqueeze(1)
    if tensor.ndim != 4:
        raise ValueError(f"have shape {shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if channels is None:
        possible = [name for name, size in (("first", shape[1]), ("last", shape[3])) if size in (1, 3)]
        if len(possible) != 1:
            many = "both (N, C, H, W) and (N, H, W, C)" if possible else "neither (N, C, H, W) nor (N, H, W, C)"
            raise ValueError(f'have shape {shape}, {many} with C = 1 or 3; pass channels="first" or "last"')
        channels = possible[0]
    return tensor if channels == "first" else tensor.permute(0, 3, 1, 2)


def _labels(array: Any, path: str | os.PathLike[str]) -> Tensor:
    """The array as (N,) int64."""
    if array.dtype.kind not in "iu":
        raise ValueError(f"the labels of {path} are {array.dtype}; expected integers")
    return torch.tensor(array.astype("int64")).squeeze(1) if array.ndim == 2 else torch.tensor(array.astype("int64"))
