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


def test_import_loads_torch_and_safetensors_alone():
    before = set(run("import sys, torch, safetensors.torch; print(*sys.modules)").split())
    after = set(run("import sys, penult; print(*sys.modules)").split())
    new = {name.partition(".")[0] for name in after - before} - set(sys.stdlib_module_names)
    assert new == {"penult"}
    names = set(run("import sys, penult, penult.testing; print(*sys.modules)").split())
    torch_only = set(run("import sys, torch; print(*sys.modules)").split())
    assert not [name for name in HEAVY if name in names - torch_only]


def test_rooms_load_when_asked_for():
    code = "import sys, penult; penult.testing.check_base; penult.data.digits; print('matplotlib' in sys.modules)"
    assert run(code).strip() == "False"


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
