"""The command line: ``penult COMMAND``."""

from __future__ import annotations

import inspect
import os
import re
import sys
import time
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from penult._version import __version__
from penult.cli import demo, distill, draw, extract, fit, generate, head, moments, report, sample, score
from penult.cli._console import fail, printing_never_fails, tell
from penult.cli._launch import lost, own_rank

__all__ = ["app", "main"]


class _Command(TyperCommand):
    """Command that reads ``~`` at the beginning of a path as the home folder, also in ``--out=~/run``.

    Shells replace ``~`` only at the beginning of an argument.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [re.sub(r"(?:^|(?<==))~[^/]*", _home, arg) for arg in args])


def _home(match: re.Match[str]) -> str:
    return os.path.expanduser(match[0])


app = typer.Typer(
    name="penult",
    help="The generative model inside a trained classifier.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    head.head,
    extract.extract,
    moments.moments,
    fit.fit,
    sample.sample,
    score.score,
    report.report,
    distill.distill,
    generate.generate,
    draw.draw,
    demo.demo,
):
    # Typer keeps the line breaks of a docstring, also where the terminal is narrower than the source.
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")
    app.command(command.__name__, cls=_Command, help=text)(command)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"penult {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    with printing_never_fails():
        _run()


def _run() -> None:
    try:
        app()
    except SystemExit as stop:
        # This code is that of Ctrl-C.
        if stop.code == 130:
            tell("interrupted; files are whole, and extract, distill and generate resume from them")
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if not lost(error):
            fail(error)
        elif own_rank() == 0:
            # The thread that watches the other processes ends this one before, with a more precise message.
            time.sleep(1)
            tell("another process of this run ended; give the same command again to continue")
        sys.exit(2)
