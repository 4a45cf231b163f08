"""``penult moments``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penult.cli._console import RichReporter, print_json, warnings_as_lines
from penult.cli._models import device_of, running
from penult.cli._options import (
    AsJson,
    BatchSize,
    Device,
    Fold,
    HeadPath,
    ImageColumn,
    ImageOptions,
    LabelColumn,
    Mean,
    Mode,
    Network,
    NetworkWeights,
    Seed,
    Size,
    Std,
    Workers,
)

if TYPE_CHECKING:
    from torch import Tensor

    from penult.moments import Moments

__all__ = ["moments", "moments_path"]

_FEATURES = ("activations", "features")


class ScatterName(str, Enum):
    """Kinds of scatter."""

    pooled = "pooled"
    by_class = "class"


def moments(
    context: typer.Context,
    data: Annotated[
        list[str],
        typer.Argument(
            help="Labelled activations to add up: folders of `penult extract`; .npz or .safetensors files with "
            "features (N, d) and labels (N,); files of `penult moments`; with --model, images."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File for the moments, for example owner.safetensors.")],
    scatter: Annotated[
        ScatterName,
        typer.Option(help="One matrix for all classes, or one for each, so that classes can be forgotten."),
    ] = ScatterName.pooled,
    forget: Annotated[
        list[str] | None,
        typer.Option(help="Class to leave out, by number or name; repeatable. Needs --scatter class."),
    ] = None,
    model: Network = None,
    encoder: Annotated[
        bool,
        typer.Option("--encoder", help="Take the output (B, d) of the network for features: it has no head."),
    ] = False,
    weights: NetworkWeights = None,
    path: HeadPath = None,
    fold: Fold = True,
    batch_size: BatchSize = 128,
    workers: Workers = 0,
    size: Size = None,
    mode: Mode = None,
    mean: Mean = None,
    std: Std = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Add up counts, means and scatter of labelled activations, which define a head: linear discriminant analysis.

    Moments of owners, shards and days add up without their rows: give their files as DATA. Classes are matched by name,
    or by number where there are no names. `penult fit --moments FILE` makes the pair.

    With --model, a network reads images. Its features are the activations before its head; with --encoder they are its
    output.

    With fewer rows than dimensions, moments give away which rows were counted; a warning says so.

    Example: penult moments monday/ tuesday.npz --out moments.safetensors

    Example: penult moments train/ --model mynets:encoder --encoder --out moments.safetensors
    """
    from penult.moments import Moments

    reporter = RichReporter(stderr=as_json)
    moments_path(out)
    with warnings_as_lines():
        total = None
        for source in data:
            part = _moments_of(source, scatter.value, context.params, reporter)
            reporter.line(f"{source}: {part}")
            try:
                total = part if total is None else total + part
            except ValueError as error:
                raise ValueError(f"{source} does not add up with the data before it: {error}") from error
        assert isinstance(total, Moments)
        if forget:
            total = total.forget([int(name) if name.isdecimal() else name for name in forget])
        total.save(out)
    reporter.line(f"{out}: {total}")
    if as_json:
        names = None if total.class_names is None else list(total.class_names)
        results = {"out": str(out), "samples": len(total), "features": total.in_features}
        print_json(
            results | {"classes": total.num_classes, "counts": total.counts.tolist(), "class_names": names,
                       "scatter": total.scatter}
        )  # fmt: skip


def moments_path(out: Path) -> Path:
    """Check the path that moments are to be written to, before anything is computed."""
    if out.suffix.lower() != ".safetensors":
        raise ValueError(f"--out is {out}; expected a .safetensors file, for example {out.with_suffix('.safetensors')}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    return out


def _moments_of(source: str, scatter: Any, options: dict[str, Any], reporter: RichReporter) -> Moments:
    """Return the moments of one source."""
    from penult import io
    from penult.cli._inputs import open_activations
    from penult.moments import Moments

    file = Path(source)
    if file.is_dir() and ((file / io.INDEX_NAME).exists() or any(file.glob("activations-*.safetensors"))):
        acts = open_activations(file)
        if acts.labels is None:
            raise ValueError(f"{source} has no labels; expected labelled activations. Extract them of labelled images")
        return Moments.of(acts, scatter=scatter)
    if file.suffix.lower() == ".safetensors" and file.is_file():
        if (stored := _stored(file)) is not None:
            return stored if scatter == stored.scatter else stored.pooled() if scatter == "pooled" else _refuse(source)
        return Moments.of(*_labelled_safetensors(file), scatter=scatter)
    if file.suffix.lower() == ".npz" and file.is_file() and options["model"] is None:
        return Moments.of(*_labelled_npz(file), scatter=scatter)
    return _of_images(source, scatter, options, reporter)


def _refuse(source: str) -> Moments:
    raise ValueError(f"{source} has a pooled scatter; expected one for each class. Leave out --scatter class")


def _stored(file: Path) -> Moments | None:
    """Return the moments in a file, None if it is no file of penult."""
    from safetensors import SafetensorError, safe_open

    from penult.moments import Moments

    try:
        with safe_open(file, framework="pt") as opened:
            if "penult" not in (opened.metadata() or {}):
                return None
    except SafetensorError:
        # The reader of penult's files explains what is wrong with it.
        pass
    return Moments.load(file)


def _labelled_safetensors(file: Path) -> tuple[Tensor, Tensor]:
    """Return features (N, d) and labels (N,) of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        features, labels = _names_among(names, file)
        return opened.get_tensor(features), opened.get_tensor(labels)


def _labelled_npz(file: Path) -> tuple[Any, Any]:
    """Return features (N, d) and labels (N,) of an .npz file, without unpickling anything."""
    import numpy

    try:
        with numpy.load(file, allow_pickle=False) as arrays:
            features, labels = _names_among(list(arrays), file)
            return arrays[features], arrays[labels]
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as labelled features: {error}") from error


def _names_among(names: list[str], file: Path) -> tuple[str, str]:
    """Return the names of features and labels among those of the arrays in a file."""
    features = [name for name in _FEATURES if name in names]
    if len(features) != 1 or "labels" not in names:
        raise ValueError(
            f"{file} holds {', '.join(names[:8]) or 'no arrays'}; expected features or activations (N, d), and labels "
            "(N,). For an .npz of images give --model"
        )
    return features[0], "labels"


def _of_images(source: str, scatter: Any, options: dict[str, Any], reporter: RichReporter) -> Moments:
    """Return the moments of the features of labelled images, which are not stored."""
    import torch
    from torch.utils.data import DataLoader

    from penult.cli._inputs import NetworkOptions, first_images, number_as_network, of_one_size
    from penult.moments import Moments

    dataset = ImageOptions.of(options).read(source)
    if options["model"] is None:
        raise ValueError(
            f"{source} holds images, so a network has to run: give --model package.module:factory, with --encoder if "
            "its output is the features; or a folder of activations that penult extract wrote"
        )
    if dataset.labels is None:
        raise ValueError(f"{source} has no labels; expected labelled images")
    device, first = device_of(options["device"]), first_images(dataset, source)
    network_options = NetworkOptions.of(options, options["model"], "--model")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        # For factories and networks that draw random numbers.
        torch.manual_seed(options["seed"])
        if options["encoder"]:
            encode: Any = network_options.load(device).eval()
        else:
            tap = network_options.open(first.to(device), device, reporter).tap
            number_as_network(tap.model, {source: dataset}, reporter)
            tap.model.eval()
            encode = tap
        names = dataset.class_names
        if names is not None and len(set(names)) < len(names):
            warnings.warn(f"{source} has classes of the same name, so classes are numbers", UserWarning, stacklevel=2)
            names = None

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            loader = DataLoader(dataset, batch_size=options["batch_size"], num_workers=options["workers"])
            for images, labels in loader:
                output = encode(images.to(device))
                h = output if options["encoder"] else output[0]
                if not isinstance(h, torch.Tensor) or h.ndim != 2:
                    shape = f"of shape {tuple(h.shape)}" if isinstance(h, torch.Tensor) else f"a {type(h).__name__}"
                    raise ValueError(f"the features of {source} are {shape}; expected (B, d), one row for each image")
                yield h, labels

        text = f"counting {len(dataset)} images of {source}"
        with running(tuple(first.shape), f"--model {options['model']}"), of_one_size(source), reporter.waiting(text):
            with torch.no_grad():
                return Moments.of(batches(), scatter=scatter, class_names=names)
