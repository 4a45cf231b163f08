import copy
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from penult import io
from penult.activations import Activations, Tap, extract
from penult.head import find_head
from zoo import mlp, seeded

ROW = 4 * (8 + 3) + 8  # bytes
SHARD = 7 * ROW  # two batches of four rows
COUNT = 11  # batches: five shards and one batch

SCRIPT = """
import os, signal, sys
import torch
from penult import io
from penult.activations import Tap, extract
from penult.head import find_head
sys.path.insert(0, os.environ["TESTS"])
from zoo import mlp, seeded
from torch import nn

model = mlp(nn.ReLU())
tap = Tap(model, find_head(model, seeded(5, 4)))
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
"""


class Counting:
    """A tap and how many batches its model has seen since the last look."""

    def __init__(self):
        model = mlp(nn.ReLU())
        self.tap = Tap(model, find_head(model, seeded(5, 4)))
        self.count = 0
        model.register_forward_hook(lambda *args: setattr(self, "count", self.count + 1))

    def look(self):
        count, self.count = self.count, 0
        return count


@pytest.fixture
def counting():
    return Counting()


def batches(count=COUNT, seed=0):
    x = seeded(100, 4, seed=seed)[: 4 * count - (count == COUNT)]  # the last batch is smaller
    return list(zip(x.split(4), (torch.arange(len(x)) % 3).split(4), strict=True))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def interrupted(error, at):
    for number, batch in enumerate(batches()):
        if number == at:
            raise error
        yield batch


def stop(tap, out, at=7, error=KeyboardInterrupt, **kwargs):
    with pytest.raises(error):
        extract(tap, interrupted(error, at), out, shard_size=SHARD, **kwargs)


def run(script, *arguments, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TESTS": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", SCRIPT + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **kwargs)


# ---- killed ------------------------------------------------------------------------------------------------

KILLS = {
    "in the loader": """
        def loader():
            for number, batch in enumerate(torch.load(sys.argv[2])):
                if number == 7:
                    kill()
                yield batch
        extract(tap, loader(), sys.argv[1], shard_size=int(sys.argv[3]))
    """,
    "before a shard has its name": """
        replace, calls = os.replace, []
        def killing(*args):
            calls.append(args)
            if len(calls) == 3:
                kill()
            replace(*args)
        os.replace = killing
        extract(tap, torch.load(sys.argv[2]), sys.argv[1], shard_size=int(sys.argv[3]))
    """,
    "before the index": """
        io.write_index = lambda *args: kill()
        extract(tap, torch.load(sys.argv[2]), sys.argv[1], shard_size=int(sys.argv[3]))
    """,
}
WHOLE = {"in the loader": 3, "before a shard has its name": 2, "before the index": 6}
RUN = {"in the loader": 1 + 5, "before a shard has its name": 1 + 7, "before the index": 1}  # of the model


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_resumes_to_the_same_bytes(name, counting, tmp_path):
    extract(counting.tap, batches(), tmp_path / "whole", shard_size=SHARD)
    assert counting.look() == COUNT
    torch.save(batches(), tmp_path / "batches.pt")
    out = tmp_path / "killed"
    done = run(KILLS[name], out, tmp_path / "batches.pt", SHARD)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = sorted(path.name for path in out.iterdir())
    assert found.count("index.json") == 0
    assert len([path for path in found if path.startswith("activations-")]) == WHOLE[name]
    assert bool(io.leftovers(out)) == (name == "before a shard has its name")
    with pytest.raises(io.FileFormatError, match=rf"incomplete: it has {WHOLE[name]} whole shards"):
        Activations.open(out)
    acts = extract(counting.tap, batches(), out, shard_size=SHARD)
    assert counting.look() == RUN[name]
    assert bytes_of(out) == bytes_of(tmp_path / "whole")  # and nothing is left lying about
    assert torch.equal(acts.activations, extract(counting.tap, batches()).activations)


def test_interruptions(counting, tmp_path):
    extract(counting.tap, batches(), tmp_path / "whole", shard_size=SHARD)
    out = tmp_path / "out"
    for at in (0, 1, 2, 5, 5, 9, 10):
        stop(counting.tap, out, at, KeyboardInterrupt if at % 2 else OSError)
        assert not io.leftovers(out)
    acts = extract(counting.tap, (batch for batch in batches()), out, shard_size=SHARD)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert len(acts) == 4 * COUNT - 1


def test_resuming_with_dropped_rows(counting, tmp_path):
    loader = [(x, y.masked_fill(y == number % 3, -100)) for number, (x, y) in enumerate(batches())]
    for number in (3, 4, 10):
        loader[number] = loader[number][0], torch.full_like(loader[number][1], -100)
    extract(counting.tap, loader, tmp_path / "whole", shard_size=SHARD)
    for at in range(2, COUNT):
        with pytest.raises(OSError, match="gone"):
            extract(counting.tap, failing(loader, at), tmp_path / "out", shard_size=SHARD)
    extract(counting.tap, loader, tmp_path / "out", shard_size=SHARD)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    extract(counting.tap, loader, tmp_path / "out", shard_size=SHARD)


def failing(loader, at):
    yield from loader[:at]
    raise OSError("the disk is gone")


def test_labels_are_counted_over_what_was_skipped(counting, tmp_path):
    stop(counting.tap, tmp_path)
    loader = batches()
    loader[8] = loader[8][0], torch.tensor([0, 1, 9, 0])
    with pytest.raises(ValueError, match=r"labels\[34\] is 9"):
        extract(counting.tap, loader, tmp_path, shard_size=SHARD)


def test_progress_counts_what_is_skipped(counting, tmp_path):
    stop(counting.tap, tmp_path)
    seen = []
    extract(counting.tap, batches(), tmp_path, shard_size=SHARD, progress=lambda *args: seen.append(args))
    assert seen == [(done, COUNT) for done in range(1, COUNT + 1)]


# ---- what is there is not what is asked for ---------------------------------------------------------------

REMEDY = r"shuffle=False.*another folder, or pass overwrite=True"


@pytest.fixture(params=["unfinished", "finished"])
def held(request, counting, tmp_path):
    if request.param == "finished":
        extract(counting.tap, batches(), tmp_path, shard_size=SHARD)
    else:
        stop(counting.tap, tmp_path)
    counting.look()
    return tmp_path


def test_a_finished_folder_is_returned(counting, tmp_path):
    first = extract(counting.tap, batches(), tmp_path, shard_size=SHARD)
    before = bytes_of(tmp_path)
    counting.look()
    again = extract(counting.tap, DataLoader(batches(), batch_size=None), tmp_path, shard_size=SHARD)
    assert counting.look() == 1
    assert bytes_of(tmp_path) == before
    assert torch.equal(first.activations, again.activations)
    with pytest.raises(ValueError, match=rf"loader has 10 batches, but {COUNT} are stored.*{REMEDY}"):
        extract(counting.tap, batches()[:10], tmp_path, shard_size=SHARD)
    with pytest.raises(ValueError, match="loader has no batch"):
        extract(counting.tap, (batch for batch in ()), tmp_path, shard_size=SHARD)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": torch.float16}, "dtype is float32 there and float16 now"),
        ({"class_names": list("abc")}, r"class_names is None there and \['a', 'b', 'c'\] now"),
        ({"shard_size": 1000}, f"shard_size is {SHARD} there and 1000 now"),
    ],
)
def test_other_arguments(held, counting, arguments, words):
    before = bytes_of(held)
    with pytest.raises(ValueError, match=rf"{words}.*{REMEDY}"):
        extract(counting.tap, batches(), held, **{"shard_size": SHARD} | arguments)
    assert counting.look() == 0  # told before anything is run
    assert bytes_of(held) == before


def test_another_head(held, counting):
    with torch.no_grad():
        counting.tap.model[-1].bias[0] += 1
    with pytest.raises(ValueError, match=rf"the head has other weights.*{REMEDY}"):
        extract(counting.tap, batches(), held, shard_size=SHARD)


def test_another_body(held, counting):
    with torch.no_grad():
        counting.tap.model[0].weight *= 1.1
    with pytest.raises(ValueError, match=rf"batch \d+ \(counted from 0\) has other activations.*{REMEDY}"):
        extract(counting.tap, batches(), held, shard_size=SHARD)


def test_another_order(held, counting):
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(), strict=True)))
    extract(counting.tap, DataLoader(data, batch_size=4), held, shard_size=SHARD)
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=rf"has other activations.*{REMEDY}"):
        extract(counting.tap, loader, held, shard_size=SHARD)


@pytest.mark.parametrize(
    "other",
    [
        lambda: [(x, (y + 1) % 3) for x, y in batches()],
        lambda: [x for x, _ in batches()],
        lambda: [(x[:2], y[:2]) for x, y in batches()],
        lambda: [(x.repeat(9, 1), y.repeat(9)) for x, y in batches()],
        lambda: [(x[::2], y[::2]) for x, y in batches()],
    ],
)
def test_another_loader(held, counting, other):
    with pytest.raises(ValueError, match=REMEDY):
        extract(counting.tap, other(), held, shard_size=SHARD)


def test_a_loader_that_ends_too_early(counting, tmp_path):
    stop(counting.tap, tmp_path)
    with pytest.raises(ValueError, match=rf"the loader gave 3 batches, but 6 are stored.*{REMEDY}"):
        extract(counting.tap, batches()[:3], tmp_path, shard_size=SHARD)


def test_the_rounding_of_another_machine_is_let_pass(held, counting):
    other = copy.deepcopy(counting.tap)
    with torch.no_grad():
        other.model[0].weight *= 1 + 1e-5
    extract(other, batches(), held, shard_size=SHARD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resuming_in_half_precision(counting, tmp_path, dtype):
    extract(counting.tap, batches(), tmp_path / "whole", shard_size=SHARD, dtype=dtype)
    stop(counting.tap, tmp_path / "out", dtype=dtype)
    extract(counting.tap, batches(), tmp_path / "out", shard_size=SHARD, dtype=dtype)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_overwrite(held, counting):
    (held / "head.safetensors").write_text("mine")
    acts = extract(counting.tap, batches(3, seed=5), held, shard_size=SHARD, overwrite=True)
    assert len(acts) == 12
    assert counting.look() == 3
    assert (held / "head.safetensors").read_text() == "mine"
    assert set(bytes_of(held)) == {
        "activations-00000.safetensors", "activations-00001.safetensors", "head.safetensors", "index.json"
    }  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folders(counting, tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"other files and no activations \(thesis.tex\); choose a new or empty"):
        extract(counting.tap, batches(), tmp_path, overwrite=overwrite)
    io.write_index(tmp_path, {}, "something else", {})
    with pytest.raises((FileExistsError, io.FileFormatError), match=r"other files|'something else'"):
        extract(counting.tap, batches(), tmp_path, overwrite=overwrite)
    assert sorted(bytes_of(tmp_path)) == ["index.json", "thesis.tex"]


def test_what_was_saved_is_no_extraction(counting, tmp_path):
    extract(counting.tap, batches()).save(tmp_path, shard_size=SHARD)
    with pytest.raises(ValueError, match=REMEDY):
        extract(counting.tap, batches(), tmp_path, shard_size=SHARD)


def test_damaged_shards(counting, tmp_path):
    stop(counting.tap, tmp_path)
    (tmp_path / "activations-00001.safetensors").unlink()
    with pytest.raises(
        io.FileFormatError,
        match=r"00002.safetensors is not a record of activations.*does not follow activations-00000.*overwrite=True",
    ):
        extract(counting.tap, batches(), tmp_path, shard_size=SHARD)
    os.truncate(tmp_path / "activations-00000.safetensors", 100)
    with pytest.raises(io.FileFormatError, match="truncated"):
        extract(counting.tap, batches(), tmp_path, shard_size=SHARD)
    assert len(extract(counting.tap, batches(), tmp_path, shard_size=SHARD, overwrite=True)) == 4 * COUNT - 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_one_writer_at_a_time(counting, tmp_path):
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('4711'); f.flush();"
    script += "print(flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / ".activations.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        for overwrite in (False, True):
            with pytest.raises(RuntimeError, match="process 4711 is writing to"):
                extract(counting.tap, batches(), tmp_path, shard_size=SHARD, overwrite=overwrite)
        assert list(bytes_of(tmp_path)) == [".activations.lock"]
        other.kill()
    extract(counting.tap, batches(), tmp_path, shard_size=SHARD)  # a lock dies with its process
    assert ".activations.lock" not in bytes_of(tmp_path)


def test_workers_do_not_hold_the_lock(counting, tmp_path):
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(), strict=True)))
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    with pytest.raises(OSError, match="gone"):
        extract(counting.tap, failing_after(loader, 5), tmp_path, shard_size=SHARD)
    acts = extract(counting.tap, loader, tmp_path, shard_size=SHARD)  # the workers are still there
    assert len(acts) == 4 * COUNT - 1


def failing_after(loader, at):
    for number, batch in enumerate(loader):
        if number == at:
            raise OSError("the disk is gone")
        yield batch


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    script = """
        import penult

        model = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 10))
        tap = Tap(model, find_head(model, seeded(5, 4)))

        def loader(rows):
            generator = torch.Generator().manual_seed(0)
            for _ in range(0, rows, 1000):
                yield torch.randn(1000, 4, generator=generator), torch.randint(10, (1000,), generator=generator)

        def peak(task):
            open("/proc/self/clear_refs", "w").write("5")
            before = status("VmRSS")
            task()
            return (status("VmHWM") - before) // 1024

        def status(name):
            return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

        def write(rows):
            penult.extract(tap, loader(rows), f"{sys.argv[1]}/{rows}", shard_size=2**20)

        def read(rows):
            acts = penult.Activations.open(f"{sys.argv[1]}/{rows}")
            assert sum(part.activations.mean() > 0 for part in acts.batches(1500))
            assert len(acts.predicted) == len(acts) == rows
            assert acts.split(0.5, 0.5)[0][10:].batches(1000)

        for task in (write, read):
            task(5_000)
            print(*(peak(lambda: task(rows)) for rows in (20_000, 200_000)))
    """
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    (write, write_10), (read, read_10) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert write_10 <= write + 8, done.stdout  # MiB; ten times the data are 105 MiB more
    assert read_10 <= read + 8, done.stdout
    print(done.stdout)
