import functools
import subprocess
import sys

HEAVY = (
    "lightning", "torchmetrics", "matplotlib", "jinja2", "scipy", "sklearn", "pyarrow", "PIL", "typer", "rich",
    "zuko", "mpmath", "torchvision", "timm", "transformers", "torch._dynamo", "torch._inductor",
)  # fmt: skip


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    ).stdout


@functools.cache
def modules_after(code):
    return frozenset(run(f"import sys; {code}; print(*sys.modules)").split())


def packages(names):
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


CORE = "import torch, safetensors.torch"
ALL_NAMES = "import penult; [getattr(penult, name) for name in penult.__all__]"


def test_import_alone_loads_at_most_torch_and_safetensors():
    loaded = modules_after("import penult")
    assert packages(loaded - modules_after(CORE)) == {"penult"}
    assert {name for name in loaded if name.partition(".")[0] == "penult"} == {"penult", "penult._version"}


def test_every_public_name_loads_at_most_torch_and_safetensors():
    new = modules_after(ALL_NAMES) - modules_after(CORE)
    assert packages(new) == {"penult"}
    assert "penult.pair" in new
    assert not [name for name in HEAVY if name in new]


def test_rooms_load_on_first_use_without_heavy_packages():
    code = """
import sys, penult
assert "penult.data" not in sys.modules
penult.testing.check_base; penult.data.digits
assert "penult.data" in sys.modules
print(*sys.modules)
"""
    new = set(run(code).split()) - modules_after(CORE)
    assert not [name for name in HEAVY if name in new]


def test_names_are_listed_and_unknown_ones_refused():
    code = """
import penult
assert {*penult.__all__, "data", "testing", "processes"} <= set(dir(penult))
try:
    penult.nothing
except AttributeError as error:
    assert "'nothing'" in str(error)
else:
    raise AssertionError
"""
    run(code)


def test_import_and_use_change_nothing_global():
    code = """
import torch, warnings
from torch.distributions import Distribution
facts = lambda: (torch.get_default_dtype(), Distribution._validate_args, list(warnings.filters),
                 torch.random.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_num_threads())
before = facts()
import penult
pair = penult.GenerativePair(penult.Head(4 * torch.eye(3)))
h, y = pair.sample((5,), generator=torch.Generator().manual_seed(0))
pair.log_prob(h); pair.given(y).mean; pair.prior.probs
assert facts() == before
"""
    run(code)
