"""The main job, end to end, on scikit-learn's digits.

Each part is a function of the :class:`Job`: it adds to what the job holds, tells the reporter what it finds,
and writes one section of the page. A further part is one more entry of :data:`PARTS`.
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
    classifier.find,
    samples.without_data,
    fit.label_free,
    fit.compare,
    distill.teach,
    generate.draw_images,
    scores.tell_strangers,
    samples.save_and_reload,
)


def run(out: Path, seed: int = 0, reporter: Reporter | None = None) -> Job:
    """Run every part and write ``out/index.html``.

    Args:
        out: Folder of the page, the pair and the figures; made if it is missing.
        seed: Seed of everything that is drawn.
        reporter: Where progress goes; nowhere when left out.

    Returns:
        The finished job, with all figures in ``results``.

    Raises:
        ImportError: If an extra that the demo needs is missing (``penult[data,report,train]``).
    """
    job = Job.start(Path(out), seed, reporter or Quiet())
    begin = time.perf_counter()
    for part in PARTS:
        part(job)
    page = job.page.write(job.out / "index.html")
    job.reporter.line(f"{page}  ({time.perf_counter() - begin:.0f} s)")
    return job
