"""A few of the kills of ``kill.py``, at moments that do not change."""

import pytest

from faults.kill import COMMANDS, Killer, Torn, figures, look, victims

KILLS = {"extract": 2, "fit": 1, "save": 2, "distill": 2, "generate": 1}


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.long) if name != "extract" else name for name in COMMANDS],
)
def test_a_killed_command_leaves_nothing_torn_and_completes_when_run_again(runner, command):
    happened = Killer(runner, seed=0).trial(command, 0, KILLS[command])
    assert 1 <= len(happened) <= KILLS[command]
    table = figures([{"command": command, "kills": happened, "failure": None}])
    assert table["all"]["kills"] == table[command]["kills"] == len(happened)


def test_torn_and_unknown_files_are_seen(place, tmp_path):
    victim = victims()["extract"]
    out = tmp_path / "acts"
    out.mkdir()
    shard = (place / "acts" / "activations-00000.safetensors").read_bytes()
    (out / "activations-00000.safetensors").write_bytes(shard)
    (out / ".index.json.1-01234567.tmp").touch()
    found, temporary = look(victim, out)
    assert list(found) == ["activations-00000.safetensors"]
    assert temporary == [".index.json.1-01234567.tmp"]
    (out / "activations-00000.safetensors").write_bytes(shard[:-1])
    with pytest.raises(Torn, match="is torn"):
        look(victim, out)
    (out / "activations-00000.safetensors").write_bytes(shard)
    (out / ".tmpAbC123").touch()
    with pytest.raises(Torn, match="no temporary one"):
        look(victim, out)
