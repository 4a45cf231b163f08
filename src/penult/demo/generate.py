"""Part seven of the demo: images of every class from the classifier and unlabelled images."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from penult.report import Section

__all__ = ["generate_images"]

_EPOCHS = {"VAE": 60, "GAN": 25}
_KINDS = {"VAE": "variational autoencoder", "GAN": "adversarial generator"}
_BATCH = 64
# Images of each class that are evaluated, and that are shown.
_IMAGES, _SHOWN = 40, 12
# Images of each activation, with different codes.
_CODES = 10
_CONFIDENT = 0.9
# Metrics in the terminal, which has no room for all of them.
_IN_TERMINAL = "accuracy", "frechet", "coverage", "cas"
_REAL = "real images"


def generate_images(job: Job) -> None:
    """Train two generators on images of the pool, generate images of each class, and evaluate them."""
    job.reporter.heading("Images of every class, without labels")
    bank = GenerativePair(job.head, Marginal.fit(job.head, job.pool_activations, kind="bank"))
    generators = _generators(job, bank)
    fitted = job.pairs[job.chosen]
    confident = f"{job.chosen}, confident"
    pairs = {"bank": bank, job.chosen: fitted, confident: fitted, "sphere without data": job.pairs["without data"]}
    judge = Judge(
        _evaluator(job), (job.test.images, job.test.labels), train=(job.pool.images, job.pool.labels), seed=job.seed
    )
    y = torch.arange(job.head.num_classes, device="cpu").repeat_interleave(_IMAGES)
    images: dict[tuple[str, str], Tensor] = {}
    qualities: dict[tuple[str, str], Quality] = {}
    for kind, generator in generators.items():
        for source, pair in pairs.items():
            if kind == "GAN" and source == "sphere without data":
                continue
            threshold = _CONFIDENT if source == confident else None
            key = kind, source
            images[key] = generator.with_pair(pair).generate(y, confident=threshold, generator=job.generator(8))
            qualities[key] = judge(images[key], y)
    qualities["", _REAL] = judge.reference
    job.results["generate"] = {
        ", ".join(filter(None, key)): replace(quality, reference=None).to_dict() for key, quality in qualities.items()
    }
    paths = {
        kind: generator.with_pair(fitted).save(job.out / f"digits-{kind.lower()}.safetensors")
        for kind, generator in generators.items()
    }
    columns, rows = _quality_table(qualities, _IN_TERMINAL)
    job.reporter.table(columns, rows)
    job.reporter.line(f"{' and '.join(map(str, paths.values()))}: generators that need neither the classifier nor data")
    section = job.page.section(
        "Images of every class, without labels",
        f"The generators of `penult.generate` learn to make images from activations, here from {len(job.pool.images)} "
        f"images of the pool without their labels: a variational autoencoder (`ActivationVAE`, {_EPOCHS['VAE']} "
        f"epochs) and an adversarial generator (`ActivationGAN`, {_EPOCHS['GAN']} epochs). To generate images of class "
        "y, activations are sampled from `p(h|y)` of a pair; the base of this pair may be changed after training.",
    )
    _samples_and_quality(job, section, images, qualities)
    _interpolation_and_editing(job, section, generators["VAE"])
    _variety_text(job, section, generators, paths)


# --- page ---------------------------------------------------------------------------------------------------


def _quality_table(
    qualities: dict[tuple[str, str], Quality], metrics: tuple[str, ...]
) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table of some metrics."""
    from penult.report.generate import metric_titles

    titles = metric_titles()
    columns = ["generator", "activations from", *(titles[metric] for metric in metrics)]
    rows = [[*key, *(f"{getattr(quality, metric):.3g}" for metric in metrics)] for key, quality in qualities.items()]
    return columns, rows


def _samples_and_quality(
    job: Job,
    section: Section,
    images: dict[tuple[str, str], Tensor],
    qualities: dict[tuple[str, str], Quality],
) -> None:
    """Add generated images of each class and their metrics."""
    from penult.report.generate import image_rows, metric_meanings, metric_titles

    names = list(job.test.class_names)
    for kind, description in _KINDS.items():
        rows = images[kind, job.chosen].unflatten(0, (len(names), _IMAGES))
        section.figure(
            image_rows(rows[:, :_SHOWN], names, cell=40),
            caption=f"Images of each class by the {description}, from activations sampled with the {job.chosen} base.",
            alt=f"Ten rows of {_SHOWN} handwritten digits, generated by the {description}.",
        )
    metrics = tuple(metric_titles())
    section.table(
        *_quality_table(qualities, metrics),
        caption=f"{_IMAGES} images of each class compared with {len(job.test.labels)} test images, in the features of "
        "a second network that was not used for generating them. “Confident” means that only activations with "
        f"p(y|h) > {_CONFIDENT} are used. The row of real images shows what other real images get.",
        align="ll" + "r" * len(metrics),
    )
    section.table(("column", "meaning"), metric_meanings(metrics))


def _interpolation_and_editing(job: Job, section: Section, vae: ActivationGenerator) -> None:
    """Add images between classes, and images that are moved to another class."""
    from penult.report.generate import image_rows

    names = list(job.test.class_names)
    first, last = torch.tensor([3, 4, 1, 0], device="cpu"), torch.tensor([8, 9, 7, 6], device="cpu")
    ways = vae.interpolate(first, last, steps=_SHOWN, confident=_CONFIDENT, generator=job.generator(9))
    section.figure(
        image_rows(ways, [f"{names[a]} → {names[b]}" for a, b in zip(first, last, strict=True)], cell=40),
        caption="Images of the variational autoencoder from activations in a straight line between two classes, with "
        "one code for each row.",
        alt="Rows of digits that change into another digit.",
    )
    rows, goals = _first_of_each_class(job.test.labels)[:6], torch.tensor([6, 7, 3, 8, 9, 2], device="cpu")
    originals = job.test.images[rows]
    edited = vae.edit(
        originals, goals, torch.linspace(0, 1, 6, device="cpu"), confident=_CONFIDENT, generator=job.generator(10)
    )
    labels = [f"{names[job.test.labels[row]]} → {names[goal]}" for row, goal in zip(rows, goals, strict=True)]
    section.figure(
        image_rows(torch.cat([originals[:, None], edited], 1), labels, cell=40),
        caption="Test images, each followed by its reconstruction and by images of the variational autoencoder as the "
        "activation moves to the nearest sample of another class.",
        alt="Rows that begin with a test image and end with a digit of another class.",
    )


def _variety_text(
    job: Job, section: Section, generators: dict[str, ActivationGenerator], paths: dict[str, Path]
) -> None:
    """Add a text on the reliability and the variety of the images."""
    variety = {kind: _variety(generator, job) for kind, generator in generators.items()}
    job.results["generate_variety"] = variety
    section.text(
        "An image shows its class as reliably as its activation belongs to this class; without a confidence threshold, "
        "that is the accuracy of the classifier. Generators also read a code z. With the activation fixed and random "
        f"codes, the standard deviation of pixels is {variety['VAE']:.0%} of that over all images with the VAE, and "
        f"{variety['GAN']:.0%} with the GAN; all other variety comes from the activations. The sphere without data is "
        "an exact pair, too, but its samples are unlike all activations that the generators were trained on.\n\n"
        f'`penult.generate.load("{paths["VAE"].name}")` loads a generator without classifier or data.'
    )


@torch.no_grad()
def _variety(generator: ActivationGenerator, job: Job) -> float:
    """Return the standard deviation of pixels over codes, as a fraction of that over all images."""
    h = job.test_activations.activations.repeat_interleave(_CODES, 0)
    images = generator.decode(generator.random_codes(len(h), job.generator(12)), h)
    return float((images.unflatten(0, (-1, _CODES)).var(1).mean() / images.var(0).mean()).sqrt())


def _first_of_each_class(labels: Tensor) -> Tensor:
    return torch.stack([(labels == y).nonzero()[0, 0] for y in labels.unique()])


# --- training -----------------------------------------------------------------------------------------------


def _generators(job: Job, pair: GenerativePair) -> dict[str, ActivationGenerator]:
    """Return both generators, trained on the images of the pool."""
    tap, shape = Tap(job.model, job.head), tuple(job.pool.images.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        vae = ActivationVAE(pair, tap, image_shape=shape)
        _train("VAE", vae, job)
        gan = ActivationGAN(pair, tap, image_shape=shape)
        _train("GAN", gan, job)
    return {"VAE": vae, "GAN": gan}


def _train(kind: str, generator: ActivationGenerator, job: Job) -> None:
    from lightning.pytorch import Trainer

    data = TensorDataset(job.pool.images, job.pool_activations.activations)
    loader: DataLoader[Any] = DataLoader(data, _BATCH, shuffle=True, generator=job.generator(7))
    with _without_lightning_messages():
        Trainer(
            max_epochs=_EPOCHS[kind], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(generator, loader)  # fmt: skip
    generator.eval()
    first, last = generator.history[0], generator.history[-1]
    if kind == "VAE":
        progress = (
            f"loss {first['loss']:.1f} to {last['loss']:.1f} nats per image, {last['divergence']:.2f} of them for the "
            "code z"
        )
    else:
        progress = (
            f"cosine between activations and those of the images generated from them {first['cosine']:.2f} to "
            f"{last['cosine']:.2f}"
        )
    job.reporter.line(f"{kind}, {_EPOCHS[kind]} epochs: {progress}")


@contextmanager
def _without_lightning_messages() -> Iterator[None]:
    """Silence Lightning's messages, which are about options that users of the demo do not see."""
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
    """Return a second classifier with another initialization, which evaluates images."""
    generator = job.generator(11)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed + 1)
        model = DigitsNet(width=32)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(15):
        for rows in torch.randperm(len(job.train.labels), generator=generator, device="cpu").split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(job.train.images[rows]), job.train.labels[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)
