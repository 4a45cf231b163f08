import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penult import io
from penult.activations import Activations
from zoo import seeded

ROW = 4 * (4 + 3) + 8  # bytes
NAMES = ("a", "b", "c")
PROC = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


def some(labels=True, rows=10):
    return Activations(seeded(rows, 4), seeded(rows, 3, seed=1), torch.arange(rows) % 3 if labels else None, NAMES)


@pytest.fixture
def folder(tmp_path):
    some().save(tmp_path / "acts", shard_size=4 * ROW)
    return tmp_path / "acts"


@pytest.fixture
def opened(monkeypatch):
    """Names of the shards that were read since the last look."""
    seen = []
    read = io.read

    def spy(path, *args, **kwargs):
        seen.append(path.name[len("activations-") : -len(".safetensors")].lstrip("0") or "0")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(io, "read", spy)

    def look():
        names = " ".join(seen)
        seen.clear()
        return names

    return look


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def change(folder, **entries):
    record = index_of(folder)
    for name, value in entries.items():
        (record["facts"] if name in record["facts"] else record)[name] = value
    (folder / "index.json").write_text(json.dumps(record))


# ---- format ------------------------------------------------------------------------------------------------


def test_the_format_is_safetensors_and_json(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "activations-00000.safetensors",
        "activations-00001.safetensors",
        "activations-00002.safetensors",
        "index.json",
    ]
    acts, tensors = some(), load_file(folder / "activations-00001.safetensors")
    assert set(tensors) == {"activations", "logits", "labels"}
    assert torch.equal(tensors["activations"], acts.activations[4:8])
    assert torch.equal(tensors["labels"], acts.labels[4:8])
    record = index_of(folder)
    assert [shard["rows"] for shard in record["shards"]] == [4, 4, 2]
    assert record["kind"] == "activations"
    assert record["facts"]["class_names"] == ["a", "b", "c"]


@pytest.mark.parametrize("rows", [0, 1, 8])
def test_round_trip_of_any_number(tmp_path, rows):
    acts = some(rows=rows)
    for size in (1, 4 * ROW, 10**9):
        found = acts.save(tmp_path / str(size), shard_size=size)
        assert torch.equal(found.activations, acts.activations)
        assert torch.equal(found.labels, acts.labels)
        assert found.class_names == NAMES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_of_dtypes(tmp_path, dtype):
    acts = Activations(seeded(5, 4).to(dtype), seeded(5, 3), torch.arange(5, dtype=torch.int32) % 3)
    found = acts.save(tmp_path)
    assert torch.equal(found.activations, acts.activations)
    assert (found.dtype, found.logits.dtype, found.labels.dtype) == (dtype, torch.float32, torch.int64)


def test_what_cannot_be_stored(tmp_path):
    with pytest.raises(TypeError, match="float8_e5m2, which cannot be stored"):
        Activations(torch.zeros(1, 2).to(torch.float8_e5m2), torch.zeros(1, 2)).save(tmp_path / "a")
    with pytest.raises(ValueError, match="shard_size is 0"):
        some().save(tmp_path / "c", shard_size=0)


# ---- lazy --------------------------------------------------------------------------------------------------


@PROC
def test_one_shard_is_mapped_and_not_copied(tmp_path):
    acts = some(rows=10_000).save(tmp_path)
    h = acts.activations
    path = str(tmp_path / "activations-00000.safetensors")
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if path in line]
    assert any(int(start, 16) <= h.data_ptr() < int(end, 16) for start, end in spans)
    part = acts[100:200].activations
    assert part.untyped_storage().nbytes() >= acts.activations.nbytes  # a view of the file
    assert torch.equal(part, h[100:200])


def test_the_file_cannot_be_written_to_by_accident(folder):
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    acts = Activations.open(folder)
    for part in acts.batches(3):
        part.activations.zero_()
    acts[:4].activations.fill_(7.0)
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == before
    assert torch.equal(acts.activations, some().activations)


def test_what_is_not_asked_for_is_not_read(folder, opened):
    acts = Activations.open(folder)
    first, second = acts.split(0.5, 0.5)
    parts = [acts[2:7], acts[5:], acts[:0], first, second[1:], Activations.concatenate([acts, acts[3:5]])]
    for part in [acts, *parts]:
        assert (part.in_features, part.num_classes, part.dtype, part.class_names) == (4, 3, torch.float32, NAMES)
        assert len(part) >= 0
        assert "labels=True" in repr(part)
        pickle.loads(pickle.dumps(part))
    assert opened() == ""
    assert len(acts[2:7].activations) == 5
    assert opened() == "0 1"
    assert acts[9:].labels.tolist() == [0]
    assert opened() == "2"
    assert acts[torch.tensor([9, 0, 9])].labels.tolist() == [0, 0, 0]
    assert opened() == "0 2"
    batches = acts.batches(3)
    assert opened() == ""
    next(batches)
    assert opened() == "0"
    next(batches)
    assert opened() == "0 1"
    assert len(acts.predicted) == 10
    assert opened() == "0 1 2"


def resident(path):
    """Bytes of a file that this process has in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@PROC
def test_labels_read_no_activations(tmp_path):
    acts = Activations(seeded(4000, 1000), seeded(4000, 3), torch.arange(4000) % 3).save(tmp_path)
    path = tmp_path / "activations-00000.safetensors"
    labels = acts.labels
    assert torch.equal(labels, torch.arange(4000) % 3)
    assert 0 < resident(path) < 500_000  # of 16 MB
    h = acts.activations
    assert h.isfinite().all()
    assert resident(path) > 15_000_000


def test_moving_and_deleting(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    acts = Activations.open("acts")
    monkeypatch.chdir("/")
    assert torch.equal(acts.activations, some().activations)
    kept = next(acts.batches(4)).activations
    shutil.rmtree(folder)
    assert torch.equal(kept, some().activations[:4])  # still mapped
    assert len(acts[2:5]) == 3
    with pytest.raises(FileNotFoundError, match=r"activations-00000.safetensors does not exist"):
        _ = acts[2:5].activations


# ---- save --------------------------------------------------------------------------------------------------


def test_saving_twice(folder):
    with pytest.raises(FileExistsError, match=r"already contains activations; .*overwrite=True"):
        some(rows=3).save(folder)
    assert len(Activations.open(folder)) == 10
    assert len(some(rows=3).save(folder, overwrite=True)) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["activations-00000.safetensors", "index.json"]


def test_saving_onto_itself(folder):
    acts = Activations.open(folder)
    for part in (acts, acts[2:3], Activations.concatenate([some(), acts[:1]])):
        with pytest.raises(ValueError, match="contains rows of this set"):
            part.save(folder, overwrite=True)
    assert torch.equal(acts.activations, some().activations)
    assert torch.equal(acts[2:9].save(folder.parent / "copy").labels, some().labels[2:9])


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folders_are_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"other files and no activations \(thesis.tex\)"):
        some().save(tmp_path, overwrite=overwrite)
    with pytest.raises(NotADirectoryError):
        some().save(tmp_path / "thesis.tex", overwrite=overwrite)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(FileExistsError, match="other files"):
        some().save(tmp_path, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "thesis.tex"]


def test_other_files_beside_activations_stay(folder):
    (folder / "head.safetensors").write_text("mine")
    some(rows=3).save(folder, overwrite=True)
    assert (folder / "head.safetensors").read_text() == "mine"
    assert len(Activations.open(folder)) == 3


@pytest.mark.parametrize("where", ["write", "write_index"])
def test_an_interrupted_save_is_incomplete(tmp_path, monkeypatch, where):
    original, calls = getattr(io, where), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == (2 if where == "write" else 1):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(io, where, fail)
    with pytest.raises(KeyboardInterrupt):
        some().save(tmp_path, shard_size=4 * ROW)
    monkeypatch.undo()
    count = 1 if where == "write" else 3
    with pytest.raises(io.FileFormatError, match=rf"incomplete: it has {count} whole shards.*extract.*resumes"):
        Activations.open(tmp_path)
    assert len(some().save(tmp_path, overwrite=True)) == 10


# ---- what is not as it should be ---------------------------------------------------------------------------


def test_missing_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Activations.open(tmp_path / "nowhere")
    with pytest.raises(io.FileFormatError, match=r"contains no activations: it has neither an index.json nor a shard"):
        Activations.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(io.FileFormatError, match="a file, not a folder"):
        Activations.open(tmp_path / "file")


def test_a_missing_shard(folder):
    (folder / "activations-00001.safetensors").unlink()
    with pytest.raises(io.FileFormatError, match=r"incomplete: activations-00001.safetensors is missing"):
        Activations.open(folder)


def test_a_truncated_shard(folder):
    os.truncate(folder / "activations-00001.safetensors", 300)
    with pytest.raises(io.FileFormatError, match=r"00001.safetensors has 300 bytes, but \d+ in the index"):
        Activations.open(folder)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"schema": 99}, "written by schema 99.*upgrade"),
        ({"kind": "pair"}, "is of kind 'pair'; expected 'activations'"),
        ({"facts": None}, "is not a record of activations"),
        ({"batches": "many"}, "'many' is not a count"),
        ({"shards": []}, "there is no shard"),
        ({"dtype": "object"}, "KeyError: 'object'"),
        ({"in_features": -1}, "-1 is not a count"),
        ({"num_classes": 3.5}, "3.5 is not a count"),
        ({"labels": "maybe"}, "labels is neither true nor false"),
        ({"class_names": ["a"]}, "class_names is not a list of 3 strings"),
        ({"class_names": [1, 2, 3]}, "class_names is not a list of 3 strings"),
    ],
)
def test_a_bad_index(folder, entries, words):
    change(folder, **entries)
    with pytest.raises(io.FileFormatError, match=words):
        Activations.open(folder)


@pytest.mark.parametrize("name", ["../activations-00000.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "C:x", ""])
def test_nothing_leads_out_of_the_folder(folder, name):
    shutil.copy(folder / "activations-00000.safetensors", folder.parent)
    record = index_of(folder)
    record["shards"][0]["name"] = name
    (folder / "index.json").write_text(json.dumps(record))
    with pytest.raises(io.FileFormatError, match="not a plain file name"):
        Activations.open(folder)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"in_features": 5}, r"activations in .* is torch.float32 of shape \(4, 4\); expected .*\(4, 5\)"),
        ({"dtype": "float16"}, r"expected torch.float16 .* as its index says"),
    ],
)
def test_a_shard_that_is_not_what_the_index_says(folder, entries, words):
    change(folder, **entries)
    acts = Activations.open(folder)
    assert len(acts.labels) == 10
    with pytest.raises(io.FileFormatError, match=words):
        _ = acts.activations


def test_labels_that_the_index_only_claims(tmp_path):
    some(labels=False).save(tmp_path)
    change(tmp_path, labels=True)
    with pytest.raises(io.FileFormatError, match=r"labels in .* is missing"):
        _ = Activations.open(tmp_path).labels


def test_a_shard_that_penult_did_not_write(folder):
    path = folder / "activations-00000.safetensors"
    size = path.stat().st_size
    save_file({"activations": torch.zeros(4, 4)}, path)
    with open(path, "ab") as file:
        file.write(b"\0" * (size - path.stat().st_size))
    with pytest.raises(io.FileFormatError):
        _ = Activations.open(folder).activations


def test_pickles_are_never_loaded(folder):
    class Bomb:
        def __reduce__(self):
            return os._exit, (1,)

    path = folder / "activations-00000.safetensors"
    data = pickle.dumps(Bomb())
    path.write_bytes(data + b"\0" * (path.stat().st_size - len(data)))
    with pytest.raises(io.FileFormatError, match="never unpickles"):
        _ = Activations.open(folder).activations
    (folder / "index.json").write_bytes(data)
    with pytest.raises(io.FileFormatError, match="not valid JSON"):
        Activations.open(folder)
