"""What a student is taught: targets that are computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from penult._checks import check_labels, check_positive
from penult.activations import Activations, _ActivationSource
from penult.distill._gate import Gate, answers
from penult.distill._span_head import Canonical, check_pair
from penult.pair import GenerativePair

__all__ = ["SHARPNESS", "TargetDataset", "class_soft_targets", "pseudo_labels", "targets"]

_DRAWS = 1000  # of each class
_ALL_DRAWS = 100_000  # of all classes, though never fewer than _FEW of each
_FEW = 100
_NUMBERS = 1 << 24  # at a time
SHARPNESS = {"soft": 1.0, "activation": 1.0, "hinted": 4.0}  # of the gate that is fitted for a kind


@torch.no_grad()
def class_soft_targets(
    pair: GenerativePair, temperature: float = 4.0, *, draws: int | None = None, seed: int = 0
) -> Tensor:
    r"""The dark knowledge of a head alone: what its classifier says, on average, of activations of each class.

    .. math:: e_y = E_{h \sim p(h|y)}\left[\operatorname{softmax}\left((W h + b) / T\right)\right]

    by Monte Carlo. No image is needed, and with ``GenerativePair(head)`` no activation either.

    Args:
        pair: The pair of the teacher's head.
        temperature: T.
        draws: Draws of each class; when left out 1000, fewer for more than 100 classes.
        seed: Seed of the draws.

    Returns:
        (K, K), row y for class y; each row sums to 1.

    Raises:
        TypeError: `pair` is no pair.
        ValueError: `temperature` or `draws` is not positive.

    Example:
        >>> from penult import GenerativePair, Head
        >>> pair = GenerativePair(Head(torch.tensor([[3.0, 0.0], [2.0, 2.0], [-3.0, 0.0]])))
        >>> class_soft_targets(pair)[0]  # the second class is like the first, the third is not
        tensor([0.7656, 0.2258, 0.0086])
    """
    check_positive("temperature", temperature)
    check_pair(pair)
    head = pair.head
    k = head.num_classes
    draws = max(_FEW, min(_DRAWS, _ALL_DRAWS // k)) if draws is None else draws
    if draws < 1:
        raise ValueError(f"draws is {draws}; it must be at least 1")
    generator = torch.Generator(head.weight.device).manual_seed(seed)
    at_a_time = max(1, _NUMBERS // (draws * max(k, head.in_features)))
    parts = []
    for y in torch.arange(k, device=head.weight.device).split(at_a_time):
        h = pair.given(y).sample((draws,), generator=generator)
        logits = head.centered_logits(h.to(torch.promote_types(h.dtype, torch.float32)))
        parts.append((logits / temperature).softmax(-1).mean(0))
    return torch.cat(parts)


@torch.no_grad()
def targets(
    pair: GenerativePair,
    labels: Tensor | None = None,
    kind: Literal["soft", "activation", "hinted"] = "soft",
    *,
    temperature: float = 4.0,
    activations: Tensor | Activations | None = None,
    gate: Gate | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> Tensor:
    r"""What a student shall learn of each image, computed once before it is trained.

    Without activations, from labels and the head alone; no network of the teacher is needed:

    - ``"soft"``: e_y of `class_soft_targets`, for `SoftTargetLoss`;
    - ``"activation"``: r μ_y, the mean direction of the class at the radius of the pair, for `ActivationLoss`.

    With the teacher's activations of the images, each is mixed with what the teacher says of the image at hand, in
    proportion to how far the gate believes it:

    .. math:: q_i = g_i \operatorname{softmax}(z(h_i) / T) + (1 - g_i)\, e_{y_i}, \qquad
              t_i = g_i\, c\, U^\top U h_i + (1 - g_i)\, r \mu_{y_i}

    Targets of kind ``"activation"`` lie in span(W), at the canonical scale c at which the mean row norm is 1/√3
    (:meth:`penult.Head.rescaled`).

    ``"hinted"`` is ``"activation"`` with the teacher's activation behind it, whether believed or not, for the hints of
    `ActivationLoss`: r (h_i − h̄) / √(mean ‖h‖²), means over the images. A hint is learnt beside what the student
    predicts by, and can be of use where the teacher's answer is wrong.

    Args:
        pair: The pair of the teacher's head. Its base says what e_y and r are.
        labels: (N,) integers in 0..K−1; those of `Activations` when left out. For images without labels, see
            `pseudo_labels`.
        kind: As above.
        temperature: T of soft targets; that of the loss must be the same.
        activations: The teacher's activations (N, d) of the images, N ≥ 2, as a tensor or as `Activations`.
        gate: How far the teacher is believed; ``Gate.fit(pair, activations, labels)`` when left out, of sharpness 4
            for ``"hinted"``.
        draws: As for `class_soft_targets`.
        seed: As for `class_soft_targets`.

    Returns:
        Soft targets (N, K) whose rows sum to 1, activations (N, d), or these with hints (N, 2d).

    Raises:
        TypeError: Labels are no integers, or activations neither a floating tensor nor `Activations`.
        ValueError: An unknown kind, no labels, a label outside the head, wrong shapes, activations that are not
            finite, a gate or hints without activations, or a gate that was fitted on another head.

    Example:
        >>> from penult import GenerativePair, Head
        >>> pair = GenerativePair(Head(torch.tensor([[3.0, 0.0], [2.0, 2.0], [-3.0, 0.0]])))
        >>> targets(pair, torch.tensor([0, 2])).shape, targets(pair, torch.tensor([0, 2]), "activation").shape
        (torch.Size([2, 3]), torch.Size([2, 2]))
    """
    if kind not in SHARPNESS:
        raise ValueError(f"there is no kind {kind!r}; the kinds are {', '.join(map(repr, SHARPNESS))}")
    if labels is None and isinstance(activations, Activations):
        labels = activations.labels
    if labels is None:
        raise ValueError(
            "there are no labels: give labels (N,), or label the images by the teacher itself with "
            "penult.distill.pseudo_labels(pair, activations)"
        )
    own = Canonical.of(pair)
    if activations is not None and not isinstance(activations, (Tensor, Activations)):
        raise TypeError(
            f"activations must be a floating tensor (N, d) or Activations, got {type(activations).__name__}"
        )
    given: Any = labels if activations is None else activations
    rows = len(given) if not isinstance(given, Tensor) or given.ndim else 0
    check_labels(labels, torch.Size((rows, pair.head.num_classes)))
    labels = labels.to(own.rows.device, torch.int64)
    if kind == "soft":
        fallback = class_soft_targets(pair, temperature, draws=draws, seed=seed)
    else:
        fallback = own.prototypes @ own.span
    if activations is None:
        if gate is not None:
            raise ValueError("a gate weighs the teacher's activations of the images, and there are none: give both")
        if kind == "hinted":
            raise ValueError("hints are the teacher's activations of the images: give them, or take kind='activation'")
        return fallback[labels]
    if gate is None:
        gate = Gate.fit(pair, activations, labels, sharpness=SHARPNESS[kind])
    elif not gate.belongs_to(pair):
        raise ValueError(
            f"the gate was fitted on another head ({gate.pair.head}) than that of the pair ({pair.head}): fit it "
            "with the pair, the activations and the labels of this teacher"
        )
    g = gate(activations, labels).to(fallback).unsqueeze(-1)
    parts, hints, start = [], [], 0
    for h in _ActivationSource(activations, pair.head, min_rows=2):
        if kind == "hinted":
            hints.append(h.to(fallback))
        if kind == "soft":
            said = (pair.head.centered_logits(h.to(fallback)) / temperature).softmax(-1)
        else:
            said = own.read(h) @ own.span
        part = slice(start, start + len(h))
        start = part.stop
        parts.append(torch.lerp(fallback[labels[part]], said, g[part]))
    if not hints:
        return torch.cat(parts)
    hint = torch.cat(hints)
    norm = float(hint.double().square().sum(-1).mean().sqrt())
    if not norm > 0:
        raise ValueError("the activations are all zero, so that there is nothing to hint at: the layer is dead")
    hint = hint - hint.double().mean(0).to(hint)  # what all images share says nothing of any, and is most of a ReLU's h
    return torch.cat([torch.cat(parts), hint * (own.radius / norm)], dim=-1)


@torch.no_grad()
def pseudo_labels(pair: GenerativePair, activations: Tensor | Activations) -> Tensor:
    """What the teacher takes images without labels for.

    With them, `Gate.fit` and `targets` go without labels, but with much less to gain: where the teacher is wrong,
    so are its labels, and nothing says where that is.

    Args:
        pair: The pair of the teacher's head.
        activations: The teacher's activations (N, d) of the images, N ≥ 2, as a tensor or as `Activations`.

    Returns:
        Labels (N,).

    Raises:
        TypeError: `pair` is no pair, or `activations` are neither a floating tensor nor `Activations`.
        ValueError: A wrong shape, or values that are not finite.

    Example:
        >>> from penult import GenerativePair, Head
        >>> pseudo_labels(GenerativePair(Head(torch.eye(2))), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0, 1])
    """
    check_pair(pair)
    return torch.cat([answers(pair, h) for h in _ActivationSource(activations, pair.head, min_rows=2)])


@final
class TargetDataset(Dataset[Any]):
    """A data set with a target for each image: item i is (image, label, target).

    Targets go by the number of the image, so that they stay when its data set augments it.

    Args:
        dataset: A map-style data set whose items are tuples (image, label, …), or images where `labels` are given.
        targets: (N, K), (N, d) or (N, 2d), of `targets`.
        labels: (N,) integers in place of the labels of `dataset`, such as `pseudo_labels`.

    Raises:
        TypeError: `dataset` has no length, `targets` is no floating tensor, or `labels` no tensor.
        ValueError: As many targets or labels as images there are not, or targets that are not finite.

    Example:
        >>> dataset = [(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 2)]
        >>> image, label, target = TargetDataset(dataset, torch.eye(3)[[0, 2]])[1]
        >>> label, target
        (2, tensor([0., 0., 1.]))
    """

    def __init__(self, dataset: Any, targets: Tensor, labels: Tensor | None = None) -> None:
        counted = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not counted or isinstance(dataset, IterableDataset):
            raise TypeError(f"{type(dataset).__name__} is no map-style data set: items go by their numbers here")
        if not isinstance(targets, Tensor) or not targets.is_floating_point():
            what = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"targets are {what}; they must be a floating tensor (N, K) or (N, d)")
        if targets.ndim != 2 or len(targets) != len(dataset):
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}, but the data set has {len(dataset)} images: one row each"
            )
        if not bool(targets.isfinite().all()):
            bad = int((~targets.isfinite().all(-1)).sum())
            raise ValueError(f"{bad} of {len(targets)} targets hold NaN or infinity")
        if labels is not None and not isinstance(labels, Tensor):
            raise TypeError(f"labels are a {type(labels).__name__}; they must be a tensor of integers (N,)")
        kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        if labels is not None and (labels.shape != targets.shape[:1] or labels.dtype not in kinds):
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected ({len(targets)},) integers"
            )
        self.dataset, self.targets = dataset, targets.detach().cpu()
        self.labels = None if labels is None else labels.detach().cpu().to(torch.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no image {index} among {len(self)}")
        index = int(index) % len(self)
        item = self.dataset[index]
        if isinstance(item, Mapping):
            raise TypeError(
                f"item {index} of the data set is a mapping with {', '.join(map(repr, item))}; wrap the data set so "
                "that items are tuples (image, label)"
            )
        if self.labels is not None:
            image = item[0] if isinstance(item, (tuple, list)) else item
            return image, int(self.labels[index]), self.targets[index]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise ValueError(
                f"item {index} of the data set is a {type(item).__name__} without a label; give labels=, such as "
                "penult.distill.pseudo_labels(pair, activations)"
            )
        return item[0], item[1], self.targets[index]

    def __repr__(self) -> str:
        return f"TargetDataset({self.dataset!r}, targets={tuple(self.targets.shape)})"
