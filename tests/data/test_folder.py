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
    (tmp_path / "cat" / "words.txt").write_text("words")
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


def test_a_flat_folder_has_no_labels(tmp_path, make):
    for i, name in enumerate(["b.png", "a.png", ".c.png", "d.txt"]):
        make.grey(i).save(tmp_path / name, "png")
    dataset = read(tmp_path)
    assert dataset.labels is None
    assert dataset.class_names is None
    assert values(dataset) == [1, 0]
    with pytest.raises(ValueError, match=r"torch.stack\(list\(dataset\)\)"):
        dataset.load()


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
    with pytest.raises(ValueError, match="classes without an image: ant, bee; remove"):
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
    with pytest.raises(ValueError, match=r"are splits, not classes; read one of them: .*/Test"):
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
