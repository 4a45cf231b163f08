"""The command line: ``penult COMMAND``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import penult
from penult.cli import demo, distill, extract, fit, generate, head, report, sample, score
from penult.cli.console import fail

__all__ = ["app", "main"]

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
    fit.fit,
    sample.sample,
    score.score,
    report.report,
    distill.distill,
    generate.generate,
    demo.demo,
):
    app.command(command.__name__)(command)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"penult {penult.__version__}")
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
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        fail(error)
        sys.exit(2)
