import pytest
import torch
from typer.testing import CliRunner

import penult
from penult.cli import app


def test_a_factory_with_data(penult_json, here):
    facts = penult_json("head", "usernets:trained", "--data", "digits", "--out", "net.penult.safetensors")
    assert (facts["classes"], facts["features"], facts["rank"], facts["bias"]) == (10, 64, 9, True)
    assert facts["certificate"]["path"] == "fc"
    assert facts["certificate"]["support"] == "orthant"
    pair = penult.load(here / "net.penult.safetensors")
    assert pair.head.certificate.residual == facts["certificate"]["residual"] == 0


def test_a_factory_with_a_shape_a_module_and_a_dotted_name(penult_json):
    assert penult_json("head", "usernets:trained", "--shape", "1,8,8")["features"] == 64
    assert penult_json("head", "usernets:network", "--shape", "1,8,8")["features"] == 64
    assert penult_json("head", "usernets:Nets.small", "--shape", "1,8,8", "--path", "fc")["features"] == 16


def test_weights_of_a_state_dict(penult_json, here):
    weights = ("--weights", "digits.safetensors")
    penult_json("head", "usernets:trained", *weights, "--shape", "1,8,8", "--out", "a.penult.safetensors")
    facts = penult_json("head", "digits.safetensors", "--out", "b.penult.safetensors")
    assert facts["certificate"] is None
    a, b = (penult.load(here / f"{name}.penult.safetensors").head for name in "ab")
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)


def test_preprocessing(penult_json):
    facts = penult_json(
        "head", "usernets:trained", "--data", "digits", "--size", "16x8", "--mean", "0.5", "--std", "0.25",
        "--batch-size", "5",
    )  # fmt: skip
    assert facts["certificate"]["samples"] == 5


def test_what_it_prints(here):
    done = CliRunner().invoke(app, ["head", "usernets:trained", "--data", "digits"])
    assert done.exit_code == 0
    assert "path=fc  linear 64->10  residual=0  support: orthant (>=0)" in done.stdout
    assert "rank    9 dimensions" in done.stdout
    told = "weights as the factory makes them; pass --weights for trained ones"
    assert told in done.stdout
    options = ["--weights", "digits.safetensors", "--shape", "1,8,8"]
    done = CliRunner().invoke(app, ["head", "usernets:trained", *options])
    assert done.exit_code == 0
    assert told not in done.stdout


def test_heads_in_files(penult_json):
    facts = penult_json("head", "two.safetensors", "--weight-key", "b.weight")
    assert (facts["classes"], facts["features"], facts["bias"]) == (5, 3, False)


def test_paths_as_people_write_them(here, penult_json, monkeypatch):
    (here / "home" / "[sets]").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "digits.safetensors").rename(here / "home" / "DIGITS.SAFETENSORS")
    facts = penult_json("head", "~/DIGITS.SAFETENSORS", "--weight-key", "fc.weight", "--out=~/[sets]/a.SAFETENSORS")
    assert facts["classes"] == 10
    assert (here / "home" / "[sets]" / "a.SAFETENSORS").exists()
    weights = ("--weights=~/DIGITS.SAFETENSORS", "--data", "digits")
    assert penult_json("head", "usernets:trained", *weights)["classes"] == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["usernets:trained"], "give --data, or --shape"),
        (["usernets"], "neither a .safetensors file nor of the form package.module:factory"),
        (["nothere:factory", "--shape", "4"], "no module 'nothere'"),
        (["usernets:missing", "--shape", "4"], "has no attribute 'missing'; it has "),
        (["usernets:nothing", "--shape", "4"], "returns a int; expected a torch.nn.Module"),
        (["usernets:none", "--shape", "4"], "is a NoneType; expected a factory"),
        (["usernets:broken", "--shape", "4"], "raised KeyError: 'layer4'"),
        (["usernets:Nets.needs", "--shape", "4"], "called without arguments) raised TypeError"),
        (["usernets.py:trained", "--shape", "4"], "is a path; name the module as Python imports it"),
        (["./usernets:trained", "--shape", "4"], "is a path"),
        ([r"C:\nets\usernets.py:trained", "--shape", "4"], "is a path; name the module as Python imports it"),
        (["C:/nets/usernets:trained", "--shape", "4"], "is a path"),
        ([r"nets\usernets:trained", "--shape", "4"], "is a path"),
        ([r"\\server\share\usernets.py:trained", "--shape", "4"], "is a path"),
        ([r"D:\usernets.py", "--shape", "4"], "is a path"),
        (["usernets:trained", "--shape", "3,8,8"], "given images of shape (16, 3, 8, 8)"),
        (["usernets:trained", "--data", "digits", "--mode", "RGB"], "see --size, --mode"),
        (
            ["usernets:trained", "--data", "digits", "--mean", "0.1,0.2,0.3"],
            "mean has 3 values, but the images have 1 channel; expected one value",
        ),
        (["usernets:trained", "--data", "digits", "--shape", "1,8,8"], "exclude each other"),
        (
            ["usernets:trained", "--shape", "1,8,8", "--out", "head.pth"],
            "expected a .safetensors file",
        ),
        (["."], "is a folder; a pair is a file"),
        (["usernets:trained", "--shape", "a,b"], "--shape is 'a,b'; expected numbers"),
        (["usernets:trained", "--data", "gone.parquet"], "gone.parquet"),
        (["usernets:trained", "--data", "digits", "--size", "big"], "--size is 'big'"),
        (["usernets:trained", "--data", "digits", "--std", "0"], "--std is 0; expected positive numbers"),
        (["usernets:trained", "--data", "digits", "--mean", "x"], "--mean is 'x'; expected one number"),
        (["usernets:trained", "--shape", "1,8,8", "--device", "warp"], "--device is 'warp', which cannot be used"),
        (["usernets:trained", "--shape", "1,8,8", "--path", "nope"], "no module at path 'nope'"),
        (["usernets:trained", "--shape", "1,8,8", "--weights", "gone.safetensors"], "does not exist"),
        (["usernets:trained", "--shape", "1,8,8", "--weights", "two.safetensors"], "does not fit the model"),
        (["usernets:trained", "--shape", "1,8,8", "--weights", "pickled.pth"], "reads no pickles"),
        (["usernets:probabilities", "--data", "digits"], "a softmax inside the model"),
        (["two.safetensors"], "is the head; name it with --weight-key"),
        (["two.safetensors", "--weight-key", "c.weight"], "no tensor 'c.weight'"),
        (["gone.safetensors"], "does not exist"),
        (["pickled.pth"], "pickle"),
        (["pointer.safetensors"], "pointer.safetensors is a Git LFS pointer"),
        (["usernets:trained", "--shape", "1,8,8", "--weights", "pointer.safetensors"], "Run git lfs pull"),
        (["usernets:trained", "--shape", "1,8,8", "--weights", "page.safetensors"], "is an HTML page; expected a safe"),
        (["usernets:trained", "--shape", "1,8,8", "--weights", "."], "is no file"),
    ],
)
def test_bad_input(here, refused, arguments, words):
    (here / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (here / "page.safetensors").write_text("<!doctype html>")
    assert words in refused("head", *arguments)


def test_help_has_an_example():
    for command in ("head", "extract", "fit", "sample", "demo"):
        page = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"}).output
        assert f"Example: penult {command}" in page, command
