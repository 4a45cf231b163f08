"""One run of the generation benchmark: train a generator, generate images from its distributions, and evaluate them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import generate_gan
import penult
from generate_baselines import GAIN, OneHotVAE, confident, fit, matched, parameters
from generate_gan import ISOLATED
from generate_laws import CHOSEN, Known, known, pairs
from generate_setting import SETTINGS, Pictures, accuracy, classifier, evaluator, few, few_classifier, pictures
from generate_small import LAWS, fitted
from penult.generate import ActivationGAN, ActivationGenerator, ActivationVAE, Judge
from record import short, write

__all__ = [
    "CHOICES",
    "CONFIDENT",
    "EACH",
    "GAINS",
    "SEEDS",
    "SMALL",
    "STEPS",
    "TRIES",
    "Run",
    "Share",
    "execute",
    "reference",
]

SEEDS = (0, 1)
STEPS = {"mnist": 1500, "mnist-usps": 1000, "cifar10": 1500}
EACH = 500  # pictures of a class
CONFIDENT = 0.95

SURE = ("bank", "mixture", "class", CHOSEN)  # laws that are drawn from confidently, too
SOME = ("bank", "mixture")
CHOICES = ("bank", "mixture", CHOSEN, "mixture, 50 in 24")  # laws that were chosen from
ADVERSARIAL = ("bank", "bank, held-out", CHOSEN)  # those that a GAN draws from

TRIES: dict[str, dict[str, Any]] = {
    "vae, consistency 30": {"consistency": 30.0},
    "vae, latent 32": {"latent": 32},
    "vae, beta 0.5": {"beta": 0.5},
}
GAINS = {  # of the baseline's label
    "one-hot, labels, zeros and ones": None,
    "one-hot, labels, gain 1": 1.0,
    "one-hot, labels, gain 4": 4.0,
    "one-hot, labels, gain 8": 8.0,
}

SMALL = "gan, how small"
Share = Literal["test", "selection"]


@dataclass(frozen=True)
class Run:
    """A generator to train and judge.

    Attributes:
        setting: Name of the setting.
        model: Name of the generator.
        classifier: Seed of the classifier.
        seed: Of the generator.
    """

    setting: str
    model: str
    classifier: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its cell, and with the seeds of its file."""
        return f"{self.setting}/{self.model}"

    @property
    def seeds(self) -> str:
        """Seeds of classifier and generator."""
        return f"{self.classifier}-{self.seed}"

    @property
    def kind(self) -> str:
        """Of the classifier."""
        return "linear" if "linear" in self.model else "relu"

    def wanted(self, share: Share) -> tuple[str, ...] | None:
        """Laws that it needs; None for all."""
        if self.model == SMALL:
            return ()
        if self.model in generate_gan.ALL:
            law = generate_gan.ALL[self.model].law
            if "class embeddings" in self.model:
                return (law,)
            return ADVERSARIAL[::2] if share == "selection" else ADVERSARIAL
        if "von Mises-Fisher" in self.model:
            return (f"sphere, {self.model.rpartition(', ')[2]}",)
        return CHOICES if share == "selection" else SOME if "linear" in self.model else None


@lru_cache(maxsize=2)
def judge(name: str, share: Share, data: Path, cache: Path, cas: bool = True) -> Judge:
    """The independent network, with the pictures that generated ones are compared with."""
    setting = SETTINGS[name]
    made = evaluator(setting, data, cache)
    real, train = (tuple(pictures(setting, each, data)) for each in (share, "generator"))
    return Judge(made, real, train=train, cas=cas)


def judged(run: Run, share: Share, images: Tensor, labels: Tensor, data: Path, cache: Path) -> dict[str, Any]:
    """What the judge says of pictures; no network is trained on them where the study is of something else."""
    cas = run.model != SMALL and run.model not in ISOLATED
    found = judge(run.setting, share, data, cache, cas)(images, labels).to_dict()
    return {key: short(value) for key, value in found.items() if isinstance(value, float)}


def execute(run: Run, share: Share, data: Path, cache: Path, fresh: bool) -> dict[str, Any]:
    """Train a generator and judge it with every law, except for those that were.

    Returns:
        ``seconds`` of the training, ``parameters``, ``floats`` of each law, and ``rows``: figures by law.
    """
    torch.set_num_threads(1)
    path = cache / "generate" / share / f"{run.name.replace('/', '-').replace(' ', '-')}-{run.seeds}.json"
    if path.exists() and not fresh:
        return json.loads(path.read_text())
    start = time.perf_counter()
    found = _how(run)(run, share, data, cache)
    found["total_seconds"] = short(time.perf_counter() - start, 3)
    write(path, found)
    return found


def _how(run: Run) -> Callable[..., dict[str, Any]]:
    if run.model == SMALL:
        return _small
    return _gan if run.model in generate_gan.ALL else _vae if run.model.startswith("vae") else _one_hot_vae


# --- autoencoders -------------------------------------------------------------------------------------------


def _vae(run: Run, share: Share, data: Path, cache: Path) -> dict[str, Any]:
    setting = SETTINGS[run.setting]
    k = known(run.setting, run.classifier, run.kind, data, cache)
    train = pictures(setting, "generator", data)
    paper = "von Mises-Fisher" in run.model
    made = pairs(run.setting, run.classifier, run.kind, data, cache, run.wanted(share))
    first = next(iter(made.values()))
    options: dict[str, Any] = {"condition": "label"} if paper else TRIES.get(run.model, {})
    vae, seconds = fit(
        lambda: ActivationVAE(first, k.tap, setting.shape, **options), *train, steps=STEPS[run.setting], seed=run.seed
    )
    rows, kept = _draws(run, share, vae, k, made, SURE, data, cache)
    return {
        "seconds": short(seconds, 3),
        "parameters": parameters(vae),
        "floats": _floats(made),
        "kept": kept,
        "divergence": short(vae.history[-1]["divergence"]) if vae.history else None,
        "rows": rows,
    }


def _one_hot_vae(run: Run, share: Share, data: Path, cache: Path) -> dict[str, Any]:
    setting = SETTINGS[run.setting]
    model = classifier(setting, run.classifier, data, cache)
    classes = 0 if run.model.startswith("unconditional") else 10
    width = matched(setting.shape, 64, classes)
    whose = _whose(run.model)
    vae, seconds = fit(
        lambda: OneHotVAE(setting.shape, classes, width, gain=GAINS.get(run.model, GAIN)),
        *_labelled(run, whose, setting, model, data, cache),
        steps=STEPS[run.setting],
        seed=run.seed,
    )
    generator = torch.Generator().manual_seed(run.seed)

    def draw(labels: Tensor) -> Tensor:
        if classes:
            return vae.generate(labels, generator)
        plain = lambda count: vae.generate(torch.zeros(count, dtype=torch.long), generator)  # noqa: E731
        return _of_classes(plain, model, labels)

    rows, kept = _filtered(run, share, draw, model, data, cache)
    return {"seconds": short(seconds, 3), "parameters": parameters(vae), "kept": kept, "rows": rows}


# --- adversarial ones ---------------------------------------------------------------------------------------


def _gan(run: Run, share: Share, data: Path, cache: Path) -> dict[str, Any]:
    setting = SETTINGS[run.setting]
    model = generate_gan.ALL[run.model]
    k = known(run.setting, run.classifier, run.kind, data, cache)
    made = pairs(run.setting, run.classifier, run.kind, data, cache, run.wanted(share))
    first = made[model.law]
    train = _labelled(run, model.labels, setting, k.model, data, cache)
    build, told = generate_gan.build(model, k, first, setting.shape, train.labels)
    gan, seconds = fit(build, train.images, told, steps=STEPS[run.setting], seed=run.seed, batch=generate_gan.BATCH)
    found: dict[str, Any] = {"seconds": short(seconds, 3), "parameters": generate_gan.parameters(gan)}
    if model.told == "activation":
        if run.model == "gan":
            gan.with_pair(made[CHOSEN]).save(kept_generator(run, share, cache))
        if share == "selection":
            y = torch.arange(10).repeat_interleave(EACH)
            found["rows"] = {}
            for name, pair in made.items():
                images = gan.with_pair(pair).generate(y, generator=torch.Generator().manual_seed(run.seed))
                found["rows"][name] = judged(run, share, images, y, data, cache)
        else:
            found["rows"], found["kept"] = _draws(run, share, gan, k, made, ("bank", CHOSEN), data, cache)
        return found | {"floats": _floats(made)}
    generator = torch.Generator().manual_seed(run.seed)

    def draw(labels: Tensor) -> Tensor:
        if model.told != "nothing":
            return gan.generate(labels, generator=generator)
        plain = lambda count: gan.generate(torch.arange(10).repeat(count // 10), generator=generator)  # noqa: E731
        return _of_classes(plain, k.model, labels)

    if run.model in ISOLATED or share == "selection":
        y = torch.arange(10).repeat_interleave(EACH)
        return found | {"rows": {"plain": judged(run, share, draw(y), y, data, cache)}}
    found["rows"], found["kept"] = _filtered(run, share, draw, k.model, data, cache)
    return found


def _small(run: Run, share: Share, data: Path, cache: Path) -> dict[str, Any]:
    """The generator of a run that was, and laws of fewer numbers or pictures."""
    whole = Run(run.setting, "gan", run.classifier, run.seed)
    if not kept_generator(whole, share, cache).exists():
        execute(whole, share, data, cache, fresh=True)
    gan = ActivationGAN.load(kept_generator(whole, share, cache))
    k = known(run.setting, run.classifier, run.kind, data, cache)
    y = torch.arange(10).repeat_interleave(EACH)
    rows, floats = {}, {}
    for name, law in LAWS.items():
        pair = fitted(law, k)
        generator = torch.Generator().manual_seed(run.seed)
        images = gan.with_pair(pair).generate(y, confident=law.confident, generator=generator)
        rows[name], floats[name] = judged(run, share, images, y, data, cache), pair.base.num_parameters
    return {"rows": rows, "floats": floats}


def kept_generator(run: Run, share: Share, cache: Path) -> Path:
    """The file of a trained generator, for the study of laws."""
    folder = cache / "generate" / "generators"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{share}-{run.setting}-{run.model.replace(' ', '-')}-{run.seeds}.safetensors"


# --- what both need -----------------------------------------------------------------------------------------


def _draws(
    run: Run,
    share: Share,
    made: ActivationGenerator,
    k: Known,
    laws: dict[str, penult.GenerativePair],
    sure: tuple[str, ...],
    data: Path,
    cache: Path,
) -> tuple[dict[str, Any], Any]:
    """Figures of draws from each law, plain, confident and rejected; and what share of a bank's are confident."""
    y = torch.arange(10).repeat_interleave(EACH)
    rows, kept = {}, None
    for name, pair in laws.items():
        drawing = made.with_pair(pair)
        ways: dict[str, dict[str, Any]] = {name: {}}
        if name in sure:
            ways[f"{name}, confident"] = {"confident": CONFIDENT}
        if name == "bank" and isinstance(made, ActivationVAE):
            ways[f"{name}, rejected"] = {"reject": True}
        for way, how in ways.items():
            images = drawing.generate(y, generator=torch.Generator().manual_seed(run.seed), **how)
            rows[way] = judged(run, share, images, y, data, cache)
        if name == "bank":
            generator = torch.Generator().manual_seed(run.seed)
            draw = lambda labels, drawing=drawing, g=generator: drawing.generate(labels, generator=g)  # noqa: E731
            images, found = confident(draw, k.model, y, CONFIDENT)
            kept = short(found)
            if images is not None:
                rows[f"{name}, pictures that the classifier is sure of"] = judged(run, share, images, y, data, cache)
    return rows, kept


def _filtered(
    run: Run, share: Share, draw: Callable[[Tensor], Tensor], model: nn.Module, data: Path, cache: Path
) -> tuple[dict[str, Any], Any]:
    """Figures of a baseline's pictures, of those that the classifier is sure of, and what share these are."""
    y = torch.arange(10).repeat_interleave(EACH)
    rows = {"plain": judged(run, share, draw(y), y, data, cache)}
    images, kept = confident(draw, model, y, CONFIDENT)
    if images is not None:
        rows["pictures that the classifier is sure of"] = judged(run, share, images, y, data, cache)
    return rows, short(kept)


def _floats(laws: dict[str, penult.GenerativePair]) -> dict[str, int]:
    return {name: p.base.num_parameters for name, p in laws.items() if isinstance(p.base, penult.Marginal)}


def _whose(model: str) -> str | None:
    """Whose labels a one-hot autoencoder needs."""
    known_labels = {"one-hot, 100 labels": "few", "one-hot, labels of a 100-label classifier": "few, classifier"}
    return known_labels.get(model) or ("true" if model == "one-hot, labels" or model in GAINS else "classifier")


def _labelled(run: Run, whose: str | None, setting: Any, model: nn.Module, data: Path, cache: Path) -> Pictures:
    """The generator's pictures with labels that are the true ones, a classifier's, or few."""
    train = pictures(setting, "generator", data)
    if whose == "few":
        return few(setting, run.seed, data)
    if whose == "few, classifier":
        model = few_classifier(setting, run.seed, data, cache)
    elif whose != "classifier":
        return train
    with torch.no_grad():
        said = torch.cat([model(part).argmax(-1) for part in train.images.split(500)])
    return Pictures(train.images, said)


def _of_classes(draw: Callable[[int], Tensor], model: nn.Module, labels: Tensor) -> Tensor:
    """Pictures of an unconditional generator that the classifier puts into classes."""
    images: Tensor | None = None
    left = torch.arange(len(labels))
    with torch.no_grad():
        while len(left):
            drawn = draw(1000)
            images = drawn.new_empty(len(labels), *drawn.shape[1:]) if images is None else images
            said = model(drawn).argmax(-1)
            for one in labels[left].unique():
                mine, fitting = left[labels[left] == one], (said == one).nonzero().flatten()
                count = min(len(mine), len(fitting))
                images[mine[:count]] = drawn[fitting[:count]]
                left = left[~torch.isin(left, mine[:count])]
    assert images is not None
    return images


def reference(name: str, share: Share, data: Path, cache: Path) -> dict[str, Any]:
    """Real pictures of the generator's share, as the judge sees them; and what classifier and judge get right."""
    torch.set_num_threads(1)
    setting = SETTINGS[name]
    found = judge(name, share, data, cache).reference.to_dict()
    other = pictures(setting, share, data)
    return {
        "row": {key: short(value) for key, value in found.items() if isinstance(value, float)},
        "judge": short(accuracy(evaluator(setting, data, cache), other)),
        "classifiers": [short(accuracy(classifier(setting, seed, data, cache), other)) for seed in SEEDS],
    }
