"""Parts four and five of the demo: spheres fitted without labels, and the choice of a base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penult import special
from penult.bases import Sphere
from penult.demo.job import Job, Quiet
from penult.pair import GenerativePair

if TYPE_CHECKING:
    from penult.report import Section

__all__ = ["compare", "label_free"]

_SAMPLES = 500
# A flow is left out, because fitting it takes as long as fitting all of these.
_CANDIDATES = ("sphere", "elliptic", "gaussian", "class", "mixture", "bank")


# --- spheres ------------------------------------------------------------------------------------------------


def label_free(job: Job) -> None:
    """Fit spheres to unlabelled activations and compare their samples with real activations."""
    job.reporter.heading("Fitted without labels")
    pool = job.pool_activations.activations
    job.pairs |= {
        "R^d, round": GenerativePair(job.head, Sphere.fit(job.head, pool)),
        "R^d, elliptic": GenerativePair(job.head, Sphere.fit(job.head, pool, shape="elliptic")),
        "span(W), round": GenerativePair(job.head, Sphere.fit(job.head, pool, ambient=False)),
    }
    real = job.test_activations
    assert real.labels is not None
    facts = {name: _facts(pair, real.activations, real.labels, job.generator(4)) for name, pair in job.pairs.items()}
    job.results["fit"] = facts
    rows = [[name, *_cells(values)] for name, values in facts.items()]
    accuracy = float((real.predicted == real.labels).double().mean())
    confidence = float(real.logits.softmax(-1).amax(-1).mean())
    rows.append(["real activations", "", "", "", "", f"{accuracy:.3f}", f"{confidence:.3f}"])
    columns = ["sphere", "real cosine", "exact cosine", "real norm", "sampled norm", "accuracy", "confidence"]
    job.reporter.table(columns, rows)

    section = job.page.section(
        "Fitted without labels",
        f"`Sphere.fit` needs activations without labels, here {len(pool)}. It takes the distribution of their norms, "
        "and for an elliptic sphere also a centre and a covariance. Each row of the table expresses the test "
        "activations in the coordinates of one sphere. It compares the cosine between an activation and the row w_y of "
        "its class with the exact distribution of this cosine under the sphere.",
    )
    section.table(
        columns,
        rows,
        caption="Mean ± standard deviation of the cosine, and means of the norm. Accuracy and confidence are those of "
        "the head on samples with the class frequencies of the test images.",
    )
    section.text(
        "The round sphere in all of R^d is that of the original paper (Seo, Lee and Kwak, 2021). It spreads the noise "
        "of an activation evenly over all dimensions, whereas the noise of real activations is small in the dimensions "
        "that the head reads. Real activations are therefore much closer to the row of their class than its samples. "
        "In span(W), the two are closer, but samples still vary too much for a network that separates its classes this "
        "well. Every row of the table is an exact pair with the same softmax. Exactness is a theorem; realism must be "
        "measured. The next section does so for more bases."
    )
    _cosine_figure(job, section)


def _facts(pair: GenerativePair, h: Tensor, y: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Return statistics of real activations (N, d) with labels (N,), and of samples of the same classes."""
    base = pair.base
    assert isinstance(base, Sphere)
    rows = pair.head.centered_weight(y)
    cosine, norms = base.cosine(h, rows), torch.linalg.vector_norm(base.read(h), dim=-1)
    exact_mean, exact_deviation = _exact_cosine(base, rows)
    sampled = pair.given(y).sample((_SAMPLES // len(y) + 1,), generator=generator)
    probabilities = pair.head(sampled).softmax(-1)
    return {
        "cosine_real": float(cosine.mean()),
        "cosine_real_sd": float(cosine.std()),
        "cosine_law": exact_mean,
        "cosine_law_sd": exact_deviation,
        "norm_real": float(norms.mean()),
        "norm_drawn": float(torch.linalg.vector_norm(base.read(sampled), dim=-1).mean()),
        "accuracy": float((probabilities.argmax(-1) == y).double().mean()),
        "confidence": float(probabilities.amax(-1).mean()),
    }


def _cells(facts: dict[str, float]) -> list[str]:
    return [
        f"{facts['cosine_real']:.3f} ± {facts['cosine_real_sd']:.3f}",
        f"{facts['cosine_law']:.3f} ± {facts['cosine_law_sd']:.3f}",
        f"{facts['norm_real']:.2f}",
        f"{facts['norm_drawn']:.2f}",
        f"{facts['accuracy']:.3f}",
        f"{facts['confidence']:.3f}",
    ]


def _cosine_figure(job: Job, section: Section) -> None:
    """Add a figure of the cosines of real activations and of their exact densities to a section."""
    from penult.report import plots

    real = job.test_activations
    rows = job.head.centered_weight(real.labels)
    grid = torch.linspace(-0.999, 0.999, 400, dtype=torch.float64, device="cpu")
    panels = {}
    for name in ("R^d, round", "span(W), round"):
        base = job.pairs[name].base
        assert isinstance(base, Sphere)
        panels[f"sphere in {name}"] = base.cosine(real.activations, rows), (grid, _exact_density(base, rows, grid))
    section.figure(
        plots.histogram_panels(panels, "cosine of h and w_y", ("real test activations", "exact density of the sphere")),
        caption="Cosine between activations and the row of their class: histogram of real ones, and the exact density "
        "under the sphere.",
        alt="Two histograms of cosines, each with an exact density that lies to the left of it, in span(W) by much "
        "less.",
    )


def _exact_cosine(base: Sphere, rows: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the cosine under a mixture of the tilts by rows (N, d)."""
    share, kappa = base.radial_law(rows.double()), base.kappa(rows.double())
    dim = base.read(rows).shape[-1]
    mean, variance = special.mean_resultant_length(dim, kappa), special.cosine_variance(dim, kappa)
    first = float((share * mean).sum(-1).mean())
    second = float((share * (variance + mean.square())).sum(-1).mean())
    return first, max(second - first * first, 0.0) ** 0.5


def _exact_density(base: Sphere, rows: Tensor, cosines: Tensor) -> Tensor:
    """Return the density of the cosine at (T,) points under a mixture of the tilts by rows (N, d)."""
    rows, counts = rows.double().unique(dim=0, return_counts=True)
    share, kappa = base.radial_law(rows), base.kappa(rows)
    dim = base.read(rows).shape[-1]
    log_density = special.cosine_log_prob(dim, kappa.unsqueeze(-1), cosines)
    return torch.einsum("b,br,brt->t", (counts / counts.sum()).double(), share, log_density.exp())


# --- choice of a base ---------------------------------------------------------------------------------------


def compare(job: Job) -> None:
    """Rank bases by the realism of their samples, and fit the base for the later parts."""
    from penult.realism import CANDIDATES, choose
    from penult.report import realism as figures

    job.reporter.heading("Which base")
    pool = job.pool_activations
    candidates = {name: CANDIDATES[name] for name in _CANDIDATES}
    ranking = choose(job.head, pool, candidates=candidates, seed=job.seed, progress=not isinstance(job.reporter, Quiet))
    job.reporter.line(str(ranking))
    compared = [row for row in ranking.rows if row.error is None]
    job.chosen = ranking.best if ranking.best != "bank" else next(row.name for row in compared if row.name != "bank")
    job.pairs[job.chosen] = GenerativePair(job.head, candidates[job.chosen](job.head, pool))
    job.results["bases"] = {"best": ranking.best, "fitted": job.chosen, "real": ranking.to_dict()["real"]} | {
        row.name: {"auc": dict(row.auc), "worst_auc": row.worst_auc, "energy": row.energy, "floats": row.floats}
        for row in compared
    }

    section = job.page.section(
        "Which base",
        f"`penult.realism.choose` fits each base to {ranking.fitted_rows} activations of the pool, without labels, and "
        f"compares its samples with the other {ranking.held_out_rows}. Three classifiers are trained to separate "
        "samples from real activations; an AUC of 0.5 means that they cannot. The energy coefficient is a distance "
        "between the two distributions; it is 0 if they are equal. The last row compares real activations with other "
        "real activations; no base can do better.",
    )
    columns, rows = figures.ranking_table(ranking)
    section.table(
        columns,
        rows,
        caption="Bases in the order of their largest AUC, from the most to the least realistic. The standard error of "
        f"an AUC near 0.5 is {max(ranking.real.auc_error.values()):.2f} at this number of rows.",
    )
    section.figure(
        figures.ranking(ranking),
        caption="Numbers that each base stores, and the largest AUC of the three classifiers. Low and left is best.",
        alt="Bases by the numbers they store and by their largest AUC, with a line at the AUC of real activations.",
    )
    section.text(f"Recommended: {ranking.reason}")
    if ranking.best == "bank":
        section.text(
            "A bank samples from the activations that it stores, so no base can be more realistic. But it has no "
            "density, it produces no new activations, and its file contains activations of real images. Where this "
            f"matters, use the next base, {job.chosen}, as the following sections do. The table shows what it loses."
        )
    _cloud_figure(job, section)


def _cloud_figure(job: Job, section: Section) -> None:
    """Add a figure of real and sampled activations to a section."""
    from penult.report import realism as figures

    real, pair = job.test_activations, job.pairs[job.chosen]
    assert real.labels is not None
    sampled = pair.given(real.labels).sample(generator=job.generator(6))
    section.figure(
        figures.principal_components(
            real.activations,
            real.labels,
            sampled,
            real.labels,
            job.test.class_names,
            titles=("real, from test images", f"sampled, {job.chosen} base"),
        ),
        caption=f"Real activations and as many samples of each class, from a pair whose {job.chosen} base was fitted "
        f"to all {len(job.pool_activations)} activations of the pool. The axes are the two leading principal "
        "components of the real ones.",
        alt="Two scatter plots with one colour for each digit: real activations on the left, samples on the right.",
    )
