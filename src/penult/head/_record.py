"""What a model computes in one forward: every product that could be its head."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penult.head._model import first_input
from penult.head._origin import Key, Origin, Origins, key_of, tensors_in
from penult.head._products import Product, products

__all__ = ["Candidate", "Recorder"]

_KEPT = 8  # a number of classes; each holds activations, and the head is among the last


@dataclass(frozen=True, eq=False)
class Candidate:
    """A product that could make the logits.

    Attributes:
        product: The product; its h is a copy, safe from what the model does next.
        path: Name of the innermost module that was running.
        call: How many products of this shape and order the module had computed before.
        forward_call: And the model.
        origin: What made h.
        stride: Stride of h along d.
    """

    product: Product
    path: str
    call: int
    forward_call: int
    origin: Origin | None
    stride: int


class Recorder(TorchFunctionMode):
    """Watches one forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._hooks = ExitStack()
        self._running: list[tuple[str, Key | None]] = []  # modules, and the key of what each reads
        self._count: Counter[tuple[str, tuple[int, int, bool]]] = Counter()
        self._origins = Origins()
        self.candidates: defaultdict[int, deque[Candidate]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def __enter__(self) -> Recorder:
        with ExitStack() as hooks:
            for module in self._names:
                hooks.callback(module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._end, with_kwargs=True).remove)
            self._hooks = hooks.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        for product in products(func, args, kwargs):
            self._candidate(product)
        operands = tensors_in([*args, *kwargs.values()])
        source = self._origin_of(max(operands, key=Tensor.numel, default=None))  # before an in-place change
        output = func(*args, **kwargs)
        self._origins.function(func, source, output)
        return output

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        self._running.append((self._names[module], None if x is None else key_of(x)))

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        path, key = self._running.pop()
        self._origins.module(module, path, first_input(args, kwargs), key, output)

    def squashed_by(self, output: Tensor) -> str | None:
        """The function, not affine, by which the model makes its output of a product; None if there is none."""
        origin = self._origin_of(output)
        return None if origin is None else origin.squashed_by

    def _origin_of(self, tensor: Tensor | None) -> Origin | None:
        return None if tensor is None else self._origins.of(key_of(tensor))

    def _candidate(self, product: Product) -> None:
        running = [path for path, _ in self._running] or [""]
        candidate = Candidate(
            product=product._replace(h=product.h.detach().clone()),
            path=running[-1],
            call=self._count[running[-1], product.place],
            forward_call=self._count["", product.place],
            origin=Origin("normalize", None, None) if product.kind == "cosine" else self._origin_of(product.h),
            stride=product.h.stride(-1) if product.h.ndim else 1,
        )
        self._count.update((name, product.place) for name in {*running, ""})
        self.candidates[product.weight.shape[0]].append(candidate)
