"""``penult demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from penult.cli._console import RichReporter

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("penult-demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.", min=0)] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Run the main job on scikit-learn's digits and write a page.

    Example: penult demo --out penult-demo
    """
    import torch

    try:
        from penult.demo import run
    except ImportError as error:
        raise ImportError(f'the demo shows every part of penult: pip install "penult[all]" ({error})') from error

    torch.set_num_threads(1)  # on networks this small a second thread gains little, and costs dearly on busy cores
    job = run(out, seed, RichReporter(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(job.results, indent=2))
