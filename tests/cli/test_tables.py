"""Names of rows, from data sets to the tables that commands write."""

import csv
import io
import os

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import penult
from penult.cli._table import files_and_rows, shown_row, write_table
from penult.data import _RowNames, digits, folder, npz, parquet, read

MODEL = ("--model", "usernets:trained")


def png(image):
    buffer = io.BytesIO()
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def place(here, penult_json):
    """Images as files with awkward names, as parquet shards, and a pair of their network."""
    images, labels, _ = digits()
    names = ["=1+1.png", "+a.png", "-b.png", "@c.png", "plain.png", 'a,b "c".png', "é.png"]
    for number, name in enumerate(names):
        (here / "photos" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        (here / "photos" / str(number % 2) / name).write_bytes(png(images[number]))
    (here / "flat").mkdir()
    for number, name in enumerate(names):
        (here / "flat" / name).write_bytes(png(images[number]))
    for shard, rows in enumerate([range(0, 5), range(5, 12)]):
        table = pyarrow.table({"image": [{"bytes": png(images[i])} for i in rows], "label": labels[rows].tolist()})
        pyarrow.parquet.write_table(table, here / f"part-{shard}.parquet", row_group_size=2)
    numpy.savez(here / "pool.npz", images=images[:300].numpy(), labels=labels[:300].numpy())
    penult_json("extract", "usernets:trained", "pool.npz", "--out", "pool")
    penult_json("fit", "pool", "--base", "gaussian", "--out", "net.penult.safetensors")
    return here


def table(name="scores.csv"):
    with open(name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stored", [False, True])
def test_files_of_images_are_in_the_table(place, penult_json, stored):
    source = ("flat", *MODEL)
    if stored:
        penult_json("extract", "usernets:trained", "flat", "--out", "acts")
        source = ("acts",)
    penult_json("score", "net.penult.safetensors", *source, "--out", "scores.csv")
    assert [row["file"] for row in table()] == [
        *("'+a.png", "'-b.png", "'=1+1.png", "'@c.png", 'a,b "c".png', "plain.png", "é.png")
    ]
    assert {row["row"] for row in table()} == {""}


def test_class_folders_are_part_of_the_name(place):
    names = folder("photos").row_names
    assert [names[i] for i in range(2)] == [("0/-b.png", None), ("0/=1+1.png", None)]


@pytest.mark.parametrize("stored", [False, True])
def test_rows_of_shards_are_in_the_table(place, penult_json, stored):
    source = ("part-*.parquet", *MODEL)
    if stored:
        penult_json("extract", "usernets:trained", "part-*.parquet", "--out", "acts", "--batch-size", "5")
        source = ("acts",)
    results = penult_json("score", "net.penult.safetensors", *source, "--out", "scores.parquet")
    rows = pyarrow.parquet.read_table("scores.parquet").to_pylist()
    expected = [("part-0.parquet", i) for i in range(5)] + [("part-1.parquet", i) for i in range(7)]
    assert [(row["file"], row["row"]) for row in rows] == expected
    first = results["strangest"][0]
    assert (first["file"], first["row"]) == expected[first["index"]]
    assert first["score"] == max(row["score"] for row in rows)


def test_the_same_table_in_three_forms(place, penult_json):
    run = ("score", "net.penult.safetensors", "part-*.parquet", *MODEL, "--calibrate", "flat")
    for suffix in ("csv", "npz", "parquet"):
        penult_json(*run, "--false-alarm", "0.5", "--out", f"scores.{suffix}")
    with numpy.load("scores.npz", allow_pickle=False) as file:
        arrays = dict(file)
    rows, text = pyarrow.parquet.read_table("scores.parquet"), table()
    for name, array in arrays.items():
        assert rows[name].to_pylist() == array.tolist(), name
    assert [row["verdict"] for row in text] == arrays["verdict"].tolist()
    assert numpy.array_equal(numpy.float32([row["score"] for row in text]), arrays["score"])
    assert set(arrays["verdict"]) <= {"outlier", "familiar"}
    assert not list(place.glob(".*tmp"))


def test_names_of_classes_come_from_the_pair(place, penult_json):
    pair = penult.load("net.penult.safetensors")
    pair.head.class_names = ["=zero", *"abcdefghi"]
    pair.save("named.penult.safetensors")
    penult_json("score", "named.penult.safetensors", "pool", "--out", "scores.csv")
    penult_json("score", "named.penult.safetensors", "pool", "--out", "scores.parquet")
    assert {row["class_name"] for row in table() if row["predicted"] == "0"} <= {"'=zero"}
    rows = pyarrow.parquet.read_table("scores.parquet").to_pylist()
    assert all(row["class_name"] == pair.head.class_names[row["predicted"]] for row in rows)


def test_rows_of_other_activations_name_nothing(place, penult_json, capsys):
    penult_json("extract", "usernets:trained", "flat", "--out", "acts")
    penult.Activations.open("pool")[:7].save("acts", overwrite=True)
    penult_json("score", "net.penult.safetensors", "acts", "--out", "scores.csv")
    assert [row["file"] + row["row"] for row in table()] == list("0123456")


def test_a_damaged_file_of_names_is_refused(place, refused):
    (place / "pool" / "rows.json").write_text('{"schema": 1, "kind": "rows", "files": 3}')
    assert "rows.json holds no names of rows" in refused("score", "net.penult.safetensors", "pool")
    (place / "pool" / "rows.json").write_text("not JSON")
    assert "not valid JSON" in refused("score", "net.penult.safetensors", "pool")


def test_other_suffixes_are_refused_before_the_work(place, refused):
    assert "name.parquet" in refused("score", "missing.safetensors", "pool", "--out", "scores.xlsx")


def test_names_of_every_reader(place):
    assert read("digits").row_names[3] == ("digits", 3)
    assert npz("pool.npz").row_names[3] == ("pool.npz", 3)
    names = parquet(["part-0.parquet", "part-1.parquet"]).row_names
    assert len(names) == 12
    assert names[5] == ("part-1.parquet", 0)
    for index in (-1, 12):
        with pytest.raises(IndexError, match="among 12"):
            names[index]
    with pytest.raises(ValueError, match="counts has 1 numbers; expected 2"):
        _RowNames(["a", "b"], [1])


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes only there")
def test_names_that_are_no_text_are_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    files, rows = files_and_rows(_RowNames([name, "a.png"]), 2)
    assert files == ["caf\\udce9.png", "a.png"]
    for suffix in ("csv", "npz", "parquet"):
        write_table(tmp_path / f"a.{suffix}", {"file": files, "row": rows, "score": torch.ones(2)})
    assert [row["file"] for row in table(tmp_path / "a.csv")] == files
    _RowNames([name], [4]).save(tmp_path, None)
    assert _RowNames.load(tmp_path)[0][3] == (name, 3)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_text_cannot_be_a_formula(tmp_path, start):
    write_table(tmp_path / "a.csv", {"file": [f"{start}cmd"], "score": torch.tensor([-1.5])})
    (row,) = table(tmp_path / "a.csv")
    assert row["file"] == f"'{start}cmd"
    assert row["score"] == "-1.5"


def test_rows_are_shown_by_their_names():
    assert [shown_row(None, 3, 3), shown_row("a.png", None, 3), shown_row("a.csv", 2, 3)] == [
        *("index 3", "a.png", "a.csv row 2")
    ]
