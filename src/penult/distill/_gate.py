"""How far a teacher is believed on an image that it was not trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from penult._checks import check_labels
from penult.activations import Activations, _ActivationSource
from penult.distill._span_head import Canonical
from penult.pair import GenerativePair

__all__ = ["ClassTrust", "Gate", "GateSummary", "answers", "labels_of"]

_TAIL = 0.1  # a cosine above this quantile of the class's own law is trusted in full


@final
@dataclass(frozen=True)
class ClassTrust:
    """One class of the images that a gate was fitted to.

    Attributes:
        name: Its name, or its number.
        rows: How many images.
        accuracy: Share of them that the teacher gets right; None without labels.
        belief: Mean of the gate over them.
    """

    name: str
    rows: int
    accuracy: float | None
    belief: float


@final
@dataclass(frozen=True)
class GateSummary:
    """How far a teacher is believed on the images that a gate was fitted to; ``print`` shows a table.

    Attributes:
        rows: How many images.
        labelled: Whether their labels were known; otherwise they are what the teacher says.
        accuracy: Share that the teacher gets right; None without labels.
        trust: ρ, the factor that all images share.
        typical: Share of images whose cosine to the row of their label is above the τ-quantile F_y of that class.
        belief: Mean of the gate.
        classes: The same by class, where there are images of it.
    """

    rows: int
    labelled: bool
    accuracy: float | None
    trust: float
    typical: float
    belief: float
    classes: tuple[ClassTrust, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The table."""
        right = "unknown" if self.accuracy is None else f"{self.accuracy:.1%}"
        labels = "labelled" if self.labelled else "labelled by the teacher itself"
        lines = [
            f"{self.rows} images, {labels}: teacher accuracy {right}, trust {self.trust:.2f}, "
            f"typical {self.typical:.1%}; believed {self.belief:.1%} on average"
        ]
        width = max(len("class"), *(len(each.name) for each in self.classes))
        lines.append(f"{'class'.ljust(width)}  images  accuracy  believed")
        for each in self.classes:
            share = "-" if each.accuracy is None else f"{each.accuracy:.1%}"
            lines.append(f"{each.name.ljust(width)}  {each.rows:6d}  {share:>8}  {each.belief:8.1%}")
        return "\n".join(lines)


@final
class Gate(nn.Module):
    r"""How far the teacher is believed, image by image, from 0 (not at all) to 1.

    .. math:: g_i = \rho^s \cdot [\operatorname{argmax}_k z_k(h_i) = y_i] \cdot
              \min(1, F_{y_i}(\cos(h_i, w_{y_i})) / \tau)

    with three factors. ρ = max(0, (a − 1/K) / (1 − 1/K)) is the teacher's accuracy a
    on the labelled images, set against guessing. The second asks whether the teacher is right on the image at hand. In
    the third, F_y is the law of the cosine between an activation and the row of its class: von Mises-Fisher in span(W)
    with concentration r‖w_y‖, where r is the mean norm of the pair's activations there. For a round sphere in span(W)
    this is what the pair implies; for other bases it is near to that. An activation that lies farther from its row than
    all but a share τ of those of the class is believed in proportion.

    Without labels the teacher's own predictions take their place. Then the second factor is 1, and ρ, which cannot be
    measured, is how many of the cosines lie above the τ-quantile, in proportion to the 1 − τ that would without a
    shift. That is much weaker than labels.

    Most of the work is done by the second factor; see the guide for what each adds. The sharpness s says how much less
    than in proportion a teacher is believed that is often wrong: where it is right on such images, what it says of the
    other classes is worth little.

    Args:
        pair: The pair of the teacher's head.
        trust: ρ in [0, 1].
        tail: τ in (0, 1).
        sharpness: s, at least 0; at 0 the teacher's accuracy does not count.

    Attributes:
        trust: ρ, ().
        tail: τ.
        sharpness: s.
        summary: What `fit` saw, a `GateSummary`; None for a gate that was not fitted.

    Raises:
        TypeError: `pair` is no pair.
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
        >>> gate(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1]))  # right, wrong
        tensor([0.8950, 0.0000])
    """

    trust: Tensor

    def __init__(self, pair: GenerativePair, trust: float = 1.0, tail: float = _TAIL, sharpness: float = 1.0) -> None:
        super().__init__()
        if not 0 <= trust <= 1:
            raise ValueError(f"trust is {trust}; it must lie between 0 and 1")
        if not 0 < tail < 1:
            raise ValueError(f"tail is {tail}; it must lie between 0 and 1, and be neither")
        if not 0 <= sharpness < float("inf"):
            raise ValueError(f"sharpness is {sharpness}; it must be finite and not negative")
        self.canonical = Canonical.of(pair)
        self.pair = pair
        self.tail, self.sharpness = float(tail), float(sharpness)
        self.summary: GateSummary | None = None
        self.register_buffer("trust", torch.tensor(float(trust), device=pair.head.weight.device))

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
        class_names: Sequence[str] | None = None,
    ) -> Gate:
        """A gate for the images that a student will be trained on.

        Args:
            pair: The pair of the teacher's head; a base fitted to activations of the teacher's own domain makes the
                radius a measured one.
            activations: The teacher's activations (N, d) of these images, N ≥ 2, as a tensor or as `Activations`.
            labels: (N,) integers in 0..K−1. Those of `Activations` when left out; of images without labels, the
                teacher's predictions take their place, see above.
            tail: τ in (0, 1).
            sharpness: s.
            class_names: K names for the summary; those of `Activations` when left out.

        Returns:
            The gate, with its summary.

        Raises:
            TypeError: `activations` are neither a floating tensor nor `Activations`, or labels are no integers.
            ValueError: Wrong shapes, a label outside the head, or activations that are not finite.
        """
        gate = cls(pair, 1.0, tail, sharpness)
        if isinstance(activations, Activations):
            class_names = activations.class_names if class_names is None else class_names
        source, given = (
            _ActivationSource(activations, pair.head, min_rows=2),
            labels_of(activations, labels, pair.head.num_classes),
        )
        predicted, typical = gate._look(source, given)
        labels = predicted if given is None else given.to(predicted)
        right = predicted == labels
        full = float((typical >= 1).double().mean())
        k = pair.head.num_classes
        accuracy = None if given is None else float(right.double().mean())
        trust = min(1.0, full / (1 - tail))
        if accuracy is not None:
            trust = max(0.0, (accuracy - 1 / k) / (1 - 1 / k))
        gate.trust.fill_(trust)
        belief = gate.trust**sharpness * right * typical
        names = class_names if class_names is not None else [str(y) for y in range(k)]
        if len(names) != k:
            raise ValueError(f"class_names holds {len(names)} names; the head has {k} classes")
        counts = labels.bincount(minlength=k)
        share = labels.bincount(right.double(), minlength=k) / counts
        mean = labels.bincount(belief.double(), minlength=k) / counts
        classes = tuple(
            ClassTrust(str(names[y]), int(counts[y]), None if given is None else float(share[y]), float(mean[y]))
            for y in counts.nonzero().flatten().tolist()
        )
        gate.summary = GateSummary(
            len(source), given is not None, accuracy, trust, full, float(belief.double().mean()), classes
        )
        return gate

    @torch.no_grad()
    def forward(self, activations: Tensor | Activations, labels: Tensor | None = None) -> Tensor:
        """The gate of each image.

        Args:
            activations: The teacher's activations (N, d), N ≥ 2, as a tensor or as `Activations`.
            labels: (N,); as for `fit`.

        Returns:
            (N,) in [0, 1].

        Raises:
            TypeError: As for `fit`.
            ValueError: As for `fit`.
        """
        k = self.pair.head.num_classes
        given = labels_of(activations, labels, k)
        predicted, typical = self._look(_ActivationSource(activations, self.pair.head, min_rows=2), given)
        agrees = 1.0 if given is None else predicted == given.to(predicted)
        return self.trust**self.sharpness * typical * agrees

    def belongs_to(self, pair: GenerativePair) -> bool:
        """Whether the gate is for the head of a pair: the same rows and biases."""
        own, head = self.pair.head, pair.head
        if own.weight.shape != head.weight.shape or own.weight.device != head.weight.device:
            return False
        same = own.weight is head.weight or torch.equal(own.weight, head.weight)
        return same and torch.equal(own.full_bias, head.full_bias)

    def extra_repr(self) -> str:
        """The part of ``repr(gate)`` between the brackets."""
        return f"trust={float(self.trust):.4g}, tail={self.tail:g}, sharpness={self.sharpness:g}"

    def _look(self, source: _ActivationSource, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the teacher predicts (N,), and min(1, F/τ) at the labels, or else at what it predicts (N,)."""
        own = self.canonical
        parts, start = [], 0
        for rows in source:
            predicted = answers(self.pair, rows)
            y = predicted if labels is None else labels[start : start + len(rows)].to(predicted)
            start += len(rows)
            below = own.typicality(own.read(rows), y)
            parts.append((predicted, (below / self.tail).clamp_max(1.0)))
        return torch.cat([p for p, _ in parts]), torch.cat([t for _, t in parts])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        self.summary = None  # it told of what was fitted before


def answers(pair: GenerativePair, rows: Tensor) -> Tensor:
    """The classes (n,) that a head gives activations (n, d), by logits in at least float32."""
    return pair.head.centered_logits(rows.to(torch.promote_types(rows.dtype, torch.float32))).argmax(-1)


def labels_of(activations: Tensor | Activations, labels: Tensor | None, classes: int) -> Tensor | None:
    """Labels (N,) of activations, as given or their own, after a look at them; None if there are none."""
    if labels is None:
        labels = activations.labels if isinstance(activations, Activations) else None
    if labels is not None:
        check_labels(labels, torch.Size((len(activations), classes)))
    return labels
