"""Knowledge distillation that stays stable under domain shift.

A teacher that is shown images of another domain says wrong things with confidence, and a student that believes it
becomes as bad. Here the teacher is believed where it deserves it; elsewhere, the pair of its head says what a typical
activation of the class is, which no shift of the images can change:

    >>> import torch, penult
    >>> from penult.distill import SoftTargetLoss, TargetDataset, targets
    >>> pair = penult.GenerativePair(penult.Head(4 * torch.eye(3)))
    >>> labels = torch.tensor([0, 1, 2, 1])
    >>> dataset = TargetDataset([(torch.rand(1, 8, 8), int(y)) for y in labels], targets(pair, labels))
    >>> image, label, target = dataset[1]
    >>> student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> loss = SoftTargetLoss()(student(image[None]), torch.tensor([label]), target[None])

`Distiller` is a LightningModule around this and needs the extra ``train``; the rest needs torch alone.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from penult.distill import _span_head
from penult.distill._gate import ClassTrust, Gate, GateSummary
from penult.distill._losses import ActivationLoss, SoftTargetLoss
from penult.distill._targets import SHARPNESS, TargetDataset, class_soft_targets, pseudo_labels, targets

if TYPE_CHECKING:
    from penult.distill._distiller import Distiller


def __getattr__(name: str) -> Any:
    if name == "Distiller":  # it loads Lightning
        return importlib.import_module("penult.distill._distiller").Distiller
    raise AttributeError(f"module 'penult.distill' has no attribute {name!r}")


__all__ = [
    "ActivationLoss",
    "ClassTrust",
    "Distiller",
    "Gate",
    "GateSummary",
    "SoftTargetLoss",
    "TargetDataset",
    "class_soft_targets",
    "pseudo_labels",
    "targets",
]

# Lent to other rooms of the package; not public.
_SHARPNESS = SHARPNESS

# Pickles that earlier versions wrote name this module.
sys.modules["penult.distill._canonical"] = _span_head
