"""``penult generate``: a generator of images from a pair, resumed where it was killed, and drawn from."""

import inspect
import json
import shutil
import signal
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import penult
from penult.cli import app
from penult.cli._generate_train import CLASSES
from penult.cli.draw import grid
from penult.cli.generate import KINDS, Kind
from penult.data import digits, read
from penult.demo.networks import DigitsNet
from penult.generate import _image_metrics

NETS = '''
import os
import torch
from torch import nn
from penult.demo.networks import DigitsNet

def net():
    return DigitsNet(width=16)

def seven():
    return DigitsNet(classes=7, width=16)

class Fragile(DigitsNet):
    """Dies once it has seen as many batches of 50 images as it has been told."""

    batches = 0

    def forward(self, x):
        self.batches += len(x) == 50
        if self.batches == int(os.environ.get("DIES_AT", -1)):
            raise KeyboardInterrupt if "BY_HAND" in os.environ else RuntimeError("the machine is gone")
        return super().forward(x)

def fragile():
    return Fragile(width=16)

class Normal(nn.Module):
    """Takes images that were normalised by 0.25 and 0.5."""

    def __init__(self):
        super().__init__()
        self.net = DigitsNet(width=16)

    def forward(self, x):
        return self.net(x * 0.5 + 0.25)
'''


@pytest.fixture(scope="module")
def trained():
    """A classifier of digits after seconds of training."""
    images = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DigitsNet(width=16)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        for rows in torch.randperm(1000).repeat(3).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images.images[rows]), images.labels[rows]).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained):
    """Weights of the classifier, pairs of two laws, and images with and without labels."""
    folder = tmp_path_factory.mktemp("files")
    save_file(trained.state_dict(), folder / "net.safetensors")
    save_file({f"net.{name}": value for name, value in trained.state_dict().items()}, folder / "normal.safetensors")
    images = digits()
    head = penult.find_head(trained, images.images[:16])
    acts = penult.extract(penult.Tap(trained, head), [images.images[:BANK]])
    penult.GenerativePair(head, penult.Marginal.fit(head, acts, kind="bank")).save(folder / "net.penult.safetensors")
    with warnings.catch_warnings():  # seconds of training do not part all classes
        warnings.filterwarnings("ignore", "classes .* are not the largest", UserWarning)
        penult.GenerativePair(head).save(folder / "sphere.penult.safetensors")
    arrays = {"images": images.images.numpy(), "labels": images.labels.numpy()}
    numpy.savez(folder / "data.npz", **{name: values[1000:1200] for name, values in arrays.items()})
    numpy.savez(folder / "val.npz", **{name: values[1600:1750] for name, values in arrays.items()})
    numpy.savez(folder / "unlabelled.npz", images=arrays["images"][1000:1200])
    return folder


@pytest.fixture
def place(here, files, monkeypatch):
    """A folder with a classifier and these files, and evaluators that hardly train."""
    monkeypatch.setattr(_image_metrics, "_EPOCHS", 1)
    monkeypatch.setattr(_image_metrics, "_STEPS", 3)
    (here / "gennets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "gennets", raising=False)
    shutil.copytree(files, here, dirs_exist_ok=True)
    return here


MODEL = ("--model", "gennets:net", "--weights", "net.safetensors")
PAIR = ("generate", "net.penult.safetensors", *MODEL)
FEW = ("--width", "32", "--latent", "4", "--batch-size", "50")
DATA = (*PAIR, *FEW, "--images", "data.npz", "--val", "val.npz")
GAN = ("--kind", "gan", "--width", "4")
BANK = 1000  # activations that the pair holds


def weights(folder):
    return load_file(f"{folder}/generator.safetensors")


def sizes(folder):
    """All sizes of tensors in a generator's file."""
    return {size for tensor in weights(folder).values() for size in tensor.shape}


@pytest.mark.slow
def test_from_a_pair_to_pictures(penult_json, refused, place):
    state = torch.get_rng_state()
    facts = penult_json(*DATA, "--out", "run", "--epochs", "3", "--confident", "0.6")
    assert torch.equal(torch.get_rng_state(), state)
    assert (facts["images"], facts["judged_by"], facts["held_out"], facts["labels"]) == (200, 150, False, "given")
    assert [each["epoch"] for each in facts["history"]] == [1, 2, 3]
    assert facts["history"][-1]["val_loss"] < facts["history"][0]["val_loss"]
    assert list(facts["metrics"]) == ["generated", "confident", "real"]
    for row in facts["metrics"].values():
        assert row["count"] == 150
        assert None not in row.values()
    assert facts["skipped"] == []
    held = {path.name for path in (place / "run").iterdir()}
    assert held == {"generator.safetensors", "index.html", "log.json", "settings.json", "checkpoints", "samples"}
    names = sorted(path.name for path in (place / "run/samples").iterdir())
    assert names == ["epoch-0001.png", "epoch-0002.png", "epoch-0003.png"]
    with Image.open("run/samples/epoch-0003.png") as sample:
        assert (sample.mode, sample.size) == ("L", (8 * 58 + 2, 10 * 58 + 2))
    page = (place / "run/index.html").read_text()
    for words in (
        "Samples",
        "Between classes",
        "Editing",
        "class Fréchet",
        "with p(y|h) &gt; 0.6",
        "--judge MODEL uses",
    ):
        assert words in page

    times = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")}
    again = penult_json(*DATA, "--out", "run", "--epochs", "3", "--confident", "0.6")
    assert again["was_complete"]
    assert again["metrics"] == facts["metrics"]
    assert {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")} == times
    line = refused(*DATA, "--out", "run", "--epochs", "3", "--beta", "2")
    assert "run holds another generator: beta is 1.0 there and 2.0 now" in line
    assert "--overwrite" in line

    before = weights("run")
    told = penult_json(*DATA, "--out", "run", "--epochs", "3")  # told anew, without another training
    assert list(told["metrics"]) == ["generated", "real"]
    assert told["history"] == facts["history"]
    assert told["metrics"]["generated"] == facts["metrics"]["generated"]
    assert all(torch.equal(value, before[name]) for name, value in weights("run").items())
    anew = penult_json(*DATA, "--out", "run", "--epochs", "1", "--overwrite")
    assert len(anew["history"]) == 1
    assert [path.name for path in (place / "run/samples").iterdir()] == ["epoch-0001.png"]

    facts = penult_json("draw", "run", "--class", "7", "-n", "5", "-o", "seven.png")
    assert (facts["images"], facts["classes"], facts["shape"]) == (5, [7], [1, 8, 8])
    with Image.open("seven.png") as drawn:
        assert (drawn.mode, drawn.size) == ("L", (3 * 58 + 2, 2 * 58 + 2))
        assert drawn.getpixel((0, 0)) == drawn.getpixel((58, 30)) == 255
    penult_json("draw", "run/generator.safetensors", "-o", "all.png")
    with Image.open("all.png") as drawn:
        assert drawn.size == (8 * 58 + 2, 10 * 58 + 2)
    penult_json("draw", "run", "--class", "3", "--class", "1", "-n", "2", "-o", "some.npz", "--confident", "0.5")
    dataset = read("some.npz")
    assert dataset.labels.tolist() == [3, 3, 1, 1]
    images = dataset.load().images
    made = penult.generate.load("run/generator.safetensors")
    wanted = made.generate(torch.tensor([3, 3, 1, 1]), 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images, wanted)
    penult_json("draw", "run", "--class", "3", "-n", "2", "-o", "other.npz", "--seed", "1")
    assert not torch.equal(read("other.npz").load().images, images[:2])

    # `penult generate RUN` is the older form of the same command.
    old = penult_json("generate", "run", "--class", "7", "-n", "5", "-o", "old.png")
    new = penult_json("draw", "run", "--class", "7", "-n", "5", "-o", "new.png")
    assert old | {"out": "new.png"} == new
    assert (place / "old.png").read_bytes() == (place / "new.png").read_bytes()

    (place / "run/generator.safetensors").unlink()
    assert "run holds a training that was stopped" in refused("draw", "run", "-o", "x.png")


FRAGILE = ("generate", "net.penult.safetensors", "--model", "gennets:fragile", "--weights", "net.safetensors", *FEW)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "condition", "way"),
    [
        pytest.param("vae", "activation", "error", marks=pytest.mark.long),
        ("vae", "label", "error"),
        pytest.param("gan", "activation", "hand", marks=pytest.mark.long),
    ],
)
def test_a_run_that_was_killed(penult_json, refused, place, monkeypatch, kind, condition, way):
    handler = signal.getsignal(signal.SIGINT)
    command = (*FRAGILE, "--images", "data.npz", "--condition", condition, "--consistency", "3", "--epochs", "4")
    command += GAN if kind == "gan" else ()
    whole = penult_json(*command, "--out", "whole")
    # An epoch of 180 images has three batches of 50; the classifier sees images, if it has to, and what comes of them.
    monkeypatch.setenv("DIES_AT", "14" if condition == "activation" else "8")
    if way == "hand":
        monkeypatch.setenv("BY_HAND", "1")
    line = refused(*command, "--out", "run")
    signal.signal(signal.SIGINT, handler)
    expected = "the machine is gone" if way == "error" else "interrupted after epoch 2 of 4; the same command continues"
    assert expected in line
    monkeypatch.delenv("DIES_AT")
    assert not (place / "run/generator.safetensors").exists()
    assert "a training that was stopped" in refused("draw", "run", "-o", "x.png")
    rate = {"vae": 0.001, "gan": 0.002}[kind]
    assert f"rate is {rate} there and 0.01 now" in refused(*command, "--out", "run", "--rate", "0.01")
    resumed = penult_json(*command, "--out", "run")
    assert resumed["resumed_after_epochs"] == 2
    assert resumed["history"] == whole["history"]
    parts = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "run")]
    trained = {name.partition(".")[0] for name in parts[0]} - {"standardize"}
    assert trained == {"vae": {"encoder", "decoder"}, "gan": {"generator", "moving", "discriminator"}}[kind]
    for a, b in (parts, (weights("whole"), weights("run"))):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed["metrics"] == whole["metrics"]
    for name in ("epoch-0001.png", "epoch-0002.png", "epoch-0004.png"):
        assert (place / "run/samples" / name).read_bytes() == (place / "whole/samples" / name).read_bytes()


@pytest.mark.slow
def test_adversaries(penult_json, place):
    command = (*PAIR, *GAN, "--images", "data.npz", "--val", "val.npz", "--out", "run", "--epochs", "1")
    command += ("--latent", "4", "--loss", "hinge", "--drawn", "0.5")
    facts = penult_json(*command)
    assert (facts["kind"], facts["images"]) == ("gan", 200)
    figures = {"epoch", "loss", "discriminator_loss", "cosine", "val_cosine"}
    assert [each.keys() for each in facts["history"]] == [figures]
    settings = json.loads((place / "run/settings.json").read_text())
    own = {"batch_size": 64, "rate": 2e-3, "latent": 4, "width": 4, "consistency": 1, "loss": "hinge", "drawn": 0.5}
    assert own.items() <= settings.items()
    assert "beta" not in settings
    made = penult.generate.load("run/generator.safetensors")
    assert isinstance(made, penult.generate.ActivationGAN)
    assert (made.loss, made.drawn, made.width, made.latent) == ("hinge", 0.5, 4, 4)
    page = (place / "run/index.html").read_text()
    for words in ("another image of the same activation", ">discriminator<", "neither network wins", "Mean cosine of"):
        assert words in page
    assert "its reconstruction" not in page
    assert "has little effect" not in page
    drawn = penult_json("draw", "run", "-n", "2", "-o", "all.npz")
    assert (drawn["images"], drawn["stored_activations"]) == (20, 0)


@pytest.mark.slow
def test_a_bank_is_stored_if_that_is_asked_for(penult_json, place):
    command = [*DATA, "--out", "run", "--epochs", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    facts = json.loads((place / "run/log.json").read_text())
    made = penult.generate.load("run/generator.safetensors")
    floats = made.pair.base.num_parameters
    assert (facts["stored_activations"], facts["replaced_activations"], facts["floats"]) == (0, BANK, floats)
    assert max(sizes("run")) < BANK
    words = f"stores a mixture of {floats} numbers instead of {BANK} activations of real images; --store-activations"
    assert words in done.output
    assert words in (place / "run/index.html").read_text().replace("</code>", "")
    told = made.generate(torch.arange(10).repeat_interleave(8), generator=torch.Generator().manual_seed(0))
    with Image.open("run/samples/epoch-0001.png") as sample:  # of what the file holds, too
        assert sample.getpixel((30, 30)) == int((told[0, 0, 4, 4] * 255).round())

    done = CliRunner().invoke(app, [*command, "--store-activations"])  # told anew, without another training
    assert done.exit_code == 0, done.output
    assert "a finished training" in done.output
    assert f"generator.safetensors stores {BANK} activations of real images" in done.output
    stored = json.loads((place / "run/log.json").read_text())
    assert (stored["stored_activations"], stored["replaced_activations"], stored["floats"]) == (BANK, 0, BANK * 16)
    assert stored["history"] == facts["history"]
    assert stored["metrics"]["real"] == facts["metrics"]["real"]
    assert stored["metrics"]["generated"] != facts["metrics"]["generated"]
    assert BANK in sizes("run")
    assert penult_json("draw", "run", "-n", "1", "-o", "x.npz")["stored_activations"] == BANK


def test_defaults_are_those_of_the_classes():
    assert [kind.value for kind in Kind] == list(KINDS) == list(CLASSES)
    for kind, options in KINDS.items():
        held = inspect.signature(CLASSES[kind]).parameters
        assert {name: held[name].default for name in options if name != "batch_size"} | {
            "batch_size": options["batch_size"]
        } == options


@pytest.mark.slow
def test_images_without_labels_and_a_tenth_of_them_held_out(place):
    done = CliRunner().invoke(app, [*PAIR, *FEW, "--images", "unlabelled.npz", "--out", "run", "--epochs", "1"])
    assert done.exit_code == 0, done.output
    assert "20 of 200 images are held out" in done.output
    assert "the held-out images have no labels; the judge's predictions are used instead" in done.output
    assert "biased in favour of the generator" in done.output
    facts = json.loads((place / "run/log.json").read_text())
    assert (facts["images"], facts["judged_by"], facts["labels"]) == (180, 20, "judge")
    assert facts["skipped"]  # 20 images are too few for some classes
    assert all(reason in done.output for reason in facts["skipped"])
    assert 0 <= facts["metrics"]["generated"]["accuracy"] <= 1
    assert "have no labels" in (place / "run/index.html").read_text()


@pytest.mark.slow
def test_too_few_images_for_any_other_figure_than_accuracy(penult_json, place):
    images = digits()
    numpy.savez("few.npz", images=images.images[:5].numpy(), labels=images.labels[:5].numpy())
    facts = penult_json(*PAIR, *FEW, "--images", "data.npz", "--val", "few.npz", "--out", "run", "--epochs", "1")
    assert set(facts["metrics"]) == {"generated"}
    assert set(facts["metrics"]["generated"]) == {"accuracy", "count"}
    assert any("nothing but accuracy" in reason for reason in facts["skipped"])


def test_a_training_that_diverges_ends_with_one_line(refused, place):
    line = refused(*DATA, "--out", "run", "--epochs", "2", "--rate", "1e9")
    assert "diverged" in line
    assert not (place / "run/generator.safetensors").exists()


@pytest.mark.slow
def test_a_class_without_images_to_judge_by_does_no_harm(penult_json, place):
    images = digits()
    kept = images.labels[1600:1750] != 9
    arrays = {"images": images.images[1600:1750][kept].numpy(), "labels": images.labels[1600:1750][kept].numpy()}
    numpy.savez("nine.npz", **arrays)
    facts = penult_json(*PAIR, *FEW, "--images", "data.npz", "--val", "nine.npz", "--out", "run", "--epochs", "1")
    assert set(facts["metrics"]) == {"generated", "real"}
    assert facts["skipped"] == []


def test_a_law_that_was_not_fitted_is_warned_of(place):
    command = ["generate", "sphere.penult.safetensors", *MODEL, *FEW, "--images", "data.npz", "--out", "run"]
    done = CliRunner().invoke(app, [*command, "--epochs", "1", "--val", "val.npz", "--json"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("penult: warning")]
    assert "penult extract gennets:net data.npz --out acts/" in line
    assert "penult fit acts/ --base mixture --out" in line
    json.loads(done.stdout)


@pytest.mark.slow
def test_mean_and_std_are_for_classifier_and_judge_alone(penult_json, place):
    plain = penult_json(*DATA, "--out", "plain", "--epochs", "1", "--judge", "gennets:net", "--judge-weights",
                        "net.safetensors")  # fmt: skip
    assert plain["judge"] == "gennets:net"
    assert "biased" not in (place / "plain/index.html").read_text()
    command = ("generate", "net.penult.safetensors", "--model", "gennets:Normal", "--weights", "normal.safetensors")
    command = (*command, *FEW, "--images", "data.npz", "--val", "val.npz", "--mean", "0.25", "--std", "0.5")
    normal = penult_json(*command, "--out", "normal", "--epochs", "1", "--path", "net.fc")
    for name in ("loss", "val_loss"):
        assert normal["history"][0][name] == pytest.approx(plain["history"][0][name], rel=1e-4)
    assert normal["metrics"]["real"]["accuracy"] == plain["metrics"]["real"]["accuracy"] > 0.6


@pytest.mark.slow
def test_names_of_classes_are_text_and_nothing_else(penult_json, place):
    images = digits()
    names = ["$5 $6", "<script>alert(1)<x>", *(f"class {y}" for y in range(2, 9)), "a" * 60]
    for y, name in enumerate(sorted(names)):
        (place / "folder" / name).mkdir(parents=True)
        for i, row in enumerate((images.labels == y).nonzero().flatten()[:6].tolist()):
            pixels = (images.images[row, 0] * 255).byte().numpy()
            Image.fromarray(pixels).save(place / "folder" / name / f"{i}.png")
    penult_json(*PAIR, *FEW, "--images", "folder", "--out", "run", "--epochs", "1")
    page = (place / "run/index.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "$5 $6" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "net.penult.safetensors", "--images", "data.npz"), "--model is needed"),
        (PAIR, "--images is needed"),
        ((*PAIR, "--images", "gone.npz"), "no file or folder 'gone.npz'"),
        ((*DATA, "--class", "3", "-n", "2"), "--class, --count go with drawing"),
        ((*DATA, "--judge-weights", "net.safetensors"), "--judge-weights goes with --judge"),
        ((*DATA, "--judge", "gennets:gone"), "--judge 'gennets:gone'"),
        (
            (*DATA, "--judge", "gennets:MODEL_B"),
            "'gennets' has no attribute 'MODEL_B'",
        ),
        ((*DATA, "--judge", "gennets:seven"), "--judge gennets:seven has 7 classes; expected 10"),
        ((*DATA, "--judge", "gennets:net", "--judge-weights", "gone"), "--judge-weights gone does not exist"),
        ((*DATA, "--confident", "2"), "expected a number from 0 to below 1"),
        ((*DATA, "--confident", "0.9999999"), "the highest is"),
        ((*DATA, "--beta", "0"), "beta"),
        ((*DATA, "--loss", "hinge", "--drawn", "1"), "--loss, --drawn go with --kind gan, but the kind is vae: leave "),
        ((*DATA, *GAN, "--beta", "2"), "--beta goes with --kind vae, but the kind is gan: leave it out"),
        ((*DATA, *GAN, "--drawn", "1", "--condition", "label"), "--drawn goes with --condition activation, but with"),
        ((*DATA, *GAN, "--drawn", "2"), "expected a number from 0 to 1"),
        (("generate", "tiny.penult.safetensors", *DATA[2:]), "holds 30 real activations, and no mixture can be fitted"),
        ((*DATA, "--consistency", "-1"), "consistency"),
        ((*DATA, "--mean", "0.5,0.5,0.5"), "the images have 1 channel;"),
        ((*DATA, "--mode", "RGB"), "images of shape (16, 3, 8, 8)"),
        ((*DATA, "--device", "nowhere"), "--device is 'nowhere', which cannot be used"),
        ((*PAIR, "--images", "data.npz", "--val", "small.npz"), "of --val small.npz are of shape (1, 4, 4)"),
        ((*PAIR, "--images", "unlabelled.npz", "--condition", "label"), "--condition label needs labels"),
        (("generate", "other.penult.safetensors", *MODEL, "--images", "data.npz"), "is not that of gennets:net"),
        (("generate", "gone.safetensors", *MODEL, "--images", "data.npz"), "gone.safetensors does not exist"),
        (("generate", "pickled.pth", *MODEL, "--images", "data.npz"), "never unpickles"),
        (("generate", "empty", *MODEL, "--images", "data.npz"), "empty holds no generator"),
    ],
)
def test_bad_input_to_train_on(refused, place, arguments, words):
    penult.GenerativePair(penult.Head(torch.randn(10, 16))).save("other.penult.safetensors")
    numpy.savez("small.npz", images=numpy.zeros((20, 4, 4)))
    base = penult.load("net.penult.safetensors").base
    bank = penult.distributions.Bank(base.distribution.activations[:30])
    penult.GenerativePair(base.head, penult.Marginal(base.head, bank)).save("tiny.penult.safetensors")
    (place / "empty").mkdir()
    assert words in refused(*arguments, "--out", "x")
    assert not (place / "x").exists()


def test_a_folder_of_something_else_is_left_alone(refused, place):
    (place / "other").mkdir()
    (place / "other/settings.json").write_text('{"kind": "soft"}')  # of a distillation
    assert "other holds other files, and no generator" in refused(*DATA, "--out", "other", "--overwrite")
    assert "expected a folder to train in" in refused(*DATA, "--out", "x.png")
    assert "expected a folder" in refused(*DATA, "--out", "x.npz")


def test_a_generator_is_drawn_from(penult_json, place):
    pair = penult.load("net.penult.safetensors")
    penult.generate.ActivationVAE(pair, None, (1, 8, 8), condition="label").save("one.safetensors")
    facts = penult_json("draw", "one.safetensors", "--class", "3", "-n", "4", "-o", "x.npz")
    assert (facts["images"], facts["classes"], facts["shape"]) == (4, [3], [1, 8, 8])
    assert read("x.npz").labels.tolist() == [3] * 4
    assert penult_json("draw", "one.safetensors", "--class", "3", "-n", "4", "-o", "x.png")["images"] == 4


def test_too_many_images_make_no_picture():
    with pytest.raises(ValueError, match=r"100000 images.* pixels"):
        grid(torch.zeros(1).expand(100_000, 1, 8, 8), 317)


def test_bad_input_to_draw_from(refused, place):
    pair = penult.load("net.penult.safetensors")
    vae = penult.generate.ActivationVAE(pair, None, (2, 8, 8), condition="label")
    vae.save("two.safetensors")
    line = refused("generate", "two.safetensors", "-o", "x.png", "--model", "gennets:net", "--epochs", "3")
    assert "--model, --epochs go with training, but two.safetensors" in line
    assert "net.penult.safetensors holds no generator" in refused("draw", "net.penult.safetensors", "-o", "x.png")
    assert "gone does not exist" in refused("draw", "gone", "-o", "x.png")
    for arguments, words in (
        (("--class", "10"), "is 10, out of range"),
        (("--confident", "1"), "expected a number from 0 to below 1"),
        (("--class", "1"), "images have 2 channels; expected 1 or 3"),
    ):
        assert words in refused("draw", "two.safetensors", "-o", "x.png", *arguments)
    assert "a grid, name.png, or to arrays, name.npz" in refused("draw", "two.safetensors", "-o", "x.jpg")
    assert not list(place.glob("x*"))


@pytest.mark.slow
def test_drawing_needs_no_report(place):
    penult.generate.ActivationVAE(penult.load("net.penult.safetensors"), None, (1, 8, 8)).save("one.safetensors")
    code = (
        "import sys; sys.modules['penult.report'] = sys.modules['jinja2'] = None\n"
        "sys.argv = ['penult', 'draw', 'one.safetensors', '-n', '1', '-o', 'x.png']\n"
        "from penult.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / "x.png").exists()


def test_help_shows_how():
    page = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "120"}).output
    assert "penult draw run/ --class 7 -n 64 -o grid.png" in page
    assert "`penult generate RUN -o grid.png` does the same" in " ".join(page.split())
    assert "--kind gan --out run/" in page
