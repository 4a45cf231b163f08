import sys

import numpy as np
import pytest
import torch

from penult.data import npz, read

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 4, 5), dtype="uint8")
LAST = RNG.integers(0, 256, (6, 4, 5, 3), dtype="uint8")
LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return tmp_path / "a.npz"

    return write


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "labels"), ("image", "label"), ("x", "y"), ("X", "Y"), ("x_train", "y_train"), ("data", "target"),
     ("val_images", "val_labels"), ("arr_0", "arr_1"), ("data", "targets"), ("X_train", "y_train"), ("imgs", "labels"),
     ("trainX", "trainY"), ("images", "targets"), ("test_data", "test_label"), ("inputs", "classes"),
     ("image", "image_label"), ("train_x", "train_data_labels")],
)  # fmt: skip
def test_usual_keys(save, images, labels):
    with pytest.warns(UserWarning, match=r"a.npz: arrays that are not read: weights$"):
        dataset = npz(save(**{labels: LABELS, images: GREY, "weights": np.ones(6)}))
    assert len(dataset) == 6
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.class_names is None
    image, label = dataset[4]
    assert label == 1
    assert torch.equal(image, torch.tensor(GREY[4:5].astype("float32")) / 255)
    alone = read(save(**{images: GREY}))
    assert alone.labels is None
    assert torch.equal(alone[4], image)


def test_keys_that_cannot_be_told(save):
    both = save(x_train=GREY, y_train=LABELS, x_test=LAST, y_test=LABELS[::-1])
    with pytest.raises(ValueError, match=r"may be the images: x_train, x_test\. .*; pass one with images="):
        npz(both)
    dataset = npz(both, images="x_test")
    assert dataset[0][0].shape == (3, 4, 5)
    assert dataset.labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert npz(both, images="x_test", labels="y_train").labels.tolist() == LABELS.tolist()
    with pytest.raises(ValueError, match=r"no array named images or x\. .* file: pictures; pass one with images="):
        npz(save(pictures=GREY))
    assert npz(save(pictures=GREY), images="pictures").labels is None
    with pytest.raises(ValueError, match="has no array 'z'; its arrays are images"):
        npz(save(images=GREY), images="z")
    with pytest.raises(ValueError, match="has no array 'z'; its arrays are images"):
        npz(save(images=GREY), labels="z")


@pytest.mark.parametrize("name", ["fine_labels", "gt", "y_test", "annotations"])
def test_labels_of_unknown_names_are_named(save, name):
    path = save(**{"images": GREY, name: LABELS})
    with pytest.warns(UserWarning, match=f"not read: {name}. The images have no labels. If one of"):
        assert npz(path).labels is None
    assert npz(path, labels=name).labels.tolist() == LABELS.tolist()


def test_names_with_further_words(save):
    with pytest.warns(UserWarning, match="not read: image_ids, label_names$"):
        dataset = npz(save(images=GREY, image_ids=LABELS, labels=LABELS, label_names=np.array(["a", "b", "c"])))
    assert dataset.labels.tolist() == LABELS.tolist()
    with pytest.raises(ValueError, match="may be the labels: labels, target; pass one with labels="):
        npz(save(images=GREY, labels=LABELS, target=LABELS))


def test_other_files_are_named(tmp_path):
    for data, message in (
        (b"version https://git-lfs.github.com/spec/v1", r"a.npz is a Git LFS pointer.*Run git lfs pull"),
        (b"<html><body>403", r"a.npz is an HTML page.*Download the file itself"),
        (b"\x1f\x8b\x08 packed", "a.npz is compressed by gzip.*Unpack"),
        (b"PAR1", "a.npz is a parquet file; expected a zip archive"),
        (b"words", "a.npz cannot be read as an .npz file of plain arrays"),
    ):
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            npz(tmp_path / "a.npz")


def test_shapes(save):
    first = LAST.transpose(0, 3, 1, 2)
    for array in (LAST, first):
        images = npz(save(images=array, labels=LABELS)).load().images
        assert torch.equal(images, torch.tensor(first.astype("float32")) / 255)
    assert npz(save(images=GREY[..., None]))[0].shape == (1, 4, 5)
    assert npz(save(images=GREY[:, None]))[0].shape == (1, 4, 5)
    many = np.zeros((2, 3, 7, 3), "uint8")
    with pytest.raises(ValueError, match=r'\(2, 3, 7, 3\), which is both .* pass channels="first" or "last"'):
        npz(save(images=many))
    assert npz(save(images=many), channels="first")[0].shape == (3, 7, 3)
    assert npz(save(images=many), channels="last")[0].shape == (3, 3, 7)
    with pytest.raises(ValueError, match=r"\(2, 5, 7, 4\), which is neither .* with C = 1 or 3"):
        npz(save(images=np.zeros((2, 5, 7, 4), "uint8")))
    assert npz(save(images=np.zeros((2, 5, 7, 4), "uint8")), channels="last")[0].shape == (4, 5, 7)
    with pytest.raises(ValueError, match=r"image 1 of .* it has 4 channels; expected 1 or 3 for mode='L'"):
        npz(save(images=np.zeros((2, 5, 7, 4), "uint8")), channels="last", mode="L")[1]
    with pytest.raises(ValueError, match=r"shape \(6, 20\); expected \(N, H, W\)"):
        npz(save(images=GREY.reshape(6, 20)))
    with pytest.raises(ValueError, match=r"shape \(6, 4, 5\); expected \(N, H, W\)"):
        npz(save(images=GREY), channels="last")
    with pytest.raises(ValueError, match="channels is 'middle'; expected"):
        npz(save(images=LAST), channels="middle")


def test_values(save):
    for dtype in ("float16", "float32", "float64", ">f4"):
        scaled = (GREY / 255).astype(dtype)
        image = npz(save(images=scaled))[1]
        assert image.dtype == torch.float32
        assert torch.equal(image[0], torch.tensor(scaled[1].astype("float32")))
    assert npz(save(images=GREY > 99))[1].unique().tolist() == [0, 1]
    for wrong in (GREY.astype("float32"), GREY / 255 - 0.1, np.full((1, 2, 2), np.nan)):
        with pytest.raises(ValueError, match=r"array of images in .*a.npz has values from .* expected 0 to 1"):
            npz(save(images=wrong))
    with pytest.raises(ValueError, match="is int64; expected uint8, or floating"):
        npz(save(images=GREY.astype("int64")))


def test_the_default_dtype_does_not_matter(save):
    torch.set_default_dtype(torch.float64)
    try:
        assert npz(save(images=GREY))[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_modes(save):
    grey = npz(save(images=LAST), mode="L")[2]
    assert grey.shape == (1, 4, 5)
    assert np.allclose(255 * grey[0].numpy(), LAST[2] @ [0.299, 0.587, 0.114], atol=1e-3)
    assert torch.equal(npz(save(images=GREY), mode="RGB")[2], npz(save(images=GREY))[2].expand(3, -1, -1))


def test_items_may_be_written_to(save):
    for array in (GREY, GREY / 255):
        dataset = npz(save(images=array))
        before = dataset[0].clone()
        dataset[0].zero_()
        assert torch.equal(dataset[0], before)


def test_labels(save):
    assert npz(save(x=GREY, y=LABELS[:, None].astype("uint8"))).labels.tolist() == LABELS.tolist()
    assert npz(save(x=GREY, y=np.full(6, -1))).labels is None
    for wrong in (LABELS[:5], np.stack([LABELS] * 2, 1)):
        with pytest.raises(ValueError, match=r"labels of .*a.npz has shape .*; expected \(6,\)"):
            npz(save(x=GREY, y=wrong))
    with pytest.raises(ValueError, match="is float64; expected integers"):
        npz(save(x=GREY, y=LABELS.astype(float)))
    with pytest.raises(ValueError, match=r"image 3 of .* has label -2; expected a label of at least 0$"):
        npz(save(x=GREY, y=np.array([0, 1, 2, -2, 1, 2])))


def test_files_that_are_refused(save, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.npz"):
        npz(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match="contains no image"):
        npz(save(images=GREY[:0]))
    with pytest.raises(ValueError, match=r"plain arrays: Object arrays cannot be loaded"):
        npz(save(images=np.array([{}, 3], dtype=object)))
    (tmp_path / "b.npz").write_bytes(save(images=GREY).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"b.npz cannot be read as an .npz file"):
        npz(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", GREY)
    with pytest.raises(ValueError, match=r"c.npy is a NumPy array .* numpy.savez\(path, images="):
        npz(tmp_path / "c.npy")


def test_numpy_is_asked_for(save, monkeypatch):
    path = save(images=GREY)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=r'pip install "penult\[data\]"'):
        npz(path)
