"""``penult moments``, and ``penult fit --moments``."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import penult
from penult import Activations, Moments
from penult.cli import app

ENCODERS = '''
import torch

def encoder():
    """Means of patches of the digits, as features."""
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())

def maps():
    return torch.nn.AdaptiveAvgPool2d(4)
'''


@pytest.fixture
def rows(here):
    """Labelled rows (N, d) of four classes in all kinds of files, each with a part of the rows."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    h = torch.randn(400, 6, generator=g) + 3 * torch.eye(4, 6)[y]
    Activations(h[:100], torch.zeros(100, 4), y[:100]).save(here / "folder")
    np.savez(here / "part.npz", features=h[100:200].numpy(), labels=y[100:200].numpy())
    save_file({"activations": h[200:300], "labels": y[200:300]}, here / "part.safetensors")
    Moments.of(h[300:], y[300:], 4).save(here / "owner.safetensors")
    (here / "encoders.py").write_text(ENCODERS)
    return h, y


SOURCES = "folder", "part.npz", "part.safetensors", "owner.safetensors"


def test_all_kinds_of_data_are_added_up(rows, here, penult_json):
    h, y = rows
    facts = penult_json("moments", *SOURCES, "--out", "m.safetensors")
    assert facts == {
        "out": "m.safetensors", "samples": 400, "features": 6, "classes": 4, "counts": [100] * 4, "class_names": None,
        "scatter": "pooled",
    }  # fmt: skip
    whole, moments = Moments.of(h, y, 4), Moments.load(here / "m.safetensors")
    assert moments.digest == whole.digest
    assert torch.allclose(moments.scatter_matrix, whole.scatter_matrix, atol=1e-9)
    facts = penult_json("fit", "--moments", "m.safetensors", "--out", "lda.penult.safetensors")
    assert facts["prior"] == pytest.approx([0.25] * 4, abs=1e-6)
    assert (facts["base"], facts["classes"], facts["samples"]) == ("gaussian", [0, 1, 2, 3], 400)
    pair = penult.load(here / "lda.penult.safetensors")
    assert torch.allclose(pair.head.weight, whole.pair().head.weight, atol=1e-5)
    assert "linear discriminant analysis" in str(pair.head.certificate)
    penult_json("fit", "--moments", "m.safetensors", "--shrinkage", "0.5", "--out", "half.penult.safetensors")
    half = penult.load(here / "half.penult.safetensors")
    assert torch.allclose(half.base.covariance_matrix.double(), whole.covariance(0.5), atol=1e-6)


def test_other_commands_take_the_pair(rows, here, penult_json):
    h, y = rows
    penult_json("moments", "folder", "--out", "m.safetensors")
    penult_json("fit", "--moments", "m.safetensors", "--out", "lda.penult.safetensors")
    pair = penult.load(here / "lda.penult.safetensors")
    Activations(h[200:], pair.head(h[200:]), y[200:]).save(here / "test")
    Activations(h[200:] + 9, pair.head(h[200:] + 9)).save(here / "far")
    scored = penult_json("score", "lda.penult.safetensors", "far", "--score", "density", "--calibrate", "test")
    assert min(scored["quantiles"].values()) > scored["threshold"]
    assert penult_json("sample", "lda.penult.safetensors", "-n", "50", "--out", "drawn")["accuracy"] > 0.8
    assert penult_json("head", "lda.penult.safetensors")["certificate"]["kind"] == "moments"


def test_classes_are_forgotten(rows, here, penult_json, refused):
    h, y = rows
    facts = penult_json("moments", *SOURCES[:3], "--scatter", "class", "--forget", "2", "--out", "m.safetensors")
    assert facts["counts"] == [75, 75, 0, 75]
    never = Moments.of(h[:300][y[:300] != 2], y[:300][y[:300] != 2], 4, "class")
    assert torch.allclose(Moments.load(here / "m.safetensors").scatter_matrix, never.scatter_matrix, atol=1e-9)
    assert "pass its rows" in refused("moments", "folder", "--forget", "2", "--out", "m.safetensors")
    message = refused("moments", "owner.safetensors", "--scatter", "class", "--out", "m.safetensors")
    assert "owner.safetensors has a pooled scatter" in message


def test_an_encoder_without_a_head(rows, here, penult_json):
    options = "--model", "encoders:encoder", "--encoder", "--batch-size", "100"
    facts = penult_json("moments", "digits", *options, "--out", "m.safetensors")
    assert (facts["samples"], facts["features"], facts["class_names"]) == (1797, 16, list("0123456789"))
    penult_json("fit", "--moments", "m.safetensors", "--out", "lda.penult.safetensors")
    pair = penult.load(here / "lda.penult.safetensors")
    images = penult.data.digits()
    h = torch.nn.AdaptiveAvgPool2d(4)(images.images).flatten(1)
    assert float((pair.head(h).argmax(-1) == images.labels).double().mean()) > 0.85


def test_the_activations_before_a_head(rows, here, penult_json):
    facts = penult_json("moments", "digits", "--model", "usernets:trained", "--out", "m.safetensors")
    assert (facts["samples"], facts["features"]) == (1797, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moments", "digits", "--out", "m.safetensors"], "digits holds images, so a network has to run: give --model"),
        (["moments", "folder", "--out", "m.npz"], "--out is m.npz; expected a .safetensors file"),
        (["moments", "folder", "--out", "no/m.safetensors"], "the folder no does not exist"),
        (["moments", "unlabelled", "--out", "m.safetensors"], "unlabelled has no labels"),
        (["moments", "digits.safetensors", "--out", "m.safetensors"], "expected features or activations (N, d)"),
        (["moments", "empty.npz", "--out", "m.safetensors"], "expected features or activations (N, d), and labels"),
        (
            ["moments", "folder", "other.npz", "--out", "m.safetensors"],
            "other.npz does not add up with the data before",
        ),
        (
            ["moments", "digits", "--model", "encoders:maps", "--encoder", "--out", "m.safetensors"],
            "the features of digits are of shape (128, 1, 4, 4); expected (B, d)",
        ),
        (["fit", "--out", "a.penult.safetensors"], "no activations are given"),
        (["fit", "folder", "--moments", "owner.safetensors", "--out", "a.penult.safetensors"], "leave out ACTIVATIONS"),
        (
            ["fit", "--moments", "owner.safetensors", "--shrinkage", "x", "--out", "a.penult.safetensors"],
            "--shrinkage is 'x'; expected a number from 0 to 1, or oas",
        ),
        (
            ["fit", "--moments", "owner.safetensors", "--dims", "3", "--out", "a.penult.safetensors"],
            "takes the place of activations, head and base",
        ),
        (["fit", "folder", "--shrinkage", "0.1", "--out", "a.penult.safetensors"], "--shrinkage goes with --moments"),
        (["fit", "--moments", "no.safetensors", "--out", "a.penult.safetensors"], "no.safetensors does not exist"),
    ],
)
def test_refusals(rows, here, refused, arguments, message):
    h, y = rows
    Activations(h, torch.zeros(400, 4)).save(here / "unlabelled")
    np.savez(here / "empty.npz", x=np.zeros(3))
    np.savez(here / "other.npz", features=h[:, :5].numpy(), labels=y.numpy())
    assert message in refused(*arguments)


def test_few_rows_are_warned_of(here):
    np.savez(here / "few.npz", features=torch.randn(8, 30).numpy(), labels=(torch.arange(8) % 2).numpy())
    done = CliRunner().invoke(app, ["moments", "few.npz", "--out", "m.safetensors"])
    assert done.exit_code == 0
    assert "warning: there are 8 rows of dimension 30; with fewer rows than dimensions" in done.output


@pytest.mark.slow
def test_the_report_says_where_the_head_comes_from(rows, here, penult_json):
    h, y = rows
    penult_json("moments", *SOURCES, "--out", "m.safetensors")
    penult_json("fit", "--moments", "m.safetensors", "--out", "lda.penult.safetensors")
    pair = penult.load(here / "lda.penult.safetensors")
    Activations(h, pair.head(h), y).save(here / "data")
    Activations(h + 9, pair.head(h + 9)).save(here / "far")
    facts = penult_json("report", "lda.penult.safetensors", "--data", "data", "--ood", "far", "--out", "page.html")
    assert facts["others"]["far"]["count"] == 400
    page = (here / "page.html").read_text()
    assert "not found in a network but computed from labelled activations" in page
    assert "linear discriminant analysis of the moments of 400 labelled activations" in page
