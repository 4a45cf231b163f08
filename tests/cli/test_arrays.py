"""Files of activations, .npz and safetensors, wherever commands take a folder of activations."""

import numpy
import pytest
import torch
from safetensors.torch import save_file

import penult
from penult.data import _read_activations

PAIR = "net.penult.safetensors"


@pytest.fixture
def place(here):
    """A pair, and the same activations as a folder and as files."""
    g = torch.Generator().manual_seed(0)
    head = penult.Head(torch.randn(4, 6, generator=g), torch.randn(4, generator=g))
    h, reference = torch.randn(60, 6, generator=g), torch.randn(60, 6, generator=g)
    y = torch.randint(4, (60,), generator=g)
    penult.Activations(h, head(h), y).save(here / "folder")
    penult.GenerativePair(head, penult.Sphere.fit(head, reference, shape="elliptic")).save(here / PAIR)
    penult.GenerativePair(head).save(here / "folder" / "head.penult.safetensors")
    numpy.savez(here / "all.npz", features=h.numpy(), logits=head(h).numpy(), labels=y.to(torch.uint8).numpy())
    numpy.savez_compressed(here / "bare.npz", activations=h.double().numpy().astype(">f8"))
    save_file({"activations": h, "logits": head(h), "labels": y[:, None]}, here / "all.safetensors")
    save_file({"features": h}, here / "bare.safetensors")
    return here


SOURCES = ("all.npz", "bare.npz", "all.safetensors", "bare.safetensors", "folder/activations-00000.safetensors")


@pytest.mark.parametrize("source", SOURCES)
def test_scores_are_those_of_the_folder(place, penult_json, source):
    expected = penult_json("score", PAIR, "folder")["quantiles"]
    assert penult_json("score", PAIR, source)["quantiles"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_fits_are_those_of_the_folder(place, penult_json, source):
    options = "--base", "gaussian", "--out", "fitted.penult.safetensors", "--head", PAIR
    expected, digest = penult_json("fit", "folder", *options), penult.load("fitted.penult.safetensors").base.reference
    results = penult_json("fit", source, *options)
    assert results["stored_confidence"] == pytest.approx(expected["stored_confidence"], rel=1e-5)
    assert penult.load("fitted.penult.safetensors").base.reference == digest


def test_files_calibrate_and_give_priors(place, penult_json):
    results = penult_json("score", PAIR, "all.npz", "--calibrate", "folder", "--false-alarm", "0.2")
    assert results["strange_share"] <= 0.2
    options = "--out", "fitted.penult.safetensors", "--head", PAIR, "--base", "gaussian"
    results = penult_json("fit", "folder", *options, "--prior-from", "bare.safetensors")
    assert results["prior_from"] == "bare.safetensors"


def test_a_report_takes_files(place, penult_json):
    results = penult_json("report", PAIR, "--data", "all.npz", "--ood", "x=bare.safetensors", "-o", "page.html")
    assert results["others"]["x"]["count"] == 60


def test_class_names_and_records_come_along(tmp_path):
    h, logits = torch.randn(5, 3), torch.randn(5, 2)
    numpy.savez(tmp_path / "a.npz", features=h.numpy(), logits=logits.numpy(), class_names=numpy.array(["no", "yes"]))
    assert _read_activations(tmp_path / "a.npz").class_names == ("no", "yes")
    record = {"inputs": "images", "size": [8, 8]}
    penult.Activations(h, logits, None, ("a", "b"), pre_activation=True, preprocessing=record).save(tmp_path / "acts")
    acts = _read_activations(tmp_path / "acts" / "activations-00000.safetensors")
    assert (acts.class_names, acts.pre_activation, acts.preprocessing) == (("a", "b"), True, record)


def test_labels_of_minus_one_are_none(tmp_path):
    numpy.savez(tmp_path / "a.npz", features=numpy.ones((3, 2)), logits=numpy.ones((3, 2)), labels=-numpy.ones(3, int))
    assert _read_activations(tmp_path / "a.npz").labels is None


H, LOGITS = numpy.ones((5, 6), "float32"), numpy.ones((5, 4), "float32")


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"features": H, "activations": H}, "holds both activations and features"),
        ({"features": H.astype(int)}, r"features in f.npz is int64 of shape \(5, 6\); expected floating numbers"),
        ({"features": H[0]}, r"of shape \(6,\); expected floating numbers \(N, d\)"),
        ({"features": H[:, :, None, None]}, r"of shape \(5, 6, 1, 1\); expected .* Flatten each row"),
        ({"features": H[:, :5]}, r"has shape \(5, 5\); expected \(N, 6\), as the head reads"),
        ({"features": H[:0]}, "holds no activations"),
        ({"features": H, "logits": LOGITS[:4]}, "5 rows of features and 4 of logits"),
        ({"features": H, "logits": LOGITS[:, 0]}, r"logits in f.npz is float32 of shape \(5,\)"),
        ({"features": H, "logits": LOGITS[:, :3]}, "3 classes; expected dimension 6 and 4 classes"),
        ({"features": H, "logits": LOGITS}, "does not give the logits stored in f.npz"),
        ({"features": H, "labels": LOGITS[:, 0]}, r"labels in f.npz is float32 of shape \(5,\); expected integers"),
        ({"features": H, "labels": numpy.array([0, 1, 2, 3, 4])}, "labels"),
        ({"features": H, "labels": numpy.array([0, 1, 2, 3])}, "5 rows of features and 4 of labels"),
        ({"features": H * numpy.nan}, "NaN"),
        ({"features": H.astype("complex64")}, "features in f.npz is complex64"),
        ({"features": numpy.array([[1, None]])}, "cannot be read as an .npz file of plain arrays"),
        ({"features": H, "class_names": numpy.array([1, 2])}, "class_names in f.npz is int64"),
    ],
)
def test_faults_of_arrays_are_named(place, refused, arrays, fault):
    import re

    numpy.savez("f.npz", **arrays)
    assert re.search(fault, refused("score", PAIR, "f.npz"))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (PAIR, f"{PAIR} is a penult file of kind 'pair'"),
        ("two.safetensors", "neither activations nor features; expected activations or features (N, d)"),
        ("folder/head.penult.safetensors", "of kind 'pair'"),
        ("missing.safetensors", "missing.safetensors"),
    ],
)
def test_other_files_are_named(place, refused, source, fault):
    assert fault in refused("score", PAIR, source)


def test_damaged_files_are_named(place, refused):
    (place / "cut.safetensors").write_bytes((place / "all.safetensors").read_bytes()[:50])
    (place / "page.npz").write_text("<!doctype html><html>")
    assert "cut.safetensors" in refused("score", PAIR, "cut.safetensors")
    assert "page.npz is" in refused("score", PAIR, "page.npz", "--model", "usernets:trained")


def test_a_file_alone_has_no_head(place, refused):
    options = "--base", "gaussian", "--out", "fitted.penult.safetensors"
    assert "bare.npz holds no head" in refused("fit", "bare.npz", *options)
    assert "--head FILE" in refused("fit", "bare.npz", *options)
    assert "gone.safetensors does not exist" in refused("fit", "all.npz", "--head", "gone.safetensors", *options)


def test_arrays_that_are_not_read_are_named(tmp_path):
    numpy.savez(tmp_path / "a.npz", features=H, logits=LOGITS, ids=numpy.arange(5))
    with pytest.warns(UserWarning, match="arrays that are not read: ids"):
        _read_activations(tmp_path / "a.npz")
