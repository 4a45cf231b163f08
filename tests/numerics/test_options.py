"""The options that say what this folder is run on."""

import subprocess
import sys

import pytest
import torch


class Options:
    def __init__(self, device, dtype="float32"):
        self.given = {"--device": device, "--dtype": dtype}

    def getoption(self, name):
        return self.given[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options("meta"), "hold no numbers"),
        (Options("toaster"), "no such device"),
        (Options("mps", "float64"), "mps"),
        *([] if torch.cuda.is_available() else [(Options("cuda"), "none of that kind"), (Options("cuda:1"), "cuda:1")]),
    ],
)
def test_what_is_not_there_is_a_usage_error(options, message, pytestconfig):
    root = str(pytestconfig.rootpath / "conftest.py")
    conftest = next(each for each in pytestconfig.pluginmanager.get_plugins() if getattr(each, "__file__", "") == root)
    with pytest.raises(pytest.UsageError, match=message):
        conftest._device(options)


@pytest.mark.long
def test_the_command_says_so_in_one_line(pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "meta", "tests/heads.py"]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --device meta: its tensors hold no numbers to test"


def test_defaults(device, dtype, pytestconfig):
    assert device.type == pytestconfig.getoption("--device").split(":")[0]
    assert str(dtype) == f"torch.{pytestconfig.getoption('--dtype')}"
