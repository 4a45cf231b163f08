"""Columns and class names of the images that commands read."""

import io
import json

import numpy
import pytest
import torch
from torch import nn

import penult
from penult.cli._console import RichReporter
from penult.cli._inputs import number_as_network
from penult.data import ImageDataset, read

COARSE = [0, 1, 0, 1]


@pytest.fixture
def parquet(here):
    """A parquet file with two columns of images and two of labels, like CIFAR-100 and more."""
    pyarrow = pytest.importorskip("pyarrow")
    from PIL import Image
    from pyarrow import parquet as files

    def png(value):
        Image.new("L", (8, 8), value).save(buffer := io.BytesIO(), "png")
        return {"bytes": buffer.getvalue(), "path": None}

    label = {"_type": "ClassLabel"}
    features = {"fine_label": label | {"names": [*"abcdefghij"]}, "coarse_label": label | {"names": ["x", "y"]}}
    columns = {
        "front": [png(20 * i) for i in range(4)],
        "back": [png(9)] * 4,
        "fine_label": [3, 1, 4, 1],
        "coarse_label": COARSE,
    }
    table = pyarrow.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    files.write_table(table, here / "a.parquet")
    return "a.parquet"


def test_the_columns_of_a_parquet_file_are_options(parquet, refused, penult_json):
    command = ["extract", "usernets:trained", parquet, "--out", "acts"]
    message = refused(*command)
    assert message.startswith("penult: a.parquet has no column image; its columns are front (struct<")
    assert message.endswith("coarse_label (int64); pass one with --image-column")
    assert refused(*command, "--image-column", "front").endswith(
        "may be the labels: fine_label, coarse_label; pass one with --label-column"
    )
    penult_json(*command, "--image-column", "front", "--label-column", "fine_label")
    acts = penult.Activations.open("acts")
    assert acts.labels.tolist() == [3, 1, 4, 1]
    assert acts.class_names == tuple("abcdefghij")
    assert len(acts.activations.unique(dim=0)) == 4
    penult_json(*command, "--image-column", "back", "--label-column", "fine_label", "--overwrite")
    assert len(penult.Activations.open("acts").activations.unique(dim=0)) == 1
    assert "no column 'middle'" in refused(*command, "--image-column", "middle")


def test_the_arrays_of_an_npz_file_are_options(here, refused, penult_json):
    images = numpy.linspace(0, 1, 4 * 64, dtype="float32").reshape(4, 8, 8)
    numpy.savez("a.npz", x_left=images, x_right=1 - images, y_left=[3, 1, 4, 1], y_right=COARSE)
    command = ["extract", "usernets:trained", "a.npz", "--out", "acts"]
    assert refused(*command).endswith("pass one with --image-column")
    penult_json(*command, "--image-column", "x_right", "--label-column", "y_left")
    assert penult.Activations.open("acts").labels.tolist() == [3, 1, 4, 1]
    numpy.savez("b.npz", images=images, labels=[0] * 4, targets=[1] * 4)
    assert refused("extract", "usernets:trained", "b.npz", "--out", "b").endswith("pass one with --label-column")


@pytest.mark.parametrize("source", ["digits", "photos"])
def test_other_sources_have_no_columns(source, here, refused):
    (here / "photos").mkdir()
    message = refused("extract", "usernets:trained", source, "--out", "acts", "--label-column", "fine_label")
    assert f"{source} has no columns; --image-column and --label-column are for" in message


# --- names of classes ---------------------------------------------------------------------------------------


class Config:
    def __init__(self, id2label):
        self.id2label = id2label


def network(id2label, inner=False):
    """A network whose configuration, or that of a part of it, names the classes."""
    model = nn.Linear(2, 3)
    model.config = Config(id2label)
    return nn.Sequential(model) if inner else model


def dataset(names=("cat", "dog", "Bird"), labels=(0, 1, 2, 1)):
    whole = read("digits")
    labels = None if labels is None else torch.tensor(labels).repeat(len(whole))[: len(whole)]
    return ImageDataset(whole._source, labels, names)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    ("id2label", "expected"),
    [
        ({0: "dog", 1: "cat", 2: "bird"}, [1, 0, 2, 0]),
        ({"2": "CAT", "0": "BIRD", "1": "DOG"}, [2, 1, 0, 1]),
        ({0: "bird", 1: "cat", 2: "dog"}, [1, 2, 0, 2]),
    ],
)
def test_labels_are_numbered_as_the_network_does(id2label, expected, inner, capsys):
    data = dataset()
    number_as_network(network(id2label, inner), {"photos": data}, RichReporter())
    assert data.labels[:4].tolist() == expected
    assert data[1][1] == expected[1]
    assert [name.lower() for name in data.class_names] == [id2label[key].lower() for key in sorted(id2label, key=int)]
    assert "photos has the classes of the network in another order" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "id2label",
    [
        {0: "tench", 1: "dog", 2: "bird"},
        {0: "cat", 1: "cat", 2: "dog"},
        {0: "tabby cat", 1: "hot dog", 2: "crane"},
    ],
)
def test_other_names_are_named(id2label, capsys):
    data = dataset()
    number_as_network(network(id2label), {"photos": data}, RichReporter())
    assert data.labels[:4].tolist() == [0, 1, 2, 1]
    assert data.class_names == ("cat", "dog", "Bird")
    assert "in photos and" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 3),
        network({0: "cat", 1: "Dog", 2: "bird"}),
        network({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}),
        network({0: "cat", 2: "dog", 5: "bird"}),
        network({0: "cat", 1: "dog"}),
        network({0: "cat", 1: None, 2: "bird"}),
        network(["dog", "cat", "bird"]),
        network(None),
    ],
)
def test_nothing_is_said_where_names_agree_or_are_unknown(model, capsys):
    data, unnamed = dataset(), dataset(names=None)
    number_as_network(model, {"photos": data, "others": unnamed}, RichReporter())
    assert data.labels[:4].tolist() == unnamed.labels[:4].tolist() == [0, 1, 2, 1]
    assert capsys.readouterr().out == ""


def test_images_without_labels_get_the_names_of_the_network():
    data = dataset(labels=None)
    number_as_network(network({0: "dog", 1: "cat", 2: "bird"}), {"photos": data}, RichReporter())
    assert data.class_names == ("dog", "cat", "bird")
    assert data.labels is None


def test_extract_stores_labels_in_the_order_of_the_network(here, penult_json):
    names = [*map(str, range(10))]
    (here / "named.py").write_text(
        "import usernets\n\ndef net():\n    model = usernets.trained()\n"
        f"    model.config = type('Config', (), {{'id2label': dict(enumerate({names[::-1]}))}})()\n    return model\n"
    )
    penult_json("extract", "usernets:trained", "digits", "--out", "plain")
    penult_json("extract", "named:net", "digits", "--out", "named")
    plain, named = penult.Activations.open("plain"), penult.Activations.open("named")
    assert torch.equal(named.labels, 9 - plain.labels)
    assert named.class_names == plain.class_names[::-1]
