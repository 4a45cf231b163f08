"""``penult demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penult.cli._console import RichReporter, print_json
from penult.cli._options import AsJson, Seed

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("penult-demo"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show every part of penult on scikit-learn's digits, and write a page.

    Example: penult demo --out penult-demo
    """
    import torch

    try:
        from penult.demo import run
    except ImportError as error:
        raise ImportError(f'the demo needs every extra of penult: pip install "penult[all]" ({error})') from error

    # On networks this small a second thread gains little, and costs much on busy cores.
    torch.set_num_threads(1)
    job = run(out, seed, RichReporter(stderr=as_json))
    if as_json:
        print_json(job.results)
