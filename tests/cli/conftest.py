import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from penult.cli import app
from penult.demo.networks import DigitsNet

MODULE = '''
import torch
from penult.demo.networks import DigitsNet

def trained():
    """A network for digits whose weights are drawn, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DigitsNet()

network = trained()

def probabilities():
    return torch.nn.Sequential(trained(), torch.nn.Softmax(-1))

def nothing():
    return 3

none = None

def broken():
    return {}["layer4"]

class Nets:
    needs = staticmethod(lambda config: DigitsNet())
    small = staticmethod(lambda: DigitsNet(width=16))
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of a user, with a module of models, a state dict and a head, where commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "usernets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "usernets", raising=False)
    g = torch.Generator().manual_seed(0)
    model = DigitsNet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / max(1, parameter[0].numel()) ** 0.5)
    save_file(model.state_dict(), tmp_path / "digits.safetensors")
    save_file({"a.weight": torch.randn(3, 4), "b.weight": torch.randn(5, 3)}, tmp_path / "two.safetensors")
    (tmp_path / "pickled.pth").write_bytes(b"\x80\x02not a tensor")
    return tmp_path


@pytest.fixture
def penult_json(here):
    """Run a command with --json and give its facts."""

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output + repr(done.exception)
        return json.loads(done.stdout)

    return run


@pytest.fixture
def refused(here, monkeypatch, capsys):
    """Run a command that must end with code 2, and give its one line of reason."""
    from penult.cli import main

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["penult", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("penult: ")
        return lines[-1]

    return run
