"""The softmax head as a module."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult._checks import (
    as_activations,
    check_bias,
    check_choice,
    check_finite,
    check_positive,
    check_weight,
    index_of,
)
from penult._row_blocks import (
    blocks,
    mean_row_of,
    rounding,
    rows_in_double,
    span_of,
    state_of,
    states_of,
)
from penult.head._calibration import calibration
from penult.head._certificate import HeadCertificate
from penult.head._tensors import HeadTensors
from penult.special import in_full, outside_transforms

__all__ = ["Head"]


@final
class Head(HeadTensors):
    """A softmax head: logits = W h + b.

    The head shares the memory of W and b with the model, detached: it needs no memory of its own, and changes if the
    model is trained further. (A head that `find_head` had to compute, with a scale or the gain of a norm folded in,
    does not: find it again.) Loading a state dict into the head also changes the model; use `clone` to avoid that.
    ``version`` counts the changes of W.

    Args:
        weight: (K, d), one row w_y for each class, K >= 2; any floating dtype.
        bias: (K,), or None for no bias.
        certificate: How the head was found, see `find_head`.
        norm: ``"layer"`` or ``"rms"`` if h is the output of a LayerNorm or RMSNorm without affine part, so
            that it lies on the sphere of radius sqrt(d) (and sum(h) = 0 for ``"layer"``); None if not.

    Attributes:
        weight: (K, d).
        bias: (K,) or None.
        mean_row: (d,), the mean of the rows, which does not change the softmax; computed when the head is built or
            loaded.
        certificate: The argument.
        norm: The argument.
        radius: Radius of the sphere on which h lies when `norm` is given, else None.
        temperature: Product of the temperatures that the head was divided by; 1 for a new head.
        class_names: K names of the classes, or None; may be set.
        preprocessing: How the inputs of the network are prepared, as JSON values, or None; may be set.

    Raises:
        TypeError: `weight` or `bias` is not a floating tensor.
        ValueError: A wrong shape, fewer than two classes, NaN or infinity, an all-zero row, or a bias that
            differs from the weight in dtype or device.

    Example:
        >>> head = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0.0, 1.0, 0.0]))
        >>> head(torch.tensor([2.0, 3.0]))
        tensor([ 2.,  4., -2.])
        >>> head
        Head(num_classes=3, in_features=2, bias=True)
    """

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
        check_choice("norm", norm, ("layer", "rms", None))
        self._set_tensors(weight, bias)
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
        """Build the head of a model, in which some rows may be zero, as those of padding tokens.

        Args:
            weight: (K, d).
            bias: (K,) or None.
            norm: As for `Head`.
            sources: The model's tensors that W and b were computed from; ``version`` counts their changes, too.
        """
        check_weight(weight, empty_rows=True)
        check_bias(bias, weight)
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._set_tensors(weight, bias)
        head.certificate, head.norm, head.temperature = None, norm, 1.0
        head.radius = None if norm is None else math.sqrt(head.in_features)
        head._sources = [weakref.ref(source) for source in sources]
        head._seen = states_of(sources)
        return head

    def _derive(self, weight: Tensor, bias: Tensor | None, scale: float = 1.0, temperature: float = 1.0) -> Head:
        """Build a head of the same classes with other tensors, which are not checked: centered rows may be zero."""
        head = Head.__new__(Head)
        nn.Module.__init__(head)
        head._set_tensors(weight, bias)
        # If h is scaled, the head no longer reads the model's own activations.
        head.certificate = self.certificate if scale == 1.0 else None
        head.norm = self.norm
        head.radius = None if self.radius is None else self.radius * scale
        head.temperature = self.temperature * temperature
        head._sources, head._seen = list(self._sources), list(self._seen)
        head._describe_like(self)
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
        """The bias b (K,), or zeros if the head has none."""
        return self.weight.new_zeros(self.num_classes) if self.bias is None else self.bias

    @property
    def version(self) -> tuple[int, ...]:
        """Changes whenever W, b or a tensor of the model that they were computed from changes.

        It consists of the version counter and a digest of at most 4096 values of each tensor, so that writes through
        ``.data`` or a NumPy view to other values are not seen; and it changes if a `Tap` finds that its model has
        another W.
        """
        return self._states()

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits of activations.

        Args:
            h: (..., d).

        Returns:
            W h + b, (..., K).

        Raises:
            TypeError: `h` is neither a floating-point tensor nor an array of floats.
            ValueError: The last dimension of `h` is not d, or its dtype is not the head's.
        """
        h = as_activations(h, shape=f"(..., {self.in_features})", device=self.weight.device)
        if h.ndim == 0 or h.shape[-1] != self.in_features:
            raise ValueError(f"h has shape {tuple(h.shape)}; expected activations of shape (..., {self.in_features})")
        if h.dtype != self.weight.dtype and not torch.is_autocast_enabled(h.device.type):
            raise ValueError(
                f"h is {h.dtype}; expected {self.weight.dtype}. Use torch.as_tensor(h, dtype=head.weight.dtype)"
            )
        return F.linear(h, self.weight, self.bias)

    def centered_logits(self, h: Tensor) -> Tensor:
        """Return the logits of the centered rows, which have the same softmax, without a copy of W.

        Unlike the model's own logits, they are computed in the dtype of `h` even under torch.autocast.

        Args:
            h: (..., d), in any floating dtype. If it is not that of W, rows are converted block by block.

        Returns:
            (W - mean row) h + b, (..., K), in the dtype of `h`.

        Raises:
            ValueError: The last dimension of `h` is not d.

        Example:
            >>> head = Head(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
            >>> head.centered_logits(torch.tensor([1.0, 5.0]))
            tensor([ 1., -1.])
        """
        h = as_activations(h, shape=f"(..., {self.in_features})", device=self.weight.device)
        with in_full(h.device):
            if h.dtype == self.weight.dtype or h.shape[-1:] != (self.in_features,):
                return self.forward(h) - (h.to(self.mean_row.dtype) @ self.mean_row).to(h.dtype).unsqueeze(-1)
            parts = [F.linear(h, rows.to(h.dtype)) for _, rows in self.centered_blocks()]
            return torch.cat(parts, dim=-1) + self.full_bias.to(h.dtype)

    def centered_weight(self, index: Tensor | slice | int | None = None) -> Tensor:
        """Return the centered rows w_y - mean row.

        Args:
            index: Index of the rows; only a bool tensor is a mask. Default: all rows, which need as much memory as W.

        Returns:
            (K, d), or (*index.shape, d); float32 for a head of half precision.

        Example:
            >>> Head(torch.tensor([[3.0, 0.0], [1.0, 0.0]])).centered_weight(torch.tensor([1]))
            tensor([[-1.,  0.]])
        """
        self._follow()
        rows = self.weight if index is None else self.weight[index_of(index)]
        return rows - self.mean_row

    def centered_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the centered rows in blocks, so that a pass over all rows needs no copy of W.

        Yields:
            The classes as a slice, and their rows (block, d).

        Example:
            >>> [part for part, rows in Head(torch.eye(3)).centered_blocks()]
            [slice(0, 3, None)]
        """
        self._follow()
        start = 0
        for rows in blocks(self.weight):
            part = slice(start, start + len(rows))
            yield part, rows - self.mean_row
            start = part.stop

    def centered(self) -> Head:
        """Return the same classifier with rows w_y - mean row and biases b_y - mean bias.

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
        """Return the same classifier for rescaled h: head(h) equals new(scale * h).

        Args:
            row_norm: Mean norm of the centered rows of the new head.

        Returns:
            The new head (W / scale, b), and scale. The new head has no certificate, because it reads the model's
            activations only after they are multiplied by scale.

        Raises:
            ValueError: `row_norm` is not positive and finite, or all rows of W are equal.

        Example:
            >>> head = Head(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
            >>> new, scale = head.rescaled(row_norm=0.5)
            >>> new.weight, scale
            (tensor([[1.5000, 0.0000],
                    [0.5000, 0.0000]]), 2.0)
        """
        row_norm = check_positive("row_norm", row_norm)
        mean = mean_row_of(self.weight)
        norms = torch.cat([(rows - mean).norm(dim=1) for rows in rows_in_double(self.weight)])
        norm = norms.mean().item()
        if norm <= rounding(self.weight) * mean.norm().item():
            raise ValueError("all rows of weight are equal, so the centered rows are zero and cannot be scaled")
        scale = norm / row_norm
        return self._derive(self.weight / scale, self.bias, scale=scale), scale

    def with_temperature(self, temperature: float) -> Head:
        """Return the head of softmax(logits / temperature).

        Args:
            temperature: Values above 1 make the head less confident, values below 1 more confident.

        Returns:
            A new head (W / T, b / T) with its own storage; its ``temperature`` is the product of all temperatures.

        Raises:
            ValueError: `temperature` is not positive and finite.

        Example:
            >>> Head(torch.eye(2)).with_temperature(2.0).with_temperature(2.0).temperature
            4.0
        """
        temperature = check_positive("temperature", temperature)
        bias = None if self.bias is None else self.bias / temperature
        return self._derive(self.weight / temperature, bias, temperature=temperature)

    def with_bias(self, bias: Tensor | None) -> Head:
        """Return a head with the same rows, shared, and another bias, as for another class prior.

        Args:
            bias: (K,), or None for no bias.

        Returns:
            A new head. It has no certificate, since the model's own logits are no longer its logits.

        Raises:
            TypeError: `bias` is not a tensor.
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
        """Return JSON facts from which, together with the buffers, `from_config` rebuilds this head.

        Example:
            >>> Head.from_config(Head(torch.eye(2)).config(), {"weight": torch.eye(2)})
            Head(num_classes=2, in_features=2, bias=False)
        """
        certificate = None if self.certificate is None else asdict(self.certificate)
        # Files of heads of one product in a model are those of earlier versions.
        if certificate is not None:
            for name in ("parts", "origin"):
                if not certificate[name]:
                    del certificate[name]
        facts = {"norm": self.norm, "radius": self.radius, "temperature": self.temperature}
        return {"certificate": certificate, **facts, **self._descriptions()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
        """Rebuild a head from `config` and its buffers ``weight`` and, if it has one, ``bias``.

        Raises:
            KeyError: A part is missing.
            TypeError: A part has a wrong type.
            ValueError: The tensors, or the numbers in `config`, are not valid for a head.
        """
        weight, bias = tensors["weight"], tensors.get("bias")
        if weight.ndim != 2 or len(weight) < 2 or weight.shape[1] < 1 or not weight.is_floating_point():
            raise ValueError(f"weight is {weight.dtype} of shape {tuple(weight.shape)}; expected floats (K, d), K >= 2")
        check_finite("weight", weight)
        check_bias(bias, weight)
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._set_tensors(weight, bias)
        facts = config["certificate"]
        head.certificate = None
        if facts is not None:
            parts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
            head.certificate = HeadCertificate(**parts)
            # Formatting raises an error for facts of a wrong type, here and not later when a page is written.
            str(head.certificate)
        head.norm, head.radius = config["norm"], config["radius"]
        head.temperature = config["temperature"]
        check_choice("norm", head.norm, ("layer", "rms", None))
        if head.radius is not None:
            check_positive("radius", head.radius)
        check_positive("temperature", head.temperature)
        head.class_names, head.preprocessing = config.get("class_names"), config.get("preprocessing")
        return head

    @torch.no_grad()
    def calibrate(self, logits: Tensor, labels: Tensor, *, biases: bool = False) -> Head:
        r"""Return the head whose temperature, and class biases if wanted, make held-out labels most likely.

        Without biases, the mean negative log-likelihood is minimised over 1/T in [0.01, 100], in float64. With biases
        (bias-corrected temperature scaling), softmax(logits / T + c) has one more number for each class, with a penalty
        of ½‖c‖² on the sum over rows. :meth:`GenerativePair.estimate_prior` needs the biases.

        References:
            Alexandari, Kundaje and Shrikumar, "Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat at
            Label Shift Adaptation", ICML 2020.

        Args:
            logits: (N, K), the logits of this head on held-out data.
            labels: (N,), integers in 0..K-1.
            biases: Whether to fit class biases as well.

        Returns:
            ``with_temperature(T)`` for the best T, with c added to its bias.

        Raises:
            TypeError: `labels` are not integers.
            ValueError: Wrong shapes, no data, logits that are not finite, a label out of range, or a best T
                outside of [0.01, 100].

        Example:
            >>> head = Head(torch.tensor([[1.0], [-1.0]]))
            >>> h = torch.ones(4, 1)  # logits (1, -1), but a quarter of the labels is 1
            >>> round(head.calibrate(head(h), torch.tensor([0, 0, 0, 1])).temperature, 4)
            1.8205
        """
        temperature, class_biases = calibration(logits, labels, self.num_classes, biases)
        if class_biases is None:
            return self.with_temperature(temperature)
        bias = self.full_bias / temperature + class_biases.to(self.weight)
        return self._derive(self.weight / temperature, bias, temperature=temperature)

    @property
    def rank(self) -> int:
        """Dimension q <= K - 1 of the span of the centered rows, the only part of h that changes the softmax."""
        return len(self.span())

    @torch.no_grad()
    def span(self) -> Tensor:
        """Return an orthonormal basis of the span of the centered rows, in order of decreasing singular values.

        Computed in float64 in blocks of rows, so that a large W needs no second copy, and cached until W changes.
        Directions with a singular value below 8 eps ||W||_F are left out, since rounding of W's entries can cause them
        (eps of W's dtype; that of float32 for half precision, whose entries count as exact). The largest entry of each
        row is positive.

        Returns:
            (q, d), in W's dtype but at least float32, and on its device.

        Example:
            >>> Head(torch.tensor([[3.0, 5.0], [1.0, 5.0]])).span()
            tensor([[1., 0.]])
        """
        cached = self._span
        with outside_transforms():
            state = state_of(self.weight)
            if cached is None or cached[0] is not self.weight or cached[1] != state:
                self._span = cached = (self.weight, state, span_of(self.weight))
        return cached[2]

    def clone(self) -> Head:
        """Return a copy with its own storage, which does not change with the model.

        Example:
            >>> head = Head(torch.eye(2))
            >>> head.clone().weight.data_ptr() == head.weight.data_ptr()
            False
        """
        head = self._derive(self.weight.clone(), None if self.bias is None else self.bias.clone())
        head._sources, head._seen = [], []
        return head

    def extra_repr(self) -> str:
        """Return the part of ``repr(head)`` between the brackets."""
        text = f"num_classes={self.num_classes}, in_features={self.in_features}, bias={self.bias is not None}"
        text += "" if self.norm is None else f", norm={self.norm!r}"
        return text if self.temperature == 1 else f"{text}, temperature={self.temperature:.4g}"
