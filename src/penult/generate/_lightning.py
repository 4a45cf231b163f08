"""Base LightningModule of generators: history of epochs, and checkpoints of the trained parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError(
        'generators of penult.generate need lightning: pip install "penult[train]"', name=error.name
    ) from error

__all__ = ["RecordedModule", "optimizer_config"]

# Key of the entry in checkpoints.
_RECORD = "penult"


class RecordedModule(LightningModule):
    """A module with a history of its epochs, whose checkpoints hold the history and the trained parts.

    Attributes:
        history: A dict of ``epoch`` and metrics for each epoch.
    """

    # Prefixes of state-dict names of the parts that are not trained, and that checkpoints do not hold.
    _untrained: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.history: list[dict[str, float]] = []
        self._validated = False

    def on_train_epoch_end(self) -> None:
        """Append the metrics of the epoch to the history; raise a ValueError if one is not finite."""
        logged = self.trainer.callback_metrics
        # In an epoch without validation, Lightning still has the metrics of an earlier one.
        current = (name for name in logged if not name.startswith("val_") or self._validated)
        metrics: dict[str, float] = {name: float(logged[name]) for name in current}
        if not_finite := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
            raise ValueError(
                f"the training diverged in epoch {self.current_epoch + 1}: {not_finite}. Use a smaller rate; the last "
                "checkpoint, if there is one, is from before"
            )
        self.history.append({"epoch": self.current_epoch + 1} | metrics)
        self._validated = False

    def on_validation_epoch_end(self) -> None:
        """Record that this epoch was validated."""
        self._validated = not self.trainer.sanity_checking

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the parts that are not trained, and add the history."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: value for name, value in state.items() if not name.startswith(self._untrained)
        }
        checkpoint[_RECORD] = {"history": [dict(metrics) for metrics in self.history]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the parts that are not trained from this generator, and restore the history."""
        untrained = {name: value for name, value in self.state_dict().items() if name.startswith(self._untrained)}
        checkpoint["state_dict"] = untrained | checkpoint["state_dict"]
        self.history = [dict(metrics) for metrics in checkpoint.get(_RECORD, {}).get("history", ())]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of parameters and buffers that are not trained.

        DistributedDataParallel reads this attribute; it would wait for gradients of these parameters, and send all of
        them to the other processes.
        """
        named = (*self.named_parameters(), *self.named_buffers())
        return [name for name, _ in named if name.startswith(self._untrained)]

    def _log(self, name: str, value: Tensor, count: int) -> None:
        self.log(name, value.detach(), on_step=False, on_epoch=True, batch_size=count, sync_dist=True, prog_bar=True)


def optimizer_config(optimizer: Optimizer, scheduler: Callable[[Optimizer], LRScheduler] | None) -> Any:
    """Return an optimizer in the form of Lightning, with the user's scheduler, if any, stepped once per epoch."""
    if scheduler is None:
        return optimizer
    schedule = {"scheduler": scheduler(optimizer), "interval": "epoch", "monitor": "loss"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}
