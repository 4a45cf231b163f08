import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from penult import io


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_round_trip(tmp_path):
    path = tmp_path / "a.penult.safetensors"
    tensors = {
        "f": torch.randn(3, 4),
        "d": torch.randn(2, dtype=torch.float64),
        "h": torch.randn(5).half(),
        "b": torch.randn(5).bfloat16(),
        "i": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(2.5),
    }
    metadata = {"names": ["a", "b"], "depth": {"x": 1.5, "y": None}, "flag": True, "text": "κ ≥ 0"}
    assert io.write(path, tensors, "pair", metadata) == path
    file = io.read(path, kind="pair")
    assert file.kind == "pair"
    assert file.metadata == metadata
    assert file.versions["torch"] == torch.__version__
    assert set(file.versions) == {"penult", "torch"}
    assert list(sorted(file.tensors)) == sorted(tensors)
    for name, value in tensors.items():
        assert file.tensors[name].dtype == value.dtype
        assert torch.equal(file.tensors[name], value)
    assert leftovers(tmp_path) == []


def test_string_path_and_kinds(tmp_path):
    path = str(tmp_path / "a.safetensors")
    io.write(path, {}, "head", {})
    assert io.read(path).kind == "head"
    assert io.read(path, kind=("pair", "head")).kind == "head"
    with pytest.raises(io.FileFormatError, match=r"is of kind 'head'; expected 'pair'"):
        io.read(path, kind="pair")
    with pytest.raises(io.FileFormatError, match=r"expected 'gate' or 'pair'"):
        io.read(path, kind={"pair", "gate"})


def test_shared_views_and_gradients(tmp_path):
    base = torch.randn(4, 6, requires_grad=True)
    tensors = {"all": base, "row": base[1], "t": base.t(), "same": base}
    io.write(tmp_path / "a", tensors, "x", {})
    read = io.read(tmp_path / "a").tensors
    for name, value in tensors.items():
        assert torch.equal(read[name], value.detach())
        assert not read[name].requires_grad
    assert base.requires_grad


def test_replaces_old_file_and_survives_open_readers(tmp_path):
    path = tmp_path / "a"
    io.write(path, {"x": torch.zeros(1000)}, "x", {})
    old = io.read(path)
    io.write(path, {"x": torch.ones(10)}, "x", {"new": 1})
    assert old.tensors["x"].sum() == 0
    assert io.read(path).metadata == {"new": 1}


def test_the_metadata_is_one_json_string(tmp_path):
    from safetensors import safe_open

    io.write(tmp_path / "a", {"x": torch.zeros(1)}, "note", {"k": [1, 2]})
    with safe_open(tmp_path / "a", framework="pt") as file:
        header = file.metadata()
    assert set(header) == {"penult"}
    record = json.loads(header["penult"])
    assert record["schema"] == io.SCHEMA_VERSION
    assert record["kind"] == "note"
    assert record["k"] == [1, 2]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    io.write(tmp_path / "a", {"x": torch.zeros(1)}, "x", {})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- paths as people write them -----------------------------------------------------------------------------


def test_links_stay_and_their_files_are_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "shelf").symlink_to("store")
    file, link, chain = tmp_path / "store" / "a", tmp_path / "link", tmp_path / "chain"
    link.symlink_to("shelf/a")  # a relative link, which leads to a file that is not there yet
    chain.symlink_to(link)
    for i, path in enumerate((link, chain, str(chain), tmp_path / "shelf" / "a")):
        assert io.write(path, {}, "x", {"i": i}) == type(file)(path)
        assert io.read(file).metadata == io.read(chain).metadata == {"i": i}
    io.write_bytes(link, b"page")
    assert file.read_bytes() == b"page"
    assert link.is_symlink()
    assert chain.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "chain", "link", "shelf", "store"]


def test_links_that_lead_to_no_file(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "lost").symlink_to("nowhere/a")
    (tmp_path / "null").symlink_to("/dev/null")
    for name, error, words in (
        ("a", OSError, "cannot write .*/a: it is a symbolic link that leads back to itself"),
        ("lost", FileNotFoundError, "cannot write .*/lost: it is a link to .*nowhere does not exist; create it first"),
        ("null", OSError, "cannot write .*/null: it is a device or pipe; expected a file"),
    ):
        with pytest.raises(error, match=words):
            io.write_bytes(tmp_path / name, b"")
        assert (tmp_path / name).is_symlink()


def test_a_failed_write_through_a_link_leaves_both(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to("store/a")
    io.write(tmp_path / "link", {}, "x", {"old": True})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        io.write(tmp_path / "link", {}, "x", {})
    assert io.read(tmp_path / "link").metadata == {"old": True}
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "a" * 101, "🙂" * 60 + ".safetensors", "a" * 100])
def test_every_name_that_the_system_takes(tmp_path, name):
    for i in range(2):
        io.write(tmp_path / name, {}, "x", {"i": i})
    assert io.read(tmp_path / name).metadata == {"i": 1}
    with io.aside(tmp_path / name) as temporary:
        assert len(os.fsencode(temporary.name)) <= 125
        io.sweep(tmp_path, name)
        assert list(io.leftovers(tmp_path)) == [temporary]
    # The temporary file of a killed writer is removed by the next one of the same name alone.
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    debris = tmp_path / temporary.name.replace(f".{os.getpid()}-", f".{dead.pid}-")
    debris.touch()
    io.write(tmp_path / (name[:-1] + "b"), {}, "x", {})
    assert debris.exists()
    io.write(tmp_path / name, {}, "x", {})
    assert not debris.exists()


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    io.write("~/a", {}, "x", {})
    io.write_bytes("~/new/b", b"")
    io.write_index("~/", {"a": {}}, "x", {})
    assert io.read("~/a").kind == io.read_index("~").kind == "x"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "index.json", "new"]


@pytest.mark.parametrize(
    ("device", "error"),
    [("gpu", ValueError), ("cuda:99", ValueError), ("cpu:x", ValueError), ("", ValueError), (None, TypeError),
     (["cpu"], TypeError), (99, ValueError), ("meta", ValueError)],
)  # fmt: skip
def test_a_bad_device_is_no_fault_of_the_file(tmp_path, device, error):
    path = io.write(tmp_path / "a", {"x": torch.zeros(2)}, "x", {})
    with pytest.raises(error, match=r"^device is .*expected a device of this machine") as caught:
        io.read(path, device=device)
    assert not isinstance(caught.value, io.FileFormatError)
    for known in ("cpu", torch.device("cpu"), "cpu:0"):
        assert io.read(path, device=known).tensors["x"].device.type == "cpu"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
            "is a Git LFS pointer.*git lfs pull",
        ),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><title>404", "is an HTML page; expected a safetensors file.*Download the file"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is an XML document; .*Download the file itself"),
        (b"\x1f\x8b\x08\x00 packed", "is compressed by gzip; .*Unpack it"),
        (b"\x28\xb5\x2f\xfd packed", "is compressed by Zstandard"),
        (b"PK\x03\x04 packed", "is a zip archive; expected a safetensors file. If torch.save wrote it"),
        (b"PAR1", "is a parquet file; expected a safetensors file"),
        (b"\x93NUMPY\x01\x00", r"is a NumPy array \(.npy\)"),
        (b"a/".ljust(257, b"\0") + b"ustar", "is a tar archive"),
        (b'{"weight_map": {}}', "is JSON; .*give the shard that it names"),
        (b"", "is empty; .*truncated"),
        (b"\x1f\x8b\x08\0\0\0\0\0{", "is truncated or damaged"),  # a header of that length
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, data, words):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(io.FileFormatError, match=f"a.safetensors {words}"):
        io.read(tmp_path / "a.safetensors")


def test_bad_destinations(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        io.write(tmp_path / "nowhere" / "a", {}, "x", {})
    with pytest.raises(IsADirectoryError, match="is a folder"):
        io.write(tmp_path, {}, "x", {})


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "words"),
    [
        ({"x": [1, 2]}, {}, TypeError, r"tensors\['x'\] is a list"),
        ({}, {"kind": 1}, ValueError, "kind"),
        ({}, {"o": object()}, TypeError, "JSON"),
        ({}, {"o": float("nan")}, ValueError, "NaN"),
    ],
)
def test_bad_contents_write_nothing(tmp_path, tensors, metadata, error, words):
    with pytest.raises(error, match=words):
        io.write(tmp_path / "a", tensors, "x", metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_exception_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch, where, error):
    path = tmp_path / "a"
    io.write(path, {"x": torch.arange(5)}, "x", {"old": True})

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("penult.io._file.save_file" if where == "save_file" else f"os.{where}", fail)
    with pytest.raises(type(error)):
        io.write(path, {"x": torch.zeros(99)}, "x", {})
    monkeypatch.undo()
    assert leftovers(tmp_path) == []
    assert io.read(path).metadata == {"old": True}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_killed_writer_leaves_the_old_file(tmp_path, where):
    path = tmp_path / "a"
    io.write(path, {"x": torch.arange(5)}, "x", {"old": True})
    script = f"""
        import os, signal, sys, torch
        from penult import io
        os.{where} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        io.write(sys.argv[1], {{"x": torch.zeros(1000)}}, "x", {{}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], check=False)
    assert done.returncode != 0
    assert torch.equal(io.read(path).tensors["x"], torch.arange(5))
    assert len(leftovers(tmp_path)) == 1  # the kill was in the middle
    io.write(path, {"x": torch.ones(2)}, "x", {"new": True})  # and the debris is in nobody's way
    assert io.read(path).metadata == {"new": True}


def test_missing_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        io.read(tmp_path / "none")
    with pytest.raises(io.FileFormatError, match="folder"):
        io.read(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -100, -1])
def test_truncated(tmp_path, keep):
    path = tmp_path / "a"
    io.write(path, {"x": torch.randn(50)}, "x", {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(io.FileFormatError, match=r"truncated|first bytes"):
        io.read(path)


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os._exit, (1,)

    torch.save({"x": torch.ones(2)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.pt", "plain.pkl"):
        with pytest.raises(io.FileFormatError, match="never unpickles"):
            io.read(tmp_path / name)


def test_any_other_file(tmp_path):
    (tmp_path / "a").write_text("weights, honest\n" * 20)
    with pytest.raises(io.FileFormatError, match="not a safetensors file"):
        io.read(tmp_path / "a")


def test_foreign_safetensors(tmp_path):
    save_file({f"layer{i}.weight": torch.zeros(1) for i in range(9)}, tmp_path / "a")
    with pytest.raises(io.FileFormatError, match=r"layer0.weight.*3 more.*penult\.Head\(weight, bias\)"):
        io.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "no schema"),
        ('{"kind": "x"}', "no schema"),
        ('{"schema": 1}', "no kind"),
        (
            '{"schema": 7, "kind": "x"}',
            r"written by schema 7, this penult reads up to 1: upgrade penult with pip install -U penult",
        ),
    ],
)
def test_malformed_metadata(tmp_path, text, words):
    save_file({"x": torch.zeros(1)}, tmp_path / "a", metadata={"penult": text})
    with pytest.raises(io.FileFormatError, match=words):
        io.read(tmp_path / "a")


# ---- folders of shards --------------------------------------------------------------------------------------


def shards(folder, count=3):
    for i in range(count):
        io.write(folder / f"x-{i}.safetensors", {"x": torch.arange(i)}, "x", {})
    return {f"x-{i}.safetensors": {"rows": i} for i in range(count)}


def test_index_round_trip(tmp_path):
    facts = shards(tmp_path)
    path = io.write_index(str(tmp_path), facts, "numbers", {"by": ["me"], "κ": 1.5})
    assert path == tmp_path / io.INDEX_NAME
    index = io.read_index(str(tmp_path), kind=("numbers", "letters"))
    assert list(index.shards.items()) == list(facts.items())
    assert index.kind == "numbers"
    assert index.metadata == {"by": ["me"], "κ": 1.5}
    assert set(index.versions) == {"penult", "torch"}
    record = json.loads(path.read_text())
    assert record["schema"] == io.SCHEMA_VERSION
    assert [entry["bytes"] for entry in record["shards"]] == [(tmp_path / name).stat().st_size for name in facts]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("shards", "metadata", "error", "words"),
    [
        ({"none": {}}, {}, FileNotFoundError, "none"),
        ({"../a": {}}, {}, ValueError, "not a plain file name"),
        ({"a": {"bytes": 1}}, {}, ValueError, "may not use the names bytes"),
        ({"a": {}}, {"shards": []}, ValueError, "shards"),
        ({"a": {"o": object()}}, {}, TypeError, "JSON"),
        ({"a": {"o": float("inf")}}, {}, ValueError, "NaN"),
    ],
)
def test_bad_indices_are_not_written(tmp_path, shards, metadata, error, words):
    (tmp_path / "a").touch()
    with pytest.raises(error, match=words):
        io.write_index(tmp_path, shards, "x", metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_no_index(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        io.read_index(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no index\.json in"):
        io.read_index(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(io.FileFormatError, match="a file, not a folder"):
        io.read_index(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../x-0.safetensors", "not a plain file name"),
        ("/etc/passwd", "not a plain file name"),
        ("..", "not a plain file name"),
        ("sub/x-0.safetensors", "not a plain file name"),
        ("..\\x", "not a plain file name"),
        ("C:x", "not a plain file name"),
        ("x\0", "not a plain file name"),
        ("", "not a plain file name"),
        (".", "not a plain file name"),
        ("x-1.safetensors", "no unique name"),
        (None, "no unique name"),
        (["x"], "no unique name"),
        ("x-9.safetensors", r"incomplete: x-9\.safetensors is missing"),
    ],
)
def test_bad_shard_names(tmp_path, name, words):
    io.write_index(tmp_path, shards(tmp_path), "x", {})
    record = json.loads((tmp_path / io.INDEX_NAME).read_text())
    record["shards"][2]["name"] = name
    (tmp_path / io.INDEX_NAME).write_text(json.dumps(record))
    with pytest.raises(io.FileFormatError, match=words):
        io.read_index(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "no schema"),
        ('{"schema": 1}', "no kind"),
        ('{"schema": 7, "kind": "x"}', "written by schema 7.*upgrade penult"),
        ('{"schema": 1, "kind": "y", "shards": []}', "is of kind 'y'; expected 'x'"),
        ('{"schema": 1, "kind": "x"}', "no list of shards"),
        ('{"schema": 1, "kind": "x", "shards": {}}', "no list of shards"),
        ('{"schema": 1, "kind": "x", "shards": [1]}', "no unique name"),
        ('{"schema": 1, "kind": "x", "shards": [{"name": "a"}]}', "no size"),
        ('{"schema": 1, "kind": "x", "shards": [{"name": "a", "bytes": "5"}]}', "no size"),
    ],
)
def test_malformed_indices(tmp_path, text, words):
    (tmp_path / io.INDEX_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(io.FileFormatError, match=words):
        io.read_index(tmp_path, kind="x")


@pytest.mark.parametrize("keep", [0, -1])
def test_a_shard_of_another_size(tmp_path, keep):
    io.write_index(tmp_path, shards(tmp_path), "x", {})
    path = tmp_path / "x-1.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(io.FileFormatError, match=r"x-1\.safetensors has \d+ bytes, but \d+ in the index"):
        io.read_index(tmp_path)


def test_an_interrupted_index_leaves_the_old_one(tmp_path, monkeypatch):
    io.write_index(tmp_path, shards(tmp_path), "x", {"old": True})

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        io.write_index(tmp_path, {}, "x", {})
    monkeypatch.undo()
    assert io.read_index(tmp_path).metadata == {"old": True}
    assert leftovers(tmp_path) == []


def test_leftovers(tmp_path):
    for name in ("a.safetensors", ".a.safetensors.tmp", ".a.1-zzzzzzzz.tmp", "a.1-01234567.tmp"):
        (tmp_path / name).touch()
    assert io.leftovers(tmp_path) == {}
    with io.aside(tmp_path / "b.json") as temporary:
        assert io.leftovers(tmp_path) == {temporary: "b.json"}
    assert io.leftovers(tmp_path) == {}
