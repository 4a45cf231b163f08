"""What ``penult distill`` does: share out images, ask the teacher, train, export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from penult.cli.console import RichReporter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from penult.activations import Tap
    from penult.data import ImageDataset
    from penult.distill import Distiller, GateSummary, TargetDataset
    from penult.pair import GenerativePair

    Kind = Literal["soft", "activation", "hinted"]

__all__ = [
    "CHECKPOINT", "Lesson", "Share", "accuracy_of", "confusion_of", "lesson_of", "loader_of", "save", "share_of",
    "train", "trainer_of",
]  # fmt: skip

CHECKPOINT = "checkpoints/last.ckpt"
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Share:
    """What is trained on, and what is judged by."""

    train: Any
    labels: Tensor | None
    val: Any
    held_out: int


@dataclass(frozen=True)
class Lesson:
    """What the teacher has to say."""

    data: TargetDataset
    gate: GateSummary | None
    teacher_accuracy: float | None


def share_of(dataset: ImageDataset, judge: ImageDataset | None, seed: int) -> Share:
    """What is trained on and what is judged by: all and `judge`, or nine tenths and the rest."""
    import torch
    from torch.utils.data import Subset

    if judge is not None:
        if judge.labels is None:
            raise ValueError("the images of --val have no labels to judge by")
        return Share(dataset, dataset.labels, judge, 0)
    if dataset.labels is None:
        return Share(dataset, None, None, 0)
    count = max(1, round(_HELD_OUT * len(dataset)))
    if len(dataset) - count < 2:
        raise ValueError(f"there are {len(dataset)} images, too few to hold some out; give --val")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    train, val = order[count:].sort().values, order[:count].sort().values
    return Share(Subset(dataset, train.tolist()), dataset.labels[train], Subset(dataset, val.tolist()), count)


def loader_of(dataset: Any, **options: Any) -> Any:
    """A loader of a data set, without an import of torch before it is needed."""
    from torch.utils.data import DataLoader

    return DataLoader(dataset, **options)


def lesson_of(
    pair: GenerativePair,
    tap: Tap | None,
    share: Share,
    kind: Kind,
    temperature: float,
    names: list[str],
    loading: dict[str, Any],
    reporter: RichReporter,
) -> Lesson:
    """Targets of all images; a network sees them, and is then sent away."""
    from penult.activations import extract
    from penult.distill import Gate, TargetDataset, pseudo_labels, targets
    from penult.distill._targets import SHARPNESS

    if tap is None:
        if kind == "hinted":
            raise ValueError("hints are what a teacher's network makes of the images: give package.module:factory")
        made = targets(pair, share.labels, kind, temperature=temperature)
        return Lesson(TargetDataset(share.train, made), None, None)
    reporter.line(f"running the teacher over {len(share.train)} images, once")
    acts = extract(tap, loader_of(share.train, **loading), progress=True)
    gate = Gate.fit(pair, acts, sharpness=SHARPNESS[kind], class_names=names)
    labels = share.labels
    if labels is None:
        warnings.warn(
            "the images have no labels, so they get those that the teacher gives them. Where it is wrong the student "
            "learns its errors, and nothing says where that is: no gain under a domain shift can be promised",
            UserWarning,
            stacklevel=2,
        )
        labels = pseudo_labels(pair, acts)
    made = targets(pair, labels, kind, temperature=temperature, activations=acts, gate=gate)
    accuracy = None
    if share.val is not None:
        seen = extract(tap, loader_of(share.val, **loading))
        assert seen.labels is not None
        accuracy = float((seen.logits.argmax(-1) == seen.labels).double().mean())
    tap.cpu()
    return Lesson(TargetDataset(share.train, made, labels), gate.summary, accuracy)


def confusion_of(distiller: Distiller, loader: Any, device: torch.device) -> Tensor:
    """Labels against the student's answers (K, K)."""
    import torch

    distiller.eval().to(device)
    counts = torch.tensor(0)
    with torch.no_grad():
        for images, labels, *_ in loader:
            logits = distiller(images.to(device)).cpu()
            k = logits.shape[1]
            counts = counts + (labels * k + logits.argmax(-1)).bincount(minlength=k * k).view(k, k)
    distiller.train().cpu()
    return counts


def accuracy_of(confusion: Tensor) -> float:
    """Share of the diagonal."""
    return float(confusion.diagonal().sum() / confusion.sum())


def trainer_of(out: Path, seed: int, **options: Any) -> Any:
    """A Trainer that is silent, and keeps a checkpoint of the last whole epoch."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

    def begin(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # so that dropout draws the same after a resume
            torch.manual_seed(seed + 7919 * (1 + trainer.current_epoch) + 104729 * trainer.global_rank)

    folder, name = (out / CHECKPOINT).parent, Path(CHECKPOINT).stem
    saving = ModelCheckpoint(folder, name, save_on_train_epoch_end=True, enable_version_counter=False)
    with _quiet():
        return Trainer(
            callbacks=[LambdaCallback(on_train_batch_start=begin), saving],
            default_root_dir=out,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )


def train(
    trainer: Any,
    distiller: Distiller,
    data: TargetDataset,
    examined: Any,
    out: Path,
    seed: int,
    loading: dict[str, Any],
    resume: bool,
    reporter: RichReporter,
) -> int:
    """Fit, from the last checkpoint if there is one; gives the number of epochs that were done before."""
    import torch
    from lightning.pytorch.callbacks import LambdaCallback
    from torch.utils.data.distributed import DistributedSampler

    file, before, epochs = out / CHECKPOINT, 0, trainer.max_epochs
    if resume and file.exists():
        before = len(torch.load(file, map_location="cpu", weights_only=True)["penult"]["history"])
        reporter.line(f"{out} holds a run that was stopped: resuming after epoch {before} of {epochs}")
    # This sampler's order is a function of seed and epoch, on one device too; on several, Lightning puts in its own.
    order: Any = DistributedSampler(data, 1, 0, seed=seed) if trainer.world_size == 1 else None
    if order is not None:
        order.set_epoch(before)  # Lightning does, but workers that are asked ahead begin before
    # A last batch of one image would have no variance to normalise by.
    loader = loader_of(
        data,
        sampler=order,
        shuffle=None if order is not None else True,
        drop_last=len(data) % loading["batch_size"] == 1 and len(data) > 1,
        generator=torch.Generator().manual_seed(seed),
        **loading,
    )
    with _quiet(), reporter.steps(epochs * -(-len(loader) // trainer.world_size)) as report:

        def told(trainer: Any, module: Any, *_: Any) -> None:
            accuracy = f", accuracy {module.history[-1]['val_accuracy']:.1%}" if examined and module.history else ""
            report(trainer.global_step, f"epoch {min(trainer.current_epoch + 1, epochs)} of {epochs}{accuracy}")

        trainer.callbacks.append(LambdaCallback(on_train_batch_end=told))
        trainer.fit(distiller, loader, examined, ckpt_path=file if before else None)
        told(trainer, distiller)
    if len(distiller.history) < epochs:
        raise RuntimeError(
            f"the training was interrupted after epoch {len(distiller.history)} of {epochs}; the same command "
            "continues it"
        )
    return before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's tips and remarks, which are about its own options."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers", category=UserWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def save(distiller: Distiller, student: str, path: Path) -> str:
    """Write the exported student's state dict, and say what takes it."""
    from safetensors.torch import save_file

    from penult import io
    from penult.distill import ActivationLoss

    plain = distiller.export()
    state = {name: value.detach().cpu().contiguous().clone() for name, value in plain.state_dict().items()}
    with io.aside(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    certificate = distiller.certificate
    if set(state) == set(distiller.student.state_dict()):
        return f"{student}, as it is"
    shape = (
        f"{distiller.loss.in_features}, {distiller.loss.num_classes}"
        if isinstance(distiller.loss, ActivationLoss)
        else ""
    )
    if certificate is None:
        return f"torch.nn.Sequential(student, torch.nn.Linear({shape})) with the student of {student}"
    return f"{student}, with torch.nn.Linear({shape}) at {certificate.path}"
