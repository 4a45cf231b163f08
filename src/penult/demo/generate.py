"""Part seven: images of every class from the classifier and unlabelled images."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from penult.activations import Tap
from penult.bases import Marginal
from penult.demo.job import Job
from penult.demo.networks import DigitsNet
from penult.generate import ActivationGAN, ActivationGenerator, ActivationVAE, Judge, Quality
from penult.pair import GenerativePair

__all__ = ["draw_images"]

_EPOCHS = {"VAE": 60, "GAN": 25}
_BATCH = 64
_EACH = 40  # images of a class that are judged
_SHOWN = 12  # images of a class on the page
_CODES = 10  # images of one activation
_CONFIDENT = 0.9
_COLUMNS = {
    "accuracy": "accuracy", "frechet": "Fréchet", "class_frechet": "class Fréchet", "precision": "precision",
    "recall": "recall", "density": "density", "coverage": "coverage", "cas": "CAS", "nearness": "nearness",
}  # fmt: skip
_TOLD = "accuracy", "frechet", "coverage", "cas"  # as many as a terminal has room for


def draw_images(job: Job) -> None:
    """Train two generators on images of the pool, draw images of each class by several laws, and judge them."""
    from penult.report import generate as figures

    job.reporter.heading("Images of every class, without labels")
    tap, images, names = Tap(job.model, job.head), job.pool.images, list(job.test.class_names)
    bank = GenerativePair(job.head, Marginal.fit(job.head, job.pool_activations, kind="bank"))
    shape = tuple(images.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        vae = ActivationVAE(bank, tap, image_shape=shape)
        _train("VAE", vae, job)
        gan = ActivationGAN(bank, tap, image_shape=shape)
        _train("GAN", gan, job)
    judge = Judge(_evaluator(job), (job.test.images, job.test.labels), train=(images, job.pool.labels), seed=job.seed)
    y = torch.arange(len(names)).repeat_interleave(_EACH)
    chosen, confident = job.chosen, f"{job.chosen}, confident"
    laws = {"bank": bank, chosen: job.pairs[chosen], confident: job.pairs[chosen]}
    laws["sphere without data"] = job.pairs["without data"]
    found: dict[str, Quality] = {}
    rows: list[list[str]] = []
    shown: dict[str, Tensor] = {}
    generators: dict[str, ActivationGenerator] = {"VAE": vae, "GAN": gan}
    for name, generator in generators.items():
        for law, pair in laws.items():
            if name == "GAN" and law == "sphere without data":
                continue
            sure = _CONFIDENT if law == confident else None
            drawn = generator.with_pair(pair).generate(y, confident=sure, generator=job.generator(8))
            found[f"{name}, {law}"], shown[f"{name}, {law}"] = judge(drawn, y), drawn
            rows.append([name, law])
    found["real images"] = judge.reference
    rows.append(["", "real images"])
    figured = [[f"{getattr(each, key):.3g}" for key in _COLUMNS] for each in found.values()]
    job.results["generate"] = {name: replace(each, reference=None).to_dict() for name, each in found.items()}
    job.reporter.table(
        ["generator", "law of activations", *(_COLUMNS[key] for key in _TOLD)],
        [
            [*row, *(f"{getattr(each, key):.3g}" for key in _TOLD)]
            for row, each in zip(rows, found.values(), strict=True)
        ],
    )
    paths = [
        generator.with_pair(laws[chosen]).save(job.out / f"digits-{name.lower()}.safetensors")
        for name, generator in generators.items()
    ]
    job.reporter.line(f"{' and '.join(map(str, paths))}: generators that need no classifier and no data")

    section = job.page.section(
        "Images of every class, without labels",
        f"`penult.generate` has generators that learn to make images of activations, here from {len(images)} images of "
        f"the pool whose labels nobody looks at: an autoencoder (`ActivationVAE`, {_EPOCHS['VAE']} epochs) and an "
        f"adversarial one (`ActivationGAN`, {_EPOCHS['GAN']}). Images of a class then come of draws from `p(h|y)`, by "
        "whichever law of activations.",
    )
    for name, kind in (("VAE", "autoencoder"), ("GAN", "adversarial generator")):
        section.figure(
            figures.image_rows(
                shown[f"{name}, {chosen}"].unflatten(0, (len(names), _EACH))[:, :_SHOWN], names, cell=40
            ),
            caption=f"Images of each class by the {kind}, their activations drawn from the {chosen} base.",
            alt=f"Ten rows of {_SHOWN} handwritten digits, made by the {kind}.",
        )
    section.table(
        ["generator", "law of activations", *_COLUMNS.values()],
        [[*row, *each] for row, each in zip(rows, figured, strict=True)],
        caption=f"{_EACH} images a class beside {len(job.test.labels)} test images, in the features of a second "
        "network that had no part in making them. CAS: accuracy on test images of a network that was "
        "trained on the generated ones alone. Nearness: 0.5 is ideal, 1 is copying. Confident: activations with "
        f"p(y|h) > {_CONFIDENT}.",
    )
    y0, y1 = torch.tensor([3, 4, 1, 0]), torch.tensor([8, 9, 7, 6])
    ways = vae.interpolate(y0, y1, steps=_SHOWN, confident=_CONFIDENT, generator=job.generator(9))
    section.figure(
        figures.image_rows(ways, [f"{names[a]} to {names[b]}" for a, b in zip(y0, y1, strict=True)], cell=40),
        caption="On the straight way between activations of two classes, with one code for all, by the autoencoder.",
        alt="Rows of digits that turn into others.",
    )
    few, goals = _firsts(job.test.labels)[:6], torch.tensor([6, 7, 3, 8, 9, 2])
    originals = job.test.images[few]
    strengths = torch.linspace(0, 1, 6)
    edited = vae.edit(originals, goals, strengths, confident=_CONFIDENT, generator=job.generator(10))
    section.figure(
        figures.image_rows(
            torch.cat([originals[:, None], edited], 1), [f"{names[job.test.labels[i]]} to {names[g]}"
            for i, g in zip(few, goals, strict=True)], cell=40,
        ),
        caption="Test images, each followed by its reconstruction and by what comes of it when its activation moves to "
        "the nearest draw of another class, by the autoencoder.",
        alt="Rows that begin with a test image and end with a digit of another class.",
    )  # fmt: skip
    varied = {name: _variety(generator, job) for name, generator in generators.items()}
    job.results["generate_variety"] = varied
    section.text(
        "An image is of class y as surely as its activation is: with a plain law that is the classifier's own "
        "accuracy. Beside the activation stands a code z. Where the activation is kept and the code drawn anew, pixels "
        f"vary {varied['VAE']:.0%} as much as over all images with the VAE, and {varied['GAN']:.0%} with the GAN; all "
        "else comes from the law. The sphere without data is an exact pair as well, and its draws are nothing that "
        f'these generators have ever seen. `penult.generate.load("{paths[0].name}")` gives a generator back without '
        "classifier or data."
    )


def _train(name: str, generator: ActivationGenerator, job: Job) -> None:
    from lightning.pytorch import Trainer

    data = TensorDataset(job.pool.images, job.pool_activations.activations)
    loader: DataLoader[Any] = DataLoader(data, _BATCH, shuffle=True, generator=job.generator(7))
    with _quiet():
        Trainer(
            max_epochs=_EPOCHS[name], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(generator, loader)  # fmt: skip
    generator.eval()
    first, last = generator.history[0], generator.history[-1]
    if name == "VAE":
        told = (
            f"{first['loss']:.1f} to {last['loss']:.1f} nats an image, of which the code z tells "
            f"{last['divergence']:.2f}"
        )
    else:
        told = (
            f"the classifier's activations of images that were made have a cosine of {first['cosine']:.2f} to "
            f"{last['cosine']:.2f} to those that they were made of"
        )
    job.reporter.line(f"{name}, {_EPOCHS[name]} epochs: {told}")


@torch.no_grad()
def _variety(generator: ActivationGenerator, job: Job) -> float:
    """How much images of one activation vary, as a share of what all images do."""
    h = job.test_activations.activations.repeat_interleave(_CODES, 0)
    images = generator.decode(generator.random_codes(len(h), job.generator(12)), h)
    return float((images.unflatten(0, (-1, _CODES)).var(1).mean() / images.var(0).mean()).sqrt())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks, which are about its own options."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            logger.setLevel(logging.ERROR)
            yield
        finally:
            logger.setLevel(level)


def _evaluator(job: Job) -> nn.Module:
    """A second classifier, from other first weights, that judges images."""
    generator = job.generator(11)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed + 1)
        model = DigitsNet(width=32)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(15):
        for rows in torch.randperm(len(job.train.labels), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(job.train.images[rows]), job.train.labels[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def _firsts(labels: Tensor) -> Tensor:
    return torch.stack([(labels == y).nonzero()[0, 0] for y in labels.unique()])
