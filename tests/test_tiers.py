"""The tiers of tests and the limit of the default tier, on a small project of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiers

pytestmark = pytest.mark.slow  # each runs pytest in a process of its own

FILES = {
    "pyproject.toml": '[tool.pytest.ini_options]\ntestpaths = ["tests", "src"]\npythonpath = ["."]\n',
    "conftest.py": 'import tiers\ntiers.LIMIT = 0.3\npytest_plugins = ("tiers",)\n',
    "tests/test_some.py": """
import pytest
from tiers import thin

def burn():
    for _ in range(3 * 10**7):
        pass

@pytest.mark.parametrize("cell", thin([1, 2, 3], keep=[2]))
def test_grid(cell):
    pass

@pytest.mark.slow
def test_slow():
    burn()

@pytest.mark.long
def test_long():
    pass
""",
    "tests/demo/test_demo.py": "def test_demo():\n    pass\n",
    "src/empty.py": "",
}


@pytest.fixture
def project(tmp_path):
    shutil.copy(tiers.__file__, tmp_path)
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(project, *options):
    """Exit code and output of pytest there."""
    environment = {name: value for name, value in os.environ.items() if name != "PENULT_TIER"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


RUNS = [
    ([], {"test_grid[2]"}),
    (["-n", "2"], {"test_grid[2]"}),
    (["--tier", "slow"], {"test_grid[1]", "test_grid[3]", "test_slow", "test_demo"}),
    (["--tier", "all"], {"test_grid[1]", "test_grid[2]", "test_grid[3]", "test_slow", "test_demo"}),
    (["--long"], {"test_grid[2]", "test_long"}),
    (["tests/test_some.py::test_slow"], {"test_slow"}),
    (["-n", "2", "tests/test_some.py::test_long"], {"test_long"}),
]


@pytest.mark.parametrize(("options", "expected"), RUNS, ids=[" ".join(options) or "default" for options, _ in RUNS])
def test_what_a_tier_runs(project, options, expected):
    code, output = run(project, *options)
    assert code == 0, output
    passed = {line.split("::")[-1].split(" ")[0] for line in output.splitlines() if "PASSED" in line}
    assert passed == expected, output


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["one process", "two processes"])
def test_an_unmarked_test_over_the_limit_fails_the_run(project, options):
    path = project / "tests" / "test_some.py"
    path.write_text(path.read_text().replace("@pytest.mark.slow\n", ""))
    code, output = run(project, *options)
    assert code == 1
    assert "s  tests/test_some.py::test_slow" in output
    assert "2 passed" in output
    code, output = run(project, *options, "tests/test_some.py")
    assert code == 0, "a run of a part lists the test and does not fail"
    assert "s  tests/test_some.py::test_slow" in output


@pytest.mark.parametrize("options", [["-k", "nothing"], ["-k", "nothing", "-n", "2"], ["tests/demo"]], ids=" ".join)
def test_a_run_without_tests_fails(project, options):
    code, output = run(project, *options)
    assert code == 5
    assert "Slow tests are left out" in output


def test_the_makefile_has_a_target_for_each_tier():
    text = (Path(__file__).parent.parent / "Makefile").read_text()
    for target, options in {"test": "", "test-slow": " --tier slow", "test-all": " --tier all"}.items():
        assert f"\n{target}: " in text
        assert f"$(PYTEST){options} $(ARGS)" in text
