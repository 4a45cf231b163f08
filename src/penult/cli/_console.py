"""Output of commands: lines, tables, progress, warnings and errors."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = [
    "RichReporter",
    "fail",
    "json_text",
    "print_json",
    "printing_never_fails",
    "quiet",
    "show_cursor",
    "tell",
    "warnings_as_lines",
]

_T = TypeVar("_T")

# The messages of the system name no remedy.
_REMEDIES = {
    errno.ENOSPC: "free some space, then give the same command again: files that were there are unchanged",
    errno.EDQUOT: "free some space, then give the same command again: files that were there are unchanged",
    errno.EROFS: "nothing can be written there; give another path",
    errno.EACCES: "check the permissions there, or give another path",
    errno.EPERM: "check the permissions there, or give another path",
}

# Options that are not named like the parameter of the library.
_OPTIONS = {
    "image": "--image-column",
    "images": "--image-column",
    "label": "--label-column",
    "labels": "--label-column",
}

# Control characters of a class name, for example, could move the cursor or write to the clipboard.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def _text(value: Any, style: str = "") -> Text:
    """Return text without markup, control characters, and characters that cannot be encoded."""
    return Text(str(value).encode("utf-8", "backslashreplace").decode().translate(_CONTROLS), style=style)


class _Output:
    """A text stream that drops text once its reader has gone, as after ``| head``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, which is then as good as printed."""
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Write the text that the stream holds."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        # Python flushes the stream at exit, and would report the error again.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextmanager
def printing_never_fails() -> Iterator[None]:
    """Let nothing that is printed stop a command: its files count for more than its text.

    Characters that a console cannot encode are printed as escapes, and text without a reader is dropped.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        # A program without a console has no streams.
        if stream is not None:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, cast("TextIO", _Output(stream)))
    try:
        yield
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)


def json_text(results: Mapping[str, Any]) -> str:
    """Return results as JSON, with null for NaN and infinities, which JSON does not have; a line on stderr says so."""
    lost: list[str] = []
    text = json.dumps(_finite(results, "", lost), indent=2, allow_nan=False)
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        tell(f"warning: {shown}: not finite, so that JSON has null there")
    return text


def _finite(value: Any, name: str, lost: list[str]) -> Any:
    """Return JSON data with None for numbers that are not finite, whose names are appended to `lost`."""
    if isinstance(value, Mapping):
        return {key: _finite(part, f"{name}.{key}".lstrip("."), lost) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{name}[{i}]", lost) for i, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{name} is {value}")
        return None
    return value


def print_json(results: Mapping[str, Any]) -> None:
    """Print results as JSON on stdout."""
    print(json_text(results))


class RichReporter:
    """A reporter on the terminal, with progress bars; plain lines if the output is not a terminal.

    Args:
        stderr: Whether to print on stderr rather than stdout.
        silent: Whether to print nothing. Set in all processes except the first, so that lines appear once.
    """

    def __init__(self, stderr: bool = False, silent: bool = False) -> None:
        self.console = Console(stderr=stderr, highlight=False, quiet=silent)

    def heading(self, text: str) -> None:
        """Print the title of a new part."""
        self.console.print()
        self.console.print(_text(text, "bold"))

    def line(self, text: str) -> None:
        """Print a line, or a block with its line breaks."""
        self.console.print(_text(text), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table whose first column is aligned left, the others right."""
        table = Table(box=None, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(_text(column), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(_text, row))
        self.console.print(table)

    def track(self, items: Sequence[_T], description: str) -> Iterable[_T]:
        """Yield items with a progress bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            yield from progress.track(items, description=description)

    @contextmanager
    def steps(self, total: int) -> Iterator[Callable[[int, str], None]]:
        """Show a progress bar; yield a function that takes the number of steps done and a description."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=total)
            yield lambda done, text: progress.update(task, completed=done, description=text)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show on stderr that work is going on; if stderr is not a terminal, print one line."""
        console = Console(stderr=True, highlight=False, quiet=self.console.quiet)
        if not console.is_terminal:
            console.print(_text(f"{text} ..."), soft_wrap=True)
        with console.status(_text(text)):
            yield


def fail(error: BaseException) -> None:
    """Print reason and remedy of an error in one line; raise it if PENULT_TRACEBACK is set."""
    if os.environ.get("PENULT_TRACEBACK"):
        raise error
    reason = str(error) or type(error).__name__
    remedy = getattr(error, "remedy", None)
    if remedy is not None:
        # The library names a parameter, users of a command know the option.
        option = _OPTIONS.get(remedy.parameter) or f"--{remedy.parameter.replace('_', '-')}"
        text = f", or pass {option} to {remedy.purpose}" if remedy.purpose else f"; pass one with {option}"
        reason = remedy.reason + text
    elif isinstance(error, OSError) and error.errno in _REMEDIES:
        file = "" if error.filename is None else f": {error.filename!r}"
        reason = f"{error.strerror}{file}; {_REMEDIES[error.errno]}"
    elif reason.startswith("DataLoader worker"):
        # The message is torch's own.
        reason += "; if memory is short, give fewer --workers. Whole files are kept: the same command continues"
    tell(" ".join(reason.split()))


def tell(text: str) -> None:
    """Print a line on stderr."""
    Console(stderr=True, highlight=False).print(_text(f"penult: {text}"), soft_wrap=True)


def show_cursor() -> None:
    """Show the cursor that a progress bar hides, for a process that ends at once."""
    if (console := Console(stderr=True)).is_terminal:
        console.show_cursor(True)


@contextmanager
def warnings_as_lines(silent: bool = False) -> Iterator[None]:
    """Print each warning once, as one line on stderr without the line of code.

    Args:
        silent: Whether to print nothing. Set in all processes except the first, so that warnings appear once.
    """
    printed = set()
    with warnings.catch_warnings():
        python = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *location: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning):
                python(message, category, *location, **more)
                return
            text = " ".join(str(message).split())
            if text not in printed and not silent:
                printed.add(text)
                tell(f"warning: {text}")

        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the tips and remarks of Lightning, which are about its own options."""
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
