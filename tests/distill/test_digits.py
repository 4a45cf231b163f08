"""The bar of every run of the tests: digits, an MLP for a teacher and a smaller one for a student.

All students of one objective are trained at once, stacked along the first dimension of their weights: each takes the
steps that it would take alone, since AdamW goes number by number and the losses are means over as many images.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penult
from penult.data import digits, shift
from penult.distill import SoftTargetLoss, targets

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
STEPS, BATCH, EACH, TEMPERATURE = 600, 64, 30, 4.0
# Half: the right half of the image is covered, so that the teachers get about half of the pool images right. Others lie
# in the same range by their severity, in tenths. Nothing that a student does went into these choices;
# `test_the_domains_are_what_they_are_called` holds them.
SHIFTS = {"texture": 0.5, "noise": 0.5, "rotation": 0.3, "contrast": 0.7, "inversion": 1.0}
DOMAINS = ("none", "half", *SHIFTS)
METHODS = ("ce", "hinton", "gated")


class Stack(nn.Module):
    """Networks of linear layers with ReLU between them, one a seed: images (S, N, 1, 8, 8) to logits (S, N, K)."""

    def __init__(self, seeds, *widths):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        networks = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                networks.append([nn.Linear(a, b) for a, b in pairwise(widths)])
        for layers in zip(*networks, strict=True):
            self.weights.append(torch.stack([layer.weight.detach() for layer in layers]))
            self.biases.append(torch.stack([layer.bias.detach() for layer in layers]).unsqueeze(1))

    def forward(self, x):
        x = x.flatten(2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight.mT)
        return x

    def one(self, index):
        """One of them, as a network of its own."""
        layers = [nn.Flatten()]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            layer = nn.Linear(*reversed(weight.shape[1:]))
            layer.load_state_dict({"weight": weight[index], "bias": bias[index, 0]})
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1]).requires_grad_(False)


def trained(stack, images, labels, seeds, loss, *more):
    """The stack after its steps; images (S, N, 1, 8, 8), labels (S, N) and what else the loss takes (S, N, K)."""
    optimizer = torch.optim.AdamW(stack.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=STEPS)
    count, orders = labels.shape[1], {}
    for seed in set(seeds):
        generator = torch.Generator().manual_seed(seed)
        epochs = [torch.randperm(count, generator=generator) for _ in range(STEPS * BATCH // count + 1)]
        orders[seed] = torch.cat(epochs)[: STEPS * BATCH].reshape(STEPS, BATCH)
    rows = torch.stack([orders[seed] for seed in seeds], 1)  # (steps, S, batch)
    each = torch.arange(len(seeds))[:, None]
    for batch in rows:
        logits = stack(images[each, batch]).flatten(0, 1)
        optimizer.zero_grad()
        given = (part[each, batch].flatten(0, 1) for part in (labels, *more))
        (len(seeds) * loss(logits, *given)).backward()  # the sum over the students
        optimizer.step()
        schedule.step()
    return stack.requires_grad_(False)


def accuracy(logits, labels):
    return 100 * float((logits.argmax(-1) == labels).double().mean())


def changed(images, domain):
    if domain == "half":
        return torch.cat([images[..., :4], torch.zeros_like(images[..., 4:])], -1)
    return images if domain == "none" else shift(images, domain, SHIFTS[domain])


@pytest.fixture(scope="module")
def figures():
    """Accuracy on test images of the domain, [domain][method][seed]; "pool" is the teacher's on pool images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = [digits().split(0.3, 0.4, 0.3, seed=seed) for seed in SEEDS]
    source = [torch.stack([getattr(own[0], name) for own in parts]) for name in ("images", "labels")]
    teachers = trained(Stack(SEEDS, 64, 128, 32, 10), *source, SEEDS, F.cross_entropy)
    found = {domain: {} for domain in DOMAINS}
    runs, images, labels, said, taught, held_out = [], [], [], [], [], []
    for seed, (known, pool, test) in zip(SEEDS, parts, strict=True):
        teacher = teachers.one(SEEDS.index(seed))
        head = penult.find_head(teacher, known.images[:8])
        tap = penult.Tap(teacher, head)
        pair = penult.GenerativePair(head)
        few = torch.cat([(pool.labels == y).nonzero().flatten()[:EACH] for y in range(10)])
        for domain in DOMAINS:
            pictures, unseen = changed(pool.images, domain), changed(test.images, domain)
            shown = penult.extract(tap, [(pictures[few], pool.labels[few])])
            runs.append((domain, seed))
            mean, deviation = pictures[few].mean(), pictures[few].std()  # students see standardised images
            images.append((pictures[few] - mean) / deviation)
            labels.append(pool.labels[few])
            held_out.append(((unseen - mean) / deviation, test.labels))
            said.append((shown.logits / TEMPERATURE).softmax(-1))
            taught.append(targets(pair, activations=shown, temperature=TEMPERATURE))
            found[domain].setdefault("pool", []).append(accuracy(teacher(pictures), pool.labels))
            found[domain].setdefault("teacher", []).append(accuracy(teacher(unseen), test.labels))
    images, labels = torch.stack(images), torch.stack(labels)
    seeds = [seed for _, seed in runs]
    for method in METHODS:  # paired: the same first weights and the same order of the same images
        loss = F.cross_entropy if method == "ce" else SoftTargetLoss(TEMPERATURE)
        more = {"ce": (), "hinton": (torch.stack(said),), "gated": (torch.stack(taught),)}[method]
        first = Stack([100 + seed for seed in seeds], 64, 24, 10)
        students = trained(first, images, labels, seeds, loss, *more)
        for index, (domain, _) in enumerate(runs):
            unseen, truth = held_out[index]
            found[domain].setdefault(method, []).append(accuracy(students.one(index)(unseen), truth))
    torch.set_num_threads(threads)
    return found


def gain(figures, domains, over="ce"):
    differences = [
        a - b for domain in domains for a, b in zip(figures[domain]["gated"], figures[domain][over], strict=True)
    ]
    return sum(differences) / len(differences)


def told(figures):
    return "\n" + "\n".join(
        f"{domain:10s} {method:8s} " + "  ".join(f"{value:5.1f}" for value in values)
        for domain, methods in figures.items()
        for method, values in methods.items()
    )


def test_the_domains_are_what_they_are_called(figures):
    """The teachers know their own domain, half of others, and less than guessing of inverted digits."""
    bounds = {"none": (93, 100), "inversion": (0, 10)}
    for domain in DOMAINS:
        low, high = bounds.get(domain, (35, 55))
        assert all(low <= each <= high for each in figures[domain]["pool"]), told(figures)


def test_without_a_shift_the_teacher_helps(figures):
    assert gain(figures, ["none"]) >= 0, told(figures)


@pytest.mark.parametrize("domain", DOMAINS[1:])
def test_under_a_shift_the_student_is_as_good_as_without_a_teacher(figures, domain):
    assert gain(figures, [domain]) >= -1.5, told(figures)


@pytest.mark.parametrize("domain", [each for each in DOMAINS[1:] if each != "noise"])
def test_under_a_shift_it_is_far_above_one_that_believes_the_teacher(figures, domain):
    assert gain(figures, [domain], over="hinton") >= 20, told(figures)


def test_noise_leaves_little_to_learn_but_more_than_the_teacher_knows(figures):
    """Students of labels alone are within ten points of the teacher here, so that no method can be twenty above it."""
    assert gain(figures, ["noise"], over="hinton") >= 3, told(figures)


def test_a_stack_trains_as_its_networks_would_alone():
    images, labels = torch.rand(2, 90, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 10
    both = trained(Stack((4, 5), 64, 8, 10), images, labels.expand(2, 90), (1, 2), F.cross_entropy)
    alone = trained(Stack((5,), 64, 8, 10), images[1:], labels[None], (2,), F.cross_entropy)
    assert torch.allclose(both.one(1)(images[1]), alone.one(0)(images[1]), atol=1e-3)
