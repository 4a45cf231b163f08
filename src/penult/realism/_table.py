"""Results as tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from penult.realism._result import Comparison, Realism, Spread

__all__ = ["columns", "number", "realism_table"]


def number(value: float | None, digits: int = 3) -> str:
    """A number as tables show it; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def realism_table(result: Realism) -> str:
    """The text of a `Realism`."""
    words = {"given": "labels as given", "stored": "labels as stored", "drawn": "labels drawn from the head"}
    lines = [
        f"{result.base} base against {result.rows} real activations "
        f"(d = {result.in_features}, K = {result.num_classes}, {words[result.labels]})"
    ]
    table = [["two-sample tests", "pair", "s.e.", "real", "s.e.", "perfect"]]
    for found, real in ((result.by_class, result.real_by_class), (result.pooled, result.real_pooled)):
        if found is None or real is None:
            continue
        where = f"each of {found.classes} classes" if found.classes else "all classes together"
        table += _tests(where, found, real)
    lines += columns(table)
    table = [["", "real", "drawn", "exact law", "distance", "real", "measured by"]]
    table.append(_spread("cosine of h to w_y", result.cosine, "Kolmogorov-Smirnov"))
    if result.chart_cosine is not None:
        table.append(_spread("the same in the chart", result.chart_cosine, "Kolmogorov-Smirnov"))
    table.append(_spread("norm of h", result.norm, "Wasserstein / sd"))
    lines += ["", *columns(table)]
    c = result.calibration
    drawn, real_row = (c.drawn_accuracy, c.drawn_confidence, c.drawn_ece), (c.real_accuracy, c.real_confidence)
    table = [["head", "accuracy", "confidence", "ECE"]]
    table.append(["joint draws of the pair", *(number(v) for v in drawn)])
    table.append(["real activations", *(number(v) for v in (*real_row, c.real_ece))])
    lines += ["", *columns(table)]
    p, n, t = result.prior, result.collapse, result.tilt_identity
    table = [
        [
            "implied prior",
            f"min {p.min:.3g}, max {p.max:.3g}, effective classes {p.effective_classes:.4g} of {result.num_classes}, "
            f"total variation to the real mean posterior {p.total_variation:.3f}",
        ],
        [
            "rows of W, centered",
            f"norms {n.weight_norm_min:.3g} to {n.weight_norm_max:.3g} (cv {n.weight_norm_cv:.2f}), cosines "
            f"{n.weight_cosine_mean:.3f} ± {n.weight_cosine_sd:.3f} (simplex {n.weight_cosine_ideal:.3f}), mean row "
            f"{n.mean_weight_norm:.3g}, largest bias {n.bias_max:.3g}",
        ],
        [
            "class means",
            f"cosine to w_y {n.mean_alignment_raw:.3f}, centered {n.mean_alignment_centered:.3f}; mean norms "
            f"{n.class_norm_min:.3g} to {n.class_norm_max:.3g}; trace within {number(n.trace_within)}, between "
            f"{n.trace_between:.3f}",
        ],
        [
            "mean_y = m + S w_y",
            f"offset {number(t.offset)} against variance {number(t.variance)}: ratio {number(t.ratio)} (1 holds)",
        ],
    ]
    width = max(len(row[0]) for row in table)
    return "\n".join([*lines, "", *(f"{name.ljust(width)}  {text}" for name, text in table)])


def _tests(where: str, found: Comparison, real: Comparison) -> list[list[str]]:
    rows = [
        [
            f"  AUC {name}, {where}",
            number(found.auc[name]),
            number(found.auc_error[name]),
            number(real.auc[name]),
            number(real.auc_error[name]),
            "0.5",
        ]
        for name in found.auc
    ]
    energies = (found.energy, found.energy_error, real.energy, real.energy_error)
    return [*rows, [f"  energy, {where}", *(number(v, 4) for v in energies), "0"]]


def _spread(name: str, s: Spread, measure: str) -> list[str]:
    law = "-" if s.law_mean is None or s.law_sd is None else f"{s.law_mean:.3f} ± {s.law_sd:.3f}"
    both = (f"{s.real_mean:.3f} ± {s.real_sd:.3f}", f"{s.drawn_mean:.3f} ± {s.drawn_sd:.3f}")
    return [name, *both, law, number(s.distance), number(s.real_distance), measure]
