"""Commands of penult in processes that can be killed, and a folder with all that they are given.

A `Runner` forks its children from a process that has imported everything: a run begins with its work, so that a kill
hits that, and tests need not wait for imports. ``warm=False`` starts Python anew, as a user does.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

NETS = '''
import time
from pathlib import Path

import torch
from penult.demo.networks import DigitsNet


def drawn(seed, width):
    """A network whose weights are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DigitsNet(width=width)


def net():
    return drawn(0, 16)


def student():
    return DigitsNet(width=8)


def waits():
    """Whether the file exists that "hold" names, and "hold" itself."""
    try:
        return Path(Path("hold").read_text()).exists()
    except FileNotFoundError:
        return False


class Held(torch.nn.Module):
    """Waits where a test has chosen, and says so."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        while waits():
            Path("waiting").touch()
            time.sleep(0.01)
        return self.net(x)


class Slow(torch.nn.Module):
    """Takes its time, so that kills find an extraction between two shards."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        time.sleep(0.02)
        return self.net(x)


def slow():
    return Slow(net())


def held():
    return Held(net())


def held_student():
    return Held(student())
'''

# How often a generator is judged does not matter here, and takes its time.
_CODE = """
import sys
from penult.generate import _image_metrics
from penult.cli import main
_image_metrics._EPOCHS, _image_metrics._STEPS = 1, 3
main()
"""

_SAVE = """
import os, sys
import torch
import penult

# Saves pairs over each other for as long as it is let: all numbers of the n-th are n in their first column.
path, count = sys.argv[1], int(sys.argv[2])
for number in range(1, count + 1):
    weight = torch.eye(40, 3000)
    weight[:, -1] = number
    penult.GenerativePair(penult.Head(weight, torch.full((40,), float(number))), penult.Sphere(2.0)).save(path)
"""


def make_place(folder: Path) -> Path:
    """A module of networks, images, activations and pairs."""
    import numpy
    import torch

    import penult
    from penult.data import digits

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faultnets.py").write_text(NETS)
    (folder / "save.py").write_text(_SAVE)
    images = digits()
    for name, rows in (("data", slice(0, 300)), ("val", slice(300, 450))):
        numpy.savez(folder / f"{name}.npz", images=images.images[rows].numpy(), labels=images.labels[rows].numpy())
    sys.path.insert(0, str(folder))
    try:
        from faultnets import net
    finally:
        sys.path.remove(str(folder))
    model = net().eval()
    head = penult.find_head(model, images.images[:16])
    with torch.no_grad():
        acts = penult.extract(penult.Tap(model, head), [(images.images[:1000], images.labels[:1000])])
    acts.save(folder / "acts")
    acts[:200].save(folder / "few")
    mixture = penult.Marginal.fit(head, acts, kind="mixture", components=3, dims=4)
    pair = penult.GenerativePair(head, mixture)
    for name in ("acts/head.penult.safetensors", "few/head.penult.safetensors", "pair.penult.safetensors"):
        pair.save(folder / name)
    return folder


class Run:
    """A command at work in a process group of its own."""

    def __init__(self, log: Path, pid: int) -> None:
        self.log, self.pid = log, pid

    def poll(self) -> int | None:
        """Its exit code, -9 after a kill; None as long as it runs."""
        raise NotImplementedError

    def wait(self, seconds: float = 300) -> int:
        """Its exit code, once it has ended."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"still at work after {seconds} s: {self.said()}")
            time.sleep(0.005)
        return code

    def signal(self, number: int) -> None:
        """Send a signal to it and to all of its workers."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # it has ended
            pass

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class _Cold(Run):
    def __init__(self, log: Path, process: subprocess.Popen) -> None:
        super().__init__(log, process.pid)
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()


class _Warm(Run):
    def __init__(self, log: Path, runner: Runner, pid: int) -> None:
        super().__init__(log, pid)
        self._runner, self._code = runner, None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._runner.ask({"poll": self.pid})
        return self._code


class Runner:
    """Starts commands. Use it in a with statement.

    Args:
        place: Where they run, from `make_place`.
        scratch: The folder for temporary files of the commands, which shall not lie in the machine's own.
    """

    def __init__(self, place: Path, scratch: Path) -> None:
        self.place = place
        scratch.mkdir(parents=True, exist_ok=True)
        self._scratch, self._server, self._count = scratch, None, 0

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            with self._server:  # closes its pipes, so that it ends
                pass

    def start(self, arguments: list[str], *, warm: bool = True) -> Run:
        """Begin a command: ``penult`` with these arguments, or a program of the place if the first is its name."""
        self._count += 1
        log = self._scratch / f"log-{self._count}.txt"
        log.unlink(missing_ok=True)
        program = arguments[0].endswith(".py")
        if warm:
            code = (self.place / arguments[0]).read_text() if program else _CODE
            asked = {"code": code, "argv": arguments[1:] if program else arguments, "log": str(log)}
            return _Warm(log, self, self.ask(asked))
        command = [sys.executable, *arguments] if program else [sys.executable, "-c", _CODE, *arguments]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self.place,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return _Cold(log, process)

    def run(self, arguments: list[str], *, warm: bool = True) -> tuple[int, str]:
        """A command from beginning to end: its exit code and what it said."""
        run = self.start(arguments, warm=warm)
        return run.wait(), run.said()

    def ready(self) -> None:
        """Wait for all imports, which would else be part of the first run."""
        self.run(["--version"])

    def ask(self, question: dict) -> int | None:
        """What the server says."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                cwd=self.place,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def _environment(self) -> dict[str, str]:
        # Workers of loaders keep sockets in TMPDIR, whose paths have to be short: it is left as it is.
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "COLUMNS": "200"}


def serve() -> None:
    """Fork a child for each command that is asked for on stdin, and say how children have ended."""
    preload()
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return child(**asked)
        print(json.dumps(answer), flush=True)
    return None


def preload() -> None:
    """Import all that commands import, and run nothing."""
    for name in (
        *("lightning.pytorch", "matplotlib.pyplot", "PIL.Image", "torchmetrics"),
        *("sklearn.datasets", "sklearn.linear_model", "sklearn.metrics"),
        *("penult.cli._generate_train", "penult.data", "penult.distill", "penult.realism", "penult.report.pair"),
    ):
        importlib.import_module(name)


def child(code: str, argv: list[str], log: str) -> None:
    """Be the command: with a process group, standard streams and handlers of its own."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have switched off in the background
    sys.argv = ["penult", *argv]
    exec(compile(code, "<command>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    serve()
