import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from penult.data import folder, read


def values(dataset):
    return [round(255 * float(item[0].max() if dataset.labels is not None else item.max())) for item in dataset]


@pytest.fixture
def tree(tmp_path, make):
    files = ["dog/b.PNG", "dog/a.jpeg", "cat/x/deep.png", "cat/y.bmp", "Eel/1.webp", "Eel/.hidden.png", "dog/.x/1.png"]
    for i, name in enumerate([*files, ".trash/1.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make.grey(20 * i, 16, 16).save(tmp_path / name)
    (tmp_path / "cat" / "LICENSE.txt").write_text("words")
    (tmp_path / "README.md").write_text("words")
    return tmp_path


def test_classes_are_sorted_folders(tree):
    for dataset in (folder(tree), folder(str(tree)), read(tree)):
        assert dataset.class_names == ("Eel", "cat", "dog")
        assert dataset.labels.tolist() == [0, 1, 1, 2, 2]
        assert dataset.labels.dtype == torch.int64
        assert values(folder(tree, mode="L")) == [80, 40, 60, 20, 0]
        assert repr(dataset) == f"ImageDataset(N=5, K=3, source={tree})"
    images, labels, names = folder(tree, mode="L").load()
    assert images.shape == (5, 1, 16, 16)
    assert labels.tolist() == [0, 1, 1, 2, 2]
    assert names == ("Eel", "cat", "dog")


@pytest.mark.parametrize("system", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found", ".Trash-1000"])
def test_folders_of_systems_are_no_classes(system, tree, make):
    for name in (system, f"cat/{system}/0.png", f"Eel/x/{system}"):
        (tree / name).mkdir(parents=True)
        make.grey(200).save(tree / name / "THUMB.jpg")
    dataset = folder(tree, mode="L")
    assert dataset.class_names == ("Eel", "cat", "dog")
    assert values(dataset) == [80, 40, 60, 20, 0]


def class_folders(root, names, make):
    for name in names:
        (root / name).mkdir(parents=True)
        make.grey(9).save(root / name / "a.png")
    return root


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (map(str, range(12)), "label 2 is the folder '10', not '2'.* such as '02'"),
        (["9", "10"], "label 0 is the folder '10', not '9'.* such as '09'"),
        (["5", "40", "300"], "label 0 is the folder '300', not '5'.* such as '005'"),
    ],
)
def test_numbers_in_another_order_as_text_are_named(names, message, tmp_path, make):
    names = [*names]
    with pytest.warns(UserWarning, match=message):
        dataset = folder(class_folders(tmp_path, names, make))
    assert dataset.class_names == tuple(sorted(names))


@pytest.mark.parametrize("names", [map(str, range(10)), ["00", "02", "10"], ["10", "9a"], ["n01440764", "n1"]])
def test_other_names_get_no_warning(names, tmp_path, make):
    names = [*names]
    assert folder(class_folders(tmp_path, names, make)).class_names == tuple(sorted(names))


def test_the_order_does_not_depend_on_the_system(tmp_path, make, monkeypatch):
    class_folders(tmp_path, ["Zebra", "ant", "Bee/x", "Bee/X2", "bee-2"], make)
    here = folder(tmp_path)
    # Paths of Windows are compared without the case of their letters.
    monkeypatch.setattr(type(tmp_path), "__lt__", lambda a, b: str(a).lower() < str(b).lower())
    there = folder(tmp_path)
    assert here.class_names == there.class_names == ("Bee", "Zebra", "ant", "bee-2")
    files = [[data._source.where(i) for i in range(len(data))] for data in (here, there)]
    assert files[0] == files[1]


def test_a_flat_folder_has_no_labels(tmp_path, make):
    for i, name in enumerate(["b.png", "a.png", ".c.png", "readme.txt"]):
        make.grey(i).save(tmp_path / name, "png")
    dataset = read(tmp_path)
    assert dataset.labels is None
    assert dataset.class_names is None
    assert values(dataset) == [1, 0]
    with pytest.raises(ValueError, match=r"torch.stack\(list\(dataset\)\)"):
        dataset.load()


def save(root, make, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make.grey(i + 1).save(root / name, "png")


def test_suffixes_of_all_formats_that_are_decoded(tmp_path, make):
    kinds = {"jfif": "JPEG", "JPE": "JPEG", "j2k": "JPEG2000", "tga": "TGA", "Qoi": "QOI", "pcx": "PCX", "apng": "PNG"}
    for i, (suffix, kind) in enumerate(sorted(kinds.items())):
        (tmp_path / f"{i}.{suffix}").write_bytes(make.encode(Image.new("RGB", (16, 16), (40 * i,) * 3), kind))
    dataset = folder(tmp_path)
    assert [abs(each - 40 * i) < 3 for i, each in enumerate(values(dataset))] == [True] * len(kinds)


def test_files_left_out_are_counted(tmp_path, make):
    save(tmp_path, make, "cat/0.png", "dog/0.png")
    for name in ("cat/1.heic", "dog/1", "dog/labels.csv", "notes.doc", "README.md", "dog/Thumbs.db"):
        (tmp_path / name).write_text("words")
    (tmp_path / "dog" / "2.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match=r"^5 files \(cat/1.heic, dog/1, dog/2.png, \.\.\.\) of .* left out") as caught:
        assert len(read(tmp_path)) == 2
    assert len(caught) == 1
    (tmp_path / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"without an image: cat; .* They hold 1 file \(cat/1.heic\)"):
        folder(tmp_path)
    (tmp_path / "dog" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"contains no image; .* It holds 7 files \(README.md, cat/1.heic"):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train2017/a/0.png", "val2017/a/0.png", "annotations/0.png"], r"contains splits, .*\(train2017, val2017\)"),
        (["Training_Set/0.png", "TEST-set/0.png", "raw/0.png"], r"contains splits, .*\(TEST-set, Training_Set\)"),
        (["trainA/0.png", "testA/0.png", "trainB/0.png", "testB/0.png"], r"\(testA, testB, trainA, trainB\)"),
        (["train/a/0.png"], r"contains splits, not classes \(train\); read one of them: .*/train"),
        (["train/a/0.png", "more/b/0.png"], r"train is a split of .* contains folders \(a\).* Read .*train"),
        (["images/train/0.png", "images/val/0.png"], r"images contains splits \(train, val\), which would be merged"),
        (["cat/dev/0.png", "cat/test/0.png", "dog/dev/0.png"], r"cat contains splits \(dev, test\)"),
        (
            ["set/cat/0.png", "set/dog/0.png"],
            r"set is the only folder of .* contains folders \(cat, dog\).* Read .*set",
        ),
    ],
)
def test_splits_are_neither_classes_nor_merged(tmp_path, make, names, message):
    save(tmp_path, make, *names)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["bus", "car", "train"],  # as in CIFAR-100 and COCO
        ["bullet_train", "test_tube", "valley"],
        ["trainer", "developer", "contest"],
    ],
)
def test_classes_whose_names_are_like_splits(tmp_path, make, names):
    save(tmp_path, make, *(f"{name}/0.png" for name in names))
    assert folder(tmp_path).class_names == tuple(sorted(names))


def test_brackets_and_the_home_folder(tmp_path, make, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path, make, "set [v2]*/cat/0.png", "set [v2]*/dog/0.png")
    assert read("~/set [v2]*").class_names == folder("~/set [v2]*").class_names == ("cat", "dog")


def test_other_files_with_the_suffix_of_an_image_are_named(tmp_path, make):
    contents = {
        "a.png": (b"version https://git-lfs.github.com/spec/v1\noid", r"it is a Git LFS pointer.*Run git lfs pull"),
        "b.png": (b"\n<!DOCTYPE html><p>Sign in", "it is an HTML page.*Download the file itself"),
        "c.png": (b"\x1f\x8b\x08 packed", "it is compressed by gzip.*Unpack"),
        "d.png": (b"", "it is empty"),
        "e.png": (b"words", "its format is unknown"),
    }
    for name, (data, _) in contents.items():
        (tmp_path / name).write_bytes(data)
    dataset = folder(tmp_path)
    for i, (name, (_, message)) in enumerate(contents.items()):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an image: {message}"):
            dataset[i]


def test_links_are_followed(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("cat", "dog"):
        (other / name).symlink_to(tree / name)
    assert values(folder(other, mode="L")) == [40, 60, 20, 0]


def test_folders_that_are_refused(tree, tmp_path_factory, make):
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        folder(tree / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"README.md is not a folder"):
        folder(tree / "README.md")
    (tree / "ant").mkdir()
    (tree / "bee" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"classes without an image: ant, bee; expected images in each folder\. Move"):
        folder(tree)
    make.grey(1).save(tree / "loose.png")
    with pytest.raises(ValueError, match=r"both folders \(Eel, ant, bee\) and images \(loose.png\)"):
        folder(tree)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="contains no image"):
        folder(empty)
    for name in ("train", "Test"):
        (empty / name).mkdir()
        (empty / name / "cat").symlink_to(tree / "cat")
    with pytest.raises(ValueError, match=r"contains splits, not classes \(Test, train\); read one of them: .*/Test"):
        folder(empty)
    assert folder(empty / "train").class_names == ("cat",)


def test_sizes_and_channels_that_differ(tree):
    Image.new("L", (5, 7)).save(tree / "cat" / "x" / "deep.png")
    with pytest.raises(
        ValueError, match=r"deep.png has shape \(1, 7, 5\); expected \(3, 16, 16\), as .*1.webp has\. Pass mode="
    ):
        folder(tree).load()
    with pytest.raises(ValueError, match=r"deep.png has shape \(1, 7, 5\); expected \(1, 16, 16\).*Pass size="):
        folder(tree, mode="L").load()
    assert folder(tree, mode="RGB", size=(9, 4)).load().images.shape == (5, 3, 9, 4)


def test_a_corrupt_file_is_named(tree):
    (tree / "cat" / "y.bmp").write_bytes(b"words")
    dataset = folder(tree, mode="L")
    with pytest.raises(ValueError, match=r"cat/y.bmp cannot be read as an image: its format is unknown"):
        dataset[2]
    assert dataset[1][1] == 1
    (tree / "cat" / "y.bmp").unlink()
    with pytest.raises(FileNotFoundError, match=r"y.bmp"):
        dataset[2]


def test_in_a_loader(tree):
    dataset = pickle.loads(pickle.dumps(folder(tree, mode="L", size=8)))
    images, labels = next(iter(DataLoader(dataset, batch_size=5, num_workers=1)))
    assert images.shape == (5, 1, 8, 8)
    assert (255 * images[:, 0, 4, 4]).round().tolist() == [80, 40, 60, 20, 0]
    assert labels.tolist() == [0, 1, 1, 2, 2]
