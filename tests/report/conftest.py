"""A page that holds one of everything, with the inputs that break pages: long words, many columns, markup."""

import numpy as np
import pytest

from penult.report import Page, plots

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def build_sample() -> Page:
    rng = np.random.default_rng(0)
    page = Page(
        "What a classifier's head knows about its activations",
        subtitle="penult demo · handwritten digits",
        lead="A softmax head is an exponential tilt: with a base measure it is a *generative* model of the "
        "activations it reads. Here is how far that goes for a small network.",
        footer="Make this page again with `penult demo --seed 0`.",
    )
    section = page.section(
        "The identity holds",
        "The posterior of the pair, `pair.posterior(h)`, equals the softmax of the head for every base. "
        "That checks the wiring **and nothing more**: a wrong normaliser passes it.\n\n"
        "What proves a base are laws, such as the mean of *1[Y=y] − p(y|h)* under draws from the pair.",
    )
    section.facts(
        {
            "accuracy on held-out images": 0.98333,
            "largest deviation from softmax": "3.6e-16",
            "training images": 1437,
            "rank of the centred head": 9,
            "head": "fc, linear 64→10",
            "gate": None,
        }
    )
    section.code(
        "$ penult head torchvision.models:resnet18\n"
        "path=fc  linear 512->10  residual=2e-6  support: orthant (>=0)  before: AdaptiveAvgPool2d  "
        "folded: no  spread: 0.31\n",
        label="Terminal",
    )
    section.table(
        ["base", "AUROC near", "AUROC far", "two-sample", "NLL", "seconds", "floats", "needs data"],
        [
            ["`Sphere`", 0.7731, 0.9182, "1.000 ± .000", 112.31, 0.021, 64, False],
            ['`Sphere.fit(shape="elliptic")`', 0.8731, 0.9882, "**.915 ± .003**", 98.1, 1.2, 4160, True],
            ['`Marginal.fit(kind="mixture")`', 0.801, 0.951, ".512 ± .011", -86.4, 14.25, 37_184, True],
            ["Donaudampfschifffahrtselektrizitätenhauptbetriebswerk", None, 0.5, "–", 0, 1e-5, 10**9, True],
        ],
        caption="Every base on the same network; means over five seeds.",
    )
    section.table(["domain", "accuracy"], [["MNIST", 0.991], ["USPS", 0.873]], caption="A small table.")
    section = page.section("Samples obey the exact law")
    x = np.linspace(-1, 1, 400)
    density = (1 - x**2) ** 3 * np.exp(5 * x)
    density /= density.sum() * (x[1] - x[0])
    draws = rng.choice(x, 20_000, p=density / density.sum())
    section.figure(
        plots.histograms(
            {"sampled cosines": draws, "uniform law": rng.beta(3.5, 3.5, 20_000) * 2 - 1},
            {"sampled cosines": (x, density)},
            "cosine to the class direction",
        ),
        "The cosine of 20 000 draws to the mean direction, against its density in closed form.",
        alt="A histogram that follows the exact density curve",
    )
    epochs = np.arange(1, 31)
    runs = {
        name: 1 - 0.6 * np.exp(-epochs / rate) - 0.02 * position
        for position, (name, rate) in enumerate(
            {
                "distilled, gated": 4,
                "distilled": 5,
                "Hinton": 6,
                "head only": 7,
                "labels": 9,
                "no shift": 12,
            }.items()
        )
    }
    section.figure(
        plots.curves(
            epochs,
            runs,
            "epoch",
            "accuracy",
            bands={"distilled": (runs["distilled"] - 0.03, runs["distilled"] + 0.02)},
        ),
        "Students over training.",
        alt="Six rising curves",
    )
    section = page.section("Real beside synthetic")
    centres = rng.normal(size=(10, 2)) * 3.2
    labels = rng.integers(0, 10, 1200)
    clouds = [(centres[labels] + rng.normal(size=(1200, 2)) * spread, labels) for spread in (0.55, 0.7)]
    section.figure(
        plots.scatter(*clouds[0], CLASSES, second=clouds[1]),
        "Activations and draws from the pair in the plane of their two leading components.",
        alt="Two scatter plots of ten classes, alike in place and shape",
    )
    section.figure(plots.scatter(*clouds[0], CLASSES), "Activations alone.", alt="A scatter plot of ten classes")
    images = rng.random((20, 8, 8)) * np.linspace(0.2, 1, 8)
    section.figure(
        plots.image_grid(images, 10, captions=[str(label) for label in range(10)] * 2, row_labels=["VAE", "GAN"]),
        "Two images for each class.",
        alt="Twenty small images in two rows",
    )
    section = page.section("Which classes are confused")
    confusion = rng.dirichlet(np.full(10, 0.15), 10) * 0.4 + np.eye(10) * 0.6
    section.figure(
        plots.heatmap(confusion, CLASSES, CLASSES, xlabel="predicted", ylabel="true"),
        "Rows sum to one.",
        alt="A ten by ten confusion matrix with a strong diagonal",
    )
    section.figure(
        plots.heatmap(np.corrcoef(rng.normal(size=(5, 8))), CLASSES[:5], CLASSES[:5], diverging=True),
        "Correlations.",
        alt="A five by five matrix of correlations",
    )
    grid = np.add.outer(np.sin(np.arange(40) / 6), np.cos(np.arange(40) / 5))
    blank = [str(position) if position % 10 == 0 else "" for position in range(40)]
    section.figure(
        plots.heatmap(grid, blank, blank, annotate=False, diverging=True),
        "A field.",
        alt="A smooth field of waves",
    )
    section.figure(
        plots.bars(
            {"Sphere": 0.873, "Gaussian, full covariance": 0.941, "Marginal": 0.988, "difference": -0.12},
            {"Sphere": 0.02, "Marginal": 0.004},
            "AUROC",
        ),
        "Scores of outliers.",
        alt="Four bars",
    )
    section.figure(
        plots.bars(
            {
                "MNIST": {"gated": 0.93, "Hinton": 0.92, "labels": 0.88},
                "USPS": {"gated": 0.88, "Hinton": 0.81},
            },
            {"MNIST": {"gated": 0.01}},
            "accuracy",
        ),
        "Grouped scores.",
        alt="Two groups of bars",
    )
    return page


@pytest.fixture(scope="session", name="build_sample")
def _build_sample():
    return build_sample


@pytest.fixture(scope="session")
def sample():
    return build_sample()
