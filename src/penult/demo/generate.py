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
from torch.utils.data import DataLoader

from penult.activations import Tap
from penult.bases import Marginal
from penult.demo.job import Job
from penult.demo.networks import DigitsNet
from penult.generate import ActivationVAE, Judge, Quality
from penult.pair import GenerativePair

__all__ = ["draw_images"]

_EPOCHS = 60
_BATCH = 64
_EACH = 40  # images of a class that are judged
_SHOWN = 12  # images of a class on the page
_CONFIDENT = 0.9
_COLUMNS = {
    "accuracy": "accuracy", "frechet": "Fréchet", "class_frechet": "class Fréchet", "precision": "precision",
    "recall": "recall", "density": "density", "coverage": "coverage", "cas": "CAS", "nearness": "nearness",
}  # fmt: skip


def draw_images(job: Job) -> None:
    """Train an autoencoder on images of the pool, draw images of each class by several laws, and judge them."""
    from penult.report import generate as figures

    job.reporter.heading("Images of every class, without labels")
    tap, images, names = Tap(job.model, job.head), job.pool.images, list(job.test.class_names)
    bank = GenerativePair(job.head, Marginal.fit(job.head, job.pool_activations, kind="bank"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        vae = ActivationVAE(bank, tap, image_shape=tuple(images.shape[1:]))
        _train(vae, images, job)
    judge = Judge(_evaluator(job), (job.test.images, job.test.labels), train=(images, job.pool.labels), seed=job.seed)
    y = torch.arange(len(names)).repeat_interleave(_EACH)
    laws = {"bank": bank, job.chosen: job.pairs[job.chosen], "sphere without data": job.pairs["without data"]}
    found: dict[str, Quality] = {}
    shown: dict[str, Tensor] = {}
    for name, pair in laws.items():
        drawn = vae.with_pair(pair).generate(y, generator=job.generator(8))
        found[name], shown[name] = judge(drawn, y), drawn
    sure = vae.with_pair(laws[job.chosen]).generate(y, confident=_CONFIDENT, generator=job.generator(8))
    found[f"{job.chosen}, confident"] = judge(sure, y)
    found["real images"] = judge.reference
    rows = [[name, *(f"{getattr(each, key):.3g}" for key in _COLUMNS)] for name, each in found.items()]
    job.results["generate"] = {name: replace(each, reference=None).to_dict() for name, each in found.items()}
    path = vae.with_pair(laws[job.chosen]).save(job.out / "digits-generator.safetensors")
    told = ("accuracy", "frechet", "coverage", "cas")  # as many as a terminal has room for
    job.reporter.table(
        ["law of activations", *(_COLUMNS[key] for key in told)],
        [[name, *(f"{getattr(each, key):.3g}" for key in told)] for name, each in found.items()],
    )
    job.reporter.line(f"{path}: a generator that needs no classifier and no data")

    section = job.page.section(
        "Images of every class, without labels",
        f"`penult.generate.ActivationVAE` learns to make images of activations, from {len(images)} images of the pool "
        "whose labels nobody looks at. Images of a class then come of draws from `p(h|y)`, and which law of "
        "activations that is decides everything.",
    )
    section.figure(
        figures.image_rows(shown[job.chosen].unflatten(0, (len(names), _EACH))[:, :_SHOWN], names, cell=40),
        caption=f"Images of each class, their activations drawn from the {job.chosen} base.",
        alt=f"Ten rows of {_SHOWN} handwritten digits, made by the generator.",
    )
    section.table(
        ["law of activations", *_COLUMNS.values()],
        rows,
        caption=f"{_EACH} images a class beside {len(job.test.labels)} test images, in the features of a second "
        "network that had no part in making them. CAS: accuracy on test images of a network that was "
        "trained on the generated ones alone. Nearness: 0.5 is ideal, 1 is copying. Confident: activations with "
        f"p(y|h) > {_CONFIDENT}.",
    )
    y0, y1 = torch.tensor([3, 4, 1, 0]), torch.tensor([8, 9, 7, 6])
    ways = vae.interpolate(y0, y1, steps=_SHOWN, confident=_CONFIDENT, generator=job.generator(9))
    section.figure(
        figures.image_rows(ways, [f"{names[a]} to {names[b]}" for a, b in zip(y0, y1, strict=True)], cell=40),
        caption="On the straight way between activations of two classes, with one code for all.",
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
        "the nearest draw of another class.",
        alt="Rows that begin with a test image and end with a digit of another class.",
    )  # fmt: skip
    section.text(
        "An image is of class y as surely as its activation is: with a plain law that is the classifier's own "
        "accuracy. The code z beside the activation is hardly used, so that variety comes from the law. The sphere "
        "without data is an exact pair as well, and its draws are nothing that this decoder has ever seen. "
        f'`penult.generate.load("{path.name}")` gives the generator back without classifier or data.'
    )


def _train(vae: ActivationVAE, images: Tensor, job: Job) -> None:
    from lightning.pytorch import Trainer

    loader: DataLoader[Any] = DataLoader(list(images), _BATCH, shuffle=True, generator=job.generator(7))  # type: ignore[arg-type]
    with _quiet():
        Trainer(
            max_epochs=_EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(vae, loader)  # fmt: skip
    vae.eval()
    first, last = vae.history[0], vae.history[-1]
    job.reporter.line(
        f"{_EPOCHS} epochs: {first['loss']:.1f} to {last['loss']:.1f} nats an image, of which the code z tells "
        f"{last['divergence']:.2f}"
    )


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
