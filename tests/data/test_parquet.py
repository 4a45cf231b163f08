import json
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from penult.data import _parquet as rows_module
from penult.data import parquet, read

NAMES = ["cat", "dog", "eel"]


def values(dataset):
    """What the images are filled with."""
    items = [dataset[i] for i in range(len(dataset))]
    images = items if dataset.labels is None else [image for image, _ in items]
    assert all(image.min() == image.max() for image in images)
    return [round(255 * float(image.max())) for image in images]


@pytest.fixture
def shards(tmp_path, make):
    """Three files in an order that is not that of their making."""
    for i in (2, 0, 1):
        labels = [i, (i + 1) % 3, (i + 2) % 3]
        make.parquet(tmp_path / f"train-{i:05}-of-00003.parquet", range(10 * i, 10 * i + 3), labels, NAMES)
    return tmp_path


ORDER = [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_images_labels_and_names(tmp_path, make):
    dataset = parquet(make.parquet(tmp_path / "a.parquet", [7, 8, 9], [2, 0, 1], NAMES))
    assert len(dataset) == 3
    image, label = dataset[0]
    assert image.shape == (1, 4, 6)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.equal(image, torch.full((1, 4, 6), 7 / 255))
    assert label == 2
    assert type(label) is int
    assert dataset.class_names == tuple(NAMES)
    assert dataset.labels.tolist() == [2, 0, 1]
    assert dataset.labels.dtype == torch.int64
    assert values(dataset) == [7, 8, 9]
    assert repr(dataset) == f"ImageDataset(N=3, K=3, source={tmp_path / 'a.parquet'})"


@pytest.mark.parametrize("name", ["binary", "large_binary", "binary_view"])
@pytest.mark.parametrize("wrap", [lambda kind: kind, lambda kind: pa.struct([("bytes", kind), ("path", pa.string())])])
def test_all_types_of_bytes(name, wrap, tmp_path, make):
    kind = wrap(getattr(pa, name)())
    pngs = [row["bytes"] for row in pq.read_table(make.parquet(tmp_path / "a.parquet", [7, 8, 9]))["image"].to_pylist()]
    rows = [{"bytes": png, "path": None} for png in pngs] if pa.types.is_struct(kind) else pngs
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": [0, 1, 2]}), tmp_path / "b.parquet")
    assert values(parquet(tmp_path / "b.parquet")) == [7, 8, 9]


def test_shards_are_sorted(shards):
    files = sorted(shards.iterdir(), reverse=True)
    for source in (shards, str(shards), shards / "*.parquet", f"{shards}/train-*-of-00003.parquet", files):
        dataset = parquet(source)
        assert values(dataset) == ORDER
        assert dataset.labels.tolist() == [0, 1, 2, 1, 2, 0, 2, 0, 1]
        assert values(read(source)) == ORDER
    assert "3 files" in repr(dataset)


def test_hidden_files_and_others_are_skipped(shards, make):
    make.parquet(shards / ".train-00003-of-00003.parquet", [99], [0], NAMES)
    (shards / "README.md").write_text("words")
    assert values(parquet(shards)) == ORDER


def test_a_folder_of_splits_is_not_one_set(shards, make):
    make.parquet(shards / "test-00000-of-00001.parquet", [99], [0], NAMES)
    with pytest.raises(ValueError, match=r"contains splits \(test, train\); read one of them: .*test-\*\.parquet"):
        parquet(shards)
    assert values(parquet(shards / "test-*.parquet")) == [99]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.parquet", "validation.parquet"], r"splits \(train, validation\); read one of them: .*/train.parquet"),
        (["mnist-test.parquet", "mnist-train1.parquet"], r"splits \(mnist-test, mnist-train\)"),
        (["mnist-train.parquet", "usps-train.parquet"], r"splits \(mnist-train, usps-train\)"),
        (["TRAIN_0.PARQUET", "TRAIN_1.PARQUET", "b.parquet"], r"splits \(TRAIN, b.parquet\)"),
        (["plain_text/test/0000.parquet", "plain_text/train/0000.parquet"], r"in 2 folders .* may be splits; read one"),
        (["default/test-0-of-1.parquet", "default/train-0-of-1.parquet"], r"splits \(test, train\).*default/test-\*"),
    ],
)
def test_splits_are_not_merged(tmp_path, make, names, message):
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make.parquet(tmp_path / name, [i], [0])
    for source in (tmp_path, f"{tmp_path}/**/*.[pP]*"):
        with pytest.raises(ValueError, match=message if source is tmp_path else "contains splits"):
            read(source)
    files = [tmp_path / name for name in names]
    assert sorted(values(read(files))) == list(range(len(names)))
    assert values(read(files[0])) == [0]


@pytest.mark.parametrize(
    "names", [["train-0.parquet", "train-1.parquet"], ["0000.parquet", "0001.parquet"], ["x/y/TRAIN.PARQUET"]]
)
def test_folders_that_are_one_set(tmp_path, make, names):
    (tmp_path / "README.md").write_text("words")
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make.parquet(tmp_path / name, [i], [0])
    assert values(read(tmp_path)) == values(parquet(str(tmp_path))) == list(range(len(names)))


def test_files_left_out_of_a_folder_are_counted(tmp_path, make):
    (tmp_path / "data").mkdir()
    make.parquet(tmp_path / "data" / "train.parquet", [3], [0])
    for name in ("README.md", "data/extra.arrow", "data/train.csv", "infos.json"):
        (tmp_path / name).write_text("words")
    with pytest.warns(UserWarning, match=r"^3 files \(data/extra.arrow, data/train.csv, infos.json\) of .* left out"):
        assert values(read(tmp_path)) == [3]


def test_images_next_to_parquet_files(tmp_path, make):
    for name in ("data", "assets"):
        (tmp_path / name).mkdir()
    make.parquet(tmp_path / "data" / "train.parquet", [{"bytes": None, "path": "0.png"}], [0])
    make.grey(7).save(tmp_path / "data" / "0.png")  # the image of the row
    assert values(read(tmp_path)) == [7]
    make.grey(8).save(tmp_path / "assets" / "logo.png")
    message = (
        r"1 file \(data/train.parquet\) of parquet and 1 file \(assets/logo.png\) of images.* Read .*data or .*assets"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_names_with_brackets_are_no_patterns(tmp_path, make, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shelf = tmp_path / "set [1-2]?"
    shelf.mkdir()
    for i in range(2):
        make.parquet(shelf / f"train[{i}].parquet", [i], [0])
    for source in (shelf, f"{shelf}/*.parquet", f"{shelf}/train*", "~/set [1-2]?/*", ["~/set [1-2]?/train[0].parquet"]):
        assert values(read(source)) == [0, 1][: 1 if isinstance(source, list) else 2]
    assert values(read(shelf / "train[1].parquet")) == [1]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read(f"{shelf}/test*.parquet")


def test_other_files_are_named(tmp_path):
    for data, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer.*Run git lfs pull"),
        (b"  <HTML><body>404", "is an HTML page.*Download the file itself"),
        (b"\x1f\x8b\x08\0 packed", "is compressed by gzip.*Unpack"),
        (b"PK\x03\x04 packed", "is a zip archive; expected a parquet file"),
        (b"", "is empty"),
        (b"PAR1 the start", "is not a parquet file, or a damaged one"),
        (b"words", "is not a parquet file, or a damaged one"),
    ):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(ValueError, match=f"a.parquet {message}"):
            parquet(tmp_path / "a.parquet")


def test_shards_of_different_sets(tmp_path, make):
    first = make.parquet(tmp_path / "a.parquet", [1], [0], NAMES)
    other = make.parquet(tmp_path / "b.parquet", [1], [0], ["x", "y"])
    with pytest.raises(ValueError, match=r"a.parquet and .*b.parquet do not belong together: class names"):
        parquet([first, other])
    make.parquet(other, [1])
    with pytest.raises(ValueError, match=r"column 'label' is 'present' in the first and 'missing' in the second"):
        parquet([first, other])
    with pytest.raises(ValueError, match=r"column of labels is None in the first and 'label' in the second"):
        parquet([make.parquet(first, [1]), make.parquet(other, [1], [0])])


def test_shards_may_differ_in_what_is_not_read(tmp_path, make):
    first = make.parquet(tmp_path / "a.parquet", [1, 2], [0, 1], NAMES)
    other = tmp_path / "b.parquet"
    for kind in (pa.int8(), pa.uint16(), pa.int32()):
        make.parquet(other, [3, 4], pa.array([2, 0], kind), NAMES)
        assert parquet([first, other]).labels.tolist() == [0, 1, 2, 0]
    table = pq.read_table(other)
    for name, column in (("img", table["image"]), ("label_name", pa.array(["eel", "cat"])), ("labels", table["label"])):
        pq.write_table(table.append_column(name, column), other)
        for files in ([first, other], [other, first]):
            assert values(parquet(files, image="image", label="label")) == [1, 2, 3, 4]
        assert values(parquet([first, other])) == [1, 2, 3, 4]
    cells = [make.encode(make.grey(i)) for i in (3, 4)]
    assert values(parquet([first, make.parquet(other, cells, [1, 1], NAMES)])) == [1, 2, 3, 4]
    make.parquet(other, [3, 4], pa.nulls(2), NAMES)
    with pytest.raises(ValueError, match=r"2 of 4 images have no label .* row 0 of .*b.parquet"):
        parquet([first, other])
    assert parquet(other).labels is None


def test_class_names_of_metadata_may_be_a_mapping(tmp_path, make):
    names = {"2": "eel", "0": "cat", "1": "dog"}
    assert parquet(make.parquet(tmp_path / "a.parquet", [3], [2], names)).class_names == tuple(NAMES)
    with pytest.raises(ValueError, match=r"class names in the metadata of .* is a mapping with the keys 'x'"):
        parquet(make.parquet(tmp_path / "a.parquet", [3], [0], {"x": "cat"}))


def test_without_labels(tmp_path, make):
    for labels in (None, [-1, -1], [None, None], [None, -1]):
        dataset = parquet(make.parquet(tmp_path / "a.parquet", [3, 4], labels, NAMES))
        assert dataset.labels is None
        assert isinstance(dataset[1], torch.Tensor)
        assert values(dataset) == [3, 4]
        assert torch.stack(list(dataset)).shape == (2, 1, 4, 6)
        with pytest.raises(ValueError, match="has no labels"):
            dataset.load()


@pytest.mark.parametrize("missing", [-1, None])
def test_labels_missing_in_part(tmp_path, make, missing):
    path = make.parquet(tmp_path / "a.parquet", [3, 4, 5, 6], [0, 1, missing, missing])
    with pytest.raises(
        ValueError, match=r"2 of 4 images have no label \(-1 or null\), the first .* row 2 of .*a.parquet"
    ):
        parquet(path)


@pytest.mark.parametrize("wrong", [3, -2])
def test_labels_out_of_range(tmp_path, make, wrong):
    first = make.parquet(tmp_path / "a.parquet", [3], [0], NAMES)
    path = make.parquet(tmp_path / "b.parquet", [3, 4, 5, 6], [0, 1, 2, wrong], NAMES)
    with pytest.raises(ValueError, match=rf"row 3 of .*b.parquet has label {wrong}; expected 0 to 2"):
        parquet([first, path])


def test_labels_that_are_no_integers(tmp_path, make):
    path = make.parquet(tmp_path / "a.parquet", [3, 4], pa.array(["x", "y"]))
    with pytest.raises(ValueError, match=r"'label' of .* is string; expected integer labels"):
        parquet(path)


def test_class_labels_are_found_by_the_schema(tmp_path, make):
    features = {"image": {"_type": "Image"}, "fine_label": {"_type": "ClassLabel", "names": NAMES}}
    path = make.parquet(tmp_path / "a.parquet", [3, 4], [2, 1], label="fine_label", features=features)
    assert parquet(path).class_names == tuple(NAMES)
    assert parquet(path).labels.tolist() == [2, 1]
    make.parquet(path, [3, 4], [2, 1], label="fine_label")  # no metadata: no such label
    assert parquet(path).labels is None
    assert parquet(path, label="fine_label").labels.tolist() == [2, 1]
    make.parquet(path, [3, 4], [2, 1], label="labels")
    assert parquet(path).labels.tolist() == [2, 1]
    assert parquet(path).class_names is None
    assert parquet(path).load().class_names == ("0", "1", "2")


def test_columns_that_cannot_be_told(tmp_path, make):
    path = make.parquet(tmp_path / "a.parquet", [3, 4], [2, 1], label="fine")
    table = pq.read_table(path)
    kinds = {name: {"_type": "ClassLabel", "names": NAMES} for name in ("fine", "coarse")}
    table = table.append_column("coarse", pa.array([0, 1])).append_column("second", table["image"])
    table = table.rename_columns(["first", "fine", "coarse", "second"])
    metadata = {"huggingface": json.dumps({"info": {"features": kinds}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match=r"no column image; its columns are first \(struct.*; pass one with image="):
        parquet(path)
    with pytest.raises(ValueError, match="may be the labels: fine, coarse; pass one with label="):
        parquet(path, image="second")
    dataset = parquet(path, image="second", label="coarse")
    assert dataset.labels.tolist() == [0, 1]
    assert dataset.class_names == tuple(NAMES)
    with pytest.raises(ValueError, match=r"no column 'colour'; its columns are first \(struct.*coarse \(int64\)"):
        parquet(path, image="second", label="colour")
    with pytest.raises(ValueError, match=r"'fine' of .* is int64; expected struct"):
        parquet(path, image="fine", label="coarse")


def test_foreign_metadata_are_left_alone(tmp_path, make):
    path = make.parquet(tmp_path / "a.parquet", [3], [0])
    inner = ("null", '{"features": [1]}', '{"features": {"label": 3}}')
    for foreign in ("no json", "[]", *(f'{{"info": {each}}}' for each in inner)):
        pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": foreign}), path)
        assert parquet(path).class_names is None
        assert parquet(path).labels.tolist() == [0]


def test_plain_bytes_and_other_names(tmp_path, make):
    cells = [make.encode(make.grey(i)) for i in (5, 6)]
    for name in ("image", "img", "picture"):
        path = make.parquet(tmp_path / "a.parquet", cells, [0, 1], image=name)
        assert values(parquet(path)) == [5, 6]


def test_paths_are_seen_from_the_file(tmp_path, make):
    (tmp_path / "pictures").mkdir()
    make.grey(44).save(tmp_path / "pictures" / "a.png")
    path = make.parquet(tmp_path / "a.parquet", [43, {"bytes": None, "path": "pictures/a.png"}], [0, 1])
    assert values(parquet(path)) == [43, 44]
    (tmp_path / "pictures" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"row 1 of .*a.parquet has no bytes but the path 'pictures/a.png'"):
        parquet(path)[1]


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}])
def test_null_images(tmp_path, make, cell):
    dataset = parquet(make.parquet(tmp_path / "a.parquet", [1, 2, 3, cell], [0, 1, 2, 0]))
    assert dataset[2][1] == 2
    with pytest.raises(ValueError, match=r"row 3 of .*a.parquet has no image; bytes and path are null"):
        dataset[3]


def test_corrupt_images(tmp_path, make):
    whole = make.encode(make.grey(9, 40, 40), "jpeg")
    cells = [{"bytes": each, "path": None} for each in (whole, whole[:-100], b"no image", b"", whole[:30])]
    dataset = parquet(make.parquet(tmp_path / "a.parquet", cells, [0] * 5))
    assert dataset[0][0].shape == (1, 40, 40)
    for i in range(1, 5):
        with pytest.raises(ValueError, match=rf"row {i} of .*a.parquet cannot be read as an image: ") as caught:
            dataset[i]
        assert "0x" not in str(caught.value)
    loader = DataLoader(dataset, batch_size=2, num_workers=1)
    with pytest.raises(ValueError, match="row 1 of"):
        list(loader)


def test_files_that_are_no_parquet(tmp_path, make):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not at all PAR1")
    with pytest.raises(ValueError, match=r"a.parquet is not a parquet file"):
        parquet(tmp_path / "a.parquet")
    for absent in (tmp_path / "b.parquet", tmp_path / "b*.parquet", [tmp_path / "b.parquet"]):
        with pytest.raises(FileNotFoundError, match=r"b\*?.parquet"):
            parquet(absent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no .parquet file in"):
        parquet(tmp_path / "empty")
    with pytest.raises(ValueError, match="source is an empty list"):
        parquet([])


def test_damaged_row_groups_are_named(tmp_path, make):
    path = make.parquet(tmp_path / "a.parquet", range(6), [0] * 6, rows=3)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    dataset = parquet(path)
    assert dataset[2][1] == 0
    with pytest.raises(ValueError, match=r"row group 1 of .*a.parquet cannot be read"):
        dataset[3]


def test_empty_sets(tmp_path, make):
    empty = make.parquet(tmp_path / "a.parquet", [], [], NAMES)
    with pytest.raises(ValueError, match=r"a.parquet contains no image"):
        parquet(empty)
    assert values(parquet([empty, make.parquet(tmp_path / "b.parquet", [8], [0], NAMES)])) == [8]


@pytest.mark.slow
def test_a_bounded_number_of_bytes_is_kept(tmp_path, make, monkeypatch):
    path = make.parquet(tmp_path / "a.parquet", range(20), [0] * 20, rows=2)
    fetched, fetch = [], rows_module._fetch
    monkeypatch.setattr(
        rows_module, "_fetch", lambda group, column: fetched.append(group.number) or fetch(group, column)
    )
    dataset = parquet(path)
    assert values(dataset) == values(dataset) == list(range(20))
    assert fetched == list(range(10))  # all are kept
    fetched.clear()
    size = fetch(rows_module._Group(path, 0, 0, 0), "image").nbytes
    monkeypatch.setattr(rows_module, "_KEPT", int(2.5 * size))  # room for two
    dataset = parquet(path)
    for i in (0, 2, 1, 3, 4, 0, 2, 4):  # row groups 0 1 0 1 2 0 1 2
        dataset[i]
        assert sum(each.nbytes for each in dataset._source._kept.values()) <= 2.5 * size
    assert fetched == [0, 1, 2, 0, 1, 2]
    fetched.clear()
    monkeypatch.setattr(rows_module, "_KEPT", 0)
    dataset = parquet(path)
    for i in (0, 1, 0, 2, 3, 0):  # the last one stays in any case
        dataset[i]
        assert len(dataset._source._kept) == 1
    assert fetched == [0, 1, 0]


def test_pickles_without_what_is_kept(shards):
    dataset = parquet(shards, size=3)
    fresh = pickle.dumps(dataset)
    dataset.load()
    assert len(pickle.dumps(dataset)) == len(fresh)
    copy = pickle.loads(pickle.dumps(dataset))
    assert values(copy) == ORDER
    assert copy.class_names == dataset.class_names
    assert torch.equal(copy.load().images, dataset.load().images)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12 warns where threads live
@pytest.mark.parametrize(
    "context",
    [
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("fork", marks=pytest.mark.skipif(sys.platform == "win32", reason="no fork")),
    ],
)
def test_workers(shards, context):
    dataset = parquet(shards)
    dataset[4]  # something is kept when the workers begin
    loader = DataLoader(Subset(dataset, [8, 0, 3, 1, 7]), 2, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    assert labels.tolist() == [1, 0, 1, 1, 0]
    assert (255 * images[:, 0, 0, 0]).round().tolist() == [22, 0, 10, 1, 21]


def test_pyarrow_is_asked_for(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "penult\[data\]"') as caught:
        read(shards)
    assert caught.value.name.startswith("pyarrow")
