"""Part six of the demo: students of the classifier on images of other domains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult.activations import Activations, Tap, extract
from penult.data import shift
from penult.demo.job import Job
from penult.demo.networks import DigitsStudent
from penult.distill import ActivationLoss, Gate, GateSummary, SoftTargetLoss, targets
from penult.pair import GenerativePair

if TYPE_CHECKING:
    from penult.report import Section

__all__ = ["train_students"]

# Kind and severity of the shift of each domain. The accuracy of the classifier is about one half under the texture, and
# little better than guessing under the inversion.
_DOMAINS: dict[str, tuple[str, float] | None] = {
    "no shift": None,
    "texture": ("texture", 0.35),
    "inversion": ("inversion", 1.0),
}
_LABELLED_PER_CLASS = 20
_STEPS = 150
_BATCH = 64
_SEEDS = 2
_TEMPERATURE = 4.0
_STRENGTH = 5.0


@dataclass(frozen=True)
class _Domain:
    """Images of one domain, with the teacher's activations on the training images.

    Attributes:
        images: Training images.
        test_images: Test images.
        activations: Activations of the training images, with labels.
        gate: Gate that was fitted to these activations.
        teacher_accuracy: Accuracy of the teacher on the test images.
    """

    images: Tensor
    test_images: Tensor
    activations: Activations
    gate: Gate
    teacher_accuracy: float

    @property
    def summary(self) -> GateSummary:
        """Summary of the gate."""
        assert self.gate.summary is not None
        return self.gate.summary


def train_students(job: Job) -> None:
    """Train students on a few labelled images of three domains, with and without the teacher's outputs."""
    job.reporter.heading("A student under a domain shift")
    pair, tap = job.pairs[job.chosen], Tap(job.model, job.head)
    rows = torch.cat(
        [(job.pool.labels == y).nonzero().flatten()[:_LABELLED_PER_CLASS] for y in range(job.head.num_classes)]
    )
    domains = {name: _domain(job, pair, tap, rows, change) for name, change in _DOMAINS.items()}
    accuracies: dict[str, dict[str, list[float]]] = {name: {} for name in domains}
    methods = {name: _methods(pair, domain.activations, domain.gate) for name, domain in domains.items()}
    runs = [(name, seed) for name in domains for seed in range(_SEEDS)]
    for name, seed in job.reporter.track(runs, "students"):
        for method, prepare in methods[name].items():
            accuracy = _train(prepare, domains[name], job.test.labels, 10 * job.seed + seed)
            accuracies[name].setdefault(method, []).append(accuracy)
    job.results["distill"] = {
        name: {
            "teacher": domain.teacher_accuracy,
            "students": accuracies[name],
            "gate": domain.summary.to_dict(),
        }
        for name, domain in domains.items()
    }
    _show(job, domains, accuracies)


def _domain(job: Job, pair: GenerativePair, tap: Tap, rows: Tensor, change: tuple[str, float] | None) -> _Domain:
    """Return a domain whose training images are some rows of the pool."""
    images, test_images = job.pool.images[rows], job.test.images
    if change is not None:
        images, test_images = shift(images, *change), shift(test_images, *change)
    labels = job.pool.labels[rows]
    extracted = extract(tap, [(images, labels)])
    activations = Activations(extracted.activations, extracted.logits, labels, job.pool.class_names)
    accuracy = _accuracy(job.model(test_images), job.test.labels)
    return _Domain(images, test_images, activations, Gate.fit(pair, activations), accuracy)


# --- page ---------------------------------------------------------------------------------------------------


def _show(job: Job, domains: dict[str, _Domain], accuracies: dict[str, dict[str, list[float]]]) -> None:
    """Print the accuracies, and add the section on students to the page."""
    from penult.report import distill as figures
    from penult.report import plots

    means = {
        name: {method: sum(values) / len(values) for method, values in by_method.items()}
        for name, by_method in accuracies.items()
    }
    job.reporter.table(*_table(domains, means))
    num_images = len(domains["no shift"].images)
    section = job.page.section(
        "A student under a domain shift",
        f"Small students are trained on {num_images} labelled images of the pool, {_LABELLED_PER_CLASS} of each class, "
        "in three domains: unchanged, blended with textures, and inverted. The classifier of this page is their "
        "teacher; it was trained on unchanged digits only.\n\n"
        "*Cross-entropy* does not use the teacher. *Hinton* (knowledge distillation) trusts the outputs of the teacher "
        "on all images, and *FitNets* its features. The *gated* methods of `penult.distill` trust the teacher on each "
        "image only as far as a gate allows; otherwise the target is the output of the pair for the class, which does "
        "not depend on the domain. *Hinted* students also learn the features of the teacher, by a part of the student "
        "that does not take part in predictions.",
    )
    first = _first(domains["no shift"])
    section.figure(
        plots.image_grid(
            torch.cat([domain.images[first, 0] for domain in domains.values()]),
            columns=job.head.num_classes,
            row_labels=list(domains),
            cell=48,
        ),
        caption="One training image of each class in the three domains.",
        alt="Three rows of ten digits: unchanged, blended with a texture, inverted.",
    )
    _show_accuracies(job, section, domains, accuracies, means)
    for name, domain in domains.items():
        section.text(_in_words(name, means[name], domain.summary))
    shifted = domains["texture"].summary
    section.figure(
        figures.gate(shifted),
        caption=f"{figures.gate_caption(shifted)} The domain is “texture”, where the teacher predicts "
        f"{shifted.accuracy or 0:.1%} of the training images correctly; its mean belief is {shifted.belief:.1%}.",
        alt="Bars of the accuracy of the teacher and of the mean belief in it, for each digit.",
    )


def _table(domains: dict[str, _Domain], means: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the mean accuracies of the teacher and of each method."""
    rows = [
        [name, f"{domain.teacher_accuracy:.1%}", *(f"{mean:.1%}" for mean in means[name].values())]
        for name, domain in domains.items()
    ]
    return ["domain", "teacher", *means["no shift"]], rows


def _show_accuracies(
    job: Job,
    section: Section,
    domains: dict[str, _Domain],
    accuracies: dict[str, dict[str, list[float]]],
    means: dict[str, dict[str, float]],
) -> None:
    """Add a table and a figure of the accuracies."""
    from penult.report import plots

    spread = max(max(values) - min(values) for by_method in accuracies.values() for values in by_method.values())
    columns, rows = _table(domains, means)
    section.table(
        columns,
        rows,
        caption=f"Accuracy on the {len(job.test.labels)} test images of the domain: means of {_SEEDS} students after "
        f"{_STEPS} steps. Students of the same method differ by up to {spread:.1%}, so "
        "smaller differences mean nothing.",
    )
    bars = {
        name: {"teacher": 100 * domain.teacher_accuracy} | {method: 100 * mean for method, mean in means[name].items()}
        for name, domain in domains.items()
    }
    section.figure(
        plots.bars(bars, xlabel="accuracy on test images of the domain, percent", number=".1f"),
        caption="The same accuracies as bars.",
        alt="Bars of the test accuracy in three domains, for the teacher and each method.",
    )


def _in_words(name: str, means: dict[str, float], summary: GateSummary) -> str:
    from penult.report.markup import number

    baseline, gated, hinton = means["cross-entropy"], means["gated, soft"], means["Hinton"]
    differences = "; ".join(
        f"{method} {number(100 * (mean - baseline), '+.1f')}"
        for method, mean in means.items()
        if method != "cross-entropy"
    )
    return (
        f"**{name.capitalize()}**: the mean belief in the teacher is {summary.belief:.0%}. Difference to cross-entropy "
        f"in percentage points: {differences}. “Gated, soft” compared with “Hinton”: "
        f"{number(100 * (gated - hinton), '+.1f')}."
    )


def _first(domain: _Domain) -> list[int]:
    """Return the index of the first image of each class."""
    labels = domain.activations.labels
    assert labels is not None
    return [int((labels == y).nonzero()[0]) for y in labels.unique()]


# --- training -----------------------------------------------------------------------------------------------


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


class _Method(nn.Module):
    """Loss of a student, and a module that is trained together with the student."""

    def __init__(
        self, loss: Callable[[DigitsStudent, Tensor, Tensor], Tensor], module: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.loss, self.module = loss, module


def _methods(pair: GenerativePair, activations: Activations, gate: Gate) -> dict[str, Callable[[], _Method]]:
    """Return the methods by name; each loss takes a student, its features and the indices of the images."""
    labels, h = activations.labels, activations.activations
    assert labels is not None
    teacher_probs = (activations.logits / _TEMPERATURE).softmax(-1)
    gated = targets(pair, activations=activations, temperature=_TEMPERATURE, gate=gate)
    hinted = targets(pair, kind="hinted", activations=activations)
    soft_loss = SoftTargetLoss(_TEMPERATURE)

    def cross_entropy() -> _Method:
        return _Method(lambda student, f, rows: F.cross_entropy(student.fc(f), labels[rows]))

    def hinton() -> _Method:
        return _Method(lambda student, f, rows: soft_loss(student.fc(f), labels[rows], teacher_probs[rows]))

    def fitnets() -> _Method:
        hint = nn.Linear(DigitsStudent.features_out, h.shape[1])
        # Divided by this, the distance is of the same order as the cross-entropy for activations of any scale.
        unit = h.square().sum(-1).mean()

        def loss(student: DigitsStudent, f: Tensor, rows: Tensor) -> Tensor:
            distance = (hint(f) - h[rows]).square().sum(-1).mean() / unit
            value: Tensor = F.cross_entropy(student.fc(f), labels[rows]) + distance
            return value

        return _Method(loss, hint)

    def gated_soft() -> _Method:
        return _Method(lambda student, f, rows: soft_loss(student.fc(f), labels[rows], gated[rows]))

    def gated_hinted() -> _Method:
        loss = ActivationLoss(pair, DigitsStudent.features_out, _STRENGTH, hint=_STRENGTH)
        return _Method(lambda student, f, rows: loss(f, labels[rows], hinted[rows]), loss)

    return {
        "cross-entropy": cross_entropy,
        "Hinton": hinton,
        "FitNets": fitnets,
        "gated, soft": gated_soft,
        "gated, hinted": gated_hinted,
    }


def _train(prepare: Callable[[], _Method], domain: _Domain, test_labels: Tensor, seed: int) -> float:
    """Train a student and return its test accuracy; a seed gives all methods the same initial student and batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = DigitsStudent()
        method = prepare()
    student.train()
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=_STEPS)
    generator, count = torch.Generator().manual_seed(seed), len(domain.images)
    order = torch.cat(
        [torch.randperm(count, generator=generator, device="cpu") for _ in range(_STEPS * _BATCH // count + 1)]
    )
    for rows in order.split(_BATCH)[:_STEPS]:
        value = method.loss(student, student.features(domain.images[rows]), rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    student.eval()
    with torch.no_grad():
        features = student.features(domain.test_images)
        module = method.module
        logits = module.predict(features) if isinstance(module, ActivationLoss) else student.fc(features)
    return _accuracy(logits, test_labels)
