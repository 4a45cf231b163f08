"""Files that an earlier version saved load, give the numbers that it computed, and would be written the same today.

``saved/`` holds the files and ``expected.*`` the numbers; see make.py. What is read from a file is compared bit by bit.
"""

import functools
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import penult
from compatibility import computed
from generators import QUIET
from penult import Activations, GenerativePair, Head, Sphere, Tap
from penult.cli import app
from penult.distill import ActivationLoss, Distiller, Gate
from penult.generate import ActivationGAN, ActivationVAE
from penult.scores import KNN, Mahalanobis, RelativeMahalanobis, Threshold, ViM, directional

pytest.importorskip("zuko")
pytestmark = QUIET

HERE = Path(__file__).parent
SAVED = HERE / "saved"
FACTS = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
EXPECTED = load_file(SAVED / "expected.safetensors")
SHOWN = {d: EXPECTED[f"inputs/shown_{d}"] for d in (computed.FEATURES, 8)}
LAW = 1e-7  # of each number
DRAWN = 1e-6  # of the largest number that is drawn

PAIRS = sorted(path.name.partition(".")[0] for path in (SAVED / "pairs").iterdir())
SETS = sorted(path.name for path in (SAVED / "activations").iterdir())
PUBLIC = (HERE / "public_names.txt").read_text(encoding="utf-8").split()
PICKLED = {name for names in FACTS["pickled_names"].values() for name in names}


# --- comparisons --------------------------------------------------------------------------------------------


def expected(name):
    """What was computed of a file, by the names of the numbers."""
    start = f"{name}/"
    found = {key.removeprefix(start): value for key, value in EXPECTED.items() if key.startswith(start)}
    assert found
    return found


def check_numbers(found, name):
    """Numbers are those that were computed of a file."""
    wanted = expected(name)
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        drawn, floating = key.startswith("drawn"), value.is_floating_point()
        size = float(value.abs().max()) if floating else 0.0
        rtol, atol = (0.0, DRAWN * size) if drawn else (LAW, LAW * size / 100)
        told = functools.partial("{}: {}".format, key)
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=told)


def check_bits(found, wanted):
    """Tensors by name are the same, their dtypes included."""
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def check_normalised(found, wanted):
    """Weights of radii, which a sphere normalises when it is made, are the same but for rounding, and are taken out."""
    now, then = found.pop("base.log_weights", None), wanted.pop("base.log_weights", None)
    assert (now is None) == (then is None)
    if now is not None:
        torch.testing.assert_close(now, then, rtol=4 * torch.finfo(then.dtype).eps, atol=0.0)


def contents(path):
    """Tensors and record of a file, but for the versions that wrote it."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["penult"])
    del record["versions"]
    return load_file(path), record


def check_written_again(path, old):
    """A file has what an older one has."""
    tensors, record = contents(path)
    was, before = contents(old)
    # Earlier versions kept no hash of a shard's rows.
    record.pop("hashes", None)
    assert record == before
    check_normalised(tensors, was)
    check_bits(tensors, was)


# --- what is loaded and compared ----------------------------------------------------------------------------


def loaded(name):
    """A pair."""
    return penult.load(SAVED / f"pairs/{name}.penult.safetensors")


def opened(name):
    """A set of activations."""
    return Activations.open(SAVED / "activations" / name)


def network(make=computed.classifier, name="classifier"):
    """A classifier with its weights of then."""
    net = make()
    net.load_state_dict(load_file(SAVED / f"{name}.safetensors"))
    return net.eval()


def tap_of(net, images):
    """The tap of a classifier, whose head is found now."""
    return Tap(net, penult.find_head(net, images[:16]))


def other_pair():
    """A pair with tensors of the shapes of "sphere-elliptic", and other numbers."""
    pair = loaded("sphere-elliptic")
    base, d = pair.base, computed.FEATURES
    other = Sphere(3 * base.radius, base.loc + 1, torch.eye(d, dtype=torch.float64), log_weights=base.radius)
    return GenerativePair(Head(pair.head.weight.flip(0), pair.head.bias + 1), other)


@pytest.fixture(scope="module")
def images():
    return computed.read_images(SAVED / "images.npz")[0]


@pytest.fixture(scope="module")
def labels():
    return computed.read_images(SAVED / "images.npz")[1]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of all files, which is the current folder."""
    shutil.copytree(SAVED, tmp_path / "saved", ignore=shutil.ignore_patterns("pickles"))
    monkeypatch.chdir(tmp_path / "saved")
    return tmp_path / "saved"


# --- pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_pair(name):
    pair = loaded(name)
    tensors, record = contents(SAVED / f"pairs/{name}.penult.safetensors")
    state = dict(pair.state_dict())
    check_normalised(state, tensors)
    check_bits(state, tensors)
    assert json.loads(json.dumps(pair.head.config())) == record["head"]
    assert {"class": type(pair.base).__name__, "config": pair.base.config()} == record["base"]
    facts = {"head": str(pair.head), "base": str(pair.base), "info": str(pair.base.info)}
    assert facts == FACTS[f"pairs/{name}"]
    check_numbers(computed.numbers_of_pair(pair, SHOWN[pair.head.in_features]), f"pairs/{name}")


@pytest.mark.parametrize("name", PAIRS)
def test_pair_is_written_as_it_was(tmp_path, name):
    path = loaded(name).save(tmp_path / "again.penult.safetensors")
    check_written_again(path, SAVED / f"pairs/{name}.penult.safetensors")


@pytest.mark.parametrize("name", ["sphere-elliptic", "mixture"])
def test_state_of_a_pair(name):
    state = torch.load(SAVED / f"states/pair-{name}.pt", weights_only=True)
    pair = other_pair() if name == "sphere-elliptic" else loaded("prior-mixture")
    pair.load_state_dict(state)
    check_bits(pair.state_dict(), state)
    check_numbers(computed.numbers_of_pair(pair, SHOWN[computed.FEATURES]), f"pairs/{name}")


@pytest.mark.parametrize(
    ("name", "make", "net"),
    [
        ("certificate-relu", computed.classifier, "classifier"),
        ("certificate-layernorm", computed.normed_classifier, "normed"),
    ],
)
def test_certificate_is_that_of_the_network(images, name, make, net):
    certificate, tap = loaded(name).head.certificate, tap_of(network(make, net), images)
    now = tap.head.certificate
    assert certificate.rectified == (name == "certificate-relu")
    assert (certificate.folded is None) == (name == "certificate-relu")
    assert (now.path, now.kind, now.weight, now.before, now.support) == (
        certificate.path, certificate.kind, certificate.weight, certificate.before, certificate.support,
    )  # fmt: skip
    h, logits = Tap(tap.model, loaded(name).head)(images)
    torch.testing.assert_close(loaded(name).head(h), logits)


# --- activations --------------------------------------------------------------------------------------------


def check_set(acts, name):
    facts = FACTS[f"activations/{name}"]
    assert str(acts) == facts["repr"]
    assert acts.class_names == (None if facts["class_names"] is None else computed.CLASS_NAMES)
    assert acts.pre_activation == facts["pre_activation"]
    check_bits(computed.tensors_of(acts), expected(f"activations/{name}"))


@pytest.mark.parametrize("name", SETS)
def test_activations(name):
    acts = opened(name)
    check_set(acts, name)
    parts = list(acts.batches(7))
    whole = {key: torch.cat([getattr(part, key) for part in parts]) for key in computed.tensors_of(acts)}
    check_bits(whole, expected(f"activations/{name}"))


@pytest.mark.parametrize("name", [name for name in SETS if name != "extracted"])
def test_activations_are_written_as_they_were(tmp_path, name):
    old = SAVED / "activations" / name
    index = json.loads((old / "index.json").read_text())
    again = opened(name).save(tmp_path / "again", shard_size=index["facts"]["shard_size"])
    assert str(again) == str(opened(name))
    now = json.loads((tmp_path / "again" / "index.json").read_text())
    # Earlier versions wrote no digest of the set.
    assert now.pop("digest").startswith(f"{sum(shard['rows'] for shard in now['shards'])}-")
    for record in (index, now):
        del record["versions"]
        for shard in record["shards"]:
            del shard["bytes"]  # the version of torch is in the file
    assert now == index
    for shard in index["shards"]:
        check_written_again(tmp_path / "again" / shard["name"], old / shard["name"])


def test_extraction_is_complete_and_resumes(copied, images, labels):
    folder, tap = copied / "activations/extracted", tap_of(network(), images)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    check_set(penult.extract(tap, computed.batches_of(images, labels), folder, **computed.EXTRACT), "extracted")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for name in ("index.json", "activations-00001.safetensors"):
        (folder / name).unlink()
    acts = penult.extract(tap, computed.batches_of(images, labels), folder, **computed.EXTRACT)
    assert (folder / "activations-00000.safetensors").read_bytes() == before["activations-00000.safetensors"]
    assert str(acts) == FACTS["activations/extracted"]["repr"]
    for key, value in expected("activations/extracted").items():
        torch.testing.assert_close(getattr(acts, key), value)


# --- states of scores, thresholds and gates -----------------------------------------------------------------

EYE = torch.eye(computed.FEATURES, dtype=torch.float64)
OTHERS = {  # fitted to other data
    "mahalanobis": lambda: Mahalanobis(EYE[:2], EYE),
    "relative-mahalanobis": lambda: RelativeMahalanobis(EYE[:2], EYE, EYE[0], 2 * EYE),
    "knn": lambda: KNN(EYE, k=1),
    "vim": lambda: ViM(other_pair().head, EYE[:, :2], alpha=1.0),
    "threshold-directional": lambda: Threshold.fit(directional, 3 * EYE + 1, pair=other_pair(), false_alarm=0.5),
    "threshold-knn": lambda: Threshold.fit(KNN(EYE, k=1), EYE, false_alarm=0.5),
    "gate": lambda: Gate(other_pair(), trust=0.5),
}


def check_score(name, score):
    """A score, threshold or gate gives the numbers of then."""
    if isinstance(score, Gate):
        numbers = computed.numbers_of_gate
    elif isinstance(score, Threshold):
        numbers = computed.numbers_of_threshold
        assert str(score) == FACTS[name]
    else:
        numbers = computed.numbers_of_score
    check_numbers(numbers(score, SHOWN[computed.FEATURES]), name)


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_a_score(name):
    state, score = load_file(SAVED / f"states/{name}.safetensors"), OTHERS[name]()
    score.load_state_dict(state)
    check_bits(score.state_dict(), state)
    check_score(name, score)


# --- generators and students --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("vae", ActivationVAE), ("gan", ActivationGAN)])
def test_generator(tmp_path, images, name, kind):
    path = SAVED / f"{name}.safetensors"
    generator = penult.generate.load(path, tap=tap_of(network(), images))
    assert type(generator) is kind
    check_numbers(computed.numbers_of_generator(generator, images), name)
    check_written_again(kind.load(path).save(tmp_path / "again.safetensors"), path)


def test_generator_of_the_command():
    generator = penult.generate.load(SAVED / "generated/generator.safetensors")
    check_numbers(computed.numbers_of_generator(generator), "generated")


def test_student_of_the_command(images):
    student = computed.student()
    student.load_state_dict(load_file(SAVED / "distilled/student.safetensors"))
    check_numbers(computed.numbers_of_student(student, images), "distilled")


@pytest.mark.parametrize(("name", "kind"), [("vae", ActivationVAE), ("gan", ActivationGAN)])
def test_checkpoint_of_a_generator(images, name, kind):
    options = {"pair": loaded("certificate-relu-mixture"), "tap": tap_of(network(), images), "latent": 2}
    options |= {"image_shape": computed.IMAGE, "width": {"vae": 6, "gan": 2}[name]}
    path = SAVED / f"checkpoints/{kind.__name__}.ckpt"
    generator = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True, **options).eval()
    assert [figures["epoch"] for figures in generator.history] == [1]
    check_numbers(computed.numbers_of_generator(generator, images), name)


@pytest.mark.parametrize(
    ("path", "name"), [("checkpoints/Distiller.ckpt", "distiller"), ("distilled/checkpoints/last.ckpt", "distilled")]
)
def test_checkpoint_of_a_distiller(images, path, name):
    loss = ActivationLoss(loaded("certificate-relu"), in_features=5)
    options = {"student": computed.student(), "loss": loss, "map_location": "cpu", "weights_only": True}
    distiller = Distiller.load_from_checkpoint(SAVED / path, **options)
    assert distiller.certificate.path == "3"
    check_numbers(computed.numbers_of_student(distiller.export(), images), name)


@pytest.mark.parametrize("command", [computed.DISTILL, computed.GENERATE], ids=lambda command: command[0])
def test_a_run_is_complete(copied, command):
    out = copied / command[command.index("--out") + 1]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert json.loads(done.stdout)["was_complete"]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# --- pickles ------------------------------------------------------------------------------------------------


def check_head(head, name):
    head_then = loaded(name).head
    check_bits(head.state_dict(), head_then.state_dict())
    assert torch.equal(head.mean_row, head_then.mean_row)
    assert head.config() == head_then.config()
    assert (str(head), str(head.certificate)) == (str(head_then), str(head_then.certificate))


def check_tap(tap, images):
    for found, wanted in zip(tap(images), tap_of(network(), images)(images), strict=True):
        torch.testing.assert_close(found, wanted)


def check_picked(acts):
    check_bits(computed.tensors_of(acts), expected("activations-picked"))
    assert acts.pre_activation
    assert str(acts) == str(opened("before-relu").split(0.5, 0.5)[1])


def check_gate(gate):
    check_score("gate", gate)
    assert str(gate.summary) == FACTS["gate"]


def check_in_memory(acts):
    check_bits(computed.tensors_of(acts), expected("activations/labelled"))
    assert acts.class_names == computed.CLASS_NAMES


def check_unpickled(name, held, images):
    """What was pickled gives the numbers of then."""
    shown, stem = SHOWN[computed.FEATURES], name.partition(".")[0]
    checks = {
        "head.pkl": lambda: check_head(held, "certificate-layernorm"),
        "head.pt": lambda: check_head(held, "calibrated"),
        "activations.pkl": lambda: check_in_memory(held),
        "activations-opened.pkl": lambda: check_set(held, "labelled"),
        "activations-picked.pkl": lambda: check_picked(held),
        "distributions.pkl": lambda: check_numbers(computed.numbers_of_distributions(held, shown), "distributions"),
        "losses.pt": lambda: check_numbers(computed.numbers_of_losses(held), "losses"),
        "gate.pt": lambda: check_gate(held),
        "tap.pt": lambda: check_tap(held, images),
        "vae.pt": lambda: check_numbers(computed.numbers_of_generator(held, images), "vae"),
        "gan.pt": lambda: check_numbers(computed.numbers_of_generator(held, images), "gan"),
    }
    if name in checks:
        checks[name]()
    elif isinstance(held, GenerativePair):
        pair = stem.removeprefix("pair-")
        check_bits(held.state_dict(), loaded(pair).state_dict())
        check_numbers(computed.numbers_of_pair(held, shown), f"pairs/{pair}")
    else:
        check_score(stem, held)


@pytest.mark.parametrize("name", FACTS["pickled_names"])
def test_pickle(images, name):
    held, _ = computed.unpickled(SAVED / "pickles" / name, SAVED / "activations")
    check_unpickled(name, held, images)


# --- names --------------------------------------------------------------------------------------------------


def found(name):
    """The object of a dotted name; what a module defines hides a module of the same name, as it does on import."""
    parent, _, last = name.rpartition(".")
    if not parent:
        return importlib.import_module(name)
    holder = found(parent)
    return getattr(holder, last) if hasattr(holder, last) else importlib.import_module(name)


@pytest.mark.parametrize("name", sorted(PICKLED))
def test_name_in_pickles_is_found(name):
    module, _, last = name.rpartition(".")
    assert hasattr(importlib.import_module(module), last)


@pytest.mark.parametrize("room", sorted({".".join(name.split(".")[:2]) for name in PUBLIC}))
def test_public_names_are_found(room):
    names = [name for name in PUBLIC if f"{name}.".startswith(f"{room}.")]
    for name in names:
        found(name)
    assert room in names or len(names) > 1
