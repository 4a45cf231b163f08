import json
import subprocess
import sys

import pytest

HEAVY = (
    "lightning", "torchmetrics", "matplotlib", "jinja2", "scipy", "sklearn", "pyarrow", "PIL", "typer", "rich",
    "zuko", "mpmath", "torchvision", "timm", "transformers", "torch._dynamo", "torch._inductor",
)  # fmt: skip


STAGES = """
import json, sys, warnings

filters = list(warnings.filters)
stages = {"start": list(sys.modules)}
import penult
stages["import"] = list(sys.modules)
assert warnings.filters == filters
listed = dir(penult)
try:
    penult.nothing
except AttributeError as error:
    assert "'nothing'" in str(error)
else:
    raise AssertionError

import torch, safetensors.torch
from torch.distributions import Distribution
stages["core"] = list(sys.modules)
facts = lambda: (torch.get_default_dtype(), Distribution._validate_args, list(warnings.filters),
                 torch.random.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_num_threads())
before = facts()
[getattr(penult, name) for name in penult.__all__]
stages["names"] = list(sys.modules)
pair = penult.GenerativePair(penult.Head(4 * torch.eye(3)))
h, y = pair.sample((5,), generator=torch.Generator().manual_seed(0))
pair.log_prob(h); pair.given(y).mean; pair.prior.probs
after = facts()
penult.testing.check_base; penult.data.digits
stages["rooms"] = list(sys.modules)
print(json.dumps({"stages": stages, "listed": listed, "all": penult.__all__, "unchanged": before == after}))
"""


@pytest.fixture(scope="module")
def fresh():
    """A new process that imports penult, then all public names, uses a pair, then imports rooms by name.

    One for all tests, since torch takes a second to import.
    """
    command = [sys.executable, "-W", "error", "-c", STAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def modules(fresh):
    """The modules loaded at each stage."""
    return {name: set(names) for name, names in fresh["stages"].items()}


def packages(names):
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_import_alone_loads_at_most_torch_and_safetensors(modules):
    loaded = modules["import"] - modules["start"]
    assert packages(loaded) == {"penult"}
    assert {name for name in loaded if name.partition(".")[0] == "penult"} == {"penult", "penult._version"}


def test_every_public_name_loads_at_most_torch_and_safetensors(modules):
    new = modules["names"] - modules["core"]
    assert packages(new) <= {"penult"}
    assert "penult.pair" in new
    assert not [name for name in HEAVY if name in new]


def test_rooms_load_on_first_use_without_heavy_packages(modules):
    assert "penult.data" not in modules["names"]
    new = modules["rooms"] - modules["core"]
    assert "penult.data" in new
    assert not [name for name in HEAVY if name in new]


def test_names_are_listed_and_unknown_ones_refused(fresh):
    assert {*fresh["all"], "data", "testing", "processes"} <= set(fresh["listed"])


def test_import_and_use_change_nothing_global(fresh):
    assert fresh["unchanged"]
