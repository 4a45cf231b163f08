"""Reader of folders of image files, one folder for each class."""

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
    """Read image files: one folder for each class, or one folder of images without labels.

    Classes are the folders in `path`, sorted by name; subfolders of these may contain images, too. Images are the
    files named .bmp, .gif, .jpeg, .jpg, .pbm, .pgm, .png, .pnm, .ppm, .tif, .tiff and .webp. Names that begin with a
    dot are skipped.

    Args:
        path: ``path/class/image.png``, or ``path/image.png`` for images without labels.
        mode: As in `ImageDataset`.
        size: As in `ImageDataset`.
        transform: As in `ImageDataset`.

    Returns:
        The images, sorted by class and path.

    Raises:
        NotADirectoryError: `path` is not a folder.
        ValueError: There is no image, or none in a class; there are images next to the class folders; or the folders
            are splits (``train``, ``test``) and not classes.

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
        raise NotADirectoryError(
            f"{root} is not a folder; expected a folder of images, or of one folder for each class"
        )
    class_folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    images = sorted(path for path in root.iterdir() if _is_image(path))
    if not class_folders:
        return ImageDataset(_Files(root, images), mode=mode, size=size, transform=transform)
    names = [path.name for path in class_folders]
    if images:
        raise ValueError(
            f"{root} contains both folders ({', '.join(names[:3])}) and images ({images[0].name}); "
            "expected one folder for each class, or images alone"
        )
    if _SPLITS.issuperset(map(str.lower, names)):
        raise ValueError(f"the folders of {root} are splits, not classes; read one of them: {class_folders[0]}")
    files = [sorted(_images_below(path)) for path in class_folders]
    empty = [name for name, class_files in zip(names, files, strict=True) if not class_files]
    if empty:
        raise ValueError(f"{root} has classes without an image: {', '.join(empty)}; remove these folders")
    labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(class_files) for class_files in files]))
    source = _Files(root, [file for class_files in files for file in class_files])
    return ImageDataset(source, labels, names, mode=mode, size=size, transform=transform)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _images_below(root: Path) -> Iterator[Path]:
    """Iterate over all images below a folder, also through symbolic links; each folder is entered once."""
    entered: set[str] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        # Symbolic links can form cycles.
        if (real_path := os.path.realpath(parent)) in entered:
            folders.clear()
            continue
        entered.add(real_path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from filter(_is_image, (Path(parent, name) for name in files))
