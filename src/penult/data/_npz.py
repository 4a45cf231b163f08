"""Arrays of files: readers of images in ``.npz`` files, and of activations in ``.npz`` and safetensors files."""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penult._checks import check_choice, with_remedy
from penult._extras import extra
from penult.activations import Activations
from penult.data._dataset import ImageDataset, Size, Transform
from penult.data._decode import PerChannel
from penult.head import Head
from penult.io import FileFormatError, _other_kind, _user_path

__all__ = ["Arrays", "holds_activations", "npz", "read_activations"]

# Largest ratio of the sizes after and before decompression that deflate can reach.
_MAX_RATIO = 1032
# Words that name arrays of images, and arrays of labels.
_IMAGES = frozenset("images image imgs img x xs data inputs input pixels".split())
_LABELS = frozenset("labels label y ys targets target classes class".split())
# Words in small letters, in capitals, or one after the other as in trainX or XTrain; numbers are words, too.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


_REMEDY = "Write images and labels into one file: numpy.savez(path, images=..., labels=...)"


class Arrays:
    """Images (N, C, H, W), uint8 or floating in [0, 1], accessed by index."""

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
    mean: PerChannel = None,
    std: PerChannel = None,
    transform: Transform = None,
) -> ImageDataset:
    """Read images from arrays in a NumPy ``.npz`` file; nothing in it is unpickled.

    Images are uint8, floating in [0, 1] or bool. Their shape is (N, H, W), (N, H, W, C) or (N, C, H, W); the last two
    are distinguished by C, which is 1 or 3. Images stay in memory: uint8 as they are, others as float32. A warning
    names arrays that are not read, unless `images` is given and there are labels.

    Args:
        path: File.
        images: Key of the images. Default: the only array named by a word for images, which are ``images``, ``image``,
            ``imgs``, ``img``, ``x``, ``data``, ``inputs`` and ``pixels``, possibly with further words as in ``x_train``
            or ``trainX``; otherwise ``arr_0``.
        labels: Key of the labels (N,) or (N, 1). Default: the array named by a word for labels, which are ``labels``,
            ``label``, ``y``, ``targets``, ``target`` and ``classes``, with the further words of the images; or
            ``arr_1`` for ``arr_0``. If there is none, the data set has no labels.
        channels: ``"first"`` or ``"last"`` for images (N, C, H, W) or (N, H, W, C) of any C.
        mode: As in `ImageDataset`.
        size: As in `ImageDataset`.
        mean: As in `ImageDataset`.
        std: As in `ImageDataset`.
        transform: As in `ImageDataset`.

    Returns:
        The images in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: NumPy is not installed.
        ValueError: The file is damaged or contains Python objects; a key is missing or ambiguous; the dtype or shape is
            none of the above, or the shape could be several of them; values are out of range; or labels are not
            integers or do not fit the images.

    Example:
        >>> import numpy, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/some.npz"
        ...     numpy.savez(path, x=numpy.zeros((5, 4, 6, 3), dtype="uint8"), y=numpy.arange(5))
        ...     dataset = npz(path, mode="L")
        >>> dataset[2][0].shape, dataset[2][1]
        (torch.Size([1, 4, 6]), 2)
    """
    check_choice("channels", channels, ("first", "last", None))
    path = _user_path(path)
    image_array, label_array = _arrays(path, images, labels)
    tensor = _images(image_array, channels, f"the array of images in {path}")
    targets = None if label_array is None else _labels(label_array, path)
    return ImageDataset(
        Arrays(tensor, str(path)), targets, mode=mode, size=size, mean=mean, std=std, transform=transform
    )


def _arrays(path: Path, images: str | None, labels: str | None) -> tuple[Any, Any]:
    """Read the arrays of images and labels."""
    extra("numpy", f"{path} is read by NumPy")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            image_key = _key([*members], images, path)
            label_key = _partner(image_key, [*members], path) if labels is None else _key([*members], labels, path)
            arrays = (
                _array(archive, members[image_key]),
                None if label_key is None else _array(archive, members[label_key]),
            )
    except _NoKeyError as error:
        fault = ValueError(str(error))
        raise (fault if error.parameter is None else with_remedy(fault, error.parameter)) from None
    except Exception as error:
        # Damaged files raise errors of many types: BadZipFile, EOFError, zlib.error, ValueError for Python objects.
        message = _other_kind(path, "a zip archive", {"a NumPy array (.npy)": _REMEDY})
        raise ValueError(message or f"{path} cannot be read as an .npz file of plain arrays: {error}") from error
    unread = [key for key in members if key not in (image_key, label_key)]
    if unread and (images is None or label_key is None):
        without = ". The images have no labels. If one of these arrays holds them, name it" if label_key is None else ""
        warnings.warn(f"{path}: arrays that are not read: {', '.join(unread)}{without}", UserWarning, stacklevel=4)
    return arrays


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    """Read an array of an archive; memory is allocated only if its file can contain the shape in its header."""
    from numpy.lib import format as layout

    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"the compression of {name} is unknown to NumPy; write it with numpy.savez_compressed")
    with archive.open(member) as opened:
        version = layout.read_magic(opened)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} has format version {version}, for structured arrays; expected (1, 0) or (2, 0)")
        header = layout.read_array_header_1_0 if version == (1, 0) else layout.read_array_header_2_0
        shape, _, dtype = header(opened)
        claimed = opened.tell() + math.prod(shape) * dtype.itemsize
    limit = _MAX_RATIO * os.stat(str(archive.filename)).st_size
    if not dtype.hasobject and (claimed != member.file_size or claimed > limit):
        raise ValueError(f"the header of {name} says {dtype} of shape {shape}, but its size differs; write it again")
    with archive.open(member) as opened:
        return layout.read_array(opened, allow_pickle=False)


class _NoKeyError(Exception):
    """Error for a file that can be read, but in which an array is missing or the choice is ambiguous.

    Args:
        message: The message.
        parameter: Parameter that names the array, or None.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


def _key(keys: list[str], wanted: str | None, path: Path) -> str:
    """Return the requested key, or else the key of the images."""
    if wanted is not None:
        if wanted not in keys:
            raise _NoKeyError(f"{path} has no array {wanted!r}; its arrays are {', '.join(keys) or 'none'}")
        return wanted
    candidates = [key for key in keys if _words(key) & _IMAGES]
    # image_labels are labels.
    candidates = [key for key in candidates if not _words(key) & _LABELS] or candidates
    # An array of exactly that name goes before those with further words, such as image_ids.
    candidates = [key for key in candidates if key.lower() in _IMAGES] or candidates
    candidates = candidates or [key for key in keys if key == "arr_0"]
    if len(candidates) == 1:
        return candidates[0]
    fault = (
        f"has several arrays that may be the images: {', '.join(candidates)}"
        if candidates
        else "has no array named images or x"
    )
    raise _NoKeyError(f"{path} {fault}. Arrays in the file: {', '.join(keys) or 'none'}", "images")


def _words(key: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(key))


def _partner(images: str, keys: list[str], path: Path) -> str | None:
    """Return the key of the labels that belong to images, or None."""
    if images == "arr_0":
        return "arr_1" if "arr_1" in keys else None
    further = _words(images) - _IMAGES
    others = [key for key in keys if key != images]
    candidates = [key for key in others if (words := _words(key)) & _LABELS and words - _LABELS - _IMAGES == further]
    if len(candidates) > 1:
        raise _NoKeyError(f"{path} has several arrays that may be the labels: {', '.join(candidates)}", "labels")
    return candidates[0] if candidates else None


def _images(array: Any, channels: str | None, name: str) -> Tensor:
    """Return the array as (N, C, H, W), uint8 or float32; `name` is its name in messages."""
    if array.dtype == bool or array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(
                f"{name} has values from {array.min():.3g} to {array.max():.3g}; expected 0 to 1. Scale them"
            )
        tensor = torch.tensor(array.astype("float32"), device="cpu")
    elif array.dtype == "uint8":
        tensor = torch.tensor(array, device="cpu")
    else:
        raise ValueError(f"{name} is {array.dtype}; expected uint8, or floating in [0, 1]")
    shape = tuple(tensor.shape)
    if 0 in shape[1:]:
        raise ValueError(f"{name} has shape {shape}; expected at least one pixel")
    if tensor.ndim == 3 and channels is None:
        return tensor.unsqueeze(1)
    if tensor.ndim != 4:
        raise ValueError(f"{name} has shape {shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if channels is None:
        possible = [name for name, size in (("first", shape[1]), ("last", shape[3])) if size in (1, 3)]
        if len(possible) != 1:
            layouts = "both (N, C, H, W) and (N, H, W, C)" if possible else "neither (N, C, H, W) nor (N, H, W, C)"
            raise ValueError(
                f'{name} has shape {shape}, which is {layouts} with C = 1 or 3; pass channels="first" or "last"'
            )
        channels = possible[0]
    return tensor if channels == "first" else tensor.permute(0, 3, 1, 2)


def _labels(array: Any, path: str | os.PathLike[str]) -> Tensor:
    """Return the array of labels as (N,) int64."""
    if array.dtype.kind not in "iu":
        raise ValueError(f"the array of labels in {path} is {array.dtype}; expected integers")
    return (
        torch.tensor(array.astype("int64"), device="cpu").squeeze(1)
        if array.ndim == 2
        else torch.tensor(array.astype("int64"), device="cpu")
    )


# --- Activations, logits and labels -------------------------------------------------------------------------


# Names of the activations, and of all arrays that are read.
_FEATURES = "activations", "features"
_READ = (*_FEATURES, "logits", "labels", "class_names")
# Rows whose logits are computed together.
_ROWS = 1 << 14
_WANTED = "expected activations or features (N, d), and optionally logits (N, K) and labels (N,)"


def holds_activations(path: Path) -> bool:
    """Return whether a file is to be read by `read_activations`: by its suffix and, if it is an .npz, its arrays."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".safetensors":
        return True
    if path.suffix.lower() != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return not {f"{name}.npy" for name in _FEATURES}.isdisjoint(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        # The reader of images explains what is wrong with the file.
        return False


def read_activations(path: Path, head: Head | None = None) -> Activations:
    """Read activations from an ``.npz`` or safetensors file; nothing in it is unpickled.

    The file has ``activations`` or ``features`` (N, d), floating; ``logits`` (N, K), floating, which `head` computes if
    they are missing; optionally ``labels`` (N,), integers, -1 for none; and, in an ``.npz``, optionally ``class_names``
    (K,), text. A shard of a folder that penult wrote is such a file. A warning names arrays that are not read.

    Raises:
        ImportError: NumPy is not installed.
        ValueError: The file is damaged or contains Python objects; an array is missing, or has a wrong dtype or shape;
            or there are neither logits nor a head.
    """
    arrays, record, names = _tensors_in(path) if path.suffix.lower() == ".safetensors" else _arrays_in(path)
    listed = ", ".join(names) or "none"
    features = [name for name in _FEATURES if name in arrays]
    if len(features) != 1:
        fault = "both activations and features" if features else "neither activations nor features"
        raise ValueError(f"{path} holds {fault}; {_WANTED}. Arrays in the file: {listed}")
    h = _matrix(arrays[features[0]], features[0], "(N, d)", path)
    logits = arrays.get("logits")
    if logits is None and head is None:
        raise ValueError(f"{path} holds no logits; {_WANTED}. Arrays in the file: {listed}")
    if logits is not None:
        logits = _matrix(logits, "logits", "(N, K)", path)
    elif head is not None:
        if h.shape[1] != head.in_features:
            raise ValueError(
                f"{features[0]} in {path} has shape {tuple(h.shape)}; expected (N, {head.in_features}), as the head "
                "reads"
            )
        with torch.no_grad():
            parts = [head(rows.to(head.weight)).cpu() for rows in h.split(_ROWS)]
        logits = torch.cat(parts) if parts else h.new_zeros(0, head.num_classes)
    assert logits is not None
    labels = arrays.get("labels")
    for name, tensor in (("logits", logits), ("labels", labels)):
        if tensor is not None and len(tensor) != len(h):
            raise ValueError(
                f"{path} holds {len(h)} rows of {features[0]} and {len(tensor)} of {name}; expected as many"
            )
    if labels is not None:
        labels = None if bool((labels == -1).all()) else labels
    try:
        return Activations(h, logits, labels, record.pop("class_names", None), **record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _matrix(tensor: Tensor, name: str, shape: str, path: Path) -> Tensor:
    if not tensor.is_floating_point() or tensor.ndim != 2 or not tensor.shape[1]:
        remedy = ". Flatten each row" if tensor.ndim > 2 else ""
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} in {path} is {dtype} of shape {tuple(tensor.shape)}; expected floating numbers {shape}{remedy}"
        )
    if bad := int((~tensor.isfinite().all(-1)).sum()):
        raise ValueError(f"{bad} of {len(tensor)} rows of {name} in {path} hold NaN or infinity; leave them out first")
    return tensor


def _tensors_in(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Return the tensors of a safetensors file by name, what penult recorded with them, and a list of all tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            listed = [f"{name} {file.get_slice(name).get_dtype()} {file.get_slice(name).get_shape()}" for name in names]
            if "penult" in metadata:
                return *_shard(path), listed
            tensors = {name: file.get_tensor(name) for name in names if name in _READ}
    except (SafetensorError, OverflowError) as error:
        raise ValueError(
            _other_kind(path, "a safetensors file") or f"{path} is not a safetensors file, or a damaged one: {error}"
        ) from error
    if "labels" in tensors:
        tensors["labels"] = _label_column(tensors["labels"], path)
    _warn_of_unread(path, [name for name in names if name not in _READ])
    return {name: tensor for name, tensor in tensors.items() if name != "class_names"}, {}, listed


def _shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a shard that penult wrote, and what it records."""
    from penult import io

    file = io.read(path)
    if file.kind != "activations":
        raise ValueError(f"{path} is a penult file of kind {file.kind!r}; {_WANTED}")
    facts = file.metadata.get("facts")
    if not isinstance(facts, dict):
        raise FileFormatError(f"{path}: the metadata of the shard lacks 'facts'; the file is damaged")
    names = ("class_names", "pre_activation", "preprocessing")
    return file.tensors, {name: facts[name] for name in names if facts.get(name) is not None}


def _arrays_in(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Return the arrays of an .npz file by name as tensors, its class names, and a list of all arrays."""
    numpy = extra("numpy", f"{path} is read by NumPy")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            arrays = {name: _array(archive, member) for name, member in members.items() if name in _READ}
    except Exception as error:
        # Damaged files raise errors of many types: BadZipFile, EOFError, zlib.error, ValueError for Python objects.
        message = _other_kind(path, "a zip archive", {"a NumPy array (.npy)": _REMEDY})
        raise ValueError(message or f"{path} cannot be read as an .npz file of plain arrays: {error}") from error
    listed = [f"{name} {arrays[name].dtype} {arrays[name].shape}" if name in arrays else name for name in members]
    record: dict[str, Any] = {}
    if (names := arrays.pop("class_names", None)) is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise ValueError(f"class_names in {path} is {names.dtype} of shape {names.shape}; expected text (K,)")
        record["class_names"] = names.tolist()
    tensors = {}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise ValueError(f"{name} in {path} is {array.dtype} of shape {array.shape}; {_WANTED}")
        # Torch has no arrays of another byte order.
        tensors[name] = torch.from_numpy(numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if "labels" in tensors:
        tensors["labels"] = _label_column(tensors["labels"], path)
    _warn_of_unread(path, [name for name in members if name not in _READ])
    return tensors, record, listed


def _label_column(labels: Tensor, path: Path) -> Tensor:
    """Return labels (N,) of labels (N,) or (N, 1)."""
    labels = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        dtype = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"labels in {path} is {dtype} of shape {tuple(labels.shape)}; expected integers (N,)")
    return labels


def _warn_of_unread(path: Path, unread: list[str]) -> None:
    if unread:
        warnings.warn(f"{path}: arrays that are not read: {', '.join(unread)}", UserWarning, stacklevel=5)
