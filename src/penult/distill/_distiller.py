"""A student, its loss and its optimiser, for Lightning's Trainer."""

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

from penult._checks import check_positive
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

_DECAY = 1e-2
_FEW = 16  # images that the student's head is found with
_RECORD = "penult"  # the entry of a checkpoint


@final
class Distiller(LightningModule):
    r"""A student and its loss, as a LightningModule: ``lightning.Trainer(...).fit(Distiller(student, loss), loader)``.

    Batches are (image, label, target), those of a `TargetDataset`; for validation (image, label) do, and what follows
    is left out. ``train_loss`` and ``val_accuracy`` are logged each epoch, and kept in ``history``.

    The student is taken as it is and trained in place. With `ActivationLoss`, it may be

    - a feature extractor, whose output is (B, ``loss.in_features``); or
    - a classifier whose final linear layer reads as many features. The layer is found on the first batch
      (`penult.find_head`), and the features are what it reads. Its own weights get no gradient, and `export` puts
      ``loss.folded()`` in its place.

    Checkpoints hold all of it as plain tensors and numbers, so that ``trainer.fit(..., ckpt_path=...)`` goes on as if
    nothing had happened, and ``Distiller.load_from_checkpoint(path, student=..., loss=...)`` gives the student back.

    Args:
        student: The network, (B, ...) images to logits (B, K) or to features.
        loss: `SoftTargetLoss`, `ActivationLoss`, or any module that is called as ``loss(logits, labels, target)``.
        optimizer: What makes an optimiser of parameters, such as ``functools.partial(torch.optim.SGD, lr=0.1)``. When
            left out, AdamW with weight decay 0.01, whose rate rises to twice `rate` and falls once over the whole
            training (`OneCycleLR`, a step a batch).
        scheduler: What makes a scheduler of an optimiser; it is stepped once an epoch. It takes the place of the
            one-cycle schedule; an `optimizer` without it keeps its rate.
        rate: Learning rate of the default.

    Attributes:
        certificate: Where the student's own head sits, if features are read before it (`penult.HeadCertificate`);
            None for a feature extractor, for losses that read logits, and before the first batch.
        history: A dict of ``epoch``, ``train_loss`` and ``val_accuracy`` (if any) for each epoch.

    Raises:
        ImportError: Lightning or torchmetrics is not installed.
        TypeError: `student` or `loss` is no module, or `optimizer` or `scheduler` cannot be called.
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
                raise TypeError(f"{name} is a {type(module).__name__}, not an nn.Module")
        for name, make in (("optimizer", optimizer), ("scheduler", scheduler)):
            if make is not None and not callable(make):
                raise TypeError(
                    f"{name} is a {type(make).__name__}; give what makes one, such as "
                    "functools.partial(torch.optim.SGD, lr=0.1), since parameters may yet be moved"
                )
        check_positive("rate", rate)
        self.student, self.loss = student, loss
        self.optimizer, self.scheduler, self.rate = optimizer, scheduler, float(rate)
        self.val_accuracy = MulticlassAccuracy(average="micro")  # whatever the number of classes
        self.certificate: HeadCertificate | None = None
        self.history: list[dict[str, float]] = []
        self._located = not isinstance(loss, ActivationLoss)
        self._validated = False

    def locate(self, images: Tensor) -> None:
        """See on some images what the student's features are; done by itself on the first batch.

        Training on several devices needs to know beforehand. The student runs in eval mode; its flags, buffers and
        the random states are left as they were. Losses that read logits have no use for it.

        Args:
            images: A small batch of what the student takes.

        Raises:
            TypeError: The student's output holds no tensor, or it cannot be watched.
            ValueError: Neither the output nor the head of the student has ``loss.in_features`` features.
        """
        if not isinstance(self.loss, ActivationLoss):
            return
        wanted = self.loss.in_features
        images = images[:_FEW]
        with torch.autocast(images.device.type, enabled=False):
            with _untouched(self.student):
                output = self.student(images)
            head, reason = None, ""
            try:
                head = find_head(self.student, images, fold=False)  # the features that the layer itself reads
            except HeadNotFoundError as error:
                reason = str(error)
            except ValueError as error:
                reason = f"no head was found in it: {error}"
        extracts = isinstance(output, Tensor) and output.shape == (len(images), wanted)
        if head is not None and head.in_features == wanted:
            if head.num_classes != self.loss.num_classes and extracts:
                head = None  # a feature extractor that ends in a linear layer
        elif extracts:
            head = None
        else:
            shape = tuple(_logits_of(output).shape)
            have = reason if head is None else f"its head reads {head.in_features}"
            raise ValueError(
                f"the loss was made for in_features = {wanted}, but the student's output is {shape}, and {have}: "
                "make the loss for the width of the features that the student has"
            )
        if head is not None:
            assert head.certificate is not None
            if head.certificate.axes != ("batch",):
                raise ValueError(
                    f"the student gives logits with the axes {head.certificate.axes}; one row of features an image is "
                    "needed: pool them in the student"
                )
        self.certificate = None if head is None else head.certificate
        self._located = True

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the student (B, K), as `export` gives them.

        Args:
            x: Images (B, ...).

        Raises:
            TypeError: The student's output holds no logits.
            ValueError: As for `locate`.
        """
        read = self._read(x)
        return self.loss.predict(read) if isinstance(self.loss, ActivationLoss) else read

    def export(self) -> nn.Module:
        """A plain copy of the student in eval mode, which knows nothing of penult or Lightning.

        It makes the logits of ``forward``, in whatever form the student returns its output. With `ActivationLoss`,
        the projector and the teacher's head are folded into one linear layer: in place of the student's own, or behind
        a feature extractor, as ``nn.Sequential(student, linear)``.

        Returns:
            The module, with storage of its own.

        Raises:
            RuntimeError: Features were never seen; see `locate`.
            ValueError: The student's own head is no linear layer that another could stand in for.
        """
        student = copy.deepcopy(_unwrap(self.student))
        if isinstance(self.loss, ActivationLoss):
            if not self._located:
                raise RuntimeError(
                    "what the features of the student are is seen on its first batch: train it, or call "
                    "distiller.locate(images) first"
                )
            layer = copy.deepcopy(self.loss.folded()).to(next(student.parameters(), torch.empty(0)).dtype)
            student = (
                nn.Sequential(student, layer)
                if self.certificate is None
                else _with_head(student, self.certificate, layer)
            )
        return student.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch (image, label, target)."""
        if not isinstance(batch, tuple | list) or len(batch) != 3:
            raise ValueError(
                f"a training batch is {_kind(batch)}; expected (image, label, target), as of "
                "penult.distill.TargetDataset(dataset, targets)"
            )
        images, labels, target = batch
        loss: Tensor = self.loss(self._read(images), labels, target)
        self._log("train_loss", loss, len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The accuracy on a batch (image, label, ...)."""
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(f"a validation batch is {_kind(batch)}; expected (image, label)")
        self.val_accuracy(self(batch[0]), batch[1])
        self._log("val_accuracy", self.val_accuracy, len(batch[0]))

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Logits of a batch of images, alone or with more behind them."""
        logits: Tensor = self(batch[0] if isinstance(batch, tuple | list) else batch)
        return logits

    def configure_optimizers(self) -> Any:
        """The optimiser of all that is to be trained, and its schedule."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(parameters)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=_DECAY)
            if self.scheduler is None:
                steps = self.trainer.estimated_stepping_batches
                if not math.isfinite(steps) or steps < 1:
                    raise ValueError(
                        "the one-cycle schedule has to know how long the training is: give the Trainer max_epochs or "
                        "max_steps, or the Distiller a scheduler of your own"
                    )
                cycle = OneCycleLR(optimizer, 2 * self.rate, total_steps=int(steps))
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        if self.scheduler is None:
            return optimizer
        schedule = {"scheduler": self.scheduler(optimizer), "interval": "epoch", "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def setup(self, stage: str) -> None:
        """Refuse what would fail only once all processes wait for each other."""
        if stage == "fit" and not self._located and self.trainer.world_size > 1:
            raise ValueError(
                "on several devices, what the features of the student are has to be known beforehand: call "
                "distiller.locate(images) with some images first"
            )

    def on_train_start(self) -> None:
        """Refuse to go on with a schedule that was made for another length."""
        schedule = self.lr_schedulers() if self.optimizer is None and self.scheduler is None else None
        if isinstance(schedule, OneCycleLR) and schedule.total_steps != self.trainer.estimated_stepping_batches:
            raise ValueError(
                f"the checkpoint is of a training of {schedule.total_steps} steps, and this one has "
                f"{self.trainer.estimated_stepping_batches}: a one-cycle schedule cannot be prolonged. Give the same "
                "max_epochs and batches, or a scheduler of your own"
            )

    def on_train_epoch_end(self) -> None:
        """Keep the figures of the epoch."""
        logged = self.trainer.callback_metrics
        figures: dict[str, float] = {"epoch": self.current_epoch + 1}
        names = ("train_loss", "val_accuracy") if self._validated else ("train_loss",)  # Lightning keeps old figures
        figures |= {name: float(logged[name]) for name in names if name in logged}
        self._validated = False
        self.history.append(figures)

    def on_validation_epoch_end(self) -> None:
        """Note that the accuracy is of this epoch."""
        self._validated = not self.trainer.sanity_checking

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the student's head is, and the history: plain numbers and words."""
        checkpoint[_RECORD] = {
            "located": self._located,
            "certificate": None if self.certificate is None else dataclasses.asdict(self.certificate),
            "history": [dict(figures) for figures in self.history],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read them back."""
        record = checkpoint.get(_RECORD)
        if record is None:
            return
        found = record["certificate"]
        self._located = record["located"]
        self.certificate = None if found is None else HeadCertificate(**found)
        self.history = [dict(figures) for figures in record["history"]]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Where DistributedDataParallel looks: the student's own head gets no gradient, and is not waited for."""
        if self.certificate is None or not self.certificate.path:
            return []
        head = _unwrap(self.student).get_submodule(self.certificate.path)
        paths = [path for path, module in self.named_modules() if module is head]
        return [f"{path}.{name}" for path in paths for name, _ in head.named_parameters()]

    def _read(self, x: Tensor) -> Tensor:
        """What the loss reads: features of the student, or its logits."""
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
    """The student with another layer at all places of its own head."""
    head = student.get_submodule(certificate.path)
    plain = isinstance(head, nn.Linear) and (head.out_features, head.in_features) == certificate.shape
    alone = certificate.scale == 1 and not certificate.shifted and not certificate.log_softmax
    if not plain or not alone or certificate.positions != "same" or certificate.forward_call not in (0, None):
        raise ValueError(
            f"the student's head, {certificate.kind} at {certificate.path!r} in a {type(head).__name__}, is no linear "
            "layer whose output is the logits, so that none can be put in its place. Train a feature extractor, with "
            "images to features (B, in_features), and export gives nn.Sequential(extractor, linear)"
        )
    if head is student:
        return layer
    places = [path for path, module in student.named_modules(remove_duplicate=False) if module is head]
    for path in places:
        parent, _, name = path.rpartition(".")
        setattr(student.get_submodule(parent), name, layer)
    return student


def _kind(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
