"""Files of generators: networks, mean and scale of the condition, and the pair."""

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

__all__ = ["KIND", "GeneratorFile", "read", "write"]

# Kind of file, see penult.io.
KIND = "generator"


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
        name: Name of the generator's class.
        config: JSON data from which the generator is rebuilt.
        pair: The pair.
        modules: Parts of the generator whose states are written.
        activations: Number of activations of real images in the pair.
    """
    tensors, facts = to_parts(pair)
    parts = {f"pair.{key}": tensor for key, tensor in tensors.items()}
    for part, module in modules.items():
        parts |= {f"{part}.{key}": tensor for key, tensor in module.state_dict().items()}
    metadata = {"class": name, "config": config, "stored_activations": activations, "pair": facts}
    return io.write(path, parts, KIND, metadata)


class GeneratorFile(NamedTuple):
    """Contents of a file.

    Attributes:
        path: The file.
        name: Name of the generator's class.
        config: JSON data from which the generator is rebuilt.
        states: State dicts of the parts of the generator.
        facts: JSON data from which the pair is rebuilt.
    """

    path: str | os.PathLike[str]
    name: str
    config: Any
    states: dict[str, dict[str, Tensor]]
    facts: Any

    def check_networks(self, networks: Mapping[str, nn.Module], stored: Sequence[str], training: Sequence[str]) -> None:
        """Raise if a network does not belong to the generator, or one that the file needs is missing.

        Args:
            networks: Networks of the user, by name.
            stored: Names of the networks whose weights files hold.
            training: Names of the networks that only training needs; files do not hold them.
        """
        names = *stored, *training
        if unknown := set(networks) - set(names):
            raise TypeError(f"{sorted(unknown)} are not networks of a {self.name}; expected {', '.join(names)}")
        has_own_networks = isinstance(self.config, dict) and self.config.get("own_networks")
        if has_own_networks and not set(stored) <= set(networks):
            raise ValueError(
                f"{self.path} was made with networks of your own, and only holds their weights: give "
                f"load(path, {', '.join(f'{name}=...' for name in stored)})"
            )

    def pair(self, bases: Sequence[type[Base]]) -> GenerativePair:
        """Rebuild the pair; raises like `penult.load`."""
        return from_parts(self.path, self.states.get("pair", {}), self.facts, bases)

    @contextmanager
    def rebuilding(self) -> Iterator[None]:
        """Re-raise an error in the block as an error that names the file; at the end restore the random state."""
        try:
            # New layers sample first weights, which the file's overwrite.
            with torch.random.fork_rng(devices=[]):
                yield
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise io.FileFormatError(f"{self.path}: the generator cannot be rebuilt from the file: {error}") from error


def read(path: str | os.PathLike[str], name: str, device: str | torch.device) -> GeneratorFile:
    """Read a generator of a class.

    Raises:
        FileNotFoundError: There is no such file.
        penult.io.FileFormatError: The file is damaged, of another kind, or holds a generator of another class.
    """
    file = io.read(path, kind=KIND, device=device)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        part, _, tensor_name = key.partition(".")
        states.setdefault(part, {})[tensor_name] = tensor
    stored_name = file.metadata.get("class")
    if stored_name != name:
        raise io.FileFormatError(f"{path} holds a {stored_name}, not a {name}; penult.generate.load reads both")
    try:
        config, facts = file.metadata["config"], file.metadata["pair"]
    except KeyError as error:
        raise io.FileFormatError(f"{path}: the generator lacks {error}; the file is damaged") from error
    return GeneratorFile(path, name, config, states, facts)
