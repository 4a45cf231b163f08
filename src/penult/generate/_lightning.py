"""What a training of a generator keeps: figures of its epochs, and checkpoints of what is trained."""

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

__all__ = ["Recorded", "scheduled"]

_RECORD = "penult"  # the entry of a checkpoint


class Recorded(LightningModule):
    """A module with a history of its epochs, whose checkpoints hold the history and what is trained.

    Attributes:
        history: A dict of ``epoch`` and figures for each epoch.
    """

    _outside: ClassVar[tuple[str, ...]]  # first parts of names of what is not trained, and no checkpoint holds

    def __init__(self) -> None:
        super().__init__()
        self.history: list[dict[str, float]] = []
        self._validated = False

    def on_train_epoch_end(self) -> None:
        """Keep the figures of the epoch."""
        logged = self.trainer.callback_metrics
        fresh = (name for name in logged if not name.startswith("val_") or self._validated)  # Lightning keeps old ones
        figures: dict[str, float] = {name: float(logged[name]) for name in fresh}
        if strange := {name: value for name, value in figures.items() if not math.isfinite(value)}:
            raise ValueError(
                f"the training diverged in epoch {self.current_epoch + 1}: {strange}. Take a smaller rate; what it was "
                "before is in the last checkpoint, if there is one"
            )
        self.history.append({"epoch": self.current_epoch + 1} | figures)
        self._validated = False

    def on_validation_epoch_end(self) -> None:
        """Note that the figures are of this epoch."""
        self._validated = not self.trainer.sanity_checking

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is not trained, and add the history."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith(self._outside)}
        checkpoint[_RECORD] = {"history": [dict(figures) for figures in self.history]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete it by what this generator has."""
        own = {name: value for name, value in self.state_dict().items() if name.startswith(self._outside)}
        checkpoint["state_dict"] = own | checkpoint["state_dict"]
        self.history = [dict(figures) for figures in checkpoint.get(_RECORD, {}).get("history", ())]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Where DistributedDataParallel looks: the classifier gets no gradients, and nothing outside is sent about."""
        named = (*self.named_parameters(), *self.named_buffers())
        return [name for name, _ in named if name.startswith(self._outside)]

    def _log(self, name: str, value: Tensor, count: int) -> None:
        self.log(name, value.detach(), on_step=False, on_epoch=True, batch_size=count, sync_dist=True, prog_bar=True)


def scheduled(optimizer: Optimizer, scheduler: Callable[[Optimizer], LRScheduler] | None) -> Any:
    """An optimiser as Lightning takes it, with a scheduler of the user's, if there is one, stepped once an epoch."""
    if scheduler is None:
        return optimizer
    schedule = {"scheduler": scheduler(optimizer), "interval": "epoch", "monitor": "loss"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}
