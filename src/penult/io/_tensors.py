"""The bytes of a safetensors file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["save_file"]

_NAMES = {  # in the order of safetensors
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def save_file(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, straight to its path and without a copy of them.

    ``safetensors.torch.save_file`` writes to a file of another name beside the path first, which a writer that is
    killed leaves behind under a name that says nothing; and it calls a full disk a SafetensorError.

    Args:
        tensors: Tensors by name, of any device.
        path: Where to write, over what is there; see :func:`aside` for a file that is whole or not there.
        metadata: Text by name.

    Raises:
        OSError: The file cannot be written.
        TypeError: A dtype has no name in such files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"x": torch.ones(2)}, f"{folder}/x.safetensors")
        ...     safetensors.torch.load_file(f"{folder}/x.safetensors")
        {'x': tensor([1., 1.])}
    """
    for name, value in tensors.items():
        if value.dtype not in _NAMES:
            raise TypeError(f"tensors[{name!r}] is of {value.dtype}, which is not written to files")
    if sys.byteorder == "big":  # the file's is the other one
        held = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with open(path, "wb") as file:
            file.write(safetensors.torch.save(held, None if metadata is None else dict(metadata)))
        return
    # As safetensors does: wide numbers first, so that each lies at a multiple of its own size.
    names = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        value = tensors[name]
        start, end = end, end + value.numel() * value.dtype.itemsize
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            plain = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            file.write(plain.view(-1).view(torch.uint8).numpy().data)
