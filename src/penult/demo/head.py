"""Part two: the head, found by evidence, and the identity it stands for."""

from __future__ import annotations

import torch

from penult.activations import Tap, extract
from penult.demo.job import Job
from penult.head import find_head
from penult.pair import GenerativePair

__all__ = ["find"]


def find(job: Job) -> None:
    """Find the head, print its certificate, and show that posterior and softmax are one."""
    from penult.report import plots

    job.reporter.heading("Its head")
    job.head = find_head(job.model, job.train.images[:64])
    job.reporter.line(str(job.head.certificate))
    tap = Tap(job.model, job.head)
    names = job.train.class_names
    job.pool_activations = extract(tap, job.pool.images.split(128))
    labelled = zip(job.test.images.split(128), job.test.labels.split(128), strict=True)
    job.test_activations = extract(tap, list(labelled))

    h, logits = job.test_activations.activations, job.test_activations.logits
    pair = GenerativePair(job.head)
    single = float((pair.posterior(h).probs - logits.softmax(-1)).abs().max())
    wide = GenerativePair(job.head.clone().double())
    double = float((wide.posterior(h.double()).probs - wide.head(h.double()).softmax(-1)).abs().max())
    job.pairs["without data"] = pair
    job.results["identity"] = {"float32": single, "float64": double}
    job.reporter.line(f"max |posterior - softmax| = {single:.1e} in float32, {double:.1e} in float64")

    section = job.page.section(
        "Its head",
        "`penult.find_head` runs the model once and accepts the layer whose W h + b reproduces the logits. The "
        "certificate says how well, and what the activations in front of it look like.",
    )
    section.code(str(job.head.certificate), label="Certificate")
    section.text(
        "Read generatively, the head says `p(h|y) ∝ m(h) exp(w_y·h)` for any base measure m, and Bayes' rule gives "
        "the softmax back. That identity is exact whatever m is, so it checks the wiring, not the choice of m."
    )
    section.facts({"posterior − softmax, float32": f"{single:.0e}", "posterior − softmax, float64": f"{double:.0e}"})
    rows = torch.nn.functional.normalize(job.head.centered_weight(), dim=-1)
    section.figure(
        plots.heatmap(rows @ rows.T, names, names, diverging=True, xlabel="class", ylabel="class"),
        caption="Cosines between the rows w_y of the centered head: which classes it holds for alike.",
        alt="Ten by ten heatmap of cosines between the centered rows of the head.",
    )
