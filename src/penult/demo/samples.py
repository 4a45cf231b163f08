"""Part three: activations drawn from the head alone."""

from __future__ import annotations

import torch

from penult.bases import Sphere
from penult.demo.job import Job
from penult.pair import load

__all__ = ["save_and_reload", "without_data"]

_DRAWS = 200


def without_data(job: Job) -> None:
    """Draw activations of every class with no input data."""
    from penult.report import figures, plots

    job.reporter.heading("Activations without data")
    pair = job.pairs["without data"]
    base = pair.base
    assert isinstance(base, Sphere)
    assert base.subspace is not None
    names = job.test.class_names
    classes = torch.arange(len(names))
    drawn = pair.given(classes).sample((_DRAWS,), generator=job.generator(2))
    probabilities = job.head(drawn).softmax(-1)
    confidence, predicted = probabilities.max(-1)
    accuracy = (predicted == classes).double().mean(0)
    real = job.test_activations
    assert real.labels is not None
    spread = torch.linalg.vector_norm(base.read(real.activations), dim=-1)
    rows = [
        [name, f"{pair.prior.probs[y]:.3f}", f"{accuracy[y]:.3f}", f"{confidence[:, y].mean():.3f}"]
        for y, name in enumerate(names)
    ]
    columns = ["class", "implied prior", "accuracy of the head on draws", "mean confidence"]
    job.results["without_data"] = {
        "radius": float(base.radius),
        "real_norm_in_span": float(spread.mean()),
        "dimension": base.subspace.shape[0],
        "accuracy": float(accuracy.mean()),
        "confidence": float(confidence.mean()),
    }
    job.reporter.line(
        f"sphere of radius {float(base.radius):.2f} in the {base.subspace.shape[0]} dimensions of span(W); "
        f"real activations have norm {float(spread.mean()):.2f} ± {float(spread.std()):.2f} there"
    )
    job.reporter.table(columns, rows)

    section = job.page.section(
        "Activations without data",
        "With m uniform on a sphere, `p(h|y)` is von Mises-Fisher around w_y. `penult.GenerativePair(head)` puts the "
        f"sphere into span(W), the {base.subspace.shape[0]} dimensions that the softmax can see, with the radius at "
        "which draws are as confident as asked (0.95). No image is involved. A head alone does not pin its radius "
        "down: compare it with the real norms.",
    )
    section.facts(
        {
            "radius, from the head": f"{float(base.radius):.2f}",
            "real norm in span(W)": f"{float(spread.mean()):.2f}",
            "head accuracy on draws": f"{float(accuracy.mean()):.1%}",
        }
    )
    both = torch.cat([base.read(real.activations), base.read(drawn.flatten(0, 1))])
    _, _, axes = torch.linalg.svd(both[: len(real)] - both[: len(real)].mean(0), full_matrices=False)
    flat = both @ axes[:2].T
    labels = classes.repeat(_DRAWS)
    keep = torch.randperm(len(labels), generator=job.generator(3))[: len(real)]
    figure = plots.scatter(
        flat[: len(real)],
        real.labels,
        list(names),
        second=(flat[len(real) :][keep], labels[keep]),
        titles=("real, of test digits", "drawn, from the head alone"),
    )
    figures.save(figure, job.out / "activations.png", theme="light")
    section.figure(
        figure,
        caption="Activations in span(W), along the two leading principal components of the real ones.",
        alt="Two scatter plots with one colour a digit: real activations at the left, drawn ones at the right.",
    )
    section.table(columns, rows, caption=f"{_DRAWS} draws a class, judged by the head itself.")


# --- Part nine: the pair as a file that needs no model ------------------------------------------------------


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
