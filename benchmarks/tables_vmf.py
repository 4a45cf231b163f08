"""Tables of the results of `vmf.py`."""

from __future__ import annotations

from typing import Any

from blocks import Block, Table, bound, chance, origin, plain, power, table, tiny
from blocks import section as section_of

_TOOLS = {
    "penult float64": "**penult**, float64",
    "penult float32": "**penult**, float32",
    "scipy.special.ive": "SciPy `ive` formula, float64",
    "scipy.stats.vonmises_fisher": "`scipy.stats.vonmises_fisher`",
    "ive port float64": "ive ratio (as in common PyTorch ports), float64",
    "ive port float32": "ive ratio (as in common PyTorch ports), float32",
    "TFP (JAX) float64": "TensorFlow Probability (JAX), float64",
    "TFP (JAX) float32": "TensorFlow Probability (JAX), float32",
}
_QUANTITIES = {
    "log_c": "log C", "mean": "A", "variance": "V = A′", "deficit": "1 − A", "mgf": "F",
    "entropy": "entropy", "grad_log_c": "∂ log C/∂κ", "grad_mean": "∂A/∂κ",
}  # fmt: skip
_SAMPLERS = {
    "penult": "penult", "wood": "plain Wood", "wood with shortcut": "Wood, b ≈ (d−1)/4κ",
    "scipy": "scipy.stats", "geomstats": "geomstats",
}  # fmt: skip


@table("vmf-accuracy", source="vmf")
def accuracy(results: dict[str, Any]) -> Block:
    """Largest errors against mpmath, failures, inverse, divergence and pathwise gradient."""
    section = section_of(results, "accuracy")
    cells, bars = section["cells"], section["bars"]
    grid = {int(name.split("=")[1]): cell for name, cell in cells.items() if name.startswith("grid")}
    scattered = [cell for name, cell in cells.items() if name.startswith("random")]
    total = len(grid) * len(section["settings"]["kappas"])
    points = total + sum(cell["penult float64"]["log_c"]["n"] for cell in scattered)

    rows = [
        ("bar, float64", "0", *(tiny(bars["float64"].get(q)) for q in _QUANTITIES)),
        ("bar, float32", "0", *(tiny(bars["float32"]) for _ in _QUANTITIES)),
    ]
    broken: list[tuple[str, ...]] = []
    for key, name in _TOOLS.items():
        if grid[min(grid)][key] == "not installed":
            rows.append((name, "not installed", *("" for _ in _QUANTITIES)))
            continue
        found = [cell[key] for cell in (*grid.values(), *scattered)]
        worst = []
        for quantity in _QUANTITIES:
            entries = [f[quantity] for f in found if quantity in f]
            finite = [e["max"] for e in entries if e["at"] is not None]
            worst.append(tiny(max(finite)) if finite else "–")
        lost = [sum(cell[key][q]["nonfinite"] for cell in grid.values()) for q in ("log_c", "mean") if q in found[0]]
        rows.append((name, f"{' / '.join(map(str, lost))} of {total}", *worst))
        broken.append((name, _where({dim: cell[key]["log_c"].get("where", []) for dim, cell in grid.items()})))
    tables = [
        Table(
            f"Largest error over {points} points, where the result is finite",
            ("tool", "inf or nan, log C / A", *_QUANTITIES.values()),
            rows,
        ),
        Table(f"Where log C is inf, nan or refused, of the {total} points of the grid", ("tool", "where"), broken),
    ]

    rows = []
    for name, entry in cells["inverse"].items():
        rows.append((name, f"{entry['failures']} of {entry['n']}", tiny(entry["error"]), tiny(entry["residual"])))
    tables.append(
        Table(
            "κ from the mean resultant length R",
            ("method", "fails, or has an error over 10 %", "error of κ, relative", "error of A(κ)"),
            rows,
        )
    )
    rows = []
    for case, found in cells["divergence"].items():
        for key, name in (("penult", "penult"), ("ive port float64", "difference of log C by `ive`")):
            e = found[key]
            rows.append((case, name, f"{e['nonfinite']} of {e['n']}", str(e["negative"]), tiny(e["error"])))
    tables.append(
        Table(
            "Kullback-Leibler divergence of two distributions",
            ("case", "tool", "inf or nan", "negative", "relative error"),
            rows,
        )
    )
    rows = []
    for name, cell in cells.items():
        if name.startswith("gradient"):
            ours, naive = cell["penult"], cell["proposal alone"]
            rows.append(
                (
                    name.removeprefix("gradient ").replace("kappa", "κ"), f"{cell['truth']:.6f}",
                    f"{ours['value']:.6f}", f"{ours['z']:+.1f}",
                    f"{naive['value']:.6f}", f"{naive['z']:+.1f}", f"{100 * naive['bias']:+.2g} %",
                )
            )  # fmt: skip
    tables.append(
        Table(
            "Pathwise gradient dE[t]/dκ from samples, t = μ·x",
            ("distribution", "exact A′", "penult", "z", "through Wood's proposal only", "z", "bias"),
            rows,
        )
    )
    notes = [
        "Errors of log C and entropy are absolute over max(1, |value|), the others relative. V and 1 − A of tools "
        "without them are computed from A by the textbook identities. Bars of divergence and inverse: "
        f"{tiny(bars['divergence'])}; |z| < {bars['gradient_z']:g}. Reference values are computed with 70 digits "
        "by mpmath, on the grid by two methods (Bessel functions, and the defining series) that agree to "
        f"{tiny(max(cells['truth'].values()))}.",
        origin(section, ("penult", "torch", "scipy", "numpy", "mpmath", "tensorflow-probability", "jax")),
    ]
    return Block(tables, notes, "python benchmarks/vmf.py --only accuracy")


@table("vmf-sampling", source="vmf")
def sampling(results: dict[str, Any]) -> Block:
    """Cost of samples, and whether they follow the distribution."""
    section = section_of(results, "sampling")
    bars = section["bars"]
    costs, versus, laws = [], [], []
    for cell in section["cells"].values():
        dim, batch = str(cell["dim"]), "laws" in cell
        shown = f"{cell['n']} × {dim}, κ = {cell.get('kappa', 0):g}"
        if batch:
            shown = f"{cell['n']} × {cell['laws']} distributions × {dim}"
        costs.append(
            (
                shown, f"{cell['randn_ms']:.0f} ms", f"{cell['penult']['ms']:.0f} ms",
                f"{cell['ratio_best']:.2f}", f"{cell['ratio_median']:.2f}",
                bound(cell["ratio_best"], bars["randn_batch" if batch else "randn"].get(dim)),
                plain(cell["penult"]["per_second"]),
            )
        )  # fmt: skip
        peers = {peer: cell.get(peer) for peer in ("wood", "scipy", "geomstats")}
        ratio = peers["scipy"]["over_penult"]
        versus.append(
            (
                shown, *(_over(peer) for peer in peers.values()),
                "–" if batch else bound(ratio, bars["scipy"][dim], most=False),
            )
        )  # fmt: skip
        if not batch:
            found = cell["law"]
            laws.append(
                (
                    f"d = {dim}, κ = {cell['kappa']:g}",
                    *(chance(found[s]["p"]) if s in found else "not installed" for s in _SAMPLERS),
                )
            )
        else:
            laws.append((f"d = {dim}, {cell['laws']} distributions", chance(cell["law"]["penult"]["p"]), *4 * ("–",)))
    tables = [
        Table(
            "Cost of `VonMisesFisher.sample`, compared with `torch.randn` of the same size, float32, one thread",
            ("samples", "randn", "penult", "ratio, best", "ratio, median", "bar", "samples per second"),
            costs,
        ),
        Table(
            "Times of other samplers, relative to penult's",
            ("samples", "plain Wood in torch", "scipy.stats", "geomstats", "bar, scipy.stats"),
            versus,
        ),
        Table(
            "Do the cosines follow the exact distribution? p-values (Kolmogorov-Smirnov)",
            ("d, κ", *_SAMPLERS.values()),
            laws,
        ),
    ]
    notes = [
        "`*` extrapolated by a line through two smaller sizes; for a batch, a loop over a few of the distributions, "
        "scaled up. “b ≈ (d−1)/4κ” is Wood's scheme with the large-κ shortcut that common PyTorch ports take "
        "above κ = 10; it samples another distribution unless κ is much larger than d. Bold: p < 1e-4.",
        origin(section, ("penult", "torch", "scipy", "numpy", "geomstats")),
    ]
    return Block(tables, notes, "python benchmarks/vmf.py --only sampling")


@table("vmf-summary", source="vmf")
def summary(results: dict[str, Any]) -> Block:
    """One line for each tool: failures, accuracy, cost of a sample."""
    section, speed = section_of(results, "accuracy"), section_of(results, "sampling")
    cells = section["cells"]
    grid = [cell for name, cell in cells.items() if name.startswith("grid")]
    found = [cell for name, cell in cells.items() if name.startswith(("grid", "random"))]
    total = len(grid) * len(section["settings"]["kappas"])
    single = [cell for cell in speed["cells"].values() if "laws" not in cell]
    dims = sorted({cell["dim"] for cell in single})

    def worst(tool: str, quantity: str) -> str:
        entries = [cell[tool][quantity] for cell in found if quantity in cell[tool]]
        finite = [e["max"] for e in entries if e["at"] is not None]
        return tiny(max(finite)) if finite else "–"

    def times(sampler: str | None) -> list[str]:
        if sampler is None:
            return ["–" for _ in dims]
        spans = []
        for dim in dims:
            peers = [cell[sampler] for cell in single if cell["dim"] == dim]
            if sampler == "penult":
                spans.append("1")
            elif "not installed" in peers:
                spans.append("not installed")
            else:
                low, high = (plain(f(p["over_penult"] for p in peers), 2) for f in (min, max))
                spans.append(f"{low}–{high}" if low != high else low)
        return spans

    rows = []
    for name, tool, sampler in (
        ("**penult**, float32", "penult float32", "penult"),
        ("**penult**, float64", "penult float64", None),
        ("`scipy.stats.vonmises_fisher`", "scipy.stats.vonmises_fisher", "scipy"),
        ("ive ratio and plain Wood sampler (as in common PyTorch ports), float32", "ive port float32", "wood"),
        ("TensorFlow Probability (JAX), float32", "TFP (JAX) float32", None),
        ("TensorFlow Probability (JAX), float64", "TFP (JAX) float64", None),
        ("geomstats (sampler only)", None, "geomstats"),
    ):
        if tool is None:
            accuracies = ("–", "–", "–")
        elif grid[0][tool] == "not installed":
            accuracies = ("not installed", "–", "–")
        else:
            lost = sum(cell[tool]["log_c"]["nonfinite"] for cell in grid)
            accuracies = (f"{lost} of {total}", worst(tool, "log_c"), worst(tool, "grad_mean"))
        rows.append((name, *accuracies, *times(sampler)))
    header = ("", "log C inf, nan or refused", "error of log C", "error of ∂A/∂κ", *(f"time, d = {d}" for d in dims))
    notes = [
        f"Largest errors where finite, d from 2 to {max(section['settings']['dims'])}, κ = 0 and from 1e-8 to 1e6; "
        "time of a sample relative to penult's, one CPU thread, κ from 1 to 1000. An error of 1 is 100 %.",
    ]
    return Block(
        [Table("Implementations of the von Mises-Fisher distribution", header, rows)], notes, "python benchmarks/vmf.py"
    )


@table("vmf-evaluation", source="vmf")
def evaluation(results: dict[str, Any]) -> Block:
    """Nanoseconds for one value."""
    section = section_of(results, "evaluation")
    bars, columns, rows = section["bars"], ("F", "A", "F and gradient", "A and gradient", "scipy.special.ive"), []
    for name, cell in section["cells"].items():
        if name == "setup":
            continue
        dim = int(name.split("=")[1])
        bar = bars["ns_from_64"] if dim >= 64 else bars["ns_below_42"]
        rows.append((str(dim), *(f"{cell[c]['ns']:.0f}" for c in columns), bound(cell["F"]["ns"], bar)))
    size = next(iter(section["cells"].values()))["n"]
    tables = [
        Table(
            f"Nanoseconds for one value, float64, one thread, {size / 1e6:g} million values at a time",
            ("d", *columns[:-1], "`scipy.special.ive` alone", "bar for F"),
            rows,
        )
    ]
    once = section["cells"]["setup"]
    rows = [
        (f"first use of another dimension, {label.replace('>=', '≥')}", f"{ms:.2f} ms", bound(ms, bars["setup_ms"]))
        for label, ms in once["new_dimension_ms"].items()
    ]
    rows.append(("first use of any dimension in a process", f"{once['first_of_process_ms']:.1f} ms", "–"))
    tables.append(Table("Setup of a dimension, needed once", ("", "time", "bar"), rows))
    notes = [origin(section, ("penult", "torch", "scipy", "numpy"))]
    return Block(tables, notes, "python benchmarks/vmf.py --only evaluation")


def _where(failures: dict[int, list[float]]) -> str:
    """Return the dimensions and concentrations at which a tool fails, with κ = 0 as a separate case."""
    if not any(failures.values()):
        return "nowhere"
    parts = []
    if all(0.0 in kappas for kappas in failures.values()):
        parts.append("κ = 0 in every d")
    for dim, kappas in failures.items():
        rest = [k for k in kappas if k > 0 or not parts]
        if rest:
            parts.append(f"d = {dim}: κ {'≤' if len(rest) > 1 else '='} {power(max(rest))}")
    return "; ".join(parts)


def _over(peer: Any) -> str:
    if peer is None:
        return "–"
    if peer == "not installed":
        return peer
    return f"{plain(peer['over_penult'], 2)}×{'*' if peer.get('scaled_from') else ''}"
