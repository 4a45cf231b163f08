"""No hostile file may make a test's process grow by much."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_ALLOWED = 1 << 30


@pytest.fixture(scope="session", autouse=True)
def _tables_of_characters() -> None:
    """Let Hypothesis build its tables of characters, which it does once and which is no part of the first test."""

    @settings(max_examples=1, database=None)
    @given(st.text())
    def once(text: str) -> None:
        assert isinstance(text, str)

    once()


@pytest.fixture(autouse=True)
def _modest() -> Iterator[None]:
    resource = pytest.importorskip("resource")  # which Windows lacks
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    assert grown < _ALLOWED, f"the peak of memory rose by {grown / 2**20:.0f} MiB"
