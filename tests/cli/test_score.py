"""``penult score``: a number for each input, and what a calibration promises."""

import csv
import shutil

import numpy
import pytest
import torch
from typer.testing import CliRunner

import penult
from penult import scores
from penult.cli import app
from penult.cli.extract import HEAD_FILE
from penult.data import digits
from penult.demo.networks import DigitsNet

MODEL = ("--model", "usernets:trained")

COLUMNS = "index file row score p_value strange verdict predicted class_name confidence".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pairs of three bases, activations of two sets and their images, of a network of digits."""
    folder = tmp_path_factory.mktemp("made")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # as the network of usernets
        network = DigitsNet()
    images = digits()
    tap = penult.Tap(network, penult.find_head(network, images.images[:16]))
    acts = {
        name: penult.extract(tap, [images.images[rows]])
        for name, rows in {"pool": slice(600), "familiar": slice(600, 800), "new": slice(800, 860)}.items()
    }
    for name, part in acts.items():
        part.save(folder / name)
        penult.GenerativePair(tap.head).save(folder / name / HEAD_FILE)
    numpy.savez(folder / "new.npz", images=images.images[800:860].numpy(), labels=numpy.arange(60))
    numpy.savez(folder / "half.npz", images=(images.images[800:860] / 2 + 0.5).numpy())
    fits = {
        "elliptic": penult.Sphere.fit(tap.head, acts["pool"], shape="elliptic"),
        "round": penult.Sphere.fit(tap.head, acts["pool"]),
        "mixture": penult.Marginal.fit(tap.head, acts["pool"], kind="class"),
    }
    for name, base in fits.items():
        penult.GenerativePair(tap.head, base).save(folder / f"{name}.penult.safetensors")
    pair = penult.GenerativePair(tap.head, fits["mixture"])
    scores.save(folder / "kept.penult.safetensors", scores.Composite.fit(pair, acts["pool"]), pair)
    return folder


@pytest.fixture
def place(here, made):
    """A user's folder with all of that."""
    shutil.copytree(made, here, dirs_exist_ok=True)
    return here


def pair_of(name):
    return penult.load(f"{name}.penult.safetensors")


@pytest.mark.parametrize("asked", [None, "directional", "energy", "max-logit", "msp", "density"])
def test_a_table_holds_what_the_library_gives(place, penult_json, asked):
    options = () if asked is None else ("--score", asked)
    facts = penult_json("score", "elliptic.penult.safetensors", "new", *options, "--out", "scores.csv")
    pair, acts = pair_of("elliptic"), penult.Activations.open("new")
    expected = getattr(scores, (asked or "directional").replace("-", "_"))(pair, acts.activations)
    assert facts["score"] == (asked or "directional")
    assert facts["count"] == 60
    with open("scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert {row["file"] + row["verdict"] + row["class_name"] for row in rows} == {""}
    assert [int(row["index"]) for row in rows] == list(range(60))
    assert torch.equal(torch.tensor([float(row["score"]) for row in rows]), expected)  # to the last bit
    assert [int(row["predicted"]) for row in rows] == acts.predicted.tolist()
    confidence = torch.tensor([float(row["confidence"]) for row in rows])
    assert torch.allclose(confidence, acts.logits.softmax(-1).amax(-1), atol=1e-6)
    assert {row["p_value"] + row["strange"] for row in rows} == {""}
    assert facts["strangest"][0]["index"] == int(expected.argmax())
    assert facts["most_familiar"][0]["score"] == float(expected.min())
    assert facts["quantiles"]["most"] == float(expected.max())


def test_the_score_of_the_file_is_used(place, penult_json):
    facts = penult_json("score", "kept.penult.safetensors", "new", "--out", "scores.npz")
    acts = penult.Activations.open("new").activations
    with numpy.load("scores.npz") as file:
        assert torch.equal(torch.from_numpy(file["score"]), scores.load("kept.penult.safetensors")(acts))
    assert facts["score"] == "composite"


@pytest.mark.parametrize("asked", [None, "composite", "mahalanobis", "relative-mahalanobis", "knn", "vim"])
def test_scores_are_fitted_to_reference_activations(place, penult_json, asked):
    options = () if asked is None else ("--score", asked)
    run = ("score", "elliptic.penult.safetensors", "new", "--reference", "pool", *options)
    facts = penult_json(*run, "--out", "scores.npz", "--calibrate", "familiar")
    head, pool = pair_of("elliptic").head, penult.Activations.open("pool")
    fitted = {
        "composite": lambda: scores.Composite.fit(head, pool),
        "mahalanobis": lambda: scores.Mahalanobis.fit(pool, head=head, normalize=True),
        "relative-mahalanobis": lambda: scores.RelativeMahalanobis.fit(pool, head=head),
        "knn": lambda: scores.KNN.fit(pool),
        "vim": lambda: scores.ViM.fit(head, pool),
    }[asked or "composite"]()
    with numpy.load("scores.npz") as file:
        found = torch.from_numpy(file["score"])
    assert torch.equal(found, fitted(penult.Activations.open("new").activations))
    assert facts["score"] == (asked or "composite")
    familiar = fitted(penult.Activations.open("familiar").activations)
    assert facts["auroc"] == scores.separation(familiar, found).auroc


def test_a_set_that_is_told_apart_is_said_to_be(place):
    noise = penult.Activations.open("new")
    penult.Activations(3 * torch.rand_like(noise.activations), noise.logits).save("noise")
    acts = penult.Activations.open("noise").activations
    head = pair_of("kept").head
    penult.Activations(acts, head(acts)).save("far")
    done = CliRunner().invoke(app, ["score", "kept.penult.safetensors", "far", "--calibrate", "familiar"])
    assert done.exit_code == 0, done.output
    assert "the alarm tells far from familiar (AUROC" in done.stdout


def test_a_score_that_does_better_is_named(place):
    # Lengths are no matter to the neighbours of normalised activations.
    head, pool = pair_of("kept").head, penult.Activations.open("familiar")
    acts = pool.activations[:100] / 20
    penult.Activations(acts, head(acts)).save("short")
    run = ["score", "kept.penult.safetensors", "short", "--calibrate", "familiar", "--reference", "pool"]
    done = CliRunner().invoke(app, [*run, "--score", "knn"])
    assert done.exit_code == 0, done.output
    assert "the alarm hardly tells short from familiar" in done.stdout
    assert "does better (AUROC" in done.stdout.replace("\n", " ")


def test_with_familiar_inputs_there_are_p_values_and_a_verdict(place, penult_json):
    arguments = ("score", "elliptic.penult.safetensors", "new", "--calibrate", "familiar", "--false-alarm", "0.1")
    facts = penult_json(*arguments, "--out", "scores.npz")
    pair = pair_of("elliptic")
    new, familiar = (penult.Activations.open(name).activations for name in ("new", "familiar"))
    threshold = scores.Threshold.fit(scores.directional, familiar, pair=pair, false_alarm=0.1)
    with numpy.load("scores.npz") as file:
        arrays = dict(file)
    # A folder that was saved in Python knows no files, and the head no names.
    assert list(arrays) == [name for name in COLUMNS if name not in ("file", "class_name")]
    assert (arrays["verdict"] == numpy.where(arrays["strange"], "outlier", "familiar")).all()
    assert torch.equal(torch.from_numpy(arrays["p_value"]), threshold.p_value(new))
    assert torch.equal(torch.from_numpy(arrays["strange"]), threshold(new))
    assert facts["threshold"] == threshold.value
    assert facts["false_alarm_bound"] == threshold.rate_bound()
    assert facts["strange"] == int(threshold(new).sum())
    penult_json(*arguments, "--out", "scores.csv")
    with open("scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["strange"] for row in rows] == ["true" if each else "false" for each in arrays["strange"]]
    assert "strange" not in penult_json("score", "elliptic.penult.safetensors", "new")
    assert {file.name for file in place.glob("*scores*")} == {"scores.csv", "scores.npz"}  # nothing beside them


def test_images_are_read_by_the_network(place, penult_json):
    stored = penult_json("score", "elliptic.penult.safetensors", "new", "--calibrate", "familiar")
    run = ("score", "elliptic.penult.safetensors", "new.npz", *MODEL, "--batch-size", "25")
    # labels of sixty classes mean other things than those of ten, and no score asks for them
    found = penult_json(*run, "--calibrate", "familiar")
    assert found["strange"] == stored["strange"]
    for one, other in zip(found["strangest"], stored["strangest"], strict=True):
        assert one["index"] == other["index"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
    normal = penult_json("score", "elliptic.penult.safetensors", "half.npz", *MODEL, "--mean", "0.5", "--std", "0.5")
    assert normal["quantiles"]["median"] == pytest.approx(found["quantiles"]["median"], abs=1e-3)


@pytest.mark.parametrize(
    ("pair", "options", "said"),
    [
        ("elliptic", (), "score: directional, since the base is an elliptic sphere; a pair of penult fit holds"),
        ("mixture", (), "score: energy, since the base is a "),
        ("kept", (), "score: composite, which the file of the pair holds; higher is stranger"),
        ("kept", ("--score", "energy"), "score: energy, as given by --score"),
        ("kept", ("--reference", "pool", "--score", "knn"), "score: knn, fitted to 600 activations of --reference"),
        ("kept", ("--calibrate", "familiar"), "the alarm hardly tells new from familiar (AUROC 0."),
        ("elliptic", ("--score", "max-logit"), "score: max-logit, as given by --score"),
        ("elliptic", ("--calibrate", "familiar"), "at most 5% are called strange on average over such sets of 200"),
        ("elliptic", ("--calibrate", "familiar"), "p-value"),
    ],
)
def test_what_it_says(place, pair, options, said):
    done = CliRunner().invoke(app, ["score", f"{pair}.penult.safetensors", "new", *options])
    assert done.exit_code == 0, done.output
    assert said in done.stdout
    assert "most familiar" in done.stdout
    assert "median" in done.stdout


def test_another_prior_or_temperature_is_still_the_same_network(place, penult_json):
    pair = pair_of("elliptic")
    pair.with_prior(torch.arange(1.0, 11.0)).save("shifted.penult.safetensors")
    penult.GenerativePair(pair.head.with_temperature(2.0), pair.base).save("warm.penult.safetensors")
    for name in ("shifted", "warm"):
        assert penult_json("score", f"{name}.penult.safetensors", "new")["count"] == 60


def test_bad_input_is_refused_in_one_line(place, refused):
    run = ("score", "elliptic.penult.safetensors")
    assert "does not exist" in refused("score", "none.penult.safetensors", "new")
    assert "there is no file or folder 'nowhere'" in refused(*run, "nowhere")
    assert "give --model package.module:factory" in refused(*run, "new.npz")
    assert "name.csv" in refused(*run, "new", "--out", "scores.txt")
    assert "goes with --calibrate" in refused(*run, "new", "--false-alarm", "0.1")
    assert "are both new" in refused(*run, "new", "--calibrate", "new")
    assert "200 familiar activations cannot keep" in refused(
        *run, "new", "--calibrate", "familiar", "--false-alarm", "0.001"
    )
    assert "expected a number between 0 and 1" in refused(*run, "new", "--calibrate", "familiar", "--false-alarm", "2")
    assert "has to be fitted: give familiar activations with --reference" in refused(*run, "new", "--score", "vim")
    assert "or a pair of penult fit, which holds" in refused(*run, "new", "--score", "composite")
    assert "leave --reference out" in refused(*run, "new", "--reference", "pool", "--score", "msp")
    assert "--reference and --calibrate are both pool" in refused(
        *run, "new", "--reference", "pool", "--calibrate", "pool"
    )
    assert "needs a pair on a sphere" in refused("score", "mixture.penult.safetensors", "new", "--score", "directional")
    assert "cannot be used here" in refused(*run, "new", "--device", "cuda:99")
    small = ("--model", "usernets:Nets.small")
    assert "dimension 16 and 10 classes" in refused(*run, "new.npz", *small)
    other = ("--model", "usernets:trained", "--weights", "digits.safetensors")
    assert "Give the head or pair of this very network" in refused(*run, "new.npz", *other)
    assert not (place / "scores.txt").exists()


def test_a_pair_without_density_is_refused(place, refused, monkeypatch):
    from penult.cli._scores import ScoreName, score_of

    head = pair_of("elliptic").head

    class Sampler:
        def sample(self, shape=()):
            return torch.randn(*shape, 64)

    pair = penult.GenerativePair(head, penult.Marginal(head, Sampler(), samples=100))
    with pytest.raises(ValueError, match="density"):
        score_of(pair, ScoreName.density)


def test_classes_are_called_as_those_of_the_network_and_not_as_strange_inputs():
    """CIFAR-10 has as many classes as MNIST."""
    from penult.cli.score import _class_names

    h = torch.eye(10).repeat(20, 1)
    digits = tuple("0123456789")
    own = penult.Activations(h, 5 * h, torch.arange(10).repeat(20), digits)
    strange = penult.Activations(h, 5 * h, torch.arange(10).repeat_interleave(20), tuple("abcdefghij"))
    assert _class_names(own, strange) == _class_names(None, own) == digits
    assert _class_names(None, strange) is None


def test_what_takes_its_time_is_said_where_nobody_sees_it_turn(capsys):
    from penult.cli._console import RichReporter

    with RichReporter().waiting("fitting the [mixture] base"):
        assert capsys.readouterr().err == "fitting the [mixture] base ...\n"


def test_help_has_examples():
    shown = CliRunner().invoke(app, ["score", "--help"], env={"TERMINAL_WIDTH": "100"}).stdout
    assert shown.count("Example: penult score") == 2
