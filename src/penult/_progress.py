"""Progress reports of long tasks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "reporting"]

Progress = Callable[[int, int | None], object]

_SECONDS_BETWEEN_LINES = 10


@contextmanager
def reporting(progress: Progress | bool | None, streams: bool, unit: str = "batches") -> Iterator[Progress]:
    """Yield a function to call after each step, with the number of steps done and the total number.

    Args:
        progress: True for a bar on stderr, False for no report, or a function that is called instead, with the same
            arguments. None: a bar if `streams` is set and stderr is a terminal.
        streams: Whether to show a bar on a terminal if `progress` is None.
        unit: Name of the steps in the bar.
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
    console, last_line = Console(stderr=True), time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(unit, total=None)

        def report(done: int, total: int | None) -> None:
            nonlocal last_line
            bar.update(task, completed=done, total=total)
            # Where stderr is not a terminal, the bar appears only at the end, so lines of text show the progress.
            if not console.is_terminal and time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                console.print(f"{unit} {done}" + ("" if total is None else f"/{total}"), highlight=False)

        yield report
