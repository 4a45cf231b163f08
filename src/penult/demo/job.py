"""State of the demo that its parts share, and the reporter of its progress."""

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
from penult.scores import Score

if TYPE_CHECKING:
    from penult.report import Page

__all__ = ["Job", "Quiet", "Reporter"]

_T = TypeVar("_T")


class Reporter(Protocol):
    """Output of the progress of a long job."""

    def heading(self, text: str) -> None:
        """Start a new part."""

    def line(self, text: str) -> None:
        """Print a line, or several lines with their line breaks."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a small table."""

    def track(self, items: Sequence[_T], description: str) -> Iterable[_T]:
        """Return the items, with a progress bar while they are iterated over."""


class Quiet:
    """A reporter without output."""

    def heading(self, text: str) -> None:
        """Print nothing."""

    def line(self, text: str) -> None:
        """Print nothing."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print nothing."""

    def track(self, items: Sequence[_T], description: str) -> Iterable[_T]:
        """Return the items unchanged."""
        return items


@dataclass
class Job:
    """The state of a running demo.

    Attributes:
        out: Folder for all files.
        seed: Seed of all random numbers.
        reporter: Reporter of the progress.
        page: The page; each part adds sections.
        train: Digits that the classifier is trained on.
        pool: Digits that bases are fitted to; their labels are not used for this.
        test: Digits for evaluation.
        results: Numbers of each part, for JSON.
        model: The classifier, once it is trained.
        head: Its head, once it is found.
        pool_activations: Activations of ``pool``.
        test_activations: Activations of ``test``.
        pairs: Pairs by name.
        chosen: Name of the pair for the later parts.
        score: Outlier score, once it is fitted.
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
    score: Score = field(init=False)

    @classmethod
    def start(cls, out: Path, seed: int, reporter: Reporter) -> Job:
        """Load the digits and start the page."""
        from penult.report import Page

        # A folder that cannot be created is an error now, not after the work.
        out.mkdir(parents=True, exist_ok=True)
        train, pool, test = digits().split(0.4, 0.4, 0.2, seed=seed)
        page = Page(
            "The activations of a classifier as a generative model",
            subtitle="penult demo on handwritten digits",
            lead="The last layer of a classifier is linear. Together with a base measure, this layer alone defines a "
            "probability distribution of the activations that it reads. This page shows it for a small network: it "
            "finds the layer, samples activations, fits bases to real ones, compares both, and uses the result.",
            footer=f"Made by `penult demo --seed {seed}`. All numbers on this page were computed by that run.",
        )
        return cls(out, seed, reporter, page, train, pool, test)

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return a new random generator; different offsets give independent ones."""
        return torch.Generator().manual_seed(1000 * self.seed + offset)
