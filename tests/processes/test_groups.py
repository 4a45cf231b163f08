"""Two and three processes give what one gives."""

import json
import os
import subprocess
import sys

import pytest
import torch

from penult import Activations, Sphere, extract
from penult.distributions import PrincipalMixture
from penult.processes import Processes
from processes import worker


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.long), 3])
def together(request, tmp_path_factory):
    """The folder that processes shared, and what each of them found."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, worker.__file__, str(folder)]
    # Gloo would look for the address of the machine's name, which need not have one.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, str(rank), str(request.param)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(request.param)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * request.param, "\n".join(errors)
    return folder, [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same by one process: tap, data and activations."""
    tap, data = worker.material()
    folder = tmp_path_factory.mktemp("alone")
    return tap, data, extract(tap, worker.loader(data), folder, shard_size=300)


def same(a, b):
    assert torch.equal(a.activations, b.activations)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.labels, b.labels)


def test_activations_are_the_same_and_in_the_same_order(together, alone):
    folder, _ = together
    same(Activations.open(folder / "acts"), alone[2])


def test_more_processes_than_batches(together, alone):
    tap, data, _ = alone
    folder, _ = together
    same(Activations.open(folder / "few"), extract(tap, [data[:30], data[30:31]]))
    assert len(list((folder / "few").glob("*.safetensors"))) == 2


def test_one_index_and_no_lock_is_left(together):
    folder, facts = together
    names = sorted(path.name for path in (folder / "acts").iterdir())
    assert names.count("index.json") == 1
    assert all(name.startswith("activations-0000") for name in names if name != "index.json")
    assert {name.split("-")[1] for name in names if name != "index.json"} == {f"{i:05}" for i in range(len(facts))}


def test_each_process_loads_its_own_batches_alone(together):
    _, facts = together
    batches = -(-worker.ROWS // worker.BATCH)
    cuts = [batches * rank // len(facts) * worker.BATCH for rank in range(len(facts) + 1)]
    for found, start, stop in zip(facts, cuts, cuts[1:], strict=False):
        assert found["loaded"] == list(range(start, min(stop, worker.ROWS)))


@pytest.mark.parametrize("name", worker.BASES)
def test_fits_are_those_of_one_process(together, alone, name):
    tap, _, acts = alone
    expected = worker.BASES[name](tap.head, acts).state_dict()
    for found in together[1]:
        for key, value in found[name].items():
            torch.testing.assert_close(torch.tensor(value), expected[key], rtol=2e-5, atol=2e-5, check_dtype=False)


def test_a_mixture_of_rows_that_each_process_brings(together, alone):
    acts = alone[2].activations
    _, facts = together
    rows = torch.cat([acts[worker.ROWS * rank // 7 :: 7] for rank in range(len(facts))])
    expected = PrincipalMixture.fit(rows, 2, 3).means
    for found in facts:
        torch.testing.assert_close(torch.tensor(found["own"]), expected, rtol=1e-4, atol=1e-4)


def test_refusals_are_those_of_all_processes(together):
    for found in together[1]:
        assert "RandomSampler" in found["shuffled"]
        assert "shuffle=False" in found["shuffled"]
        assert "without a length" in found["endless"]
        assert "out is None; expected a folder" in found["memory"]
        assert "1 of 83 rows of activations hold NaN" in found["bad"]
    assert not (together[0] / "no").exists()


def test_a_stopped_run_of_several_processes_is_not_gone_on_with_by_one(together, alone, tmp_path):
    tap, data, _ = alone
    folder, facts = together
    for path in (folder / "acts").glob("activations-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=rf"a run of {len(facts)} processes .*expected 1 processes.*overwrite=True"):
        extract(tap, worker.loader(data), tmp_path, shard_size=300)
    same(extract(tap, worker.loader(data), tmp_path, shard_size=300, overwrite=True), alone[2])


def test_a_complete_folder_of_several_processes_serves_one(together, alone):
    tap, data, acts = alone
    folder, _ = together
    same(extract(tap, worker.loader(data), folder / "acts", shard_size=300), acts)
    with pytest.raises(FileExistsError, match="already contains activations"):
        acts.save(folder / "acts")


@pytest.mark.parametrize("total", [0, 1, 5, 6, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_follow_each_other(total, count):
    parts = []
    for rank in range(count):
        one = Processes()
        one.rank, one.count = rank, count
        parts.append(one.share(total))
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_alone_exchanges_nothing(alone):
    x = torch.randn(3, 2)
    one = Processes()
    assert one.sum(x) is x
    assert one.gather(x) is x
    assert (one.first("a"), one.objects(2), one.total(3), one.least(-1.0)) == ("a", [2], 3.0, -1.0)
    one.wait()
    assert isinstance(worker.BASES["elliptic"](alone[0].head, alone[2]), Sphere)
