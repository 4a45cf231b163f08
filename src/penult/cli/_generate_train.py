"""What ``penult generate`` does: train a generator of images on a classifier's activations, and judge it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from penult import io
from penult._extras import extra
from penult.activations import Tap, _checksum, extract
from penult.bases import Gaussian, Marginal, Sphere
from penult.cli._console import RichReporter, warnings_as_lines
from penult.cli._generate_judge import JUDGED, evaluator_of, judged
from penult.cli._inputs import ImageOptions, ImageSubset, NetworkOptions, class_names, first_images, split
from penult.cli._launch import Launch
from penult.cli._models import folder_path, load_pair
from penult.cli._options import plain
from penult.cli._training import (
    CHECKPOINT,
    LOG_FILE,
    PAGE_FILE,
    SETTINGS_FILE,
    digest,
    fit,
    is_complete,
    say_complete,
    trainer_of,
)
from penult.cli.draw import GENERATOR_FILE, PILLOW, grid
from penult.data import ImageDataset
from penult.generate import ActivationGAN, ActivationGenerator, ActivationVAE
from penult.pair import GenerativePair
from penult.processes import Processes
from penult.report.generate import (
    BIASED_JUDGE,
    as_text,
    class_rows,
    contents,
    evenly,
    page,
    quality_columns,
    quality_rows,
    seeded,
)

if TYPE_CHECKING:
    pass

__all__ = ["CLASSES", "Order", "summary", "train"]

SAMPLES = "samples"
# From --kind to what makes the generator, given pair, tap, shape and options.
CLASSES: dict[str, type[ActivationGenerator]] = {"vae": ActivationVAE, "gan": ActivationGAN}

# What can be told anew without training.
_FREE = "confident", "judge", "judge_weights", "judge_content", "store_activations"
_ROWS = 10  # classes of a grid


@dataclass(frozen=True)
class Order:
    """What a training is asked for, as options of the command say it; `own` are those that the kind's class takes."""

    source: str
    model: str
    images: str
    out: Path
    val: str | None
    kind: str
    condition: str
    epochs: int
    batch_size: int
    own: dict[str, Any]
    store_activations: bool
    confident: float | None
    judge: str | None
    judge_weights: Path | None
    size: str | None
    mode: str | None
    mean: str | None
    std: str | None
    weights: Path | None
    path: str | None
    fold: bool
    weight_key: str | None
    bias_key: str | None
    workers: int
    overwrite: bool
    seed: int
    launch: Launch
    precision: str

    @property
    def settings(self) -> dict[str, Any]:
        """Those that the results depend on."""
        apart = "out", "workers", "overwrite", "launch"
        facts = asdict(self)
        facts |= facts.pop("own") | {"devices": self.launch.devices, "num_nodes": self.launch.num_nodes}
        return {"command": "generate"} | {name: plain(v) for name, v in facts.items() if name not in apart}

    @property
    def loading(self) -> dict[str, Any]:
        """Options of loaders."""
        return {"batch_size": self.batch_size, "num_workers": self.workers}


def train(order: Order, as_json: bool, reporter: RichReporter) -> None:
    """Train a generator, or go on with it; then judge it, and write its file, page and log."""
    from penult.report import Page  # noqa: F401  a missing extra is better said before the work

    extra("PIL.Image", PILLOW)
    launch = order.launch
    out, where = _folder(order.out), launch.device
    with warnings_as_lines(launch.rank > 0), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        pair = load_pair(order.source, order.weight_key, order.bias_key)
        image_options = ImageOptions(order.size, order.mode, order.mean, order.std)
        normalize = image_options.normalization
        dataset = image_options.read(order.images, normalized=False)
        other = None if order.val is None else image_options.read(order.val, normalized=False)
        datasets = {order.images: dataset} | ({} if order.val is None or other is None else {order.val: other})
        first = first_images(dataset, order.images)
        _check_shape(order, first, other)
        names = class_names(pair.head.num_classes, datasets)
        labels = [each.labels for each in (dataset, other) if each is not None]
        if order.condition == "label" and any(each is None for each in labels):
            raise ValueError("--condition label needs labels of all images; --condition activation needs none")
        options = NetworkOptions(order.model, order.weights, order.path, order.fold, "--model")
        classifier = options.open(first if normalize is None else normalize(first), where, reporter)
        pair, tap = classifier.pair(pair, order.source), classifier.tap
        judge = None
        if order.judge is not None:
            judge = NetworkOptions(order.judge, order.judge_weights, None, order.fold, "--judge", "--judge-weights")
        evaluator = evaluator_of(classifier, options, judge, normalize, first.to(where))
        settings = order.settings | {"head": _checksum(pair.head), "count": len(dataset)}
        settings["content"] = digest(
            first,
            *(each for each in labels if each is not None),
            *(file for file in (order.source, order.weights) if file is not None),
        )
        settings["judge_content"] = None if order.judge_weights is None else digest(order.judge_weights)
        processes = Processes(launch.start())
        for folder in (out, out / SAMPLES) if processes.rank == 0 else ():
            io.sweep(folder)  # what a killed run left half-written says nothing of the folder
        whole = processes.rank == 0 and is_complete(out, settings, order.overwrite, "generate", _FREE)
        if processes.first(whole):
            if processes.rank == 0:
                say_complete(out, as_json, reporter)
            return

        trained, held = split(dataset, other, order.seed)
        if held.held_out:
            reporter.line(f"{len(held)} of {len(dataset)} images are held out to judge by; --val gives others")
        generator = _made(order, pair, tap, normalize, tuple(first.shape[1:]), trained)
        law = _law(order, generator, reporter)
        trainer = trainer_of(
            out,
            order.seed,
            epochs=order.epochs,
            launch=launch,
            precision=order.precision,
            callbacks=[_sampling(order, law)],
        )
        if processes.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            old = [CHECKPOINT, *(str(file.relative_to(out)) for file in (out / SAMPLES).glob("*.png"))]
            for name in (LOG_FILE, PAGE_FILE, GENERATOR_FILE, *(old if order.overwrite else [])):
                (out / name).unlink(missing_ok=True)  # of a run before
            io.write_bytes(out / SETTINGS_FILE, json.dumps(settings, indent=2).encode())
        processes.wait()
        resumed = fit(
            trainer,
            generator,
            trained.images,
            DataLoader(held.images, **order.loading),
            out=out,
            seed=order.seed,
            loading=order.loading,
            resume=not order.overwrite,
            figure=_figure,
            reporter=reporter,
        )
        if processes.rank:
            return
        learnt = generator.to(where).eval()
        generator = learnt.with_pair(law.to(where))
        generator.save(out / GENERATOR_FILE, order.store_activations)
        with reporter.waiting("judging the images"):
            facts, pictures = judged(generator, evaluator, trained, held, order.confident, order.seed, order.loading)

    facts = {
        "out": str(out),
        "kind": order.kind,
        "images": len(trained),
        "judged_by": len(held),
        "held_out": order.val is None,
        "shape": list(first.shape[1:]),
        "judge": order.judge,
        "confident": order.confident,
        "stored_activations": generator.stored_activations,
        "replaced_activations": learnt.stored_activations - generator.stored_activations,
        "floats": law.base.num_parameters if isinstance(law.base, Marginal) else None,
        "epochs": len(generator.history),
        "history": generator.history,
    } | facts
    summary(facts, reporter)
    page(out / PAGE_FILE, facts, settings, pair, pictures, names, GENERATOR_FILE)
    io.write_bytes(out / LOG_FILE, json.dumps(facts, indent=2).encode())  # last: now the folder is complete
    reporter.line(contents(facts, GENERATOR_FILE))
    reporter.line(f"{out / GENERATOR_FILE}: penult draw {out} -o grid.png draws from it")
    reporter.line(f"{out / PAGE_FILE}")
    if as_json:
        typer.echo(json.dumps(facts | {"resumed_after_epochs": resumed, "was_complete": False}, indent=2))


def _folder(out: Path) -> Path:
    if out.suffix == ".png":
        raise ValueError(f"--out {out} becomes the folder of a training; a picture is drawn from what that has made")
    return folder_path(out)


def _check_shape(order: Order, first: Tensor, other: ImageDataset | None) -> None:
    """Refuse images to judge by that are of another shape."""
    if other is not None and (shape := first_images(other, f"--val {order.val}").shape[1:]) != first.shape[1:]:
        raise ValueError(
            f"the images of --val {order.val} are of shape {tuple(shape)}, those of --images {tuple(first.shape[1:])}: "
            "bring both to one with --size and --mode"
        )


def _made(
    order: Order,
    pair: GenerativePair,
    tap: Tap,
    normalize: nn.Module | None,
    shape: tuple[int, ...],
    trained: ImageSubset,
) -> ActivationGenerator:
    """The generator before its training, after a look at whether it can give what is asked for."""
    activations = None
    if isinstance(pair.base, Sphere | Gaussian):
        certificate = tap.head.certificate
        rectified = " --pre-activation" if certificate is not None and certificate.rectified else ""
        warnings.warn(
            f"{order.source} has a law of which images will be poor ({pair.base}): its draws are not like activations. "
            f"A law that works: penult extract {order.model} {order.images} --out acts/{rectified}, and then "
            "penult fit acts/ --base mixture --out pair.penult.safetensors; with the --weights, --size, --mode, --mean "
            "and --std that are given here",
            UserWarning,
            stacklevel=2,
        )
        images, _ = trained.load(JUDGED, order.seed, order.loading)
        # Draws would not tell what real activations are like.
        activations = extract(tap, [x if normalize is None else normalize(x) for x in images.split(500)])
    torch.manual_seed(order.seed)  # of the first weights
    options: dict[str, Any] = order.own | {"condition": order.condition}
    makes: Callable[..., ActivationGenerator] = CLASSES[order.kind]
    return makes(pair, tap, shape, activations=activations, preprocess=normalize, **options)


def _law(order: Order, generator: ActivationGenerator, reporter: RichReporter) -> GenerativePair:
    """The pair that the file holds, after a look at whether it can give what is asked for, before the work."""
    law = generator.pair
    if generator.stored_activations and not order.store_activations:
        try:
            with reporter.waiting("fitting a mixture to the bank of activations"):
                law = generator.without_data().pair
        except ValueError as error:
            raise ValueError(
                f"{order.source}: {str(error).partition(':')[0]}: give --store-activations, which writes them, or a "
                "pair of another law"
            ) from error
    if order.confident is not None:
        drawn = generator.with_pair(law)
        drawn.generate(torch.arange(law.head.num_classes), order.confident, generator=seeded(drawn, 0))
    return law


def _sampling(order: Order, law: GenerativePair) -> Any:
    """Writes a grid of samples after epochs 1, 2, 5, 10, 20, 50, ... and the last."""
    from lightning.pytorch.callbacks import LambdaCallback

    def sample(trainer: Any, module: Any) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.is_global_zero and (str(epoch).rstrip("0") in ("1", "2", "5") or epoch == order.epochs):
            drawn = module.with_pair(law.to(module.device))
            rows = class_rows(drawn, evenly(law.head.num_classes, _ROWS), order.seed)
            io.write_bytes(order.out / SAMPLES / f"epoch-{epoch:04}.png", grid(rows.flatten(0, 1), rows.shape[1]))

    return LambdaCallback(on_train_epoch_end=sample)


def _figure(figures: dict[str, float]) -> str:
    return "".join(f", {name} {figures[name]:.4g}" for name in ("loss", "cosine") if name in figures)


def summary(facts: dict[str, Any], reporter: RichReporter) -> None:
    """A table of quality, and what it lacks."""
    held = "held-out" if facts["held_out"] else "validation"
    if facts["labels"] == "judge":
        reporter.line(f"the {held} images have no labels: they have those that the judge gives them")
    for reason in facts["skipped"]:
        reporter.line(reason)
    kinds, *columns = zip(*quality_rows(facts), strict=True)
    rows = [
        (title, *map(as_text, cells)) for title, cells in zip(("images", *quality_columns(facts)), columns, strict=True)
    ]
    reporter.table((f"by {facts['judged_by']} {held} images", *kinds), rows)  # upright: ten columns are too wide
    if facts["judge"] is None:
        reporter.line(BIASED_JUDGE)
