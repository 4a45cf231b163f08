"""How far a long task is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "reporting"]

Progress = Callable[[int, int | None], object]

_EVERY = 10  # seconds


@contextmanager
def reporting(progress: Progress | bool | None, streams: bool, unit: str = "batches") -> Iterator[Progress]:
    """What to call after each step; None means a bar where `streams` is set and someone looks at stderr.

    Args:
        progress: True for a bar on stderr, False for nothing, or what to call with the steps done and their total.
        streams: Whether None may mean a bar.
        unit: What the steps are, as the bar calls them.
    """
    if progress is None:
        progress = streams and sys.stderr is not None and sys.stderr.isatty()
    if progress is False:
        yield lambda done, total: None
    elif progress is True:
        with _bar(unit) as report:
            yield report
    else:
        yield progress


@contextmanager
def _bar(unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console, said = Console(stderr=True), time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(unit, total=None)

        def report(done: int, total: int | None) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - said >= _EVERY:  # no bar is drawn there before the end
                said = time.monotonic()
                console.print(f"{unit} {done}" + ("" if total is None else f"/{total}"), highlight=False)

        yield report
