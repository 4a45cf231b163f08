"""The setting of the generation benchmark: shares of pictures, classifiers, few labelled pictures, evaluators.

A generator of pictures is conditioned on the penultimate activations of a classifier, and was trained on pictures
without labels. What it makes is judged by an evaluator that shares no training picture with either. All pictures are
(N, 1, 28, 28) in [0, 1]; those of USPS are enlarged from 16 to 20 pixels, bilinearly, in a border of 4.

Rows of the training files, none in two shares of one data set:

============  ===============  =============  ==================================================================
share         MNIST            USPS           use
============  ===============  =============  ==================================================================
`classifier`  0 - 20,000                      trains the classifiers, with labels
`generator`   20,000 - 40,000  0 - 4,200      trains generators, without labels; holds the few labelled pictures
`evaluator`   40,000 - 50,000  4,200 - 6,600  trains the evaluator, with labels
`held-out`    50,000 - 56,000                 banks of pictures that no generator and no network was trained on
`selection`   56,000 - 60,000  6,600 - 7,291  real pictures to make choices by
============  ===============  =============  ==================================================================

Rows of USPS are those of its training file in an order that is drawn once. `test` is the test file, 10,000 pictures of
MNIST and 2,007 of USPS: for final figures only, and not loaded before it is asked for.

* ``mnist``: all shares are of MNIST.
* ``mnist-usps``: the classifiers are those of MNIST, all other shares are of USPS, which has no `held-out`. Its
  evaluator was trained on the evaluator shares of both.

Trained weights are kept in a folder and found there the next time; all take ten minutes on one core. Remove them
after a change of how a network is trained, or of the shares. Few labelled pictures are part of the generator share,
so the accuracy on it of a network that was trained on them is a little too high.

Example:
    python benchmarks/generate_setting.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/generate_setting.py --data ../shared/data --cache /tmp/penult-cache --test

    >>> from pathlib import Path
    >>> from generate_setting import SETTINGS, accuracy, classifier, pictures
    >>> setting, data, cache = SETTINGS["mnist-usps"], Path("../shared/data"), Path("/tmp/penult-cache")
    >>> accuracy(classifier(0, data, cache), pictures(setting, "selection", data))
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

import penult
from distill_setting import Pictures
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
}
ORDERS = {"usps": 0}  # seeds of orders that rows are put in, where they are
SHARES = ("classifier", "generator", "evaluator", "held-out", "selection", "test")
KINDS = ("relu", "linear")
SEEDS = (0, 1)  # of the networks that the command line prepares
SIZE, CONTENT, BORDER = 28, 20, 4  # pixels

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
    """

    name: str
    source: str
    target: str

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
    for each in (Setting("mnist", source="mnist", target="mnist"), Setting("mnist-usps", source="mnist", target="usps"))
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
    file = parquet(data / f"{name}-{'test' if share == 'test' else 'train'}.parquet", mode="L")
    rows = torch.arange(len(file))
    if share != "test":
        if name in ORDERS:
            rows = torch.randperm(len(file), generator=torch.Generator().manual_seed(ORDERS[name]))
        wanted = ROWS[name][share]
        if wanted.stop > len(file):
            raise ValueError(f"{share} is rows {wanted.start} to {wanted.stop} of {file}, which has {len(file)}")
        rows = rows[wanted.start : wanted.stop]
    images, labels = zip(*(file[row] for row in rows.tolist()), strict=True)
    return Pictures(as_mnist(torch.stack(images)), torch.tensor(labels))


def as_mnist(images: Tensor) -> Tensor:
    """Pictures in the geometry of MNIST: those that are not 28 x 28 are scaled to 20 x 20, in a border of 4 zeros.

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
    """Three convolutions with batch normalisation and pooling, a layer of 64, ReLU and the head."""

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
def classifier(seed: int, data: Path, cache: Path, kind: str = "relu") -> nn.Module:
    """A classifier of both settings, in eval mode and without gradients; trained where `cache` has no weights yet.

    Args:
        seed: Of its initial weights and of the order of the pictures.
        data: The folder of parquet files.
        cache: The folder of trained weights.
        kind: As in `classifier_net`.
    """

    def fit(model: nn.Module) -> None:
        _train(model, pictures(SETTINGS["mnist"], "classifier", data), seed, EPOCHS)

    return _kept(f"generate-classifier-{kind}-{seed}", cache, seed, lambda: classifier_net(kind), fit)


@lru_cache(maxsize=8)
def few_classifier(setting: Setting, seed: int, data: Path, cache: Path) -> nn.Module:
    """A classifier with ReLU that was trained on `few` alone, in eval mode and without gradients.

    Args:
        setting: The setting.
        seed: Of the few pictures, of the initial weights and of the order.
        data: The folder of parquet files.
        cache: The folder of trained weights.
    """

    def fit(model: nn.Module) -> None:
        _train(model, few(setting, seed, data), seed, FEW_EPOCHS)

    return _kept(f"generate-few-{setting.name}-{seed}", cache, seed, classifier_net, fit)


@lru_cache(maxsize=4)
def evaluator(setting: Setting, data: Path, cache: Path) -> nn.Module:
    """The judge of a setting, in eval mode and without gradients: another network, of other pictures.

    It was trained on shifted pictures, of both data sets where the setting has two.

    Args:
        setting: The setting.
        data: The folder of parquet files.
        cache: The folder of trained weights.
    """

    def fit(model: nn.Module) -> None:
        names = dict.fromkeys((setting.source, setting.target))  # each once
        images, labels = zip(*(_share(name, "evaluator", data) for name in names), strict=True)
        _train(model, Pictures(torch.cat(images), torch.cat(labels)), 0, EVALUATOR_EPOCHS, shift=EVALUATOR_SHIFT)

    return _kept(f"generate-evaluator-{setting.name}", cache, 0, evaluator_net, fit)


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
            x = _shifted(images[rows], shift, generator) if shift else images[rows]
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[rows]).backward()
            optimizer.step()
            schedule.step()


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each shifted by up to so many pixels over black."""
    count, _, height, width = images.shape
    down, across = torch.randint(2 * most + 1, (2, count, 1), generator=generator)
    i, j = down + torch.arange(height), across + torch.arange(width)
    padded = F.pad(images, (most,) * 4)
    return padded[torch.arange(count)[:, None, None], 0, i[:, :, None], j[:, None, :]][:, None]


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """The share of pictures whose label is the largest logit."""
    predicted = torch.cat([model(x).argmax(-1) for x in pictures.images.split(500)])
    return float((predicted == pictures.labels).double().mean())


# --- the command line ---------------------------------------------------------------------------------------


def _networks(setting: Setting, data: Path, cache: Path) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names of all networks of a setting, and what gives them."""
    for kind in KINDS:
        for seed in SEEDS:
            yield f"classifier {kind} {seed}", lambda seed=seed, kind=kind: classifier(seed, data, cache, kind)
    for seed in SEEDS:
        yield f"few {seed}", lambda seed=seed: few_classifier(setting, seed, data, cache)
    yield "evaluator", lambda: evaluator(setting, data, cache)


def main(arguments: list[str] | None = None) -> int:
    """Train the networks and say how well they do."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--cache", type=Path, required=True, help="folder of trained weights")
    parser.add_argument("--only", action="append", choices=SETTINGS, help="this setting (repeatable; default: all)")
    parser.add_argument("--test", action="store_true", help="also say the accuracy on test pictures")
    parser.add_argument("--threads", type=int, default=1, help="for torch")
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
