"""Commands under ``--devices``, and under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from penult import Activations, load
from penult.cli import app

MODULE = '''
import os
import time

import torch
from torch import nn


class Slow(nn.Module):
    """A network that takes its time for each batch, once a file says so."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Softplus()), nn.Linear(16, 10)

    def forward(self, x):
        if os.path.exists("slowly"):
            open(f"seen-{os.getpid()}", "w").close()
            time.sleep(0.3)
        return self.fc(self.body(x))


def net():
    torch.manual_seed(0)
    return Slow()


def student():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
'''


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A user's folder with a network, its activations by one process, and a pair fitted to them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "teamnets.py").write_text(MODULE)
    # In this process, which has loaded all of it; what is compared with has to come from the same weights.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for command in (
            ("extract", "teamnets:net", "digits", "--out", "alone", "--batch-size", "120"),
            ("fit", "alone", "--components", "4", "--out", "alone.penult.safetensors"),
        ):
            result = CliRunner().invoke(app, command, catch_exceptions=False)
            assert result.exit_code == 0, result.output
    return folder


def start(folder, *arguments, launcher=("-m", "penult")):
    # Gloo would look for the address of the machine's name, which need not have one.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def penult(folder, *arguments, **options):
    process = start(folder, *arguments, **options)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return out


def same(a, b):
    assert torch.equal(a.activations, b.activations)
    assert torch.equal(a.labels, b.labels)


def extraction(out, *more):
    return "extract", "teamnets:net", "digits", "--out", out, "--batch-size", "120", "--shard-size", "0.01", *more


def running(pid):
    """Whether there is such a process, that is no zombie whose parent does not look."""
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip() not in ("", "Z")


def until(found):
    """Wait until something is there."""
    end = time.monotonic() + 300
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_process_ends_the_run_with_one_clear_line_and_the_next_run_resumes(here):
    (here / "slowly").touch()
    process = start(here, *extraction("two", "--devices", 2, "--strategy", "ddp", "--json"))
    until(lambda: len(list(here.glob("seen-*"))) == 2 and list((here / "two").glob("activations-00000-of-00002-*")))
    seen = {int(path.name.removeprefix("seen-")) for path in here.glob("seen-*")}
    (other,) = seen - {process.pid}
    os.kill(other, signal.SIGKILL)
    _, error = process.communicate(timeout=600)
    (here / "slowly").unlink()
    shards = list((here / "two").glob("activations-*"))
    assert process.returncode == 2
    assert "penult: process 1 of 2 was killed (signal 9)" in error
    assert "give the same command again to continue" in error
    assert "Traceback" not in error
    assert shards
    facts = json.loads(penult(here, *extraction("two", "--devices", 2, "--strategy", "ddp", "--json")))
    assert facts["resumed_after_shards"] == len(shards)
    same(Activations.open(here / "two"), Activations.open(here / "alone"))


@pytest.mark.long
def test_without_the_first_process_the_others_end_and_the_next_run_resumes(here):
    """Nobody is left to say so, to the shell but its own "Killed"."""
    (here / "slowly").touch()
    for path in here.glob("seen-*"):
        path.unlink()
    process = start(here, *extraction("first", "--devices", 2, "--json"))
    until(lambda: len(list(here.glob("seen-*"))) == 2 and list((here / "first").glob("activations-00001-of-00002-*")))
    (other,) = {int(path.name.removeprefix("seen-")) for path in here.glob("seen-*")} - {process.pid}
    process.kill()
    until(lambda: not running(other))  # before the pipes are read: the other holds them as well
    _, error = process.communicate(timeout=600)
    assert "Traceback" not in error
    (here / "slowly").unlink()
    shards = list((here / "first").glob("activations-*"))
    facts = json.loads(penult(here, *extraction("first", "--devices", 2, "--json")))
    assert facts["resumed_after_shards"] == len(shards) > 0
    same(Activations.open(here / "first"), Activations.open(here / "alone"))


@pytest.mark.long
def test_a_fit_by_two_processes_is_that_of_one(here):
    printed = penult(here, "fit", "alone", "--components", "4", "--out", "two.penult.safetensors", "--devices", 2)
    assert printed.count("implied prior") == 1
    one, two = (load(here / f"{name}.penult.safetensors").state_dict() for name in ("alone", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_torchrun_says_how_many_there_are(here):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "penult")
    printed = penult(here, *extraction("run"), launcher=launcher)
    assert printed.count("2 processes share the batches") == 1
    same(Activations.open(here / "run"), Activations.open(here / "alone"))


@pytest.mark.long
def test_a_student_of_two_processes(here):
    command = ("distill", "alone.penult.safetensors", "--student", "teamnets:student", "--data", "digits")
    facts = json.loads(penult(here, *command, "--epochs", 2, "--out", "student", "--devices", 2, "--json"))
    assert (facts["epochs"], facts["was_complete"]) == (2, False)
    assert facts["accuracy"] > facts["start_accuracy"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["vae", "gan"])
def test_a_generator_of_two_processes(here, kind):
    command = ("generate", "alone.penult.safetensors", "--model", "teamnets:net", "--images", "digits", "--kind", kind)
    facts = json.loads(penult(here, *command, "--epochs", 1, "--out", kind, "--devices", 2, "--json"))
    assert facts["epochs"] == 1
    assert (here / kind / "generator.safetensors").exists()


def test_more_devices_than_there_are(here):
    process = start(here, *extraction("no", "--devices", 2, "--device", "cuda:0"))
    _, error = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "--device is 'cuda:0', which cannot be used here" in error
