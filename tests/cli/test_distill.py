"""``penult distill``: from a teacher to a plain student, resumed where it was killed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import penult
from penult.cli import app
from penult.data import digits
from penult.demo.networks import DigitsNet

NETS = '''
import os, signal
import torch
from torch import nn
from penult.demo.networks import DigitsNet

def teacher():
    return DigitsNet(width=24)

def small():
    return DigitsNet(width=16)

def seven():
    return DigitsNet(classes=7, width=16)

def features():
    return DigitsNet(width=16).features

def biasless():
    net = DigitsNet(width=16)
    net.fc = nn.Linear(16, 10, bias=False)
    return net

class Fragile(nn.Module):
    """Dies in its third epoch, once it has been told when that is; draws dropout as it goes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
                                 nn.Linear(16, 10))
        self.batches = 0

    def forward(self, x):
        self.batches += self.training
        if self.batches == int(os.environ.get("DIES_AT", -1)):
            if "BY_SIGNAL" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the machine is gone")
        return self.net(x)

fragile = Fragile
'''


@pytest.fixture(scope="module")
def trained():
    """The state of a teacher that is right on most digits, after seconds of training."""
    images = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DigitsNet(width=24)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        for rows in torch.randperm(1200).repeat(3).split(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images.images[rows]), images.labels[rows]).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained):
    """Weights of the teacher, the pair of its head, and images with and without labels."""
    folder = tmp_path_factory.mktemp("files")
    save_file(trained.state_dict(), folder / "teacher.safetensors")
    images = digits()
    pair = penult.GenerativePair(penult.find_head(trained, images.images[:16]))
    pair.save(folder / "teacher.penult.safetensors")
    arrays = {"images": images.images.numpy(), "labels": images.labels.numpy()}
    numpy.savez(folder / "data.npz", **{name: values[1200:1500] for name, values in arrays.items()})
    numpy.savez(folder / "val.npz", **{name: values[1500:] for name, values in arrays.items()})
    numpy.savez(folder / "unlabelled.npz", images=arrays["images"][1200:1500])
    wrong = arrays["labels"][1200:1500].copy()
    wrong[3] = 10
    numpy.savez(folder / "outside.npz", images=arrays["images"][1200:1500], labels=wrong)
    return folder


@pytest.fixture
def place(here, files, monkeypatch):
    """A folder with networks and these files."""
    (here / "distillnets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "distillnets", raising=False)
    shutil.copytree(files, here, dirs_exist_ok=True)
    return here


FILE = ("distill", "teacher.penult.safetensors", "--data", "data.npz")
NETWORK = ("distill", "distillnets:teacher", "--weights", "teacher.safetensors")
SMALL = ("--student", "distillnets:small")


def exported(make, folder):
    net = make()
    net.load_state_dict(load_file(f"{folder}/student.safetensors"))
    return net.eval()


def accuracy(net, rows=slice(1500, None)):
    images = digits()
    with torch.no_grad():
        return float((net(images.images[rows]).argmax(-1) == images.labels[rows]).double().mean())


def test_from_a_head_alone(penult_json, place):
    facts = penult_json(*FILE, *SMALL, "--val", "val.npz", "--out", "run", "--epochs", "5")
    assert (facts["images"], facts["judged_by"], facts["held_out"], facts["labels"]) == (300, 297, False, "given")
    assert facts["gate"] is facts["teacher_accuracy"] is None
    assert [each["epoch"] for each in facts["history"]] == [1, 2, 3, 4, 5]
    assert facts["accuracy"] > facts["start_accuracy"] + 0.3
    assert facts["best_accuracy"] == max(each["val_accuracy"] for each in facts["history"])
    assert facts["accuracy"] == pytest.approx(facts["history"][-1]["val_accuracy"], abs=1e-6)
    assert facts["accuracy"] == pytest.approx(accuracy(exported(lambda: DigitsNet(width=16), "run")), abs=1e-6)
    assert facts["loads_into"] == "distillnets:small, as it is"
    held = {path.name for path in (place / "run").iterdir()}
    assert held == {"student.safetensors", "index.html", "log.json", "settings.json", "checkpoints"}
    assert [path.name for path in (place / "run/checkpoints").iterdir()] == ["last.ckpt"]
    page = (place / "run/index.html").read_text()
    assert "the teacher never saw an image" in page
    assert "How far the teacher is believed" not in page

    times = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")}
    again = penult_json(*FILE, *SMALL, "--val", "val.npz", "--out", "run", "--epochs", "5")
    assert again["was_complete"]
    assert again["history"] == facts["history"]
    assert {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")} == times


@pytest.mark.slow
def test_from_a_network(penult_json, place):
    state = torch.get_rng_state()
    facts = penult_json(*NETWORK, "--data", "data.npz", *SMALL, "--out", "run", "--epochs", "3")
    assert torch.equal(torch.get_rng_state(), state)
    assert (facts["images"], facts["judged_by"], facts["held_out"]) == (270, 30, True)
    gate = facts["gate"]
    assert gate["rows"] == 270
    assert gate["labelled"]
    assert gate["accuracy"] > 0.8
    assert len(gate["classes"]) == 10
    assert facts["teacher_accuracy"] > 0.8
    page = (place / "run/index.html").read_text()
    assert "How far the teacher is believed" in page
    assert "path=fc  linear 24-&gt;10" in page
    seeded = penult_json(*NETWORK, "--data", "data.npz", *SMALL, "--out", "two", "--epochs", "3")
    assert seeded["history"] == facts["history"]
    assert penult_json(*NETWORK, "--data", "data.npz", *SMALL, "--out", "other", "--epochs", "1", "--seed", "1")
    done = CliRunner().invoke(
        app, [*NETWORK, "--data", "data.npz", *SMALL, "--out", "three", "--epochs", "1", "--val", "val.npz"]
    )
    assert done.exit_code == 0, done.output
    for words in ("teacher right", "on 297 validation images", "student at its best, epoch 1", "teacher "):
        assert words in done.stdout
    for words in ("litlogger", "GPU available", "workers", "Warning"):
        assert words not in done.output


@pytest.mark.slow
def test_with_the_pair_of_its_own_domain(penult_json, refused, place, trained):
    images = digits()
    head = penult.find_head(trained, images.images[:16])
    loader = [(images.images[:600], images.labels[:600])]
    acts = penult.extract(penult.Tap(trained, head), loader)
    penult.GenerativePair(head, penult.Marginal.fit(head, acts, kind="class")).save("fitted.penult.safetensors")
    command = (*NETWORK, "--data", "data.npz", *SMALL, "--out", "run", "--epochs", "1")
    penult_json(*command, "--pair", "fitted.penult.safetensors")
    assert "Marginal" in (place / "run/index.html").read_text()
    penult.GenerativePair(penult.Head(torch.eye(10, 24))).save("alien.penult.safetensors")
    line = refused(*command[:-4], "--out", "x", "--pair", "alien.penult.safetensors")
    assert "alien.penult.safetensors" in line
    assert "is not that of distillnets:teacher" in line


@pytest.mark.slow
def test_activations(penult_json, refused, place):
    command = (*NETWORK, "--data", "data.npz", "--val", "val.npz", "--kind", "activation", "--epochs", "12")
    facts = penult_json(*command, *SMALL, "--out", "run")
    assert facts["loads_into"] == "distillnets:small, as it is"
    assert facts["accuracy"] == pytest.approx(accuracy(exported(lambda: DigitsNet(width=16), "run")), abs=1e-6)
    assert facts["accuracy"] > facts["start_accuracy"] + 0.3

    facts = penult_json(*command, "--student", "distillnets:features", "--out", "features", "--epochs", "2")
    assert facts["loads_into"].startswith("torch.nn.Sequential(student, torch.nn.Linear(16, 10))")
    net = exported(lambda: nn.Sequential(DigitsNet(width=16).features, nn.Linear(16, 10)), "features")
    assert facts["accuracy"] == pytest.approx(accuracy(net), abs=1e-6)

    facts = penult_json(*command, "--student", "distillnets:biasless", "--out", "biasless", "--epochs", "2")
    assert facts["loads_into"] == "distillnets:biasless, with torch.nn.Linear(16, 10) at fc"
    assert facts["accuracy"] == pytest.approx(accuracy(exported(lambda: DigitsNet(width=16), "biasless")), abs=1e-6)

    command = (*command[:-3], "hinted", "--epochs", "12")
    facts = penult_json(*command, *SMALL, "--out", "hinted")
    assert facts["loads_into"] == "distillnets:small, as it is"
    assert facts["accuracy"] == pytest.approx(accuracy(exported(lambda: DigitsNet(width=16), "hinted")), abs=1e-6)
    assert facts["accuracy"] > facts["start_accuracy"] + 0.3
    assert "a teacher's network" in refused(*FILE, "--kind", "hinted", *SMALL, "--out", "blind")

    facts = penult_json(*FILE, "--kind", "activation", *SMALL, "--out", "alone", "--epochs", "1")
    assert facts["gate"] is None


def test_images_without_labels(refused, place):
    done = CliRunner().invoke(
        app, [*NETWORK, "--data", "unlabelled.npz", *SMALL, "--out", "run", "--epochs", "2", "--json"]
    )
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("penult: warning")]
    assert "no gain under a domain shift can be promised" in line
    facts = json.loads(done.stdout)
    assert (facts["labels"], facts["accuracy"], facts["judged_by"]) == ("pseudo", None, 0)
    assert not facts["gate"]["labelled"]
    assert "no gain under a domain shift can be promised" in (place / "run/index.html").read_text()
    line = refused("distill", "teacher.penult.safetensors", "--data", "unlabelled.npz", *SMALL, "--out", "x")
    assert "give labelled images, or the teacher's network" in line


@pytest.mark.slow
def test_labels_of_other_classes_are_warned_of(place):
    arrays = numpy.load(place / "data.npz")
    numpy.savez(place / "others.npz", images=arrays["images"], labels=(arrays["labels"] + 1) % 10)
    command = [*NETWORK, "--data", "others.npz", *SMALL, "--out", "run", "--epochs", "1"]
    line = " ".join(CliRunner().invoke(app, command).stderr.split())
    assert "of the labels, no better than guessing. Check that the labels are numbers of its own 10 classes" in line


FRAGILE = ("--student", "distillnets:fragile", "--val", "val.npz", "--epochs", "4")  # 5 batches an epoch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("soft", "error"),
        pytest.param("activation", "error", marks=pytest.mark.long),
        pytest.param("soft", "signal", marks=pytest.mark.long),
    ],
)
def test_a_run_that_was_killed(penult_json, refused, place, monkeypatch, kind, way):
    if way == "signal" and not hasattr(signal, "SIGKILL"):
        pytest.skip("there are no such signals here")
    command = (*FILE, *FRAGILE, "--kind", kind)
    whole = penult_json(*command, "--out", "whole")
    if way == "signal":
        environment = os.environ | {"DIES_AT": "12", "BY_SIGNAL": "1", "OMP_NUM_THREADS": "1"}
        code = "import sys; from penult.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--out", "run"], env=environment, capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        monkeypatch.setenv("DIES_AT", "12")
        assert "the machine is gone" in refused(*command, "--out", "run")
        monkeypatch.delenv("DIES_AT")
    assert not (place / "run/student.safetensors").exists()
    line = refused(*command, "--out", "run", "--rate", "0.01")
    assert "run holds another distillation: rate is 0.003 there and 0.01 now" in line
    assert "--overwrite" in line
    resumed = penult_json(*command, "--out", "run", "--workers", "1")
    assert resumed["resumed_after_epochs"] == 2
    assert resumed["history"] == whole["history"]
    a, b = (load_file(f"{name}/student.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)

    (place / "run/log.json").unlink()  # killed while it wrote its files
    assert penult_json(*command, "--out", "run")["history"] == whole["history"]
    anew = penult_json(*command, "--out", "run", "--rate", "0.01", "--overwrite")
    assert anew["resumed_after_epochs"] == 0
    assert anew["history"] != whole["history"]


def test_other_weights_of_the_teacher_are_another_distillation(penult_json, refused, place):
    command = (*FILE, *SMALL, "--out", "run", "--epochs", "1")
    penult_json(*command)
    penult.GenerativePair(penult.Head(torch.randn(10, 24))).save("teacher.penult.safetensors")
    assert "the head has other weights" in refused(*command)
    (place / "other").mkdir()
    (place / "other/file").write_text("mine")
    assert "other holds other files" in refused(*FILE, *SMALL, "--out", "other", "--overwrite")
    for damaged in ("{", "[1]"):
        (place / "run/settings.json").write_text(damaged)
        assert "settings.json is" in refused(*command)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*FILE, "--student", "distillnets:gone"), "'distillnets:gone'"),
        ((*FILE, "--student", "distillnets:seven"), "gives (16, 7) for 16 images; expected logits (16, 10)"),
        ((*FILE, *SMALL, "--weights", "teacher.safetensors"), "--weights goes with a teacher's network"),
        ((*FILE, *SMALL, "--pair", "teacher.penult.safetensors"), "--pair goes with a teacher's network"),
        ((*FILE, *SMALL, "--val", "unlabelled.npz"), "--val have no labels"),
        ((*FILE, *SMALL, "--temperature", "0"), "temperature"),
        ((*FILE, *SMALL, "--weight", "2"), "weight is 2.0; expected a number from 0 to 1"),
        ((*FILE, *SMALL, "--kind", "activation", "--strength", "-1"), "strength"),
        ((*FILE, *SMALL, "--rate", "0"), "rate"),
        ((*FILE, *SMALL, "--mode", "RGB"), "images of shape (16, 3, 8, 8)"),
        ((*FILE, *SMALL, "--device", "nowhere"), "--device is 'nowhere', which cannot be used"),
        (("distill", "teacher.penult.safetensors", "--data", "outside.npz", *SMALL), "labels up to 10"),
        (("distill", "gone.safetensors", "--data", "data.npz", *SMALL), "gone.safetensors does not exist"),
        (("distill", "two.safetensors", "--weight-key", "a.weight", "--data", "data.npz", *SMALL), "the head has 3"),
        (
            ("distill", "two.safetensors", "--weight-key", "a.weight", "--data", "digits", *SMALL),
            "digits has 10 classes",
        ),
        (("distill", "distillnets:gone", "--data", "data.npz", *SMALL), "'distillnets:gone'"),
    ],
)
def test_bad_input(refused, place, arguments, words):
    assert words in refused(*arguments, "--out", "x")
    assert not (place / "x").exists()


def test_a_student_with_a_precision_and_a_strategy(penult_json, place):
    facts = penult_json(*FILE, *SMALL, "--out", "run", "--epochs", "1", "--precision", "bf16-mixed")
    assert len(facts["history"]) == 1
    assert "expected a folder" in CliRunner().invoke(app, [*FILE, *SMALL, "--out", "a.npz"]).exception.args[0]
