"""Part four: spheres fitted without labels, and what their exact laws say of real activations."""

from __future__ import annotations

import torch
from torch import Tensor

from penult import special
from penult.bases import Sphere
from penult.demo.job import Job, Quiet
from penult.pair import GenerativePair

__all__ = ["compare", "label_free"]

_DRAWS = 500


def label_free(job: Job) -> None:
    """Fit spheres to unlabelled activations and compare what they draw with real ones."""
    from penult.report import figures

    job.reporter.heading("Fitted without labels")
    pool = job.pool_activations.activations
    job.pairs |= {
        "R^d, round": GenerativePair(job.head, Sphere.fit(job.head, pool)),
        "R^d, elliptic": GenerativePair(job.head, Sphere.fit(job.head, pool, shape="elliptic")),
        "span(W), round": GenerativePair(job.head, Sphere.fit(job.head, pool, ambient=False)),
    }
    real = job.test_activations
    assert real.labels is not None
    rows, measured = [], {}
    for name, pair in job.pairs.items():
        facts = _facts(pair, real.activations, real.labels, job.generator(4))
        measured[name] = facts
        cosine = f"{facts['cosine_real']:.3f} ± {facts['cosine_real_sd']:.3f}"
        law = f"{facts['cosine_law']:.3f} ± {facts['cosine_law_sd']:.3f}"
        norms = f"{facts['norm_real']:.2f}", f"{facts['norm_drawn']:.2f}"
        rows.append([name, cosine, law, *norms, f"{facts['accuracy']:.3f}", f"{facts['confidence']:.3f}"])
    softmax = real.logits.softmax(-1)
    accuracy = float((real.predicted == real.labels).double().mean())
    confidence = float(softmax.amax(-1).mean())
    rows.append(["real activations", "", "", "", "", f"{accuracy:.3f}", f"{confidence:.3f}"])
    columns = ["sphere in", "cos to w_y, real", "exact law", "norm, real", "drawn", "accuracy", "confidence"]
    job.results["fit"] = measured
    job.reporter.table(columns, rows)

    section = job.page.section(
        "Fitted without labels",
        f"Given {len(pool)} activations without labels, `Sphere.fit` takes the observed law of norms, and for the "
        "elliptic sphere a centre and a covariance. Each row reads real test activations through its own sphere, and "
        "compares their cosine to w_y with the exact law that the sphere implies.",
    )
    section.table(
        columns, rows, caption="Accuracy and confidence are the head's, on draws with the real class balance."
    )
    section.text(
        "The round sphere in all of R^d is the one of the original paper. It spreads an activation's noise evenly over "
        "all dimensions, where that of a real one is small in those the head looks at: real activations lie far closer "
        "to their row than the law says. In span(W) the same law comes closer, and is still too wide for a network "
        "that separates its classes this well. Every row of the table is an exact pair with the same softmax: "
        "exactness is a theorem, realism has to be measured, as the next part does for other bases, too."
    )
    grid = torch.linspace(-0.999, 0.999, 400, dtype=torch.float64)
    figure, panels = figures.new_figure(1, 2, size=(940, 340), sharey=False)
    names = ("R^d, round", "span(W), round")
    with figures.style():
        for panel, name in zip(panels, names, strict=True):
            base = job.pairs[name].base
            assert isinstance(base, Sphere)
            cosines = base.cosine(real.activations, job.head.centered_weight(real.labels))
            panel.hist(cosines, bins=40, density=True, color=figures.SERIES[0], alpha=0.55)
            panel.plot(grid, _density(base, job.head.centered_weight(real.labels), grid), color=figures.SERIES[1])
            panel.set_title(f"sphere in {name}")
            panel.set_xlabel("cosine of h to w_y")
        panels[0].set_ylabel("density")
    figures.legend(
        figure, {"real test activations": panels[0].patches[0], "exact law of the sphere": panels[0].lines[0]}
    )
    section.figure(
        figure,
        caption="Cosine of activations to the row of their own class: real ones, and the exact density of the law.",
        alt="Two histograms of cosines with the exact density drawn over them; both curves lie to the left of the "
        "real cosines, in span(W) by much less.",
    )


def _facts(pair: GenerativePair, h: Tensor, y: Tensor, generator: torch.Generator) -> dict[str, float]:
    base = pair.base
    assert isinstance(base, Sphere)
    rows = pair.head.centered_weight(y)
    cosine, norms = base.cosine(h, rows), torch.linalg.vector_norm(base.read(h), dim=-1)
    law, law_sd = _law(base, rows)
    drawn = pair.given(y).sample((_DRAWS // len(y) + 1,), generator=generator)
    probabilities = pair.head(drawn).softmax(-1)
    return {
        "cosine_real": float(cosine.mean()),
        "cosine_real_sd": float(cosine.std()),
        "cosine_law": law,
        "cosine_law_sd": law_sd,
        "norm_real": float(norms.mean()),
        "norm_drawn": float(torch.linalg.vector_norm(base.read(drawn), dim=-1).mean()),
        "accuracy": float((probabilities.argmax(-1) == y).double().mean()),
        "confidence": float(probabilities.amax(-1).mean()),
    }


def _law(base: Sphere, rows: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the cosine under the tilts by rows (N, d), each row alike often."""
    share, kappa = base.radial_law(rows.double()), base.kappa(rows.double())
    m = base.read(rows).shape[-1]
    mean, variance = special.mean_resultant_length(m, kappa), special.cosine_variance(m, kappa)
    first = float((share * mean).sum(-1).mean())
    second = float((share * (variance + mean.square())).sum(-1).mean())
    return first, max(second - first * first, 0.0) ** 0.5


def _density(base: Sphere, rows: Tensor, t: Tensor) -> Tensor:
    """Exact density of the cosine at t (T,), averaged over the tilts by rows (N, d)."""
    rows, counts = rows.double().unique(dim=0, return_counts=True)
    share, kappa = base.radial_law(rows), base.kappa(rows)
    m = base.read(rows).shape[-1]
    log_density = special.cosine_log_prob(m, kappa.unsqueeze(-1), t)
    return torch.einsum("b,br,brt->t", (counts / counts.sum()).double(), share, log_density.exp())


# --- Part five: which base, by how well its draws are told from real activations ----------------------------


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
