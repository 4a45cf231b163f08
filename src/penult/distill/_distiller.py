"""LightningModule of a student and its loss."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from penult._checks import check_positive, described, integer_labels
from penult.distill._losses import ActivationLoss
from penult.head import HeadCertificate, HeadNotFoundError, _capture_forward, _logits_of, _untouched, _unwrap, find_head

try:
    from lightning.pytorch import LightningModule
    from torchmetrics.classification import MulticlassAccuracy
except ImportError as error:
    raise ImportError(
        'penult.distill.Distiller needs lightning and torchmetrics: pip install "penult[train]"', name=error.name
    ) from error

__all__ = ["Distiller"]

_WEIGHT_DECAY = 1e-2
# Number of images for finding the student's head.
_IMAGES = 16
# Key of the entry in checkpoints.
_RECORD = "penult"


@final
class Distiller(LightningModule):
    r"""A student and its loss, as a LightningModule: ``lightning.Trainer(...).fit(Distiller(student, loss), loader)``.

    Training batches are (image, label, target), as from a `TargetDataset`. Validation batches are (image, label);
    further elements are ignored. ``train_loss`` and ``val_accuracy`` are logged each epoch, and stored in ``history``.

    The student is trained in place. With `ActivationLoss`, it may be

    - a feature extractor, whose output is (B, ``loss.in_features``); or
    - a classifier whose final linear layer has ``loss.in_features`` inputs. The layer is found on the first batch
      (`penult.find_head`), and the features are its inputs. Its own weights get no gradient, and `export` replaces it
      by ``loss.folded()``.

    Checkpoints hold plain tensors and numbers. ``trainer.fit(..., ckpt_path=...)`` resumes training exactly, and
    ``Distiller.load_from_checkpoint(path, student=..., loss=...)`` restores the student.

    Args:
        student: The network, from images (B, ...) to logits (B, K) or features.
        loss: `SoftTargetLoss`, `ActivationLoss`, or any module that is called as ``loss(logits, labels, target)``.
        optimizer: Function from parameters to an optimizer, such as ``functools.partial(torch.optim.SGD, lr=0.1)``.
            Default: AdamW with weight decay 0.01, whose learning rate rises to twice `rate` and falls once over the
            whole training (`OneCycleLR`, one step for each batch).
        scheduler: Function from an optimizer to a scheduler, with one step for each epoch. It replaces the one-cycle
            schedule. Default with an `optimizer`: a constant learning rate.
        rate: Learning rate of the default optimizer.

    Attributes:
        certificate: Location of the student's own head, if its inputs are the features (`penult.HeadCertificate`);
            None for a feature extractor, for losses that read logits, and before the first batch.
        history: A dict of ``epoch``, ``train_loss`` and ``val_accuracy`` (if any) for each epoch.

    Raises:
        ImportError: Lightning or torchmetrics is not installed.
        TypeError: `student` or `loss` is not a module, or `optimizer` or `scheduler` cannot be called.
        ValueError: `rate` is not positive.

    Example:
        >>> from penult import GenerativePair, Head
        >>> from penult.distill import ActivationLoss
        >>> student = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> distiller = Distiller(student, ActivationLoss(GenerativePair(Head(torch.eye(3))), in_features=16))
        >>> import lightning
        >>> lightning.Trainer(max_epochs=10).fit(distiller, loader)  # doctest: +SKIP
        >>> images = torch.rand(5, 1, 8, 8)
        >>> logits = distiller(images)
        >>> distiller.certificate.path
        '3'
        >>> plain = distiller.export()
        >>> plain[3], torch.allclose(plain(images), logits, atol=1e-6)
        (Linear(in_features=16, out_features=3, bias=True), True)
    """

    def __init__(
        self,
        student: nn.Module,
        loss: nn.Module,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        rate: float = 3e-3,
    ) -> None:
        super().__init__()
        for name, module in (("student", student), ("loss", loss)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is {described(module)}; expected a torch.nn.Module")
        for name, factory in (("optimizer", optimizer), ("scheduler", scheduler)):
            # Lightning may move the parameters before training, so an optimizer cannot be made in advance.
            if factory is not None and not callable(factory):
                raise TypeError(
                    f"{name} is {described(factory)}; expected a function that makes one, such as "
                    "functools.partial(torch.optim.SGD, lr=0.1)"
                )
        self.rate = check_positive("rate", rate)
        self.student, self.loss = student, loss
        self.optimizer, self.scheduler = optimizer, scheduler
        # Micro average, which needs no number of classes.
        self.val_accuracy = MulticlassAccuracy(average="micro")
        self.certificate: HeadCertificate | None = None
        self.history: list[dict[str, float]] = []
        self._located = not isinstance(loss, ActivationLoss)
        self._validated = False

    def locate(self, images: Tensor) -> None:
        """Locate the student's features with some images; happens automatically on the first batch.

        Training on several devices needs this call before it starts. The student runs in eval mode; its flags, buffers
        and the random states are restored. With losses that read logits, the call has no effect.

        Args:
            images: A small batch of inputs of the student.

        Raises:
            TypeError: The student's output holds no tensor, or its layers cannot be hooked.
            ValueError: Neither the output nor the head of the student has ``loss.in_features`` features.
        """
        if not isinstance(self.loss, ActivationLoss):
            return
        width = self.loss.in_features
        images = images[:_IMAGES]
        with torch.autocast(images.device.type, enabled=False):
            with _untouched(self.student):
                output = self.student(images)
            head, reason = None, ""
            try:
                # Without folding, features are the inputs of the layer itself.
                head = find_head(self.student, images, fold=False)
            except HeadNotFoundError as error:
                reason = str(error)
            except ValueError as error:
                reason = f"no head was found in it: {error}"
        outputs_features = isinstance(output, Tensor) and output.shape == (len(images), width)
        if head is not None and head.in_features == width:
            # The linear layer may also be the last one of a feature extractor.
            if head.num_classes != self.loss.num_classes and outputs_features:
                head = None
        elif outputs_features:
            head = None
        else:
            shape = tuple(_logits_of(output).shape)
            head_width = reason if head is None else f"its head reads {head.in_features}"
            raise ValueError(
                f"the loss was made for in_features = {width}, but the student's output is {shape}, and {head_width}: "
                "make the loss for the number of features that the student has"
            )
        if head is not None:
            assert head.certificate is not None
            if head.certificate.axes != ("batch",):
                raise ValueError(
                    f"logits of the student have the axes {head.certificate.axes}; expected one row of features for "
                    "each image. Pool them in the student"
                )
        self.certificate = None if head is None else head.certificate
        self._located = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of the student; the exported network has the same.

        Args:
            x: Images (B, ...).

        Raises:
            TypeError: The student's output holds no logits.
            ValueError: As for `locate`.
        """
        inputs = self._loss_inputs(x)
        return self.loss.predict(inputs) if isinstance(self.loss, ActivationLoss) else inputs

    def export(self) -> nn.Module:
        """Return a copy of the student in eval mode that does not depend on penult or Lightning.

        It computes the logits of ``forward``, and returns them in the form of the student's output. With
        `ActivationLoss`, the projector and the teacher's head are merged into one linear layer, which replaces the
        student's own head or follows a feature extractor, as ``nn.Sequential(student, linear)``.

        Returns:
            The module, with storage of its own.

        Raises:
            RuntimeError: The features are not located yet; see `locate`.
            ValueError: The student's own head is not a linear layer that can be replaced.
        """
        student = copy.deepcopy(_unwrap(self.student))
        if isinstance(self.loss, ActivationLoss):
            if not self._located:
                raise RuntimeError(
                    "the features of the student are not located yet: train it, or call distiller.locate(images) first"
                )
            layer = copy.deepcopy(self.loss.folded()).to(next(student.parameters(), torch.empty(0, device="cpu")).dtype)
            student = (
                nn.Sequential(student, layer)
                if self.certificate is None
                else _with_head(student, self.certificate, layer)
            )
        return student.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (image, label, target)."""
        if not isinstance(batch, tuple | list) or len(batch) != 3:
            raise ValueError(
                f"a training batch is {_described_batch(batch)}; expected (image, label, target), as from "
                "penult.distill.TargetDataset(dataset, targets)"
            )
        images, labels, target = batch
        loss: Tensor = self.loss(self._loss_inputs(images), labels, target)
        self._log("train_loss", loss, len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the accuracy with a batch (image, label, ...)."""
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(f"a validation batch is {_described_batch(batch)}; expected (image, label)")
        self.val_accuracy(self(batch[0]), integer_labels(batch[1], values=False))
        self._log("val_accuracy", self.val_accuracy, len(batch[0]))

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Return the logits of a batch of images, or of the first element of a tuple or list."""
        logits: Tensor = self(batch[0] if isinstance(batch, tuple | list) else batch)
        return logits

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the trainable parameters, and its schedule."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(parameters)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=_WEIGHT_DECAY)
            if self.scheduler is None:
                steps = self.trainer.estimated_stepping_batches
                if not math.isfinite(steps) or steps < 1:
                    raise ValueError(
                        "the one-cycle schedule needs the length of the training: give the Trainer max_epochs or "
                        "max_steps, or the Distiller a scheduler of your own"
                    )
                cycle = OneCycleLR(optimizer, 2 * self.rate, total_steps=int(steps))
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        if self.scheduler is None:
            return optimizer
        schedule = {"scheduler": self.scheduler(optimizer), "interval": "epoch", "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def setup(self, stage: str) -> None:
        """Check that features are located before training on several devices."""
        # Later, the process that fails would leave the others waiting for it.
        if stage == "fit" and not self._located and self.trainer.world_size > 1:
            raise ValueError(
                "training on several devices needs the location of the student's features: call "
                "distiller.locate(images) with some images first"
            )

    def on_train_start(self) -> None:
        """Check that a resumed schedule was made for a training of this length."""
        schedule = self.lr_schedulers() if self.optimizer is None and self.scheduler is None else None
        if isinstance(schedule, OneCycleLR) and schedule.total_steps != self.trainer.estimated_stepping_batches:
            raise ValueError(
                f"the checkpoint is of a training of {schedule.total_steps} steps, and this one has "
                f"{self.trainer.estimated_stepping_batches}: a one-cycle schedule cannot be prolonged. Give the same "
                "max_epochs and batches, or a scheduler of your own"
            )

    def on_train_epoch_end(self) -> None:
        """Append the metrics of the epoch to the history."""
        logged = self.trainer.callback_metrics
        metrics: dict[str, float] = {"epoch": self.current_epoch + 1}
        # In an epoch without validation, Lightning still has the accuracy of an earlier one.
        names = ("train_loss", "val_accuracy") if self._validated else ("train_loss",)
        metrics |= {name: float(logged[name]) for name in names if name in logged}
        self._validated = False
        self.history.append(metrics)

    def on_validation_epoch_end(self) -> None:
        """Record that this epoch was validated."""
        self._validated = not self.trainer.sanity_checking

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the location of the student's head and the history, as plain numbers and strings."""
        checkpoint[_RECORD] = {
            "located": self._located,
            "certificate": None if self.certificate is None else dataclasses.asdict(self.certificate),
            "history": [dict(metrics) for metrics in self.history],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the location of the student's head and the history."""
        record = checkpoint.get(_RECORD)
        if record is None:
            return
        certificate = record["certificate"]
        self._located = record["located"]
        self.certificate = None if certificate is None else HeadCertificate(**certificate)
        self.history = [dict(metrics) for metrics in record["history"]]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of the parameters of the student's own head, which get no gradient.

        DistributedDataParallel reads this attribute, and would wait for their gradients otherwise.
        """
        if self.certificate is None or not self.certificate.path:
            return []
        head = _unwrap(self.student).get_submodule(self.certificate.path)
        paths = [path for path, module in self.named_modules() if module is head]
        return [f"{path}.{name}" for path in paths for name, _ in head.named_parameters()]

    def _loss_inputs(self, x: Tensor) -> Tensor:
        """Return the features of the student for an `ActivationLoss`, its logits for other losses."""
        if not isinstance(self.loss, ActivationLoss):
            return _logits_of(self.student(x))
        if not self._located:
            self.locate(x)
        if self.certificate is not None:
            return _capture_forward(_unwrap(self.student), self.certificate, (x,), {})[0]
        features: Tensor = self.student(x)
        return features

    def _log(self, name: str, value: Any, count: int) -> None:
        self.log(name, value, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)


def _with_head(student: nn.Module, certificate: HeadCertificate, layer: nn.Module) -> nn.Module:
    """Replace the head of the student by another layer, at all its paths."""
    head = student.get_submodule(certificate.path)
    is_linear = isinstance(head, nn.Linear) and (head.out_features, head.in_features) == certificate.shape
    outputs_logits = certificate.scale == 1 and not certificate.shifted and not certificate.log_softmax
    called_once = certificate.positions == "same" and not certificate.parts and certificate.forward_call in (0, None)
    if not (is_linear and outputs_logits and called_once):
        raise ValueError(
            f"the student's head is {certificate.kind} at {certificate.path!r} in a {type(head).__name__}; expected a "
            "linear layer whose output is the logits. Train a feature extractor, from images to features "
            "(B, in_features): its export is nn.Sequential(extractor, linear)"
        )
    if head is student:
        return layer
    paths = [path for path, module in student.named_modules(remove_duplicate=False) if module is head]
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(student.get_submodule(parent), name, layer)
    return student


def _described_batch(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
