import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from penult.data import ImageDataset, Images, digits, read
from penult.data._npz import Arrays


def double(image):
    return image * 2


def test_digits():
    dataset, whole = read("digits"), digits()
    assert isinstance(dataset, ImageDataset)
    loaded = dataset.load()
    assert isinstance(loaded, Images)
    assert torch.equal(loaded.images, whole.images)
    assert torch.equal(loaded.labels, whole.labels)
    assert loaded.class_names == dataset.class_names == whole.class_names
    assert read("digits", mode="RGB", size=(4, 6)).load().images.shape == (1797, 3, 4, 6)


def test_by_looking(tmp_path, make):
    make.parquet(tmp_path / "a.parquet", [1, 2, 3], [0, 1, 2])
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 2, 2), "uint8"))
    (tmp_path / "c").mkdir()
    make.grey(1).save(tmp_path / "c" / "1.png")
    with pytest.warns(UserWarning, match=r"1 file \(b.npz\) of .* left out"):
        assert len(read(tmp_path)) == 3  # a folder that holds parquet files
    assert len(read(tmp_path / "a.parquet")) == len(read(f"{tmp_path}/*.parquet")) == 3
    assert len(read([tmp_path / "a.parquet"])) == 3
    assert len(read(tmp_path / "b.npz")) == 4
    assert len(read(tmp_path / "c")) == 1
    assert read(tmp_path / "a.parquet", size=3, mode="RGB")[0][0].shape == (3, 3, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'image'"):
        read(tmp_path / "c", image="x")


def test_what_is_not_read(tmp_path):
    accepted = '"digits", a .parquet file, glob or folder, a folder of images, or an .npz file'
    with pytest.raises(FileNotFoundError) as caught:
        read("cifar10")
    assert str(caught.value) == f"there is no file or folder 'cifar10'; expected {accepted}"
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"a.csv' is not a data set that penult can read; expected") as caught:
        read(tmp_path / "a.csv")
    assert accepted in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no file .*b.npz"):
        read(tmp_path / "b.npz")


def test_suffixes_in_capitals(tmp_path, make):
    make.parquet(tmp_path / "A.PARQUET", [1, 2], [0, 1])
    assert len(read(tmp_path / "A.PARQUET")) == len(read(tmp_path)) == len(read(f"{tmp_path}/*.PARQUET")) == 2
    with open(tmp_path / "B.NPZ", "wb") as file:
        np.savez(file, images=np.zeros((4, 2, 2), "uint8"))
    assert len(read(tmp_path / "B.NPZ")) == 4


def test_other_kinds_of_files_are_named(tmp_path):
    for name, data, kind in (
        ("a.zip", b"PK\x03\x04", "a zip archive"),
        ("a.parquet.gz", b"\x1f\x8b\x08", "compressed by gzip"),
        ("a.arrow", b"ARROW1\0\0", "an Arrow file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf'{name} is {kind}; expected "digits", a .parquet file'):
            read(tmp_path / name)


def test_normalised_images():
    plain = read("digits", mode="RGB")
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    expected = (plain[3][0] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for given in ((mean, std), (torch.tensor(mean), np.array(std)), (list(mean), torch.tensor(std).view(3, 1, 1))):
        dataset = read("digits", mode="RGB", mean=given[0], std=given[1])
        assert torch.allclose(dataset[3][0], expected)
    assert torch.equal(read("digits", mean=0.5)[3][0], read("digits")[3][0] - 0.5)
    assert torch.equal(read("digits", std=0.5, transform=double)[3][0], 4 * read("digits")[3][0])
    copy = pickle.loads(pickle.dumps(dataset)).unnormalized()
    assert torch.equal(copy[3][0], plain[3][0])
    assert torch.equal(copy.labels, plain.labels)
    assert torch.allclose(dataset[3][0], expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"std": 0.0}, ValueError, "std is .*; expected positive"),
        ({"mean": float("nan")}, ValueError, "mean is nan; expected one finite number"),
        ({"mean": "imagenet"}, TypeError, "mean is 'imagenet'; expected one number"),
        ({"mean": torch.zeros(3, 2)}, ValueError, "mean is "),
        ({"mean": []}, ValueError, "mean is "),
    ],
)
def test_normalisations_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        read("digits", **options)


def test_normalisation_of_other_channels():
    with pytest.raises(ValueError, match="std has 3 values, but the images have 1 channel; expected one value"):
        read("digits", std=(1, 1, 1))[0]


@pytest.mark.parametrize("names", [{1: "b", 0: "a", 2: "c"}, {"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]])
def test_class_names_as_people_hold_them(names):
    source = Arrays(torch.zeros(3, 1, 2, 2), "zeros")
    assert ImageDataset(source, torch.tensor([0, 2, 1]), names).class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("names", "error"),
    [({"a": 0, "b": 1}, ValueError), ({1: "a", 2: "b"}, ValueError), ({0: "a", "0": "b"}, ValueError),
     ({0: 1}, TypeError), ("abc", TypeError), ({"a", "b"}, TypeError), ([0, 1], TypeError)],
)  # fmt: skip
def test_class_names_that_are_refused(names, error):
    with pytest.raises(error, match="class_names"):
        ImageDataset(Arrays(torch.zeros(1, 1, 2, 2), "zeros"), torch.tensor([0]), names)


def test_indices():
    dataset = read("digits")
    assert dataset[-1][1] == dataset[1796][1] == dataset[torch.tensor(1796)][1] == dataset[np.int64(1796)][1]
    for out in (1797, -1798):
        with pytest.raises(IndexError, match=f"no image {out} among 1797"):
            dataset[out]
    with pytest.raises(TypeError):
        dataset[1:3]
    subset = Subset(dataset, [5, 3])
    assert [label for _, label in subset] == [5, 3]


@pytest.mark.parametrize("size", [0, -3, (4,), (4, 0), (1, 2, 3)])
def test_sizes_that_are_refused(size):
    with pytest.raises(ValueError, match=r"size is .*; expected a positive number of pixels, or \(height, width\)"):
        read("digits", size=size)


def test_modes_that_are_refused():
    with pytest.raises(ValueError, match="mode is 'RGBA'; expected 'L' or 'RGB' or None"):
        read("digits", mode="RGBA")


def test_transform_comes_last_and_travels():
    plain, doubled = read("digits", size=4), read("digits", size=4, transform=double)
    assert torch.equal(doubled[3][0], 2 * plain[3][0])
    assert torch.equal(doubled.load().images, 2 * plain.load().images)
    copy = pickle.loads(pickle.dumps(doubled))
    assert torch.equal(copy[3][0], doubled[3][0])
    batch = next(iter(DataLoader(doubled, batch_size=3, num_workers=2)))
    assert torch.equal(batch[0][2], doubled[2][0])


def test_labels_that_do_not_fit():
    source = Arrays(torch.zeros(3, 1, 2, 2), "zeros")
    with pytest.raises(ValueError, match=r"labels of zeros has shape \(2,\); expected \(3,\)"):
        ImageDataset(source, torch.zeros(2, dtype=torch.int64))
    for wrong in (torch.zeros(3), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"labels of zeros is a torch\..* tensor; expected a tensor of integer"):
            ImageDataset(source, wrong)
    assert ImageDataset(source, torch.zeros(3, dtype=torch.uint8)).labels.dtype == torch.int64
    with pytest.raises(ValueError, match=r"image 1 of zeros has label 2; expected 0 to 1 for 2 class names"):
        ImageDataset(source, torch.tensor([0, 2, 1]), ["a", "b"])


@pytest.mark.slow
def test_the_room_imports_no_extra():
    code = """
import sys, penult
penult.data.read, penult.data.shift
print(*[name for name in ("pyarrow", "PIL", "sklearn", "numpy") if name in sys.modules])
import torch
print(*[name for name in ("numpy",) if name in sys.modules])
"""
    run = [sys.executable, "-W", "error", "-c", code]
    ours, torchs = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split("\n")[:2]
    assert set(ours.split()) <= set(torchs.split())  # torch may bring numpy along


def test_scikit_learn_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'the digits come with scikit-learn: pip install "penult\[data\]"'):
        read("digits")
