"""What commands print, and how."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["RichReporter", "fail", "warnings_as_lines"]

_T = TypeVar("_T")


class RichReporter:
    """A reporter on the terminal, with progress bars; plain lines where the output is no terminal."""

    def __init__(self, stderr: bool = False) -> None:
        self.console = Console(stderr=stderr, highlight=False)

    def heading(self, text: str) -> None:
        """A new part begins."""
        self.console.print()
        self.console.print(Text(text, style="bold"))

    def line(self, text: str) -> None:
        """One line, or a block that keeps its line breaks."""
        self.console.print(Text(text), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table, numbers at the right."""
        table = Table(box=None, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(table)

    def track(self, items: Sequence[_T], description: str) -> Iterable[_T]:
        """The items, with a progress bar while they are consumed."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            yield from progress.track(items, description=description)

    @contextmanager
    def steps(self, total: int) -> Iterator[Callable[[int, str], None]]:
        """A progress bar, moved by calling what it gives with the number of steps done and what to say of them."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=total)
            yield lambda done, text: progress.update(task, completed=done, description=text)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Say on stderr what is being done while it takes its time; nothing where stderr is no terminal."""
        with Console(stderr=True, highlight=False).status(Text(text)):
            yield


def fail(error: BaseException) -> None:
    """Print a reason and remedy in one line; the whole traceback if PENULT_TRACEBACK is set."""
    if os.environ.get("PENULT_TRACEBACK"):
        raise error
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason.replace("overwrite=True", "--overwrite")  # what the argument is called here
    Console(stderr=True, highlight=False).print(Text(f"penult: {reason}"), soft_wrap=True)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print what penult warns of on stderr, in one line and once, rather than with a line of code."""
    told = set()
    with warnings.catch_warnings():
        python = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning):
                python(message, category, *where, **more)
                return
            text = " ".join(str(message).split())
            if text not in told:
                told.add(text)
                Console(stderr=True, highlight=False).print(Text(f"penult: warning: {text}"), soft_wrap=True)

        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
