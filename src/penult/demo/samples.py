"""Parts three and nine of the demo: activations sampled from the head alone, and the pair as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penult import scores
from penult.bases import Sphere
from penult.demo.job import Job
from penult.pair import load

if TYPE_CHECKING:
    from penult.report import Section

__all__ = ["save_and_reload", "without_data"]

_SAMPLES = 200


def without_data(job: Job) -> None:
    """Sample activations of every class without input data."""
    job.reporter.heading("Activations without data")
    pair = job.pairs["without data"]
    base = pair.base
    assert isinstance(base, Sphere)
    assert base.subspace is not None
    dimension = base.subspace.shape[0]
    names = job.test.class_names
    classes = torch.arange(len(names), device="cpu")
    sampled = pair.given(classes).sample((_SAMPLES,), generator=job.generator(2))
    confidence, predicted = job.head(sampled).softmax(-1).max(-1)
    accuracy = (predicted == classes).double().mean(0)
    norms = torch.linalg.vector_norm(base.read(job.test_activations.activations), dim=-1)
    columns = ["class", "implied prior", "accuracy of the head", "mean confidence"]
    rows = [
        [name, f"{pair.prior.probs[y]:.3f}", f"{accuracy[y]:.3f}", f"{confidence[:, y].mean():.3f}"]
        for y, name in enumerate(names)
    ]
    job.results["without_data"] = {
        "radius": float(base.radius),
        "real_norm_in_span": float(norms.mean()),
        "dimension": dimension,
        "accuracy": float(accuracy.mean()),
        "confidence": float(confidence.mean()),
    }
    job.reporter.line(
        f"sphere of radius {float(base.radius):.2f} in the {dimension} dimensions of span(W); the norm of real "
        f"activations is {float(norms.mean()):.2f} ± {float(norms.std()):.2f} there"
    )
    job.reporter.table(columns, rows)

    section = job.page.section(
        "Activations without data",
        "If the base measure m is uniform on a sphere, `p(h|y)` is a von Mises-Fisher distribution around w_y. "
        f"`penult.GenerativePair(head)` uses a sphere in span(W), the {dimension} dimensions that affect the softmax. "
        "Its radius is chosen so that the head's mean confidence in samples is 0.95. This needs no image. The head "
        "alone does not determine the scale of real activations exactly, as the two norms below show.",
    )
    section.facts(
        {
            "radius, from the head": f"{float(base.radius):.2f}",
            "mean norm of real activations in span(W)": f"{float(norms.mean()):.2f}",
            "accuracy of the head on samples": f"{float(accuracy.mean()):.1%}",
        }
    )
    _cloud_figure(job, section, base, sampled.flatten(0, 1), classes.repeat(_SAMPLES))
    section.table(columns, rows, caption=f"The head applied to {_SAMPLES} samples of each class.")


def _cloud_figure(job: Job, section: Section, base: Sphere, sampled: Tensor, labels: Tensor) -> None:
    """Add a figure of real and sampled activations to a section, and save it as a picture."""
    from penult.report import figures, realism

    real = job.test_activations
    assert real.labels is not None
    shown = torch.randperm(len(labels), generator=job.generator(3), device="cpu")[: len(real)]
    figure = realism.principal_components(
        base.read(real.activations),
        real.labels,
        base.read(sampled[shown]),
        labels[shown],
        job.test.class_names,
        titles=("real, from test images", "sampled, from the head alone"),
    )
    figures.save(figure, job.out / "activations.png", theme="light")
    section.figure(
        figure,
        caption="Activations in span(W), along the two leading principal components of the real ones.",
        alt="Two scatter plots with one colour for each digit: real activations on the left, samples on the right.",
    )


def save_and_reload(job: Job) -> None:
    """Save the pair and the outlier score, load both without the model, and use them."""
    job.reporter.heading("One file, no model")
    pair = job.pairs[job.chosen]
    path = scores.save(job.out / "digits.penult.safetensors", job.score, pair)
    loaded = load(path)
    h = job.test_activations.activations
    error = float((loaded.log_prob(h) - pair.log_prob(h)).abs().max())
    sampled, labels = loaded.sample((5,), generator=job.generator(5))
    size = path.stat().st_size
    job.results["file"] = {"bytes": size, "log_prob_error": error}
    job.reporter.line(f"{path}: {size / 1024:.1f} KiB; largest change of log p(h) after loading: {error:.1e}")
    section = job.page.section(
        "One file, no model",
        f"The pair with the {job.chosen} base and the outlier score are stored in a safetensors file with JSON "
        "metadata, which `penult score` and `penult report` read as well. It contains neither pickled objects nor "
        "code, and the network is not needed to load it.",
    )
    section.facts({"size": f"{size / 1024:.1f} KiB", "largest change of log p(h)": f"{error:.0e}"})
    section.code(
        f'pair = penult.load("{path.name}")\n'
        f'score = penult.scores.load("{path.name}")\n'
        "h, y = pair.sample((5,))\n"
        f"# with the seed of this run: h.shape = {tuple(sampled.shape)}, y = {labels.tolist()}",
        label="Python code",
    )
