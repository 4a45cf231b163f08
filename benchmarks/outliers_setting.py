"""The setting of the benchmark of outlier scores: networks, and their activations of many sets of images.

A network knows the classes that it was trained on, and returns logits for any image. A score, computed from the input
of its head, should separate familiar images from others. The sets of images are those of `outliers_sets.py`.

* ``mnist-relu-0`` to ``-2``, ``mnist-linear-0`` to ``-2``: the networks of `networks.py` on MNIST from three seeds.
* ``cifar-resnet32``, ``cifar-resnet44``, each also fine-tuned (``-ft``): those of `networks.py`.
* ``mnist-relu-8``: as ``mnist-relu-0``, trained on eight digits. The other two are the set "held-out classes".
* ``cifar-small-8``: the small network of `generate_colour.py` on the first 20,000 training images of eight classes of
  CIFAR-10; the other two are held out.

Trained weights and activations are stored in the folder ``outliers`` of the cache and read from it the next time; an
extraction that was stopped continues. Remove the folder after a change of networks or sets.

Example:
    python benchmarks/outliers_setting.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/outliers_setting.py --data ../shared/data --cache /tmp/penult-cache --only mnist-relu-0

    >>> from pathlib import Path
    >>> from outliers_setting import features, halves
    >>> data, cache = Path("../shared/data"), Path("/tmp/penult-cache")
    >>> familiar = features("cifar-resnet32", "familiar", data, cache)
    >>> fit_rows, test_rows = halves(len(familiar))
    >>> features("cifar-resnet32", "textures", data, cache)
    Activations(N=1100, d=64, K=10, labels=False, dtype=torch.float32, device=cpu, shards=1)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

import generate_colour
import networks
import outliers_sets
import penult
from networks import KIND
from outliers_sets import (
    CLASSES,
    CONTAMINATING,
    FAMILIAR,
    FAR,
    HELD_OUT,
    SELECTION,
    SHIFTED,
    TESTED,
    Pictures,
    halves,
    pictures,
    training,
)

__all__ = [
    "CONTAMINATING",
    "FAMILIAR",
    "FAR",
    "HELD_OUT",
    "NETWORKS",
    "SELECTION",
    "SHIFTED",
    "TESTED",
    "OutlierNetwork",
    "Pictures",
    "features",
    "halves",
    "head",
    "model",
    "pictures",
    "sets",
]

BATCH = 250
SEEDS = (0, 1, 2)  # of the networks on MNIST
SMALL = 20_000  # training pictures of the small network in colour


# --- networks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutlierNetwork:
    """One network.

    Attributes:
        name: Its name.
        data: The data set that it was trained on, ``"mnist"`` or ``"cifar10"``.
        held_out: Classes that it does not know; the others are numbered anew, in their order.
        source: Its name in `networks.NETWORKS`, which has its weights; None where it is trained here.
        seed: Of its initial weights and of the order of the pictures.
        build: Makes it, where it is trained here; random weights are drawn from torch's default generator.
        fit: Trains it, from the folder of data.
    """

    name: str
    data: str
    held_out: tuple[int, ...] = ()
    source: str | None = None
    seed: int = 0
    build: Callable[[], nn.Module] | None = None
    fit: Callable[[nn.Module, Path], None] | None = None


def _drawn(seed: int) -> tuple[int, ...]:
    """Two classes to hold out."""
    return tuple(sorted(torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))[:2].tolist()))


def _of_known(build: Callable[[], nn.Sequential], held_out: tuple[int, ...]) -> nn.Sequential:
    """A network with fewer rows of the head."""
    made = build()
    made[-1] = nn.Linear(made[-1].in_features, CLASSES - len(held_out))
    return made


def _fit_digits(model: nn.Module, data: Path, held_out: tuple[int, ...]) -> None:
    networks.train_mnist(model, data, pictures=training("mnist", data, held_out))


def _fit_small(model: nn.Module, data: Path, held_out: tuple[int, ...]) -> None:
    generate_colour.train(model, training("cifar10", data, held_out, SMALL))


def _networks() -> list[OutlierNetwork]:
    found = []
    for kind in ("relu", "linear"):
        build = partial(networks.mnist_net, relu=kind == "relu")
        for seed in SEEDS:
            # what `networks.py` trained from its own seed is not trained again
            source = f"mnist-{kind}" if seed == networks.SEED else None
            fit = partial(networks.train_mnist, seed=seed)
            found.append(OutlierNetwork(f"mnist-{kind}-{seed}", "mnist", (), source, seed, build, fit))
    for name in ("cifar-resnet32", "cifar-resnet44", "cifar-resnet32-ft", "cifar-resnet44-ft"):
        found.append(OutlierNetwork(name, "cifar10", source=name))
    for name, data, seed, whole, train in (
        ("mnist-relu-8", "mnist", 0, partial(networks.mnist_net, relu=True), _fit_digits),
        ("cifar-small-8", "cifar10", 1, generate_colour.evaluator_net, _fit_small),
    ):
        out = _drawn(seed)
        build, fit = partial(_of_known, whole, out), partial(train, held_out=out)
        found.append(OutlierNetwork(name, data, out, build=build, fit=fit))
    return found


NETWORKS: dict[str, OutlierNetwork] = {network.name: network for network in _networks()}


def _network(name: str) -> OutlierNetwork:
    if name not in NETWORKS:
        raise ValueError(f"network is {name!r}; it must be one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def sets(network: str) -> tuple[str, ...]:
    """The names of all sets of a network, familiar pictures first.

    Args:
        network: One of `NETWORKS`.

    Raises:
        ValueError: There is no such network.
    """
    found = _network(network)
    return outliers_sets.set_names(found.data, found.held_out)


@lru_cache(maxsize=2)
def model(network: str, data: Path, cache: Path) -> nn.Module:
    """A network in eval mode and without gradients; it is trained where `cache` does not have its weights yet.

    Args:
        network: One of `NETWORKS`.
        data: The folder of parquet files and published weights.
        cache: The folder of trained weights.

    Raises:
        ValueError: There is no such network.
    """
    found = _network(network)
    made = networks.model(found.source, data, cache) if found.source else _kept(found, data, cache)
    made = made.eval().requires_grad_(False)
    return made.to(memory_format=torch.channels_last) if found.data == "cifar10" else made  # faster on a CPU


def _kept(network: OutlierNetwork, data: Path, cache: Path) -> nn.Module:
    """A network with the weights of its file, or else trained and written there."""
    path = cache / "outliers" / f"{network.name}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(network.seed)
        made = network.build()
        if path.exists():
            made.load_state_dict(penult.io.read(path, kind=KIND).tensors)
        else:
            network.fit(made.train(), data)
            path.parent.mkdir(parents=True, exist_ok=True)
            penult.io.write(path, made.state_dict(), KIND, {"network": network.name})
    return made


@lru_cache(maxsize=2)
def head(network: str, data: Path, cache: Path) -> penult.Head:
    """The head of a network with its certificate, as `penult.find_head` finds it on sixteen pictures.

    Args:
        network: One of `NETWORKS`.
        data: The folder of parquet files and published weights.
        cache: The folder of trained weights.

    Raises:
        ValueError: There is no such network.
    """
    return penult.find_head(model(network, data, cache), outliers_sets.first(_network(network).data, data, 16))


# --- activations --------------------------------------------------------------------------------------------


def features(network: str, set_name: str, data: Path, cache: Path) -> penult.Activations:
    """What the head of a network reads of a set of pictures, extracted once into a folder in `cache`.

    There are labels with familiar and shifted pictures. Where the folder is complete, neither the network nor the
    pictures are made.

    Args:
        network: One of `NETWORKS`.
        set_name: One of `sets`.
        data: The folder of parquet files and published weights.
        cache: The folder of trained weights and activations.

    Raises:
        ValueError: There is no such network, or no such set of it.
    """
    found, names = _network(network), sets(network)
    if set_name not in names:
        raise ValueError(f"set is {set_name!r}; those of {network} are {', '.join(names)}")
    folder = cache / "outliers" / network / set_name.replace(" ", "-")
    with suppress(FileNotFoundError, penult.io.FileFormatError):  # not there, incomplete, or else extract says what
        return penult.Activations.open(folder)
    images, labels = pictures(found.data, set_name, data, found.held_out)
    batches = images.split(BATCH)
    return penult.extract(
        penult.Tap(model(network, data, cache), head(network, data, cache)),
        batches if labels is None else list(zip(batches, labels.split(BATCH), strict=True)),
        out=folder,
        progress=False,
    )


# --- the command line ---------------------------------------------------------------------------------------


def _prepare(network: str, data: Path, cache: Path) -> None:
    """Train and extract, and say what came out."""
    start = time.monotonic()
    model(network, data, cache)
    print(f"{network}: weights after {time.monotonic() - start:.0f} s", flush=True)
    for name in sets(network):
        start = time.monotonic()
        acts, note = features(network, name, data, cache), ""
        if name == FAMILIAR:
            acts = acts[halves(len(acts))[1]]
        if acts.labels is not None:
            note = f"  {100 * float((acts.predicted == acts.labels).double().mean()):8.2f}"
        confidence = float(acts.logits.softmax(-1).amax(-1).mean())
        taken = time.monotonic() - start
        print(f"{network:17}  {name:16}  {confidence:10.4f}  {taken:5.1f}{note}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Prepare every network that is asked for."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files and published weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder for trained weights and activations")
    parser.add_argument(
        "--only", action="append", choices=NETWORKS, help="only this network (repeatable; default: all)"
    )
    parser.add_argument("--threads", type=int, default=1, help="number of threads of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("mean confidence in the predicted class, seconds, and accuracy (%); familiar: of the testing half")
    print(f"{'network':17}  {'set':16}  {'confidence':>10}  {'s':>5}  {'accuracy':>8}")
    for network in options.only or NETWORKS:
        _prepare(network, options.data, options.cache)
    return 0


if __name__ == "__main__":
    sys.exit(main())
