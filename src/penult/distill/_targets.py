"""Targets for students, computed once before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from penult._checks import (
    as_activations,
    check_choice,
    check_integer,
    check_positive,
    check_seed,
    described,
    integer_labels,
)
from penult.activations import Activations, _ActivationSource
from penult.distill._gate import Gate, predicted_classes
from penult.distill._span_head import SpanHead, check_pair
from penult.pair import GenerativePair

__all__ = ["SHARPNESS", "TargetDataset", "class_soft_targets", "pseudo_labels", "targets"]

# Default number of samples: of each class, of all classes together, and the least of each class.
_SAMPLES = 1000
_ALL_SAMPLES = 100_000
_MIN_SAMPLES = 100
# Most values of a block of samples.
_NUMBERS = 1 << 24
# Sharpness of the gate that is fitted by default, for each kind of targets.
SHARPNESS = {"soft": 1.0, "activation": 1.0, "hinted": 4.0}


@torch.no_grad()
def class_soft_targets(
    pair: GenerativePair, temperature: float = 4.0, *, draws: int | None = None, seed: int = 0
) -> Tensor:
    r"""Return the mean class probabilities of samples of each class, a summary of the head that needs no teacher.

    .. math:: e_y = E_{h \sim p(h|y)}\left[\operatorname{softmax}\left((W h + b) / T\right)\right]

    by Monte Carlo. No image is needed, and with ``GenerativePair(head)`` no activation either.

    Args:
        pair: The pair of the teacher's head.
        temperature: T.
        draws: Number of samples of each class. Default: 1000, fewer for more than 100 classes.
        seed: Seed of the samples.

    Returns:
        (K, K), row y for class y; each row sums to 1.

    Raises:
        TypeError: `pair` is not a pair, `temperature` not a number, or `draws` not an integer.
        ValueError: `temperature` or `draws` is not positive.

    Example:
        >>> from penult import GenerativePair, Head
        >>> pair = GenerativePair(Head(torch.tensor([[3.0, 0.0], [2.0, 2.0], [-3.0, 0.0]])))
        >>> # The second class is similar to the first, the third is not.
        >>> class_soft_targets(pair)[0]
        tensor([0.7656, 0.2258, 0.0086])
    """
    temperature, seed = check_positive("temperature", temperature), check_seed(seed)
    check_pair(pair)
    head = pair.head
    k = head.num_classes
    draws = max(_MIN_SAMPLES, min(_SAMPLES, _ALL_SAMPLES // k)) if draws is None else draws
    draws = check_integer("draws", draws)
    generator = torch.Generator(head.weight.device).manual_seed(seed)
    classes_per_block = max(1, _NUMBERS // (draws * max(k, head.in_features)))
    parts = []
    for y in torch.arange(k, device=head.weight.device).split(classes_per_block):
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
    r"""Return a target for each image, computed once before training.

    Without activations, targets depend on labels and the head alone, and the teacher's network is not needed:

    - ``"soft"``: e_y of `class_soft_targets`, for `SoftTargetLoss`;
    - ``"activation"``: r μ_y, the mean direction of the class at the radius of the pair, for `ActivationLoss`.

    With the teacher's activations of the images, they are mixed with the teacher's output for the image, with the
    gate g_i as weight:

    .. math:: q_i = g_i \operatorname{softmax}(z(h_i) / T) + (1 - g_i)\, e_{y_i}, \qquad
              t_i = g_i\, c\, U^\top U h_i + (1 - g_i)\, r \mu_{y_i}

    Targets of kind ``"activation"`` lie in span(W), at the canonical scale c at which the mean row norm is 1/√3
    (:meth:`penult.Head.rescaled`).

    ``"hinted"`` appends the teacher's activation to ``"activation"``, for the hints of `ActivationLoss`:
    r (h_i − h̄) / √(mean ‖h‖²), with means over the images. Hints do not depend on the gate. Predictions of the student
    do not use them, so they can help even if the teacher's prediction is wrong.

    Args:
        pair: The pair of the teacher's head. Its base determines e_y and r.
        labels: Integer labels (N,) in 0..K−1. Default: those of `Activations`. For images without labels, see
            `pseudo_labels`.
        kind: Kind of targets, as above.
        temperature: T of soft targets; the loss must have the same.
        activations: The teacher's activations (N, d) of the images, N ≥ 2, as a tensor or as `Activations`.
        gate: Trust in the teacher. Default: ``Gate.fit(pair, activations, labels)``, with sharpness 4 for
            ``"hinted"``.
        draws: As for `class_soft_targets`.
        seed: As for `class_soft_targets`.

    Returns:
        Soft targets (N, K) whose rows sum to 1, activations (N, d), or these with hints (N, 2d).

    Raises:
        TypeError: Labels are not integers, or activations are neither a floating tensor nor `Activations`.
        ValueError: The kind is unknown, there are no labels, a label is out of range, a shape is wrong, activations are
            not finite, there is a gate or kind ``"hinted"`` without activations, or the gate has another head.

    Example:
        >>> from penult import GenerativePair, Head
        >>> pair = GenerativePair(Head(torch.tensor([[3.0, 0.0], [2.0, 2.0], [-3.0, 0.0]])))
        >>> targets(pair, torch.tensor([0, 2])).shape, targets(pair, torch.tensor([0, 2]), "activation").shape
        (torch.Size([2, 3]), torch.Size([2, 2]))
    """
    check_choice("kind", kind, SHARPNESS)
    if labels is None and isinstance(activations, Activations):
        labels = activations.labels
    if labels is None:
        raise ValueError(
            "labels is None; expected integer labels (N,). The teacher's own are "
            "penult.distill.pseudo_labels(pair, activations)"
        )
    span_head = SpanHead.of(pair)
    source = None if activations is None else _ActivationSource(activations, pair.head, min_rows=2)
    labels = integer_labels(labels)
    num_rows = labels.numel() if source is None else len(source)
    labels = integer_labels(labels, (num_rows,), pair.head.num_classes).to(span_head.rows.device)
    if kind == "soft":
        class_targets = class_soft_targets(pair, temperature, draws=draws, seed=seed)
    else:
        class_targets = span_head.prototypes @ span_head.span
    if activations is None or source is None:
        if gate is not None:
            raise ValueError(
                "a gate weighs the teacher's activations of the images, and activations is None: give both"
            )
        if kind == "hinted":
            raise ValueError("hints are the teacher's activations of the images: give them, or take kind='activation'")
        return class_targets[labels]
    if gate is None:
        gate = Gate.fit(pair, activations, labels, sharpness=SHARPNESS[kind])
    elif not gate.belongs_to(pair):
        raise ValueError(
            f"the gate was fitted on another head ({gate.pair.head}) than that of the pair ({pair.head}): fit it "
            "with the pair, the activations and the labels of this teacher"
        )
    gate_values = gate(activations, labels).to(class_targets).unsqueeze(-1)
    parts, hints, start = [], [], 0
    for h in source:
        if kind == "hinted":
            hints.append(h.to(class_targets))
        if kind == "soft":
            teacher_output = (pair.head.centered_logits(h.to(class_targets)) / temperature).softmax(-1)
        else:
            teacher_output = span_head.read(h) @ span_head.span
        rows = slice(start, start + len(h))
        start = rows.stop
        parts.append(torch.lerp(class_targets[labels[rows]], teacher_output, gate_values[rows]))
    if not hints:
        return torch.cat(parts)
    hint = torch.cat(hints)
    norm = float(hint.double().square().sum(-1).mean().sqrt())
    if not norm > 0:
        raise ValueError("the activations are all zero, so hints hold no information: the layer is dead")
    # The mean is the largest part of a ReLU's activations, but is the same for all images.
    hint = hint - hint.double().mean(0).to(hint)
    return torch.cat([torch.cat(parts), hint * (span_head.radius / norm)], dim=-1)


@torch.no_grad()
def pseudo_labels(pair: GenerativePair, activations: Tensor | Activations) -> Tensor:
    """Return the predictions of the teacher, as labels of images that have none.

    `Gate.fit` and `targets` accept them as labels, but the student gains much less: nothing shows where the teacher is
    wrong.

    Args:
        pair: The pair of the teacher's head.
        activations: The teacher's activations (N, d) of the images, N ≥ 2, as a tensor or as `Activations`.

    Returns:
        Labels (N,).

    Raises:
        TypeError: `pair` is not a pair, or `activations` are neither a floating tensor nor `Activations`.
        ValueError: The shape is wrong, or values are not finite.

    Example:
        >>> from penult import GenerativePair, Head
        >>> pseudo_labels(GenerativePair(Head(torch.eye(2))), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0, 1])
    """
    check_pair(pair)
    return torch.cat([predicted_classes(pair, h) for h in _ActivationSource(activations, pair.head, min_rows=2)])


@final
class TargetDataset(Dataset[Any]):
    """A data set with a target for each image: item i is (image, label, target).

    Target i belongs to image i, also if the data set augments its images.

    Args:
        dataset: A map-style data set whose items are tuples (image, label, …), or images if `labels` are given.
        targets: Targets (N, K), (N, d) or (N, 2d), as returned by `penult.distill.targets`.
        labels: Integer labels (N,) that replace those of `dataset`, such as `pseudo_labels`.

    Raises:
        TypeError: `dataset` has no length, `targets` is not a floating tensor, or `labels` are not integers.
        ValueError: The number of targets or labels is not the number of images, or targets are not finite.

    Example:
        >>> dataset = [(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 2)]
        >>> image, label, target = TargetDataset(dataset, torch.eye(3)[[0, 2]])[1]
        >>> label, target
        (2, tensor([0., 0., 1.]))
    """

    def __init__(self, dataset: Any, targets: Tensor, labels: Tensor | None = None) -> None:
        is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not is_map_style or isinstance(dataset, IterableDataset):
            raise TypeError(f"dataset is {described(dataset)}; expected a map-style data set")
        targets = as_activations(targets, "targets", "(N, K), (N, d) or (N, 2d)")
        if targets.ndim != 2 or len(targets) != len(dataset):
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; expected one row for each of {len(dataset)} images"
            )
        num_bad = int((~targets.isfinite().all(-1)).sum())
        if num_bad:
            raise ValueError(f"{num_bad} of {len(targets)} targets hold NaN or infinity; expected finite values")
        self.dataset, self.targets = dataset, targets.detach().cpu()
        self.labels = None if labels is None else integer_labels(labels, targets.shape[:1]).detach().cpu()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}; expected {-len(self)} to {len(self) - 1}")
        index = int(index) % len(self)
        item = self.dataset[index]
        if isinstance(item, Mapping):
            raise TypeError(
                f"item {index} of the data set is a mapping with {', '.join(map(repr, item))}; expected a tuple "
                "(image, label). Wrap the data set"
            )
        if self.labels is not None:
            image = item[0] if isinstance(item, (tuple, list)) else item
            return image, int(self.labels[index]), self.targets[index]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise ValueError(
                f"item {index} of the data set is {described(item)} without a label; expected a tuple (image, label). "
                "Or give labels=, such as penult.distill.pseudo_labels(pair, activations)"
            )
        return item[0], item[1], self.targets[index]

    def __repr__(self) -> str:
        return f"TargetDataset({self.dataset!r}, targets={tuple(self.targets.shape)})"
