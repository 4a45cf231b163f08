"""What a model computes in one forward: every product that could be its head."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penult.head._model import first_input, is_scripted
from penult.head._origin import Key, Origin, Origins, key_of, tensors_in
from penult.head._products import Product, products
from penult.head._rectified import Rectifiers, is_rectified

__all__ = ["Candidate", "Lineage", "Recorder"]

# --- What became of products on the way to the output -------------------------------------------------------


_SQUASHING = frozenset(
    "softmax softmin sigmoid logsigmoid tanh relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus "
    "softsign hardtanh hardsigmoid hardswish threshold glu sin cos tan atan arctan sinh cosh asinh arcsinh erf exp "
    "expm1 log log1p sqrt rsqrt pow square abs layer_norm rms_norm group_norm instance_norm normalize".split()
)


class Lineage:
    """Follows tensors that came of a product, and remembers a function, not affine, that they went through.

    Where values are small even a soft cap looks affine, so that their numbers alone do not tell.
    """

    def __init__(self) -> None:
        self._squashed_by: dict[Key, str | None] = {}  # of what came of a product

    def function(self, func: Any, operands: Sequence[Key | None], made: Sequence[Tensor], *, product: bool) -> None:
        """A torch function made, or changed in place, some tensors, of operands that had these keys before."""
        known = [self._squashed_by[key] for key in operands if key is not None and key in self._squashed_by]
        if product:
            status = None
        elif not known:
            return
        else:
            name = getattr(func, "__name__", "").strip("_")
            status = next((squash for squash in known if squash is not None), None)
            if name == "log" and status == "softmax":
                status = None  # log-probabilities
            elif status is None and name in _SQUASHING:
                status = name
        for tensor in made:
            key = key_of(tensor)
            if key is not None and (product or key not in operands):
                self._squashed_by[key] = status

    def squashed_by(self, output: Tensor) -> str | None:
        """The function that an output went through after its last product, if it is not affine."""
        key = key_of(output)
        return None if key is None else self._squashed_by.get(key)


_KEPT = 32  # of each number of classes: they hold activations, and the head is among the last


class Call(NamedTuple):
    """A product that was computed, without its tensors."""

    modules: frozenset[str]  # that were running
    place: tuple[int, int, bool]
    address: int  # of W
    operand: int  # identity of the tensor that was given as W


@dataclass(frozen=True, eq=False)
class Candidate:
    """A product that could make the logits.

    Attributes:
        product: The product; its h is a copy, safe from what the model does next.
        path: Name of the innermost module that was running.
        number: How many products the model had computed before.
        origin: What made h.
        stride: Stride of h along d.
        rectified: Whether h is max(u, 0) of what a ReLU read.
    """

    product: Product
    path: str
    number: int
    origin: Origin | None
    stride: int
    rectified: bool


class Recorder(TorchFunctionMode):
    """Watches one forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules() if not is_scripted(module)}
        self._hooks = ExitStack()
        self._running: list[tuple[str, Key | None]] = []  # modules, and the key of what each reads
        self._calls: list[Call] = []
        self._origins = Origins()
        self._lineage = Lineage()
        self._rectifiers = Rectifiers()
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
        found = False
        for product in products(func, args, kwargs):
            u = self._rectifiers.read_by(product, func, args, kwargs)
            self._candidate(product, rectified=is_rectified(u, product.h))
            found = True
        operands = list(tensors_in([*args, *kwargs.values()]))
        keys = [key_of(operand) for operand in operands]  # before an in-place change
        source = self._origin_of(max(operands, key=Tensor.numel, default=None))
        output = self._rectifiers.run(func, args, kwargs)
        self._origins.function(func, source, output)
        changed = [operand for operand, key in zip(operands, keys, strict=True) if key_of(operand) != key]
        self._lineage.function(func, keys, [*tensors_in([output]), *changed], product=found)
        return output

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        self._running.append((self._names[module], None if x is None else key_of(x)))

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        path, key = self._running.pop()
        self._origins.module(module, path, first_input(args, kwargs), key, output)

    def squashed_by(self, output: Tensor) -> str | None:
        """The function, not affine, that the output went through after its last product; None if there is none."""
        return self._lineage.squashed_by(output)

    def _origin_of(self, tensor: Tensor | None) -> Origin | None:
        return None if tensor is None else self._origins.of(key_of(tensor))

    def before(self, candidate: Candidate, *, by_address: bool) -> int:
        """How many products like this one its module had computed before, told by place and perhaps by W."""
        mine = self._calls[candidate.number]
        return sum(
            candidate.path in call.modules
            and call.place == mine.place
            and not (by_address and call.address != mine.address)
            for call in self._calls[: candidate.number]
        )

    def before_in_model(self, candidate: Candidate, *, by_address: bool = False, by_operand: bool = False) -> int:
        """How many the model had, told by place and perhaps by W, or by the very tensor that was given as W."""
        mine = self._calls[candidate.number]
        return sum(
            call.place == mine.place
            and not (by_address and call.address != mine.address)
            and not (by_operand and call.operand != mine.operand)
            for call in self._calls[: candidate.number]
        )

    def _candidate(self, product: Product, *, rectified: bool) -> None:
        running = [path for path, _ in self._running] or [""]
        candidate = Candidate(
            product=product._replace(h=product.h.detach().clone()),
            path=running[-1],
            number=len(self._calls),
            origin=Origin("normalize", None, None) if product.kind == "cosine" else self._origin_of(product.h),
            stride=product.h.stride(-1) if product.h.ndim else 1,
            rectified=rectified,
        )
        address = product.operand.data_ptr()
        self._calls.append(Call(frozenset({*running, ""}), product.place, address, id(product.operand)))
        self.candidates[product.weight.shape[0]].append(candidate)
