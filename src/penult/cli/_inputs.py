"""Images, networks and stored activations that commands read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from penult.cli._console import RichReporter
from penult.cli._models import load_model, running
from penult.cli._options import ImageOptions, with_recorded
from penult.cli._stored import (
    check_logits,
    check_recorded,
    check_shape,
    guessing,
    is_stored,
    label_accuracy,
    open_activations,
    row_names,
    spread_rows,
)
from penult.data import ImageDataset

if TYPE_CHECKING:
    from penult.activations import Activations, Tap
    from penult.data import _RowNames
    from penult.head import Head
    from penult.pair import GenerativePair

__all__ = [
    "Classifier",
    "ImageSubset",
    "Inputs",
    "InputsReader",
    "NetworkOptions",
    "check_logits",
    "check_recorded",
    "check_shape",
    "class_names",
    "first_images",
    "guessing",
    "keep_matching_labels",
    "label_accuracy",
    "number_as_network",
    "of_one_size",
    "open_activations",
    "split",
    "spread_rows",
]

_FEW = 16  # Images that heads are found with.
_HELD_OUT = 0.1  # Fraction of the images that are held out for judging.
_MEMORY = 1 << 30  # Bytes of images that are loaded together.


# --- images -------------------------------------------------------------------------------------------------


def first_images(dataset: ImageDataset, source: str, count: int = _FEW) -> Tensor:
    """Return the first images (N, C, H, W), to find a head with."""
    items = [dataset[i] for i in range(min(count, len(dataset)))]
    with of_one_size(source):
        return torch.stack([item if dataset.labels is None else item[0] for item in items])


@contextmanager
def of_one_size(source: str) -> Iterator[None]:
    """Turn torch's error about images of different sizes in a batch into a message that names the options that help."""
    try:
        yield
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise ValueError(
            f"the images of {source} are not all of one size: give --size, and --mode where some are grey"
        ) from error


def keep_matching_labels(
    dataset: ImageDataset, source: str, num_classes: int, reporter: RichReporter
) -> tuple[str, ...] | None:
    """Return the class names of a data set; if its classes are not those of the head, drop its labels and print so."""
    if dataset.labels is None:
        return None
    count = int(dataset.labels.max()) + 1 if dataset.class_names is None else len(dataset.class_names)
    if count == num_classes or (dataset.class_names is None and count < num_classes):
        return dataset.class_names
    reporter.line(f"{source} has {count} classes, but the head has {num_classes}: its labels are ignored")
    dataset.labels = None
    return None


def number_as_network(
    network: nn.Module,
    datasets: Mapping[str, ImageDataset],
    reporter: RichReporter,
    recorded: tuple[str, ...] | None = None,
) -> None:
    """Number the labels of data sets as a network does that names the same classes in another order.

    Where the names themselves differ, a line says so: they may be other words for the same classes.

    Args:
        network: The network. Those of Hugging Face have names in ``config.id2label``.
        datasets: The data sets by their source; their labels and class names are changed.
        reporter: Prints the lines.
        recorded: Names of the classes that the file of the pair records, which go before those of the network.
    """
    own = recorded or _names_of(network)
    source_of_names = "the pair" if recorded else "the network's config.id2label"
    for source, dataset in datasets.items():
        names = dataset.class_names
        if own is None or names is None or len(names) > len(own):
            continue
        numbers = {name.casefold(): number for number, name in enumerate(own)}
        order = [numbers.get(name.casefold(), -1) for name in names]
        if order == list(range(len(own))):
            continue
        if min(order) >= 0 and len(set(order)) == len(order):
            if dataset.labels is not None:
                dataset.labels = torch.tensor(order, device="cpu")[dataset.labels]
            dataset.class_names = own
            some = "the" if len(names) == len(own) else f"{len(names)} of the {len(own)}"
            reporter.line(
                f"{source} has {some} classes of the network in another order: its labels are renumbered in that of "
                f"{source_of_names}"
            )
        elif len(names) == len(own):
            number = next(i for i, at in enumerate(order) if at != i)
            reporter.line(
                f"warning: class {number} is {names[number]!r} in {source} and {own[number]!r} in {source_of_names}; "
                "check that the labels are numbers of the network's classes"
            )


def _names_of(network: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the classes in the configuration of a network, or None."""
    from penult._checks import class_names_tuple

    for module in network.modules():
        # A configuration may be any object.
        names = getattr(getattr(module, "config", None), "id2label", None)
        try:
            own = class_names_tuple(names) if isinstance(names, Mapping) else ()
        except (TypeError, ValueError):
            continue
        # Configurations without names have LABEL_0, LABEL_1 and so on.
        if own and not all(name == f"LABEL_{number}" for number, name in enumerate(own)):
            return own
    return None


def class_names(num_classes: int, datasets: Mapping[str, ImageDataset]) -> list[str]:
    """Check that labels of data sets are classes of the head, and return the names of the classes."""
    for source, dataset in datasets.items():
        count = num_classes if dataset.class_names is None else len(dataset.class_names)
        if count != num_classes:
            raise ValueError(f"{source} has {count} classes, but the head has {num_classes}; give data of its classes")
        if dataset.labels is not None and (highest := int(dataset.labels.max())) >= num_classes:
            raise ValueError(
                f"{source} has labels up to {highest}; expected 0 to {num_classes - 1}, as the head has {num_classes} "
                "classes. Leave the others out"
            )
    names = {source: dataset.class_names for source, dataset in datasets.items() if dataset.class_names is not None}
    if len(set(names.values())) > 1:
        raise ValueError(f"{' and '.join(names)} have classes of different names or in a different order")
    return list(next(iter(names.values()), map(str, range(num_classes))))


@dataclass(frozen=True)
class ImageSubset:
    """Some images of a data set.

    Attributes:
        dataset: The data set.
        index: Sorted indices (N,) of the images, or None for all.
        held_out: Whether they are held out of the images that are trained on.
    """

    dataset: ImageDataset
    index: Tensor | None = None
    held_out: bool = False

    def __len__(self) -> int:
        return len(self.dataset) if self.index is None else len(self.index)

    @property
    def images(self) -> Any:
        """The images as a data set."""
        return self.dataset if self.index is None else Subset(self.dataset, self.index.tolist())

    @property
    def labels(self) -> Tensor | None:
        """Labels (N,), or None where the data set has none."""
        labels = self.dataset.labels
        return labels if labels is None or self.index is None else labels[self.index]

    def load(self, most: int, seed: int, loading: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Load a random subset of the images (N, C, H, W) and their labels (N,): at most `most`, and at most 1 GiB."""
        nbytes = 4 * first_images(self.dataset, "the data set", 1).numel()
        count = min(most, max(1, _MEMORY // nbytes), len(self))
        order = (
            torch.randperm(len(self), generator=torch.Generator().manual_seed(seed), device="cpu")[:count].sort().values
        )
        part = replace(self, index=order if self.index is None else self.index[order])
        batches = [batch if isinstance(batch, Tensor) else batch[0] for batch in DataLoader(part.images, **loading)]
        return torch.cat(batches), part.labels


def split(dataset: ImageDataset, val: ImageDataset | None, seed: int) -> tuple[ImageSubset, ImageSubset]:
    """Return the images to train on and those to evaluate on: all and `val`, or nine tenths and one tenth."""
    if val is not None:
        return ImageSubset(dataset), ImageSubset(val)
    count = len(dataset)
    num_held_out = max(1, round(_HELD_OUT * count))
    if count - num_held_out < 2:
        raise ValueError(f"there are {count} images, too few to hold out a tenth for validation; give --val")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    training, held_out = order[num_held_out:].sort().values, order[:num_held_out].sort().values
    return ImageSubset(dataset, training), ImageSubset(dataset, held_out, held_out=True)


# --- networks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkOptions:
    """Options that name a network and its head.

    Attributes:
        name: Factory of the network, ``package.module:factory``.
        weights: State dict for it, or None.
        path: Name of the head's module, or None.
        fold: Whether a norm layer before the head is folded into it.
        argument: Argument or option that gives `name`, for messages.
        weights_option: Option that gives `weights`, for messages.
    """

    name: str
    weights: Path | None = None
    path: str | None = None
    fold: bool = True
    argument: str = "MODEL"
    weights_option: str = "--weights"

    @classmethod
    def of(cls, options: Mapping[str, Any], name: str, argument: str) -> NetworkOptions:
        """Select these options from all options of a command; `argument` is the one that gives the name."""
        return cls(name, options["weights"], options["path"], options["fold"], argument)

    def load(self, device: torch.device) -> nn.Module:
        """Load the network."""
        return load_model(self.name, self.weights, self.argument, self.weights_option).to(device)

    def find_head(self, network: nn.Module, images: Tensor) -> Head:
        """Find the head of the network with inputs, which are on its device."""
        from penult.head import find_head

        with running(tuple(images.shape), f"{self.argument} {self.name}"):
            return find_head(network, images, path=self.path, fold=self.fold)

    def open(self, images: Tensor, device: torch.device, reporter: RichReporter | None = None) -> Classifier:
        """Load the network, find its head with inputs, and print the certificate of the head."""
        network = self.load(device)
        head = self.find_head(network, images.to(device))
        if reporter is not None:
            reporter.line(str(head.certificate))
        return Classifier(self.name, network, head)


@dataclass(frozen=True)
class Classifier:
    """A network and its head."""

    name: str
    network: nn.Module
    head: Head

    @property
    def tap(self) -> Tap:
        """The network as a `Tap`, which returns its activations too. ValueError: it does not classify whole images."""
        from penult.activations import Tap

        tap = Tap(self.network, self.head)
        if tap.axes != ("batch",):
            raise ValueError(
                f"{self.name} gives logits with the axes {tap.axes} before the classes; expected ('batch',), which is "
                "one row of logits for each image"
            )
        return tap

    def pair(self, pair: GenerativePair | None, source: str) -> GenerativePair:
        """Check that a pair has this head and return it; for None return the pair made from the head without data."""
        from penult.pair import GenerativePair

        head = self.head.clone().cpu()
        if pair is None:
            return GenerativePair(head)
        close = (pair.head.num_classes, pair.head.in_features) == (head.num_classes, head.in_features) and all(
            torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4 * float(b.abs().max()))
            for a, b in ((pair.head.weight, head.weight), (pair.head.full_bias, head.full_bias))
        )
        if not close:
            raise ValueError(
                f"the head in {source}, {pair.head}, is not that of {self.name}, {head}. Fit the pair to activations "
                "that penult extract stored of this network, with the same --fold"
            )
        return pair


# --- activations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Activations of one source; its images before --mean and --std, if any; and the names of its rows, if known."""

    source: str
    activations: Activations
    images: ImageDataset | None = None
    row_names: _RowNames | None = None


class InputsReader:
    """Reads stored activations, or runs the network of a pair on images; the network is loaded once.

    Args:
        pair: The pair, on the device to compute on.
        pair_source: Its source, for messages.
        options: All options of the command; ``model`` is None where only stored activations are read.
        reporter: Prints the certificate of the head.
    """

    def __init__(
        self, pair: GenerativePair, pair_source: str, options: Mapping[str, Any], reporter: RichReporter
    ) -> None:
        self._pair, self._pair_source, self._options, self._reporter = pair, pair_source, options, reporter
        self._tap: Tap | None = None

    def read(self, source: str, labels: bool = False) -> Inputs:
        """Read a folder that `penult extract` wrote or a file of activations, or extract the activations of images.

        Args:
            source: The folder, the file or the images, as given by the user.
            labels: Whether to keep labels of images, if they are labels of the head's classes.

        Raises:
            ValueError: There are no activations or images, images are given without a network, or the pair's head does
                not give the logits.
        """
        folder, head = Path(source), self._pair.head
        if is_stored(folder):
            acts = open_activations(folder, head)
            inputs = Inputs(source, acts, row_names=row_names(folder, acts, self._reporter))
            check_shape(inputs.activations.num_classes, inputs.activations.in_features, source, head, self._pair_source)
            check_recorded(inputs.activations.preprocessing, source, head.preprocessing, self._pair_source)
        else:
            inputs = self._extract(source, labels)
        check_logits(inputs.activations, source, head, self._pair_source)
        return inputs

    def _extract(self, source: str, labels: bool) -> Inputs:
        from penult.activations import extract

        options = with_recorded(self._options, self._pair.head.preprocessing, self._pair_source)
        dataset = ImageOptions.of(options).read(source)
        if self._options["model"] is None:
            raise ValueError(
                f"{source} holds images, so the network has to run: give --model package.module:factory (and "
                "--weights), or the folder of activations that penult extract wrote"
            )
        if not labels:
            dataset.labels = None
        first = first_images(dataset, source)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            # For factories and networks that draw random numbers.
            torch.manual_seed(self._options["seed"])
            tap = self._opened(first)
            names = None
            if labels:
                recorded = self._pair.head.class_names
                number_as_network(tap.model, {source: dataset}, self._reporter, recorded)
                names = keep_matching_labels(dataset, source, self._pair.head.num_classes, self._reporter)
            loader = DataLoader(dataset, batch_size=self._options["batch_size"], num_workers=self._options["workers"])
            # Images of different sizes are no fault of the model, so this stands inside.
            with running(tuple(first.shape), f"--model {self._options['model']}"), of_one_size(source):
                acts = extract(tap, loader, class_names=names, progress=True)
        rows = dataset.row_names
        return Inputs(source, acts, dataset.unnormalized(), rows if len(rows) == len(acts) else None)

    def _opened(self, images: Tensor) -> Tap:
        """Return the tap of the network, whose head is found with the first images of the first source."""
        if self._tap is None:
            options = NetworkOptions.of(self._options, self._options["model"], "--model")
            classifier = options.open(images, self._pair.head.weight.device, self._reporter)
            head = classifier.head
            check_shape(head.num_classes, head.in_features, classifier.name, self._pair.head, self._pair_source)
            self._tap = classifier.tap
        return self._tap
