"""Laws of activations as modules, so that they move, are saved and are loaded with the base that holds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from penult.distributions import _NEXT_TO_ZERO, Bank, NormalizingFlow, PrincipalMixture

__all__ = ["Law", "Sampler"]

_OPTIONS: dict[type[Any], tuple[str, ...]] = {Bank: ("replacement", "rectified"), PrincipalMixture: ("rectified",)}
_MAYBE: dict[type[Any], tuple[str, ...]] = {PrincipalMixture: ("softness",)}  # tensors that may be None


@runtime_checkable
class Sampler(Protocol):
    """What can stand for the law of unlabelled activations: any torch Distribution, and less will do.

    ``sample(sample_shape)`` gives (*sample_shape, d). If it takes ``generator=``, that is used; else torch's global
    random state is forked for the time of the call. ``log_prob`` is optional.
    """

    def sample(self, sample_shape: Any) -> Tensor:
        """Draw activations (*sample_shape, d)."""


@final
class Law(nn.Module):
    """Holds a sampler: the tensors of penult's distributions as buffers, a module as a submodule, others as they are.

    Args:
        sampler: The law.
    """

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        kind: Any = type(sampler)
        self._kind = kind if kind in _OPTIONS else None
        if self._kind is not None:
            self._options = {name: bool(getattr(sampler, name)) for name in _OPTIONS[self._kind]}
            for name in (*self._kind.arg_constraints, *_MAYBE.get(self._kind, ())):
                tensor = getattr(sampler, name)
                self.register_buffer(name, None if tensor is None else tensor.detach())
        else:
            self._held: Any = sampler  # registers itself if it is a module
        self._seeded = "generator" in inspect.signature(sampler.sample).parameters

    @property
    def sampler(self) -> Any:
        """The law, on the device and in the dtype of the moment."""
        if self._kind is None:
            return self._held
        tensors = dict(self.named_buffers())
        return self._kind(**tensors, **self._options, validate_args=False)

    @property
    def has_density(self) -> bool:
        """Whether :meth:`log_prob` works."""
        sampler = self.sampler
        method = getattr(type(sampler), "log_prob", None)
        return bool(getattr(sampler, "has_density", method not in (None, Distribution.log_prob)))

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Activations (count, d) on ``device``, in at least float32."""
        shape = Size((count,))
        if self._seeded:
            h = self.sampler.sample(shape, generator=generator)
        elif generator is None:
            h = self.sampler.sample(shape)
        else:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                h = self.sampler.sample(shape)
        moved: Tensor = h.to(device, torch.promote_types(h.dtype, torch.float32))
        return moved

    def log_prob(self, h: Tensor) -> Tensor:
        """Log density at h (*S, d), (*S,); of a positive law exact zeros are read at what its fit moved them to.

        Raises:
            ValueError: If the law has no density.
        """
        sampler = self.sampler
        softness = getattr(sampler, "softness", None)
        if softness is not None:
            h = torch.where(h == 0, _NEXT_TO_ZERO * softness.to(h.dtype), h)
        try:
            density: Tensor = sampler.log_prob(h)
        except (AttributeError, NotImplementedError) as error:
            if isinstance(error, AttributeError) and hasattr(sampler, "log_prob"):
                raise
            raise ValueError(
                f"{type(sampler).__name__} has no log_prob, so that this base has no density; its draws, prior and "
                "posterior need none"
            ) from error
        return density

    def describe(self) -> dict[str, Any]:
        """JSON facts that, with the buffers, rebuild it in :meth:`rebuild`.

        Raises:
            ValueError: If it is none of penult's own.
        """
        if self._kind is not None:
            return {"class": self._kind.__name__, "options": self._options}
        if isinstance(self._held, NormalizingFlow):
            return {"class": NormalizingFlow.__name__, "options": self._held.config()}
        raise ValueError(
            f"a Marginal of {type(self._held).__name__} cannot be written to a file, which never holds code: fit one "
            'of penult\'s laws to its draws, as Marginal.fit(head, draws, kind="mixture"), or keep the draws as a Bank'
        )

    @classmethod
    def rebuild(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Law:
        """What :meth:`describe` and the buffers describe.

        Raises:
            KeyError: A part is missing.
            ValueError: A class is unknown, or the tensors are no such law's.
        """
        for kind, names in _OPTIONS.items():
            if facts["class"] == kind.__name__:
                parts = {name: tensors[name] for name in kind.arg_constraints}
                parts |= {name: tensors[name] for name in _MAYBE.get(kind, ()) if name in tensors}
                options = facts["options"]
                known = isinstance(options, dict) and set(options) == set(names)
                if not known or any(type(value) is not bool for value in options.values()):
                    raise ValueError(f"options of the law are {options!r}, no truth values of {', '.join(names)}")
                return cls(kind(**parts, **options, validate_args=True))
        if facts["class"] == NormalizingFlow.__name__:
            if not isinstance(facts["options"], dict):
                raise ValueError(f"the settings of the flow are {facts['options']!r}, no mapping")
            held = {name.removeprefix("_held."): tensor for name, tensor in tensors.items()}
            return cls(NormalizingFlow.from_config(facts["options"], held))
        raise ValueError(f"the law {facts['class']!r} is none of penult's")
