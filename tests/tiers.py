"""Tiers of tests, and a limit on the time that a test of the default tier may take.

A plugin of pytest, loaded by conftest.py at the root. tests/README.md describes the tiers.
"""

import os
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

SLOW_FOLDERS = ("benchmarks/tests", "tests/demo", "tests/faults", "tests/processes")
SLOW_DOCTESTS = ("src/penult/testing/__init__.py::penult.testing",)
LIMIT = 2.0  # seconds of CPU time
TIERS = ("default", "slow", "all")

_seconds: dict[tuple[str, str], float] = {}  # by phase and test


def thin(values: Iterable[Any], keep: Iterable[Any]) -> list[Any]:
    """Mark all values of a parameter slow, except those in ``keep``; a tuple stands for several parameters."""
    values, keep = list(values), list(keep)
    assert all(value in values for value in keep), f"{keep} are not all among {values}"
    params = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = [() if value in keep else pytest.mark.slow for value in values]
    return [pytest.param(*param, marks=mark) for param, mark in zip(params, marks, strict=True)]


def in_default_tier() -> bool:
    """Return whether this run leaves out the slow tests, most examples of property tests, and long trainings."""
    return os.environ.get("PENULT_TIER") == "default"


# --- selection ----------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--tier``, ``--long`` and ``--cpu-durations``."""
    parser.addoption("--tier", default="default", choices=TIERS, help="tests to run: all but the slow ones (default)")
    parser.addoption("--cpu-durations", metavar="FILE", help="write the CPU time of each test, as --durations=0 does")
    parser.addoption("--long", action="store_true", help="run the tests marked long, too, which are in no tier")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; modules of tests read the tier while they are imported."""
    config.addinivalue_line("markers", "slow: in the slow tier, left out by default")
    config.addinivalue_line("markers", "examples: in both tiers; a tenth of its examples by default")
    config.addinivalue_line("markers", "long: in no tier; runs with --long or by its name")
    # Tests that are named run in full, in whatever tier they are.
    named = any("::" in arg for arg in config.args)
    os.environ["PENULT_TIER"] = "all" if named else config.getoption("--tier")
    _seconds.clear()


def _is_whole_suite(config: pytest.Config) -> bool:
    return list(config.args) == list(config.getini("testpaths"))


def _is_slow_folder(path: Path, config: pytest.Config) -> bool:
    return any(path.is_relative_to(config.rootpath / folder) for folder in SLOW_FOLDERS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import the tests of slow folders where the default tier runs as a whole."""
    if config.getoption("--tier") == "default" and _is_whole_suite(config):
        return _is_slow_folder(collection_path, config) or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the tier, and those that are named as FILE::TEST."""
    tier, long = config.getoption("--tier"), config.getoption("--long")
    folder = config.invocation_params.dir
    named = {(folder / arg.partition("::")[0]).resolve() for arg in config.args if "::" in arg}
    selected, left_out = [], []
    for item in items:
        if _is_slow_folder(item.path, config) or item.nodeid in SLOW_DOCTESTS:
            item.add_marker(pytest.mark.slow)
        if item.path in named:
            chosen = True
        elif item.get_closest_marker("long"):
            chosen = long
        elif item.get_closest_marker("examples"):
            chosen = True
        else:
            chosen = tier == "all" or (tier == "slow") == bool(item.get_closest_marker("slow"))
        (selected if chosen else left_out).append(item)
    items[:] = selected
    if left_out:
        config.hook.pytest_deselected(items=left_out)


# --- limit --------------------------------------------------------------------------------------------------


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _measured(item: pytest.Item, phase: str) -> Generator[None, Any, Any]:
    """Note the CPU time of a phase of a test, which other load on the machine hardly changes."""
    # Several threads use more CPU time than passes, so the lesser of the two counts.
    cpu, clock = _cpu_seconds(), time.perf_counter()
    try:
        return (yield)
    finally:
        seconds = min(_cpu_seconds() - cpu, time.perf_counter() - clock)
        item.user_properties.append((phase, seconds))
        marks = ("slow", "long") if in_default_tier() else ("slow", "long", "examples")
        if phase == "call" and seconds > LIMIT and not any(map(item.get_closest_marker, marks)):
            item.user_properties.append(("over limit", seconds))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    """Measure the fixtures of a test."""
    return (yield from _measured(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Measure a test without its fixtures."""
    return (yield from _measured(item, "call"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what was measured; pytest-xdist brings the reports of its workers here."""
    if report.when == "teardown":
        _seconds.update(((phase, report.nodeid), value) for phase, value in report.user_properties)


def _over_limit() -> dict[str, float]:
    return {name: seconds for (phase, name), seconds in _seconds.items() if phase == "over limit"}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of the whole tier for tests over the limit.

    In a run of a few tests, the first ones may wait for imports that are not theirs, so these are listed only.
    """
    if _over_limit() and session.exitstatus == pytest.ExitCode.OK and _is_whole_suite(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the tests over the limit, and say where the slow tests are."""
    if over := _over_limit():
        terminalreporter.section(f"more than {LIMIT:g} seconds of CPU time: mark it slow, or make it faster", red=True)
        for name, seconds in sorted(over.items()):
            terminalreporter.write_line(f"{seconds:.1f} s  {name}")
    if config.getoption("--cpu-durations"):
        lines = [f"{seconds:.2f}s {phase:8} {name}\n" for (phase, name), seconds in _seconds.items()]
        Path(config.getoption("--cpu-durations")).write_text("".join(lines), encoding="utf-8")
    if config.getoption("--tier") == "default" and not all("::" in arg for arg in config.args):
        terminalreporter.write_line("Slow tests are left out; --tier slow runs them, and --tier all runs both tiers.")
