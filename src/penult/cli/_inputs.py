"""What `penult score` and `penult report` look at: stored activations, or images that a network reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from penult.cli._console import RichReporter
from penult.cli._models import load_model, running
from penult.data import ImageDataset

if TYPE_CHECKING:
    from penult.activations import Activations, Tap
    from penult.pair import GenerativePair

__all__ = [
    "FEW",
    "Inputs",
    "InputsReader",
    "Normalized",
    "Share",
    "batches_of",
    "class_names",
    "first_images",
    "held_out",
    "labels_fit",
    "load_images",
    "loader_of",
    "normalization",
    "of_one_size",
    "watched",
]

_FEW = 16  # images that the head is found with
_LOOKED_AT = 1000  # labels that are compared with what the network says
_CHECKED = 1000  # activations whose logits the pair's head has to make


@dataclass(frozen=True)
class Inputs:
    """Activations of one source, and the images that they are of, before --mean and --std, if there are any."""

    source: str
    activations: Activations
    images: ImageDataset | None = None


@dataclass
class InputsReader:
    """Reads sources of a pair's network; the network, if it is needed, is made once.

    Args:
        pair: The pair, on the device where all is computed.
        pair_source: What the user calls it.
        reporter: Told what is found.
        model: The network, or None where activations are stored.
        options: Options of the command by their name.
        seed: Seed of what the factory and the network draw, if they do.
    """

    pair: GenerativePair
    pair_source: str
    reporter: RichReporter
    model: str | None
    options: dict[str, Any]
    seed: int = 0
    _tap: Tap | None = field(default=None, init=False)

    def read(self, source: str, labels: bool = False) -> Inputs:
        """Activations of a folder that `penult extract` wrote, or of images.

        Args:
            source: Either, as the user names it.
            labels: Keep the labels, where they are those of the head's classes.

        Raises:
            ValueError: There are none, images without a network, or they are not of the pair's head.
        """
        from penult import io
        from penult.activations import Activations

        folder = Path(source)
        if folder.is_dir() and ((folder / io.INDEX_NAME).exists() or any(folder.glob("activations-*.safetensors"))):
            found = Inputs(source, Activations.open(folder))
            self._check_shape(found.activations.num_classes, found.activations.in_features, source)
        else:
            found = self._run(source, labels)
        if not len(found.activations):
            raise ValueError(f"{source} holds no activations")
        self._check_head(found.activations, source)
        return found

    def _run(self, source: str, labels: bool) -> Inputs:
        import torch

        from penult.activations import extract

        names = ("size", "mode", "mean", "std")
        size, mode, mean, std = (self.options[name] for name in names)
        dataset = load_images(source, size=size, mode=mode, mean=mean, std=std)
        if self.model is None:
            raise ValueError(
                f"{source} holds images, so that the network has to run: give --model package.module:factory (and "
                "--weights), or the folder of activations that penult extract wrote"
            )
        known = labels and labels_fit(dataset, source, self.pair.head.num_classes, self.reporter)
        if not known:
            dataset.labels = None
        with of_one_size(source):
            first = first_images(dataset, _FEW)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), running(tuple(first.shape)):
            torch.manual_seed(self.seed)
            tap = self._tapped(first)
            loader = batches_of(dataset, self.options["batch_size"], self.options["workers"])
            with of_one_size(source):  # inside, since it is no fault of the model
                acts = extract(tap, loader, class_names=dataset.class_names if known else None, progress=True)
        plain = load_images(source, size=size, mode=mode, mean=None, std=None)
        return Inputs(source, acts, plain)

    def _tapped(self, first: Any) -> Tap:
        """The network with its head, found with the first images of the first source."""
        from penult.activations import Tap
        from penult.head import find_head

        if self._tap is None:
            where = self.pair.head.weight.device
            assert self.model is not None
            network = load_model(self.model, self.options["weights"]).to(where)
            head = find_head(network, first.to(where), path=self.options["path"], fold=self.options["fold"])
            self.reporter.line(str(head.certificate))
            self._check_shape(head.num_classes, head.in_features, self.model)
            tap = Tap(network, head)
            if tap.axes != ("batch",):
                raise ValueError(
                    f"{self.model} gives logits with the axes {tap.axes}; a classifier of images gives one row each"
                )
            self._tap = tap
        return self._tap

    def _check_shape(self, classes: int, features: int, source: str) -> None:
        head = self.pair.head
        if (classes, features) != (head.num_classes, head.in_features):
            raise ValueError(
                f"{source} has activations of dimension {features} and {classes} classes, but the head in "
                f"{self.pair_source} reads {head.in_features} and has {head.num_classes}: give the pair of this network"
            )

    def _check_head(self, acts: Activations, source: str) -> None:
        """Refuse activations whose logits the pair's head does not make.

        A temperature, and another prior (a number added to each class), may stand between the two.
        """
        import torch

        rows = torch.linspace(0, len(acts) - 1, min(len(acts), _CHECKED), dtype=torch.float64).long()
        part, head = acts[rows], self.pair.head
        h = part.activations.clamp_min(0) if part.pre_activation else part.activations
        made = head(h.to(head.weight)).double().cpu() * head.temperature
        logits = part.logits.double().cpu()

        def between(values: Any) -> Any:
            values = values - values.mean(1, keepdim=True)
            return values - values.mean(0)

        scale = float(between(logits).abs().max())
        error = float(between(logits - made).abs().max())
        if not error <= (1e-3 if acts.dtype.itemsize >= 4 else 0.05) * max(scale, 1e-6):
            raise ValueError(
                f"the head in {self.pair_source} does not make the logits of {source}, which differ by up to "
                f"{error:.3g}: give the pair of this very network, with the same --fold as its activations"
            )


def labels_fit(dataset: ImageDataset, source: str, classes: int, reporter: RichReporter) -> bool:
    """Whether a data set has labels, and of as many classes as a head has; otherwise a line says that they go."""
    if dataset.labels is None:
        return False
    count = int(dataset.labels.max()) + 1 if dataset.class_names is None else len(dataset.class_names)
    if count == classes or (dataset.class_names is None and count < classes):
        return True
    reporter.line(
        f"{source} has {count} classes, but the head has {classes}: its labels mean other things and are left out"
    )
    return False


def right_answers(acts: Activations) -> tuple[float, bool]:
    """How often a network gives the labels of activations, by some of them, and whether that is as by guessing."""
    import torch

    from penult._checks import is_chance_level

    places = torch.linspace(0, len(acts) - 1, min(len(acts), _LOOKED_AT), dtype=torch.float64).long()
    some = acts[places]
    assert some.labels is not None
    right = float(some.predicted.eq(some.labels).double().mean())
    return right, is_chance_level(right, len(places), acts.num_classes)


@contextmanager
def of_one_size(source: str) -> Iterator[None]:
    """Where images are gathered to batches, which they have to be of one size for."""
    try:
        yield
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise ValueError(
            f"the images of {source} are not all of one size: give --size, and --mode where some are grey"
        ) from error


def load_images(source: str, *, size: str | None, mode: str | None, mean: str | None, std: str | None) -> ImageDataset:
    """A data set with the preprocessing that options ask for."""
    from penult.data import read

    return read(source, size=_size(size), mode=mode, transform=normalization(mean, std))


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.lower().replace("x", ",").split(",")]
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
    except (ValueError, IndexError):
        raise ValueError(f"--size {text!r} is neither one number nor HEIGHTxWIDTH") from None


class _Normalize:
    """Images (*B, C, H, W) less a mean, over a standard deviation, channel by channel; can be sent to workers."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor) -> Tensor:
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in (1, image.shape[-3]):
                raise ValueError(
                    f"{name} has {len(values)} values, but the images have {image.shape[-3]} channels; see --mode"
                )
        mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


def normalization(mean: str | None, std: str | None) -> Callable[[Tensor], Tensor] | None:
    """What --mean and --std do to images (*B, C, H, W) in [0, 1]; None where neither is given."""
    if mean is None and std is None:
        return None
    values = []
    for name, text, default in (("--mean", mean, "0"), ("--std", std, "1")):
        try:
            values.append([float(part) for part in (text or default).split(",")])
        except ValueError:
            raise ValueError(f"{name} {text!r} is no number, nor one a channel such as 0.485,0.456,0.406") from None
    if min(values[1]) <= 0:
        raise ValueError(f"--std {std!r} must be positive")
    return _Normalize(*values)


def batches_of(dataset: ImageDataset, batch_size: int, workers: int) -> Any:
    """A loader in the data set's own order."""
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=batch_size, num_workers=workers)


def first_images(dataset: ImageDataset, count: int) -> Tensor:
    """The first images, to find a head with."""
    import torch

    items = [dataset[i] for i in range(min(count, len(dataset)))]
    return torch.stack([item if dataset.labels is None else item[0] for item in items])


FEW = 16  # images that heads are found with
_HELD_OUT = 0.1


def watched(
    name: str,
    network: nn.Module,
    images: Tensor,
    pair: GenerativePair | None,
    source: str,
    path: str | None,
    fold: bool,
    reporter: RichReporter,
) -> tuple[GenerativePair, Tap]:
    """The pair of a network's head, on the CPU, and its tap.

    Args:
        name: What the user calls the network.
        network: A classifier.
        images: Some that it takes, on its device.
        pair: A pair that has to be of the same head; the data-free one of the head where there is none.
        source: What the user calls the pair.
        path: Name of the head, if known.
        fold: Whether a norm layer before the head is folded into it.
        reporter: Told what the head is.
    """
    import torch

    from penult.activations import Tap
    from penult.head import find_head
    from penult.pair import GenerativePair

    with running(tuple(images.shape)):
        head = find_head(network, images, path=path, fold=fold)
    reporter.line(str(head.certificate))
    tap = Tap(network, head)
    if tap.axes != ("batch",):
        raise ValueError(f"{name} gives logits with the axes {tap.axes}; a classifier of images gives one row each")
    own = head.clone().cpu()
    if pair is None:
        return GenerativePair(own), tap
    close = (pair.head.num_classes, pair.head.in_features) == (own.num_classes, own.in_features) and all(
        torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        for a, b in ((pair.head.weight, own.weight), (pair.head.full_bias, own.full_bias))
    )
    if not close:
        raise ValueError(
            f"the head in {source}, {pair.head}, is not that of {name}, {own}: make the pair from the "
            "activations that penult extract stored of this network, with the same --fold"
        )
    return pair, tap


def class_names(classes: int, datasets: dict[str, Any]) -> list[str]:
    """Names of the classes, after a look at whether labels are those of the head."""
    for source, dataset in datasets.items():
        count = classes if dataset.class_names is None else len(dataset.class_names)
        if count != classes:
            raise ValueError(
                f"{source} has {count} classes, but the head has {classes}: labels would mean other things"
            )
        if dataset.labels is not None and int(dataset.labels.max()) >= classes:
            raise ValueError(
                f"{source} has labels up to {int(dataset.labels.max())}, but the head has {classes} classes, 0 to "
                f"{classes - 1}: leave the others out"
            )
    named = {source: dataset.class_names for source, dataset in datasets.items() if dataset.class_names is not None}
    if len(set(named.values())) > 1:
        raise ValueError(f"{' and '.join(named)} have classes of other names or in another order")
    return list(next(iter(named.values()), map(str, range(classes))))


def held_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted numbers of the images to train on, and of a tenth to judge by."""
    import torch

    held = max(1, round(_HELD_OUT * count))
    if count - held < 2:
        raise ValueError(f"there are {count} images, too few to hold some out; give --val")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


def loader_of(dataset: Any, **options: Any) -> Any:
    """A loader of a data set, without an import of torch before it is needed."""
    from torch.utils.data import DataLoader

    return DataLoader(dataset, **options)


# --- Images that ``penult generate`` trains on and judges by, and how a classifier takes them ---------------


_MEMORY = 1 << 30  # bytes of images that are looked at together


@dataclass(frozen=True)
class Share:
    """Images to train on, or to judge by, with numbers of those that are used and labels of all, if there are."""

    dataset: ImageDataset
    places: Tensor

    @property
    def images(self) -> Any:
        """The images as a data set."""
        return Subset(self.dataset, self.places.tolist())

    def some(self, most: int, seed: int, loading: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Images (N, C, H, W) and labels (N,) of a random part, as much as there is memory for."""
        nbytes = 4 * first_images(self.dataset, 1).numel()
        count = min(most, max(1, _MEMORY // nbytes), len(self.places))
        order = torch.randperm(len(self.places), generator=torch.Generator().manual_seed(seed))[:count]
        part = replace(self, places=self.places[order.sort().values])
        batches = [batch if isinstance(batch, Tensor) else batch[0] for batch in loader_of(part.images, **loading)]
        return torch.cat(batches), None if self.dataset.labels is None else self.dataset.labels[part.places]


class Normalized(nn.Module):
    """Images in [0, 1] as a classifier takes them."""

    def __init__(self, by: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to images of the same shape."""
        return self.by(x)


def first_images_of_one_size(dataset: ImageDataset, count: int) -> Tensor:
    """The first images, which have to be of one size."""
    try:
        return first_images(dataset, count)
    except RuntimeError as error:
        raise ValueError(f"images are not all of one size ({error}); give --size, --mode") from error
