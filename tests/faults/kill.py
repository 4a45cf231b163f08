"""Kill commands at random moments, and see that nothing is torn and that the next run completes.

Each trial takes one of extract, fit, save, distill and generate, kills it one to three times with SIGKILL at moments
that are uniform over the time that an undisturbed run takes, looks at all files after each kill, and then lets the same
command come to its end. After a kill each file has to be absent, whole, or a temporary file that the next run removes;
after the end the results have to be those of an undisturbed run, number by number.

    python tests/faults/kill.py --kills 100 --out kills.json

prints each kill, writes the figures as it goes, and continues from the file if it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.runs import Runner, make_place

LOCK = ".activations.lock"
COMMANDS = "extract", "fit", "save", "distill", "generate"


class Torn(AssertionError):
    """A file is neither absent nor whole, or the next run did not complete."""


@dataclass(frozen=True)
class Victim:
    """A command, and what has to be true of its files.

    Attributes:
        arguments: Of the command, given the path to write to.
        whole: Reads a file, by its path under that path, and gives what has to be as in an undisturbed run; raises
            where the file is damaged, and KeyError where there should be none of that name.
        complete: Whether all is there, given the path.
        held: Names of temporary files that a killed run may leave, beside those of penult.io.
    """

    arguments: Callable[[Path], list[str]]
    whole: Callable[[Path, str], Any]
    complete: Callable[[Path], bool]
    held: tuple[str, ...] = ()


def tensors_in(path: Path) -> str:
    """A digest of the names, types and numbers in a safetensors file, all of which are read."""
    from safetensors.torch import load_file, save

    return hashlib.sha256(save(load_file(path))).hexdigest()


def _in_extract(path: Path, name: str) -> Any:
    from penult import io, load

    if name == "head.penult.safetensors":
        load(path / name)
        return tensors_in(path / name)
    if name == "rows.json":
        return json.loads((path / name).read_text())
    if name == "index.json":
        return list(io.read_index(path, "activations").shards.items())
    if name.startswith("activations-") and name.endswith(".safetensors"):
        return tensors_in(path / name), io.read(path / name, "activations").metadata
    raise KeyError(name)


def _in_fit(path: Path, name: str) -> Any:
    from penult import load

    if name != "":
        raise KeyError(name)
    load(path)
    return tensors_in(path)


def _in_save(path: Path, name: str) -> Any:
    import torch

    from penult import load

    if name != "":
        raise KeyError(name)
    head = load(path).head
    number = head.full_bias[0]
    if not (torch.equal(head.full_bias, number.expand(40)) and torch.equal(head.weight[:, -1], number.expand(40))):
        raise ValueError("the file holds parts of two pairs")
    return None  # which of them it is, is a matter of time


def _in_training(path: Path, name: str) -> Any:
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    import penult.generate

    file = path / name
    if name == "checkpoints/last.ckpt":
        torch.load(file, map_location="cpu", weights_only=True)
        return None  # of which epoch, is a matter of time
    if name in ("settings.json", "log.json"):
        facts = json.loads(file.read_text("utf-8"))
        return {key: value for key, value in facts.items() if key not in ("out", "head", "content")}
    if name == "index.html":
        if not file.read_text("utf-8").rstrip().endswith("</html>"):
            raise ValueError("the page has no end")
        return None  # it names its folder
    if name == "student.safetensors":
        load_file(file)
        return tensors_in(file)
    if name == "generator.safetensors":
        penult.generate.load(file)
        return tensors_in(file)
    if name.startswith("samples/epoch-"):
        Image.open(file).load()
        return hashlib.sha256(file.read_bytes()).hexdigest()
    raise KeyError(name)


def victims() -> dict[str, Victim]:
    """The commands, each of which takes seconds and writes all along if it can."""
    model = ["--model", "faultnets:net"]
    training = ["--val", "val.npz", "--batch-size", "50", "--epochs", "4"]
    return {
        "extract": Victim(
            lambda out: ["extract", "faultnets:slow", "digits", "--out", str(out), "--batch-size", "20",
                         "--shard-size", "0.001"],
            _in_extract,
            lambda out: (out / "index.json").exists() and (out / "head.penult.safetensors").exists(),
            (LOCK,),
        ),
        "fit": Victim(
            lambda out: ["fit", "acts", "--out", str(out), "--base", "bank"],
            _in_fit,
            lambda out: out.exists(),
        ),
        "save": Victim(
            lambda out: ["save.py", str(out), "100"],
            _in_save,
            lambda out: out.exists(),
        ),
        "distill": Victim(
            lambda out: ["distill", "pair.penult.safetensors", "--student", "faultnets:student", "--data", "data.npz",
                         "--out", str(out), *training],
            _in_training,
            lambda out: (out / "log.json").exists(),
        ),
        "generate": Victim(
            lambda out: ["generate", "pair.penult.safetensors", *model, "--images", "data.npz", "--out", str(out),
                         "--width", "16", "--latent", "4", *training],
            _in_training,
            lambda out: (out / "log.json").exists(),
        ),
    }  # fmt: skip


def files_of(out: Path) -> dict[str, Path]:
    """All files of a run, by their names under its path; those beside a pair belong to it."""
    root = out if out.suffix == "" else out.parent
    names = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if not path.is_dir()}
    return names if out.suffix == "" else {"" if path == out else name: path for name, path in names.items()}


def look(victim: Victim, out: Path) -> tuple[dict[str, Any], list[str]]:
    """What lies there, whole, and the names of temporary files; raises `Torn`."""
    from penult import io

    found, temporary = {}, []
    for name, path in files_of(out).items():
        if path in io.leftovers(path.parent) or name in victim.held:
            temporary.append(name)
            continue
        try:
            found[name] = victim.whole(out, name)
        except KeyError as error:
            raise Torn(f"{path} is no file of this command, and no temporary one") from error
        except Exception as error:
            raise Torn(f"{path} is torn: {type(error).__name__}: {error}") from error
    return found, temporary


class Killer:
    """Runs trials.

    Args:
        runner: Starts commands.
        seed: Of all moments.
        cold: Share of trials in which Python is started anew for each run.
    """

    def __init__(self, runner: Runner, seed: int, cold: float = 0.0) -> None:
        self._runner, self._seed, self._cold = runner, seed, cold
        self._victims = victims()
        self._expected: dict[str, dict[str, Any]] = {}
        self._durations: dict[tuple[str, bool], float] = {}
        runner.ready()

    def trial(self, command: str, number: int, kills: int) -> list[dict[str, Any]]:
        """Kill a command up to so many times, and let it complete; what happened at each kill. Raises `Torn`.

        There are fewer kills where one comes too late: then there is nothing left to kill.
        """
        chance = random.Random(f"{self._seed} {command} {number}")
        warm = chance.random() >= self._cold
        if (command, warm) not in self._durations:
            start = time.monotonic()
            self._expected[command] = self._complete(command, self._new(command, "undisturbed"), warm)
            self._durations[command, warm] = time.monotonic() - start
        victim, out, expected = self._victims[command], self._new(command, "trial"), self._expected[command]
        old: dict[str, Any] = {}
        if command == "fit":  # an older pair must outlive a kill
            shutil.copy(self._runner.place / "pair.penult.safetensors", out)
            old, _ = look(victim, out)
        happened: list[dict[str, Any]] = []
        while len(happened) < kills and (not happened or happened[-1]["when"] != "after"):
            before = _stamps(out)
            moment = chance.random() * self._durations[command, warm]
            start = time.monotonic()
            run = self._runner.start(victim.arguments(out), warm=warm)
            while (ended := run.poll()) is None and (left := start + moment - time.monotonic()) > 0:
                time.sleep(min(left, 0.02))
            run.signal(signal.SIGKILL)
            if ended is not None:  # it was faster than the run that was measured
                self._durations[command, warm] = min(self._durations[command, warm], time.monotonic() - start)
            code = run.wait()
            if code not in (0, -signal.SIGKILL):
                raise Torn(f"{command} ended with code {code} after {happened}: {run.said()}")
            found, temporary = look(victim, out)
            if command == "fit" and found not in (old, expected):
                raise Torn(f"{out} holds neither the pair of before nor the new one")
            for name in found if command != "fit" else ():
                if name not in expected or found[name] != expected[name]:
                    raise Torn(f"{out}: {name!r} is whole, but not what an undisturbed run writes")
            complete = victim.complete(out) and command not in ("fit", "save")
            when = "after" if ended is not None or complete else "within" if _stamps(out) != before else "before"
            half = sum(name not in victim.held for name in temporary)
            happened.append({"moment": round(moment, 3), "when": when, "half_written": half, "warm": warm})
        found = self._complete(command, out, warm)
        if found != expected:
            differing = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
            raise Torn(f"{command} gave other results than an undisturbed run after {happened}: {differing}")
        return happened

    def _new(self, command: str, kind: str) -> Path:
        folder = self._runner.place / f"{kind}-{command}"
        shutil.rmtree(folder, ignore_errors=True)
        if command not in ("fit", "save"):
            return folder
        folder.mkdir()
        return folder / "pair.penult.safetensors"

    def _complete(self, command: str, out: Path, warm: bool) -> dict[str, Any]:
        victim = self._victims[command]
        code, said = self._runner.run(victim.arguments(out), warm=warm)
        if code:
            raise Torn(f"{command} did not complete, code {code}: {said}")
        found, temporary = look(victim, out)
        if temporary:
            raise Torn(f"{command} left {temporary}")
        return found


def _stamps(out: Path) -> dict[str, tuple[int, int]]:
    return {name: (path.stat().st_mtime_ns, path.stat().st_ino) for name, path in files_of(out).items()}


def figures(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of kills, over all and of each command."""
    table = {}
    for command in ("all", *COMMANDS):
        own = [trial for trial in trials if command in ("all", trial["command"])]
        kills = [kill for trial in own for kill in trial["kills"]]
        when = Counter(kill["when"] for kill in kills)
        table[command] = {
            "trials": len(own),
            "kills": len(kills),
            **{name: when[name] for name in ("before", "within", "after")},
            "left a temporary file": sum(kill["half_written"] > 0 for kill in kills),
            "failures": sum(trial["failure"] is not None for trial in own),
        }
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1])
    parser.add_argument("--kills", type=int, default=100, help="how many kills in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures; continues from it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument(
        "--cold",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of trials that start Python anew, in place of forking a process that has imported everything "
        "(default: %(default)s)",
    )
    parser.add_argument("--command", choices=COMMANDS, action="append", help="only this one (repeatable)")
    args = parser.parse_args()
    import penult
    from penult import io

    facts = {"seed": args.seed, "cold": args.cold, "penult": penult.__version__, "cores": os.cpu_count()}
    trials = json.loads(args.out.read_text())["trials"] if args.out.exists() else []
    done = sum(len(trial["kills"]) or 1 for trial in trials)
    with tempfile.TemporaryDirectory() as folder, Runner(make_place(Path(folder) / "place"), Path(folder)) as runner:
        killer = Killer(runner, args.seed, args.cold)
        commands = args.command or COMMANDS
        while done < args.kills:
            number = len(trials)
            command = commands[number % len(commands)]
            asked = min(random.Random(f"{args.seed} {number}").randint(1, 3), args.kills - done)
            trial: dict[str, Any] = {"command": command, "kills": [], "failure": None}
            try:
                trial["kills"] = killer.trial(command, number, asked)
            except (Torn, TimeoutError) as error:
                trial["failure"] = str(error)
            trials.append(trial)
            done += len(trial["kills"]) or 1
            shown = ", ".join(f"{kill['when']} ({kill['moment']} s)" for kill in trial["kills"])
            print(f"{done:>4} of {args.kills}  {command:<9} {trial['failure'] or shown}", flush=True)
            io.write_bytes(
                args.out, json.dumps({**facts, "figures": figures(trials), "trials": trials}, indent=1).encode()
            )
    print(json.dumps(figures(trials), indent=1))
    sys.exit(any(trial["failure"] for trial in trials))


if __name__ == "__main__":
    main()
