"""One differentiable forward that gives activations and logits."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from penult.head import Head
from penult.head._capture import capture
from penult.head._model import submodule, unwrap

__all__ = ["Tap"]


@final
class Tap(nn.Module):
    """A model with its penultimate activations laid open: x -> (h, logits) in one differentiable forward.

    The model runs as it is, in whatever mode it is in, and is watched for the time of one call where the certificate
    says that its head is computed; nothing is left behind, also when the model raises. Classes are last in the
    logits and dimensions last in h, whatever the order in the model, and both have the positions of the logits:
    (B, H, W, d) and (B, H, W, K) for a pixel-wise head, (B, T, d) and (B, T, K) for one a token, (B, d) and (B, K)
    where the model pools or picks tokens after its head. ``tap.axes`` names the axes. For a head with a folded norm
    layer, h is the vector before that layer's gain and offset, so that ``head(h)`` gives the logits (for a model
    that returns log-probabilities, up to a number a sample).

    ``torch.compile(tap)`` works where it does for the model.

    Args:
        model: The classifier; DataParallel, DistributedDataParallel and torch.compile wrappers are opened,
            because calls inside them cannot be watched.
        head: Its head, from `find_head`. The logits of the tap are the model's own; those of a head at another
            temperature differ from them by that factor.

    Raises:
        TypeError: The model is no module or cannot be watched.
        ValueError: The head has no certificate, or the model has no such module, or another weight there.

    Example:
        >>> from penult.head import find_head
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> tap = Tap(model, find_head(model, x))
        >>> h, logits = tap(x)
        >>> h.shape, torch.allclose(tap.head(h), logits)
        (torch.Size([5, 8]), True)
        >>> tap.axes
        ('batch',)
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        if head.certificate is None:
            raise ValueError(
                "this head has no certificate, so nothing says where it sits in the model: use the head that "
                "penult.find_head(model, batch) gives (a rescaled head reads scaled activations and has none)"
            )
        self.model = unwrap(model)
        self.head = head
        certificate = head.certificate
        submodule(self.model, certificate.path)
        if certificate.weight is not None:
            tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            weight = tensors.get(certificate.weight)
            classes, features = certificate.shape
            if weight is None or weight.numel() != classes * features:
                what = "no such tensor" if weight is None else f"one of shape {tuple(weight.shape)}"
                raise ValueError(
                    f"the head was found as {certificate.shape} with the weight {certificate.weight!r}, but the model "
                    f"has {what}: the head belongs to another model"
                )

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of h and logits before the last, such as ``("batch", "height", "width")``."""
        assert self.head.certificate is not None
        return self.head.certificate.axes

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes by keyword.

        Returns:
            h (*S, d) and the model's logits (*S, K), both part of the autograd graph.

        Raises:
            RuntimeError: The head did not run in this forward.
            TypeError: The model's output holds no logits.
        """
        assert self.head.certificate is not None
        return capture(self.model, self.head.certificate, args, kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Tap:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        shared = {
            name: (source, held.size(), held.stride(), held.storage_offset())
            for name in ("weight", "bias")
            if (held := getattr(self.head, name)) is not None
            and (source := next((t for t in tensors if t.data_ptr() == held.data_ptr()), None)) is not None
        }
        super()._apply(fn, recurse)
        for name, (source, *place) in shared.items():  # moved apart by now, but W shall take memory once
            setattr(self.head, name, source.detach().as_strided(*place))
        return self
