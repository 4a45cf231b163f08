"""The way of a user: from a model and images to activations, a fitted pair, and draws."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import penult
from penult.cli import app


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A folder for the activations that every test here starts from, filled by the first one."""
    return tmp_path_factory.mktemp("extracted") / "acts"


@pytest.fixture
def activations(penult_json, here, extracted):
    if extracted.exists():
        shutil.copytree(extracted, here / "acts")
        return here / "acts"
    facts = penult_json("extract", "usernets:trained", "digits", "--out", "acts", "--batch-size", "300")
    assert facts == {
        "out": "acts", "samples": 1797, "features": 64, "classes": 10, "labels": True, "dtype": "float32",
        "pre_activation": False, "resumed_after_shards": 0, "was_complete": False,
    }  # fmt: skip
    shutil.copytree(here / "acts", extracted)
    return here / "acts"


def test_from_model_to_draws(penult_json, here, activations):
    acts = penult.Activations.open(activations)
    assert acts.class_names == tuple(map(str, range(10)))
    facts = penult_json("fit", activations, "--components", "8", "--dims", "8", "--out", "net.penult.safetensors")
    assert facts["base"] == "mixture"
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
        (["--base", "elliptic", "--trim", "0.2"], "scale_tril=(64, 64)"),
        (["--base", "sphere", "--no-ambient"], "subspace=(9, 64)"),
        (["--base", "gaussian"], "Gaussian(loc=(64,), covariance_matrix=(64, 64))"),
        (["--components", "7", "--dims", "5"], "PrincipalMixture(7 components in 5 of 64 dimensions"),
        (["--base", "class", "--dims", "5"], "PrincipalMixture(10 components in 5 of 64 dimensions"),
        (["--base", "bank"], "Bank(1797 rows of dimension 64), standard_error=0"),
    ],
)
def test_bases(here, activations, options, kind):
    done = CliRunner().invoke(app, ["fit", "acts", "--out", "net.penult.safetensors", *options])
    assert done.exit_code == 0, done.output
    assert kind in done.stdout
    assert "implied prior" in done.stdout


@pytest.mark.slow
def test_the_default_is_that_of_the_library_and_the_seed_counts(penult_json, here, activations):
    penult_json("fit", "acts", "--out", "a.safetensors")
    penult_json("fit", "acts", "--out", "b.safetensors", "--seed", "1")
    a, b = (penult.load(name) for name in ("a.safetensors", "b.safetensors"))
    law = penult.Marginal.fit(a.head, penult.Activations.open(activations)).distribution
    draws = [
        each.sample((50,), generator=torch.Generator().manual_seed(0))
        for each in (law, a.base.distribution, b.base.distribution)
    ]
    assert torch.allclose(draws[0], draws[1], atol=1e-6)
    assert not torch.allclose(draws[0], draws[2], atol=1e-6)


@pytest.fixture
def few(monkeypatch):
    """Candidates that are compared in a moment."""
    from penult.realism import CANDIDATES, _choose

    names = ("sphere", "gaussian", "bank")
    monkeypatch.setattr(_choose, "CANDIDATES", {name: CANDIDATES[name] for name in names})
    return names


@pytest.mark.slow
def test_auto_takes_the_recommended_base(penult_json, here, activations, few):
    penult.Activations.open(activations)[::4].save("some")
    command = ("fit", "some", "--head", "acts/head.penult.safetensors", "--base", "auto", "--out", "net.safetensors")
    facts = penult_json(*command)
    assert facts["base"] == facts["ranking"]["best"] == "bank"
    assert {row["name"] for row in facts["ranking"]["rows"]} == set(few)
    assert facts["ranking"]["fitted_rows"] + facts["ranking"]["held_out_rows"] == facts["samples"] == 450
    law = penult.load("net.safetensors").base.distribution
    assert law.replacement
    assert len(law) == 450  # fitted to all
    done = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert "<- best" in done.stdout
    assert "bank stores" in done.stdout  # the reason
    assert "holds real activations" in done.stdout
    assert "candidates" in done.stderr
    assert "try --base auto" not in done.stdout


def test_every_candidate_is_a_base_of_the_command():
    from penult.cli.fit import BaseName
    from penult.realism import CANDIDATES

    assert set(CANDIDATES) <= {name.value for name in BaseName}


def test_the_file_holds_the_recommended_score(penult_json, here, activations):
    acts = penult.Activations.open(activations)
    fit = ("fit", activations, "--base", "sphere", "--out", "net.penult.safetensors")
    assert penult_json(*fit)["score"] == "composite"
    score = penult.scores.load("net.penult.safetensors")
    assert torch.equal(score(acts.activations), penult.scores.Composite.fit(score.head, acts)(acts.activations))
    assert penult_json(*fit, "--no-score")["score"] is None
    assert isinstance(penult.scores.load("net.penult.safetensors"), penult.scores.PairScore)
    trimmed = ("fit", activations, "--base", "elliptic", "--trim", "0.2", "--out", "net.penult.safetensors")
    assert penult_json(*trimmed)["score"] == "composite"
    expected = penult.scores.Composite.fit(score.head, acts, trim=0.2)(acts.activations)
    assert torch.equal(penult.scores.load("net.penult.safetensors")(acts.activations), expected)


def test_too_few_activations_for_a_score(here, activations):
    acts = penult.Activations.open(activations)
    acts[:10].save("few")
    command = ["fit", "few", "--head", "acts/head.penult.safetensors", "--base", "bank", "--out", "net.safetensors"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "the file holds no outlier score: activations has shape (10, 64)" in done.output
    assert penult.load("net.safetensors").head.num_classes == 10


@pytest.mark.slow
def test_a_flow_is_fitted_saved_and_drawn_from(penult_json, here, activations):
    pytest.importorskip("zuko")
    penult_json("sample", "acts/head.penult.safetensors", "-n", "60", "--out", "few")
    assert penult_json("fit", "few", "--base", "flow", "--out", "flow.safetensors")["base"] == "flow"
    assert penult_json("sample", "flow.safetensors", "-n", "7", "--out", "drawn")["samples"] == 7


def test_the_prior_of_other_activations(penult_json, refused, here):
    pair = penult.GenerativePair(penult.Head(4 * torch.eye(3)), penult.Sphere(2.0))
    pair.save("head.safetensors")
    g = torch.Generator().manual_seed(0)
    shares = {"even": [400, 400, 400], "shifted": [960, 180, 60]}
    for name, counts in shares.items():
        h = pair.given(torch.arange(3).repeat_interleave(torch.tensor(counts))).sample(generator=g)
        penult.Activations(h, pair.head(h)).save(name)
    command = ("fit", "even", "--head", "head.safetensors", "--out", "out.safetensors")
    assert penult_json(*command)["prior"] == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=0.03)
    facts = penult_json(*command, "--prior-from", "shifted")
    assert facts["prior_from"] == "shifted"
    assert facts["prior"] == pytest.approx([0.8, 0.15, 0.05], abs=0.03)
    assert facts["draws_accuracy"] == pytest.approx(facts["draws_confidence"], abs=0.05)
    even = penult.Activations.open("even")
    labels = torch.distributions.Categorical(logits=even.logits + torch.tensor([0.0, 0.0, 1.0])).sample()
    penult.Activations(even.activations, even.logits, labels).save("labelled")
    penult_json("fit", "labelled", *command[2:], "--prior-from", "shifted")
    # The labels say that the biases of the head are off by (0, 0, 1), and an estimate relies on them.
    assert penult.load("out.safetensors").base.head.bias[2] > penult.load("out.safetensors").base.head.bias[0] + 0.5
    penult_json(*command, "--base", "gaussian", "--prior-from", "shifted")
    assert penult.load("out.safetensors").prior.probs.tolist() == pytest.approx([0.8, 0.15, 0.05], abs=0.04)
    penult.Activations(torch.eye(3), torch.zeros(3, 3)).save("alien")
    assert "does not give the logits stored in alien" in refused(*command, "--prior-from", "alien")


@pytest.mark.slow
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


@pytest.mark.slow
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
    words = "right before the head is 'AdaptiveAvgPool2d', not a ReLU"
    assert words in refused("extract", "usernets:trained", "digits", "--out", "pooled", "--pre-activation")
    assert not (here / "pooled").exists()

    fitted = penult_json("fit", "u", "--out", "u.safetensors")
    assert fitted["stored_confidence"] == pytest.approx(h.logits.softmax(-1).amax(-1).mean().item(), abs=0.02)
    penult_json("sample", "u.safetensors", "-n", "300", "--out", "drawn")
    drawn = penult.Activations.open(here / "drawn").activations
    assert float((drawn == 0).double().mean()) == pytest.approx(float((h.activations == 0).double().mean()), abs=0.05)
    assert penult_json("fit", "u", "--base", "gaussian", "--out", "u.safetensors")["base"] == "gaussian"


@pytest.mark.slow
def test_activations_after_a_relu_are_warned_of_in_one_line(penult_json, here, few, monkeypatch):
    (here / "rectifiednets.py").write_text(RECTIFIED)
    monkeypatch.delitem(sys.modules, "rectifiednets", raising=False)
    penult_json("extract", "rectifiednets:mlp", "digits", "--out", "h")
    penult_json("extract", "rectifiednets:mlp", "digits", "--out", "u", "--pre-activation")
    for name in ("h", "u"):
        penult.Activations.open(name)[::4].save(f"{name}-few")
    for base, folder, lines in [("class", "h", 1), ("auto", "h", 1), ("class", "u", 0), ("bank", "h", 0)]:
        done = CliRunner().invoke(
            app,
            [
                "fit",
                f"{folder}-few",
                "--head",
                f"{folder}/head.penult.safetensors",
                "--base",
                base,
                "--out",
                "x.safetensors",
            ],
        )
        assert done.exit_code == 0, done.output + repr(done.exception)
        warned = [line for line in done.stderr.splitlines() if "ReLU" in line]
        assert len(warned) == lines, (base, folder)
        for line in warned:
            assert line.startswith("penult: warning: a ReLU stands right before this head, and h-few holds its output")
            assert "penult extract --pre-activation" in line
        assert "UserWarning" not in done.stderr


def test_warnings_of_the_library_are_lines_said_once(capsys):
    import warnings

    from penult.cli._console import warnings_as_lines

    with warnings_as_lines(), warnings.catch_warnings():
        for text in ("a\n  thing", "a\n  thing", "another"):
            warnings.warn(text, UserWarning, stacklevel=1)
        with pytest.raises(DeprecationWarning):  # is none of the user's
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "penult: warning: a thing\npenult: warning: another\n"


def test_a_class_too_rare_to_draw_is_said_in_one_line(refused, penult_json, here):
    head = penult.Head(torch.eye(3, 4), torch.tensor([0.0, 0.0, -30.0]))
    h = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    penult.GenerativePair(head, penult.Marginal.fit(head, h, components=1)).save("rare.safetensors")
    line = refused("sample", "rare.safetensors", "-n", "1000", "--class", "2", "--out", "x")
    assert "class 2 has prior" in line
    assert "Sample fewer" in line
    assert not (here / "x").exists()
    penult.GenerativePair(head, penult.Marginal.fit(head, h, kind="bank")).save("bank.safetensors")
    assert penult_json("sample", "bank.safetensors", "-n", "1000", "--class", "2", "--out", "x")["samples"] == 1000


def test_what_is_there_is_not_replaced(penult_json, refused, here):
    penult.GenerativePair(penult.Head(torch.eye(3)), penult.Sphere(2.0)).save("toy.safetensors")
    penult_json("sample", "toy.safetensors", "-n", "5", "--out", "x")
    line = refused("sample", "toy.safetensors", "-n", "5", "--out", "x")
    assert "or pass --overwrite to replace them" in line


def test_a_head_of_its_own(penult_json, here, activations):
    penult_json("head", "usernets:trained", "--shape", "1,8,8", "--out", "head.penult.safetensors")
    penult_json(
        "fit", "acts", "--head", "head.penult.safetensors", "--base", "sphere", "--out", "net.penult.safetensors"
    )
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
        (["extract", "digits.safetensors", "digits", "--out", "x"], "the network has to run; give"),
        (["extract", "usernets:trained", "gone", "--out", "x"], "gone"),
        (["fit", "nowhere", "--out", "x.safetensors"], "nowhere"),
        (
            ["fit", "acts", "--head", "digits.safetensors", "--out", "x.safetensors"],
            "does not give the logits stored in acts",
        ),
        (
            ["fit", "acts", "--head", "two.safetensors", "--weight-key", "a.weight", "--out", "x.safetensors"],
            "as the head in two.safetensors",
        ),
        (["fit", "acts", "--head", "gone.safetensors", "--out", "x.safetensors"], "gone.safetensors does not exist"),
        (["fit", "acts", "--out", "no/such/folder.safetensors"], "no/such"),
        (["fit", "acts", "--prior-from", "nowhere", "--out", "x.safetensors"], "nowhere"),
        (["fit", "acts", "--base", "bank", "--dims", "3", "--out", "x.safetensors"], "the bank base has no --dims"),
        (["fit", "acts", "--base", "class", "--components", "3", "--out", "x.safetensors"], "goes with --base mixture"),
        (["fit", "acts", "--no-ambient", "--out", "x.safetensors"], "goes with --base sphere or centered or elliptic"),
        (
            ["fit", "acts", "--base", "auto", "--ambient", "--out", "x.safetensors"],
            "--base auto compares bases with",
        ),
        (["sample", "gone.safetensors", "--out", "x"], "does not exist"),
        (["sample", "digits.safetensors", "--class", "10", "--out", "x"], "is 10, out of range"),
        (["sample", "digits.safetensors", "--out", "acts"], "acts"),
        (["sample", "digits.safetensors", "--out", "d.npz"], "expected a folder, a name without .npz"),
        (["sample", "acts", "--out", "x"], "is a folder; a pair is a file"),
        (["fit", "acts", "--out", "x.pth"], "expected a .safetensors file"),
        (
            ["extract", "usernets:trained", "digits", "--mode", "RGB", "--out", "x"],
            "given images of shape (16, 3, 8, 8)",
        ),
    ],
)
def test_bad_input(refused, activations, arguments, words):
    assert words in refused(*arguments)


def test_labels_of_other_classes_are_left_out(penult_json, here):
    rng = np.random.default_rng(0)
    np.savez("other.npz", images=rng.random((20, 1, 8, 8), dtype=np.float32), labels=np.arange(20))
    facts = penult_json("extract", "usernets:trained", "other.npz", "--out", "other")
    assert not facts["labels"]
    assert penult.Activations.open(here / "other").labels is None
