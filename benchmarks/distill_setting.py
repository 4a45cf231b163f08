"""The setting of the distillation benchmark: teachers, shifted domains, few labelled images, small students.

A teacher was trained on a source domain. The *target* domain has the same classes under other conditions, and n
labelled images per class. A small student is trained on these for 300 steps by some method, which can use the
teacher. Its accuracy on the test images of the target domain is measured.

* ``mnist``: n = 50. Three teachers, `networks.mnist_net` without ReLU (d = 64) from seeds 0, 1, 2, trained here for
  three epochs on the first 50,000 training images. The distillation sets and the validation images come from the last
  10,000, the pool, so that no teacher has seen them. Domain ``usps`` has its own images.
* ``cifar10``: n = 100. The published ResNet32, ResNet44, and ResNet32 again (d = 64). The pool is rows 30,000 to
  50,000 of the training images. The published networks were trained on these in their original form, without shift
  (the copy used here is recompressed).

The severity of a domain was chosen by the teachers' accuracy on images of the pool (``--scan``). A shifted image is
always the same: the randomness of a shift depends only on the row. Test images are loaded by `Split.test` only.

Example:
    python benchmarks/distill_setting.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/distill_setting.py --data ../shared/data --cache /tmp/penult-cache --scan --only mnist

    >>> from pathlib import Path
    >>> from distill_baselines import CrossEntropy
    >>> from distill_setting import SETTINGS, accuracy, begin, shares, train
    >>> setting = SETTINGS["mnist"]
    >>> split = shares(setting, setting.domain("usps"), 0, Path("../shared/data"))
    >>> student, method = begin(setting, lambda width: CrossEntropy(), seed=0)
    >>> train(method, student, *split.train, seed=0)
    >>> accuracy(method, student, *split.validation)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
import penult
from penult.data import ShiftedDataset, parquet
from penult.data._dataset import ImageDataset

__all__ = [
    "SETTINGS",
    "Domain",
    "Method",
    "Pictures",
    "Setting",
    "Split",
    "Student",
    "accuracy",
    "begin",
    "head",
    "outputs",
    "shares",
    "source_activations",
    "student",
    "teacher",
    "train",
]

BATCH = 64
STEPS = 300
RATE = 3e-3
VALIDATION = 2000
SOURCE = 2000  # pictures of `source_activations`
POOL_LOOK, TEST_LOOK = 0, 1  # seeds of the shifts
SEEN = 50_000  # MNIST pictures that teachers are trained on


# --- settings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """The classes of a setting under other conditions.

    Attributes:
        name: Its name.
        kind: ``"none"``, ``"usps"`` for the pictures of that data set, or a shift of `penult.data.shift`.
        severity: Of the shift.
    """

    name: str
    kind: str
    severity: float = 0.0


@dataclass(frozen=True)
class Setting:
    """Teachers and domains of one data set. `dataclasses.replace` makes variants, as of `per_class`.

    Attributes:
        name: Its name and its data set's: the source is ``{name}-train.parquet`` and ``{name}-test.parquet``.
        per_class: Labelled pictures of each class in a distillation set, n.
        size: Height and width of the pictures.
        pool: The first row of the training pictures that belongs to the pool.
        test: How many test pictures at most, from the first.
        teachers: Names of the teachers by their index.
        domains: The domains; the first is the source's own.
    """

    name: str
    per_class: int
    size: int
    pool: int
    test: int
    teachers: tuple[str, ...]
    domains: tuple[Domain, ...]

    def domain(self, name: str) -> Domain:
        """The domain of that name."""
        return next(each for each in self.domains if each.name == name)


SETTINGS: dict[str, Setting] = {
    each.name: each
    for each in (
        Setting(
            "mnist", per_class=50, size=28, pool=SEEN, test=10_000,
            teachers=tuple(f"distill-teacher-mnist-{seed}" for seed in range(3)),
            domains=(
                Domain("none", "none"),
                Domain("usps", "usps"),
                Domain("texture-weak", "texture", 0.50),  # teachers: 86 % on average
                Domain("texture", "texture", 0.65),  # 54 %
                Domain("texture-strong", "texture", 0.78),  # 25 %
                Domain("rotation", "rotation", 0.50),
                Domain("inversion", "inversion", 1.00),
                Domain("noise", "noise", 0.66),  # 50 %
                Domain("blur", "blur", 1.00),  # 54 %
                Domain("contrast", "contrast", 0.96),  # 47 %
            ),
        ),
        Setting(
            "cifar10", per_class=100, size=32, pool=30_000, test=5_000,
            teachers=("cifar-resnet32", "cifar-resnet44", "cifar-resnet32"),
            domains=(
                Domain("none", "none"),
                Domain("texture", "texture", 0.21),  # 50 %
                Domain("noise", "noise", 0.06),  # 41 %
                Domain("pixelation", "pixelation", 0.30),  # 20 %; blocks of 3 x 3
            ),
        ),
    )
}  # fmt: skip
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {  # severities to scan
    "mnist": {
        "texture": (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.78),
        "noise": (0.3, 0.4, 0.5, 0.6, 0.65, 0.66, 0.7, 0.8),
        "blur": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "contrast": (0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97),
    },
    "cifar10": {
        "texture": (0.1, 0.14, 0.18, 0.21, 0.22, 0.26),
        "noise": (0.04, 0.05, 0.06, 0.08, 0.1),
        "pixelation": (0.2, 0.3, 0.4),
    },
}


# --- pictures -----------------------------------------------------------------------------------------------


class Pictures(NamedTuple):
    """Labelled pictures.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """The pictures of one setting, domain and seed; each share is loaded when it is first asked for.

    Attributes:
        setting: The setting.
        domain: The domain.
        data: The folder of parquet files.
        train_rows: Rows of the distillation set in its file.
        validation_rows: Rows of the validation pictures in the same file.
    """

    setting: Setting
    domain: Domain
    data: Path
    train_rows: Tensor
    validation_rows: Tensor

    @cached_property
    def train(self) -> Pictures:
        """The distillation set: n pictures of each class, from the pool."""
        return _pictures(_looks(self.setting, self.domain, "train", self.data), self.train_rows.tolist())

    @cached_property
    def validation(self) -> Pictures:
        """2000 other pictures of the pool."""
        return _pictures(_looks(self.setting, self.domain, "train", self.data), self.validation_rows.tolist())

    @property
    def test(self) -> Pictures:
        """Test pictures, the same for all seeds; for final figures only."""
        return _test(self.setting, self.domain, self.data)


@lru_cache(maxsize=4)
def shares(setting: Setting, domain: Domain, seed: int, data: Path) -> Split:
    """Draw a distillation set and validation pictures from the pool.

    Args:
        setting: The setting.
        domain: One of its domains. Domains of the same pictures get the same rows.
        seed: Of the draw.
        data: The folder of parquet files.
    """
    labels = _file(setting, domain, "train", data).labels
    first = _pool(setting, domain)
    order = first + torch.randperm(len(labels) - first, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for y in labels.unique():
        chosen[order[labels[order] == y][: setting.per_class]] = True
    others = order[~chosen[order]]
    return Split(setting, domain, data, chosen.nonzero().flatten(), others[:VALIDATION].sort().values)


def _pool(setting: Setting, domain: Domain) -> int:
    """The first row of the pool; no teacher was trained on any USPS picture."""
    return 0 if domain.kind == "usps" else setting.pool


@lru_cache(maxsize=2)
def _test(setting: Setting, domain: Domain, data: Path) -> Pictures:
    looks = _looks(setting, domain, "test", data)
    return _pictures(looks, range(min(len(looks), setting.test)))


@lru_cache(maxsize=8)
def _file(setting: Setting, domain: Domain, split: str, data: Path) -> ImageDataset:
    name = "usps" if domain.kind == "usps" else setting.name
    return parquet(data / f"{name}-{split}.parquet", size=setting.size)


def _looks(setting: Setting, domain: Domain, split: str, data: Path) -> ImageDataset | ShiftedDataset:
    """The pictures of a file as the domain shows them."""
    pictures = _file(setting, domain, split, data)
    if domain.kind in ("none", "usps"):
        return pictures
    return ShiftedDataset(pictures, domain.kind, domain.severity, seed=TEST_LOOK if split == "test" else POOL_LOOK)


def _pictures(looks: ImageDataset | ShiftedDataset, rows: Iterable[int]) -> Pictures:
    images, labels = zip(*(looks[row] for row in rows), strict=True)
    return Pictures(torch.stack(images), torch.tensor(labels))


# --- teachers -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def teacher(setting: Setting, index: int, data: Path, cache: Path) -> nn.Module:
    """A teacher in eval mode and without gradients; trained where `cache` does not have its weights yet.

    Args:
        setting: The setting.
        index: Which of its teachers; for ``mnist`` the seed of its initial weights, its order and its dropout.
        data: The folder of parquet files and published weights.
        cache: The folder of trained weights.
    """
    name = setting.teachers[index]
    if name in networks.NETWORKS:
        return networks.model(name, data, cache).requires_grad_(False)
    path = cache / f"{name}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        made = networks.mnist_net(relu=False)
        if path.exists():
            made.load_state_dict(penult.io.read(path, kind=networks.KIND).tensors)
        else:
            _train_teacher(made.train(), parquet(data / "mnist-train.parquet"), index)
            cache.mkdir(parents=True, exist_ok=True)
            penult.io.write(path, made.state_dict(), networks.KIND, {"network": name})
    return made.eval().requires_grad_(False)


def _train_teacher(model: nn.Module, pictures: ImageDataset, seed: int, epochs: int = 3, rate: float = 2e-3) -> None:
    """Adam, its rate rising and falling once, as the networks of `networks.py` are trained."""
    images, labels = _pictures(pictures, range(SEEN))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-SEEN // BATCH))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(SEEN, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()


@lru_cache(maxsize=8)
def head(setting: Setting, index: int, data: Path, cache: Path) -> penult.Head:
    """The head of a teacher, as `penult.find_head` finds it on sixteen pictures of the source."""
    return penult.find_head(teacher(setting, index, data, cache), _source(setting, 16, data).images)


@lru_cache(maxsize=8)
def source_activations(
    setting: Setting, index: int, data: Path, cache: Path, count: int = SOURCE
) -> penult.Activations:
    """What a teacher makes of pool pictures of its source, undistorted: the first `count` rows of the pool.

    For ``mnist`` the teacher was not trained on them. Some are in distillation sets, too, as the domain shows them.
    """
    tap = penult.Tap(teacher(setting, index, data, cache), head(setting, index, data, cache))
    images, labels = _source(setting, count, data)
    return penult.extract(tap, list(zip(images.split(250), labels.split(250), strict=True)), progress=False)


def outputs(teacher: nn.Module, head: penult.Head, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a teacher makes of pictures (N, C, H, W): activations (N, d) and logits (N, K)."""
    acts = penult.extract(penult.Tap(teacher, head), images.split(250), progress=False)
    return acts.activations, acts.logits


def _source(setting: Setting, count: int, data: Path) -> Pictures:
    """The first pictures of the pool, undistorted."""
    return _pictures(_file(setting, setting.domain("none"), "train", data), range(setting.pool, setting.pool + count))


# --- students -----------------------------------------------------------------------------------------------


class Student(nn.Module):
    """A small network: a trunk that ends in a ReLU, and a linear head.

    Pictures are standardised by the mean and the deviation of the distillation set, as one does with new data.

    Args:
        trunk: Pictures (B, C, H, W) to features (B, width).
        width: Number of features.
        classes: K.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, trunk: nn.Module, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, classes)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def standardise(self, images: Tensor) -> None:
        """Take mean and deviation from pictures (N, C, ...), by channel."""
        others = [dim for dim in range(images.ndim) if dim != 1]
        self.mean, self.deviation = images.mean(others, keepdim=True)[0], images.std(others, keepdim=True)[0]

    def features(self, x: Tensor) -> Tensor:
        """Features (B, width), none negative."""
        return self.trunk((x - self.mean) / self.deviation)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.head(self.features(x))


def student(setting: Setting) -> Student:
    """A new student with 128 features, 64 for ``cifar10``; its weights are drawn from torch's default generator."""
    if setting.name == "mnist":
        width = 128
        trunk = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 4 * 4, width), nn.ReLU(),
        )  # fmt: skip
    else:
        width = 64
        trunk = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 4 * 4, width), nn.ReLU(),
        )  # fmt: skip
    return Student(trunk, width)


class Method(Protocol):
    """A way to train a student. It holds what it needs of the teacher for each picture of the distillation set."""

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """The loss (scalar) of a batch: pictures (B, C, H, W), labels (B,), their rows (B,) in the distillation set."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained beside the student, such as a projector."""

    def predict(self, student: Student, x: Tensor) -> Tensor:
        """Logits (B, K) of pictures."""


M = TypeVar("M", bound=Method)


def begin(setting: Setting, build: Callable[[int], M], seed: int) -> tuple[Student, M]:
    """A student and the method that will train it, as a function of the seed.

    The student's initial weights are the same for all methods; what a method has to train is drawn after them.

    Args:
        setting: The setting.
        build: Makes the method, given the number of the student's features.
        seed: Of all initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = student(setting)
        return made, build(made.head.in_features)


def train(
    method: Method,
    student: Student,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    steps: int = STEPS,
    rate: float = RATE,
) -> None:
    """AdamW, its rate rising to twice `rate` and falling once; leaves the student in eval mode.

    Args:
        method: Gives the loss.
        student: The student.
        images: The distillation set (N, C, H, W).
        labels: (N,).
        seed: Of the order of the pictures, which is the same for all methods.
        steps: Batches of 64.
        rate: Half the highest learning rate.
    """
    optimizer = torch.optim.AdamW([*student.parameters(), *method.parameters()], rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * BATCH // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(passes)])
    student.standardise(images)
    student.train()
    for rows in order[: steps * BATCH].split(BATCH):
        optimizer.zero_grad()
        method.loss(student, images[rows], labels[rows], rows).backward()
        optimizer.step()
        schedule.step()
    student.eval()


@torch.no_grad()
def accuracy(method: Method, student: Student, images: Tensor, labels: Tensor) -> float:
    """The share of pictures (N, C, H, W) whose label is the largest of the method's logits."""
    predicted = torch.cat([method.predict(student, x).argmax(-1) for x in images.split(500)])
    return float((predicted == labels).double().mean())


# --- the command line ---------------------------------------------------------------------------------------


def _accuracies(setting: Setting, domain: Domain, data: Path, cache: Path) -> list[float]:
    """Of each teacher, on the validation pictures of seed 0; in per cent."""
    images, labels = shares(setting, domain, 0, data).validation
    found: dict[str, float] = {}  # one network may be a teacher twice
    for index, name in enumerate(setting.teachers):
        if name not in found:
            model = teacher(setting, index, data, cache)
            with torch.no_grad():
                predicted = torch.cat([model(x).argmax(-1) for x in images.split(250)])
            found[name] = 100 * float((predicted == labels).double().mean())
    return [found[name] for name in setting.teachers]


def _show(setting: Setting, domains: Iterable[Domain], data: Path, cache: Path) -> None:
    """A line for each domain."""
    for domain in domains:
        found = _accuracies(setting, domain, data, cache)
        each = " ".join(f"{value:5.1f}" for value in found)
        mean = sum(found) / len(found)
        what = f"{setting.name:8} {domain.name:15} {domain.kind:11} {domain.severity:.2f}"
        print(f"{what}  {each}  {mean:5.1f}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Train the teachers and say how well they do."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files and published weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder for trained weights")
    parser.add_argument(
        "--only", action="append", choices=SETTINGS, help="only this setting (repeatable; default: all)"
    )
    parser.add_argument("--scan", action="store_true", help="scan severities instead of using the chosen domains")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("accuracy (%) of each teacher, and their mean, on 2000 pictures of the pool")
    for name in options.only or SETTINGS:
        setting = SETTINGS[name]
        for index in range(len(setting.teachers)):
            start = time.monotonic()
            teacher(setting, index, options.data, options.cache)
            print(f"{setting.teachers[index]}: weights after {time.monotonic() - start:.0f} s", flush=True)
        scanned = [Domain("scan", kind, each) for kind, grid in GRIDS[name].items() for each in grid]
        _show(setting, scanned if options.scan else setting.domains, options.data, options.cache)
    return 0


if __name__ == "__main__":
    sys.exit(main())
