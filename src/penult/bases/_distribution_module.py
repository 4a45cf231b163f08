"""Module that holds a distribution, so that it moves, is saved and is loaded with its base."""

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
# Tensors that may be None.
_OPTIONAL: dict[type[Any], tuple[str, ...]] = {PrincipalMixture: ("softness",)}


@runtime_checkable
class Sampler(Protocol):
    """Distribution of unlabelled activations: any torch Distribution, or an object with a ``sample`` method.

    ``sample(sample_shape)`` returns (*sample_shape, d). A keyword ``generator`` is used if there is one; otherwise the
    global random state of torch is forked during the call. ``log_prob`` is optional.
    """

    def sample(self, sample_shape: Any) -> Tensor:
        """Sample activations (*sample_shape, d)."""


@final
class Law(nn.Module):
    """Module that holds a distribution.

    The tensors of penult's distributions become buffers, a module becomes a submodule, and other objects are kept as
    they are.

    Args:
        sampler: The distribution.
    """

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        kind: Any = type(sampler)
        self._kind = kind if kind in _OPTIONS else None
        if self._kind is not None:
            self._options = {name: bool(getattr(sampler, name)) for name in _OPTIONS[self._kind]}
            for name in (*self._kind.arg_constraints, *_OPTIONAL.get(self._kind, ())):
                tensor = getattr(sampler, name)
                # Products of tensors with other strides, which files do not keep, are rounded in another way.
                self.register_buffer(name, None if tensor is None else tensor.detach().contiguous())
        else:
            # Assigning a module registers it as a submodule.
            self._held: Any = sampler
        self._seeded = "generator" in inspect.signature(sampler.sample).parameters

    @property
    def sampler(self) -> Any:
        """The distribution, on the current device and in the current dtype."""
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
        """Sample activations (count, d) on ``device``, in float32 or wider."""
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
        """Return the log density at h (*S, d): (*S,).

        Raises:
            ValueError: The distribution has no density.
        """
        sampler = self.sampler
        softness = getattr(sampler, "softness", None)
        # The fit of a positive distribution replaced exact zeros by this value.
        if softness is not None:
            h = torch.where(h == 0, _NEXT_TO_ZERO * softness.to(h.dtype), h)
        try:
            density: Tensor = sampler.log_prob(h)
        except (AttributeError, NotImplementedError) as error:
            if isinstance(error, AttributeError) and hasattr(sampler, "log_prob"):
                raise
            raise ValueError(
                f"{type(sampler).__name__} has no log_prob, so that this base has no density; sampling, prior and "
                "posterior need none"
            ) from error
        return density

    def describe(self) -> dict[str, Any]:
        """Return a dictionary for JSON, from which :meth:`rebuild` restores the distribution, given its buffers.

        Raises:
            ValueError: The distribution is not one of penult's.
        """
        if self._kind is not None:
            return {"class": self._kind.__name__, "options": self._options}
        if isinstance(self._held, NormalizingFlow):
            return {"class": NormalizingFlow.__name__, "options": self._held.config()}
        raise ValueError(
            f"a Marginal of {type(self._held).__name__} cannot be saved, since files contain no code. Fit one of "
            "penult's distributions to its samples, Marginal.fit(head, samples, kind='mixture'), or keep them as a Bank"
        )

    @classmethod
    def rebuild(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Law:
        """Rebuild a distribution from the dictionary that :meth:`describe` returned and from the buffers.

        Raises:
            KeyError: A part is missing.
            ValueError: The class is unknown, or the tensors do not fit it.
        """
        for kind, names in _OPTIONS.items():
            if facts["class"] == kind.__name__:
                parts = {name: tensors[name] for name in kind.arg_constraints}
                parts |= {name: tensors[name] for name in _OPTIONAL.get(kind, ()) if name in tensors}
                options = facts["options"]
                known = isinstance(options, dict) and set(options) == set(names)
                if not known or any(type(value) is not bool for value in options.values()):
                    raise ValueError(f"options is {options!r}; expected true or false for {', '.join(names)}")
                return cls(kind(**parts, **options, validate_args=True))
        if facts["class"] == NormalizingFlow.__name__:
            if not isinstance(facts["options"], dict):
                raise ValueError(f"options of the flow is {facts['options']!r}; expected a mapping")
            flow_tensors = {name.removeprefix("_held."): tensor for name, tensor in tensors.items()}
            return cls(NormalizingFlow.from_config(facts["options"], flow_tensors))
        raise ValueError(f"class of the distribution is {facts['class']!r}, which penult does not know")
