"""Text of commands: consoles that cannot encode it, readers that leave, and numbers that JSON does not have."""

import io as memory
import json
import math
import os
import sys

import pytest
import torch

import penult
from penult.cli import main
from penult.cli._console import RichReporter, json_text, print_json, printing_never_fails, tell

NAMES = ("кошка", "Ω\N{HORIZONTAL ELLIPSIS}", "犬")


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """The command line of a short `penult score`, whose class names few consoles can encode, and its table."""
    head = penult.Head(torch.eye(3, 5))
    h = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    penult.Activations(h, head(h), class_names=NAMES).save(tmp_path / "acts")
    pair, out = penult.GenerativePair(head).save(tmp_path / "p.safetensors"), tmp_path / "scores.csv"
    monkeypatch.setattr(sys, "argv", ["penult", "score", str(pair), str(tmp_path / "acts"), "--out", str(out)])
    return out


@pytest.fixture
def left():
    """A stream whose reader has left. A test sets it as stdout itself, because pytest sets its own after fixtures."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


def run():
    """Run the command line and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "shift_jis", "utf-8"])
def test_text_that_a_console_cannot_encode_is_escaped(encoding, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, memory.TextIOWrapper(memory.BytesIO(), encoding=encoding))
    with printing_never_fails():
        RichReporter().line("—".join(NAMES))
        RichReporter().table(("class", "p"), [(name * 60, "½") for name in NAMES])
        tell(f"{NAMES} \ud800")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        for name in NAMES:
            assert name.encode(encoding, "backslashreplace").decode(encoding)[:6] in text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_command_ends_well_where_the_console_cannot_encode(encoding, scored, monkeypatch):
    stdout = memory.TextIOWrapper(memory.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run() == 0
    assert scored.exists()
    assert sys.stdout is stdout


def test_text_without_a_reader_is_dropped(left, monkeypatch):
    monkeypatch.setattr(sys, "stdout", left)
    with printing_never_fails():
        for count in (1, 10_000, 1):
            print("text " * count)
            RichReporter().line("line " * count)
        print_json({"a": 1})
    # The stream now leads to the null device, so that Python does not report the pipe at exit.
    print("more", file=left, flush=True)


def test_a_command_without_a_reader_writes_its_files(scored, left, monkeypatch):
    monkeypatch.setattr(sys, "stdout", left)
    assert run() == 0
    assert len(scored.read_text().splitlines()) == 41


def test_an_error_without_a_reader_keeps_its_code(scored, left, monkeypatch):
    monkeypatch.setattr(sys, "stderr", left)
    sys.argv[-1] = "scores.txt"
    assert run() == 2


def test_a_program_without_streams_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with printing_never_fails():
        RichReporter().line("line")
        tell("line")
        print_json({"a": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("put", [lambda x: x, lambda x: [0.5, x], lambda x: {"deep": ({"b": x},)}])
def test_json_has_null_for_numbers_that_are_not_finite(value, put, capsys):
    results = {"good": 0.25, "a": put(value), "text": "NaN"}
    assert json.loads(json_text(results), parse_constant=pytest.fail) == json.loads(
        json.dumps({"good": 0.25, "a": put(None), "text": "NaN"})
    )
    said = capsys.readouterr().err
    assert f"is {value}: not finite, so that JSON has null there" in said
    assert said.startswith("penult: warning: a")


def test_json_of_finite_numbers_is_as_it_was(capsys):
    results = {"a": [1, 0.1, 1e300, True, None], "b": {"c": "é"}}
    print_json(results)
    assert capsys.readouterr() == (json.dumps(results, indent=2) + "\n", "")


def test_a_score_that_overflows_is_null(scored, tmp_path, capsys):
    head, h = penult.Head(torch.eye(3, 5)), torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    pair = penult.GenerativePair(head, penult.Gaussian.fit(head, h))
    h[7] = 1e25
    pair.save(tmp_path / "p.safetensors")
    penult.Activations(h, head(h)).save(tmp_path / "acts", overwrite=True)
    sys.argv += ["--score", "density", "--json"]
    assert run() == 0
    results = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert results["strangest"][0] == {**results["strangest"][0], "index": 7, "score": None}
