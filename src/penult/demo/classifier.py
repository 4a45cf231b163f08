"""Parts one and two of the demo: a small classifier and its head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penult.activations import Tap, extract
from penult.demo.job import Job
from penult.demo.networks import DigitsNet
from penult.head import find_head
from penult.pair import GenerativePair

__all__ = ["find_its_head", "train"]

_EPOCHS = 30
_BATCH = 64


def train(job: Job) -> None:
    """Train the classifier and show its accuracy."""
    from penult.report import plots

    job.reporter.heading("A classifier of handwritten digits")
    model, accuracies = _trained(job)
    accuracy = f"{accuracies['test'][-1]:.1%}"
    job.model = model.requires_grad_(False)
    job.results["classifier"] = {"test_accuracy": accuracies["test"][-1], "epochs": _EPOCHS}
    job.reporter.line(f"test accuracy {accuracy} on {len(job.test.labels)} digits")

    section = job.page.section(
        "A classifier",
        f"The classifier is a convolutional network whose last layer reads {model.fc.in_features} pooled ReLU "
        f"features. It is trained with cross-entropy on {len(job.train.labels)} of scikit-learn's images of digits, "
        "which have 8×8 pixels. The network and its training are standard.",
    )
    section.facts(
        {
            "test accuracy": accuracy,
            "parameters": sum(p.numel() for p in model.parameters()),
            "features d": model.fc.in_features,
            "classes K": model.fc.out_features,
        }
    )
    first = [int((job.test.labels == y).nonzero()[0]) for y in range(len(job.test.class_names))]
    section.figure(
        plots.image_grid(job.test.images[first, 0], columns=len(first), captions=list(job.test.class_names), cell=56),
        caption="One test image of each class.",
        alt="Ten handwritten digits from 0 to 9, with 8×8 pixels each.",
    )
    section.figure(
        plots.curves(list(range(1, _EPOCHS + 1)), accuracies, "epoch", "accuracy", size=(640, 300)),
        caption="Accuracy during training.",
        alt=f"Accuracy on training and test images over {_EPOCHS} epochs; the last test accuracy is {accuracy}.",
    )


def _trained(job: Job) -> tuple[DigitsNet, dict[str, list[float]]]:
    """Train the classifier, and return it with its accuracies after each epoch."""
    images, labels = job.train.images, job.train.labels
    generator = job.generator(1)
    # Layers initialize their weights from the global random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = DigitsNet()
    steps = _EPOCHS * (len(labels) // _BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    accuracies: dict[str, list[float]] = {"train": [], "test": []}
    for _ in job.reporter.track(range(_EPOCHS), "training"):
        model.train()
        right = 0
        order = torch.randperm(len(labels), generator=generator, device="cpu")
        for batch in order[: len(order) // _BATCH * _BATCH].split(_BATCH):
            logits = model(images[batch])
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(-1) == labels[batch]).sum())
        model.eval()
        accuracies["train"].append(right / (len(order) // _BATCH * _BATCH))
        accuracies["test"].append(_accuracy(model, job.test.images, job.test.labels))
    return model, accuracies


@torch.no_grad()
def _accuracy(model: DigitsNet, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(-1) == labels).double().mean())


def find_its_head(job: Job) -> None:
    """Find the head of the classifier, and compare the posterior of its pair with the softmax."""
    from penult.report.pair import class_cosines

    job.reporter.heading("Its head")
    job.head = find_head(job.model, job.train.images[:64])
    job.reporter.line(str(job.head.certificate))
    tap = Tap(job.model, job.head)
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
        "`penult.find_head` runs the model once and finds the layer whose output W h + b equals the logits. The "
        "certificate states how exactly it does, and what the activations before this layer look like.",
    )
    section.code(str(job.head.certificate), label="Certificate of the head")
    section.text(
        "As a generative model, the head is `p(h|y) ∝ m(h) exp(w_y·h)`, where m is a base measure. Bayes' rule then "
        "gives the softmax of the head as the posterior, for every choice of m. The numbers below therefore test the "
        "implementation; they say nothing about the choice of m."
    )
    section.facts(
        {"max |posterior − softmax|, float32": f"{single:.0e}", "max |posterior − softmax|, float64": f"{double:.0e}"}
    )
    section.figure(
        class_cosines(job.head, job.train.class_names),
        caption="Cosines between the rows w_y of the centered head. Classes with a large cosine are similar to the "
        "head.",
        alt="Heat map of the cosines between the ten centered rows of the head.",
    )
