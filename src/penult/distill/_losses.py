"""Losses of a student, for any training loop."""

from __future__ import annotations

import copy
import math
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult._checks import check_labels, check_positive
from penult.distill._span_head import Canonical
from penult.pair import GenerativePair

__all__ = ["ActivationLoss", "SoftTargetLoss"]


@final
class SoftTargetLoss(nn.Module):
    r"""Cross-entropy with the labels, and with soft targets q at a temperature.

    .. math:: L = (1 - w)\, \mathrm{CE}(z, y) + w\, T^2\, \mathrm{KL}(q \,\|\, \operatorname{softmax}(z / T))

    The student is trained with its own head and nothing is added to it.

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, for the form of the loss;
        what it is to be trained on are the `targets` of this room.

    Args:
        temperature: T, that of the targets.
        weight: w in [0, 1].

    Raises:
        ValueError: `temperature` or `weight` is out of range.

    Example:
        >>> loss = SoftTargetLoss()
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> loss(logits, torch.tensor([0, 1]), torch.full((2, 3), 1 / 3))  # 0.1 log 3: the targets are met
        tensor(0.1099, grad_fn=<AddBackward0>)
    """

    def __init__(self, temperature: float = 4.0, weight: float = 0.9) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight}; it must lie between 0 and 1")
        self.temperature, self.weight = float(temperature), float(weight)

    def forward(self, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """The mean loss of a batch, ().

        Args:
            logits: Of the student (B, K).
            labels: (B,) integers in 0..K−1.
            target: Soft targets (B, K).

        Raises:
            TypeError: Labels are no integers.
            ValueError: Shapes that do not fit each other, or a label out of range.
        """
        if logits.ndim != 2 or target.shape != logits.shape:
            raise ValueError(
                f"the student gives logits {tuple(logits.shape)}, but the soft targets are {tuple(target.shape)}: "
                "the student must have the teacher's classes, in their order"
            )
        _check(labels, logits.shape)
        t, w = self.temperature, self.weight
        divergence = F.kl_div((logits / t).log_softmax(-1), target.to(logits), reduction="batchmean")
        return (1 - w) * F.cross_entropy(logits, labels.to(torch.int64)) + w * t * t * divergence

    def extra_repr(self) -> str:
        """The part of ``repr(loss)`` between the brackets."""
        return f"temperature={self.temperature:g}, weight={self.weight:g}"


@final
class ActivationLoss(nn.Module):
    r"""Cross-entropy through the teacher's frozen head, and the distance to target activations.

    A linear projector P takes the student's features f to coordinates u = P f of span(W), where the head is W', b at
    its canonical scale. With targets t and the radius r of the pair,

    .. math:: L = \mathrm{CE}(W' u + b, y) + \lambda\, \|u - t\|^2 / r^2 .

    At t = r μ_y the second term is (‖u‖/r − 1)² + 2 (‖u‖/r) (1 − cos(u, μ_y)): a penalty of the norm, and up to a
    constant the negative log-likelihood of a von Mises-Fisher law around μ_y.

    With hints of strength η, a second projector Q is taught the teacher's whole activation v, as `targets` of kind
    ``"hinted"`` bring it behind t: L + η ‖Q f − v‖² / r². It shapes the features, takes no part in predictions and is
    dropped in the end.

    The student predicts by `predict`; `folded` makes projector and head the one linear layer that they are.

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, for hints.

    Args:
        pair: The pair of the teacher's head.
        in_features: Width of the student's features.
        strength: λ.
        projector: A module (B, in_features) → (B, q), where q is the rank of the head, in place of a linear layer.
        hint: η; 0 for none, and 5 was measured.

    Attributes:
        projector: P, trained with the student.
        hint_projector: Q, likewise; None without hints.
        canonical: The head and r as the student sees them, frozen.

    Raises:
        TypeError: `pair` is no pair.
        ValueError: `strength` or `hint` is negative, or the projector of another width.

    Example:
        >>> from penult import GenerativePair, Head
        >>> loss = ActivationLoss(GenerativePair(Head(torch.eye(3))), in_features=16)
        >>> loss.predict(torch.randn(5, 16)).shape
        torch.Size([5, 3])
        >>> loss.folded()
        Linear(in_features=16, out_features=3, bias=True)
    """

    def __init__(
        self,
        pair: GenerativePair,
        in_features: int,
        strength: float = 5.0,
        projector: nn.Module | None = None,
        hint: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("strength", strength), ("hint", hint)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")
        if in_features < 1:
            raise ValueError(f"in_features is {in_features}; it is the width of the student's features, at least 1")
        self.canonical = own = Canonical.of(pair)
        self.strength, self.in_features = float(strength), in_features
        rank = len(own.span)
        if isinstance(projector, nn.Linear):
            have = (projector.in_features, projector.out_features)
            if have != (in_features, rank):
                raise ValueError(
                    f"the projector takes {have[0]} features to {have[1]}; it must take in_features = {in_features} "
                    f"to {rank}, the rank of the head"
                )
        self.projector = nn.Linear(in_features, rank).to(own.rows) if projector is None else projector
        self.hint = float(hint)
        self.hint_projector = nn.Linear(in_features, own.span.shape[1]).to(own.rows) if hint else None

    @property
    def num_classes(self) -> int:
        """K of the teacher's head."""
        return len(self.canonical.rows)

    def forward(self, features: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """The mean loss of a batch, ().

        Args:
            features: Of the student (B, in_features).
            labels: (B,) integers in 0..K−1.
            target: Activations (B, d), of `targets` of kind ``"activation"``; with hints (B, 2d), of ``"hinted"``.

        Raises:
            TypeError: Labels are no integers.
            ValueError: Shapes that do not fit each other, or a label out of range.
        """
        u = self._project(features)
        own, d = self.canonical, self.canonical.span.shape[1]
        width = d if self.hint_projector is None else 2 * d
        if target.shape != (len(u), width):
            kind = "activation" if self.hint_projector is None else "hinted"
            raise ValueError(
                f"targets have shape {tuple(target.shape)}; expected {(len(u), width)}: activations of this teacher, "
                f"penult.distill.targets(pair, labels, kind={kind!r})"
            )
        logits = own.logits(u)
        _check(labels, logits.shape)
        target = target.to(u)
        distance = self.strength * (u - F.linear(target[:, :d], own.span.to(u))).square().sum(-1).mean()
        if self.hint_projector is not None:
            distance = (
                distance + self.hint * (_through(self.hint_projector, features) - target[:, d:]).square().sum(-1).mean()
            )
        return F.cross_entropy(logits, labels.to(torch.int64)) + distance / own.radius.to(u) ** 2

    def predict(self, features: Tensor) -> Tensor:
        """Logits of the student (B, K), from its features (B, in_features)."""
        return self.canonical.logits(self._project(features))

    @torch.no_grad()
    def folded(self) -> nn.Linear | nn.Sequential:
        """Projector and head as one linear layer (in_features → K) with its own storage.

        Returns:
            The layer; for a projector that is not linear, that projector with a linear layer after it.
        """
        weight, bias = self.canonical.rows, self.canonical.bias
        if isinstance(self.projector, nn.Linear):
            offset = self.projector.bias
            bias = bias if offset is None else bias + weight @ offset.to(weight)
            weight = weight @ self.projector.weight.to(weight)
        classes, features = weight.shape
        layer = nn.utils.skip_init(nn.Linear, features, classes, dtype=weight.dtype, device=weight.device)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return layer if isinstance(self.projector, nn.Linear) else nn.Sequential(copy.deepcopy(self.projector), layer)

    def extra_repr(self) -> str:
        """The part of ``repr(loss)`` between the brackets."""
        text = f"in_features={self.in_features}, num_classes={self.num_classes}, strength={self.strength:g}"
        return text + (f", hint={self.hint:g}" if self.hint else "")

    def _project(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(
                f"the student's features have shape {tuple(features.shape)}; expected (B, {self.in_features})"
            )
        u = _through(self.projector, features)
        if u.shape != (len(features), self.canonical.rows.shape[1]):
            raise ValueError(
                f"the projector gives {tuple(u.shape)}; it must give {(len(features), self.canonical.rows.shape[1])}, "
                "coordinates in the span of the head"
            )
        return u


def _through(projector: nn.Module, features: Tensor) -> Tensor:
    """What a projector makes of features, in its own precision, which is that of the teacher's head."""
    weight = next(projector.parameters(), features)
    projected: Tensor = projector(features.to(weight.dtype))
    return projected


def _check(labels: Any, shape: torch.Size) -> None:
    if not torch.compiler.is_compiling() and not (isinstance(labels, Tensor) and labels.is_cuda):
        check_labels(labels, shape)  # elsewhere a look at the values would wait for the device
