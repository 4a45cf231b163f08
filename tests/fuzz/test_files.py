"""Hostile files of penult's own, and safetensors files of others: they are read right, or refused by name."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import penult
from fuzz.strategies import ODD, TEXTS, cases, damaged, edited, hostile, joined, lawful, parts_of, text_of
from penult import Gaussian, GenerativePair, Head, Marginal, Sphere, io
from penult.cli._models import _load_weights, is_file, load_head, load_pair
from penult.generate import ActivationGAN, ActivationVAE
from penult.generate import load as load_generator

D, K = 6, 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of right files, and a folder for wrong ones."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    head = Head(torch.randn(K, D), torch.randn(K))
    rows = torch.randn(60, D)
    bases = [
        Sphere(2.0),
        Gaussian(torch.zeros(D), torch.eye(D)),
        Marginal.fit(head, rows, components=2, dims=2),
        Marginal.fit(head, rows, kind="bank"),
    ]
    pairs = []
    for base in bases:
        pairs.append(GenerativePair(head, base).save(folder / "right.penult.safetensors").read_bytes())
    generators = []
    for kind in (ActivationVAE, ActivationGAN):
        made = kind(GenerativePair(head, bases[0]), None, (1, 8, 8), latent=2, width=2)
        generators.append(made.save(folder / "right.safetensors").read_bytes())
    acts = penult.Activations(rows, rows[:, :K], torch.arange(60) % K, ["a", "b", "c"])
    acts.save(folder / "acts", shard_size=1500)
    state = save({"body.weight": torch.randn(4, 4, 3, 3), "fc.weight": torch.randn(K, D), "fc.bias": torch.randn(K)})
    return SimpleNamespace(folder=folder, pairs=pairs, generators=generators, acts=folder / "acts", state=state)


def look(pair):
    """What a user does first with a pair; errors about numbers that make no law are ValueErrors as well."""
    assert repr(pair)
    assert str(pair.head.certificate)
    h = torch.zeros(1, pair.head.in_features)
    logits = pair.head(h.to(pair.head.weight))
    assert logits.shape == (1, pair.head.num_classes)
    assert pair.head.with_temperature(2.0).temperature > 0


@cases(300)
@given(st.data())
def test_pairs(whole, data):
    path = whole.folder / "pair.penult.safetensors"
    path.write_bytes(data.draw(hostile(data.draw(st.sampled_from(whole.pairs)))))
    with lawful(path):
        look(penult.load(path))


@cases(100)
@given(st.data())
def test_generators(whole, data):
    path = whole.folder / "generator.safetensors"
    path.write_bytes(data.draw(hostile(data.draw(st.sampled_from(whole.generators)))))
    with lawful(path):
        assert load_generator(path).image_shape


@cases(200)
@given(st.data())
def test_any_file(whole, data):
    path = whole.folder / "any.safetensors"
    source = st.one_of(
        st.binary(max_size=200),
        st.sampled_from([*whole.pairs, *whole.generators]).flatmap(hostile),
        st.recursive(
            ODD, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=8
        ).map(lambda tree: joined(tree, bytes(8))),
    )
    path.write_bytes(data.draw(source))
    with lawful(path):
        io.read(path)


@cases(250)
@given(st.data())
def test_heads_of_others(whole, data):
    path = whole.folder / "model.safetensors"
    header, body = parts_of(whole.state)
    kind = data.draw(st.sampled_from(["bytes", "header", "keys"]))
    weight, bias = None, None
    if kind == "bytes":
        path.write_bytes(data.draw(damaged(whole.state)))
    elif kind == "header":
        path.write_bytes(joined(data.draw(edited(header, edits=3)), body))
    else:
        path.write_bytes(whole.state)
        weight = data.draw(st.sampled_from([None, *header, *TEXTS[1:]]))
        bias = data.draw(st.sampled_from([None, *header, *TEXTS[1:]]))
    with lawful(path, TypeError):
        head = load_head(path, weight, bias)
        assert head.weight.isfinite().all()
    with lawful(path, TypeError):
        load_pair(path, weight, bias)


@cases(250)
@given(st.data())
def test_folders(whole, data):
    folder = whole.folder / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.acts, folder)
    index = folder / io.INDEX_NAME
    kind = data.draw(st.sampled_from(["bytes", "tree", "tree", "shard"]))
    if kind == "bytes":
        index.write_bytes(data.draw(damaged(index.read_bytes())))
    elif kind == "tree":
        index.write_text(text_of(data.draw(edited(json.loads(index.read_text())))), "utf-8", "surrogatepass")
    else:
        shard = sorted(folder.glob("activations-*"))[0]
        broken = data.draw(hostile(shard.read_bytes()))
        entries = json.loads(index.read_text())
        entries["shards"][0]["bytes"] = len(broken)
        shard.write_bytes(broken)
        index.write_text(json.dumps(entries))
    with lawful(folder):
        acts = penult.Activations.open(folder)
        assert repr(acts)
        assert len(acts.activations) == len(acts) == len(acts.logits)
        assert acts[:2].class_names is None or len(acts[:2].class_names) == acts.num_classes


@cases(150)
@given(st.data())
def test_shards_without_an_index(whole, data):
    folder = whole.folder / "unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.acts, folder)
    (folder / io.INDEX_NAME).unlink()
    shard = data.draw(st.sampled_from(sorted(folder.glob("activations-*"))))
    shard.write_bytes(data.draw(hostile(shard.read_bytes())))
    with lawful(folder, FileExistsError):
        penult.Activations(torch.zeros(2, D), torch.zeros(2, K)).save(folder)


@pytest.fixture
def acts(whole, tmp_path):
    """A copy of right activations, to be spoilt; and a whole shard beside the folder, which nothing may open."""
    shutil.copytree(whole.acts, tmp_path / "acts")
    shutil.copy(whole.acts / "activations-00000.safetensors", tmp_path / "outside.safetensors")
    return tmp_path / "acts"


def change_shard(folder, number=0, **facts):
    index = folder / io.INDEX_NAME
    record = json.loads(index.read_text())
    record["shards"][number] |= facts
    index.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "./activations-00000.safetensors", "acts/../../outside.safetensors", "/dev/zero",
        "..", ".", "", "C:x", "a\\b", "activations-00000.safetensors\0", "\ud800", "a\x1b[2J", "\u202ea",
    ],
)  # fmt: skip
def test_a_shard_lies_in_the_folder(acts, name):
    change_shard(acts, name=name)
    with pytest.raises(io.FileFormatError, match="not a plain file name") as caught:
        penult.Activations.open(acts)
    assert str(caught.value).isprintable()


def test_a_shard_named_by_its_full_path(acts):
    change_shard(acts, name=str(acts.parent / "outside.safetensors"))
    with pytest.raises(io.FileFormatError, match="not a plain file name"):
        penult.Activations.open(acts)


def test_a_name_too_long_for_the_system(acts):
    change_shard(acts, name="x" * 5000)
    with pytest.raises(io.FileFormatError, match="is missing"):
        penult.Activations.open(acts)


def test_a_link_out_of_the_folder_is_not_followed(acts):
    shard = acts / "activations-00000.safetensors"
    shard.unlink()
    shard.symlink_to(acts.parent / "outside.safetensors")
    with pytest.raises(io.FileFormatError, match="a link that leads out of the folder"):
        penult.Activations.open(acts)


def test_links_within_a_folder_and_to_a_folder(acts):
    shard = acts / "activations-00000.safetensors"
    shard.rename(acts / "first.safetensors")
    shard.symlink_to("first.safetensors")
    (acts.parent / "link").symlink_to(acts)
    assert len(penult.Activations.open(acts.parent / "link").activations) == 60


@pytest.mark.parametrize("rows", [10**30, 2**63, 2**40, 10**4])
def test_more_rows_than_a_shard_has_room_for(acts, rows):
    change_shard(acts, rows=rows)
    with pytest.raises(io.FileFormatError, match=f"too few for {rows} rows"):
        penult.Activations.open(acts)


def test_rows_that_overlap_or_lack(acts):
    change_shard(acts, rows=3)
    with pytest.raises(io.FileFormatError, match="as its index says"):
        _ = penult.Activations.open(acts).activations
    record = json.loads((acts / io.INDEX_NAME).read_text())
    record["shards"].append(record["shards"][0])
    (acts / io.INDEX_NAME).write_text(json.dumps(record))
    with pytest.raises(io.FileFormatError, match="no unique name"):
        penult.Activations.open(acts)


def test_class_names_are_a_list(acts):
    record = json.loads((acts / io.INDEX_NAME).read_text())
    record["facts"]["class_names"] = "abc"
    (acts / io.INDEX_NAME).write_text(json.dumps(record))
    with pytest.raises(io.FileFormatError, match="class_names is not a list of 3 strings"):
        penult.Activations.open(acts)


@pytest.mark.parametrize("read", [io.read, penult.load, load_generator, load_head, load_pair])
def test_pipes_are_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors is a device or pipe"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("read", [io.read, penult.load, load_head])
def test_a_size_beyond_64_bits(tmp_path, read):
    path = tmp_path / "a.safetensors"
    record = json.dumps({"schema": 1, "kind": "pair"})
    shape = {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}
    path.write_bytes(joined({"__metadata__": {"penult": record}, "weight": shape}, b""))
    with pytest.raises(io.FileFormatError, match=r"a.safetensors is damaged: .*18446744073709551615"):
        read(path)
    path.write_bytes(joined({"weight": shape}, b""))
    with pytest.raises(
        ValueError, match=r"a.safetensors is damaged|a.safetensors is a safetensors file that penult did"
    ):
        read(path)


@pytest.mark.parametrize("schema", [True, 0, -1, 1.0, "1", None])
def test_no_schema(tmp_path, schema):
    header = {"__metadata__": {"penult": json.dumps({"schema": schema, "kind": "pair"})}}
    (tmp_path / "a").write_bytes(joined(header, b""))
    with pytest.raises(io.FileFormatError, match="has no schema number"):
        io.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": "1"}, "head and base cannot be rebuilt"),
        ({"temperature": 0}, "temperature is 0; expected a positive, finite number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": None}, "head and base cannot be rebuilt"),
        ({"radius": -1.0}, "radius is -1.0"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"certificate": {"path": 3}}, "head and base cannot be rebuilt"),
    ],
)
def test_facts_of_a_head(whole, tmp_path, changes, words):
    path = tmp_path / "a.safetensors"
    header, data = parts_of(whole.pairs[0])
    record = json.loads(header["__metadata__"]["penult"])
    record["head"] |= changes
    header["__metadata__"]["penult"] = json.dumps(record)
    path.write_bytes(joined(header, data))
    with pytest.raises(io.FileFormatError, match=f"a.safetensors: .*{words}"):
        penult.load(path)


def test_facts_of_a_certificate(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    path = GenerativePair(penult.find_head(model, torch.randn(5, 4)), Sphere(1.0)).save(tmp_path / "a.safetensors")
    assert str(penult.load(path).head.certificate)
    header, data = parts_of(path.read_bytes())
    record = json.loads(header["__metadata__"]["penult"])
    record["head"]["certificate"]["residual"] = "small"
    header["__metadata__"]["penult"] = json.dumps(record)
    path.write_bytes(joined(header, data))
    with pytest.raises(io.FileFormatError, match=r"a.safetensors: head and base cannot be rebuilt"):
        penult.load(path)


@pytest.mark.parametrize("shape", [[], [18], [1, 18], [18, 1, 1]])
def test_a_weight_that_is_no_matrix(whole, tmp_path, shape):
    path = tmp_path / "a.safetensors"
    header, data = parts_of(whole.pairs[0])
    if shape:
        header["head.weight"]["shape"] = shape
    else:
        header["head.weight"], header["head.bias"] = header["head.bias"], header["head.weight"]
    path.write_bytes(joined(header, data))
    with pytest.raises(io.FileFormatError, match=r"a.safetensors: head and base cannot be rebuilt.*weight is"):
        penult.load(path)


def test_an_unknown_base_is_not_printed_as_code(whole, tmp_path):
    path = tmp_path / "a.safetensors"
    header, data = parts_of(whole.pairs[0])
    record = json.loads(header["__metadata__"]["penult"])
    record["base"]["class"] = "x]); import os\x1b["
    header["__metadata__"]["penult"] = json.dumps(record)
    path.write_bytes(joined(header, data))
    with pytest.raises(io.FileFormatError, match=r"bases=\[\.\.\.\]") as caught:
        penult.load(path)
    assert str(caught.value).isprintable()


class Trap:
    """What would write a file, were it unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth"])
@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_pickles_are_refused(tmp_path, name, form):
    path, trap = tmp_path / name, Trap(tmp_path / "sprung")
    if form == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save({"x": trap, "fc.weight": torch.eye(3)}, path, _use_new_zipfile_serialization=form == "zip")
    for read in (io.read, penult.load, load_generator, load_head, load_pair):
        with pytest.raises(io.FileFormatError, match=f"{name} is a (pickle|zip archive); .*Load it yourself"):
            read(path)
    assert is_file(str(path))
    with pytest.raises(ValueError, match=f"{name} is a .*expected a safetensors file. penult reads no pickles"):
        _load_weights(torch.nn.Linear(2, 2), path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "model-00001-of-00002.safetensors"])
def test_an_index_of_shards_is_no_head(tmp_path, name):
    save_file({"fc.weight": torch.eye(3)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"fc.weight": name}}))
    with pytest.raises(io.FileFormatError, match=r"index.json is JSON.*give the shard that it names for the head"):
        load_head(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"fc.weight": torch.full((3, 4), float("nan"))}, "holds 12 values that are NaN"),
        ({"fc.weight": torch.ones(1, 4)}, "single-logit"),
        ({"fc.weight": torch.ones(3, 4, dtype=torch.int64)}, "expected a floating-point tensor"),
        ({"a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 4)}, "cannot tell which matrix"),
        ({"fc.bias": torch.ones(3)}, "cannot tell which matrix"),
        ({}, "cannot tell which matrix"),
    ],
)
def test_what_is_no_head(tmp_path, tensors, words):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    for read in (load_head, load_pair):
        with pytest.raises(ValueError, match=f"(?s)model.safetensors.*{words}"):
            read(path)


def test_a_head_that_makes_no_pair(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])}, path)
    assert load_head(path).num_classes == 3
    with pytest.raises(ValueError, match=r"no pair can be made without data from the head in .*model.safetensors"):
        load_pair(path)


SOURCE = sorted(Path(penult.__file__).parent.rglob("*.py"))


RETURNED = "pickle.loads", "pickle.dumps(law)"  # of a law at hand, to see whether it comes back
UNSAFE = {"_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess"}


def unsafe_imports(node):
    """What is wrong with an import of one of the modules that run code of files."""
    names = {alias.name.partition(".")[0] for alias in node.names} | {
        (getattr(node, "module", "") or "").partition(".")[0]
    }
    if getattr(node, "module", "") == "pickle" or names & UNSAFE:
        yield f"imports {sorted(names & (UNSAFE | {'pickle'}))}"
    if any(alias.asname is not None for alias in node.names if alias.name == "pickle"):
        yield "gives pickle another name"


def unsafe_calls(node):
    """What is wrong with a call of a function that may run what a file holds."""
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    own = called == "pickle.dumps" or (called, *map(ast.unparse, node.args)) == RETURNED
    if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
        yield called
    if called.startswith("pickle.") and not own:
        yield called
    if called in ("torch.load", "load_from_checkpoint") and given.get("weights_only") != "True":
        yield f"{called} without weights_only=True"
    if called.endswith(("numpy.load", "np.load", "read_array")) and given.get("allow_pickle") != "False":
        yield f"{called} without allow_pickle=False"
    if called.endswith(("yaml.load", "torch.jit.load", "torch.hub.load")):
        yield called


def test_nothing_in_the_source_runs_what_a_file_holds():
    unsafe = []
    for path in SOURCE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            reasons = ()
            if isinstance(node, ast.Import | ast.ImportFrom):
                reasons = unsafe_imports(node)
            elif isinstance(node, ast.Call):
                reasons = unsafe_calls(node)
            unsafe += [f"{path.name}:{node.lineno}: {reason}" for reason in reasons]
    assert not unsafe
