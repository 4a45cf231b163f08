"""Makes the files of ``saved/``: one of each kind that penult writes, and the numbers that it computes from them.

The files that are committed were made by the version that ``expected.json`` names, before the modules of penult were
rearranged. `test_saved_files.py` shows that they still load and give the same numbers. Files are made anew, by any
version, in another folder::

    cd tests && PYTHONPATH=../src:. python -m compatibility.make --out /tmp/made

Public names and commands alone are used, so that this runs on other trees.
"""

import argparse
import functools
import importlib
import inspect
import json
import os
import pickle
import re
import shutil
import sys
import types
import warnings
from pathlib import Path

import lightning
import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import penult
from compatibility.computed import (
    CLASS_NAMES,
    CLASSES,
    DISTILL,
    EXTRACT,
    FEATURES,
    GENERATE,
    IMAGE,
    batches_of,
    classifier,
    normed_classifier,
    numbers_of_distributions,
    numbers_of_gate,
    numbers_of_generator,
    numbers_of_losses,
    numbers_of_pair,
    numbers_of_score,
    numbers_of_student,
    numbers_of_threshold,
    read_images,
    seeded,
    student,
    tensors_of,
    unpickled,
)
from penult import Activations, Gaussian, GenerativePair, Head, Marginal, Sphere, Tap
from penult.cli import app
from penult.distill import ActivationLoss, Distiller, Gate, SoftTargetLoss, targets
from penult.distributions import Bank, NormalizingFlow
from penult.generate import ActivationGAN, ActivationVAE
from penult.scores import KNN, Mahalanobis, RelativeMahalanobis, Threshold, ViM, directional

PAGES = Path(__file__).resolve().parents[2] / "docs" / "api"
PICKLED_PAIRS = ("sphere-elliptic", "gaussian-full", "mixture", "flow", "bank")


def main():
    """Make all files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="Folder that gets saved/ and public_names.txt.")
    out = parser.parse_args().out.absolute()
    folder = out / "saved"
    folder.mkdir(parents=True)
    (out / "public_names.txt").write_text("".join(f"{name}\n" for name in public_names()), encoding="utf-8")
    os.chdir(folder)  # commands record paths as they are given
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # remarks about tiny trainings
    make(folder)


def make(folder):
    """Write all files to `folder`, which is the current one."""
    expected, facts = {}, {}
    write_images("images.npz")
    images, image_labels = read_images("images.npz")
    inputs = inputs_of()
    rows, labels, shown = inputs["rows"], inputs["labels"], inputs[f"shown_{FEATURES}"]
    tap, normed_head = networks(images, image_labels)

    def note(name, numbers):
        expected.update({f"{name}/{key}": tensor for key, tensor in numbers.items()})

    Path("pairs").mkdir()
    pairs = pairs_of(inputs, images, tap, normed_head)
    for name, pair in pairs.items():
        pair.save(f"pairs/{name}.penult.safetensors")
        note(f"pairs/{name}", numbers_of_pair(pair, inputs[f"shown_{pair.head.in_features}"]))
        facts[f"pairs/{name}"] = {"head": str(pair.head), "base": str(pair.base), "info": str(pair.base.info)}

    sets = sets_of(pairs, rows, labels)
    for name, (acts, shard_size) in sets.items():
        acts.save(f"activations/{name}", shard_size=shard_size)
    penult.extract(tap, batches_of(images, image_labels), "activations/extracted", **EXTRACT)
    for path in sorted(Path("activations").iterdir()):
        acts = Activations.open(path)
        note(f"activations/{path.name}", tensors_of(acts))
        facts[f"activations/{path.name}"] = {
            "repr": str(acts),
            "class_names": acts.class_names,
            "pre_activation": acts.pre_activation,
        }

    scores, thresholds = scores_of(pairs, rows, labels), thresholds_of(pairs, rows)
    gate = Gate.fit(pairs["sphere-elliptic"], rows, labels, class_names=CLASS_NAMES)
    Path("states").mkdir()
    for name, score in scores.items():
        note(name, numbers_of_score(score, shown))
    for name, threshold in thresholds.items():
        note(name, numbers_of_threshold(threshold, shown))
        facts[name] = str(threshold)
    note("gate", numbers_of_gate(gate, shown))
    facts["gate"] = str(gate.summary)
    for name, module in (scores | thresholds | {"gate": gate}).items():
        save_file(whole(module.state_dict()), f"states/{name}.safetensors")
    for name in ("sphere-elliptic", "mixture"):
        torch.save(pairs[name].state_dict(), f"states/pair-{name}.pt")

    Path("checkpoints").mkdir()
    generators = generators_of(pairs["certificate-relu-mixture"], tap, images)
    for name, generator in generators.items():
        generator.save(f"{name}.safetensors")
        note(name, numbers_of_generator(generator, images))
    distiller = distiller_of(pairs["certificate-relu"], images, image_labels)
    note("distiller", numbers_of_student(distiller.export(), images))

    for command in (DISTILL, GENERATE):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output + repr(done.exception)
    learnt = student()
    learnt.load_state_dict(load_file("distilled/student.safetensors"))
    note("distilled", numbers_of_student(learnt, images))
    note("generated", numbers_of_generator(penult.generate.load("generated/generator.safetensors")))
    for run in ("distilled", "generated"):  # pages and pictures are never read again
        Path(run, "index.html").unlink()
        shutil.rmtree(Path(run, "samples"), ignore_errors=True)

    laws, losses = distributions_of(pairs), losses_of(pairs["certificate-relu"])
    note("distributions", numbers_of_distributions(laws, shown))
    note("losses", numbers_of_losses(losses))
    picked = Activations.open(folder / "activations/before-relu").split(0.5, 0.5)[1]
    note("activations-picked", tensors_of(picked))
    facts["pickled_names"] = pickles(
        folder,
        {
            "head.pkl": pairs["certificate-layernorm"].head,
            "head.pt": pairs["calibrated"].head,
            **{f"pair-{name}.pt": pairs[name] for name in PICKLED_PAIRS},
            "activations.pkl": sets["labelled"][0],
            "activations-opened.pkl": Activations.open(folder / "activations/labelled"),
            "activations-picked.pkl": picked,
            "distributions.pkl": laws,
            **{f"{name}.pt": module for name, module in (scores | thresholds | generators).items()},
            "gate.pt": gate,
            "losses.pt": losses,
            "tap.pt": tap,
        },
    )
    facts["versions"] = {"penult": penult.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    expected |= {f"inputs/{name}": inputs[name] for name in inputs if name.startswith("shown")}
    save_file(whole(expected), "expected.safetensors")
    Path("expected.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


# --- what is saved ------------------------------------------------------------------------------------------


def write_images(path):
    """Images of four classes: a motif each, and noise."""
    g, labels = seeded(7), torch.arange(96) % CLASSES
    motifs = torch.rand(CLASSES, *IMAGE[1:], generator=g)
    noisy = 0.7 * motifs[labels] + 0.3 * torch.rand(len(labels), *IMAGE[1:], generator=g)
    numpy.savez_compressed(path, images=(255 * noisy).to(torch.uint8).numpy(), labels=labels.numpy())


def inputs_of():
    """A head, labelled activations that laws are fitted to, and positive ones that laws are computed at."""
    g = seeded(0)
    centers = 2 * torch.rand(CLASSES, FEATURES, generator=g, dtype=torch.float64)
    labels = torch.arange(80) % CLASSES
    return {
        "labels": labels,
        "rows": centers[labels] + 0.6 * torch.randn(80, FEATURES, generator=g, dtype=torch.float64),
        "weight": centers + torch.randn(CLASSES, FEATURES, generator=g, dtype=torch.float64),
        "bias": torch.randn(CLASSES, generator=g, dtype=torch.float64) / 3,
        **{f"shown_{d}": 0.1 + 1.5 * torch.rand(5, d, generator=g, dtype=torch.float64) for d in (FEATURES, 8)},
    }


def networks(images, labels):
    """The tap of a classifier after some steps of training, and the head of another; the states are written."""
    trained = {"classifier": classifier(), "normed": normed_classifier()}
    for name, net in trained.items():
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        net.eval().requires_grad_(False)
        save_file(net.state_dict(), f"{name}.safetensors")
    tap = Tap(trained["classifier"], penult.find_head(trained["classifier"], images[:16]))
    return tap, penult.find_head(trained["normed"], images[:16])


def pairs_of(inputs, images, tap, normed_head):
    """Pairs of each base, and of heads that were calibrated, found, or given another prior."""
    rows, labels = inputs["rows"], inputs["labels"]
    head = Head(inputs["weight"], inputs["bias"])
    single = Head(inputs["weight"].float())
    half = Head(inputs["weight"].bfloat16(), inputs["bias"].bfloat16())
    seen = penult.extract(tap, [images], pre_activation=True)
    calibrated = head.calibrate(head(rows), labels)
    marginal = functools.partial(Marginal.fit, head)
    bases = {
        "sphere-plain": Sphere(2.0),
        "sphere-span": Sphere.from_head(head, confidence=0.9),
        "sphere-round": Sphere.fit(head, rows, radii=16),
        "sphere-centered": Sphere.fit(head, rows, shape="centered", ambient=False, radii=16),
        "sphere-elliptic": Sphere.fit(head, rows, shape="elliptic", radii=16),
        "gaussian-full": Gaussian.fit(head, rows),
        "gaussian-diag": Gaussian.fit(head, rows, covariance_type="diag"),
        "gaussian-spherical": Gaussian.fit(head, rows, covariance_type="spherical"),
        "mixture": marginal(rows, components=3, dims=3),
        "mixture-positive": marginal(rows.abs() + 0.1, components=3, dims=3, positive=True),
        "mixture-rectified": marginal(rows - 1, components=3, dims=3, rectified=True),
        "class": marginal(rows, kind="class", dims=3),
        "flow": Marginal(head, NormalizingFlow.fit(rows, components=2, iterations=20, epochs=1)),
        "bank": marginal(rows[:40], kind="bank"),
        "bank-rectified": Marginal(head, Bank(rows[:40] - 1, replacement=False, rectified=True)),
    }
    pairs = {name: GenerativePair(head, base) for name, base in bases.items()}
    other = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    return pairs | {
        "sphere-data-free": GenerativePair(single),
        "sphere-bfloat16": GenerativePair(half, Sphere.fit(half, rows.bfloat16(), radii=8)),
        "prior-gaussian": pairs["gaussian-full"].with_prior(other),
        "prior-mixture": pairs["mixture"].with_prior(other),
        "calibrated": GenerativePair(calibrated, Sphere.fit(calibrated, rows, radii=8)),
        "certificate-relu": GenerativePair(tap.head),
        "certificate-relu-mixture": GenerativePair(tap.head, Marginal.fit(tap.head, seen, components=3, dims=3)),
        "certificate-layernorm": GenerativePair(normed_head, Sphere.from_head(normed_head, ambient=True)),
    }


def sets_of(pairs, rows, labels):
    """Sets of activations, and the bytes of a shard of each."""
    head = pairs["gaussian-full"].head
    single = rows[:20].float()
    logits = head(rows[:20]).float()
    return {
        "labelled": (Activations(single, logits, labels[:20], CLASS_NAMES), 400),
        "before-relu": (Activations((single - 1).half(), logits.half(), pre_activation=True), 200),
        "double": (Activations(rows[:5], logits[:5].double(), labels[:5]), 1 << 20),
    }


def scores_of(pairs, rows, labels):
    """One of each score that is fitted."""
    return {
        "mahalanobis": Mahalanobis.fit(rows, labels),
        "relative-mahalanobis": RelativeMahalanobis.fit(rows, labels),
        "knn": KNN.fit(rows[:40], k=3),
        "vim": ViM.fit(pairs["gaussian-full"].head, rows, dims=3),
    }


def thresholds_of(pairs, rows):
    """A threshold of a score of a pair, and one of a fitted score."""
    return {
        "threshold-directional": Threshold.fit(directional, rows, pair=pairs["sphere-elliptic"], false_alarm=0.1),
        "threshold-knn": Threshold.fit(KNN.fit(rows[:40], k=3), rows[40:], false_alarm=0.2),
    }


def distributions_of(pairs):
    """One of each distribution."""
    loc = nn.functional.normalize(torch.ones(FEATURES, dtype=torch.float64), dim=0)
    return {
        "bank": pairs["bank"].base.distribution,
        "flow": pairs["flow"].base.distribution,
        "mixture": pairs["mixture"].base.distribution,
        "tilt": pairs["gaussian-full"].given(1),
        "von-mises-fisher": penult.VonMisesFisher(loc, torch.tensor(3.0, dtype=torch.float64)),
    }


def generators_of(pair, tap, images):
    """Both generators after a short training."""
    data = TensorDataset(images, penult.extract(tap, [images]).activations)
    vae, gan = ActivationVAE(pair, tap, IMAGE, latent=2, width=6), ActivationGAN(pair, tap, IMAGE, latent=2, width=2)
    return {"vae": fit(vae, data), "gan": fit(gan, data)}


def losses_of(pair):
    """Losses of students."""
    return {"soft": SoftTargetLoss(), "activation": ActivationLoss(pair, in_features=5)}


def distiller_of(pair, images, labels):
    """A `Distiller` after a short training."""
    data = TensorDataset(images, labels, targets(pair, labels, "activation"))
    return fit(Distiller(student(), ActivationLoss(pair, in_features=5)), data)


def fit(module, data):
    """Train for an epoch, and write a checkpoint of the weights."""
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, 32, shuffle=True, generator=seeded(0)))
    trainer.save_checkpoint(Path("checkpoints", f"{type(module).__name__}.ckpt"), weights_only=True)
    return module.eval()


def pickles(folder, objects):
    """Pickle objects by file name, and give the dotted names of penult in each file."""
    Path("pickles").mkdir()
    names = {}
    for file, made in objects.items():
        path = Path("pickles", file)
        if path.suffix == ".pt":
            torch.save(made, path)
        else:
            path.write_bytes(pickle.dumps(made))
        names[file] = sorted(unpickled(path, folder / "activations")[1])
    return names


def whole(tensors):
    """Tensors that share no memory, as safetensors wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


# --- public names -------------------------------------------------------------------------------------------


def public_names():
    """Dotted names that docs/api lists: modules, functions, classes, their members, data."""
    directive = re.compile(r"^\.\. (?:auto|py:)(\w+):: (penult[\w.]*)\n((?:   .*\n)*)", flags=re.MULTILINE)
    table = (PAGES / "index.md").read_text(encoding="utf-8")
    names = {"penult", *(f"penult.{module}" for module in re.findall(r"^\| \{doc\}`(\w+)`", table, flags=re.MULTILINE))}
    for page in sorted(PAGES.glob("*.md")):
        for kind, name, options in directive.findall(page.read_text(encoding="utf-8")):
            names.add(name)
            listed = re.search(r":members:(.*)", options)
            if listed and kind in ("module", "class"):
                names |= {f"{name}.{member}" for member in listed[1].replace(",", " ").split() or members(kind, name)}
    return sorted(names)


def members(kind, name):
    """Names that Sphinx documents of a module, or of a class: public, its own, with a docstring."""
    if kind == "module":
        return importlib.import_module(name).__all__
    parent, _, last = name.rpartition(".")
    held = getattr(importlib.import_module(parent), last)
    kinds = (types.FunctionType, property, functools.cached_property, classmethod, staticmethod)
    own = [each for each, value in vars(held).items() if isinstance(value, kinds)]
    return [
        each
        for each in own
        if not each.startswith("_") and each != "extra_repr" and inspect.getdoc(getattr(held, each))
    ]


if __name__ == "__main__":
    main()
