"""Tables that commands write: CSV, parquet and NumPy arrays."""

from __future__ import annotations

import io as memory
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor

    from penult.data import _RowNames

    Column = Tensor | Sequence[str | None] | Sequence[int | None] | None

__all__ = ["check_table", "files_and_rows", "row_of", "shown_row", "write_table"]

_SUFFIXES = (".csv", ".parquet", ".npz")
# Spreadsheets compute a cell that begins with one of these characters.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def check_table(out: Path) -> None:
    """Check the path of a table, before anything is computed."""
    if out.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"--out is {out}; expected a table, name.csv or name.parquet, or arrays, name.npz")


def files_and_rows(names: _RowNames | None, count: int) -> tuple[list[str] | None, list[int | None]]:
    """Return the files of rows, None if they are unknown, and the numbers of the rows in files of several."""
    if names is None:
        return None, list(range(count))
    pairs = [names[i] for i in range(count)]
    return [_writable(file) for file, _ in pairs], [row for _, row in pairs]


def shown_row(file: str | None, row: int | None, index: int) -> str:
    """Return the name of a row for people."""
    if file is None:
        return f"index {index}"
    return file if row is None else f"{file} row {row}"


def row_of(columns: Mapping[str, Column], index: int) -> dict[str, Any]:
    """Return one row of a table."""
    return {
        name: None if column is None else column[index].item() if _is_tensor(column) else column[index]
        for name, column in columns.items()
    }


def _is_tensor(column: Any) -> TypeGuard[Tensor]:
    return hasattr(column, "dtype")


def write_table(out: Path, columns: Mapping[str, Column]) -> Path:
    """Write columns of one length to a .csv, .parquet or .npz file, atomically.

    Columns that are None are empty in a CSV file, and left out of the others. In a CSV file, text that begins with a
    character of a formula (``=``, ``+``, ``-``, ``@``, tab or line break) gets an apostrophe in front, so that no
    spreadsheet computes it; numbers stay numbers, with as many digits as give them back.

    Args:
        out: The file.
        columns: Tensors (N,), or lists of N texts or integers, where None is a missing value.

    Raises:
        ImportError: NumPy or pyarrow is missing.
        ValueError: The file has another suffix.
    """
    from penult import io

    check_table(out)
    write = {".csv": _csv, ".parquet": _parquet, ".npz": _npz}[out.suffix.lower()]
    return io.write_bytes(out, write(out, columns))


def _writable(text: str) -> str:
    """Return text that UTF-8 has; names of files may hold bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()


def _csv(_: Path, columns: Mapping[str, Column]) -> bytes:
    count = max((len(column) for column in columns.values() if column is not None), default=0)
    cells = [[""] * count if column is None else _cells(column) for column in columns.values()]
    lines = [tuple(columns), *zip(*cells, strict=True)]
    # The module csv leaves a carriage return without quotes where lines end with another character.
    return "".join(",".join(map(_quoted, line)) + "\n" for line in lines).encode()


def _quoted(cell: str) -> str:
    if not any(character in cell for character in ',"\r\n'):
        return cell
    return '"' + cell.replace('"', '""') + '"'


def _cells(column: Tensor | Sequence[Any]) -> list[str]:
    if not _is_tensor(column):
        return ["" if value is None else _inert(value) if isinstance(value, str) else str(value) for value in column]
    if not column.is_floating_point():
        return [str(value).lower() for value in column.tolist()]
    digits = 17 if column.dtype.itemsize > 4 else 9
    return [f"{value:.{digits}g}" for value in column.tolist()]


def _inert(text: str) -> str:
    text = _writable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _npz(out: Path, columns: Mapping[str, Column]) -> bytes:
    from penult._extras import extra

    numpy = extra("numpy", f"NumPy writes --out {out}")
    arrays = {}
    for name, column in columns.items():
        if _is_tensor(column):
            arrays[name] = column.numpy()
        elif column is not None and any(value is not None for value in column):
            texts = any(isinstance(value, str) for value in column)
            missing: Any = "" if texts else -1
            arrays[name] = numpy.array([missing if value is None else value for value in column])
    buffer = memory.BytesIO()
    # numpy.savez takes no array that is named file.
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                numpy.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def _parquet(out: Path, columns: Mapping[str, Column]) -> bytes:
    from penult._extras import extra

    pyarrow = extra("pyarrow", f"pyarrow writes --out {out}")
    parquet = extra("pyarrow.parquet", f"pyarrow writes --out {out}")
    arrays = {}
    for name, column in columns.items():
        if _is_tensor(column):
            arrays[name] = pyarrow.array(column.numpy())
        elif column is not None and any(value is not None for value in column):
            texts = any(isinstance(value, str) for value in column)
            values = [_writable(value) if isinstance(value, str) else value for value in column]
            arrays[name] = pyarrow.array(values, pyarrow.string() if texts else pyarrow.int64())
    buffer = memory.BytesIO()
    parquet.write_table(pyarrow.table(arrays), buffer)
    return buffer.getvalue()
