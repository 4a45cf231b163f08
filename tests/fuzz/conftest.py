"""No hostile file may make a test's process grow by much."""

import sys
from collections.abc import Iterator

import pytest

_ALLOWED = 1 << 30


@pytest.fixture(autouse=True)
def _modest() -> Iterator[None]:
    resource = pytest.importorskip("resource")  # which Windows lacks
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    assert grown < _ALLOWED, f"the peak of memory rose by {grown / 2**20:.0f} MiB"
