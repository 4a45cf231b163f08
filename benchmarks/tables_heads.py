"""Tables of the results of `families.py`, `extract.py`, `label_shift.py`, `large_head.py` and `scaling.py`."""

from __future__ import annotations

from typing import Any

from blocks import Block, Table, bound, origin, table, tiny


@table("families", source="families")
def families(results: dict[str, Any]) -> Block:
    """Where each family carries its head."""
    section = results["sections"]["families"]
    found, refused = [], []
    for name, cell in section["cells"].items():
        if "refused" in cell:
            refused.append((name, cell["refused"].split(" If W and b are known")[0].split(" For a sigmoid head")[0]))
            continue
        place = f"`{cell['path']}`" + ("" if cell["bias"] else ", no bias") + (", tied" if cell["tied"] else "")
        before = cell["before"] + (f" ({cell['folded']} folded)" if cell["folded"] else "")
        axes = cell["axes"][-1] if len(cell["axes"]) == 2 else "pixel" if len(cell["axes"]) > 2 else "sample"
        each = axes + {"same": "", "mean": ", mean", "picked": ", at one token"}.get(cell["positions"], ", resized")
        found.append((name, place, cell["kind"], before, f"**{cell['support']}**", each, tiny(cell["softmax_error"])))
    header = ("family", "head", "operation", "layer before", "support", "one softmax per", "error")
    shown = [Table("Heads of model families", header, found)]
    shown.append(Table("Refused models", ("family", "reason"), refused))
    used = ", ".join(f"{name} {version}" for name, version in section["versions"].items() if name != "python")
    notes = [
        f"Error: largest difference between the softmax of head(h), through `Tap`, and the model's, float32. {used}."
    ]
    return Block(shown, notes, "python benchmarks/families.py")


@table("extract-overhead", source="extract")
def extract_overhead(results: dict[str, Any]) -> Block:
    """CPU time of extraction, relative to a bare loop."""
    section = results["sections"]["overhead"]
    cells, bar = section["cells"], section["bars"]["extract"]
    rows = [
        (name, f"{cell['ratio']:.3f}", f"{cell['ratio_of_best']:.3f}",
         bound(cell["ratio"], bar) if name.startswith("extract") else "–")
        for name, cell in cells.items() if isinstance(cell, dict)
    ]  # fmt: skip
    header = ("", "median ratio", "ratio of the best", "bar")
    title = "CPU time, relative to a bare loop of forward passes"
    what = (
        f"{cells['samples']} random images of 28 × 28 in batches of 128, three convolutions, {cells['rounds']} rounds."
    )
    notes = [what, origin(section, ("penult", "torch", "safetensors"))]
    return Block([Table(title, header, rows)], notes, "python benchmarks/extract.py --only overhead")


@table("extract-memory", source="extract")
def extract_memory(results: dict[str, Any]) -> Block:
    """Peak memory of extraction and reading."""
    section = results["sections"]["memory"]
    cells, bar = section["cells"], section["bars"]["growth"]
    rows = []
    for task, what in (("extract", "`extract` to disk"), ("read", "`Activations.batches`")):
        one, ten = cells[f"{task}, 1 N"], cells[f"{task}, 10 N"]
        rows.append((what, f"{one:.0f} MiB", f"{ten:.0f} MiB", f"{ten / one:.2f}", bound(ten / one, bar)))
    header = ("", f"{cells['rows']} rows", f"{10 * cells['rows']} rows", "ratio", "bar")
    title = f"Peak memory of a process, PyTorch included; the larger set takes {cells['data_mib']:.0f} MiB on disk"
    return Block([Table(title, header, rows)], [origin(section, ("penult", "torch"))], "python benchmarks/extract.py")


@table("large-head", source="large_head")
def large_head(results: dict[str, Any]) -> Block:
    """Memory and time of a pair with a head of many classes."""
    section = results["sections"]["cost"]
    settings, (cell,) = section["settings"], section["cells"].values()
    rows = [(name, f"{step['seconds']:g}", f"{step['peak']:.2f}") for name, step in cell["steps"].items()]
    title = f"A head of {settings['classes']:,} × {settings['features']}, W of {cell['mib'] / 1024:.1f} GiB"
    worst = max(step["peak"] for step in cell["steps"].values())
    notes = [
        "Peak: largest memory of the process so far, minus that before W, relative to W and a batch of "
        f"{settings['batch']} ({cell['batch_mib']:.0f} MiB); criterion: ≤ {section['bars']['peak']:g}, "
        f"measured: {worst:.2f}. {section['machine']['cpu']}, one thread; torch {section['versions']['torch']}."
    ]
    return Block([Table(title, ("", "seconds", "peak"), rows)], notes, "python benchmarks/large_head.py")


@table("scaling", source="scaling")
def scaling(results: dict[str, Any]) -> Block:
    """Seconds with one and with more processes."""
    section = results["sections"]["scaling"]
    settings, cells = section["settings"], section["cells"]
    (one, first), *others = cells.items()
    rows = [
        (name, f"{first[name]:g} s", *(f"{cell[name]:g} s, {first[name] / cell[name]:.2f}×" for _, cell in others))
        for name in first if name != "start"
    ]  # fmt: skip
    header = ("", f"{one} process", *(f"{count} processes" for count, _ in others))
    title = f"Time with one thread per process, on a machine of {section['machine']['cores']} cores"
    starts = ", ".join(f"{cell['start']:g} s for {count}" for count, cell in cells.items())
    notes = [
        f"{settings['images']} images of 32 × 32 through three convolutions; {settings['rows']:,} stored activations, "
        f"d = {settings['features']}, 100 components in 24 dimensions, ten updates. Best of {settings['rounds']} "
        f"rounds, without the time to start: {starts}. {origin(section, ('penult', 'torch'))}"
    ]
    return Block([Table(title, header, rows)], notes, "python benchmarks/scaling.py")


@table("label-shift", source="label_shift")
def label_shift(results: dict[str, Any]) -> Block:
    """L1 errors of the estimated class prior, by method."""
    section = results["sections"]["error"]
    settings, bars = section["settings"], section["bars"]
    conditions = {
        "original": "original pictures",
        "jpeg": f"JPEG, quality {settings['quality']}",
        "disturbed": "biases of the head disturbed by N(0, 1)",
    }
    shifts = {"none": "none", "dirichlet": "Dirichlet(1)"}
    rows = []
    for key, cell in section["cells"].items():
        name, _, condition = key.partition(" ")
        for shift, errors in cell["errors"].items():
            recipe = errors["recipe"]
            rows.append((
                f"`{name}`", conditions[condition], f"{100 * cell['accuracy']:.1f} %", shifts[shift],
                f"**{recipe:.3f}**", f"{errors['temperature']:.3f}", f"{errors['bbse']:.3f}",
                bound(recipe, bars[condition]),
            ))  # fmt: skip
    header = ("network", "pictures", "accuracy", "shift", "temperature and biases", "temperature", "BBSE", "bar")
    title = "L1 error of the estimated class prior"
    what = (
        f"Mean of {settings['seeds']} seeds: {settings['calibration']} labelled pictures calibrate the head and are "
        f"the bank of the pair, windows have {settings['window']} others. BBSE: black-box shift estimation by hard "
        "predictions."
    )
    notes = [what, origin(section, ("penult", "torch"))]
    return Block([Table(title, header, rows)], notes, "python benchmarks/label_shift.py --data DATA --cache CACHE")
