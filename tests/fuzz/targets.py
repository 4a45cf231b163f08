"""What guided fuzzing tries: for each reader, edits of right files and folders, and files of any bytes."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import penult
from fuzz import strategies, test_files, test_images
from fuzz.strategies import ODD, TEXTS, damaged, edited, hostile, joined, parts_of, text_of
from penult import Activations, GenerativePair, Sphere, io, report
from penult.cli._models import load_head, load_pair
from penult.generate import load as load_generator

ended: Counter[str] = Counter()
"""How reads ended: those that gave something under the empty name, the others under the class of their error."""


@contextmanager
def lawful(path: Path | str, *more: type[BaseException]) -> Iterator[None]:
    """The same law as of the tests, with a count of what came of it."""
    with strategies.lawful(path, *more):
        try:
            yield
        except Exception as error:
            ended[type(error).__name__] += 1
            raise
        ended[""] += 1


test_files.lawful = test_images.lawful = lawful


class Target(NamedTuple):
    """One reader.

    Attributes:
        edits: A test on files that are almost right, of hypothesis' data.
        path: Where a file of any bytes is put to be read; None where there is no such file.
        read: Reads it.
        seeds: Right files, whose bytes are changed.
        more: Errors that are lawful of such a file, beside those that always are.
    """

    edits: Callable[[Any], Any]
    path: Path | None = None
    read: Callable[[Path], Any] = id
    seeds: tuple[bytes, ...] = ()
    more: tuple[type[Exception], ...] = ()

    def case(self) -> Callable[[bytes, bool], bool]:
        """A function of bytes, which are the file, or else choices of edits; it says whether they made a case."""
        tried = settings(database=None)(given(st.data())(lambda data: self.edits(data))).hypothesis.fuzz_one_input

        def one(data: bytes, raw: bool) -> bool:
            if not raw or self.path is None:
                return tried(data) is not None
            self.path.unlink(missing_ok=True)  # tensors may still be mapped to it
            self.path.write_bytes(data)
            with lawful(self.path.parent if self.path.name == io.INDEX_NAME else self.path, *self.more):
                self.read(self.path)
            return True

        return one


def all_of(place: Path) -> dict[str, Target]:
    """Every target, with its right files in a new folder `cases`, and others beside it that nothing may read."""
    Image.MAX_IMAGE_PIXELS = test_images.PIXELS
    files, images = (_right(module, place / "cases") for module in (test_files, test_images))
    files.outside = shutil.copytree(files.acts, place / "outside")
    (files.outside / "model.safetensors").write_bytes(files.state)
    acts = shutil.copytree(files.acts, files.folder / "raw")
    (images.folder / "raw").mkdir()
    index, shard = acts / io.INDEX_NAME, acts / "activations-00000.safetensors"
    tensors, weights = (files.folder / name for name in ("raw.safetensors", "model.safetensors.index.json"))
    parquet, npz, image = (images.folder / name for name in ("raw.parquet", "raw.npz", "raw/image.png"))

    def edits(whole: SimpleNamespace, test: Any) -> Callable[[Any], Any]:
        return partial(test.hypothesis.inner_test if hasattr(test, "hypothesis") else test, whole)

    def look_below(path: Path) -> None:
        test_images.look(path.parent)

    of_files, of_images = partial(edits, files), partial(edits, images)
    return {
        "pairs": Target(of_files(test_files.test_pairs), tensors, _pair, tuple(files.pairs)),
        "any": Target(of_files(test_files.test_any_file), tensors, io.read, (*files.pairs, *files.generators)),
        "generators": Target(of_files(test_files.test_generators), tensors, load_generator, tuple(files.generators)),
        "heads": Target(of_files(test_files.test_heads_of_others), tensors, _heads, (files.state,), (TypeError,)),
        "folders": Target(of_files(test_files.test_folders), index, _rows_below, (index.read_bytes(),)),
        "shards": Target(of_files(shards), shard, io.read, (shard.read_bytes(),)),
        "stopped": Target(of_files(stopped)),
        "indices": Target(of_files(indices), weights, _heads, (json.dumps(_index()).encode(),), (TypeError,)),
        "parquet": Target(of_images(test_images.test_parquet), parquet, test_images.look, (images.parquet,)),
        "npz": Target(of_images(test_images.test_npz), npz, test_images.look, (images.npz,)),
        "images": Target(of_images(test_images.test_image_bytes), image, look_below, tuple(images.images)),
        "trees": Target(of_images(trees)),
        "names": Target(names),
        "report": Target(of_files(pages)),
    }


def _right(module: Any, place: Path) -> SimpleNamespace:
    """What the fixture of the tests makes."""
    folder = place / module.__name__.rpartition(".")[2]
    folder.mkdir(parents=True)
    return inspect.unwrap(module.whole)(SimpleNamespace(mktemp=lambda _: folder))


def _heads(path: Path) -> None:
    assert load_head(path).weight.isfinite().all()
    load_pair(path)


def _pair(path: Path) -> None:
    test_files.look(penult.load(path))


def _rows_below(index: Path) -> None:
    _rows(index.parent)


def _rows(folder: Path) -> None:
    acts = Activations.open(folder)
    assert repr(acts)
    assert len(acts.activations) == len(acts) == len(acts.logits)
    assert acts.labels is None or len(acts.labels) == len(acts)


def shards(right: SimpleNamespace, data: Any) -> None:
    """Activations of which shards are elsewhere, links, of other sizes, or hold tensors that overlap."""
    folder = shutil.copytree(right.acts, _fresh(right.folder / "spoilt"))
    names = sorted(path.name for path in folder.glob("activations-*"))
    elsewhere = [str(right.outside / names[0]), os.path.relpath(right.outside / names[0], folder)]
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(names) - 1))
        shard = folder / names[number]
        match data.draw(st.sampled_from(["name", "fact", "link", "parent", "overlap", "cut", "shard"])):
            case "name":
                name = data.draw(st.sampled_from([*elsewhere, *names, *TEXTS, f"./{names[0]}", io.INDEX_NAME]))
                test_files.change_shard(folder, number, name=name)
            case "fact":
                facts = data.draw(st.dictionaries(st.sampled_from(["rows", "bytes", "name"]), ODD, max_size=2))
                facts = json.loads(json.dumps(facts).replace(strategies._DEEP, "deep"))
                test_files.change_shard(folder, number, **facts)
            case "link":
                shard.unlink()
                shard.symlink_to(data.draw(st.sampled_from([*elsewhere, *names, ".", "/dev/zero", "nowhere"])))
            case "parent":  # a link to the folder that holds the shards
                if not folder.is_symlink():
                    folder.rename(hidden := _fresh(right.folder / "hidden"))
                    folder.symlink_to(hidden)
            case kind if not shard.is_symlink():
                whole = (right.acts / names[number]).read_bytes()
                if kind == "overlap":
                    header, body = parts_of(whole)
                    one, other = data.draw(st.permutations(sorted(set(header) - {"__metadata__"})))[:2]
                    shift = data.draw(st.sampled_from([0, 0, -4, 4, -(2**31), 2**63]))
                    header[one]["data_offsets"] = [at + shift for at in header[other]["data_offsets"]]
                    broken = joined(header, body)
                elif kind == "cut":
                    broken = whole[: data.draw(st.integers(0, len(whole)))]
                else:
                    broken = data.draw(hostile(whole))
                shard.write_bytes(broken)
                if data.draw(st.booleans()):
                    test_files.change_shard(folder, number, bytes=len(broken))
    with lawful(folder):
        _rows(folder)


def stopped(right: SimpleNamespace, data: Any) -> None:
    """An extraction that was killed, and goes on from shards of which one is another."""
    folder = _fresh(right.folder / "stopped")
    shutil.copytree(_extracted(right.folder / "extracted"), folder)
    (folder / io.INDEX_NAME).unlink()
    shard = data.draw(st.sampled_from(sorted(folder.glob("activations-*"))))
    shard.write_bytes(data.draw(hostile(shard.read_bytes())))
    with lawful(folder):
        assert len(_extract(folder)) == 60


@cache
def _extracted(folder: Path) -> Path:
    _extract(folder)
    return folder


def _extract(folder: Path) -> Activations:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = torch.nn.Linear(test_files.D, test_files.K), torch.randn(60, test_files.D)
    batches = [(each, torch.arange(6) % test_files.K) for each in inputs.split(6)]
    tap = penult.Tap(model, penult.find_head(model, inputs[:2]))
    return penult.extract(tap, batches, folder, shard_size=500, progress=False)


def _index() -> dict[str, Any]:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    tensors = {"body.weight": names[0], "fc.weight": names[1], "fc.bias": names[1]}
    return {"metadata": {"total_size": 672}, "weight_map": tensors}


def indices(right: SimpleNamespace, data: Any) -> None:
    """A model in shards with an index that names files anywhere; its path, its folder or a shard is given."""
    folder = _fresh(right.folder / "model")
    folder.mkdir()
    index = _index()
    for name in sorted(set(index["weight_map"].values())):
        (folder / name).write_bytes(data.draw(damaged(right.state)) if data.draw(st.booleans()) else right.state)
    for key in data.draw(st.sets(st.sampled_from(sorted(index["weight_map"])))):
        outside = right.outside / "model.safetensors"
        name = data.draw(st.sampled_from([str(outside), os.path.relpath(outside, folder), "/dev/zero", *TEXTS]))
        index["weight_map"][key] = name
    path = folder / "model.safetensors.index.json"
    path.write_text(text_of(data.draw(edited(index))), "utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    if data.draw(st.booleans()):
        (folder / "config.json").write_text("{}")
    for place in (path, folder, folder / "model-00002-of-00002.safetensors"):
        with lawful(place, TypeError):
            load_head(place)


SIDES = st.sampled_from([0, 1, 4, 600, 2000, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1])
FOLDERS = ("a", "b", "a/in", "train", ".hidden", "-x", "a b", "<b>", "\u202ea", "\n", os.fsdecode(b"\xff"))
FILES = ("0.png", "1.JPG", "2.tiff", "3.webp", "4.gif", ".5.png", "-x.png", "$(touch y).png", "\n.png", "note.txt")


def trees(images: SimpleNamespace, data: Any) -> None:
    """Folders of images: right, damaged, far too large or none at all, beside links within and pipes."""
    root = _fresh(images.folder / "tree")
    root.mkdir()
    folders = data.draw(st.sampled_from([("",), FOLDERS[:2], FOLDERS, ("", *FOLDERS)]))
    for _ in range(data.draw(st.integers(1, 4))):
        path = root / data.draw(st.sampled_from(folders)) / data.draw(st.sampled_from(FILES))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            continue
        match data.draw(st.sampled_from([*["right"] * 4, "damaged", "claims", "bomb", "link", "pipe", "folder"])):
            case "right":
                path.write_bytes(data.draw(st.sampled_from(images.images)))
            case "damaged":
                path.write_bytes(data.draw(damaged(data.draw(st.sampled_from(images.images)))))
            case "claims" | "bomb" as kind:
                depth, colour = data.draw(st.sampled_from([1, 2, 4, 8, 16, 3])), data.draw(st.integers(0, 7))
                packed = bytes(2**22 if kind == "bomb" else 0)
                path.write_bytes(test_images.png(data.draw(SIDES), data.draw(SIDES), depth, colour, packed))
            case "link":
                places = [root, path.parent, path, root / "nowhere", *sorted(root.rglob("*"))]
                path.symlink_to(data.draw(st.sampled_from(places)))
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
    size, mode = data.draw(st.sampled_from([None, 3, (2, 5)])), data.draw(st.sampled_from([None, "L", "RGB"]))
    with lawful(root, NotADirectoryError):
        test_images.look(root, size=size, mode=mode)


def _fresh(path: Path) -> Path:
    """A path where nothing is."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    return path


NAMES = test_images.HOSTILE
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def names(data: Any) -> None:
    """A page of every kind of block, with one name everywhere."""
    test_images.test_names_on_a_page.hypothesis.inner_test(data.draw(NAMES))
    ended[""] += 1


def pages(right: SimpleNamespace, data: Any) -> None:
    """The report on a pair has the tags that plain names give it, whatever its classes and sets are called."""
    names = data.draw(st.lists(NAMES, min_size=test_files.K, max_size=test_files.K))
    title, other, footer = (data.draw(NAMES) for _ in range(3))
    if other.strip() in ("", report.pair.FAMILIAR):
        other = "other"
    document = _page(right.acts, tuple(names), title, other, footer)
    assert document.encode().decode() == document
    assert not _CONTROL.search(document)
    plain = _plain(right.acts)
    for found, known in zip(_marks(document), _marks(plain), strict=True):
        assert found <= known | {"p", "code", "strong", "em"}, f"of the names: {found - known}"
    ended[""] += 1


def _page(folder: Path, names: tuple[str, ...], title: str, other: str, footer: str) -> str:
    acts = Activations.open(folder)
    named = Activations(acts.activations, acts.logits, acts.labels, names)
    pair = GenerativePair(penult.Head(torch.eye(test_files.K, test_files.D)), Sphere(2.0))
    made = report.pair.page(pair, named, {other: named[:20]}, title=title, footer=footer, false_alarm=0.2)
    return made.html()


@cache
def _plain(folder: Path) -> str:
    return _page(folder, ("a", "b", "c"), "title", "other", "footer")


def _marks(document: str) -> tuple[set[str], set[str]]:
    """Tags, and names of attributes."""
    tags = test_images.Reader(document).tags
    return {tag for tag, _ in tags}, {name for _, names in tags for name in names}
