"""A generator as a file holds it: networks, mean and scale of the condition, and the pair."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from penult import io
from penult.bases import Base
from penult.pair import GenerativePair, from_parts, to_parts

__all__ = ["KIND", "Stored", "read", "write"]

KIND = "generator"  # of files


def write(
    path: str | os.PathLike[str],
    name: str,
    config: dict[str, Any],
    pair: GenerativePair,
    modules: Mapping[str, nn.Module],
    activations: int,
) -> Path:
    """Write a generator.

    Args:
        path: The file.
        name: Of its class.
        config: JSON facts that rebuild it.
        pair: Its law of activations.
        modules: Its parts whose states the file holds.
        activations: How many activations of real images the pair holds.
    """
    tensors, facts = to_parts(pair)
    parts = {f"pair.{key}": tensor for key, tensor in tensors.items()}
    for part, module in modules.items():
        parts |= {f"{part}.{key}": tensor for key, tensor in module.state_dict().items()}
    told = {"class": name, "config": config, "stored_activations": activations}
    return io.write(path, parts, KIND, told | {"pair": facts})


class Stored(NamedTuple):
    """What a file holds.

    Attributes:
        path: The file.
        name: Of the generator's class.
        config: JSON facts that rebuild it.
        states: State dicts of its parts.
        facts: JSON facts that rebuild the pair.
    """

    path: str | os.PathLike[str]
    name: str
    config: Any
    states: dict[str, dict[str, Tensor]]
    facts: Any

    def check_networks(self, given: Mapping[str, nn.Module], stored: Sequence[str], beside: Sequence[str]) -> None:
        """Raise unless the networks of the user's own are those that the generator has and was made with.

        Args:
            given: The user's own.
            stored: Names of those that a file holds.
            beside: Names of those that it does not hold.
        """
        names = *stored, *beside
        if strange := set(given) - set(names):
            raise TypeError(f"{sorted(strange)} are no networks of a {self.name}; it has {', '.join(names)}")
        own = isinstance(self.config, dict) and self.config.get("own_networks")
        if own and not set(stored) <= set(given):
            raise ValueError(
                f"{self.path} was made with networks of your own, of which a file holds the weights alone: give "
                f"load(path, {', '.join(f'{name}=...' for name in stored)})"
            )

    def pair(self, bases: Sequence[type[Base]]) -> GenerativePair:
        """The law of activations; raises as `penult.load`."""
        return from_parts(self.path, self.states.get("pair", {}), self.facts, bases)

    @contextmanager
    def rebuilding(self) -> Iterator[None]:
        """What goes wrong meanwhile is the file's fault; the global random state is left alone."""
        try:
            with torch.random.fork_rng(devices=[]):  # layers draw first weights, which are overwritten
                yield
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise io.FileFormatError(f"{self.path}: the generator cannot be rebuilt from the file: {error}") from error


def read(path: str | os.PathLike[str], name: str, device: str | torch.device) -> Stored:
    """Read a generator of a class.

    Raises:
        FileNotFoundError: There is no such file.
        penult.io.FileFormatError: The file is damaged, foreign, or of another class.
    """
    file = io.read(path, kind=KIND, device=device)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        room, _, rest = key.partition(".")
        states.setdefault(room, {})[rest] = tensor
    held = file.metadata.get("class")
    if held != name:
        raise io.FileFormatError(f"{path} holds a {held}, not a {name}; penult.generate.load reads both")
    try:
        config, facts = file.metadata["config"], file.metadata["pair"]
    except KeyError as error:
        raise io.FileFormatError(f"{path}: the generator lacks {error}; the file is damaged") from error
    return Stored(path, name, config, states, facts)
