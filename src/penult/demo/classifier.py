"""Part one: a small classifier, trained in seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from penult.activations import Tap, extract
from penult.demo.job import Job
from penult.demo.networks import DigitsNet
from penult.head import find_head
from penult.pair import GenerativePair

__all__ = ["find", "train"]

_EPOCHS = 30
_BATCH = 64


def train(job: Job) -> None:
    """Train the classifier, and show how well it does."""
    from penult.report import plots

    job.reporter.heading("A classifier of handwritten digits")
    images, labels = job.train.images, job.train.labels
    generator = job.generator(1)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global state
        torch.manual_seed(job.seed)
        model = DigitsNet()
    steps = _EPOCHS * (len(labels) // _BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve: dict[str, list[float]] = {"train": [], "test": []}
    for _ in job.reporter.track(range(_EPOCHS), "training"):
        model.train()
        right = 0
        order = torch.randperm(len(labels), generator=generator)
        for batch in order[: len(order) // _BATCH * _BATCH].split(_BATCH):
            logits = model(images[batch])
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(-1) == labels[batch]).sum())
        model.eval()
        with torch.no_grad():
            accuracy = float((model(job.test.images).argmax(-1) == job.test.labels).double().mean())
        curve["train"].append(right / (len(order) // _BATCH * _BATCH))
        curve["test"].append(accuracy)
    job.model = model.requires_grad_(False)
    job.results["classifier"] = {"test_accuracy": curve["test"][-1], "epochs": _EPOCHS}
    job.reporter.line(f"test accuracy {curve['test'][-1]:.1%} on {len(job.test.labels)} digits")

    section = job.page.section(
        "A classifier",
        f"A convolutional network with a linear layer on {model.fc.in_features} pooled ReLU features, trained with "
        f"cross-entropy on {len(labels)} of scikit-learn's 8×8 digits. Nothing about it is special: penult takes "
        "models as they are.",
    )
    section.facts(
        {
            "test accuracy": f"{curve['test'][-1]:.1%}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "features d": model.fc.in_features,
            "classes K": model.fc.out_features,
        }
    )
    first = [int((job.test.labels == y).nonzero()[0]) for y in range(len(job.test.class_names))]
    section.figure(
        plots.image_grid(job.test.images[first, 0], columns=len(first), captions=list(job.test.class_names), cell=56),
        caption="One test digit of each class.",
        alt="Ten handwritten digits from 0 to 9, eight by eight pixels each.",
    )
    epochs = list(range(1, _EPOCHS + 1))
    section.figure(
        plots.curves(epochs, curve, "epoch", "accuracy", size=(640, 300)),
        caption="Accuracy while training.",
        alt=f"Accuracy on training and test digits over {_EPOCHS} epochs, ending at {curve['test'][-1]:.1%} on test.",
    )


# --- Part two: the head, found by evidence, and the identity it stands for ----------------------------------


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
