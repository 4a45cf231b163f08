"""Folders of image files, one a class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from penult.data._dataset import ImageDataset, Size, Transform

__all__ = ["folder"]

_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
_SPLITS = frozenset(["train", "training", "test", "testing", "val", "valid", "validation"])


class _Files:
    """Image files by number."""

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


def folder(
    path: str | os.PathLike[str], *, mode: str | None = None, size: Size = None, transform: Transform = None
) -> ImageDataset:
    """Read image files: one folder a class, or all in one folder without labels.

    Classes are the folders in `path`, sorted by name; their images may lie in further folders below. Read are files
    named .bmp, .gif, .jpeg, .jpg, .pbm, .pgm, .png, .pnm, .ppm, .tif, .tiff and .webp. Names that begin with a dot
    are skipped.

    Args:
        path: ``path/class/image.png``, or ``path/image.png`` for images without labels.
        mode: As in `ImageDataset`.
        size: As in `ImageDataset`.
        transform: As in `ImageDataset`.

    Returns:
        The images, sorted by class and path.

    Raises:
        NotADirectoryError: `path` is no folder.
        ValueError: There is no image, a class without images, images beside the class folders, or the folders are
            not classes but splits (``train``, ``test``).

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
    root = Path(path)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder; expected one of images, or of one folder a class")
    classes = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    loose = sorted(each for each in root.iterdir() if _is_image(each))
    if not classes:
        return ImageDataset(_Files(root, loose), mode=mode, size=size, transform=transform)
    names = [each.name for each in classes]
    if loose:
        raise ValueError(
            f"{root} holds both folders ({', '.join(names[:3])}) and images ({loose[0].name}); "
            "expected one folder a class, or images alone"
        )
    if _SPLITS.issuperset(map(str.lower, names)):
        raise ValueError(f"the folders of {root} are splits rather than classes; read one of them: {classes[0]}")
    files = [sorted(_below(each)) for each in classes]
    empty = [each.name for each, inside in zip(classes, files, strict=True) if not inside]
    if empty:
        raise ValueError(f"{root} has classes without an image: {', '.join(empty)}; remove these folders")
    labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(inside) for inside in files]))
    source = _Files(root, [file for inside in files for file in inside])
    return ImageDataset(source, labels, names, mode=mode, size=size, transform=transform)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _below(root: Path) -> Iterator[Path]:
    """All images below a folder, through symbolic links too; a folder that several lead to is entered once."""
    entered: set[str] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        if (place := os.path.realpath(here)) in entered:  # links may go round in circles
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from filter(_is_image, (Path(here, name) for name in files))
