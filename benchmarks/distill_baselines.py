"""Common distillation methods and two controls, as methods of `distill_setting.train`.

Notation: z are a student's logits and z' the teacher's for the same image, y is its label, T a temperature, p(z) =
softmax(z); h are the student's features and a the teacher's activations in the canonical unit of
`penult.Head.rescaled`, in which the centered rows of the teacher's head have a mean norm of 1/√3. Losses are means
over a batch. Divergences at temperature T are multiplied by T², which keeps the scale of gradients (Hinton et al.
2015).

Nothing in this module depends on domains. `BASELINES` builds each method from the teacher's activations and logits of
the distillation set:

    >>> from functools import partial
    >>> import torch, penult
    >>> from distill_baselines import BASELINES
    >>> h, logits, labels = torch.randn(20, 8), torch.randn(20, 3), torch.randint(3, (20,))
    >>> build = partial(BASELINES["dkd"], h, logits, labels, penult.Head(torch.randn(3, 8)))
    >>> method = build(64)  # the number of the student's features, passed by `distill_setting.begin`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import penult
from distill_setting import Method, Student

__all__ = [
    "BASELINES",
    "DKD",
    "CrossEntropy",
    "FitNets",
    "Hinton",
    "LabelSmoothing",
    "MatchedSmoothing",
    "SimKD",
    "SimplexHead",
    "simplex",
    "soft_loss",
    "spread_evenly",
]


def soft_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T² KL(targets || softmax(z / T)), the mean over a batch.

    Args:
        logits: z (B, K).
        targets: Probabilities (B, K), which were softened already; zeros are welcome.
        temperature: T.
    """
    log_p = F.log_softmax(logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, targets, reduction="batchmean")


class _OwnHead:
    """Predicts with the student's own head, and trains nothing beside the student."""

    def parameters(self) -> list[nn.Parameter]:
        return []

    def predict(self, student: Student, x: Tensor) -> Tensor:
        return student(x)


# --- labels alone -------------------------------------------------------------------------------------------


@final
class CrossEntropy(_OwnHead):
    """Labels alone: −log p(z)_y."""

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        return F.cross_entropy(student(x), y)


@final
class LabelSmoothing(_OwnHead):
    """Cross-entropy with (1 − s) onehot(y) + s/K: Szegedy et al., Rethinking the Inception architecture, CVPR 2016.

    Args:
        smoothing: s.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        self.smoothing = smoothing

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        return F.cross_entropy(student(x), y, label_smoothing=self.smoothing)


# --- the teacher's logits -----------------------------------------------------------------------------------


@final
class Hinton(_OwnHead):
    """(1 − w) CE(z, y) + w T² KL(p(z'/T) || p(z/T)).

    Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015.

    Args:
        logits: The teacher's (N, K), one row a picture of the distillation set.
        weight: w.
        temperature: T.
    """

    def __init__(self, logits: Tensor, weight: float = 0.9, temperature: float = 4.0) -> None:
        self.targets = F.softmax(logits / temperature, dim=-1)
        self.weight, self.temperature = weight, temperature

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        z = student(x)
        soft = soft_loss(z, self.targets[rows], self.temperature)
        return (1 - self.weight) * F.cross_entropy(z, y) + self.weight * soft


@final
class DKD(_OwnHead):
    """CE(z, y) + T² (α TCKD + β NCKD): Zhao et al., Decoupled knowledge distillation, CVPR 2022.

    TCKD is the divergence between p(z'/T) and p(z/T) as to *whether* it is class y: that of the pairs (p_y, 1 − p_y).
    NCKD is the divergence as to *which* other class: that of the softmax over all classes but y. The paper's code
    lets their weight rise from 0 over the first epochs, of hundreds; in the short runs here there is no such warm-up.

    Args:
        logits: The teacher's (N, K), one row a picture of the distillation set.
        alpha: α.
        beta: β.
        temperature: T.
    """

    def __init__(self, logits: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        self.logits = logits
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        z = student(x)
        (whether, which), (told_whether, told_which) = (self._parts(each, y) for each in (z, self.logits[rows]))
        target = F.kl_div(whether, told_whether, reduction="batchmean", log_target=True)
        others = F.kl_div(which, told_which, reduction="batchmean", log_target=True)
        return F.cross_entropy(z, y) + self.temperature**2 * (self.alpha * target + self.beta * others)

    def _parts(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, 2) of y and of any other class, and (B, K − 1) of the others among themselves."""
        logits = logits / self.temperature
        own = F.one_hot(y, logits.shape[1]).bool()
        others = logits[~own].view(len(y), -1)
        pair = torch.stack([logits[own], others.logsumexp(-1)], dim=-1)
        return F.log_softmax(pair, dim=-1), F.log_softmax(others, dim=-1)


# --- the teacher's activations ------------------------------------------------------------------------------


@final
class FitNets(_OwnHead):
    """CE(z, y) + λ |P h − a|² / r², with a linear projector P and r² the mean of |a|² over the distillation set.

    Hints on the penultimate layer: Romero et al., FitNets: hints for thin deep nets, ICLR 2015. The paper trains on
    hints of a middle layer first and distils afterwards; the joint form is what today's toolkits run.

    Args:
        activations: The teacher's (N, d), one row a picture of the distillation set, as its head reads them.
        head: The teacher's head, which says their unit.
        width: Number of the student's features.
        weight: λ.
    """

    def __init__(self, activations: Tensor, head: penult.Head, width: int, weight: float = 5.0) -> None:
        self.activations = activations * head.rescaled()[1]
        self.scale = weight / float(self.activations.square().sum(-1).mean())
        self.projector = nn.Linear(width, activations.shape[1])

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        h = student.features(x)
        distance = (self.projector(h) - self.activations[rows]).square().sum(-1).mean()
        return F.cross_entropy(student.head(h), y) + self.scale * distance

    def parameters(self) -> list[nn.Parameter]:
        """The projector's."""
        return list(self.projector.parameters())


@final
class SimKD:
    """|P h − a|² / d, and predictions by the teacher's own head: W P h + b. No label is used.

    Chen et al., Knowledge distillation with the reused teacher classifier, CVPR 2022. The paper's projector is some
    convolutions on maps, mostly 1×1; here the student gives a vector, and P is linear.

    Args:
        activations: The teacher's (N, d), one row a picture of the distillation set, as its head reads them.
        head: The teacher's head; it stays as it is.
        width: Number of the student's features.
    """

    def __init__(self, activations: Tensor, head: penult.Head, width: int) -> None:
        self.head, scale = head.rescaled()
        self.activations = activations * scale
        self.projector = nn.Linear(width, activations.shape[1])

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        return F.mse_loss(self.projector(student.features(x)), self.activations[rows])

    def parameters(self) -> list[nn.Parameter]:
        """The projector's."""
        return list(self.projector.parameters())

    def predict(self, student: Student, x: Tensor) -> Tensor:
        """Logits (B, K) by the teacher's head."""
        return self.head(self.projector(student.features(x)))


# --- controls -----------------------------------------------------------------------------------------------


def simplex(classes: int, seed: int) -> Tensor:
    """The corners (K, K − 1) of a regular simplex about the origin, 1/√3 long, in a random orientation."""
    generator = torch.Generator().manual_seed(seed)
    # the plane orthogonal to (1, ..., 1) in R^K, which holds the simplex of I − 1/K, in random orthonormal coordinates
    inside = torch.randn(classes, classes - 1, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(inside - inside.mean(0))
    corners = basis * triangle.diagonal().sign()  # without the signs, orientations are not uniform
    return (corners / (math.sqrt(3) * corners.norm(dim=1, keepdim=True))).float()


@final
class SimplexHead:
    """CE(V u, y) + λ |u − r m_y|² / r², u = P h: the control of an activation loss that knows the head alone.

    In place of the teacher's head stands one that knows nothing of the classes: its rows V are a regular simplex of
    norm 1/√3 in a random orientation (`simplex`), without bias, and m_y = √3 v_y are their directions. The student
    predicts with it.

    Args:
        classes: K.
        width: Number of the student's features.
        radius: r.
        weight: λ.
        seed: Of the orientation.
    """

    def __init__(self, classes: int, width: int, radius: float, weight: float = 5.0, seed: int = 0) -> None:
        self.rows = simplex(classes, seed)
        self.anchors = radius * F.normalize(self.rows, dim=-1)
        self.scale = weight / radius**2
        self.projector = nn.Linear(width, classes - 1)

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        u = self.projector(student.features(x))
        distance = (u - self.anchors[y]).square().sum(-1).mean()
        return F.cross_entropy(u @ self.rows.T, y) + self.scale * distance

    def parameters(self) -> list[nn.Parameter]:
        """The projector's."""
        return list(self.projector.parameters())

    def predict(self, student: Student, x: Tensor) -> Tensor:
        """Logits (B, K) by the simplex."""
        return self.projector(student.features(x)) @ self.rows.T


def spread_evenly(targets: Tensor) -> Tensor:
    """Class targets (K, K) of the same diagonal, with the rest of each row spread evenly over the other classes."""
    own = targets.diagonal() / targets.sum(-1)
    others = ((1 - own) / (len(targets) - 1))[:, None].expand_as(targets)
    return torch.where(torch.eye(len(targets), dtype=torch.bool), own[:, None], others)


@final
class MatchedSmoothing(_OwnHead):
    """(1 − w) CE(z, y) + w T² KL(e_y || p(z/T)): the control of soft class targets, as sure and without similarities.

    Args:
        targets: Class targets (K, K), row y those of class y; e is what `spread_evenly` makes of them.
        weight: w.
        temperature: T.
    """

    def __init__(self, targets: Tensor, weight: float = 0.9, temperature: float = 4.0) -> None:
        self.targets = spread_evenly(targets)
        self.weight, self.temperature = weight, temperature

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        z = student(x)
        soft = soft_loss(z, self.targets[y], self.temperature)
        return (1 - self.weight) * F.cross_entropy(z, y) + self.weight * soft


Build = Callable[[Tensor, Tensor, Tensor, penult.Head, int], Method]

BASELINES: dict[str, Build] = {
    "cross-entropy": lambda h, logits, labels, head, width: CrossEntropy(),
    "label smoothing": lambda h, logits, labels, head, width: LabelSmoothing(),
    "hinton, w=.9": lambda h, logits, labels, head, width: Hinton(logits, 0.9),
    "hinton, w=.5": lambda h, logits, labels, head, width: Hinton(logits, 0.5),
    "dkd": lambda h, logits, labels, head, width: DKD(logits),
    "fitnets": lambda h, logits, labels, head, width: FitNets(h, head, width),
    "simkd": lambda h, logits, labels, head, width: SimKD(h, head, width),
}
"""Built of activations (N, d), logits (N, K), labels (N,), the teacher's head and the number of the student's features.

The controls are not among them: a radius or class targets are theirs to be given.
"""
