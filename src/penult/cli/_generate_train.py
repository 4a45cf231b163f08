"""Training of ``penult generate``: data, classifier, generator and results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from penult import io
from penult._extras import extra
from penult.activations import Tap, _checksum, extract
from penult.bases import Gaussian, Marginal, Sphere
from penult.cli._console import RichReporter, warnings_as_lines
from penult.cli._generate_judge import JUDGED, evaluator_of, judged
from penult.cli._inputs import (
    ImageSubset,
    NetworkOptions,
    class_names,
    first_images,
    number_as_network,
    split,
)
from penult.cli._models import folder_path, load_pair
from penult.cli._options import ImageOptions, with_recorded
from penult.cli._training import PAGE_FILE, TrainingRun, digest
from penult.cli.draw import GENERATOR_FILE, PILLOW, grid
from penult.generate import ActivationGAN, ActivationGenerator, ActivationVAE
from penult.pair import GenerativePair
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
    from penult.cli._launch import Launch
    from penult.data import ImageDataset, _Normalization

__all__ = ["CLASSES", "train"]

# Generators by --kind.
CLASSES: dict[str, type[ActivationGenerator]] = {"vae": ActivationVAE, "gan": ActivationGAN}

_SAMPLES = "samples"
# Options that the results depend on, next to those of the kind.
_RECORDED = (
    *("source", "model", "images", "val", "kind", "condition", "epochs", "batch_size", "store_activations"),
    *("confident", "judge", "judge_weights", "size", "mode", "mean", "std", "weights", "path", "fold", "weight_key"),
    *("bias_key", "seed", "precision"),
)
# Settings that may change without another training: only the judging is repeated.
_REPLACEABLE = "confident", "judge", "judge_weights", "judge_content", "store_activations"
_ROWS = 10  # Classes in a grid of samples.


def train(options: Mapping[str, Any], kind_options: Mapping[str, Any], launch: Launch, reporter: RichReporter) -> None:
    """Train a generator, or resume its training; judge it, and write its file, page and log.

    Args:
        options: All options of the command.
        kind_options: Options of the generator's class, by the names of its parameters.
        launch: The processes.
        reporter: Prints progress and results.
    """
    extra("PIL.Image", PILLOW)
    device, seed = launch.device, options["seed"]
    _check_folder(options["out"])
    run = TrainingRun(
        "generate",
        {**options, **kind_options},
        launch,
        reporter,
        file_name=GENERATOR_FILE,
        recorded=(*_RECORDED, *kind_options),
        samples=_SAMPLES,
        replaceable=_REPLACEABLE,
    )
    with warnings_as_lines(launch.rank > 0), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        pair = load_pair(options["source"], options["weight_key"], options["bias_key"])
        options = with_recorded(options, pair.head.preprocessing, options["source"])
        # Generators make images in [0, 1], so --mean and --std are for the classifier and the judge alone.
        normalization = ImageOptions.of(options).normalization
        dataset, val, first = _read(options)
        classifier_options = NetworkOptions.of(options, options["model"], "--model")
        seen = first if normalization is None else normalization(first)
        classifier = classifier_options.open(seen, device, reporter)
        pair, tap = classifier.pair(pair, options["source"]), classifier.tap
        datasets = {options["images"]: dataset} | ({} if val is None else {options["val"]: val})
        number_as_network(classifier.network, datasets, reporter)
        names = class_names(pair.head.num_classes, datasets)
        evaluator = evaluator_of(classifier, classifier_options, _judge(options), normalization, first.to(device))
        run.settings |= {"head": _checksum(pair.head), "count": len(dataset)}
        run.settings |= _digests(options, first, dataset, val)
        if not run.start():
            return
        training, validation = split(dataset, val, seed)
        if validation.held_out:
            reporter.line(f"{len(validation)} of {len(dataset)} images are held out to judge by; --val gives others")
        activations = _activations(options, pair, tap, normalization, training, run.loading)
        # The first weights are the same in every run.
        torch.manual_seed(seed)
        make: Callable[..., ActivationGenerator] = CLASSES[options["kind"].value]
        generator = make(
            pair,
            tap,
            tuple(first.shape[1:]),
            activations=activations,
            preprocess=normalization,
            condition=options["condition"].value,
            **kind_options,
        )
        stored_pair = _stored_pair(options, generator, reporter)
        val_loader = DataLoader(validation.images, **run.loading)
        run.fit(generator, training.images, val_loader, _figure, [_sampling(options, stored_pair)])
        if run.rank:
            return
        trained = generator.to(device).eval()
        generator = trained.with_pair(stored_pair.to(device))
        generator.save(run.out / GENERATOR_FILE, options["store_activations"])
        with reporter.waiting("judging the images"):
            quality, pictures = judged(
                generator, evaluator, training, validation, options["confident"], seed, run.loading
            )

    results: dict[str, Any] = {
        "out": str(run.out),
        "kind": options["kind"].value,
        "images": len(training),
        "judged_by": len(validation),
        "held_out": options["val"] is None,
        "shape": list(first.shape[1:]),
        "judge": options["judge"],
        "confident": options["confident"],
        "stored_activations": generator.stored_activations,
        "replaced_activations": trained.stored_activations - generator.stored_activations,
        "floats": stored_pair.base.num_parameters if isinstance(stored_pair.base, Marginal) else None,
        "epochs": len(generator.history),
        "history": generator.history,
    } | quality
    _report_quality(results, reporter)
    page(run.out / PAGE_FILE, results, run.settings, pair, pictures, names, GENERATOR_FILE)
    run.finish(
        results,
        contents(results, GENERATOR_FILE),
        f"{run.out / GENERATOR_FILE}: penult draw {run.out} -o grid.png draws from it",
    )


# --- data and networks --------------------------------------------------------------------------------------


def _check_folder(out: Path) -> None:
    if out.suffix.lower() == ".png":
        raise ValueError(f"--out is {out}; expected a folder to train in. penult draw draws from a trained generator")
    folder_path(out)


def _read(options: Mapping[str, Any]) -> tuple[ImageDataset, ImageDataset | None, Tensor]:
    """Return the images of --images and --val in [0, 1], of one shape, and the first of them."""
    images_of = ImageOptions.of(options)
    dataset = images_of.read(options["images"], normalized=False)
    val = None if options["val"] is None else images_of.read(options["val"], normalized=False)
    first = first_images(dataset, options["images"])
    shape = first.shape[1:]
    if val is not None and (val_shape := first_images(val, options["val"]).shape[1:]) != shape:
        raise ValueError(
            f"the images of --val {options['val']} are of shape {tuple(val_shape)}; expected {tuple(shape)}, as those "
            "of --images. Give --size and --mode"
        )
    if options["condition"].value == "label" and any(
        part.labels is None for part in (dataset, val) if part is not None
    ):
        raise ValueError("--condition label needs labels of all images; --condition activation needs none")
    return dataset, val, first


def _judge(options: Mapping[str, Any]) -> NetworkOptions | None:
    """Return the options of the independent classifier, if one is given."""
    if options["judge"] is None:
        return None
    return NetworkOptions(
        options["judge"],
        options["judge_weights"],
        fold=options["fold"],
        argument="--judge",
        weights_option="--judge-weights",
    )


def _digests(
    options: Mapping[str, Any], first: Tensor, dataset: ImageDataset, val: ImageDataset | None
) -> dict[str, Any]:
    """Return a digest of first images, all labels and files of pair and classifier, and one of the judge's file."""
    labels = [part.labels for part in (dataset, val) if part is not None and part.labels is not None]
    files = [file for file in (options["source"], options["weights"]) if file is not None]
    judge_weights = options["judge_weights"]
    return {
        "content": digest(first, *labels, *files),
        "judge_content": None if judge_weights is None else digest(judge_weights),
    }


# --- generator ----------------------------------------------------------------------------------------------


def _activations(
    options: Mapping[str, Any],
    pair: GenerativePair,
    tap: Tap,
    normalization: _Normalization | None,
    training: ImageSubset,
    loading: Mapping[str, Any],
) -> Any:
    """Warn and return real activations to standardize by if the base is a sphere or Gaussian; else return None."""
    if not isinstance(pair.base, Sphere | Gaussian):
        return None
    certificate = tap.head.certificate
    rectified = " --pre-activation" if certificate is not None and certificate.rectified else ""
    warnings.warn(
        f"the base of {options['source']} is {pair.base}, whose samples are unlike real activations: images will be "
        f"poor. Fit a mixture: penult extract {options['model']} {options['images']} --out acts/{rectified}, then "
        "penult fit acts/ --base mixture --out pair.penult.safetensors; with the --weights, --size, --mode, --mean "
        "and --std that are given here",
        UserWarning,
        stacklevel=2,
    )
    images, _ = training.load(JUDGED, options["seed"], loading)
    batches = images.split(500)
    return extract(tap, [batch if normalization is None else normalization(batch) for batch in batches])


def _stored_pair(options: Mapping[str, Any], generator: ActivationGenerator, reporter: RichReporter) -> GenerativePair:
    """Return the pair that the generator's file gets; check before the training that it can give confident samples."""
    pair = generator.pair
    if generator.stored_activations and not options["store_activations"]:
        try:
            with reporter.waiting("fitting a mixture to the bank of activations"):
                pair = generator.without_data().pair
        except ValueError as error:
            raise ValueError(
                f"{options['source']} holds {generator.stored_activations} real activations, and no mixture can be "
                "fitted to them. Give --store-activations to store them, or a pair with another base"
            ) from error
    if options["confident"] is not None:
        changed = generator.with_pair(pair)
        labels = torch.arange(pair.head.num_classes, device="cpu")
        changed.generate(labels, options["confident"], generator=seeded(changed, 0))
    return pair


def _sampling(options: Mapping[str, Any], pair: GenerativePair) -> Any:
    """Return a callback that writes a grid of samples after epochs 1, 2, 5, 10, 20, 50, ... and the last."""
    from lightning.pytorch.callbacks import LambdaCallback

    def sample(trainer: Any, module: Any) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.is_global_zero and (str(epoch).rstrip("0") in ("1", "2", "5") or epoch == options["epochs"]):
            generator = module.with_pair(pair.to(module.device))
            rows = class_rows(generator, evenly(pair.head.num_classes, _ROWS), options["seed"])
            file = options["out"] / _SAMPLES / f"epoch-{epoch:04}.png"
            io.write_bytes(file, grid(rows.flatten(0, 1), rows.shape[1]))

    return LambdaCallback(on_train_epoch_end=sample)


# --- results ------------------------------------------------------------------------------------------------


def _figure(figures: dict[str, float]) -> str:
    return "".join(f", {name} {figures[name]:.4g}" for name in ("loss", "cosine") if name in figures)


def _report_quality(results: Mapping[str, Any], reporter: RichReporter) -> None:
    """Print a table of the quality of the images, and the reasons for figures that are missing."""
    facts = dict(results)
    images = "held-out images" if facts["held_out"] else "validation images"
    if facts["labels"] == "judge":
        reporter.line(f"the {images} have no labels; the judge's predictions are used instead")
    for reason in facts["skipped"]:
        reporter.line(reason)
    # Ten columns would be too wide, so the table is transposed.
    kinds, *columns = zip(*quality_rows(facts), strict=True)
    rows = [
        (title, *map(as_text, cells)) for title, cells in zip(("images", *quality_columns(facts)), columns, strict=True)
    ]
    reporter.table((f"by {facts['judged_by']} {images}", *kinds), rows)
    if facts["judge"] is None:
        reporter.line(BIASED_JUDGE)
