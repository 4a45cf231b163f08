"""Record of one forward of a model: every product that could be its head."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from penult.head._certificate import Positions
from penult.head._foreign import in_memory, name_of, tensors_in
from penult.head._model import first_input, is_scripted
from penult.head._origin import PASS_THROUGH, Key, Origin, Origins, key_of
from penult.head._products import ElementwiseProducts, Product, Signature, products
from penult.head._rectified import Rectifiers, is_rectified

__all__ = ["Candidate", "Lineage", "Recorder", "Steps"]

# --- Functions between the products and the output ----------------------------------------------------------


_SQUASHING = frozenset(
    "softmax softmin sigmoid logsigmoid tanh relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus "
    "softsign hardtanh hardsigmoid hardswish threshold glu sin cos tan atan arctan sinh cosh asinh arcsinh erf exp "
    "expm1 log log1p sqrt rsqrt pow square abs layer_norm rms_norm group_norm instance_norm normalize".split()
)


# Functions that apply one map to every value, or move, average or join values. After any other function, an output need
# not be what a squashing function made of the last product that was read: the function may be the head itself.
_READ_THROUGH = (
    PASS_THROUGH
    | _SQUASHING
    | frozenset(
        "add radd sub rsub mul rmul div rdiv truediv rtruediv neg mean sum avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d stack cat concat concatenate hstack vstack "
        "interpolate upsample masked_fill where clamp clip clamp_min clamp_max log_softmax pad constant_pad_nd split "
        "chunk unbind tensor_split iter roll flip detach requires_grad setitem getitem get copy".split()
    )
)


class Steps(NamedTuple):
    """Functions that were applied to a tensor after its last product.

    Attributes:
        squashed_by: The first non-affine function, or None.
        unread: The last function of unknown effect: neither elementwise, nor one that only moves values, nor a
            recognised product. None if there is none.
        products: Numbers of the products that the tensor depends on without another product in between.
    """

    squashed_by: str | None = None
    unread: str | None = None
    products: frozenset[int] = frozenset()


class Lineage:
    """Follows tensors that depend on a product, and remembers the functions that were applied to them.

    For small values even a soft cap looks affine, so the values alone do not show such a function.
    """

    def __init__(self) -> None:
        # For each tensor that depends on a product.
        self._steps: dict[Key, Steps] = {}

    def record_function(
        self,
        func: Any,
        operands: Sequence[Key | None],
        outputs: Sequence[Tensor],
        *,
        products: frozenset[int],
        elementwise: bool,
    ) -> None:
        """Record a torch function.

        Args:
            func: The function.
            operands: Keys of its operands before the call.
            outputs: The tensors that it wrote.
            products: Numbers of the products as which it was read.
            elementwise: Whether it multiplied two tensors, which is a step of some products.
        """
        known = [self._steps[key] for key in operands if key is not None and key in self._steps]
        if products:
            steps = Steps(products=products)
        elif not known:
            return
        else:
            name = name_of(func).strip("_")
            squash = next((steps.squashed_by for steps in known if steps.squashed_by is not None), None)
            unread = next((steps.unread for steps in known if steps.unread is not None), None)
            # The logarithm of a softmax gives log-probabilities, which are allowed.
            if name == "log" and squash == "softmax":
                squash = None
            elif squash is None and name in _SQUASHING:
                squash = name
            before = frozenset().union(*(steps.products for steps in known))
            steps = Steps(squash, name if elementwise or name not in _READ_THROUGH else unread, before)
        for tensor in outputs:
            key = key_of(tensor)
            if key is not None and (products or key not in operands):
                self._steps[key] = steps

    def steps_to(self, output: Tensor) -> Steps:
        """Return the functions that were applied to an output after its last product."""
        key = key_of(output)
        return Steps() if key is None else self._steps.get(key, Steps())


# --- Candidates ---------------------------------------------------------------------------------------------

# Number of candidates that are kept for each number of classes. They hold activations, and the head is one of the last.
_MAX_CANDIDATES = 32

# More are kept while they hold fewer values in total, for heads that run once for each sample or token.
_MAX_SMALL_CANDIDATES, _MAX_VALUES = 4096, 2**22


class ProductCall(NamedTuple):
    """A product that was computed, without its tensors.

    Attributes:
        path: Name of the innermost module that was running.
        modules: Names of the modules that were running.
        signature: Signature of the product, see `Product.signature`.
        address: Memory address of W.
        operand: Identity of the tensor that was given as W.
    """

    path: str
    modules: frozenset[str]
    signature: Signature
    address: int
    operand: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """A product that could give the logits.

    Attributes:
        product: The product; its h is a copy, so that later in-place operations do not change it.
        path: Name of the innermost module that was running.
        number: Number of products that the model had computed before.
        dtype: Type of the output, which under torch.autocast is not that of h and W.
        origin: Origin of h.
        stride: Stride of h along d.
        rectified: Whether h is max(u, 0) of the input u of a ReLU.
        pieces: How h was joined from the calls of this W; None if it is the h of one call.
    """

    product: Product
    path: str
    number: int
    dtype: torch.dtype
    origin: Origin | None
    stride: int
    rectified: bool
    pieces: Positions | None = None

    @property
    def eps(self) -> float:
        """The coarsest rounding of h, W and the output."""
        dtypes = (self.dtype, self.product.h.dtype, self.product.weight.dtype)
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def values(self, h: Tensor | None = None) -> Tensor:
        """Return W h + b, (..., K), for the recorded or other activations (..., d), as the model computed it."""
        product = self.product
        weight, bias = product.weight.detach(), None if product.bias is None else product.bias.detach()
        h = product.h if h is None else h
        return F.linear(h.to(self.dtype), weight.to(self.dtype), None if bias is None else bias.to(self.dtype))


def _is_uninitialized(module: Any) -> bool:
    """Whether a module is a lazy layer of torch that has no weights yet."""
    return isinstance(module, LazyModuleMixin) and bool(module.has_uninitialized_params())  # type: ignore[misc]


class Recorder(TorchFunctionMode):
    """Records the products of one forward of a model, and the origins of their activations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules() if not is_scripted(module)}
        self._hooks = ExitStack()
        # Another thread may run the same model; its calls are ignored.
        self._thread = threading.get_ident()
        # Names of the running modules, and the keys of their inputs.
        self._running: list[tuple[str, Key | None]] = []
        self._calls: list[ProductCall] = []
        self._origins = Origins()
        self._lineage = Lineage()
        self._rectifiers = Rectifiers()
        self._elementwise = ElementwiseProducts()
        self.candidates: defaultdict[int, deque[Candidate]] = defaultdict(deque)
        self._num_values: Counter[int] = Counter()

    def __enter__(self) -> Recorder:
        with ExitStack() as hooks:
            for module in self._names:
                if _is_uninitialized(module):
                    # The module's own hook would create its weights, so this one has to come first.
                    hooks.callback(module.register_forward_pre_hook(self._refuse_lazy, prepend=True).remove)
                hooks.callback(module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                # A model may catch the errors of its modules, and goes on after the module that raised.
                hooks.callback(module.register_forward_hook(self._end, with_kwargs=True, always_call=True).remove)
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
        operands = [operand for operand in tensors_in([*args, *kwargs.values()]) if in_memory(operand)]
        # The keys are taken before the call, which may change operands in place.
        keys = [key_of(operand) for operand in operands]
        source = self._origin_of(max(operands, key=Tensor.numel, default=None))
        output = self._rectifiers.run(func, args, kwargs)
        # Calls are read after they ran, so that an invalid one raises torch's own error.
        first_number = len(self._calls)
        call = self._elementwise.joined(func, args, kwargs)
        for product in products(*call):
            u = self._rectifiers.pre_activation_of(product, *call)
            self._add_candidate(product, output, rectified=is_rectified(u, product.h))
        self._elementwise.remember(func, args, output)
        self._origins.record_function(func, source, output)
        changed = [operand for operand, key in zip(operands, keys, strict=True) if key_of(operand) != key]
        multiplies = name_of(func).strip("_") in ("mul", "rmul", "multiply")
        self._lineage.record_function(
            func,
            keys,
            [*tensors_in([output]), *changed],
            products=frozenset(range(first_number, len(self._calls))),
            elementwise=multiplies and sum(operand.numel() > 1 for operand in operands) > 1,
        )
        return output

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        x = first_input(args, kwargs)
        self._running.append((self._names[module], None if x is None else key_of(x)))

    def _refuse_lazy(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        if threading.get_ident() != self._thread:
            return
        raise TypeError(
            f"{self._names[module] or 'the model'!r} is a {type(module).__name__} without weights yet: its first "
            "forward creates them at random. Run the model once, model(batch), and train it or load its weights "
            "before finding its head"
        )

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        # Without an entry of its own, the module was stopped by a hook before it began.
        if not self._running or self._running[-1][0] != self._names[module]:
            return
        path, key = self._running.pop()
        self._origins.record_module(module, path, first_input(args, kwargs), key, output)

    def steps_to(self, output: Tensor) -> Steps:
        """Return the functions that were applied to an output after its last product."""
        return self._lineage.steps_to(output)

    def _origin_of(self, tensor: Tensor | None) -> Origin | None:
        return None if tensor is None else self._origins.get(key_of(tensor))

    def paths_beside(self, candidate: Candidate, output: Tensor) -> list[str]:
        """Return the modules of the other products that an output depends on without another product in between.

        They are summands of the logits next to the candidate, though they may be zero now, such as the update of LoRA
        before training.
        """
        numbers = self._lineage.steps_to(output).products - {candidate.number}
        return list(dict.fromkeys(self._calls[number].path for number in sorted(numbers)))

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

    def _add_candidate(self, product: Product, output: Any, *, rectified: bool) -> None:
        running = [path for path, _ in self._running] or [""]
        candidate = Candidate(
            product=product._replace(h=product.h.detach().clone()),
            path=running[-1],
            number=len(self._calls),
            dtype=_dtype_of(product, output),
            origin=Origin("normalize", None, None) if product.kind == "cosine" else self._origin_of(product.h),
            stride=product.h.stride(-1) if product.h.ndim else 1,
            rectified=rectified,
        )
        address = product.operand.data_ptr()
        modules = frozenset({*running, ""})
        self._calls.append(ProductCall(running[-1], modules, product.signature, address, id(product.operand)))
        classes = product.weight.shape[0]
        kept = self.candidates[classes]
        kept.append(candidate)
        self._num_values[classes] += product.h.numel()
        while len(kept) > _MAX_CANDIDATES and (
            len(kept) > _MAX_SMALL_CANDIDATES or self._num_values[classes] > _MAX_VALUES
        ):
            self._num_values[classes] -= kept.popleft().product.h.numel()


def _dtype_of(product: Product, output: Any) -> torch.dtype:
    """Return the type in which a product was computed, as far as its output shows it."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return output.dtype
    return torch.promote_types(product.h.dtype, product.weight.dtype)
