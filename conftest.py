"""A fixed seed for every test, names for doctests, and options for the device and dtype of tests/numerics.

tests/tiers.py adds ``--tier`` and ``--long``.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Distribution

import penult

pytest_plugins = ("tiers",)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--device``, ``--dtype`` and ``--no-validation``."""
    group = parser.getgroup("penult", "what tests/numerics compute on")
    group.addoption("--device", default="cpu", help="a device of torch, such as cpu, cuda, cuda:1 or mps")
    group.addoption("--dtype", default="float32", choices=("float32", "float64", "bfloat16"), help="of heads and rows")
    parser.addoption("--no-validation", action="store_true", help="run with torch's switch of validation turned off")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not there before any test runs."""
    _device(config)


def _device(config: pytest.Config) -> torch.device:
    name, dtype = config.getoption("--device"), config.getoption("--dtype")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise pytest.UsageError(f"--device {name}: torch knows no such device") from error
    if device.type == "meta":
        raise pytest.UsageError(f"--device {name}: its tensors hold no numbers to test")
    if device.type != "cpu":
        backend: Any = getattr(torch, device.type, None) if device.type != "mps" else torch.backends.mps
        count = getattr(backend, "device_count", lambda: 1)() if backend is not None and backend.is_available() else 0
        if (device.index or 0) >= count:
            raise pytest.UsageError(f"--device {name}: torch finds {count or 'none'} of that kind on this machine")
    if device.type == "mps" and dtype == "float64":
        raise pytest.UsageError("--device mps has no float64; leave --dtype out")
    return device


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tests/numerics compute."""
    return _device(request.config)


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of the heads and activations of tests/numerics."""
    chosen: torch.dtype = getattr(torch, request.config.getoption("--dtype"))
    return chosen


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def validation() -> None:
    """Turn torch's switch of validation on, for a test of what it checks."""
    Distribution.set_default_validate_args(True)


@pytest.fixture(autouse=True)
def _validation(request: pytest.FixtureRequest) -> None:
    """Set torch's switch of validation, which torch.compile and the import of zuko turn off for the whole process."""
    Distribution.set_default_validate_args(not request.config.getoption("--no-validation"))


@pytest.fixture(scope="session")
def compiler() -> None:
    """Load torch.compile, which takes seconds and is no part of the first test that needs it."""
    x = torch.ones(1, requires_grad=True)
    torch.compile(lambda x: x.sin(), backend="aot_eager")(x).sum().backward()


@pytest.fixture(autouse=True)
def _doctests(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        doctest_namespace.update(math=math, nn=nn, penult=penult, torch=torch)
        # Few steps of training are enough for examples that only show how the functions are called.
        if "realism" in request.node.name:
            monkeypatch.setattr("penult.realism._two_sample._STEPS", 3)
