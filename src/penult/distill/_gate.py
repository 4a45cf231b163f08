"""Gates: how far the teacher is trusted on each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from penult._checks import check_between, check_not_negative, class_names_tuple, integer_labels
from penult.activations import Activations, _ActivationSource
from penult.distill._span_head import SpanHead
from penult.pair import GenerativePair

__all__ = ["ClassTrust", "Gate", "GateSummary", "predicted_classes"]

# Cosines above this quantile of the distribution of their class get full trust.
_TAIL = 0.1


@final
@dataclass(frozen=True)
class ClassTrust:
    """One class of the images that a gate was fitted to.

    Attributes:
        name: Name of the class, or its number.
        rows: Number of images of the class.
        accuracy: Accuracy of the teacher on them; None without labels.
        belief: Mean of the gate over these images.
    """

    name: str
    rows: int
    accuracy: float | None
    belief: float


@final
@dataclass(frozen=True)
class GateSummary:
    """Trust in a teacher on the images that a gate was fitted to; ``print`` shows a table.

    Attributes:
        rows: Number of images.
        labelled: Whether their labels were known; otherwise they are the predictions of the teacher.
        accuracy: Accuracy of the teacher; None without labels.
        trust: ρ, the factor that all images share.
        typical: Fraction of images whose activation has a typical cosine to the row of its label: above the τ-quantile
            of the distribution F_y of `Gate`.
        belief: Mean of the gate.
        classes: Accuracy and mean gate of each class that has images.
    """

    rows: int
    labelled: bool
    accuracy: float | None
    trust: float
    typical: float
    belief: float
    classes: tuple[ClassTrust, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the table."""
        accuracy = "unknown" if self.accuracy is None else f"{self.accuracy:.1%}"
        labels = "labelled" if self.labelled else "labelled by the teacher itself"
        lines = [
            f"{self.rows} images, {labels}: teacher accuracy {accuracy}, trust {self.trust:.2f}, "
            f"typical {self.typical:.1%}; believed {self.belief:.1%} on average"
        ]
        width = max(len("class"), *(len(row.name) for row in self.classes))
        lines.append(f"{'class'.ljust(width)}  images  accuracy  believed")
        for row in self.classes:
            accuracy = "-" if row.accuracy is None else f"{row.accuracy:.1%}"
            lines.append(f"{row.name.ljust(width)}  {row.rows:6d}  {accuracy:>8}  {row.belief:8.1%}")
        return "\n".join(lines)


@final
class Gate(nn.Module):
    r"""Trust in the teacher on each image, from 0 (none) to 1 (full).

    .. math:: g_i = \rho^s \cdot [\operatorname{argmax}_k z_k(h_i) = y_i] \cdot
              \min(1, F_{y_i}(\cos(h_i, w_{y_i})) / \tau)

    There are three factors. ρ = max(0, (a − 1/K) / (1 − 1/K)) is the accuracy a of the teacher on the labelled images,
    rescaled to be 0 for guessing. The second factor is 1 if the teacher is right on the image, else 0. In the third,
    F_y is the distribution function of the cosine between an activation and the row of its class: von Mises-Fisher in
    span(W) with concentration r‖w_y‖, where r is the mean norm of activations of the pair in span(W). This is exact for
    a round sphere in span(W), and an approximation for other bases. If the cosine is below the τ-quantile of its class,
    trust is reduced in proportion to F_y.

    Without labels the predictions of the teacher are used as labels. Then the second factor is 1, and ρ, which cannot
    be measured, is the fraction of cosines above the τ-quantile divided by 1 − τ, the fraction without a shift. This
    works much worse than labels.

    The second factor has the largest effect; see the guide for the effect of each. A sharpness s above 1 reduces the
    trust in a teacher that is often wrong: even where it is right on such images, its probabilities of the other
    classes are of little use.

    Args:
        pair: The pair of the teacher's head.
        trust: ρ in [0, 1].
        tail: τ in (0, 1).
        sharpness: s, at least 0; at 0 the accuracy of the teacher has no effect.

    Attributes:
        trust: ρ, ().
        tail: τ.
        sharpness: s.
        summary: `GateSummary` of the images that the gate was fitted to; None for a gate that was not fitted.

    Raises:
        TypeError: `pair` is not a pair, or another argument is not a number.
        ValueError: `trust`, `tail` or `sharpness` is out of range.

    Example:
        >>> from penult import GenerativePair, Head
        >>> pair = GenerativePair(Head(4 * torch.eye(3)))
        >>> h = pair.given(torch.tensor([0, 1, 2])).sample((100,), generator=torch.Generator().manual_seed(0))
        >>> labels = torch.tensor([0, 1, 2]).expand(100, 3)
        >>> gate = Gate.fit(pair, h.reshape(-1, 3), labels.reshape(-1))
        >>> print(gate.summary)
        300 images, labelled: teacher accuracy 93.0%, trust 0.89, typical 88.3%; believed 82.0% on average
        class  images  accuracy  believed
        0         100     94.0%     83.7%
        1         100     92.0%     81.0%
        2         100     93.0%     81.4%
        >>> # The teacher is right on the first image and wrong on the second.
        >>> gate(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1]))
        tensor([0.8950, 0.0000])
    """

    trust: Tensor

    def __init__(self, pair: GenerativePair, trust: float = 1.0, tail: float = _TAIL, sharpness: float = 1.0) -> None:
        super().__init__()
        trust = check_between("trust", trust, inclusive=True)
        self.tail, self.sharpness = check_between("tail", tail), check_not_negative("sharpness", sharpness)
        self.canonical = SpanHead.of(pair)
        self.pair = pair
        self.summary: GateSummary | None = None
        self.register_buffer("trust", torch.tensor(trust, device=pair.head.weight.device))

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        pair: GenerativePair,
        activations: Tensor | Activations,
        labels: Tensor | None = None,
        *,
        tail: float = _TAIL,
        sharpness: float = 1.0,
        class_names: Sequence[str] | Mapping[int, str] | Mapping[str, str] | None = None,
    ) -> Gate:
        """Fit a gate to the images that a student will be trained on.

        Args:
            pair: The pair of the teacher's head. Its base should be fitted to activations of the teacher's own domain,
                so that the radius is measured.
            activations: The teacher's activations (N, d) of these images, N ≥ 2, as a tensor or as `Activations`.
            labels: Integer labels (N,) in 0..K−1. Default: those of `Activations`; if there are none, the predictions
                of the teacher, see above.
            tail: τ in (0, 1).
            sharpness: s.
            class_names: K names for the summary, or a mapping of class numbers to names. Default: those of
                `Activations`.

        Returns:
            The gate, with its summary.

        Raises:
            TypeError: `activations` are neither a floating tensor nor `Activations`, or labels are not integers.
            ValueError: A shape is wrong, a label is out of range, or activations are not finite.
        """
        gate = cls(pair, 1.0, tail, sharpness)
        if isinstance(activations, Activations):
            class_names = activations.class_names if class_names is None else class_names
        k = pair.head.num_classes
        source, known_labels = gate._read(activations, labels)
        predicted, typicality = gate._predictions_and_typicality(source, known_labels)
        labels = predicted if known_labels is None else known_labels.to(predicted)
        correct = predicted == labels
        typical_fraction = float((typicality >= 1).double().mean())
        if known_labels is None:
            accuracy, trust = None, min(1.0, typical_fraction / (1 - tail))
        else:
            accuracy = float(correct.double().mean())
            trust = max(0.0, (accuracy - 1 / k) / (1 - 1 / k))
        gate.trust.fill_(trust)
        belief = gate.trust**sharpness * correct * typicality
        names = tuple(map(str, range(k))) if class_names is None else class_names_tuple(class_names, k)
        counts = labels.bincount(minlength=k)
        class_accuracy = labels.bincount(correct.double(), minlength=k) / counts
        class_belief = labels.bincount(belief.double(), minlength=k) / counts
        classes = tuple(
            ClassTrust(
                names[y],
                int(counts[y]),
                None if known_labels is None else float(class_accuracy[y]),
                float(class_belief[y]),
            )
            for y in counts.nonzero().flatten().tolist()
        )
        gate.summary = GateSummary(
            rows=len(source),
            labelled=known_labels is not None,
            accuracy=accuracy,
            trust=trust,
            typical=typical_fraction,
            belief=float(belief.double().mean()),
            classes=classes,
        )
        return gate

    @torch.no_grad()
    def forward(self, activations: Tensor | Activations, labels: Tensor | None = None) -> Tensor:
        """Return the gate of each image.

        Args:
            activations: The teacher's activations (N, d), N ≥ 2, as a tensor or as `Activations`.
            labels: (N,); as for `fit`.

        Returns:
            (N,) in [0, 1].

        Raises:
            TypeError: As for `fit`.
            ValueError: As for `fit`.
        """
        source, known_labels = self._read(activations, labels)
        predicted, typicality = self._predictions_and_typicality(source, known_labels)
        correct = 1.0 if known_labels is None else predicted == known_labels.to(predicted)
        return self.trust**self.sharpness * typicality * correct

    def belongs_to(self, pair: GenerativePair) -> bool:
        """Return whether the head of a pair has the weight and bias of the gate's head."""
        own, head = self.pair.head, pair.head
        if own.weight.shape != head.weight.shape or own.weight.device != head.weight.device:
            return False
        same = own.weight is head.weight or torch.equal(own.weight, head.weight)
        return same and torch.equal(own.full_bias, head.full_bias)

    def extra_repr(self) -> str:
        """Return the part of ``repr(gate)`` between the brackets."""
        return f"trust={float(self.trust):.4g}, tail={self.tail:g}, sharpness={self.sharpness:g}"

    def _read(
        self, activations: Tensor | Activations, labels: Tensor | None
    ) -> tuple[_ActivationSource, Tensor | None]:
        """Check activations, and the labels (N,) that are given or stored with them, if any."""
        head = self.pair.head
        source = _ActivationSource(activations, head, min_rows=2)
        if labels is None and isinstance(activations, Activations):
            labels = activations.labels
        return source, None if labels is None else integer_labels(labels, (len(source),), head.num_classes)

    def _predictions_and_typicality(self, source: _ActivationSource, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the teacher's predictions (N,), and min(1, F_y/τ) (N,) for the labels y, or else the predictions."""
        head = self.canonical
        predictions, typicalities, start = [], [], 0
        for rows in source:
            predicted = predicted_classes(self.pair, rows)
            y = predicted if labels is None else labels[start : start + len(rows)].to(predicted)
            start += len(rows)
            predictions.append(predicted)
            typicalities.append((head.typicality(head.read(rows), y) / self.tail).clamp_max(1.0))
        return torch.cat(predictions), torch.cat(typicalities)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        # The summary describes the images of the earlier fit.
        self.summary = None


def predicted_classes(pair: GenerativePair, rows: Tensor) -> Tensor:
    """Return the predictions (n,) of a head for activations (n, d), by logits in at least float32."""
    return pair.head.centered_logits(rows.to(torch.promote_types(rows.dtype, torch.float32))).argmax(-1)
