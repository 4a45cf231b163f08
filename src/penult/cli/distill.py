"""``penult distill``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penult.cli._console import RichReporter, warnings_as_lines
from penult.cli._launch import Launch
from penult.cli._models import folder_path, is_file, load_model, load_pair, running
from penult.cli._options import (
    AsJson,
    BiasKey,
    Device,
    Devices,
    Fold,
    Mean,
    Mode,
    NumNodes,
    Precision,
    Seed,
    Size,
    Std,
    Strategy,
    WeightKey,
    Workers,
    plain,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from penult.distill import Distiller
    from penult.pair import GenerativePair

__all__ = ["distill"]

_RECORDED = (  # what the student depends on
    *("teacher", "student", "data", "val", "pair", "kind", "temperature", "weight", "strength", "hint", "epochs"),
    *("batch_size", "rate", "size", "mode", "mean", "std", "weights", "path", "fold", "weight_key", "bias_key"),
    *("seed", "precision"),
)


class Kind(str, Enum):
    """What the student is taught."""

    soft = "soft"
    activation = "activation"
    hinted = "hinted"


def distill(
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER",
            help="A .penult.safetensors, or another .safetensors that holds a head: no network of the teacher is "
            "needed. Or package.module:factory, which is run over the images once.",
        ),
    ],
    student: Annotated[str, typer.Option(help="The student's network, package.module:factory.")],
    data: Annotated[str, typer.Option(help="Images: a parquet file, glob or folder; an image folder; .npz; digits.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; a run that was killed continues there.")],
    val: Annotated[
        str | None, typer.Option(help="Labelled images to judge by. [default: a tenth of DATA is held out]")
    ] = None,
    pair: Annotated[
        Path | None, typer.Option(help="The pair of a teacher's network, with a base fitted to its own domain.")
    ] = None,
    kind: Annotated[
        Kind, typer.Option(help="Teach by soft targets, by activations, or by these with hints.")
    ] = Kind.soft,
    temperature: Annotated[float, typer.Option(help="T of soft targets.")] = 4.0,
    weight: Annotated[float, typer.Option(help="Weight of soft targets beside the labels, 0 to 1.")] = 0.9,
    strength: Annotated[float, typer.Option(help="Weight of activations beside the labels.")] = 5.0,
    hint: Annotated[float, typer.Option(help="Weight of hints beside the labels.", min=1e-6)] = 5.0,
    epochs: Annotated[int, typer.Option(help="How often all images are seen.", min=1)] = 20,
    batch_size: Annotated[int, typer.Option(help="Images at a time, on each device.", min=2)] = 64,
    rate: Annotated[float, typer.Option(help="Half the highest learning rate of AdamW.")] = 3e-3,
    workers: Workers = 0,
    size: Size = None,
    mode: Mode = None,
    mean: Mean = None,
    std: Std = None,
    weights: Annotated[
        Path | None, typer.Option(help="A .safetensors state dict for the teacher that the factory makes.")
    ] = None,
    path: Annotated[str | None, typer.Option("--path", help="Name of the teacher's head, if known.")] = None,
    fold: Fold = True,
    weight_key: WeightKey = None,
    bias_key: BiasKey = None,
    overwrite: Annotated[bool, typer.Option(help="Start anew where the folder holds another distillation.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    devices: Devices = None,
    num_nodes: NumNodes = None,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
    as_json: AsJson = False,
) -> None:
    """Distil a teacher into a student, believing it only where it deserves to be.

    With a file, the head of the teacher is all that is needed: students learn what it says of typical activations.

    With a network, each image's target is mixed with what the network says of it, as far as a gate believes that:
    by its accuracy on the labels, whether it is right on the image, and how typical its activation is of the class.

    OUT gets student.safetensors, the page index.html, log.json and checkpoints. Training goes by Lightning (extra
    train): the same command continues after a kill, and gives the same student.

    Example: penult distill resnet.penult.safetensors --student mynets:small --data "target-*.parquet" --out run/

    Example: penult distill mynets:resnet --weights resnet.safetensors --student mynets:small --data photos/ --out run/
    """
    import torch

    settings = {name: plain(value) for name, value in locals().items() if name in _RECORDED}
    from torch.utils.data import DataLoader

    from penult import io
    from penult.activations import _checksum
    from penult.cli._distill_train import STUDENT_FILE, accuracy_of, confusion_of, lesson_of, save, summary
    from penult.cli._inputs import ImageOptions, ImageSubset, NetworkOptions, class_names, first_images, split
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
    from penult.distill import Distiller
    from penult.pair import load
    from penult.processes import Processes
    from penult.report.distill import page  # a missing extra is better said before the work

    launch = Launch(device, devices, num_nodes, strategy)
    reporter, where = RichReporter(stderr=as_json, silent=launch.rank > 0), launch.device
    settings |= {"devices": launch.devices, "num_nodes": launch.num_nodes}
    folder_path(out)
    loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers}
    with warnings_as_lines(launch.rank > 0), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        image_options = ImageOptions(size, mode, mean, std)
        dataset = image_options.read(data)
        judge = None if val is None else image_options.read(val)
        images = first_images(dataset, data)
        if is_file(teacher):
            _refuse_for_files(teacher, {"--pair": pair, "--weights": weights, "--path": path})
            known, tap = load_pair(teacher, weight_key, bias_key), None
        else:
            given = None if pair is None else load(pair)
            classifier = NetworkOptions(teacher, weights, path, fold, "TEACHER").open(images, where, reporter)
            known, tap = classifier.pair(given, f"--pair {pair}"), classifier.tap
        names = class_names(
            known.head.num_classes, {data: dataset} | ({} if val is None or judge is None else {val: judge})
        )
        if dataset.labels is None and tap is None:
            raise ValueError(
                f"{data} has no labels, and the head in {teacher} cannot see images: give labelled images, or the "
                "teacher's network (package.module:factory), which labels them itself"
            )
        settings |= {"head": _checksum(known.head), "images": len(dataset)}
        settings["content"] = digest(
            images,
            *(each.labels for each in (dataset, judge) if each is not None and each.labels is not None),
            *(file for file in (teacher if is_file(teacher) else None, pair, weights) if file is not None),
        )
        processes = Processes(launch.start())
        if processes.rank == 0:
            io.sweep(out)  # what a killed run left half-written says nothing of the folder
        if processes.first(processes.rank == 0 and is_complete(out, settings, overwrite, "distill")):
            if processes.rank == 0:
                say_complete(out, as_json, reporter)
            return

        torch.manual_seed(seed)  # of the student's first weights
        pupil = load_model(student, argument="--student")
        with running(tuple(images.shape), f"--student {student}"):
            loss = _loss(kind, known, pupil, images, temperature, weight, strength, hint, reporter)
            distiller = Distiller(pupil, loss, rate=rate)
            _try(distiller, student, images, known.head.num_classes)
        if judge is not None and judge.labels is None:
            raise ValueError("the images of --val have no labels to judge by")
        training, validation = (
            (ImageSubset(dataset), None) if judge is None and dataset.labels is None else split(dataset, judge, seed)
        )
        if validation is not None and validation.held_out:
            reporter.line(f"{len(validation)} of {len(dataset)} images are held out to judge by; --val gives others")
        lesson = lesson_of(known, tap, training, validation, kind.value, temperature, names, loading, reporter)
        examined = None if validation is None else DataLoader(validation.images, **loading)
        start = None if examined is None else confusion_of(distiller, examined, where)
        trainer = trainer_of(
            out,
            seed,
            epochs=epochs,
            launch=launch,
            precision=precision,
        )
        if processes.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            for name in (LOG_FILE, PAGE_FILE, STUDENT_FILE, *([CHECKPOINT] if overwrite else [])):
                (out / name).unlink(missing_ok=True)  # of a run before
            # Settings are replaced and never absent: a folder without them is none that could be continued.
            io.write_bytes(out / SETTINGS_FILE, json.dumps(settings, indent=2).encode())
        processes.wait()
        resumed = fit(
            trainer,
            distiller,
            lesson.data,
            examined,
            out=out,
            seed=seed,
            loading=loading,
            resume=not overwrite,
            figure=_accuracy,
            reporter=reporter,
        )
        if processes.rank:
            return
        end = confusion_of(distiller, DataLoader(lesson.data, **loading) if examined is None else examined, where)

    curve = [each["val_accuracy"] for each in distiller.history if "val_accuracy" in each]
    facts: dict[str, Any] = {
        "out": str(out),
        "images": len(lesson.data),
        "judged_by": 0 if validation is None else len(validation),
        "held_out": validation is not None and validation.held_out,
        "labels": "pseudo" if training.labels is None else "given",
        "gate": None if lesson.gate is None else lesson.gate.to_dict(),
        "teacher_accuracy": lesson.teacher_accuracy,
        "start_accuracy": None if start is None else accuracy_of(start),
        "best_accuracy": max(curve, default=None),
        "best_epoch": curve.index(max(curve)) + 1 if curve else None,
        "accuracy": None if examined is None else accuracy_of(end),
        "epochs": len(distiller.history),
        "history": distiller.history,
        "loads_into": save(distiller, student, out / STUDENT_FILE),
    }
    summary(facts, lesson.gate, reporter)
    page(out / PAGE_FILE, facts, settings, lesson.gate, known, end, names, STUDENT_FILE)
    io.write_bytes(out / LOG_FILE, json.dumps(facts, indent=2).encode())  # last: now the folder is complete
    reporter.line(f"{out / STUDENT_FILE}: the state dict of {facts['loads_into']}")
    reporter.line(f"{out / PAGE_FILE}")
    if as_json:
        typer.echo(json.dumps(facts | {"resumed_after_epochs": resumed, "was_complete": False}, indent=2))


def _accuracy(figures: dict[str, float]) -> str:
    return f", accuracy {figures['val_accuracy']:.1%}" if "val_accuracy" in figures else ""


def _refuse_for_files(teacher: str, options: dict[str, Any]) -> None:
    for flag, value in options.items():
        if value is not None:
            raise ValueError(f"{flag} goes with a teacher's network, package.module:factory; {teacher} is a file")


def _loss(
    kind: Kind,
    pair: GenerativePair,
    student: nn.Module,
    images: Tensor,
    temperature: float,
    weight: float,
    strength: float,
    hint: float,
    reporter: RichReporter,
) -> nn.Module:
    import torch

    from penult.distill import ActivationLoss, SoftTargetLoss
    from penult.head import find_head

    if kind is Kind.soft:
        return SoftTargetLoss(temperature, weight)
    hint = hint if kind is Kind.hinted else 0.0
    with torch.no_grad():
        output = student.eval()(images)
    if isinstance(output, torch.Tensor) and output.ndim == 2 and output.shape[1] != pair.head.num_classes:
        reporter.line(f"the student's output, {output.shape[1]} numbers an image, is taken for its features")
        return ActivationLoss(pair, output.shape[1], strength, hint=hint)
    return ActivationLoss(pair, find_head(student, images, fold=False).in_features, strength, hint=hint)


def _try(distiller: Distiller, name: str, images: Tensor, classes: int) -> None:
    """See before the work that the student fits, and can be exported."""
    import torch

    distiller.locate(images)
    distiller.eval()
    with torch.no_grad():
        logits, plain = distiller(images), distiller.export()(images)
    distiller.train()
    if logits.shape != (len(images), classes):
        raise ValueError(
            f"the student {name} gives {tuple(logits.shape)} for {len(images)} images, but the head has {classes} "
            "classes: it must give logits of the same"
        )
    if isinstance(plain, torch.Tensor) and not torch.allclose(
        plain, logits, atol=1e-4 * max(1, float(logits.abs().max()))
    ):
        raise ValueError(
            f"the student {name} does more with its head's output than return it, so that no other layer can take "
            "its place: give a feature extractor, images to features"
        )
