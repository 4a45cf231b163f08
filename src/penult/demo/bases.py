"""Part five: which base, by how well its draws are told from real activations."""

from __future__ import annotations

import torch

from penult.demo.job import Job, Quiet
from penult.pair import GenerativePair

__all__ = ["compare"]

_CANDIDATES = ("sphere", "elliptic", "gaussian", "class", "mixture", "bank")  # a flow takes as long as all of them


def compare(job: Job) -> None:
    """Rank bases by realism, and fit the one to go on with."""
    from penult.realism import CANDIDATES, choose
    from penult.report import plots
    from penult.report import realism as figures

    job.reporter.heading("Which base")
    pool, real = job.pool_activations, job.test_activations
    candidates = {name: CANDIDATES[name] for name in _CANDIDATES}
    ranking = choose(job.head, pool, candidates=candidates, seed=job.seed, progress=not isinstance(job.reporter, Quiet))
    job.reporter.line(str(ranking))
    compared = [row for row in ranking.rows if row.error is None]
    job.chosen = ranking.best if ranking.best != "bank" else next(row.name for row in compared if row.name != "bank")
    pair = GenerativePair(job.head, candidates[job.chosen](job.head, pool))
    job.pairs[job.chosen] = pair
    facts = ranking.to_dict()
    job.results["bases"] = {"best": ranking.best, "fitted": job.chosen, "real": facts["real"]} | {
        row.name: {"auc": dict(row.auc), "worst_auc": row.worst_auc, "energy": row.energy, "floats": row.floats}
        for row in compared
    }

    section = job.page.section(
        "Which base",
        f"`penult.realism.choose` fits each base to {ranking.fitted_rows} activations of the pool, without labels, and "
        f"compares its draws with the {ranking.held_out_rows} others. Three classifiers try to tell draws from real "
        "activations: their AUC is 0.5 where they cannot. The energy coefficient measures the distance of the two "
        "laws, 0 for equal ones. The last row is what real activations get against other real ones, the best to hope "
        "for.",
    )
    tests = list(ranking.real.auc)
    rows = [
        [row.name, *(f"{row.auc[test]:.3f}" for test in tests), f"{row.energy:.4f}", f"{row.floats:,}"]
        for row in compared
    ]
    rows.append(["real", *(f"{ranking.real.auc[test]:.3f}" for test in tests), f"{ranking.real.energy:.4f}", ""])
    error = max(ranking.real.auc_error.values())
    section.table(
        ["base", *(f"AUC {test}" for test in tests), "energy", "floats"],
        rows,
        caption="From the closest to the farthest, by the largest AUC. The standard error of an AUC near 0.5 "
        f"is {error:.2f} at this number of rows.",
    )
    section.figure(
        figures.ranking(ranking),
        caption="What each base keeps, and how well the best of the three classifiers tells its draws from real "
        "activations. Low and left is best.",
        alt="Bases by number of floats and by AUC, with the AUC of real activations as a line.",
    )
    section.text(f"Recommended: {ranking.reason}")
    if ranking.best == "bank":
        section.text(
            "A bank draws the activations that it was given, so that nothing can come closer, and it is no model of "
            "them: it has no density and gives no new ones, and its file holds real data. Where that matters, take "
            f"the next one, {job.chosen}, at the price that the table shows; the demo goes on with it."
        )
    assert real.labels is not None
    drawn = pair.given(real.labels).sample(generator=job.generator(6))
    centre = real.activations.mean(0)
    axes = torch.linalg.svd(real.activations - centre, full_matrices=False).Vh[:2].T
    section.figure(
        plots.scatter(
            (real.activations - centre) @ axes,
            real.labels,
            list(job.test.class_names),
            second=((drawn - centre) @ axes, real.labels),
            titles=("real, of test digits", f"drawn, {job.chosen} base"),
        ),
        caption=f"Real activations and as many draws of each class, from a pair whose {job.chosen} base was fitted to "
        f"all {len(pool)} activations of the pool, along the two leading principal components of the real ones.",
        alt="Two scatter plots with one colour a digit: real activations at the left, drawn ones at the right.",
    )
