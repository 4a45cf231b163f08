"""The head as a module."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult._checks import check_bias, check_finite, check_labels, check_positive, check_weight
from penult._row_blocks import blocks, mean_row_of, rounding, rows_in_double, span_of, version_of
from penult.head._calibration import best_inverse_temperature
from penult.head._certificate import HeadCertificate
from penult.special import in_full, outside_transforms

__all__ = ["Head"]


@final
class Head(nn.Module):
    """A softmax head: logits = W h + b.

    W and b are held by reference, detached: a head takes no memory beside the model's own, and follows the
    model if it is trained further. (A head that `find_head` had to compute, with a scale or a norm's gain folded in,
    does not: find it again.) Loading a state dict into it writes into the model, too; `clone` first if
    that is not wanted. ``version`` counts the changes of W.

    Args:
        weight: (K, d), one row w_y a class, K >= 2; any floating dtype.
        bias: (K,), or None for no bias.
        certificate: How the head was found, see `find_head`.
        norm: ``"layer"`` or ``"rms"`` if h is the output of a LayerNorm or RMSNorm without affine part, so
            that it lies on the sphere of radius sqrt(d) (for ``"layer"``, where sum(h) = 0); None if not.

    Attributes:
        weight: (K, d).
        bias: (K,) or None.
        mean_row: (d,), the mean of the rows, which is the part of W that no softmax sees; as it was when the
            head was built or last loaded.
        certificate: As given.
        norm: As given.
        radius: Radius of the sphere on which h lies when `norm` is given, else None.
        temperature: Product of the temperatures that the head was divided by; 1 at first.

    Raises:
        TypeError: `weight` or `bias` is no floating tensor.
        ValueError: A wrong shape, fewer than two classes, NaN or infinity, an all-zero row, or a bias that
            differs from the weight in dtype or device.

    Example:
        >>> head = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0.0, 1.0, 0.0]))
        >>> head(torch.tensor([2.0, 3.0]))
        tensor([ 2.,  4., -2.])
        >>> head
        Head(num_classes=3, in_features=2, bias=True)
    """

    weight: Tensor
    bias: Tensor | None
    mean_row: Tensor
    certificate: HeadCertificate | None
    norm: Literal["layer", "rms"] | None
    radius: float | None
    temperature: float

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        certificate: HeadCertificate | None = None,
        *,
        norm: Literal["layer", "rms"] | None = None,
    ) -> None:
        super().__init__()
        check_weight(weight)
        check_bias(bias, weight)
        if norm not in ("layer", "rms", None):
            raise ValueError(f"norm is {norm!r}; it must be 'layer', 'rms' or None")
        self._hold(weight, bias)
        self.certificate = certificate
        self.norm = norm
        self.radius = None if norm is None else math.sqrt(self.in_features)
        self.temperature = 1.0

    @classmethod
    def _of_model(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        *,
        norm: Literal["layer", "rms"] | None = None,
        sources: Sequence[Tensor] = (),
    ) -> Head:
        """A head as a model has it: some rows may be zero, as those of padding tokens.

        Args:
            weight: (K, d).
            bias: (K,) or None.
            norm: As for a head.
            sources: The model's tensors that W and b were computed from; ``version`` counts their changes, too.
        """
        check_weight(weight, empty_rows=True)
        check_bias(bias, weight)
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._hold(weight, bias)
        head.certificate, head.norm, head.temperature = None, norm, 1.0
        head.radius = None if norm is None else math.sqrt(head.in_features)
        head._sources = [weakref.ref(source) for source in sources]
        head._seen = [version_of(source) for source in sources]
        return head

    def _hold(self, weight: Tensor, bias: Tensor | None) -> None:
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("mean_row", _wide_mean_row(self.weight), persistent=False)
        self._span: tuple[Tensor, int, Tensor] | None = None
        self._sources: list[weakref.ref[Tensor]] = []
        self._seen: list[int] = []

    def _derive(self, weight: Tensor, bias: Tensor | None, scale: float = 1.0, temperature: float = 1.0) -> Head:
        """A head of the same classes with other numbers, which are not checked: centered rows may be zero."""
        head = Head.__new__(Head)
        nn.Module.__init__(head)
        head._hold(weight, bias)
        # Where h is scaled, the model's own activations are no longer what the head consumes.
        head.certificate = self.certificate if scale == 1.0 else None
        head.norm = self.norm
        head.radius = None if self.radius is None else self.radius * scale
        head.temperature = self.temperature * temperature
        head._sources, head._seen = list(self._sources), list(self._seen)
        return head

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """The dimension d of h."""
        return self.weight.shape[1]

    @property
    def full_bias(self) -> Tensor:
        """B (K,), or zeros where the head has none."""
        return self.weight.new_zeros(self.num_classes) if self.bias is None else self.bias

    @property
    def version(self) -> tuple[int, ...]:
        """Changes whenever W or b, or a tensor of the model that they were computed from, is changed in place."""
        for i, source in enumerate(self._sources):
            tensor = source()
            if tensor is not None:  # the model is still there
                self._seen[i] = version_of(tensor)
        return version_of(self.weight), 0 if self.bias is None else version_of(self.bias), *self._seen

    def forward(self, h: Tensor) -> Tensor:
        """The logits of activations.

        Args:
            h: (..., d).

        Returns:
            W h + b, (..., K).

        Raises:
            ValueError: The last dimension of `h` is not d, or its dtype is not the head's.
        """
        if h.ndim == 0 or h.shape[-1] != self.in_features:
            raise ValueError(
                f"h has shape {tuple(h.shape)}; the head takes activations of shape (..., {self.in_features})"
            )
        if h.dtype != self.weight.dtype and not torch.is_autocast_enabled(h.device.type):
            raise ValueError(
                f"h is {h.dtype}, but the head is {self.weight.dtype}; convert one: h.to(head.weight.dtype)"
            )
        return F.linear(h, self.weight, self.bias)

    def centered_logits(self, h: Tensor) -> Tensor:
        """The logits that the centered rows give: the same softmax, and no second W.

        They are computed in the dtype of `h` under torch.autocast as well, unlike the model's own logits.

        Args:
            h: (..., d), in any floating dtype: where it is not that of W, rows are converted block by block.

        Returns:
            (W - mean row) h + b, (..., K), in the dtype of `h`.

        Raises:
            ValueError: The last dimension of `h` is not d.

        Example:
            >>> head = Head(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
            >>> head.centered_logits(torch.tensor([1.0, 5.0]))
            tensor([ 1., -1.])
        """
        with in_full(h.device):
            if h.dtype == self.weight.dtype or h.shape[-1:] != (self.in_features,):
                return self.forward(h) - (h.to(self.mean_row.dtype) @ self.mean_row).to(h.dtype).unsqueeze(-1)
            parts = [F.linear(h, rows.to(h.dtype)) for _, rows in self.centered_blocks()]
            return torch.cat(parts, dim=-1) + self.full_bias.to(h.dtype)

    def centered_weight(self, index: Tensor | slice | int | None = None) -> Tensor:
        """Centered rows w_y - mean row.

        Args:
            index: Which rows, as one indexes a tensor; None means all, which costs a second W.

        Returns:
            (K, d), or (*index.shape, d); float32 for a head of half precision.

        Example:
            >>> Head(torch.tensor([[3.0, 0.0], [1.0, 0.0]])).centered_weight(torch.tensor([1]))
            tensor([[-1.,  0.]])
        """
        rows = self.weight if index is None else self.weight[index]
        return rows - self.mean_row

    def centered_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The centered rows in blocks, so that all of them can be looked at without a second W.

        Yields:
            The classes as a slice, and their rows (block, d).

        Example:
            >>> [part for part, rows in Head(torch.eye(3)).centered_blocks()]
            [slice(0, 3, None)]
        """
        start = 0
        for rows in blocks(self.weight):
            part = slice(start, start + len(rows))
            yield part, rows - self.mean_row
            start = part.stop

    def centered(self) -> Head:
        """The same classifier with rows w_y - mean row and biases b_y - mean bias.

        Returns:
            A new head with its own storage.

        Example:
            >>> Head(torch.tensor([[3.0, 0.0], [1.0, 0.0]])).centered().weight
            tensor([[ 1.,  0.],
                    [-1.,  0.]])
        """
        bias = None if self.bias is None else self.bias - mean_row_of(self.bias[:, None]).to(self.bias)
        return self._derive(self.centered_weight().to(self.weight.dtype), bias)

    def rescaled(self, row_norm: float = 1 / math.sqrt(3)) -> tuple[Head, float]:
        """The same classifier in another unit of h: head(h) equals new(scale * h).

        Args:
            row_norm: What the mean norm of the new head's centered rows shall be.

        Returns:
            The new head (W / scale, b), and scale. The new head has no certificate, because the model's
            activations fit it only after they are multiplied by scale.

        Raises:
            ValueError: `row_norm` is not positive and finite, or all rows of W are equal.

        Example:
            >>> head = Head(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
            >>> new, scale = head.rescaled(row_norm=0.5)
            >>> new.weight, scale
            (tensor([[1.5000, 0.0000],
                    [0.5000, 0.0000]]), 2.0)
        """
        check_positive("row_norm", row_norm)
        mean = mean_row_of(self.weight)
        norms = torch.cat([(rows - mean).norm(dim=1) for rows in rows_in_double(self.weight)])
        norm = norms.mean().item()
        if norm <= rounding(self.weight) * mean.norm().item():
            raise ValueError("all rows of weight are equal, so no scale gives the centered rows a norm")
        scale = norm / row_norm
        return self._derive(self.weight / scale, self.bias, scale=scale), scale

    def with_temperature(self, temperature: float) -> Head:
        """The head of softmax(logits / temperature).

        Args:
            temperature: Above 1 makes the head less sure of itself, below 1 more.

        Returns:
            A new head (W / T, b / T) with its own storage; its ``temperature`` is the product of all.

        Raises:
            ValueError: `temperature` is not positive and finite.

        Example:
            >>> Head(torch.eye(2)).with_temperature(2.0).with_temperature(2.0).temperature
            4.0
        """
        check_positive("temperature", temperature)
        bias = None if self.bias is None else self.bias / temperature
        return self._derive(self.weight / temperature, bias, temperature=float(temperature))

    def with_bias(self, bias: Tensor | None) -> Head:
        """The same rows, shared, with another bias: what a change of the class prior does to a head.

        Args:
            bias: (K,), or None for no bias.

        Returns:
            A new head. It has no certificate, since the model's own logits are no longer its logits.

        Raises:
            TypeError: `bias` is no tensor.
            ValueError: `bias` has a wrong shape, dtype or device, or is not finite.

        Example:
            >>> Head(torch.eye(2)).with_bias(torch.tensor([0.0, 1.0]))(torch.zeros(2))
            tensor([0., 1.])
        """
        check_bias(bias, self.weight)
        head = self._derive(self.weight, bias)
        head.certificate = None
        return head

    def config(self) -> dict[str, Any]:
        """JSON facts that, with the buffers, rebuild this head in `from_config`.

        Example:
            >>> Head.from_config(Head(torch.eye(2)).config(), {"weight": torch.eye(2)})
            Head(num_classes=2, in_features=2, bias=False)
        """
        certificate = None if self.certificate is None else asdict(self.certificate)
        return {
            "certificate": certificate,
            "norm": self.norm,
            "radius": self.radius,
            "temperature": self.temperature,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
        """Rebuild a head from `config` and its buffers ``weight`` and, if it has one, ``bias``.

        Raises:
            KeyError: A part is missing.
            TypeError: A part is of the wrong kind.
            ValueError: The tensors, or the numbers in `config`, are no head's.
        """
        weight, bias = tensors["weight"], tensors.get("bias")
        if weight.ndim != 2 or len(weight) < 2 or weight.shape[1] < 1 or not weight.is_floating_point():
            raise ValueError(f"weight is {weight.dtype} of shape {tuple(weight.shape)}; expected floats (K, d), K >= 2")
        check_finite("weight", weight)
        check_bias(bias, weight)
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._hold(weight, bias)
        facts = config["certificate"]
        head.certificate = None
        if facts is not None:
            parts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
            head.certificate = HeadCertificate(**parts)
            str(head.certificate)  # so that a fact of the wrong kind is found here, not where a page is made
        head.norm, head.radius = config["norm"], config["radius"]
        head.temperature = config["temperature"]
        if head.norm not in ("layer", "rms", None):
            raise ValueError(f"norm is {head.norm!r}; it must be 'layer', 'rms' or None")
        if head.radius is not None:
            check_positive("radius", head.radius)
        check_positive("temperature", head.temperature)
        return head

    @torch.no_grad()
    def calibrate(self, logits: Tensor, labels: Tensor) -> Head:
        """The head at the temperature that makes held-out labels most likely.

        The mean negative log-likelihood is convex in 1/T; its minimum in [0.01, 100] is found by Newton's
        method, safeguarded by bisection, in float64.

        Args:
            logits: (N, K), what this head gives on held-out data.
            labels: (N,), integers in 0..K-1.

        Returns:
            ``with_temperature(T)`` for the best T.

        Raises:
            TypeError: `labels` are no integers.
            ValueError: Wrong shapes, no data, logits that are not finite, a label out of range, or a best T
                outside of [0.01, 100].

        Example:
            >>> head = Head(torch.tensor([[1.0], [-1.0]]))
            >>> h = torch.ones(4, 1)  # logits (1, -1), but a quarter of the labels is 1
            >>> round(head.calibrate(head(h), torch.tensor([0, 0, 0, 1])).temperature, 4)
            1.8205
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or len(logits) == 0:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; they must have (N, {self.num_classes}), N >= 1")
        check_labels(labels, logits.shape)
        check_finite("logits", logits)
        return self.with_temperature(1 / best_inverse_temperature(logits, labels.to(logits.device, torch.int64)))

    @property
    def rank(self) -> int:
        """The dimension q of the span of the centered rows, which is all that the softmax sees; <= K - 1."""
        return len(self.span())

    @torch.no_grad()
    def span(self) -> Tensor:
        """An orthonormal basis of the span of the centered rows, the widest direction first.

        Computed in float64 in blocks of rows, so that a large W needs no second copy, and kept until W
        changes. Directions whose singular value is below 8 eps ||W||_F, more than the rounding of W's entries
        brings about, do not count (eps of W's dtype; float32's for half precision, whose entries are taken
        as they are). Signs are such that the largest entry of a row is positive.

        Returns:
            (q, d), in W's dtype but at least float32, and on its device.

        Example:
            >>> Head(torch.tensor([[3.0, 5.0], [1.0, 5.0]])).span()
            tensor([[1., 0.]])
        """
        kept = self._span
        version = version_of(self.weight)
        if kept is None or kept[0] is not self.weight or kept[1] != version:
            with outside_transforms():
                self._span = kept = (self.weight, version, span_of(self.weight))
        return kept[2]

    def clone(self) -> Head:
        """The same head with its own storage, so that it no longer follows the model.

        Example:
            >>> head = Head(torch.eye(2))
            >>> head.clone().weight.data_ptr() == head.weight.data_ptr()
            False
        """
        return self._derive(self.weight.clone(), None if self.bias is None else self.bias.clone())

    def extra_repr(self) -> str:
        """The part of ``repr(head)`` between the brackets."""
        text = f"num_classes={self.num_classes}, in_features={self.in_features}, bias={self.bias is not None}"
        text += "" if self.norm is None else f", norm={self.norm!r}"
        return text if self.temperature == 1 else f"{text}, temperature={self.temperature:.4g}"

    def _apply(self, fn: Any, recurse: bool = True) -> Head:
        if self.certificate is not None and self.certificate.folded is not None:
            fn = _at_least_single(fn)  # what the fold computes, half precision could not hold
        super()._apply(fn, recurse)
        self._span = None  # it holds on to the weight as it was
        self.mean_row = _wide_mean_row(self.weight)  # which a move to half precision would have rounded
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sources": [], "_seen": []}  # a copy belongs to no model

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.mean_row = _wide_mean_row(self.weight)


def _at_least_single(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same move, but floating tensors stay in at least float32."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        narrow = new.is_floating_point() and torch.finfo(new.dtype).bits < 32
        return tensor.to(new.device, torch.promote_types(tensor.dtype, torch.float32)) if narrow else new

    return moved


def _wide_mean_row(weight: Tensor) -> Tensor:
    """The mean row in at least float32: rounded to half precision it would tilt every class."""
    return mean_row_of(weight).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
