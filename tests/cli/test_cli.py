import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import penult
from penult._checks import with_remedy
from penult.cli import app, main
from penult.cli._console import RichReporter, fail, tell


def test_version_and_help():
    assert CliRunner().invoke(app, ["--version"]).output == f"penult {penult.__version__}\n"
    assert "demo" in CliRunner().invoke(app, ["--help"]).output
    page = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "120"}).output
    assert "--seed" in page
    assert "Example" in page


_HELPS = """
import sys
import typer
from typer.testing import CliRunner
from penult.cli import app

for name in ("", *typer.main.get_command(app).commands):
    result = CliRunner().invoke(app, [*filter(None, [name]), "--help"])
    assert result.exit_code == 0, (name, result.output)
    loaded = {"torch", "numpy", "lightning", "matplotlib"} & set(sys.modules)
    assert not loaded, f"penult {name} --help loads {loaded}"
print("all")
"""


@pytest.fixture
def helps():
    """A new process that shows every help text."""
    return subprocess.run([sys.executable, "-c", _HELPS], capture_output=True, text=True, check=False)


def test_help_loads_no_torch(helps):
    assert helps.stdout == "all\n", helps.stderr


@pytest.fixture
def short_demo(tmp_path, monkeypatch):
    """A demo of its first parts alone."""
    from penult import demo
    from penult.demo import classifier

    monkeypatch.setattr(classifier, "_EPOCHS", 1)
    monkeypatch.setattr(demo, "PARTS", demo.PARTS[:2])
    return ["demo", "--out", str(tmp_path)]


def test_demo_returns_json_and_prints(short_demo):
    done = CliRunner().invoke(app, [*short_demo, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["identity"]["float64"] < 1e-9
    assert "path=fc" in done.stderr


@pytest.mark.slow
def test_demo_prints(short_demo, monkeypatch):
    from penult import demo
    from penult.demo import fit, samples

    monkeypatch.setattr(demo, "PARTS", (*demo.PARTS, samples.without_data, fit.label_free))
    done = CliRunner().invoke(app, short_demo)
    assert done.exit_code == 0, done.output
    assert "max |posterior - softmax|" in done.stdout
    assert "cosine" in done.stdout
    assert (Path(short_demo[-1]) / "index.html").exists()


def test_bad_usage_ends_with_code_2():
    assert CliRunner().invoke(app, ["demo", "--seed", "-1"]).exit_code == 2
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2


def test_bad_input_ends_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["penult", "demo", "--out", str(tmp_path / "file")])
    monkeypatch.setattr("penult.demo.classifier._EPOCHS", 1)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("penult: ")
    assert "file" in error


def test_a_missing_extra_names_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(sys, "argv", ["penult", "demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert 'pip install "penult[data]"' in capsys.readouterr().err


def test_the_remedy_of_an_error_is_named_as_the_option(capsys):
    error = with_remedy(ValueError("runs/overwrite=True holds others; give\n another"), "overwrite", "start again")
    assert str(error).endswith("another, or pass overwrite=True to start again")
    fail(error)
    fail(OSError(errno.EACCES, "Permission denied", "out/x"))
    assert capsys.readouterr().err.splitlines() == [
        "penult: runs/overwrite=True holds others; give another, or pass --overwrite to start again",
        "penult: Permission denied: 'out/x'; check the permissions there, or give another path",
    ]


def test_no_character_of_a_name_is_obeyed_by_a_terminal(capsys):
    reporter = RichReporter()
    reporter.line("a\x1b]52;c;eA==\x07b \ud800 [bold]c")
    reporter.table(["x\x1b[2J"], [["\x9b1A", 3]])
    tell("d\x1b[1A")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == r"a\x1b]52;c;eA==\x07b \ud800 [bold]c"
    assert not set(printed.out + printed.err) & {"\x1b", "\x07", "\x9b", "\ud800"}
    assert printed.err == "penult: d\\x1b[1A\n"
