"""Files of a data set below a folder, and the splits (such as train and test) in their names."""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

__all__ = [
    "counted",
    "files_below",
    "in_order",
    "is_hidden",
    "is_split",
    "matches",
    "names_within",
    "one_set",
    "splits",
    "warn_of_others",
]

_WORDS = {
    "training": "train training trn trainset traindata trainval",
    "test": "test testing tst testset testdata eval evaluation holdout heldout",
    "validation": "val valid validation dev valset valdata devset",
    "unlabelled": "unlabeled unlabelled",
    "extra": "extra",
}
_KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
# Words in small letters, in capitals, or one after the other as in trainA or XTrain.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Names such as train-00000-of-00004.parquet.
_SHARD = re.compile(r"(.+)-\d+-of-\d+")

# Files that accompany data sets and hold none of the data.
_DOCUMENTS = frozenset("readme license licence notice citation changelog thumbs desktop".split())


# Folders that file systems, archivers and NAS devices add, in lower case.
_SYSTEM = frozenset(
    "@eadir @tmp @recycle @recently-snapshot #recycle #snapshot __macosx $recycle.bin lost+found".split()
)


def is_hidden(name: str) -> bool:
    """Whether a name is no part of a data set: it begins with a dot, or is that of a folder that systems add."""
    return name.startswith(".") or name.lower() in _SYSTEM


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Return paths sorted by their parts as text; the order of paths themselves depends on the operating system."""
    return sorted(paths, key=lambda path: path.parts)


def names_within(paths: Iterable[Path]) -> list[str]:
    """Return the names of files, with the folders in which they differ."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    root = Path(os.path.commonpath([path.parent for path in absolute])) if absolute else Path()
    return [path.relative_to(root).as_posix() for path in absolute]


class _Split(NamedTuple):
    """A split named in a file name: its kind, and the letters of the name without the word for the split."""

    kind: str
    remainder: str


def _split(name: str) -> _Split | None:
    """Return the split named in a file name, such as the training split in ``mnist-train2``; None if there is none."""
    for match in _WORD.finditer(name):
        if (kind := _KINDS.get(match[0].lower())) is not None:
            remainder = name[: match.start()] + name[match.end() :]
            return _Split(kind, re.sub(r"[\W\d_]+", "", remainder).lower())
    return None


def splits(names: Iterable[str]) -> list[str]:
    """Return the names that are splits of one data set, sorted.

    Names are splits if they differ only in the word for the split, such as ``train`` and ``val``, or ``train_images``
    and ``test_images``. A class may have such a word in its name (``bullet train``, ``test tube``).
    """
    kinds = defaultdict(set)
    known = {name: split for name in names if (split := _split(name)) is not None}
    for kind, remainder in known.values():
        kinds[remainder].add(kind)
    return sorted(name for name, split in known.items() if len(kinds[split.remainder]) > 1)


def is_split(name: str) -> bool:
    """Whether a name is only the word for a split, with or without numbers."""
    split = _split(name)
    return split is not None and not split.remainder


def files_below(root: Path) -> list[Path]:
    """Return all files below a folder, also through symbolic links, sorted; hidden names are skipped.

    Broken links are included.

    Raises:
        OSError: A folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    files = []
    for top in root.iterdir():
        if is_hidden(top.name):
            continue
        if not top.is_dir():
            files.append(top)
            continue
        entered: set[str] = set()
        for parent, folders, names in os.walk(top, onerror=fail, followlinks=True):
            # Symbolic links can form cycles.
            if (real_path := os.path.realpath(parent)) in entered:
                folders.clear()
                continue
            entered.add(real_path)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            files.extend(Path(parent, name) for name in names if not is_hidden(name))
    return in_order(files)


def matches(pattern: Path) -> list[Path]:
    """Return the files of a glob pattern, sorted; the names of folders that exist are no patterns."""
    # Folders are named with brackets, too.
    root = next(path for path in pattern.parents if os.path.exists(path))
    names = glob.glob(str(pattern.relative_to(root)), root_dir=root, recursive=True)
    return in_order(root / name for name in names)


def one_set(files: Sequence[Path], root: Path) -> None:
    """Raise if files below a folder belong to several splits or data sets, by their names."""
    sets: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for file in files:
        sets[_set(file.relative_to(root))].append(file)
    if len(sets) < 2:
        return
    names = sorted("/".join(key) or members[0].name for key, members in sets.items())
    members = min(sets.items())[1]
    stem = members[0].stem
    shard = "-" if _SHARD.match(stem) else ""
    pattern = members[0]
    if shard or len(members) > 1:
        pattern = pattern.with_name(f"{_set_of_stem(stem)}{shard}*.parquet")
    raise ValueError(
        f"{root} contains splits ({', '.join(names)}); read one of them: {pattern}. To read several as one data set, "
        "pass a list of files"
    )


def _set(file: PurePath) -> tuple[str, ...]:
    """Return the parts of the path of a file that identify its data set and split."""
    return *filter(_split, file.parts[:-1]), *filter(None, [_set_of_stem(file.stem)])


def _set_of_stem(stem: str) -> str:
    if shard := _SHARD.match(stem):
        return shard[1]
    return re.sub(r"[\W\d_]+$", "", stem) if _split(stem) else ""


def counted(files: Sequence[Path], root: Path) -> str:
    """Return the number of files, and the first of them as examples."""
    shown = ", ".join(str(file.relative_to(root)) for file in files[:3]) + (", ..." if len(files) > 3 else "")
    return f"{len(files)} file{'s' if len(files) > 1 else ''} ({shown})"


def warn_of_others(files: Iterable[Path], root: Path, expected: str) -> None:
    """Warn of files that a reader leaves out."""
    if left_out := [file for file in files if file.stem.lower() not in _DOCUMENTS]:
        warnings.warn(f"{counted(left_out, root)} of {root} left out; expected {expected}", UserWarning, stacklevel=4)
