"""Files that are almost right."""

from __future__ import annotations

import copy
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tiers import in_default_tier

EXAMPLES = int(os.environ.get("PENULT_FUZZ_EXAMPLES", "0"))

_DEEP = "@deep@"  # becomes brackets, which no encoder of JSON would nest as deep
TEXTS = (
    "",
    "\0",
    "\x1b[31mred",
    "\ud800",
    "\u202egpj.exe",
    "../x",
    "/etc/passwd",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "**a " * 50,
    "$\\frac{$",
    "x" * 5000,
)
ODD = st.sampled_from(
    [
        *TEXTS, None, True, False, 0, 1, -1, 2, 255, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400,
        -(10**30), 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), [], {}, [[]], [0, 0],
        [2**62, 2**62, 0], [2**64 - 1, 0], {"a": {}}, _DEEP, "F32", "I64", "BOOL", "F8_E4M3", "C64", "Sphere",
        "Gaussian", "Marginal", "Bank", "ActivationGAN", "pair", "activations",
    ]
).map(copy.deepcopy)  # fmt: skip


def cases(count: int) -> Callable[[Any], Any]:
    """Run that many examples, and a tenth of them in the default tier; they are the same in each run.

    With PENULT_FUZZ_EXAMPLES set, run as many as it says, other ones each time.
    """
    share = settings(
        max_examples=EXAMPLES or (count // 10 if in_default_tier() else count),
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.examples(share(test))


@contextmanager
def lawful(path: Path | str, *more: type[BaseException]) -> Iterator[None]:
    """Lets pass what is well, and errors of these classes that name the file; any other error fails the test."""
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which is what a user does, who so comes to what lies behind a warning
            yield
    except (ValueError, FileNotFoundError, *more) as error:
        if isinstance(error, UnicodeError) or name not in str(error):
            raise AssertionError(f"{type(error).__name__} does not name {path}: {error}") from error


def text_of(tree: Any) -> str:
    """JSON, with what Python's encoder would refuse."""
    return json.dumps(tree).replace(f'"{_DEEP}"', "[" * 20_000)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """Bytes of which some are wrong, missing, doubled or more than there were."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "flip", "set", "drop", "add", "word", "zero"])):
            case "cut":
                del data[at:]
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(data):
                data[at] = draw(st.sampled_from([0, 1, 34, 44, 91, 92, 123, 125, 127, 128, 255]))
            case "drop":
                del data[at : at + draw(st.integers(1, 40))]
            case "add":
                data[at:at] = draw(st.binary(min_size=1, max_size=20))
            case "word":
                data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])))
            case "zero":
                data[at : at + 16] = bytes(16)
    return bytes(data)


@st.composite
def edited(draw: Any, tree: Any, edits: int = 2) -> Any:
    """JSON of which some entries are others, missing, or more than there were."""
    tree = {"root": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, edits))):
        here: Any = tree
        key: Any = "root"
        while isinstance(here[key], dict | list) and len(here[key]) and draw(st.integers(0, 7)):
            here = here[key]
            key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        match draw(st.sampled_from(["replace", "replace", "drop", "add", "nudge"])):
            case "drop" if here is not tree:
                del here[key]
            case "add" if isinstance(here[key], dict):
                here[key][draw(st.sampled_from([*TEXTS, "x", "weight", "schema"]))] = draw(ODD)
            case "add" if isinstance(here[key], list):
                here[key].append(draw(ODD))
            case "nudge" if isinstance(here[key], int | float):
                here[key] = here[key] * draw(st.sampled_from([-1, 2, 1000])) + draw(st.integers(-2, 2))
            case _:
                here[key] = draw(ODD)
    return tree["root"]


def parts_of(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8:end]), whole[end:]


def joined(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header, right or not, and data."""
    text = header if isinstance(header, bytes) else text_of(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def hostile(draw: Any, whole: bytes) -> bytes:
    """A file of penult's, whose bytes, header, record or numbers are wrong."""
    kind = draw(st.sampled_from(["bytes", "header", "record", "record", "record", "numbers", "tensors"]))
    if kind == "bytes":
        return draw(damaged(whole))
    header, data = parts_of(whole)
    names = sorted(set(header) - {"__metadata__"})
    if kind == "header":
        header = draw(edited(header))
    elif kind == "record":
        record = draw(edited(json.loads(header["__metadata__"]["penult"])))
        header["__metadata__"]["penult"] = text_of(record)
    elif kind == "numbers":
        entry = header[draw(st.sampled_from(names))]
        start, stop = entry["data_offsets"]
        pattern = {"F32": "<f", "F64": "<d", "I64": "<q"}.get(entry["dtype"], "<B")
        values = [0, 1, 127] if pattern == "<B" else [0, -1, 3, 2**31]
        values += [float("nan"), float("inf"), 1e38, -1e-38] if pattern in ("<f", "<d") else []
        word = struct.pack(pattern, draw(st.sampled_from(values)))
        count = (stop - start) // len(word)
        numbers = bytearray(data)
        if draw(st.booleans()):
            numbers[start:stop] = word * count
        elif count:
            at = start + len(word) * draw(st.integers(0, count - 1))
            numbers[at : at + len(word)] = word
        data = bytes(numbers)
    else:
        name = draw(st.sampled_from(names))
        entry = header[name]
        match draw(st.sampled_from(["rename", "swap", "shape", "dtype", "empty", "scalar"])):
            case "rename":
                header[draw(st.sampled_from([*TEXTS[:9], "head.", "base.x", "pair.head.weight"]))] = header.pop(name)
            case "swap":
                other = draw(st.sampled_from(names))
                header[name], header[other] = header[other], header[name]
            case "shape":
                size = 1
                for side in entry["shape"]:
                    size *= side
                entry["shape"] = draw(
                    st.sampled_from([[size], [1, size], [size, 1], [1] * 70 + [size], entry["shape"][::-1]])
                )
            case "dtype":
                same = {4: ["F32", "I32", "U32"], 8: ["F64", "I64", "U64", "C64"], 1: ["BOOL", "U8", "I8", "F8_E4M3"]}
                width = {"F32": 4, "F64": 8, "I64": 8}.get(entry["dtype"], 1)
                entry["dtype"] = draw(st.sampled_from(same[width]))
            case "empty" | "scalar" as shape:
                header, data = _without(header, data, name)
                at = len(data)
                data += bytes(0 if shape == "empty" else 4)
                sides = draw(st.sampled_from([[0], [0, 3], [3, 0], [0, 2**62], [0, 2**64 - 1], [2**63, 0]]))
                header[name] = {
                    "dtype": "F32", "shape": sides if shape == "empty" else [], "data_offsets": [at, len(data)]
                }  # fmt: skip
    return joined(header, data)


def _without(header: dict[str, Any], data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    start, stop = header[name]["data_offsets"]
    for other, entry in header.items():
        if other != "__metadata__" and other != name and entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [at - (stop - start) for at in entry["data_offsets"]]
    del header[name]
    return header, data[:start] + data[stop:]
