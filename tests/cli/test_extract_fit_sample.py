"""The way of a user: from a model and images to activations, a fitted pair, and draws."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import penult
from penult.cli import app


@pytest.fixture
def activations(penult_json, here):
    facts = penult_json("extract", "usernets:trained", "digits", "--out", "acts", "--batch-size", "300")
    assert facts == {
        "out": "acts", "samples": 1797, "features": 64, "classes": 10, "labels": True, "dtype": "float32",
        "pre_activation": False, "resumed_after_shards": 0, "was_complete": False,
    }  # fmt: skip
    return here / "acts"


def test_from_model_to_draws(penult_json, here, activations):
    acts = penult.Activations.open(activations)
    assert acts.class_names == tuple(map(str, range(10)))
    facts = penult_json("fit", activations, "--out", "net.penult.safetensors")
    assert facts["base"] == "elliptic"
    assert sum(facts["prior"]) == pytest.approx(1, abs=1e-5)
    assert 0 < facts["draws_confidence"] < 1
    assert facts["stored_confidence"] == pytest.approx(acts.logits.softmax(-1).amax(-1).mean().item(), rel=0.05)
    pair = penult.load(here / "net.penult.safetensors")
    assert torch.allclose(pair.posterior(acts.activations).probs, acts.logits.softmax(-1), atol=1e-4)

    wanted = ("-n", "40", "--class", "3", "--class", "5")
    drawn = penult_json("sample", "net.penult.safetensors", *wanted, "--out", "drawn")
    assert drawn["samples"] == 80
    some = penult.Activations.open(here / "drawn")
    assert torch.equal(some.labels, torch.tensor([3, 5]).repeat_interleave(40))
    assert torch.allclose(pair.head(some.activations), some.logits, atol=1e-4)
    again = penult_json("sample", "net.penult.safetensors", *wanted, "--out", "more")
    assert {k: v for k, v in again.items() if k != "out"} == {k: v for k, v in drawn.items() if k != "out"}
    assert penult_json("fit", "drawn", "--base", "sphere", "--out", "again.penult.safetensors")["samples"] == 80
    penult_json("sample", "net.penult.safetensors", *wanted, "--out", "more", "--overwrite")
    joint = penult_json("sample", "net.penult.safetensors", "--out", "joint", "--seed", "1")
    assert joint["samples"] == 1000
    assert torch.equal(penult.Activations.open(here / "drawn").activations, penult.Activations.open("more").activations)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--base", "sphere"], "Sphere(radii="),
        (["--base", "centered"], "loc=(64,)"),
        (["--base", "elliptic"], "scale_tril=(64, 64)"),
        (["--base", "sphere", "--no-ambient"], "subspace=(9, 64)"),
        (["--base", "gaussian"], "Gaussian(loc=(64,), covariance_matrix=(64, 64))"),
    ],
)
def test_bases(here, activations, options, kind):
    done = CliRunner().invoke(app, ["fit", "acts", "--out", "net.penult.safetensors", *options])
    assert done.exit_code == 0, done.output
    assert kind in done.stdout
    assert "implied prior" in done.stdout


def test_extracting_again_returns_what_is_there_and_half_precision(penult_json, here, activations):
    before = {path.name: path.stat().st_mtime_ns for path in activations.glob("activations-*")}
    again = penult_json("extract", "usernets:trained", "digits", "--out", "acts", "--batch-size", "300")
    assert again["was_complete"]
    assert {path.name: path.stat().st_mtime_ns for path in activations.glob("activations-*")} == before
    facts = penult_json("extract", "usernets:trained", "digits", "--out", "half", "--dtype", "float16")
    assert facts["dtype"] == "float16"
    assert penult.Activations.open(here / "half").activations.dtype == torch.float16
    assert penult_json("fit", "half", "--out", "half.penult.safetensors")["samples"] == 1797


RECTIFIED = """
import torch
from torch import nn

def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, 10))
"""


def test_pre_activations(penult_json, refused, here, monkeypatch):
    (here / "rectifiednets.py").write_text(RECTIFIED)
    monkeypatch.delitem(sys.modules, "rectifiednets", raising=False)
    plain = penult_json("extract", "rectifiednets:mlp", "digits", "--out", "h")
    facts = penult_json("extract", "rectifiednets:mlp", "digits", "--out", "u", "--pre-activation")
    assert (plain["pre_activation"], facts["pre_activation"]) == (False, True)
    h, u = penult.Activations.open("h"), penult.Activations.open("u")
    assert u.pre_activation
    assert (u.activations < 0).any()
    assert torch.equal(u.activations.clamp(min=0), h.activations)
    assert torch.equal(u.logits, h.logits)
    words = "pre_activation is True there and False now"
    assert words in refused("extract", "rectifiednets:mlp", "digits", "--out", "u")
    assert penult_json("extract", "rectifiednets:mlp", "digits", "--out", "u", "--pre-activation")["was_complete"]
    words = "what stands right before the head is 'AdaptiveAvgPool2d', and no ReLU"
    assert words in refused("extract", "usernets:trained", "digits", "--out", "pooled", "--pre-activation")
    assert not (here / "pooled").exists()


def test_a_head_of_its_own(penult_json, here, activations):
    penult_json("head", "usernets:trained", "--shape", "1,8,8", "--out", "head.penult.safetensors")
    penult_json("fit", "acts", "--head", "head.penult.safetensors", "--out", "net.penult.safetensors")
    assert penult_json("sample", "digits.safetensors", "-n", "10", "--out", "raw")["samples"] == 10


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_folder_that_another_process_writes_to(refused, here):
    (here / "acts").mkdir()
    code = (
        "import fcntl, sys; file = open('acts/.activations.lock', 'a+'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "is writing to" in refused("extract", "usernets:trained", "digits", "--out", "acts")
        other.stdin.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extract", "digits.safetensors", "digits", "--out", "x"], "the network has to run: give"),
        (["extract", "usernets:trained", "gone", "--out", "x"], "gone"),
        (["fit", "nowhere", "--out", "x.safetensors"], "nowhere"),
        (["fit", "acts", "--head", "digits.safetensors", "--out", "x.safetensors"], "does not make the stored logits"),
        (["fit", "acts", "--head", "two.safetensors", "--weight-key", "a.weight", "--out", "x.safetensors"], "(3, 4)"),
        (["fit", "acts", "--head", "gone.safetensors", "--out", "x.safetensors"], "gone.safetensors does not exist"),
        (["fit", "acts", "--out", "no/such/folder.safetensors"], "no/such"),
        (["sample", "gone.safetensors", "--out", "x"], "does not exist"),
        (["sample", "digits.safetensors", "--class", "10", "--out", "x"], "label 10 is out of range"),
        (["sample", "digits.safetensors", "--out", "acts"], "acts"),
        (["sample", "digits.safetensors", "--out", "d.npz"], "becomes a folder of shards"),
        (["sample", "acts", "--out", "x"], "is a folder; a pair is a file"),
        (["fit", "acts", "--out", "x.pth"], "is a safetensors file, so name it"),
        (
            ["extract", "usernets:trained", "digits", "--mode", "RGB", "--out", "x"],
            "given images of shape (16, 3, 8, 8)",
        ),
    ],
)
def test_bad_input(refused, activations, arguments, words):
    assert words in refused(*arguments)
