"""Sections of the page on a pair that are about its head and its draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penult.activations import Activations
from penult.bases import Base
from penult.head import Head
from penult.pair import GenerativePair
from penult.realism import Realism, compare
from penult.report import plots
from penult.report import realism as figures
from penult.report.page import Page, Section
from penult.scores import _raw_logits

__all__ = ["geometry", "head", "label", "laws", "realism", "share"]

_Z = 4.0  # the bar on a z-score: one true law in 16,000 fails it by chance
_DRAWS, _NUMBERS = 4000, 20_000_000  # joint draws, and numbers that they may take
_TESTED = 4  # classes whose mean is checked
_CELLS, _CLASSES = 12, 30  # of a heat map with numbers, and of one at all
_PAIRS, _ROWS = 30, 4096  # pairs in a table, and rows that are compared with each other
_POINTS = 800  # of either cloud
_COLOURS = 8  # classes in colour where there are more than ten


def label(name: str, letters: int = 24) -> str:
    """A name that fits into a figure."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def labels_of(names: Iterable[str], letters: int = 28) -> dict[str, str]:
    """Labels of names that a figure tells apart, from one another and from its own "threshold" and "chance".

    Example:
        >>> labels_of(["familiar", "chance", "noise"], letters=6)
        {'familiar': 'famil…', 'chance': 'chance (2)', 'noise': 'noise'}
    """
    found: dict[str, str] = {}
    taken = {"threshold", "chance"}
    for name in names:
        plain = label(name, letters)
        numbered = (f"{plain} ({number})" for number in count(2))
        found[name] = next(each for each in chain([plain], numbered) if each not in taken)
        taken.add(found[name])
    return found


def share(value: float) -> str:
    """A share in percent, in as many digits as tell.

    Example:
        >>> share(0.05), share(0.05321), share(1.0), share(0.0004)
        ('5 %', '5.32 %', '100 %', '0.04 %')
    """
    return f"{100 * value:.3g} %"


def head(page: Page, pair: GenerativePair) -> None:
    """What the head is, and what the base."""
    own, info = pair.head, pair.base.info
    section = page.section(
        "The head",
        "The last linear layer, whose softmax gives the classes. "
        + (
            "The certificate says how it was found in its model, and what the activations before it look like."
            if own.certificate is not None
            else "It was given as it is: there is no certificate of how it was found in a model."
        ),
    )
    section.facts(
        {
            "classes": own.num_classes,
            "dimensions": own.in_features,
            "rank of the centered head": own.rank,
            "temperature": own.temperature,
            "bias": own.bias is not None,
        }
    )
    if own.certificate is not None:
        section.code(str(own.certificate), label="Certificate of the head")
    error = info.mgf_standard_error
    exact = "exact" if info.exact_mgf else "estimated" + ("" if error is None else f", standard error {error:.2g}")
    section.table(
        ["the base", ""],
        [
            ["name", info.name],
            ["as Python shows it", f"`{pair.base}`".replace("\n", " ")],
            ["support", info.support],
            ["densities refer to", info.reference if info.has_density else "it has none"],
            ["M, its moment generating function", exact],
            ["numbers that it keeps", f"{_floats(pair.base):,}"],
            ["source", info.source],
        ],
        align="ll",
    )


def _floats(base: Base) -> int:
    count = getattr(base, "num_parameters", None)
    return count if isinstance(count, int) else sum(t.numel() for t in base.state_dict().values())


def laws(
    page: Page, pair: GenerativePair, posterior: Tensor, gap: tuple[float, float], stored_gap: float, seed: int
) -> list[dict[str, Any]]:
    """What has to hold of the pair, and what is measured of it; gives the rows of the table.

    Args:
        page: The page.
        pair: The pair.
        posterior: Mean class probabilities (K,) of familiar activations.
        gap: Largest difference of the pair's posterior to the softmax of its head there, and what it has to keep below.
        stored_gap: The same of the softmax of stored logits to that of the head.
        seed: Of the draws.
    """
    rows: list[tuple[str, float, float | None]] = [("largest |posterior − softmax(head(h))|", *gap)]
    rows += _drawn_laws(pair, torch.Generator(pair.head.weight.device).manual_seed(seed))
    failed = [name for name, value, bar in rows if bar is not None and not value <= bar]
    distance = float((pair.prior.probs.detach().cpu().double() - posterior).abs().sum()) / 2
    rows += [
        ("largest |softmax of stored logits − softmax(head(h))|", stored_gap, None),
        ("half of Σ|implied prior − mean posterior of familiar activations|", distance, None),
    ]
    section = page.section(
        "Identity and laws",
        "With any base the posterior of the pair is the softmax of the head: **that it is exact is a theorem**. It "
        "checks the wiring alone, since M cancels in it. What a wrong M does not pass are the laws of draws below: "
        "mean deviations in standard errors, the largest of many. **How real draws are is no theorem**; it is measured "
        "further down.",
    )
    if failed:
        section.text(f"**Not everything holds**: {'; '.join(failed)}. Densities and prior of this pair are in doubt.")
    section.table(
        ["", "measured", "at most", "holds"],
        [
            [
                name,
                float(f"{value:.2g}"),
                None if bar is None else float(f"{bar:.2g}"),
                "no law" if bar is None else bool(value <= bar),
            ]
            for name, value, bar in rows
        ],
        caption="Rows without a bar are no laws: the first tells whether the head is the network's own (a temperature "
        "or another prior set it apart), the second how far the implied prior is from the data's, 0 to 1.",
        align="lrrl",
    )
    return [{"name": name, "measured": value, "bar": bar} for name, value, bar in rows]


def _drawn_laws(pair: GenerativePair, generator: torch.Generator) -> list[tuple[str, float, float | None]]:
    """Z-scores of what a wrong M does not pass, each with its bar."""
    own, base = pair.head, pair.base
    count = max(200, min(_DRAWS, _NUMBERS // max(own.num_classes, own.in_features)))
    h, y = pair.sample((count,), generator)
    p = _raw_logits(own, h).cpu().double().softmax(-1)
    hits = torch.bincount(y.cpu(), minlength=own.num_classes).double()
    doubt = (base.info.mgf_standard_error or 0.0) * p.sum(0)
    variance = (p * (1 - p)).sum(0)
    known = variance >= 5  # below, a count is not normal
    z = ((hits - p.sum(0)).abs() / (variance + doubt.square()).sqrt())[known]
    found: list[tuple[str, float, float | None]] = []
    if len(z):
        name = f"{count:,} joint draws: classes as often as the softmax says"
        found.append((name, float(z.max()), _bar(len(z))))
    if base.info.exact_mgf:
        classes = torch.linspace(0, own.num_classes - 1, min(own.num_classes, _TESTED)).round().long()
        rows = own.centered_weight(classes.to(own.weight.device)).to(
            torch.promote_types(own.weight.dtype, torch.float32)
        )
        tilt = base.tilt(rows)
        off = (tilt.sample((count // 2,), generator) - tilt.mean).cpu().double()
        off = torch.cat([off, (off * rows.cpu().double()).sum(-1, keepdim=True)], dim=-1)  # where a wrong M shows most
        floor = 1e-7 * max(1.0, float(off.abs().max()))  # rounding, where a coordinate does not vary
        error = off.std(0) / math.sqrt(len(off)) + floor
        name = f"{count // 2:,} draws of {len(classes)} classes: their mean is ∇ log M"
        found.append((name, float((off.mean(0).abs() / error).max()), _bar(error.numel())))
    return found


def _bar(count: int) -> float:
    """What the largest of so many z-scores stays below, all but never by chance above."""
    return max(_Z, math.sqrt(2 * math.log(max(count, 1))) + 2)


def geometry(page: Page, own: Head, names: Sequence[str], seed: int) -> None:
    """Which classes the head holds for alike."""
    k = own.num_classes
    chosen = torch.arange(k)
    if k > _ROWS:
        chosen = torch.randperm(k, generator=torch.Generator().manual_seed(seed))[:_ROWS].sort().values
    rows = own.centered_weight(chosen.to(own.weight.device)).cpu().double()
    norms = torch.linalg.vector_norm(rows, dim=-1)
    unit = F.normalize(rows, dim=-1)
    cosines = (unit @ unit.T).clamp(-1, 1)
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    between = cosines[first, second]
    closest = [
        (names[int(chosen[first[place]])], names[int(chosen[second[place]])], float(between[place]))
        for place in between.topk(min(_PAIRS, len(between))).indices.tolist()
    ]
    section = page.section("Class geometry")
    section.text(_in_words(closest, k) + ("" if k <= _ROWS else f" {_ROWS:,} classes of {k:,}, chosen at random."))
    low, high = int(norms.argmin()), int(norms.argmax())
    section.facts({"smallest ‖w_y‖": float(norms[low]), "median": float(norms.median()), "largest": float(norms[high])})
    if k > _CLASSES:
        section.text(f"The smallest row is that of {names[int(chosen[low])]}, the largest {names[int(chosen[high])]}.")
        section.figure(
            plots.histograms({"pairs of classes": between}, xlabel="cosine of w_y and w_y′", bins=60),
            caption="Cosines between the centered rows of all pairs of classes.",
            alt=f"Histogram of the cosines of {len(between):,} pairs, from {between.min():.2f} to {between.max():.2f}.",
        )
        section.table(
            ["class", "and class", "cosine"],
            [[a, b, f"{value:.3f}"] for a, b, value in closest],
            caption=f"The {len(closest)} closest pairs.",
            align="llr",
        )
        return
    shown = [label(name, 14) for name in names]
    section.figure(
        plots.heatmap(
            cosines.round(decimals=2) + 0.0,
            shown,
            shown,
            annotate=k <= _CELLS,
            diverging=True,
            xlabel="class",
            ylabel="class",
        ),
        caption="Cosines between the centered rows w_y.",
        alt=f"Heat map of the cosines between {k} rows. " + _in_words(closest, k),
    )
    nearest = (cosines - 3 * torch.eye(k, dtype=torch.float64)).max(-1)
    section.table(
        ["class", "‖w_y‖", "nearest class", "cosine"],
        [
            [names[y], f"{float(norms[y]):.4g}", names[int(nearest.indices[y])], f"{float(nearest.values[y]):.3f}"]
            for y in range(k)
        ],
        caption="The norm of each row, and the class that the head holds for most alike.",
        align="lrlr",
    )


def _in_words(closest: Sequence[tuple[str, str, float]], k: int) -> str:
    if k == 2:
        return "Of two classes the centered rows are opposite, cosine −1, whatever the network."
    pairs = [f"{a} and {b} ({value:.2f})".replace("-", "−") for a, b, value in closest[:3]]
    return (
        f"The head holds most alike {', then '.join(pairs)}: the cosine between their rows, the classes' common part "
        f"taken away. {k} classes as far apart as can be have {-1 / (k - 1):.2f} between any two.".replace(
            "have -", "have −"
        )
    )


def realism(
    page: Page,
    pair: GenerativePair,
    familiar: Activations,
    predicted: Tensor,
    names: Sequence[str],
    seed: int,
    fitted: bool,
    progress: bool,
) -> dict[str, Any] | None:
    """Draws beside real activations, and what classifiers make of the two; gives the AUCs."""
    section = page.section(
        "Real beside synthetic",
        "Three classifiers try to tell draws of the pair from real activations: an AUC of 0.5 is what they get where "
        "they cannot. Beside it stands what real activations get against other real ones, the best to hope for.",
    )
    if fitted:
        section.text("**The base was fitted to these very activations**: it may be closer to them than to others.")
    _clouds(section, pair, familiar, predicted, names, seed)
    try:
        result = compare(pair, familiar, seed=seed, progress=progress)
    except (ValueError, RuntimeError) as error:
        section.text(f"Realism is not measured: {error}.")
        return None
    drawn, real = result.comparison, result.real_comparison
    section.text(_verdict(result))
    section.facts(
        {f"AUC, {test}": f"{drawn.auc[test]:.3f}" for test in drawn.auc} | {"energy coefficient": f"{drawn.energy:.4f}"}
    )
    section.figure(
        figures.aucs(result),
        caption=(f"Means over {drawn.classes} classes." if drawn.classes else "All classes together.")
        + f" {drawn.rows:,} rows on either side; bars are standard errors."
        + (" Labels were drawn from the head's softmax." if result.labels == "drawn" else ""),
        alt="Bars of the AUC of each test: "
        + "; ".join(f"{test} {drawn.auc[test]:.3f}, real {real.auc[test]:.3f}" for test in drawn.auc),
    )
    spread = result.chart_cosine or result.cosine
    section.figure(
        figures.cosines(result),
        caption="The cosine of activations to the row of their class.",
        alt=f"Histograms of cosines, mean {spread.real_mean:.3f} of real and {spread.drawn_mean:.3f} of drawn ones.",
    )
    section.figure(
        figures.norms(result),
        caption="The norm of activations.",
        alt=f"Histograms of norms, mean {result.norm.real_mean:.4g} of real and {result.norm.drawn_mean:.4g} of drawn.",
    )
    return {
        "labels": result.labels,
        "auc": dict(drawn.auc),
        "real_auc": dict(real.auc),
        "energy": drawn.energy,
        "real_energy": real.energy,
    }


def _verdict(result: Realism) -> str:
    drawn, real = result.comparison, result.real_comparison
    worst = drawn.worst
    apart = drawn.auc[worst] - max(real.auc[worst], 0.5)
    error = math.hypot(drawn.auc_error[worst], real.auc_error[worst])
    told = f"{worst} gets {drawn.auc[worst]:.3f}, and {real.auc[worst]:.3f} for real against real"
    if apart > 2 * error and drawn.auc[worst] > 0.9:
        return f"Draws are told from real activations with ease: {told}. As a sampler this base is a poor stand-in."
    if apart > 2 * error:
        return f"Draws can be told from real activations, not with ease: {told}."
    return f"Within the error of this many rows, draws are not told from real activations: {told}."


def _clouds(
    section: Section, pair: GenerativePair, familiar: Activations, predicted: Tensor, names: Sequence[str], seed: int
) -> None:
    """Real and drawn activations of the same classes, along the principal components of the real ones."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(familiar), generator=generator)[:_POINTS].sort().values
    part = familiar[places]
    y = predicted[places] if part.labels is None else part.labels.cpu().long()
    real = part.activations.cpu().double()
    real = real.clamp_min(0) if part.pre_activation else real
    device = pair.head.weight.device
    try:
        drawn = pair.given(y.to(device)).sample(generator=torch.Generator(device).manual_seed(seed + 1)).cpu().double()
    except (ValueError, RuntimeError) as error:
        section.text(f"Draws of these classes are not to be had: {error}.")
        return
    centre = real.mean(0)
    axes = torch.linalg.svd(real - centre, full_matrices=False).Vh[:2].T
    flat = [F.pad((h - centre) @ axes, (0, 2 - axes.shape[1])) for h in (real, drawn)]
    counts = torch.bincount(y, minlength=len(names))
    most = len(names) if len(names) <= 10 else _COLOURS
    coloured = counts.argsort(descending=True, stable=True)[:most].sort().values
    index = torch.full((len(names),), -1)
    index[coloured] = torch.arange(len(coloured))
    rest = "" if most == len(names) else "other classes"
    section.figure(
        plots.scatter(
            flat[0],
            index[y],
            [label(names[each], 14) for each in coloured.tolist()],
            second=(flat[1], index[y]),
            titles=("real", "drawn"),
            rest=rest,
        ),
        caption=f"{len(y):,} real activations, and a draw of the same class for each, along the two leading principal "
        f"components of the real ones. Colours are {'predictions' if part.labels is None else 'labels'}"
        + (f", of the {most} classes seen most." if rest else "."),
        alt="Two scatter plots with one colour a class: real activations at the left, drawn ones at the right.",
    )
