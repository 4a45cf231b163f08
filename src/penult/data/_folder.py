"""Reader of folders of image files, one folder for each class."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from penult.data._dataset import ImageDataset, RowNames, Size, Transform
from penult.data._decode import PerChannel, suffixes
from penult.data._splits import counted, files_below, is_hidden, is_split, splits, warn_of_others
from penult.io import _user_path

__all__ = ["folder", "images_among"]


class _Files:
    """Image files, accessed by index."""

    def __init__(self, root: Path, files: list[Path]) -> None:
        self._root, self._files = root, files

    def __len__(self) -> int:
        return len(self._files)

    def __str__(self) -> str:
        return str(self._root)

    def image(self, index: int) -> bytes:
        return self._files[index].read_bytes()

    def where(self, index: int) -> str:
        return str(self._files[index])

    def row_names(self) -> RowNames:
        return RowNames([file.relative_to(self._root).as_posix() for file in self._files])


def folder(
    path: str | os.PathLike[str],
    *,
    mode: str | None = None,
    size: Size = None,
    mean: PerChannel = None,
    std: PerChannel = None,
    transform: Transform = None,
) -> ImageDataset:
    """Read image files: one folder for each class, or one folder of images without labels.

    Classes are the folders in `path`, sorted by name; subfolders of these may contain images, too. Images are the
    files whose suffix is that of a format that Pillow decodes by itself: .png, .jpg, .jpeg, .jfif, .webp, .tif, .bmp,
    .gif, .jp2, .avif and others, in lower or upper case. A warning says how many other files are left out. Names
    that begin with a dot are skipped, as well as folders that systems add, such as ``@eaDir`` and ``__MACOSX``. The
    order of classes and files is that of their names as text on every system: "10" goes before "2", with a warning.

    Folders of splits (``train`` and ``val``, ``train2017`` and ``test2017``) are neither merged nor taken for classes.

    Args:
        path: ``path/class/image.png``, or ``path/image.png`` for images without labels.
        mode: As in `ImageDataset`.
        size: As in `ImageDataset`.
        mean: As in `ImageDataset`.
        std: As in `ImageDataset`.
        transform: As in `ImageDataset`.

    Returns:
        The images, sorted by class and path.

    Raises:
        ImportError: Pillow is not installed.
        NotADirectoryError: `path` is not a folder.
        ValueError: There is no image, or none in a class; there are images next to the class folders; or the folders
            are splits instead of classes, or contain the class folders themselves.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cat", "dog"):
        ...         pathlib.Path(root, name).mkdir()
        ...         Image.new("RGB", (6, 4)).save(f"{root}/{name}/0.png")
        ...     images, labels, names = folder(root).load()
        >>> images.shape, labels, names
        (torch.Size([2, 3, 4, 6]), tensor([0, 1]), ('cat', 'dog'))
    """
    root = _user_path(path)
    if not root.is_dir():
        raise NotADirectoryError(
            f"{root} is not a folder; expected a folder of images, or of one folder for each class"
        )
    files = files_below(root)
    images = images_among(files)
    taken = set(images)
    others = [file for file in files if file not in taken]
    if not images:
        contained = f"It holds {counted(others, root)}" if others else "It is empty"
        raise ValueError(
            f"{root} contains no image; expected images, or one folder of images for each class. {contained}"
        )
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
    if names:
        _check_classes(root, names, images, others)
    warn_of_others(others, root, "names of images, and links that lead to a file")
    if not names:
        return ImageDataset(_Files(root, images), mode=mode, size=size, mean=mean, std=std, transform=transform)
    _warn_of_numbers(root, names)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers[file.relative_to(root).parts[0]] for file in images]
    return ImageDataset(
        _Files(root, images),
        torch.tensor(labels, device="cpu"),
        names,
        mode=mode,
        size=size,
        mean=mean,
        std=std,
        transform=transform,
    )


def _warn_of_numbers(root: Path, names: list[str]) -> None:
    """Warn of classes that are named by numbers, if these are in another order as text."""
    if not all(name.isdecimal() for name in names):
        return
    ordered = sorted(names, key=int)
    if ordered != names:
        label = next(i for i, name in enumerate(names) if name != ordered[i])
        warnings.warn(
            f"the class folders of {root} are numbers, and are sorted as text, as torchvision does: label {label} is "
            f"the folder {names[label]!r}, not {ordered[label]!r}. Labels in the order of the numbers need names of "
            f"one length, such as {ordered[label].zfill(len(ordered[-1]))!r}; class_names has the order",
            UserWarning,
            stacklevel=3,
        )


def _check_classes(root: Path, names: list[str], images: list[Path], others: list[Path]) -> None:
    """Raise unless the folders in a folder are classes, and all images are in them."""
    # Names of all folders with images by the folder that contains them.
    children: dict[Path, set[str]] = defaultdict(set)
    for image in images:
        children[image.parent].add("")
        for parent in image.relative_to(root).parents[:-1]:
            children[root / parent.parent].add(parent.name)
    if loose := next((image for image in images if image.parent == root), None):
        raise ValueError(
            f"{root} contains both folders ({', '.join(names[:3])}) and images ({loose.name}); "
            "expected one folder for each class, or images alone"
        )
    if split_names := splits(names) or (names if all(map(is_split, names)) else []):
        raise ValueError(
            f"{root} contains splits, not classes ({', '.join(split_names)}); read one of them: {root / split_names[0]}"
        )
    for parent, folders in sorted(children.items()):
        if split_names := splits(folders):
            raise ValueError(
                f"{parent} contains splits ({', '.join(split_names)}), which would be merged. Read a folder "
                "that contains one split only, with a folder for each class"
            )
    # A folder of folders may be a split, or the class folders may be one level deeper.
    for name in names:
        within = children[root / name]
        only = len(names) == 1 and len(within) > 1
        if within and "" not in within and (only or is_split(name)):
            raise ValueError(
                f"{root / name} is {'the only folder' if only else 'a split'} of {root} and contains folders "
                f"({', '.join(sorted(within)[:3])}); expected one folder for each class. Read {root / name} if these "
                "are the classes"
            )
    if empty := [name for name in names if not children[root / name]]:
        contained = [file for file in others if file.relative_to(root).parts[0] in empty]
        raise ValueError(
            f"{root} has classes without an image: {', '.join(empty)}; expected images in each folder. "
            + (f"They hold {counted(contained, root)}. " if contained else "")
            + "Move folders that are not classes out of this folder"
        )


def images_among(files: Iterable[Path]) -> list[Path]:
    """Return the files that are images by their suffix."""
    known = suffixes()
    return [file for file in files if file.suffix.lower() in known and os.path.isfile(file)]
