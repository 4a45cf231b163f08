"""Record of one forward of a model: every product that could be its head."""

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

# --- Functions between the products and the output ----------------------------------------------------------


_SQUASHING = frozenset(
    "softmax softmin sigmoid logsigmoid tanh relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus "
    "softsign hardtanh hardsigmoid hardswish threshold glu sin cos tan atan arctan sinh cosh asinh arcsinh erf exp "
    "expm1 log log1p sqrt rsqrt pow square abs layer_norm rms_norm group_norm instance_norm normalize".split()
)


class Lineage:
    """Follows tensors that depend on a product, and remembers the non-affine function that was applied to them.

    For small values even a soft cap looks affine, so the values alone do not show such a function.
    """

    def __init__(self) -> None:
        # For each tensor that depends on a product: the name of the function, or None.
        self._squashed_by: dict[Key, str | None] = {}

    def record_function(
        self, func: Any, operands: Sequence[Key | None], outputs: Sequence[Tensor], *, product: bool
    ) -> None:
        """Record a torch function, with the keys of its operands before the call and the tensors that it wrote."""
        known = [self._squashed_by[key] for key in operands if key is not None and key in self._squashed_by]
        if product:
            status = None
        elif not known:
            return
        else:
            name = getattr(func, "__name__", "").strip("_")
            status = next((squash for squash in known if squash is not None), None)
            # The logarithm of a softmax gives log-probabilities, which are allowed.
            if name == "log" and status == "softmax":
                status = None
            elif status is None and name in _SQUASHING:
                status = name
        for tensor in outputs:
            key = key_of(tensor)
            if key is not None and (product or key not in operands):
                self._squashed_by[key] = status

    def squashed_by(self, output: Tensor) -> str | None:
        """Return the non-affine function that was applied to an output after its last product, or None."""
        key = key_of(output)
        return None if key is None else self._squashed_by.get(key)


# --- Candidates ---------------------------------------------------------------------------------------------

# Number of candidates that are kept for each number of classes. They hold activations, and the head is one of the last.
_MAX_CANDIDATES = 32


class ProductCall(NamedTuple):
    """A product that was computed, without its tensors.

    Attributes:
        modules: Names of the modules that were running.
        signature: That of the product.
        address: Memory address of W.
        operand: Identity of the tensor that was given as W.
    """

    modules: frozenset[str]
    signature: tuple[int, int, bool]
    address: int
    operand: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """A product that could give the logits.

    Attributes:
        product: The product; its h is a copy, so that later in-place operations do not change it.
        path: Name of the innermost module that was running.
        number: Number of products that the model had computed before.
        origin: Origin of h.
        stride: Stride of h along d.
        rectified: Whether h is max(u, 0) of the input u of a ReLU.
    """

    product: Product
    path: str
    number: int
    origin: Origin | None
    stride: int
    rectified: bool


class Recorder(TorchFunctionMode):
    """Records the products of one forward of a model, and the origins of their activations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules() if not is_scripted(module)}
        self._hooks = ExitStack()
        # Names of the running modules, and the keys of their inputs.
        self._running: list[tuple[str, Key | None]] = []
        self._calls: list[ProductCall] = []
        self._origins = Origins()
        self._lineage = Lineage()
        self._rectifiers = Rectifiers()
        self.candidates: defaultdict[int, deque[Candidate]] = defaultdict(lambda: deque(maxlen=_MAX_CANDIDATES))

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
        is_product = False
        for product in products(func, args, kwargs):
            u = self._rectifiers.pre_activation_of(product, func, args, kwargs)
            self._add_candidate(product, rectified=is_rectified(u, product.h))
            is_product = True
        operands = list(tensors_in([*args, *kwargs.values()]))
        # The keys are taken before the call, which may change operands in place.
        keys = [key_of(operand) for operand in operands]
        source = self._origin_of(max(operands, key=Tensor.numel, default=None))
        output = self._rectifiers.run(func, args, kwargs)
        self._origins.record_function(func, source, output)
        changed = [operand for operand, key in zip(operands, keys, strict=True) if key_of(operand) != key]
        self._lineage.record_function(func, keys, [*tensors_in([output]), *changed], product=is_product)
        return output

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        self._running.append((self._names[module], None if x is None else key_of(x)))

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        path, key = self._running.pop()
        self._origins.record_module(module, path, first_input(args, kwargs), key, output)

    def squashed_by(self, output: Tensor) -> str | None:
        """Return the non-affine function that was applied to an output after its last product, or None."""
        return self._lineage.squashed_by(output)

    def _origin_of(self, tensor: Tensor | None) -> Origin | None:
        return None if tensor is None else self._origins.get(key_of(tensor))

    def earlier_calls_in_module(self, candidate: Candidate, *, by_address: bool) -> int:
        """Count the earlier products in the candidate's module with its signature, and with its W if `by_address`."""
        own_call = self._calls[candidate.number]
        return sum(
            candidate.path in call.modules
            and call.signature == own_call.signature
            and not (by_address and call.address != own_call.address)
            for call in self._calls[: candidate.number]
        )

    def earlier_calls_in_model(
        self, candidate: Candidate, *, by_address: bool = False, by_operand: bool = False
    ) -> int:
        """Count the earlier products in the model with its signature, and with its W or the same operand if asked."""
        own_call = self._calls[candidate.number]
        return sum(
            call.signature == own_call.signature
            and not (by_address and call.address != own_call.address)
            and not (by_operand and call.operand != own_call.operand)
            for call in self._calls[: candidate.number]
        )

    def _add_candidate(self, product: Product, *, rectified: bool) -> None:
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
        modules = frozenset({*running, ""})
        self._calls.append(ProductCall(modules, product.signature, address, id(product.operand)))
        self.candidates[product.weight.shape[0]].append(candidate)
