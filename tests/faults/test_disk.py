"""A full disk, a folder that cannot be written to, Ctrl-C, and processes that decode images and die.

Each time the command says so in one line, nothing that was there before is lost or torn, and the same command completes
once the fault is gone.
"""

import errno
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import penult
from faults.kill import LOCK, files_of, look, victims

TRAINING = ["--val", "val.npz", "--batch-size", "50", "--epochs", "2"]


def extract(out, model="faultnets:net", *more):
    return ["extract", model, "data.npz", "--out", str(out), "--batch-size", "20", "--shard-size", "0.004", *more]


def fit(out):
    return ["fit", "acts", "--out", str(out), "--base", "bank"]


def distill(out, student="faultnets:student", *more):
    return ["distill", "pair.penult.safetensors", "--student", student, "--data", "data.npz", "--out", str(out),
            *TRAINING, *more]  # fmt: skip


def generate(out, model="faultnets:net", *more):
    return ["generate", "pair.penult.safetensors", "--model", model, "--images", "data.npz", "--out", str(out),
            "--width", "16", "--latent", "4", *TRAINING, *more]  # fmt: skip


def report(out):
    return ["report", "pair.penult.safetensors", "--data", "few", "--out", str(out)]


def refused(runner, arguments, *words):
    """Run a command that has to end with code 2 and one line that has these words."""
    code, said = runner.run(arguments)
    assert code == 2, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("penult: ") and "warning" not in line]
    for word in words:
        assert str(word) in line
    return said


def completes(runner, arguments):
    code, said = runner.run(arguments)
    assert code == 0, said
    return said


def names_in(out):
    return set(files_of(out))


FULL = "No space left on device", "free some space"


def test_extract_on_a_full_disk_keeps_its_whole_shards(runner, disk):
    out = disk.path / "acts"
    disk.resize(40)
    refused(runner, extract(out), out, *FULL)
    found, temporary = look(victims()["extract"], out)
    assert not temporary
    assert 1 <= len(found) < 8
    disk.resize(4096)
    assert f"holds {len(found)} whole shards of a run that was stopped" in completes(runner, extract(out))
    completes(runner, extract(disk.path / "whole"))
    whole, _ = look(victims()["extract"], disk.path / "whole")
    assert look(victims()["extract"], out) == (whole, [])


def test_fit_on_a_full_disk_keeps_the_pair_of_before(runner, disk):
    out = disk.path / "pair.penult.safetensors"
    shutil.copy(runner.place / "pair.penult.safetensors", out)
    before = out.read_bytes()
    disk.free(8)
    refused(runner, fit(out), out, *FULL)
    assert names_in(out) == {""}
    assert out.read_bytes() == before
    disk.resize(4096)
    completes(runner, fit(out))
    assert names_in(out) == {""}
    assert penult.load(out).base.info.name
    assert out.read_bytes() != before


def test_saving_on_a_full_disk_is_an_error_that_names_the_file(runner, disk):
    out = disk.path / "pair.penult.safetensors"
    pair = penult.load(runner.place / "pair.penult.safetensors")
    pair.save(out)
    before = out.read_bytes()
    disk.free(0)
    with pytest.raises(OSError, match=r"cannot write .*pair\.penult\.safetensors") as caught:
        pair.save(out)
    assert caught.value.errno == errno.ENOSPC
    assert names_in(out) == {""}
    assert out.read_bytes() == before
    disk.free(64)
    pair.save(out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "sizes"),
    # room for settings alone; for one checkpoint and a part of the next
    [(distill, (4, 40)), pytest.param(generate, (84,), marks=pytest.mark.long)],
)
def test_training_on_a_full_disk_keeps_its_checkpoint_whole(runner, disk, command, sizes):
    out, name = disk.path / "run", command.__name__
    for size in sizes:
        disk.resize(size)
        refused(runner, command(out), out, *FULL)
        found, temporary = look(victims()[name], out)
        assert not temporary
        assert ("checkpoints/last.ckpt" in found) == (size > 4)
    disk.resize(4096)
    assert "resuming after epoch 1" in completes(runner, command(out))
    assert not look(victims()[name], out)[1]


@pytest.mark.long
def test_a_report_on_a_full_disk_keeps_the_page_of_before(runner, disk):
    out = disk.path / "page.html"
    out.write_text("an older page")
    disk.free(16)
    refused(runner, report(out), out, *FULL)
    assert [path.name for path in disk.path.iterdir()] == ["page.html"]
    assert out.read_text() == "an older page"
    disk.resize(4096)
    completes(runner, report(out))
    assert out.read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (extract, "acts"),
        (fit, "pair.penult.safetensors"),
        (distill, "run"),
        pytest.param(generate, "run", marks=pytest.mark.long),
        pytest.param(report, "page.html", marks=pytest.mark.long),
    ],
)
def test_what_cannot_be_written_to_is_said_in_one_line(runner, disk, command, name):
    out = disk.path / name
    if command in (fit, report):
        out.write_text("before")
    disk.read_only()
    refused(runner, command(out), out, "Read-only file system", "give another path")
    assert [path.name for path in disk.path.iterdir()] == ([name] if command in (fit, report) else [])


HELD = {extract: "faultnets:held", distill: "faultnets:held_student", generate: "faultnets:held"}
LONG = {"marks": pytest.mark.long}
KEPT = {extract: "activations-00001.safetensors", distill: "checkpoints/last.ckpt", generate: "checkpoints/last.ckpt"}


@contextmanager
def held(runner, arguments, file):
    """A command that has written a file, and waits in its network."""
    hold, waiting = runner.place / "hold", runner.place / "waiting"
    waiting.unlink(missing_ok=True)
    hold.write_text(str(file))
    run = runner.start(arguments)
    try:
        end = time.monotonic() + 200
        while not waiting.exists():
            assert run.poll() is None, run.said()
            assert time.monotonic() < end, run.said()
            time.sleep(0.01)
        yield run
    finally:
        hold.unlink(missing_ok=True)
        run.signal(signal.SIGKILL)


@pytest.mark.parametrize("command", [extract, pytest.param(distill, **LONG), pytest.param(generate, **LONG)])
def test_an_interrupt_from_the_keyboard_keeps_what_is_done(runner, tmp_path, command):
    out, net = tmp_path / "run", HELD[command]
    with held(runner, command(out, net), out / KEPT[command]) as run:
        run.signal(signal.SIGINT)
        code, said = run.wait(), run.said()
    assert code == (130 if command is extract else 2), said
    assert "Traceback" not in said
    if command is not extract:
        assert "interrupted" in said
        assert "the same command continues it" in said
    found, temporary = look(victims()[command.__name__], out)
    assert KEPT[command] in found
    assert not temporary
    assert "resuming after" in completes(runner, command(out, net))
    assert not look(victims()[command.__name__], out)[1]


def workers_of(run):
    """All processes of the command's group but itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            group = int(path.read_text().rpartition(")")[2].split()[2])
        except (OSError, ValueError, IndexError):  # it has ended
            continue
        if group == run.pid and path.parent.name != str(run.pid):
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("command", [extract, pytest.param(distill, **LONG)])
def test_a_process_that_decodes_images_and_is_killed_is_told_of(runner, tmp_path, command):
    out, net = tmp_path / "run", HELD[command]
    arguments = command(out, net, "--workers", "1")
    with held(runner, arguments, out / KEPT[command]) as run:
        workers = workers_of(run)
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        (runner.place / "hold").unlink()
        code, said = run.wait(), run.said()
    assert code == 2, said
    assert "Traceback" not in said
    assert "DataLoader worker" in said
    assert "the same command continues" in said
    found, temporary = look(victims()[command.__name__], out)
    assert KEPT[command] in found
    assert set(temporary) <= {LOCK}  # torch may speak up again, in the middle of the tidying
    assert "resuming after" in completes(runner, arguments)
    assert not look(victims()[command.__name__], out)[1]
