"""Files: tensors in safetensors with JSON metadata, written atomically and read without running any code.

One file holds tensors, a kind and metadata (`write`, `read`). Data that is too large for one file is stored as a folder
of such files, its shards, with a JSON index that is written last (`write_index`, `read_index`).
"""

from penult.io._atomic import aside, leftovers, sweep, write_bytes
from penult.io._file import (
    SCHEMA_VERSION,
    File,
    FileFormatError,
    Identity,
    as_json,
    check_unchanged,
    decode,
    encode,
    identity,
    read,
    save_file,
    write,
)
from penult.io._index import INDEX_NAME, Index, read_index, write_index
from penult.io._paths import contents, other_kind, user_path

__all__ = [
    "INDEX_NAME",
    "SCHEMA_VERSION",
    "File",
    "FileFormatError",
    "Index",
    "aside",
    "leftovers",
    "read",
    "read_index",
    "save_file",
    "sweep",
    "write",
    "write_bytes",
    "write_index",
]

# Lent to other rooms of the package; not public.
_contents, _other_kind, _user_path = contents, other_kind, user_path
_as_json, _check_unchanged, _identity = as_json, check_unchanged, identity
_decode, _encode = decode, encode
_Identity = Identity
