"""The long fuzzing tries what is there; it itself needs atheris."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import guided

GUIDED = Path(guided.__file__)


@pytest.mark.long
def test_a_kept_input_is_run_again(tmp_path):
    """In a process of its own, since it watches all that is opened, and for good."""
    (tmp_path / "input").write_bytes(guided.EDITS + bytes(64))
    command = [sys.executable, str(GUIDED), "--replay", "indices", str(tmp_path / "input")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("its files are in "), done.stdout  # and no traceback before


@pytest.mark.skipif(importlib.util.find_spec("atheris") is not None, reason="atheris is installed")
def test_without_atheris_it_says_what_to_install(tmp_path):
    command = [sys.executable, str(GUIDED), "--out", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install --group fuzz" in done.stderr
