"""The setting of the generation benchmark: splits of the data, classifiers, few labelled images, evaluators.

An image generator is conditioned on the penultimate activations of a classifier, and trained on images without
labels. Its images are evaluated by a network, the evaluator, that shares no training image with generator or
classifier, except on CIFAR-10, where the classifiers were trained on its images, too. All images have values in [0,
1]. Those of MNIST and USPS are (N, 1, 28, 28), where images of USPS are enlarged bilinearly from 16 to 20 pixels,
with a border of 4; those of CIFAR-10 are (N, 3, 32, 32).

The splits, called shares in the code, are rows of the training files; no row is in two splits of one data set:

============  ===============  =============  ===============  =====================================================
share         MNIST            USPS           CIFAR-10         use
============  ===============  =============  ===============  =====================================================
`classifier`  0 - 20,000                                       training of classifiers, with labels
`generator`   20,000 - 40,000  0 - 4,200      0 - 20,000       training of generators, without labels; the few
                                                               labelled images are part of it
`evaluator`   40,000 - 50,000  4,200 - 6,600  20,000 - 40,000  training of the evaluator, with labels
`held-out`    50,000 - 56,000                 40,000 - 46,000  banks of images that nothing was trained on here
`selection`   56,000 - 60,000  6,600 - 7,291  46,000 - 50,000  real images for the choice of options
============  ===============  =============  ===============  =====================================================

Rows of USPS are those of its training file in a fixed random order. `test` is the test file, 10,000 images of MNIST
and of CIFAR-10 and 2,007 of USPS. It is used for final figures only, and loaded when it is first used.

* ``mnist``: all splits are of MNIST.
* ``mnist-usps``: the classifiers are those of MNIST; all other splits are of USPS, which has no `held-out`. The
  evaluator was trained on the evaluator splits of both.
* ``cifar10``: the classifiers are the published ResNet32 (seed 0) and ResNet44 (seed 1) of `networks.py`. Their
  publisher trained them on all 50,000 training images, in their original form (the copy used here is recompressed).
  Therefore there is no `classifier` split and no few-label classifier, and the classifiers have seen every other
  split except `test` with its labels: `held-out` is held out from generators and evaluator only. The evaluator
  (`generate_colour.py`) was trained here, on its split only.

Trained weights and the activations of the published networks are stored in a folder and read from it the next time;
all take twenty-five minutes on one core. Remove them after a change of the training of a network or of the splits.
The few labelled images are part of the generator split, so the accuracy on it of a network trained on them is
slightly too high.

Example:
    python benchmarks/generate_setting.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/generate_setting.py --data ../shared/data --cache /tmp/penult-cache --test

    >>> from pathlib import Path
    >>> from generate_setting import SETTINGS, accuracy, classifier, pictures
    >>> setting, data, cache = SETTINGS["mnist-usps"], Path("../shared/data"), Path("/tmp/penult-cache")
    >>> accuracy(classifier(setting, 0, data, cache), pictures(setting, "selection", data))
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generate_colour
import networks
import penult
from distill_setting import Pictures
from generate_colour import shifted
from networks import KIND
from penult.data import parquet

__all__ = [
    "KINDS",
    "ROWS",
    "SETTINGS",
    "SHARES",
    "Pictures",
    "Setting",
    "accuracy",
    "activations",
    "as_mnist",
    "classifier",
    "classifier_net",
    "evaluator",
    "evaluator_net",
    "few",
    "few_classifier",
    "pictures",
]

ROWS: dict[str, dict[str, range]] = {  # of the training file, by data set and share
    "mnist": {
        "classifier": range(20_000),
        "generator": range(20_000, 40_000),
        "evaluator": range(40_000, 50_000),
        "held-out": range(50_000, 56_000),
        "selection": range(56_000, 60_000),
    },
    "usps": {  # after the rows were put in the order of ORDERS
        "generator": range(4_200),
        "evaluator": range(4_200, 6_600),
        "selection": range(6_600, 7_291),
    },
    "cifar10": {
        "generator": range(20_000),
        "evaluator": range(20_000, 40_000),
        "held-out": range(40_000, 46_000),
        "selection": range(46_000, 50_000),
    },
}
ORDERS = {"usps": 0}  # seeds of orders that rows are put in, where they are
SHARES = ("classifier", "generator", "evaluator", "held-out", "selection", "test")
KINDS = ("relu", "linear")
SEEDS = (0, 1)  # of the networks that the command line prepares
SIZE, CONTENT, BORDER = 28, 20, 4  # pixels
GREY, COLOUR = (1, SIZE, SIZE), (3, 32, 32)

BATCH = 100
RATE = 2e-3  # the highest; it falls along a cosine
EPOCHS = 4  # of a classifier
FEW_EPOCHS = 200  # one batch each, for ten pictures of each class
EVALUATOR_EPOCHS = 12
EVALUATOR_SHIFT = 2  # pixels at most, each way


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where the pictures of a setting are from.

    Attributes:
        name: Its name.
        source: The data set of the classifiers' pictures: ``{source}-train.parquet`` and ``{source}-test.parquet``.
        target: The data set of all others.
        shape: Of a picture, (C, H, W).
        published: Names in `networks.NETWORKS` of classifiers that were trained elsewhere, by seed; none where the
            classifiers are trained here.
    """

    name: str
    source: str
    target: str
    shape: tuple[int, int, int] = GREY
    published: tuple[str, ...] = ()

    def data_set(self, share: str) -> str:
        """The data set that a share is of.

        Args:
            share: One of `SHARES`.

        Raises:
            ValueError: There is no such share.
        """
        if share not in SHARES:
            raise ValueError(f"share is {share!r}; it must be one of {', '.join(SHARES)}")
        return self.source if share == "classifier" else self.target


SETTINGS: dict[str, Setting] = {
    each.name: each
    for each in (
        Setting("mnist", source="mnist", target="mnist"),
        Setting("mnist-usps", source="mnist", target="usps"),
        Setting("cifar10", "cifar10", "cifar10", shape=COLOUR, published=("cifar-resnet32", "cifar-resnet44")),
    )
}


def pictures(setting: Setting, share: str, data: Path) -> Pictures | None:
    """The pictures of a share, loaded when they are first asked for; None where the setting has no such share.

    Labels are always there. Generators must not look at those of their share.

    Args:
        setting: The setting.
        share: One of `SHARES`; ``"test"`` is for final figures only.
        data: The folder of parquet files.
    """
    return _share(setting.data_set(share), share, data)


@lru_cache(maxsize=16)
def _share(name: str, share: str, data: Path) -> Pictures | None:
    """A share of a data set."""
    if share != "test" and share not in ROWS[name]:
        return None
    colour = name == "cifar10"
    file = parquet(data / f"{name}-{'test' if share == 'test' else 'train'}.parquet", mode="RGB" if colour else "L")
    rows = torch.arange(len(file))
    if share != "test":
        if name in ORDERS:
            rows = torch.randperm(len(file), generator=torch.Generator().manual_seed(ORDERS[name]))
        wanted = ROWS[name][share]
        if wanted.stop > len(file):
            raise ValueError(f"{share} is rows {wanted.start} to {wanted.stop} of {file}, which has {len(file)}")
        rows = rows[wanted.start : wanted.stop]
    parts, labels = zip(*(file[row] for row in rows.tolist()), strict=True)
    images = torch.stack(parts)
    return Pictures(images if colour else as_mnist(images), torch.tensor(labels))


def as_mnist(images: Tensor) -> Tensor:
    """Grey pictures in the geometry of MNIST: those that are not 28 x 28 are scaled to 20 x 20, in a border of 4 zeros.

    Args:
        images: (N, 1, H, W).
    """
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    content = F.interpolate(images, (CONTENT, CONTENT), mode="bilinear", align_corners=False)
    return F.pad(content, (BORDER,) * 4)


@lru_cache(maxsize=8)
def few(setting: Setting, seed: int, data: Path, each: int = 10) -> Pictures:
    """A few labelled pictures of the generator share, the same number of each class.

    Args:
        setting: The setting.
        seed: Of the draw.
        data: The folder of parquet files.
        each: How many of each class.

    Raises:
        ValueError: A class has fewer pictures.
    """
    images, labels = pictures(setting, "generator", data)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[labels[order] == y][:each] for y in labels.unique()]
    if any(len(rows) < each for rows in chosen):
        raise ValueError(f"a class has fewer than {each} pictures in the generator share of {setting.name}")
    rows = torch.cat(chosen).sort().values
    return Pictures(images[rows], labels[rows])


# --- networks -----------------------------------------------------------------------------------------------


def classifier_net(kind: str = "relu") -> nn.Sequential:
    """Two strided convolutions, a layer of 64 and the head.

    Args:
        kind: ``"relu"`` where a ReLU stands before the head, ``"linear"`` where none does.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 64), *([nn.ReLU()] if kind == "relu" else []),
        nn.Linear(64, 10),
    )  # fmt: skip


def evaluator_net() -> nn.Sequential:
    """For grey pictures: three convolutions with batch normalisation and pooling, a layer of 64, ReLU and the head."""

    def block(channels: int, planes: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32), nn.MaxPool2d(2),
        *block(32, 64), nn.MaxPool2d(2),
        *block(64, 64), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 3 * 3, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


@lru_cache(maxsize=8)
def classifier(setting: Setting, seed: int, data: Path, cache: Path, kind: str = "relu") -> nn.Module:
    """A classifier of a setting, in eval mode and without gradients; trained where `cache` has no weights yet.

    Those of ``mnist`` and ``mnist-usps`` are the same.

    Args:
        setting: The setting.
        seed: Of its initial weights and of the order of the pictures; or the place among `Setting.published`.
        data: The folder of parquet files and published weights.
        cache: The folder of trained weights.
        kind: As in `classifier_net`; the published ones are ``"relu"``.

    Raises:
        ValueError: There is no such published classifier.
    """
    if setting.published:
        if kind != "relu" or seed not in range(len(setting.published)):
            names = ", ".join(setting.published)
            raise ValueError(f"no {kind} classifier {seed} of {setting.name}; published, with a ReLU: {names}")
        made = networks.model(setting.published[seed], data, cache)
        return made.requires_grad_(False).to(memory_format=torch.channels_last)  # faster on a CPU

    def fit(model: nn.Module) -> None:
        _train(model, pictures(setting, "classifier", data), seed, EPOCHS)

    return _kept(f"generate-classifier-{kind}-{seed}", cache, seed, lambda: classifier_net(kind), fit)


def activations(
    setting: Setting, share: str, seed: int, data: Path, cache: Path, kind: str = "relu"
) -> penult.Activations:
    """What the head of a classifier reads of the pictures of a share; before the ReLU if one stands right before it.

    There are no labels with them. Those of published classifiers, which are slow, are kept in the cache; one process
    at a time may make them.

    Args:
        setting: The setting.
        share: One of `SHARES`; ``"test"`` is for final figures only.
        seed: As in `classifier`.
        data: The folder of parquet files and published weights.
        cache: The folder of trained weights and activations.
        kind: As in `classifier`.

    Raises:
        ValueError: The setting has no such share, or no such classifier.
    """
    model, found = classifier(setting, seed, data, cache, kind), pictures(setting, share, data)
    if found is None:
        raise ValueError(f"{setting.name} has no {share} share")
    head = penult.find_head(model, found.images[:16])
    return penult.extract(
        penult.Tap(model, head),
        found.images.split(500),
        out=cache / f"generate-{setting.published[seed]}-{share}" if setting.published else None,
        pre_activation=head.certificate.rectified,
        progress=False,
    )


@lru_cache(maxsize=8)
def few_classifier(setting: Setting, seed: int, data: Path, cache: Path) -> nn.Module:
    """A classifier with ReLU that was trained on `few` alone, in eval mode and without gradients.

    Args:
        setting: The setting.
        seed: Of the few pictures, of the initial weights and of the order.
        data: The folder of parquet files.
        cache: The folder of trained weights.

    Raises:
        ValueError: The classifiers of the setting are published ones.
    """
    if setting.published:
        raise ValueError(f"{setting.name} has no few-label classifier: its classifiers are published ones")

    def fit(model: nn.Module) -> None:
        _train(model, few(setting, seed, data), seed, FEW_EPOCHS)

    return _kept(f"generate-few-{setting.name}-{seed}", cache, seed, classifier_net, fit)


@lru_cache(maxsize=4)
def evaluator(setting: Setting, data: Path, cache: Path) -> nn.Module:
    """The judge of a setting, in eval mode and without gradients: another network, of other pictures.

    It was trained on shifted pictures, of both data sets where the setting has two; those in colour were flipped, too.

    Args:
        setting: The setting.
        data: The folder of parquet files.
        cache: The folder of trained weights.
    """
    colour = setting.shape == COLOUR

    def fit(model: nn.Module) -> None:
        names = dict.fromkeys((setting.source, setting.target))  # each once
        images, labels = zip(*(_share(name, "evaluator", data) for name in names), strict=True)
        labelled = Pictures(torch.cat(images), torch.cat(labels))
        if colour:
            generate_colour.train(model, labelled)
        else:
            _train(model, labelled, 0, EVALUATOR_EPOCHS, shift=EVALUATOR_SHIFT)

    build = generate_colour.evaluator_net if colour else evaluator_net
    return _kept(f"generate-evaluator-{setting.name}", cache, 0, build, fit)


def _kept(
    name: str, cache: Path, seed: int, build: Callable[[], nn.Module], fit: Callable[[nn.Module], None]
) -> nn.Module:
    """A network with the weights of its file, or else trained and written there."""
    path = cache / f"{name}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build()
        if path.exists():
            made.load_state_dict(penult.io.read(path, kind=KIND).tensors)
        else:
            fit(made.train())
            cache.mkdir(parents=True, exist_ok=True)
            penult.io.write(path, made.state_dict(), KIND, {"network": name})
    return made.eval().requires_grad_(False)


def _train(model: nn.Module, labelled: Pictures, seed: int, epochs: int, shift: int = 0) -> None:
    """AdamW, its rate falling along a cosine; each picture is shifted by up to so many pixels."""
    images, labels = labelled
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // BATCH))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            x = shifted(images[rows], shift, generator) if shift else images[rows]
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """The share of pictures whose label is the largest logit."""
    predicted = torch.cat([model(x).argmax(-1) for x in pictures.images.split(500)])
    return float((predicted == pictures.labels).double().mean())


# --- the command line ---------------------------------------------------------------------------------------


def _networks(setting: Setting, data: Path, cache: Path) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names of all networks of a setting, and what gives them."""
    for kind in KINDS[:1] if setting.published else KINDS:
        for seed in SEEDS:
            yield (
                f"classifier {kind} {seed}",
                lambda seed=seed, kind=kind: classifier(setting, seed, data, cache, kind),
            )
    for seed in () if setting.published else SEEDS:
        yield f"few {seed}", lambda seed=seed: few_classifier(setting, seed, data, cache)
    yield "evaluator", lambda: evaluator(setting, data, cache)


def main(arguments: list[str] | None = None) -> int:
    """Train the networks and say how well they do."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files and published weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder for trained weights")
    parser.add_argument(
        "--only", action="append", choices=SETTINGS, help="only this setting (repeatable; default: all)"
    )
    parser.add_argument("--test", action="store_true", help="also print the accuracy on test images")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    columns = ("generator", "selection", *(["test"] if options.test else []))
    print("accuracy (%) on shares of each setting, and seconds until the network was there")
    print(f"{'setting':10}  {'network':19}", *(f"{share:>9}" for share in columns), f"{'s':>5}")
    for name in options.only or SETTINGS:
        setting = SETTINGS[name]
        for network, get in _networks(setting, options.data, options.cache):
            start = time.monotonic()
            model = get()
            taken = time.monotonic() - start
            found = [100 * accuracy(model, pictures(setting, share, options.data)) for share in columns]
            print(f"{name:10}  {network:19}", *(f"{value:9.2f}" for value in found), f"{taken:5.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
