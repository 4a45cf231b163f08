"""What commands print, and how."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["RichReporter", "fail", "quiet", "show_cursor", "tell", "warnings_as_lines"]

_T = TypeVar("_T")

_REMEDIES = {  # of what the system says, which says none
    errno.ENOSPC: "free some space, then give the same command again: what was there before is as it was",
    errno.EDQUOT: "free some space, then give the same command again: what was there before is as it was",
    errno.EROFS: "nothing can be written there; give another place",
    errno.EACCES: "see who may read and write there, or give another place",
    errno.EPERM: "see who may read and write there, or give another place",
}


# A class name may hold what would move the cursor or write to the clipboard.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def _text(value: Any, style: str = "") -> Text:
    """Text without markup, and with no character that a terminal obeys or cannot encode."""
    return Text(str(value).encode("utf-8", "backslashreplace").decode().translate(_CONTROLS), style=style)


class RichReporter:
    """A reporter on the terminal, with progress bars; plain lines where the output is no terminal.

    Args:
        stderr: Whether to leave stdout to others.
        silent: Whether to print nothing, as of all processes but the first.
    """

    def __init__(self, stderr: bool = False, silent: bool = False) -> None:
        self.console = Console(stderr=stderr, highlight=False, quiet=silent)

    def heading(self, text: str) -> None:
        """A new part begins."""
        self.console.print()
        self.console.print(_text(text, "bold"))

    def line(self, text: str) -> None:
        """One line, or a block that keeps its line breaks."""
        self.console.print(_text(text), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table, numbers at the right."""
        table = Table(box=None, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(_text(column), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(_text, row))
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
        """Say on stderr what is being done while it takes its time: a line that stays where that is no terminal."""
        console = Console(stderr=True, highlight=False, quiet=self.console.quiet)
        if not console.is_terminal:
            console.print(_text(f"{text} ..."), soft_wrap=True)
        with console.status(_text(text)):
            yield


def fail(error: BaseException) -> None:
    """Print a reason and remedy in one line; the whole traceback if PENULT_TRACEBACK is set."""
    if os.environ.get("PENULT_TRACEBACK"):
        raise error
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        reason = f"{reason.removeprefix(f'[Errno {error.errno}] ')}; {_REMEDIES[error.errno]}"
    if reason.startswith("DataLoader worker"):  # in torch's words, which know of no command
        reason += "; where memory is short, give fewer --workers. What is whole is kept: the same command continues"
    reason = reason.replace("overwrite=True", "--overwrite")  # what the argument is called here
    tell(reason)


def tell(text: str) -> None:
    """Print a line on stderr."""
    Console(stderr=True, highlight=False).print(_text(f"penult: {text}"), soft_wrap=True)


def show_cursor() -> None:
    """Give back the cursor that a progress bar hides, before a process ends without a word to it."""
    if (console := Console(stderr=True)).is_terminal:
        console.show_cursor(True)


@contextmanager
def warnings_as_lines(silent: bool = False) -> Iterator[None]:
    """Print what penult warns of on stderr, in one line and once, rather than with a line of code.

    Args:
        silent: Whether to print nothing, as of all processes but the first.
    """
    told = set()
    with warnings.catch_warnings():
        python = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning):
                python(message, category, *where, **more)
                return
            text = " ".join(str(message).split())
            if text not in told and not silent:
                told.add(text)
                tell(f"warning: {text}")

        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's tips and remarks, which are about its own options."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers", category=UserWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
