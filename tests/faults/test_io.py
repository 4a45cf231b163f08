"""Files of tensors as penult.io writes them, and what it clears away."""

import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from penult import io
from penult.io._file import _NAMES


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"text": 'κ\n"{}\x01'}])
def test_files_of_tensors_are_those_of_safetensors_byte_for_byte(tmp_path, metadata):
    g = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.rand(3, 5, generator=g).mul(9).to(dtype) for dtype in _NAMES}
    tensors |= {"empty": torch.empty(0, 7), "scalar": torch.tensor(2.5), 'a "name"': torch.ones(2)}
    io.save_file(tensors, tmp_path / "a", metadata)
    assert (tmp_path / "a").read_bytes() == safetensors.torch.save(tensors, metadata)
    views = {"t": torch.rand(4, 6, generator=g).t(), "negative": torch.ones(2, dtype=torch.complex64).conj().imag}
    io.save_file(views, tmp_path / "b")
    read = safetensors.torch.load_file(tmp_path / "b")
    assert all(torch.equal(read[name], views[name]) for name in views)
    with pytest.raises(TypeError, match="complex128"):
        io.save_file({"z": torch.ones(2, dtype=torch.complex128)}, tmp_path / "c")


@pytest.mark.skipif(sys.platform == "win32", reason="there it cannot be asked whether a process lives")
def test_temporary_files_of_processes_that_are_gone_are_cleared_away(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".{name}.{pid}-01234567.tmp" for name in ("a", "b") for pid in (gone.pid, os.getpid())]
    for name in (*names, "a.tmp", ".tmpAbC123"):
        (tmp_path / name).touch()
    (tmp_path / "none").mkdir()
    io.write_bytes(tmp_path / "a", b"1")
    assert not (tmp_path / names[0]).exists()
    assert all((tmp_path / name).exists() for name in (*names[1:], "a.tmp", ".tmpAbC123"))
    io.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a", names[1], names[3], "a.tmp", ".tmpAbC123", "none"]
    )
    io.sweep(tmp_path / "missing")
