"""Fuzzing that is guided by which lines of penult it reaches, with atheris, for hours if need be.

    python tests/fuzz/guided.py --runs 100000 --out fuzz-results/results.json

Each target of `targets` runs in a process of its own. An input is choices of edits for the strategies of the tests, or
a file itself. What a case opens, writes or runs outside of its folder fails it, and so do an error that is not lawful,
more than 20 seconds and more than 1 GiB. Inputs that fail are kept beside the results; --replay runs one of them again.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
SECONDS = 20  # that a case may take
LIMITS = [f"-timeout={SECONDS}", "-rss_limit_mb=4096"]
GROWTH = 1 << 30  # bytes by which one case may raise the peak of memory
WEIGHTS = {
    "pairs": 1, "any": 1, "generators": 1, "heads": 1, "folders": 1, "shards": 1, "stopped": 0.2, "indices": 1,
    "parquet": 1, "npz": 1, "images": 1, "trees": 0.5, "names": 0.5, "report": 0.01,
}  # fmt: skip
DEATHS = 5  # of a target's process, after which the target is left

EDITS, RAW = b"e", b"r"  # the first byte of an input says what the others are
NOISE = Random(0).randbytes(1 << 14)  # goes on where the choices of an input end

WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {f"os.{name}" for name in "chmod chown link mkdir remove rename rmdir symlink truncate utime".split()}
NEVER = (*"subprocess. socket. os.system os.exec os.fork os.posix_spawn os.spawn pickle.find_class".split(),)


class Outside(Exception):
    """A case touched what it must not."""


class Watch:
    """Fails what a case reads, changes or runs outside of its folder; Python itself may read what it is made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        own = {sys.prefix, sys.base_prefix, str(REPOSITORY), *sys.path} - {""}
        own |= {"/proc/self", "/proc/stat", "/dev/null", "/dev/urandom"}  # the second is psutil's, as it is imported
        self.readable = (self.folder, *map(os.path.realpath, own))
        self.on = False
        self.seen: list[Outside] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and not isinstance(args[0], int):
            allowed = (self.folder,) if args[2] & WRITE else self.readable
            wrong = not _below(os.path.realpath(os.fsdecode(args[0])), allowed)
        elif event in CHANGES or event.startswith("shutil."):
            paths = [each for each in args if isinstance(each, str | bytes | os.PathLike)]
            # a link is changed itself, not what it leads to; where it leads is no path that is touched
            wrong = not all(_below(_itself(each), (self.folder,)) for each in paths[event == "os.symlink" :])
        else:
            wrong = event.startswith(NEVER)
        if wrong:
            self.seen.append(Outside(f"{event}{args!r}"))
            raise self.seen[-1]


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == each or path.startswith(each + os.sep) for each in folders)


def _itself(path: Any) -> str:
    head, tail = os.path.split(os.path.abspath(os.fsdecode(path)))
    return os.path.join(os.path.realpath(head), tail)


def _audited(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which tells the watch what native code is about to open."""

    def call(path: Any, *args: Any, **options: Any) -> Any:
        sys.audit("open", os.fspath(path), "r", os.O_RDONLY)
        return function(path, *args, **options)

    return call


def _load(place: Path) -> dict[str, Any]:
    """The targets; whoever wants penult instrumented does so around this call."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    os.environ |= dict.fromkeys(("MPLCONFIGDIR", "HYPOTHESIS_STORAGE_DIRECTORY"), f"{place}/cases")
    sys.dont_write_bytecode = True
    import pyarrow.parquet
    import safetensors

    safetensors.safe_open = _audited(safetensors.safe_open)
    pyarrow.parquet.ParquetFile = _audited(pyarrow.parquet.ParquetFile)
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from fuzz import targets

    found = targets.all_of(place)
    assert set(found) == set(WEIGHTS), "a target without a weight, or a weight without a target"
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Hunt:
    """Cases of one target, with what came of them in a file that outlives the process."""

    def __init__(self, name: str, goal: int, place: Path, kept: Path) -> None:
        self.goal, self.kept, self.file = goal, kept / name, place / "found.json"
        self.kept.mkdir(parents=True, exist_ok=True)
        self.target = _load(place)[name]
        self.case = self.target.case()
        self.found: dict[str, Any] = {
            "cases": 0, "seconds": 0.0, "accepted": 0, "refused": {}, "slowest": 0.0, "grown_mib": 0.0, "defects": []
        }  # fmt: skip
        if self.file.exists():
            self.found = json.loads(self.file.read_text())
        warnings.simplefilter("ignore")
        os.chdir(place / "cases")  # a name without a folder, such as rmtree's, is then one within
        self.watch = Watch(place / "cases")
        self.peak, self.written = _peak(), time.monotonic()
        self.begun = self.written - self.found["seconds"]
        self.write()

    def one(self, data: bytes) -> None:
        """One case; its failure is kept, and the next one is tried."""
        from fuzz.targets import ended

        ended.clear()
        found, before, start = self.found, _peak(), time.perf_counter()
        try:
            faulthandler.dump_traceback_later(SECONDS - 1)  # libFuzzer, which ends it, does not say where it was
            self.watch.on = True
            if not self.case(data[1:] + (b"" if data[:1] == RAW else NOISE), data[:1] == RAW):
                return
            self.watch.on = False
            if _peak() - before > GROWTH:
                raise MemoryError(f"the peak of memory rose by {(_peak() - before) / 2**20:.0f} MiB")
            if self.watch.seen:
                raise self.watch.seen[0]
        except Exception as error:
            self.watch.on = False
            self.keep((*self.watch.seen, error)[0], data)  # what was done outside, whatever became of it
            ended.clear()
        finally:
            self.watch.on = False
            self.watch.seen.clear()
            faulthandler.cancel_dump_traceback_later()
        found["cases"] += 1
        if found["cases"] > 1:  # the first one imports much
            found["slowest"] = max(found["slowest"], time.perf_counter() - start)
        found["accepted"] += ended.pop("", 0)
        for name, count in ended.items():
            found["refused"][name] = found["refused"].get(name, 0) + count
        if found["cases"] >= self.goal or time.monotonic() - self.written > 1:
            self.write()
        if found["cases"] >= self.goal:
            os._exit(0)  # libFuzzer counts inputs, of which not each is a case

    def keep(self, error: Exception, data: bytes) -> None:
        """A defect is told once, by the class of its error and the last line of penult in it."""
        frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
        lines = [f"{Path(each.filename).name}:{each.lineno}" for each in frames if "/penult/" in each.filename]
        where = f"{type(error.__cause__ or error).__name__} at {(lines or ['?'])[-1]}"
        known = [each for each in self.found["defects"] if each["where"] == where]
        if known:
            known[0]["times"] += 1
            return
        path = self.kept / hashlib.sha256(data).hexdigest()[:16]
        path.write_bytes(data)
        text = "".join(traceback.format_exception(error))
        self.found["defects"].append({"where": where, "times": 1, "input": str(path), "traceback": text})
        self.write()

    def write(self) -> None:
        now = time.monotonic()
        grown = (_peak() - self.peak) / 2**20
        self.found |= {"seconds": now - self.begun, "grown_mib": max(self.found["grown_mib"], grown)}
        self.written = now
        _write(self.file, self.found)


def _write(path: Path, tree: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=1) + "\n")
    temporary.replace(path)


def child(name: str, goal: int, seed: int, place: Path, kept: Path) -> None:
    """Fuzz one target; never returns."""
    import atheris

    with atheris.instrument_imports(include=["penult"]):
        hunt = Hunt(name, goal, place, kept)
    target, random, corpus = hunt.target, Random(seed), place / "corpus"
    seeds = [RAW + each for each in target.seeds] + [EDITS + random.randbytes(200) for _ in range(50)]
    corpus.mkdir(exist_ok=True)
    for number, each in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(each)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        """Other bytes of the same kind; often within the header of a safetensors file, whose length is then set."""
        kind, rest = data[:1], data[1:]
        end = 8 + int.from_bytes(rest[:8], "little")
        if kind == RAW and rest[8:9] == b"{" and end <= len(rest) and number % 3:
            header = atheris.Mutate(rest[8:end], min(most, end + 32))
            return (kind + struct.pack("<Q", len(header)) + header + rest[end:])[:most]
        return kind + atheris.Mutate(rest, most - 1)

    longest = max(4096, 2 * max(map(len, seeds)))
    options = [*LIMITS, f"-seed={seed}", f"-max_len={longest}", f"-artifact_prefix={hunt.kept}/"]
    atheris.Setup([__file__, *options, str(corpus)], hunt.one, custom_mutator=mutate)
    atheris.Fuzz()


def hunted(name: str, goal: int, seed: int, kept: Path) -> dict[str, Any]:
    """Run a target in a process until it has its cases; where that dies, its input is kept and another goes on."""
    with tempfile.TemporaryDirectory(prefix="penult-fuzz-", dir=MEMORY) as folder:
        place, file = Path(folder), Path(folder, "found.json")
        deaths: list[dict[str, Any]] = []
        while True:
            for each in ("cases", "outside"):
                shutil.rmtree(place / each, ignore_errors=True)
            task = json.dumps([name, goal, seed + len(deaths), folder, str(kept)])
            with open(place / "log", "wb") as log:
                command = [sys.executable, __file__, "--child", task]
                code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
            told = re.sub(r"(?m)^(INFO: .*|.{300,})\n", "", (place / "log").read_text("utf-8", "replace"))
            if not file.exists():
                sys.exit(f"{name} did not begin:\n{told[-4000:]}")
            if code:
                written = (re.findall(r"Test unit written to (\S+)", told) or [None])[-1]
                where = f"the process ended with {code}"
                deaths.append({"where": where, "times": 1, "input": written, "traceback": told[-4000:]})
            if not code or len(deaths) == DEATHS:
                found = json.loads(file.read_text())
                reached = [int(each) for each in re.findall(r"cov: (\d+)", told)]
                return found | {"defects": found["defects"] + deaths, "edges": max(reached, default=0)}


def replay(name: str, path: Path) -> None:
    """Run one input as it was run, without the fuzzer; what it made is left to be looked at."""
    place = Path(tempfile.mkdtemp(prefix="penult-fuzz-", dir=MEMORY))
    data, hunt = path.read_bytes(), Hunt(name, 2, place, place / "kept")  # which goes to another folder
    hunt.one(data)
    hunt.write()
    print(*(each["traceback"] for each in hunt.found["defects"]), f"its files are in {place}/cases", sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=10_000, help="cases of each target, times its weight")
    parser.add_argument("--only", action="append", metavar="TARGET", help="a target; may be given several times")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("fuzz-results/results.json"))
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one kept input again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, goal, seed, place, kept = json.loads(options.child)
        child(name, goal, seed, Path(place), Path(kept))
    if options.replay:
        return replay(options.replay[0], Path(options.replay[1]))
    if importlib.util.find_spec("atheris") is None:
        sys.exit("guided.py needs atheris, for Linux and Python 3.11 to 3.13: pip install --group fuzz")
    if unknown := set(options.only or ()) - set(WEIGHTS):
        sys.exit(f"there is no target {', '.join(unknown)}; there are {', '.join(WEIGHTS)}")
    out = options.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in options.only or WEIGHTS:
        asked = {"runs": max(1, round(options.runs * WEIGHTS[name])), "seed": options.seed}
        if results.get(name, {}).get("asked") != asked:
            results[name] = {"asked": asked} | hunted(name, asked["runs"], options.seed, out.parent / "inputs")
            _write(out, results)
        found = results[name]
        print(f"{name}: {found['cases']} cases, {len(found['defects'])} defects", flush=True)
    sys.exit(any(each["defects"] for each in results.values()))


if __name__ == "__main__":
    main()
