"""Part nine: the pair as a file that needs no model."""

from __future__ import annotations

from penult.demo.job import Job
from penult.pair import load

__all__ = ["save_and_reload"]


def save_and_reload(job: Job) -> None:
    """Save the pair, read it back without the model, and use it."""
    job.reporter.heading("One file, no model")
    pair = job.pairs[job.chosen]
    path = pair.save(job.out / "digits.penult.safetensors")
    again = load(path)
    h = job.test_activations.activations
    error = float((again.log_prob(h) - pair.log_prob(h)).abs().max())
    drawn, labels = again.sample((5,), generator=job.generator(5))
    size = path.stat().st_size
    job.results["file"] = {"bytes": size, "log_prob_error": error}
    job.reporter.line(f"{path}: {size / 1024:.1f} KiB; reloaded, max |difference of log p(h)| = {error:.1e}")
    section = job.page.section(
        "One file, no model",
        f"The pair with the {job.chosen} base is a safetensors file with JSON facts: no pickle, no code, no network "
        "needed to read it.",
    )
    section.facts({"size": f"{size / 1024:.1f} KiB", "log p(h), before and after": f"{error:.0e}"})
    section.code(
        f'pair = penult.load("{path.name}")\n'
        "h, y = pair.sample((5,))\n"
        f"# h: {tuple(drawn.shape)}, y: {labels.tolist()} with this run's seed",
        label="Python",
    )
