"""What a check needs of any distribution: seeded draws, and the same law of other parameters."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints, transform_to

__all__ = ["Subject", "takes_generator"]


def takes_generator(distribution: Distribution) -> bool:
    """Whether it draws from a generator, as penult's do; torch's own know the global random state alone."""
    return "generator" in inspect.signature(distribution.sample).parameters


class Subject:
    """A distribution under a check.

    Args:
        distribution: The distribution.
        seed: Seed of its draws.
    """

    def __init__(self, distribution: Distribution, seed: int) -> None:
        self.law, self._seed = distribution, seed
        # Before anything is asked of it: torch's keep what they compute among their attributes.
        given = [name for name in distribution.arg_constraints if isinstance(vars(distribution).get(name), Tensor)]
        self.device = next((vars(distribution)[name].device for name in given), torch.device("cpu"))
        self._arguments, self.parameters = self._recipe(given)
        self.continuous = not bool(getattr(distribution.support, "is_discrete", False))
        self.dense = bool(getattr(distribution, "has_density", True))

    def draw(self, shape: tuple[int, ...], law: Any = None, *, path: bool = False, seed: int | None = None) -> Tensor:
        """Draws of this law, or of another, always from the same seed; by ``rsample`` on a ``path`` of gradients."""
        law, seed = self.law if law is None else law, self._seed if seed is None else seed
        method = law.rsample if path else law.sample
        if takes_generator(law):
            drawn: Tensor = method(Size(shape), generator=torch.Generator(self.device).manual_seed(seed))
            return drawn
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            drawn = method(Size(shape))
        return drawn

    def normal(self, shape: Size, seed: int = 1) -> Tensor:
        """Standard normal numbers in float64, which are the check's own."""
        generator = torch.Generator().manual_seed(self._seed + seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device)

    def rebuilt(self, parameters: Mapping[str, Tensor], validate_args: bool = False) -> Any:
        """The law of its class with other parameters, the rest of its arguments as they are."""
        dtype = next((value.dtype for value in parameters.values() if value.is_floating_point()), None)
        rest = {  # tensors that are no parameters, in the dtype of those that are
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value
            for name, value in self._arguments.items()
        }
        kind: Any = type(self.law)
        return kind(**{**rest, **parameters}, validate_args=validate_args)

    def free(self) -> dict[str, tuple[Any, Tensor]]:
        """Parameters that can move: by name, the map from free numbers to them, and those that give what it has.

        In float64. Left out are those at an end of their range, such as a concentration of 0.
        """
        found: dict[str, tuple[Any, Tensor]] = {}
        for name, value in self.parameters.items():
            constraint = self.law.arg_constraints[name]
            if constraints.is_dependent(constraint) or constraint.is_discrete or not value.is_floating_point():
                continue
            try:
                move = transform_to(constraint)
                start = move.inv(value.detach().double())
                kept = torch.allclose(move(start), value.double(), rtol=1e-4, atol=1e-6)
            except (NotImplementedError, RuntimeError):
                continue
            if kept and bool(start.isfinite().all()):
                found[name] = move, start
        return found

    def moved(self, step: float | Tensor) -> Any:
        """The law, its free parameters moved along one random direction; where the step has a batch (N,), so has it."""
        free = self.free()
        along = {name: self.normal(start.shape, seed=7 + i) for i, (name, (_, start)) in enumerate(free.items())}

        def at(name: str) -> Tensor:
            move, start = free[name]
            pace = torch.as_tensor(step, dtype=torch.float64, device=start.device)
            value: Tensor = move(start + pace.reshape(pace.shape + (1,) * start.dim()) * along[name])
            return value

        rest = {name: value.detach().double() for name, value in self.parameters.items() if value.is_floating_point()}
        return self.rebuilt({**rest, **{name: at(name) for name in free}})

    def _recipe(self, given: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Arguments that make this law again, and those among them that are parameters; none where that fails."""
        accepted = [
            n for n in inspect.signature(type(self.law).__init__).parameters if n not in ("self", "validate_args")
        ]
        options = {
            n: getattr(self.law, n) for n in accepted if n not in self.law.arg_constraints and hasattr(self.law, n)
        }
        names = [name for name in given if name in accepted]
        for count in range(len(names), -1, -1):  # of equivalent ones, such as probs and logits, there may be several
            for some in itertools.combinations(names, count):
                parameters = {name: vars(self.law)[name] for name in some}
                try:
                    again = type(self.law)(**options, **parameters, validate_args=False)
                except (TypeError, ValueError, RuntimeError):
                    continue
                if again.batch_shape == self.law.batch_shape and again.event_shape == self.law.event_shape:
                    return {**options, **parameters}, parameters
        return {}, {}
