"""Part six: students of the classifier, on images of another domain."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult.activations import Activations, Tap, extract
from penult.data import shift
from penult.demo.job import Job
from penult.demo.networks import DigitsStudent
from penult.distill import ActivationLoss, Gate, SoftTargetLoss, targets
from penult.pair import GenerativePair

__all__ = ["teach"]

# kinds and severities at which the classifier gets about half, and about as much as by guessing, of pool images right
_DOMAINS: dict[str, tuple[str, float] | None] = {
    "no shift": None,
    "texture": ("texture", 0.35),
    "inversion": ("inversion", 1.0),
}
_EACH = 20  # labelled images of a class
_STEPS = 150
_BATCH = 64
_SEEDS = 2
_TEMPERATURE = 4.0
_STRENGTH = 5.0


def teach(job: Job) -> None:
    """Train students on a few labelled images of three domains, with and without what the classifier says of them."""
    from penult.report import plots

    job.reporter.heading("A student under a domain shift")
    pair, tap = job.pairs[job.chosen], Tap(job.model, job.head)
    few = torch.cat([(job.pool.labels == y).nonzero().flatten()[:_EACH] for y in range(job.head.num_classes)])
    labels = job.pool.labels[few]
    shown, unseen, taught = {}, {}, {}
    for name, change in _DOMAINS.items():
        shown[name] = _changed(job.pool.images[few], change)
        unseen[name] = _changed(job.test.images, change)
        acts = extract(tap, [(shown[name], labels)])
        taught[name] = Activations(acts.activations, acts.logits, labels, job.pool.class_names)
    gates = {name: Gate.fit(pair, acts) for name, acts in taught.items()}
    known = {name: _accuracy(job.model(unseen[name]), job.test.labels) for name in _DOMAINS}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in _DOMAINS}
    runs = [(name, seed) for name in _DOMAINS for seed in range(_SEEDS)]
    methods = {name: _methods(pair, taught[name], gates[name]) for name in _DOMAINS}
    for name, seed in job.reporter.track(runs, "students"):
        for method, prepare in methods[name].items():
            accuracy = _train(prepare, shown[name], unseen[name], job.test.labels, 10 * job.seed + seed)
            found[name].setdefault(method, []).append(accuracy)
    mean = {name: {m: sum(each) / len(each) for m, each in by.items()} for name, by in found.items()}
    job.results["distill"] = {
        name: {
            "teacher": known[name],
            "students": found[name],
            "gate": gates[name].summary.to_dict(),  # type: ignore[union-attr]
        }
        for name in _DOMAINS
    }

    columns = ["domain", "teacher", *mean["no shift"]]
    rows = [[name, f"{known[name]:.1%}", *(f"{each:.1%}" for each in mean[name].values())] for name in _DOMAINS]
    job.reporter.table(columns, rows)
    shifted = [name for name, change in _DOMAINS.items() if change is not None]
    spread = max(max(each) - min(each) for by in found.values() for each in by.values())

    section = job.page.section(
        "A student under a domain shift",
        f"Small students learn from {len(labels)} labelled images of the pool, {_EACH} of each class: as they are, "
        "blended with textures, and inverted. The classifier of this page is their teacher, and it has seen none of "
        "these domains but the first. Cross-entropy leaves it out. Hinton's distillation believes what it says of "
        "every image, FitNets its features. `penult.distill` believes it image by image, as far as a gate goes, and "
        "elsewhere teaches what the pair says of the class, which no shift can change; *hinted* students get the "
        "features as well, for hints that take no part in predictions.",
    )
    section.figure(
        plots.image_grid(
            torch.cat([shown[name][_first(labels), 0] for name in _DOMAINS]),
            columns=job.head.num_classes,
            row_labels=list(_DOMAINS),
            cell=48,
        ),
        caption="One training image of each class, in the three domains.",
        alt="Three rows of ten digits: plain, blended with a texture, inverted.",
    )
    section.table(
        columns,
        rows,
        caption=f"Accuracy on {len(job.test.labels)} test images of the domain, the mean of {_SEEDS} students a "
        f"method, trained for {_STEPS} steps. Two students of one method differ by up to {spread:.1%}, so smaller "
        "differences mean nothing here.",
    )
    section.figure(
        plots.bars(
            {name: {"teacher": 100 * known[name]} | {m: 100 * v for m, v in mean[name].items()} for name in _DOMAINS},
            xlabel="accuracy on test images of the domain, per cent",
            number=".1f",
        ),
        caption="The same as bars.",
        alt="Bars of test accuracy in three domains, for the teacher and each way to train a student.",
    )
    section.text(" ".join(_said(name, mean[name], gates[name]) for name in _DOMAINS))
    summary = gates[shifted[0]].summary
    assert summary is not None
    section.table(
        ["class", "images", "teacher accuracy", "believed"],
        [[each.name, each.rows, f"{each.accuracy or 0:.1%}", f"{each.belief:.1%}"] for each in summary.classes],
        caption=f"The gate of the domain “{shifted[0]}”, `print(gate.summary)`: the teacher gets "
        f"{summary.accuracy or 0:.1%} of the training images right, and is believed {summary.belief:.1%} on average.",
    )


def _said(name: str, mean: dict[str, float], gate: Gate) -> str:
    assert gate.summary is not None
    plain, ours = mean["cross-entropy"], mean["gated, soft"]
    others = ", ".join(f"{m} {100 * (v - plain):+.1f}" for m, v in mean.items() if m not in ("cross-entropy",))
    return (
        f"**{name.capitalize()}**: the teacher is believed {gate.summary.belief:.0%} on average; points above or below "
        f"cross-entropy: {others.replace('-', '−')}; gated soft targets against Hinton's: "
        f"{100 * (ours - mean['Hinton']):+.1f}.".replace("+-", "−")
    )


def _changed(images: Tensor, change: tuple[str, float] | None) -> Tensor:
    return images if change is None else shift(images, *change)


def _first(labels: Tensor) -> list[int]:
    return [int((labels == y).nonzero()[0]) for y in labels.unique()]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


class _Method(nn.Module):
    """A student's loss, and what is trained beside the student."""

    def __init__(self, loss: Callable[[DigitsStudent, Tensor, Tensor], Tensor], own: nn.Module | None = None) -> None:
        super().__init__()
        self.loss, self.own = loss, own


def _methods(pair: GenerativePair, acts: Activations, gate: Gate) -> dict[str, Callable[[], _Method]]:
    labels, h = acts.labels, acts.activations
    assert labels is not None
    said = (acts.logits / _TEMPERATURE).softmax(-1)
    soft = targets(pair, activations=acts, temperature=_TEMPERATURE, gate=gate)
    inside = targets(pair, kind="hinted", activations=acts)
    distil = SoftTargetLoss(_TEMPERATURE)

    def cross_entropy() -> _Method:
        return _Method(lambda student, f, rows: F.cross_entropy(student.fc(f), labels[rows]))

    def hinton() -> _Method:
        return _Method(lambda student, f, rows: distil(student.fc(f), labels[rows], said[rows]))

    def fitnets() -> _Method:
        hint = nn.Linear(DigitsStudent.features_out, h.shape[1])
        unit = h.square().sum(-1).mean()  # so that the two terms are of one size in whatever unit h comes

        def loss(student: DigitsStudent, f: Tensor, rows: Tensor) -> Tensor:
            distance = (hint(f) - h[rows]).square().sum(-1).mean() / unit
            value: Tensor = F.cross_entropy(student.fc(f), labels[rows]) + distance
            return value

        return _Method(loss, hint)

    def gated_soft() -> _Method:
        return _Method(lambda student, f, rows: distil(student.fc(f), labels[rows], soft[rows]))

    def gated_hinted() -> _Method:
        through = ActivationLoss(pair, DigitsStudent.features_out, _STRENGTH, hint=_STRENGTH)
        return _Method(lambda student, f, rows: through(f, labels[rows], inside[rows]), through)

    return {
        "cross-entropy": cross_entropy,
        "Hinton": hinton,
        "FitNets": fitnets,
        "gated, soft": gated_soft,
        "gated, hinted": gated_hinted,
    }


def _train(prepare: Callable[[], _Method], images: Tensor, unseen: Tensor, truth: Tensor, seed: int) -> float:
    """Test accuracy of a student after its steps; the same seed gives all methods the same start and batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = DigitsStudent()
        method = prepare()
    student.train()
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=_STEPS)
    generator, count = torch.Generator().manual_seed(seed), len(images)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(_STEPS * _BATCH // count + 1)])
    for rows in order.split(_BATCH)[:_STEPS]:
        value = method.loss(student, student.features(images[rows]), rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    student.eval()
    with torch.no_grad():
        features = student.features(unseen)
        own = method.own
        return _accuracy(own.predict(features) if isinstance(own, ActivationLoss) else student.fc(features), truth)
