"""Sections of the page on a pair about its head, its exact properties and its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from penult.activations import Activations
from penult.bases import Base
from penult.head import Head
from penult.pair import GenerativePair
from penult.realism import Realism, compare
from penult.report import plots
from penult.report import realism as figures
from penult.report.markup import number, shorten
from penult.report.page import Page, Section
from penult.scores import _raw_logits

__all__ = ["class_cosines", "geometry", "head", "laws", "origin", "realism"]

# Limit of a z-score: a correct pair exceeds it by chance once in 16,000 checks.
_Z = 4.0
# Joint samples for the checks, fewer if they would take more than `_NUMBERS` numbers.
_SAMPLES, _NUMBERS = 4000, 20_000_000
# Classes whose sample mean is checked.
_TESTED = 4
# Classes up to which a heat map has numbers in its cells, and up to which there is a heat map.
_CELLS, _CLASSES = 12, 30
# Pairs of classes in a table, and rows of the head that are compared with each other.
_PAIRS, _ROWS = 30, 4096
# Real activations in the scatter plot.
_POINTS = 800

Check = tuple[str, float, float | None]


def origin(page: Page, pair: GenerativePair, head_label: str, settings: Mapping[str, Any], note: str = "") -> None:
    """Add the section on the head, the base and the settings of a training.

    Args:
        page: The page.
        pair: The pair that was trained with.
        head_label: Name of the head for screen readers.
        settings: Settings of the training by name.
        note: Further sentences on the base.
    """
    section = page.section("Head, base and settings")
    section.code(str(pair.head.certificate or pair.head), label=head_label)
    section.text(f"Base of the pair: `{pair.base}`." + (f" {note}" if note else ""))
    rows = [(f"`{name}`", "–" if value is None else str(value)) for name, value in settings.items()]
    section.table(("setting", "value"), rows, align="ll")


def head(page: Page, pair: GenerativePair) -> None:
    """Add the section on the head and the base."""
    head, info = pair.head, pair.base.info
    section = page.section(
        "The head",
        "The head is the last linear layer of the classifier; the softmax of its outputs gives the class "
        "probabilities. " + _origin_of(head),
    )
    section.facts(
        {
            "classes": head.num_classes,
            "dimensions": head.in_features,
            "rank of the centered head": head.rank,
            "temperature": head.temperature,
            "bias": head.bias is not None,
        }
    )
    if head.certificate is not None:
        section.code(str(head.certificate), label="Certificate of the head")
    error = info.mgf_standard_error
    exact = "exact" if info.exact_mgf else "estimated" + ("" if error is None else f", standard error {error:.2g}")
    section.table(
        ["the base", ""],
        [
            ["name", info.name],
            ["Python object", f"`{pair.base}`".replace("\n", " ")],
            ["support", info.support],
            ["densities with respect to", info.reference if info.has_density else "it has no density"],
            ["M, its moment generating function", exact],
            ["numbers stored", f"{_num_parameters(pair.base):,}"],
            ["literature", info.source],
        ],
        align="ll",
    )


def _num_parameters(base: Base) -> int:
    count = getattr(base, "num_parameters", None)
    return count if isinstance(count, int) else sum(tensor.numel() for tensor in base.state_dict().values())


# --- exact properties ---------------------------------------------------------------------------------------


def laws(
    page: Page, pair: GenerativePair, posterior: Tensor, gap: tuple[float, float], stored_gap: float, seed: int
) -> list[dict[str, Any]]:
    """Add the section on the exact properties of the pair, and return the rows of its table for JSON.

    Args:
        page: The page.
        pair: The pair.
        posterior: Mean class probabilities (K,) of the familiar activations.
        gap: Largest difference between the pair's posterior and the softmax of its head, and its largest allowed value.
        stored_gap: Largest difference between the softmax of the stored logits and that of the head.
        seed: Seed of the samples.
    """
    checks: list[Check] = [("largest |posterior − softmax(head(h))|", *gap)]
    checks += _sample_checks(pair, torch.Generator(pair.head.weight.device).manual_seed(seed))
    failed = [name for name, value, limit in checks if limit is not None and not value <= limit]
    distance = float((pair.prior.probs.detach().cpu().double() - posterior).abs().sum()) / 2
    checks += [
        ("largest |softmax of stored logits − softmax(head(h))|", stored_gap, None),
        ("half of Σ|implied prior − mean posterior of familiar activations|", distance, None),
    ]
    section = page.section(
        "Identity and laws",
        "For every base, the posterior of the pair equals the softmax of its head. **This identity is a theorem**; "
        "measuring it only tests the implementation, and it cannot reveal an error in M, because M cancels in it. The "
        "checks on samples can reveal such errors. Each compares sample means with their exact values and shows the "
        "largest deviation in standard errors. **Whether samples are realistic is not a theorem**; it is measured "
        "further down.",
    )
    if failed:
        section.text(f"**Some checks failed**: {'; '.join(failed)}. Do not rely on densities and prior of this pair.")
    section.table(
        ["check", "measured", "limit", "passed"],
        [_check_row(name, value, limit) for name, value, limit in checks],
        caption="Rows without a limit are not checks. The first of them is large if the head differs from the "
        "network's own, for example in its temperature or its prior. The second is the distance between the implied "
        "prior and the class frequencies of the data, from 0 to 1.",
        align="lrrl",
    )
    return [{"name": name, "measured": value, "bar": limit} for name, value, limit in checks]


def _check_row(name: str, value: float, limit: float | None) -> list[Any]:
    measured = float(f"{value:.2g}")
    if limit is None:
        return [name, measured, None, "no limit"]
    return [name, measured, float(f"{limit:.2g}"), bool(value <= limit)]


def _sample_checks(pair: GenerativePair, generator: torch.Generator) -> list[Check]:
    """Return z-scores of sample means that a wrong M makes large, each with its limit."""
    head, base = pair.head, pair.base
    count = max(200, min(_SAMPLES, _NUMBERS // max(head.num_classes, head.in_features)))
    h, y = pair.sample((count,), generator)
    p = _raw_logits(head, h).cpu().double().softmax(-1)
    hits = torch.bincount(y.cpu(), minlength=head.num_classes).double()
    mgf_error = (base.info.mgf_standard_error or 0.0) * p.sum(0)
    variance = (p * (1 - p)).sum(0)
    # The normal approximation of a count needs a variance of about 5 or more.
    enough = variance >= 5
    z = ((hits - p.sum(0)).abs() / (variance + mgf_error.square()).sqrt())[enough]
    checks: list[Check] = []
    if len(z):
        checks.append((f"class counts of {count:,} joint samples against the softmax", float(z.max()), _limit(len(z))))
    if base.info.exact_mgf:
        classes = torch.linspace(0, head.num_classes - 1, min(head.num_classes, _TESTED), device="cpu").round().long()
        rows = head.centered_weight(classes.to(head.weight.device)).to(
            torch.promote_types(head.weight.dtype, torch.float32)
        )
        tilt = base.tilt(rows)
        deviation = (tilt.sample((count // 2,), generator) - tilt.mean).cpu().double()
        # Errors of M are largest along the row of the class, so this direction is added to the coordinates.
        along_row = (deviation * rows.cpu().double()).sum(-1, keepdim=True)
        deviation = torch.cat([deviation, along_row], dim=-1)
        # Coordinates that do not vary deviate by rounding errors only.
        rounding = 1e-7 * max(1.0, float(deviation.abs().max()))
        error = deviation.std(0) / math.sqrt(len(deviation)) + rounding
        name = f"mean of {count // 2:,} samples from each of {len(classes)} classes against ∇ log M"
        checks.append((name, float((deviation.mean(0).abs() / error).max()), _limit(error.numel())))
    return checks


def _limit(count: int) -> float:
    """Return a limit that the largest of `count` z-scores almost never exceeds by chance."""
    return max(_Z, math.sqrt(2 * math.log(max(count, 1))) + 2)


# --- classes ------------------------------------------------------------------------------------------------


def class_cosines(head: Head, names: Sequence[str]) -> Figure:
    """Draw the cosines between the centered rows of a head as a heat map.

    Args:
        head: The head.
        names: K names of classes.

    Example:
        >>> figure = class_cosines(penult.Head(2 * torch.eye(3)), ["cat", "dog", "bird"])
    """
    labels = [shorten(name, 14) for name in names]
    _, cosines = _norms_and_cosines(head, torch.arange(head.num_classes, device="cpu"))
    # Adding zero turns the negative zeros of rounding into zeros.
    cosines = cosines.round(decimals=2) + 0.0
    return plots.heatmap(
        cosines, labels, labels, annotate=len(names) <= _CELLS, diverging=True, xlabel="class", ylabel="class"
    )


def _norms_and_cosines(head: Head, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms (C,) of the centered rows of C classes, and the cosines (C, C) between them."""
    rows = head.centered_weight(classes.to(head.weight.device)).cpu().double()
    unit = F.normalize(rows, dim=-1)
    return torch.linalg.vector_norm(rows, dim=-1), (unit @ unit.T).clamp(-1, 1)


def geometry(page: Page, head: Head, names: Sequence[str], seed: int) -> None:
    """Add the section on the classes with the most similar rows."""
    num_classes = head.num_classes
    classes = torch.arange(num_classes, device="cpu")
    if num_classes > _ROWS:
        classes = (
            torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed), device="cpu")[:_ROWS]
            .sort()
            .values
        )
    names = [names[y] for y in classes.tolist()]
    norms, cosines = _norms_and_cosines(head, classes)
    first, second = torch.triu_indices(len(names), len(names), offset=1, device="cpu")
    between = cosines[first, second]
    closest = [
        (names[int(first[index])], names[int(second[index])], float(between[index]))
        for index in between.topk(min(_PAIRS, len(between))).indices.tolist()
    ]
    section = page.section("Class geometry")
    note = f" The numbers are for {_ROWS:,} of the {num_classes:,} classes, chosen at random."
    section.text(_closest_in_words(closest, num_classes) + (note if num_classes > _ROWS else ""))
    low, high = int(norms.argmin()), int(norms.argmax())
    section.facts(
        {
            "smallest ‖w_y‖": float(norms[low]),
            "median ‖w_y‖": float(norms.median()),
            "largest ‖w_y‖": float(norms[high]),
        }
    )
    if num_classes > _CLASSES:
        section.text(f"The row with the smallest norm is that of {names[low]}; the largest is that of {names[high]}.")
        _many_classes(section, between, closest)
        return
    section.figure(
        class_cosines(head, names),
        caption="Cosines between the centered rows w_y.",
        alt=f"Heat map of the cosines between {num_classes} rows. {_closest_in_words(closest, num_classes)}",
    )
    nearest = (cosines - 3 * torch.eye(num_classes, dtype=torch.float64, device="cpu")).max(-1)
    section.table(
        ["class", "‖w_y‖", "nearest class", "cosine"],
        [
            [name, f"{float(norm):.4g}", names[int(index)], number(float(cosine), ".3f")]
            for name, norm, index, cosine in zip(names, norms, nearest.indices, nearest.values, strict=True)
        ],
        caption="The norm of the row of each class, and the class with the most similar row.",
        align="lrlr",
    )


def _many_classes(section: Section, between: Tensor, closest: Sequence[tuple[str, str, float]]) -> None:
    low, high = number(float(between.min()), ".2f"), number(float(between.max()), ".2f")
    section.figure(
        plots.histograms({"pairs of classes": between}, xlabel="cosine of w_y and w_y′", bins=60),
        caption="Cosines between the centered rows w_y of all pairs of classes.",
        alt=f"Histogram of the cosines of {len(between):,} pairs of classes, from {low} to {high}.",
    )
    section.table(
        ["class", "and class", "cosine"],
        [[name, other, number(cosine, ".3f")] for name, other, cosine in closest],
        caption=f"The {len(closest)} closest pairs of classes.",
        align="llr",
    )


def _closest_in_words(closest: Sequence[tuple[str, str, float]], num_classes: int) -> str:
    if num_classes == 2:
        return "The centered rows of two classes are always opposite: their cosine is −1 for every network."
    pairs = "; ".join(f"{name} and {other} ({number(cosine, '.2f')})" for name, other, cosine in closest[:3])
    return (
        f"The classes with the most similar rows are {pairs}. The numbers are cosines between centered rows, that is, "
        f"after subtracting the mean of all rows. If all {num_classes} classes were equally far apart, each cosine "
        f"would be {number(-1 / (num_classes - 1), '.2f')}."
    )


# --- samples ------------------------------------------------------------------------------------------------


def realism(
    page: Page,
    pair: GenerativePair,
    familiar: Activations,
    predicted: Tensor,
    names: Sequence[str],
    *,
    seed: int,
    fitted: bool,
    progress: bool,
) -> dict[str, Any] | None:
    """Add the section that compares samples with real activations, and return its AUCs for JSON."""
    section = page.section(
        "Real and sampled activations",
        "Three classifiers are trained to separate samples of the pair from real activations. An AUC of 0.5 means that "
        "they cannot. For comparison, the same classifiers separate real activations from other real activations; no "
        "pair can do better.",
    )
    if fitted:
        section.text("**The base was fitted to these very activations**: it may be closer to them than to new ones.")
    _clouds(section, pair, familiar, predicted, names, seed)
    try:
        result = compare(pair, familiar, seed=seed, progress=progress)
    except (ValueError, RuntimeError) as error:
        section.text(f"Realism was not measured: {error}.")
        return None
    _aucs(section, result)
    cosine = result.chart_cosine or result.cosine
    section.figure(
        figures.cosines(result),
        caption="Cosine between activations and the row of their class.",
        alt=f"Histograms of the cosine; mean {cosine.real_mean:.3f} of real and {cosine.drawn_mean:.3f} of sampled "
        "activations.",
    )
    norm = result.norm
    section.figure(
        figures.norms(result),
        caption="Norm of activations.",
        alt=f"Histograms of the norm; mean {norm.real_mean:.4g} of real and {norm.drawn_mean:.4g} of sampled "
        "activations.",
    )
    sampled, real = result.comparison, result.real_comparison
    return {
        "labels": result.labels,
        "auc": dict(sampled.auc),
        "real_auc": dict(real.auc),
        "energy": sampled.energy,
        "real_energy": real.energy,
    }


def _aucs(section: Section, result: Realism) -> None:
    sampled, real = result.comparison, result.real_comparison
    section.text(_verdict(result))
    section.facts(
        {f"AUC, {test}": f"{auc:.3f}" for test, auc in sampled.auc.items()}
        | {"energy coefficient": number(sampled.energy, ".4f")}
    )
    section.figure(
        figures.aucs(result),
        caption=(f"Means over {sampled.classes} classes. " if sampled.classes else "All classes together. ")
        + f"There are {sampled.rows:,} rows of each kind. Error bars are standard errors."
        + (" Labels were sampled from the softmax of the head." if result.labels == "drawn" else ""),
        alt="Bars of the AUC of each classifier: "
        + "; ".join(f"{test} {sampled.auc[test]:.3f}, real against real {real.auc[test]:.3f}" for test in sampled.auc),
    )


def _verdict(result: Realism) -> str:
    sampled, real = result.comparison, result.real_comparison
    worst = sampled.worst
    excess = sampled.auc[worst] - max(real.auc[worst], 0.5)
    error = math.hypot(sampled.auc_error[worst], real.auc_error[worst])
    aucs = (
        f"the largest AUC is {sampled.auc[worst]:.3f} ({worst}), compared with {real.auc[worst]:.3f} for real against "
        "real"
    )
    if excess > 2 * error and sampled.auc[worst] > 0.9:
        return f"Samples are easy to tell from real activations: {aucs}. Samples of this base are not realistic."
    if excess > 2 * error:
        return f"Samples can be told from real activations, but not easily: {aucs}."
    return f"With this number of rows, samples cannot be told from real activations: {aucs}."


def _clouds(
    section: Section, pair: GenerativePair, familiar: Activations, predicted: Tensor, names: Sequence[str], seed: int
) -> None:
    """Add a scatter plot of real activations and of samples of the same classes."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(familiar), generator=generator, device="cpu")[:_POINTS].sort().values
    part = familiar[index]
    labels = predicted[index] if part.labels is None else part.labels.cpu().long()
    real = part.activations.clamp_min(0) if part.pre_activation else part.activations
    device = pair.head.weight.device
    try:
        sampled = pair.given(labels.to(device)).sample(generator=torch.Generator(device).manual_seed(seed + 1))
    except (ValueError, RuntimeError) as error:
        section.text(f"There are no samples of these classes: {error}.")
        return
    kind = "predictions" if part.labels is None else "labels"
    coloured = "." if len(names) <= figures.ALL_COLOURED else f", of the {figures.MOST_COLOURED} most frequent classes."
    section.figure(
        figures.principal_components(real, labels, sampled, labels, names),
        caption=f"{len(labels):,} real activations and one sample of the same class for each, along the two leading "
        f"principal components of the real ones. Colours are {kind}{coloured}",
        alt="Two scatter plots with one colour for each class: real activations on the left, samples on the right.",
    )


def _origin_of(head: Head) -> str:
    """Return a sentence on where a head comes from."""
    if head.certificate is None:
        return "This head was given directly, so there is no certificate of how it was found in a network."
    if head.certificate.origin is not None:
        return "This head was not found in a network but computed from labelled activations; the certificate says how."
    return "The certificate below shows how the head was found in the network and what its activations look like."
