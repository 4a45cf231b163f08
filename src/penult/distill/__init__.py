"""Knowledge distillation that is stable under domain shift.

On images of another domain a teacher is often wrong with high confidence, and a student that learns from it becomes as
bad. Here the output of the teacher is used only as far as it can be trusted. Otherwise the student learns a typical
activation of the class under the pair of the teacher's head, which does not depend on the images:

    >>> import torch, penult
    >>> from penult.distill import SoftTargetLoss, TargetDataset, targets
    >>> pair = penult.GenerativePair(penult.Head(4 * torch.eye(3)))
    >>> labels = torch.tensor([0, 1, 2, 1])
    >>> dataset = TargetDataset([(torch.rand(1, 8, 8), int(y)) for y in labels], targets(pair, labels))
    >>> image, label, target = dataset[1]
    >>> student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> loss = SoftTargetLoss()(student(image[None]), torch.tensor([label]), target[None])

`Distiller` is a LightningModule for this and needs the extra ``train``; everything else only needs torch.
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
    # Importing it loads Lightning.
    if name == "Distiller":
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
