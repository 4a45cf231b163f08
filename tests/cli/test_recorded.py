"""What is recorded of a network's inputs: by extract and fit, and used by later commands."""

import numpy
import pytest
import torch

import penult
from penult.cli._options import with_recorded
from penult.data import digits, npz
from penult.io import read_index

MODEL = ("--model", "usernets:trained")
MEAN = ("--mean", "0.3", "--std", "0.5")
RECORD = {"inputs": "images", "size": [8, 8], "mode": "L", "mean": [0.3], "std": [0.5]}


@pytest.fixture
def extracted(here, penult_json):
    """Activations of images that were normalised, and a pair fitted to them."""
    images, labels, _ = digits()
    numpy.savez(here / "train.npz", images=images[:600].numpy(), labels=labels[:600].numpy())
    numpy.savez(here / "new.npz", images=images[600:660].numpy(), labels=labels[600:660].numpy())
    penult_json("extract", "usernets:trained", "train.npz", "--out", "acts", *MEAN)
    penult_json("extract", "usernets:trained", "new.npz", "--out", "new", *MEAN)
    penult_json("fit", "acts", "--base", "gaussian", "--out", "net.penult.safetensors")
    return here


def test_preprocessing_travels_from_images_to_folder_head_and_pair(extracted):
    acts = penult.Activations.open("acts")
    assert acts.preprocessing == RECORD
    assert acts[:5].preprocessing == acts.split(0.5)[0].preprocessing == RECORD
    assert acts.to(torch.float64).preprocessing == penult.Activations.concatenate([acts, acts]).preprocessing == RECORD
    assert penult.load("acts/head.penult.safetensors").head.preprocessing == RECORD
    pair = penult.load("net.penult.safetensors")
    assert pair.head.preprocessing == RECORD
    assert pair.with_prior(torch.full((10,), 0.1)).head.preprocessing == RECORD


def test_one_digest_of_the_set_is_in_folder_and_pair(extracted):
    digest = read_index("acts", "activations").metadata["digest"]
    assert digest.startswith("600-")
    assert penult.load("net.penult.safetensors").base.reference == digest
    shuffled = penult.Activations.open("acts")[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    shuffled.save("shuffled", shard_size=10_000)
    index = read_index("shuffled", "activations")
    assert len(index.shards) > 1
    assert index.metadata["digest"] == digest


def test_commands_that_say_nothing_use_the_record(extracted, penult_json):
    said = penult_json("score", "net.penult.safetensors", "new.npz", *MODEL, *MEAN)
    unsaid = penult_json("score", "net.penult.safetensors", "new.npz", *MODEL)
    stored = penult_json("score", "net.penult.safetensors", "new")
    assert said["quantiles"] == unsaid["quantiles"]
    assert stored["quantiles"]["median"] == pytest.approx(unsaid["quantiles"]["median"], abs=1e-3)


def test_commands_that_say_otherwise_are_refused_by_both_names(extracted, refused):
    run = ("score", "net.penult.safetensors", "new.npz", *MODEL)
    assert "--mean is 0.4; expected 0.3, as recorded in net.penult.safetensors" in refused(*run, "--mean", "0.4")
    assert "--size is 16; expected 8x8" in refused(*run, "--size", "16")
    assert "--mode is RGB; expected L" in refused(*run, "--mode", "RGB")
    assert "preprocessing is" in refused("extract", "usernets:trained", "train.npz", "--out", "acts")


def test_activations_of_other_preprocessing_are_refused(extracted, penult_json, refused):
    penult_json("extract", "usernets:trained", "new.npz", "--out", "plain")
    refusal = refused("score", "net.penult.safetensors", "plain")
    assert "the inputs of plain were prepared with mean = None; expected [0.3], as in net.penult.safetensors" in refusal
    refusal = refused("fit", "plain", "--head", "acts/head.penult.safetensors", "--out", "b.penult.safetensors")
    assert "mean = None; expected [0.3], as in acts/head.penult.safetensors" in refusal


@pytest.mark.parametrize(
    ("option", "recorded"),
    [
        ({"mean": "0.5,0.5,0.5"}, {"mean": [0.5]}),
        ({"mean": "0.5"}, {"mean": [0.5, 0.5, 0.5]}),
        ({"size": "32"}, {"size": [32, 32]}),
        ({"size": "32x48"}, {"size": [32, 48]}),
        ({"size": "32"}, {"size": None}),
        ({"mode": "RGB"}, {"mode": None}),
    ],
)
def test_equal_options_are_no_contradiction(option, recorded):
    options = {"size": None, "mode": None, "mean": None, "std": None} | option
    known = with_recorded(options, {"inputs": "images", **recorded}, "a file")
    assert {name: known[name] for name in option} == option


@pytest.mark.parametrize("known", [None, {}, {"inputs": "sounds", "rate": 16000}, {"crop": 3}])
def test_records_of_other_programs_change_nothing(known):
    assert with_recorded({"size": "8", "mean": None}, known, "a file") == {"size": "8", "mean": None}


def test_numbers_keep_all_digits():
    options = dict.fromkeys(("size", "mode", "mean", "std"))
    recorded = {"inputs": "images", "mean": [0.1 + 0.2, 1e-30], "std": [1 / 3]}
    known = with_recorded(options, recorded, "a file")
    assert [float(part) for part in known["mean"].split(",")] == recorded["mean"]
    assert float(known["std"]) == 1 / 3


def test_damaged_records_are_refused():
    with pytest.raises(ValueError, match="recorded preprocessing has mean"):
        with_recorded({"mean": None}, {"inputs": "images", "mean": "half"}, "a file")


def test_images_of_several_sizes_have_no_size(tmp_path):
    from PIL import Image

    from penult.data import folder

    for number, size in enumerate([(6, 4), (6, 4), (5, 4)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    assert folder(tmp_path).preprocessing == {
        "inputs": "images",
        "size": None,
        "mode": "RGB",
        "mean": None,
        "std": None,
    }
    assert folder(tmp_path, size=8, mode="L", std=0.5).preprocessing == RECORD | {"mean": [0.0]}
    assert folder(tmp_path, transform=lambda image: image).preprocessing is None


def test_extract_in_python_takes_the_record_of_the_data_set(extracted, tmp_path):
    from torch.utils.data import DataLoader

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    loader = DataLoader(npz("new.npz", mean=0.3, std=0.5), batch_size=20)
    tap = penult.Tap(model, penult.find_head(model, torch.randn(4, 1, 8, 8)))
    assert penult.extract(tap, loader).preprocessing == RECORD
    own = {"resize": 256, "crop": (224, 224)}
    acts = penult.extract(tap, loader, tmp_path / "own", preprocessing=own)
    assert acts.preprocessing == {"resize": 256, "crop": [224, 224]}
    # Nothing is stated here, so that the stored record stays.
    batches = list(loader)
    assert penult.extract(tap, batches, tmp_path / "own").preprocessing == acts.preprocessing
    with pytest.raises(ValueError, match=r"preprocessing is .*crop.* there and .*images.* now"):
        penult.extract(tap, loader, tmp_path / "own")
    with pytest.raises(TypeError, match="preprocessing is a str"):
        penult.extract(tap, batches, preprocessing="mean 0.5")


def test_folders_without_a_record_are_resumed(extracted, tmp_path):
    model = torch.nn.Linear(3, 2)
    tap = penult.Tap(model, penult.find_head(model, torch.randn(4, 3)))
    batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    penult.extract(tap, batches, tmp_path / "old", shard_size=64)
    (tmp_path / "old" / "index.json").unlink()
    resumed = penult.extract(tap, batches, tmp_path / "old", shard_size=64, preprocessing={"inputs": "numbers"})
    assert resumed.preprocessing is None
    assert len(resumed) == 16


def test_heads_keep_names_and_preprocessing(tmp_path):
    head = penult.Head(torch.eye(3))
    assert head.class_names is None
    assert "class_names" not in head.config()
    head.class_names, head.preprocessing = {0: "cat", 1: "dog", 2: "=x"}, {"inputs": "images", "size": (8, 8)}
    for derived in (
        head.clone(),
        head.with_temperature(2.0),
        head.centered(),
        head.rescaled()[0],
        head.with_bias(None),
    ):
        assert derived.class_names == ("cat", "dog", "=x")
        assert derived.preprocessing == {"inputs": "images", "size": [8, 8]}
    pair = penult.load(penult.GenerativePair(head).save(tmp_path / "a.penult.safetensors"))
    assert pair.head.class_names == ("cat", "dog", "=x")
    assert pair.head.preprocessing == {"inputs": "images", "size": [8, 8]}
    with pytest.raises(ValueError, match="class_names has 2 names; expected 3"):
        head.class_names = "a", "b"
    with pytest.raises(TypeError, match="expected a mapping of JSON values"):
        head.preprocessing = {"transform": print}
    with pytest.raises(ValueError, match="expected a mapping of JSON values"):
        head.preprocessing = {"mean": float("nan")}
