"""``penult report``: one page from a pair and its inputs."""

import re
import shutil

import numpy
import pytest
import torch
from typer.testing import CliRunner

import penult
from penult import scores
from penult.cli import app
from penult.data import digits, shift
from penult.demo.networks import DigitsNet
from penult.realism import _two_sample
from penult.report import Section

PAIR = ("report", "digits.penult.safetensors")
FAMILIAR = (*PAIR, "--data", "acts", "--out", "page.html")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Tests of realism take a few steps, and figures are not written: how they look is tested where they are."""
    monkeypatch.setattr(_two_sample, "_STEPS", 3)
    monkeypatch.setattr(Section, "figure", lambda section, *arguments, **options: section)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pair, stored activations, and images of two kinds."""
    folder = tmp_path_factory.mktemp("made")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # as the network of usernets
        network = DigitsNet()
    images = digits()
    tap = penult.Tap(network, penult.find_head(network, images.images[:16]))
    pool = penult.extract(tap, [images.images[:500]])
    penult.GenerativePair(tap.head, penult.Sphere.fit(tap.head, pool, shape="elliptic")).save(
        folder / "digits.penult.safetensors"
    )
    test, labels = images.images[500:590], images.labels[500:590]
    penult.extract(tap, [(test, labels)], class_names=["<script>", *"123456789"]).save(folder / "acts")
    penult.extract(tap, [shift(test[:50], "rotation", 0.5)]).save(folder / "rotated")
    numpy.savez(folder / "test.npz", images=test.numpy(), labels=labels.numpy())
    numpy.savez(folder / "noise.npz", images=torch.rand(45, 1, 8, 8).numpy(), labels=numpy.arange(45) % 3)
    numpy.savez(folder / "many.npz", images=test.numpy(), labels=numpy.arange(90))
    return folder


@pytest.fixture
def place(here, made):
    """A user's folder with all of that."""
    shutil.copytree(made, here, dirs_exist_ok=True)
    return here


def test_a_page_from_stored_activations(place, penult_json):
    facts = penult_json(*FAMILIAR, "--ood", "rotated", "--ood", "<script>=rotated", "--seed", "3")
    page = (place / "page.html").read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "digits: a head and its pair" in page
    assert "<img" not in page
    assert list(facts["others"]) == ["rotated", "<script>"]
    acts, pair = penult.Activations.open("acts").activations, penult.load("digits.penult.safetensors")
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    threshold = scores.Threshold.fit(scores.directional, acts[order[:45]], pair=pair)
    assert facts["threshold"] == pytest.approx(threshold.value, abs=1e-4)
    assert facts["false_alarm_measured"] == threshold(acts[order[45:]]).double().mean()
    rotated = threshold(penult.Activations.open("rotated").activations).double().mean()
    assert facts["others"]["rotated"]["strange"] == rotated
    assert facts["out"] == "page.html"


def test_a_page_from_images_shows_them(place, penult_json):
    run = (*PAIR, "--data", "test.npz", "--model", "usernets:trained", "--out", "deep/page.html")
    facts = penult_json(*run, "--ood", "noise.npz", "--score", "max-logit", "--false-alarm", "0.1", "--title", "T & Co")
    page = (place / "deep" / "page.html").read_text("utf-8")
    assert (facts["score"], facts["false_alarm"], list(facts["others"])) == ("max logit", 0.1, ["noise"])
    assert page.count("<img") == 4 * 8
    assert len(re.findall(r'alt="Input \d+ of noise, classified as \d with probability', page)) == 16
    assert "<title>T &amp; Co</title>" in page
    stored = penult_json(*FAMILIAR, "--score", "max-logit", "--false-alarm", "0.1", "--fitted")
    assert stored["threshold"] == pytest.approx(facts["threshold"], abs=1e-3)
    assert "was fitted to these very activations" in (place / "page.html").read_text("utf-8")


def test_labels_of_other_classes_are_left_out(place):
    done = CliRunner().invoke(app, [*PAIR, "--data", "many.npz", "--model", "usernets:trained", "--out", "page.html"])
    assert done.exit_code == 0, done.output
    assert "many.npz has 90 classes, but the head has 10: its labels are ignored" in done.output
    assert "of 45 familiar inputs" in done.output


def test_names_of_other_sets(place):
    from penult.cli.report import _named_sources

    (place / "a=b.npz").write_bytes(b"")
    given = ["noise.npz", "digits", "far away=some/x.parquet", "a=b.npz", "glob/*.parquet"]
    assert _named_sources(given, "familiar") == {
        "noise": "noise.npz", "digits": "digits", "far away": "some/x.parquet", "a=b": "a=b.npz",
        "*": "glob/*.parquet",
    }  # fmt: skip


def test_bad_input_is_refused_in_one_line(place, refused):
    assert "expected a page, for example page.html" in refused(*PAIR, "--data", "acts", "--out", "page.txt")
    assert "the name 'rotated' is taken" in refused(*FAMILIAR, "--ood", "rotated", "--ood", "./rotated")
    assert "the name 'familiar' is taken" in refused(*FAMILIAR, "--ood", "familiar=rotated")
    assert "expected a source, or NAME=SOURCE" in refused(*FAMILIAR, "--ood", "=rotated")
    assert "there is no file or folder 'nowhere'" in refused(*FAMILIAR, "--ood", "nowhere")
    assert "give --model" in refused(*FAMILIAR, "--ood", "noise.npz")
    assert "expected at least 1997" in refused(*FAMILIAR, "--false-alarm", "0.001")
    penult.GenerativePair(penult.Head(torch.randn(3, 5))).save(place / "other.penult.safetensors")
    assert "expected dimension 5 and 3 classes" in refused(
        "report", "other.penult.safetensors", "--data", "acts", "--out", "page.html", "--score", "energy"
    )
    assert not (place / "page.html").exists()


def test_help_has_examples():
    shown = CliRunner().invoke(app, ["report", "--help"], env={"TERMINAL_WIDTH": "100"}).stdout
    assert shown.count("Example: penult report") == 2
