"""Tests draw from a fixed seed that they do not leave behind; doctests see torch, nn, math and penult."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import penult


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _doctest_names(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        doctest_namespace.update(math=math, nn=nn, penult=penult, torch=torch)
