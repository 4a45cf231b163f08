"""The reference networks of the benchmarks, and their cached activations.

Each takes images in [0, 1], as `penult.data` returns them, and includes their normalisation:

* ``mnist-relu``, ``mnist-linear``: a small convolutional network on MNIST, d = 64, with and without a ReLU before the
  head; trained here from seed 0 for three epochs.
* ``cifar-resnet32``, ``cifar-resnet44``: published CIFAR-10 networks, d = 64 after ReLU and average pooling. The copy
  of CIFAR-10 is recompressed as JPEG, which lowers their accuracy by about ten points.
* ``cifar-resnet32-ft``, ``cifar-resnet44-ft``: the same after one epoch of training on 20,000 images of that copy.
* ``efficientnet-lite0``: the ImageNet classifier of two PyPI packages, d = 1280 and K = 1000, on CIFAR-10 images
  enlarged to 224 x 224. The labels of CIFAR-10 are not its classes, and are not stored.

No network was trained on the images whose activations it returns by default: the 10,000 test images, and for
EfficientNet-Lite0 24,000 of training and test images. Trained weights and activations are stored in a folder and read
from it the next time; an extraction that was stopped continues. Remove the folder after a change of the training of a
network. The number of threads is that of torch (here one: ``--threads``).

Example:
    python benchmarks/networks.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/networks.py --data ../shared/data --cache /tmp/penult-cache --only mnist-relu

    >>> from pathlib import Path
    >>> from networks import activations
    >>> acts = activations("mnist-relu", Path("../shared/data"), Path("/tmp/penult-cache"))
    >>> acts
    Activations(N=10000, d=64, K=10, labels=True, dtype=torch.float32, device=cpu, shards=1)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

import penult
from families import efficientnet_lite0
from penult.data import parquet

__all__ = [
    "NETWORKS",
    "Enlarged",
    "Network",
    "ResNet",
    "activations",
    "head",
    "loader",
    "mnist_net",
    "model",
    "train_mnist",
]

KIND = "benchmark-network"  # of the files of weights
BATCH = 250
SEED = 0
ALL = 24_000  # pictures of the split "all": those of the test split, then of the training split
FINE_TUNE = 20_000


# --- architectures ------------------------------------------------------------------------------------------


def mnist_net(relu: bool) -> nn.Sequential:
    """Two convolutions, pooling, a layer of 64 and the head, for grey pictures (B, 1, 28, 28).

    Args:
        relu: Whether a ReLU stands before the head.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(),
        nn.Conv2d(16, 32, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.25),
        nn.Linear(32 * 10 * 10, 64), nn.ReLU() if relu else nn.Identity(),
        nn.Linear(64, 10),
    )  # fmt: skip


class _Block(nn.Module):
    """Two convolutions around a shortcut without parameters (option A): strided, new channels zero."""

    def __init__(self, channels: int, planes: int) -> None:
        super().__init__()
        self.stride, self.padding = (1, 0) if channels == planes else (2, (planes - channels) // 2)
        self.conv1 = nn.Conv2d(channels, planes, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet(nn.Module):
    """The residual network of He et al. (2015) for colour pictures (B, 3, 32, 32), d = 64.

    Args:
        blocks: In each of the three stages; depth is 6 blocks + 2.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(_Block(16, 32), *(_Block(32, 32) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(_Block(32, 64), *(_Block(64, 64) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("sd", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of pictures in [0, 1]."""
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.sd)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Enlarged(nn.Module):
    """EfficientNet-Lite0 for pictures of any size in [0, 1]: enlarged to 224 x 224 and normalised as in its training.

    Args:
        classifier: The network for normalised pictures.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1000)."""
        x = F.interpolate(x, (224, 224), mode="bicubic", align_corners=False).clamp(0, 1)
        return self.classifier(((255 * x - 127) / 128).contiguous(memory_format=torch.channels_last))


# --- weights ------------------------------------------------------------------------------------------------


def train_mnist(
    model: nn.Module,
    data: Path,
    seed: int = SEED,
    pictures: tuple[Tensor, Tensor] | None = None,
    epochs: int = 3,
    batch: int = 64,
    rate: float = 2e-3,
) -> None:
    """Adam, its rate rising and falling once.

    Args:
        model: In train mode; dropout draws from torch's default generator.
        data: The folder of parquet files.
        seed: Of the order of the pictures.
        pictures: Images and labels; None means the training file.
        epochs: How often each is seen.
        batch: Pictures of a step.
        rate: The highest.
    """
    images, labels = pictures or parquet(data / "mnist-train.parquet").load()[:2]
    steps = epochs * -(-len(labels) // batch)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator, report = torch.Generator().manual_seed(seed), _Report("training")
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(batch):
            _step(model, optimizer, images[rows], labels[rows])
            schedule.step()
            report(schedule.last_epoch, steps)


def _published(model: nn.Module, data: Path, name: str) -> None:
    model.load_state_dict(load_file(data / name) | _counters(model))


def _fine_tune(model: nn.Module, data: Path, name: str, batch: int = 128, rate: float = 0.01) -> None:
    """One pass of SGD, its rate falling to zero, over flipped and shifted pictures."""
    _published(model, data, name)
    pictures = parquet(data / "cifar10-train.parquet")
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    steps = -(-FINE_TUNE // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, report = torch.Generator().manual_seed(SEED), _Report("fine-tuning")
    order = torch.randperm(FINE_TUNE, generator=generator).tolist()
    for images, labels in DataLoader(Subset(pictures, order), batch_size=batch):
        _step(model, optimizer, _augmented(images, generator), labels)
        schedule.step()
        report(schedule.last_epoch, steps)


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each flipped or not, and shifted by up to four pixels over black."""
    count, _, height, width = images.shape
    flips = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    shifts = torch.randint(9, (count, 2), generator=generator).tolist()
    padded = F.pad(images, (4, 4, 4, 4))
    return torch.stack([x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, shifts, strict=True)])


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


class _Report:
    """Says once a minute how far something is, which may take many."""

    def __init__(self, what: str) -> None:
        self.what, self.start = what, time.monotonic()
        self.last = self.start

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.last > 60:
            self.last = now
            print(f"{self.what}: batch {done} of {total}, {now - self.start:.0f} s", flush=True)


def _counters(model: nn.Module) -> dict[str, Tensor]:
    """Numbers of batches seen, which the published files leave out."""
    return {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}


# --- the networks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        name: Its name.
        data: The data set whose pictures it takes: ``{data}-train.parquet`` and ``{data}-test.parquet``.
        build: Makes it; random weights are drawn from torch's default generator.
        fit: Gives it its weights, from the folder of data; None where `build` does.
        trained: Whether `fit` trains, so that the weights are kept.
        split: Whose activations are given by default.
        labels: Whether the labels of the data set are classes of the network.
        rectified: Whether a ReLU stands right before the head, so that there are pre-activations, too.
        batch: Pictures in a batch of the extraction.
    """

    name: str
    data: str
    build: Callable[[], nn.Module]
    fit: Callable[[nn.Module, Path], None] | None = None
    trained: bool = False
    split: str = "test"
    labels: bool = True
    rectified: bool = False
    batch: int = BATCH


def _networks() -> list[Network]:
    found = [
        Network("mnist-relu", "mnist", partial(mnist_net, relu=True), train_mnist, trained=True, rectified=True),
        Network("mnist-linear", "mnist", partial(mnist_net, relu=False), train_mnist, trained=True),
    ]
    depths = {32: 5, 44: 7}
    for depth, blocks in depths.items():
        weights = partial(_published, name=f"cifar10-resnet{depth}.safetensors")
        found.append(Network(f"cifar-resnet{depth}", "cifar10", partial(ResNet, blocks), weights))
    for depth, blocks in depths.items():
        weights = partial(_fine_tune, name=f"cifar10-resnet{depth}.safetensors")
        found.append(Network(f"cifar-resnet{depth}-ft", "cifar10", partial(ResNet, blocks), weights, trained=True))
    enlarged = Network(
        "efficientnet-lite0", "cifar10", lambda: Enlarged(efficientnet_lite0()), split="all", labels=False, batch=32
    )
    return [*found, enlarged]


NETWORKS: dict[str, Network] = {network.name: network for network in _networks()}


def model(name: str, data: Path, cache: Path) -> nn.Module:
    """A network in eval mode; it is trained where `cache` does not have its weights yet.

    Args:
        name: One of `NETWORKS`.
        data: The folder of parquet files and published weights.
        cache: The folder of trained weights.
    """
    network = NETWORKS[name]
    path = cache / f"{name}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        made = network.build()
        if network.trained and path.exists():
            made.load_state_dict(penult.io.read(path, kind=KIND).tensors)
        elif network.fit is not None:
            network.fit(made.train(), data)
            if network.trained:
                cache.mkdir(parents=True, exist_ok=True)
                penult.io.write(path, made.state_dict(), KIND, {"network": name})
    return made.eval()


# --- activations --------------------------------------------------------------------------------------------


def loader(name: str, data: Path, split: str | None = None, limit: int | None = None) -> DataLoader[Any]:
    """Batches of (pictures, labels) of a network in the order of the files; of pictures alone if labels mean nothing.

    Args:
        name: One of `NETWORKS`.
        data: The folder of parquet files.
        split: ``"test"``, ``"train"``, or ``"all"`` for 24,000 pictures: those of the test split, and then as many of
            the training split. None means the network's own.
        limit: How many pictures at most, from the first.
    """
    network = NETWORKS[name]
    split = split or network.split
    splits = ("test", "train") if split == "all" else (split,)
    pictures = ConcatDataset([parquet(data / f"{network.data}-{each}.parquet") for each in splits])
    rows = min(len(pictures), ALL if split == "all" else len(pictures), limit or len(pictures))
    return DataLoader(Subset(pictures, range(rows)), network.batch, collate_fn=None if network.labels else _unlabelled)


def _unlabelled(items: list[tuple[Tensor, int]]) -> Tensor:
    return torch.stack([picture for picture, _ in items])


def head(name: str, data: Path, cache: Path) -> penult.Head:
    """The head of a network with its certificate, as `penult.find_head` finds it on sixteen pictures."""
    return _head(model(name, data, cache), name, data)


def _head(made: nn.Module, name: str, data: Path) -> penult.Head:
    batch = next(iter(loader(name, data, limit=16)))
    return penult.find_head(made, batch[0] if NETWORKS[name].labels else batch)


def activations(
    name: str,
    data: Path,
    cache: Path,
    split: str | None = None,
    pre_activation: bool = False,
    limit: int | None = None,
    progress: Callable[[int, int | None], None] | bool | None = None,
) -> penult.Activations:
    """Penultimate activations of a network, extracted once into a folder in `cache`.

    Args:
        name: One of `NETWORKS`.
        data: The folder of parquet files and published weights.
        cache: The folder of trained weights and activations.
        split: As for `loader`.
        pre_activation: As for `penult.extract`: the inputs of the ReLU before the head, of networks that have one.
        limit: As for `loader`; another limit is another folder.
        progress: As for `penult.extract`.
    """
    network, made = NETWORKS[name], model(name, data, cache)
    names = parquet(data / f"{network.data}-test.parquet").class_names if network.labels else None
    folder = f"{name}-{split or network.split}" + "-pre" * pre_activation + (f"-{limit}" if limit else "")
    return penult.extract(
        penult.Tap(made, _head(made, name, data)),
        loader(name, data, split, limit),
        out=cache / folder,
        class_names=names,
        progress=progress,
        pre_activation=pre_activation,
    )


# --- the command line ---------------------------------------------------------------------------------------


def _prepare(name: str, data: Path, cache: Path) -> None:
    """Train and extract, and say how it goes."""
    start, report = time.monotonic(), _Report(name)
    model(name, data, cache)
    print(f"{name}: weights after {time.monotonic() - start:.0f} s", flush=True)
    for pre_activation in (False, True) if NETWORKS[name].rectified else (False,):
        acts = activations(name, data, cache, pre_activation=pre_activation, progress=report)
        accuracy = ""
        if acts.labels is not None:
            accuracy = f"accuracy {100 * float((acts.predicted == acts.labels).double().mean()):.2f} %, "
        print(f"{name}: {accuracy}{acts}, {time.monotonic() - start:.0f} s", flush=True)


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
    for name in options.only or NETWORKS:
        _prepare(name, options.data, options.cache)
    return 0


if __name__ == "__main__":
    sys.exit(main())
