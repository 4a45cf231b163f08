"""What the parts of the demo share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from penult.activations import Activations
from penult.data import Images, digits
from penult.head import Head
from penult.pair import GenerativePair

if TYPE_CHECKING:
    from penult.report import Page

__all__ = ["Job", "Quiet", "Reporter"]

_T = TypeVar("_T")


class Reporter(Protocol):
    """Where a long job tells what it does."""

    def heading(self, text: str) -> None:
        """A new part begins."""

    def line(self, text: str) -> None:
        """One line, or a block that keeps its line breaks."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table."""

    def track(self, items: Sequence[_T], description: str) -> Iterable[_T]:
        """The items, with a progress bar while they are consumed."""


class Quiet:
    """A reporter that says nothing."""

    def heading(self, text: str) -> None:
        """Say nothing."""

    def line(self, text: str) -> None:
        """Say nothing."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Say nothing."""

    def track(self, items: Sequence[_T], description: str) -> Iterable[_T]:
        """The items as they are."""
        return items


@dataclass
class Job:
    """The demo while it runs.

    Attributes:
        out: Folder that everything is written to.
        seed: Seed of everything that is drawn.
        reporter: Where progress goes.
        page: The page, a section longer after each part.
        train: Digits that the classifier learns from.
        pool: Digits whose labels nobody looks at, to fit bases to.
        test: Digits that everything is judged on.
        results: Figures by part, as JSON.
        model: The classifier, once trained.
        head: Its head, once found.
        pool_activations: Activations of ``pool``.
        test_activations: Activations of ``test``.
        pairs: Pairs by name, once built.
        chosen: Name of the pair to go on with, once bases are compared.
    """

    out: Path
    seed: int
    reporter: Reporter
    page: Page
    train: Images
    pool: Images
    test: Images
    results: dict[str, Any] = field(default_factory=dict)
    model: nn.Module = field(default_factory=nn.Identity)
    head: Head = field(init=False)
    pool_activations: Activations = field(init=False)
    test_activations: Activations = field(init=False)
    pairs: dict[str, GenerativePair] = field(default_factory=dict)
    chosen: str = "without data"

    @classmethod
    def start(cls, out: Path, seed: int, reporter: Reporter) -> Job:
        """Load the digits and open the page."""
        from penult.report import Page

        out.mkdir(parents=True, exist_ok=True)  # now rather than after the work
        train, pool, test = digits().split(0.4, 0.4, 0.2, seed=seed)
        page = Page(
            "What a classifier knows about its own activations",
            subtitle="penult demo on handwritten digits",
            lead="A classifier ends in a linear layer, and that layer alone defines a density of the activations it "
            "reads. Here it is for a small network: found, sampled, fitted, compared with real ones, and saved.",
            footer=f"Made by `penult demo --seed {seed}`. Every figure on this page was computed by that run.",
        )
        return cls(out, seed, reporter, page, train, pool, test)

    def generator(self, offset: int = 0) -> torch.Generator:
        """A fresh generator for one purpose of the job."""
        return torch.Generator().manual_seed(1000 * self.seed + offset)
