"""What `penult score` and `penult report` look at: stored activations, or images that a network reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penult.cli import sources
from penult.cli.console import RichReporter

if TYPE_CHECKING:
    from penult.activations import Activations, Tap
    from penult.data import ImageDataset
    from penult.pair import GenerativePair

__all__ = [
    "OPTIONS",
    "BatchSize",
    "Inputs",
    "InputsReader",
    "Network",
    "NetworkWeights",
    "Pair",
    "Workers",
    "labels_fit",
    "of_one_size",
]

OPTIONS = ("weights", "path", "fold", "size", "mode", "mean", "std", "batch_size", "workers")
"""Options of a command that say how a network reads images."""

_FEW = 16  # images that the head is found with
_LOOKED_AT = 1000  # labels that are compared with what the network says
_CHECKED = 1000  # activations whose logits the pair's head has to make

Pair = Annotated[
    str, typer.Argument(metavar="PAIR", help="A *.penult.safetensors, as penult fit writes it, or a file with a head.")
]
Network = Annotated[
    str | None, typer.Option("--model", help="For images: the network that reads them, package.module:factory.")
]
NetworkWeights = Annotated[
    Path | None, typer.Option("--weights", help="A .safetensors state dict for the model that the factory makes.")
]
BatchSize = Annotated[int, typer.Option(help="Images at a time.", min=1)]
Workers = Annotated[int, typer.Option(help="Processes that decode images.", min=0)]


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
        options: Those of `OPTIONS`.
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
        dataset = sources.load_images(source, size=size, mode=mode, mean=mean, std=std)
        if self.model is None:
            raise ValueError(
                f"{source} holds images, so that the network has to run: give --model package.module:factory (and "
                "--weights), or the folder of activations that penult extract wrote"
            )
        known = labels and labels_fit(dataset, source, self.pair.head.num_classes, self.reporter)
        if not known:
            dataset.labels = None
        with of_one_size(source):
            first = sources.first_images(dataset, _FEW)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), sources.running(tuple(first.shape)):
            torch.manual_seed(self.seed)
            tap = self._tapped(first)
            loader = sources.batches_of(dataset, self.options["batch_size"], self.options["workers"])
            with of_one_size(source):  # inside, since it is no fault of the model
                acts = extract(tap, loader, class_names=dataset.class_names if known else None, progress=True)
        plain = sources.load_images(source, size=size, mode=mode, mean=None, std=None)
        return Inputs(source, acts, plain)

    def _tapped(self, first: Any) -> Tap:
        """The network with its head, found with the first images of the first source."""
        from penult.activations import Tap
        from penult.head import find_head

        if self._tap is None:
            where = self.pair.head.weight.device
            assert self.model is not None
            network = sources.load_model(self.model, self.options["weights"]).to(where)
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

    from penult._checks import as_by_guessing

    places = torch.linspace(0, len(acts) - 1, min(len(acts), _LOOKED_AT), dtype=torch.float64).long()
    some = acts[places]
    assert some.labels is not None
    right = float(some.predicted.eq(some.labels).double().mean())
    return right, as_by_guessing(right, len(places), acts.num_classes)


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
