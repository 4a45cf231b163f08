"""How far a loader is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "reporting"]

Progress = Callable[[int, int | None], object]


@contextmanager
def reporting(progress: Progress | bool | None, streams: bool) -> Iterator[Progress]:
    """What to call after each batch; None means a bar where `streams` is set and someone looks at stderr."""
    if progress is None:
        progress = streams and sys.stderr is not None and sys.stderr.isatty()
    if progress is False:
        yield lambda done, total: None
    elif progress is True:
        with _bar() as report:
            yield report
    else:
        yield progress


@contextmanager
def _bar() -> Iterator[Progress]:
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
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("batches", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
