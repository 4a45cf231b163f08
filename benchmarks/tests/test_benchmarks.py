import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def committed(name="vmf"):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def check_accuracy(section):
    """penult is finite everywhere and within its bars, whatever became of the others."""
    bars, cells = section["bars"], section["cells"]
    compared = [cell for name, cell in cells.items() if name.startswith(("grid", "random"))]
    assert compared
    for cell in compared:
        for quantity, entry in cell["penult float64"].items():
            assert entry["n"] > 0
            assert entry["nonfinite"] == 0
            assert entry["max"] <= bars["float64"].get(quantity, 1e-13), quantity
        for quantity, entry in cell["penult float32"].items():
            assert entry["nonfinite"] == 0
            assert entry["max"] <= bars["float32"], quantity
    assert cells["inverse"]["penult, R and 1 − R"]["failures"] == 0
    assert cells["inverse"]["penult, R and 1 − R"]["error"] <= bars["inverse"]["error"]
    assert cells["inverse"]["penult, R alone"]["residual"] <= bars["inverse"]["residual"]
    for case in cells["divergence"].values():
        assert case["penult"]["nonfinite"] == case["penult"]["negative"] == 0
        assert case["penult"]["error"] <= bars["divergence"]
    gradients = [cell for name, cell in cells.items() if name.startswith("gradient")]
    assert gradients
    assert all(abs(cell["penult"]["z"]) < bars["gradient_z"] for cell in gradients)
    assert max(cells["truth"].values()) < 1e-40  # the truth by two routes


# --- the committed results ----------------------------------------------------------------------------------


def test_pages_show_the_committed_results():
    outcome = run("tables.py", "--check")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_committed_accuracy():
    section = committed()["sections"]["accuracy"]
    assert not section["settings"]["quick"]
    check_accuracy(section)


def test_committed_samples_follow_the_law():
    section = committed()["sections"]["sampling"]
    laws = [cell["law"]["penult"]["p"] for cell in section["cells"].values()]
    assert len(laws) == 11
    assert min(laws) > section["bars"]["p"]


def test_committed_results_name_their_origin():
    for section in committed()["sections"].values():
        assert set(section) == {"settings", "versions", "machine", "bars", "cells"}
        assert {"python", "penult", "torch", "scipy", "numpy", "mpmath"} <= set(section["versions"])
        assert {"cpu", "cores"} <= set(section["machine"])
        assert {"seed", "quick", "code"} <= set(section["settings"])


def test_committed_extraction():
    sections = committed("extract")["sections"]
    assert set(sections) == {"overhead", "memory"}
    assert not any(section["settings"]["quick"] for section in sections.values())
    memory = sections["memory"]["cells"]
    assert memory["data_mib"] > 1.5 * memory["extract, 10 N"]  # which the data would not have fitted in


def test_committed_generation():
    sections = committed("generate")["sections"]
    assert set(sections) == {"selection", "test"}
    cells = sections["test"]["cells"]
    assert set(cells["mnist/vae"]) == set(cells["mnist-usps/vae"]) == {"0-0", "0-1", "1-0", "1-1"}
    assert set(cells["mnist/gan"]) == set(cells["mnist-usps/gan"]) == {"0-0", "0-1", "1-0", "1-1"}
    sizes = {"vae": [], "gan": [], "gan, colour": []}
    for name, cell in cells.items():
        setting, model = name.split("/")
        kind = "gan" if model.startswith(("gan", "hinge", "non-saturating")) else "vae"
        kind += ", colour" * (setting == "cifar10")
        sizes[kind] += [run["parameters"] for run in cell.values() if "parameters" in run]
    assert all(max(found) < 1.01 * min(found) for found in sizes.values())  # as many for baselines
    for cell in cells.values():
        for run in cell.values():
            for row in run["rows"].values():
                assert 0 <= row["accuracy"] <= 1
                assert row["frechet"] > sections["test"]["references"]["mnist"]["row"]["frechet"]


def test_committed_outliers():
    cells = committed("outliers")["sections"]["networks"]["cells"]
    assert len(cells) == 12
    for name, cell in cells.items():
        assert (0.95 if name.startswith("mnist") else 0.8) < cell["accuracy"] < 1
        assert bool(next(iter(cell["methods"].values()))["near"]) == name.endswith("-8")
        assert cell["dirtied"]["far"]["share"] == pytest.approx(0.1, abs=0.01)
        for method in cell["methods"].values():
            assert all(0 <= rate <= 1 for each in method["far"].values() for rate in each.values())


def test_committed_cost_of_scores():
    section = committed("scores")["sections"]["cost"]
    assert not section["settings"]["quick"]
    assert set(section["cells"]) == {"d=512 K=1000", "d=64 K=10", "d=2048 K=1000"}


# --- a run of one's own -------------------------------------------------------------------------------------


def test_small_run_and_resume(tmp_path):
    out = tmp_path / "vmf.json"
    tiny = ("--quick", "--only", "accuracy", "--dims", 2, 64, "--points", 10, "--out", out)
    first = run("vmf.py", *tiny)
    assert first.returncode == 0, first.stderr
    assert "Largest error over 30 points" in first.stdout
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["benchmark"] == "vmf"
    section = results["sections"]["accuracy"]
    names = ["truth", "grid d=2", "grid d=64", "random 1 of 1", "inverse", "divergence"]
    assert list(section["cells"])[:6] == names
    check_accuracy(section)
    lost = section["cells"]["grid d=64"]["ive port float32"]["log_c"]
    assert lost["nonfinite"] == len(lost["where"]) > 0

    # as a run that was killed leaves it: cells missing; what is there is kept, even if it looks odd
    whole = dict(section["cells"])
    del section["cells"]["grid d=64"], section["cells"]["divergence"]
    section["cells"]["truth"] = {"mgf": 0.0, "mean": 0.0}
    out.write_text(json.dumps(results), encoding="utf-8")
    second = run("vmf.py", *tiny)
    assert second.returncode == 0, second.stderr
    assert f"2 cells measured, {len(whole) - 2} kept" in second.stdout
    again = json.loads(out.read_text(encoding="utf-8"))["sections"]["accuracy"]["cells"]
    assert again.pop("truth") == {"mgf": 0.0, "mean": 0.0}
    whole.pop("truth")
    assert again == whole  # to the bit: a cell's seed does not depend on what ran before it
    assert list(again) == list(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["vmf.json"]  # nothing aside is left behind


def test_bad_arguments():
    outcome = run("vmf.py", "--dims", 1)
    assert outcome.returncode == 2
    assert outcome.stderr.strip().splitlines()[-1].startswith("vmf.py: error: --dims must be at least 2")


def test_help():
    """All in one process, in which torch is imported once."""
    scripts = "vmf", "extract", "families", "networks", "realism", "distill", "generate", "tables"
    code = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    try:
        importlib.import_module(name).main(["--help"])
    except SystemExit as end:
        assert end.code == 0, (name, end.code)
"""
    command = [sys.executable, "-c", code, str(BENCHMARKS), *scripts]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr
    for name in scripts:
        assert f"python benchmarks/{name}.py" in outcome.stdout


# --- tables -------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """A repository of one page with a table, and the committed results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "vmf.json").write_text(json.dumps(committed()), encoding="utf-8")
    page = tmp_path / "docs" / "page.md"
    markers = (
        "<!-- table: vmf-summary -->\n<!-- /table -->\n<!-- table: vmf-evaluation -->\nold\n<!-- /table -->\nafter\n"
    )
    page.write_text("before\n" + markers, encoding="utf-8")
    return tmp_path


def test_tables_are_rewritten_once(site):
    page = site / "docs" / "page.md"
    text = page.read_text(encoding="utf-8")
    assert run("tables.py", "--root", site, "--check").returncode == 1
    assert page.read_text(encoding="utf-8") == text
    assert run("tables.py", "--root", site).returncode == 0
    fresh = page.read_text(encoding="utf-8")
    start = "before\n<!-- table: vmf-summary -->\n\n**Implementations of the von Mises-Fisher distribution**\n"
    assert fresh.startswith(start)
    assert fresh.endswith("Command: `python benchmarks/vmf.py --only evaluation`\n\n<!-- /table -->\nafter\n")
    assert "old" not in fresh
    outcome = run("tables.py", "--root", site, "--check")
    assert (outcome.returncode, outcome.stdout) == (0, "")


def test_tables_survive_missing_sections_and_bad_markers(site):
    page = site / "docs" / "page.md"
    for text, reason in (
        ("<!-- table: nothing -->\n<!-- /table -->\n", "no table is called 'nothing'"),
        ("<!-- table: vmf-accuracy -->\n", "not closed"),
    ):
        page.write_text(text, encoding="utf-8")
        outcome = run("tables.py", "--root", site)
        assert outcome.returncode == 2
        assert reason in outcome.stderr
        assert page.read_text(encoding="utf-8") == text
    results = site / "benchmarks" / "results" / "vmf.json"
    page.write_text("<!-- table: vmf-accuracy -->\n<!-- /table -->\n", encoding="utf-8")
    kept = json.loads(results.read_text(encoding="utf-8"))
    del kept["sections"]["accuracy"]
    results.write_text(json.dumps(kept), encoding="utf-8")
    outcome = run("tables.py", "--root", site)
    assert outcome.returncode == 2
    assert "python benchmarks/vmf.py --only accuracy" in outcome.stderr
    results.unlink()
    outcome = run("tables.py", "--root", site)
    assert outcome.returncode == 2
    assert "python benchmarks/vmf.py" in outcome.stderr
