"""A demonstration of the whole library on scikit-learn's digits.

Each part is a function of the :class:`Job`. It stores its results in the job, prints them through the reporter, and
adds one section to the page. :data:`PARTS` lists the parts in their order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from penult.demo import classifier, distill, fit, generate, samples, scores
from penult.demo.job import Job, Quiet, Reporter

__all__ = ["PARTS", "Job", "Quiet", "Reporter", "run"]

PARTS: tuple[Callable[[Job], None], ...] = (
    classifier.train,
    classifier.find_its_head,
    samples.without_data,
    fit.label_free,
    fit.compare,
    distill.train_students,
    generate.generate_images,
    scores.score_outliers,
    samples.save_and_reload,
)


def run(out: Path, seed: int = 0, reporter: Reporter | None = None) -> Job:
    """Run all parts and write ``out/index.html``.

    Args:
        out: Folder for the page, the pair, the generators and a figure; created if it does not exist.
        seed: Seed of all random numbers.
        reporter: Reporter of the progress. Default: no output.

    Returns:
        The finished job, with all numbers in ``results``.

    Raises:
        ImportError: An extra that the demo needs is missing (``penult[data,report,train]``).
    """
    job = Job.start(Path(out), seed, reporter or Quiet())
    begin = time.perf_counter()
    for part in PARTS:
        part(job)
    page = job.page.write(job.out / "index.html")
    job.reporter.line(f"{page}  ({time.perf_counter() - begin:.0f} s)")
    return job
