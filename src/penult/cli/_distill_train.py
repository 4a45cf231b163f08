"""Training of ``penult distill``: data, teacher, targets, student and results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from penult import io
from penult._checks import is_chance_level
from penult.activations import Tap, _checksum, extract
from penult.cli._console import RichReporter, warnings_as_lines
from penult.cli._inputs import (
    ImageSubset,
    NetworkOptions,
    class_names,
    first_images,
    guessing,
    number_as_network,
    split,
)
from penult.cli._models import folder_path, is_file, load_model, load_pair, running
from penult.cli._options import ImageOptions
from penult.cli._training import PAGE_FILE, TrainingRun, digest
from penult.distill import (
    _SHARPNESS,
    ActivationLoss,
    Distiller,
    Gate,
    GateSummary,
    SoftTargetLoss,
    TargetDataset,
    pseudo_labels,
    targets,
)
from penult.head import find_head
from penult.pair import GenerativePair, load
from penult.report.distill import page

if TYPE_CHECKING:
    from penult.cli._launch import Launch
    from penult.data import ImageDataset

__all__ = ["train"]

STUDENT_FILE = "student.safetensors"
# Options that the student depends on.
_RECORDED = (
    *("teacher", "student", "data", "val", "pair", "kind", "temperature", "weight", "strength", "hint", "epochs"),
    *("batch_size", "rate", "size", "mode", "mean", "std", "weights", "path", "fold", "weight_key", "bias_key"),
    *("seed", "precision"),
)
_TABLE_ROWS = 20  # Classes in the printed table.


@dataclass(frozen=True)
class _Teacher:
    """A teacher's pair, the tap of its network if there is one, and the names of its classes."""

    pair: GenerativePair
    tap: Tap | None
    names: list[str]


@dataclass(frozen=True)
class _Lesson:
    """Images with their targets, how far the gate trusts the teacher, and the teacher's accuracy."""

    data: TargetDataset
    gate: GateSummary | None
    teacher_accuracy: float | None


def train(options: Mapping[str, Any], launch: Launch, reporter: RichReporter) -> None:
    """Train a student, or resume its training; then write its file, page and log."""
    folder_path(options["out"])
    run = TrainingRun("distill", options, launch, reporter, file_name=STUDENT_FILE, recorded=_RECORDED)
    with warnings_as_lines(launch.rank > 0), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        images_of = ImageOptions.of(options)
        dataset = images_of.read(options["data"])
        val = None if options["val"] is None else images_of.read(options["val"])
        images = first_images(dataset, options["data"])
        teacher = _open_teacher(options, dataset, val, images, launch.device, reporter)
        run.settings |= {"head": _checksum(teacher.pair.head), "images": len(dataset)}
        run.settings["content"] = _digest(options, images, dataset, val)
        if not run.start():
            return
        # The student's first weights are the same in every run.
        torch.manual_seed(options["seed"])
        distiller = _make_distiller(options, teacher.pair, images, reporter)
        training, validation = _split(dataset, val, options["seed"], reporter)
        lesson = _make_lesson(options, teacher, training, validation, run.loading, reporter)
        val_loader = None if validation is None else DataLoader(validation.images, **run.loading)
        start = None if val_loader is None else _confusion(distiller, val_loader, launch.device)
        run.fit(distiller, lesson.data, val_loader, _figure)
        if run.rank:
            return
        end_loader = DataLoader(lesson.data, **run.loading) if val_loader is None else val_loader
        end = _confusion(distiller, end_loader, launch.device)

    accuracies = [figures["val_accuracy"] for figures in distiller.history if "val_accuracy" in figures]
    results: dict[str, Any] = {
        "out": str(run.out),
        "images": len(lesson.data),
        "judged_by": 0 if validation is None else len(validation),
        "held_out": validation is not None and validation.held_out,
        "labels": "pseudo" if training.labels is None else "given",
        "gate": None if lesson.gate is None else lesson.gate.to_dict(),
        "teacher_accuracy": lesson.teacher_accuracy,
        "start_accuracy": None if start is None else _accuracy(start),
        "best_accuracy": max(accuracies, default=None),
        "best_epoch": accuracies.index(max(accuracies)) + 1 if accuracies else None,
        "accuracy": None if val_loader is None else _accuracy(end),
        "epochs": len(distiller.history),
        "history": distiller.history,
        "loads_into": _save(distiller, options["student"], run.out / STUDENT_FILE),
    }
    _report_tables(results, lesson.gate, reporter)
    page(run.out / PAGE_FILE, results, run.settings, lesson.gate, teacher.pair, end, teacher.names, STUDENT_FILE)
    run.finish(results, f"{run.out / STUDENT_FILE}: the state dict of {results['loads_into']}")


# --- data and teacher ---------------------------------------------------------------------------------------


def _open_teacher(
    options: Mapping[str, Any],
    dataset: ImageDataset,
    val: ImageDataset | None,
    images: Tensor,
    device: torch.device,
    reporter: RichReporter,
) -> _Teacher:
    """Load the teacher's pair from its file, or find the head of its network; check it against the data."""
    name, weight_key, bias_key = options["teacher"], options["weight_key"], options["bias_key"]
    datasets = {options["data"]: dataset} | ({} if val is None else {options["val"]: val})
    tap = None
    if is_file(name):
        for option in ("pair", "weights", "path"):
            if options[option] is not None:
                raise ValueError(
                    f"--{option} goes with a teacher's network, package.module:factory, but {name} is a file"
                )
        pair = load_pair(name, weight_key, bias_key)
    else:
        fitted = None if options["pair"] is None else load(options["pair"])
        classifier = NetworkOptions.of(options, name, "TEACHER").open(images, device, reporter)
        pair, tap = classifier.pair(fitted, f"--pair {options['pair']}"), classifier.tap
    if tap is not None:
        number_as_network(tap.model, datasets, reporter)
    names = class_names(pair.head.num_classes, datasets)
    if dataset.labels is None and tap is None:
        raise ValueError(
            f"{options['data']} has no labels, and the head in {name} cannot label images; give labelled images, or "
            "the teacher's network (package.module:factory), which labels them"
        )
    return _Teacher(pair, tap, names)


def _digest(options: Mapping[str, Any], images: Tensor, dataset: ImageDataset, val: ImageDataset | None) -> str:
    """Return a digest of the first images, of all labels and of the files of teacher and pair."""
    labels = [part.labels for part in (dataset, val) if part is not None and part.labels is not None]
    files = (options["teacher"] if is_file(options["teacher"]) else None, options["pair"], options["weights"])
    return digest(images, *labels, *(file for file in files if file is not None))


def _split(
    dataset: ImageDataset, val: ImageDataset | None, seed: int, reporter: RichReporter
) -> tuple[ImageSubset, ImageSubset | None]:
    """Return the images to train on, and the labelled images to evaluate the student on, if there are any."""
    if val is not None and val.labels is None:
        raise ValueError("the images of --val have no labels to judge by")
    if val is None and dataset.labels is None:
        return ImageSubset(dataset), None
    training, validation = split(dataset, val, seed)
    if validation.held_out:
        reporter.line(f"{len(validation)} of {len(dataset)} images are held out to judge by; --val gives others")
    return training, validation


def _make_lesson(
    options: Mapping[str, Any],
    teacher: _Teacher,
    training: ImageSubset,
    validation: ImageSubset | None,
    loading: dict[str, Any],
    reporter: RichReporter,
) -> _Lesson:
    """Compute the targets of all images: run the teacher's network on them once, then move it to the CPU."""
    pair, tap = teacher.pair, teacher.tap
    kind, temperature = options["kind"].value, options["temperature"]
    if tap is None:
        if kind == "hinted":
            raise ValueError("--kind hinted needs a teacher's network; give package.module:factory")
        label_targets = targets(pair, training.labels, kind, temperature=temperature)
        return _Lesson(TargetDataset(training.images, label_targets), None, None)
    reporter.line(f"running the teacher on {len(training)} images, once")
    acts = extract(tap, DataLoader(training.images, **loading), progress=True)
    gate = Gate.fit(pair, acts, sharpness=_SHARPNESS[kind], class_names=teacher.names)
    summary = gate.summary
    assert summary is not None
    if summary.accuracy is not None and is_chance_level(summary.accuracy, len(acts), pair.head.num_classes):
        warnings.warn(guessing("the teacher", summary.accuracy, pair.head.num_classes), UserWarning, stacklevel=2)
    labels = training.labels
    if labels is None:
        warnings.warn(
            "the images have no labels, so they get those that the teacher predicts. The student learns the teacher's "
            "errors, and nothing shows where these are: no gain under a domain shift can be promised",
            UserWarning,
            stacklevel=2,
        )
        labels = pseudo_labels(pair, acts)
    mixed = targets(pair, labels, kind, temperature=temperature, activations=acts, gate=gate)
    accuracy = None
    if validation is not None:
        val_acts = extract(tap, DataLoader(validation.images, **loading))
        assert val_acts.labels is not None
        accuracy = float((val_acts.logits.argmax(-1) == val_acts.labels).double().mean())
    tap.cpu()
    return _Lesson(TargetDataset(training.images, mixed, labels), summary, accuracy)


# --- student ------------------------------------------------------------------------------------------------


def _make_distiller(
    options: Mapping[str, Any], pair: GenerativePair, images: Tensor, reporter: RichReporter
) -> Distiller:
    """Load the student and make its loss; check before the training that it fits and can be exported."""
    name = options["student"]
    student = load_model(name, argument="--student")
    with running(tuple(images.shape), f"--student {name}"):
        distiller = Distiller(student, _make_loss(options, pair, student, images, reporter), rate=options["rate"])
        _check_student(distiller, name, images, pair.head.num_classes)
    return distiller


def _make_loss(
    options: Mapping[str, Any], pair: GenerativePair, student: nn.Module, images: Tensor, reporter: RichReporter
) -> nn.Module:
    kind = options["kind"].value
    if kind == "soft":
        return SoftTargetLoss(options["temperature"], options["weight"])
    strength, hint = options["strength"], options["hint"] if kind == "hinted" else 0.0
    with torch.no_grad():
        output = student.eval()(images)
    if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] != pair.head.num_classes:
        reporter.line(f"the student's output, {output.shape[1]} numbers per image, is used as its features")
        return ActivationLoss(pair, output.shape[1], strength, hint=hint)
    return ActivationLoss(pair, find_head(student, images, fold=False).in_features, strength, hint=hint)


def _check_student(distiller: Distiller, name: str, images: Tensor, num_classes: int) -> None:
    distiller.locate(images)
    distiller.eval()
    with torch.no_grad():
        logits, exported = distiller(images), distiller.export()(images)
    distiller.train()
    if logits.shape != (len(images), num_classes):
        raise ValueError(
            f"the student {name} gives {tuple(logits.shape)} for {len(images)} images; expected logits "
            f"{(len(images), num_classes)}, as the head has {num_classes} classes"
        )
    tolerance = 1e-4 * max(1, float(logits.abs().max()))
    if isinstance(exported, Tensor) and not torch.allclose(exported, logits, atol=tolerance):
        raise ValueError(
            f"the student {name} does not return its head's output unchanged, so its head cannot be replaced; give a "
            "feature extractor, images to features"
        )


# --- results ------------------------------------------------------------------------------------------------


def _figure(figures: dict[str, float]) -> str:
    return f", accuracy {figures['val_accuracy']:.1%}" if "val_accuracy" in figures else ""


def _confusion(distiller: Distiller, loader: DataLoader[Any], device: torch.device) -> Tensor:
    """Return the counts (K, K) of labels (rows) and the student's predictions (columns)."""
    distiller.eval().to(device)
    counts = torch.tensor(0, device="cpu")
    with torch.no_grad():
        for images, labels, *_ in loader:
            logits = distiller(images.to(device)).cpu()
            k = logits.shape[1]
            counts = counts + (labels * k + logits.argmax(-1)).bincount(minlength=k * k).view(k, k)
    distiller.train().cpu()
    return counts


def _accuracy(confusion: Tensor) -> float:
    return float(confusion.diagonal().sum() / confusion.sum())


def _save(distiller: Distiller, student: str, path: Path) -> str:
    """Write the state dict of the exported student, and return a description of the module that it loads into."""
    exported = distiller.export()
    state = exported.state_dict()
    with io.aside(path) as temporary:
        io.save_file(state, temporary, metadata={"format": "pt"})
    if set(state) == set(distiller.student.state_dict()):
        return f"{student}, as it is"
    loss = distiller.loss
    shape = f"{loss.in_features}, {loss.num_classes}" if isinstance(loss, ActivationLoss) else ""
    if distiller.certificate is None:
        return f"torch.nn.Sequential(student, torch.nn.Linear({shape})) with the student of {student}"
    return f"{student}, with torch.nn.Linear({shape}) at {distiller.certificate.path}"


def _report_tables(results: Mapping[str, Any], gate: GateSummary | None, reporter: RichReporter) -> None:
    """Print how far the gate trusts the teacher on each class, and the accuracies."""
    if gate is not None:
        shown = sorted(gate.classes, key=lambda trust: trust.belief)[:_TABLE_ROWS]
        first_line, _, _ = str(gate).partition("\n")
        more = f"; the {_TABLE_ROWS} least trusted classes:" if len(gate.classes) > _TABLE_ROWS else ""
        reporter.line(first_line + more)
        rows = [
            (trust.name, trust.rows, "-" if trust.accuracy is None else f"{trust.accuracy:.1%}", f"{trust.belief:.1%}")
            for trust in gate.classes
            if trust in shown
        ]
        reporter.table(("class", "images", "teacher right", "believed"), rows)
    if results["accuracy"] is not None:
        images = "held-out images" if results["held_out"] else "validation images"
        accuracies = [
            ("student at the start", f"{results['start_accuracy']:.1%}"),
            (f"student at its best, epoch {results['best_epoch']}", f"{results['best_accuracy']:.1%}"),
            ("student at the end", f"{results['accuracy']:.1%}"),
        ]
        if results["teacher_accuracy"] is not None:
            accuracies.append(("teacher", f"{results['teacher_accuracy']:.1%}"))
        reporter.table((f"on {results['judged_by']} {images}", "accuracy"), accuracies)
