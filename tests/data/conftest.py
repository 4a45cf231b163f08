import io
import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def encode(image, kind="png", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def grey(value, height=4, width=6):
    return Image.new("L", (width, height), value)


def write_parquet(path, values, labels=None, names=None, rows=2, label="label", image="image", features=None):
    """Grey images of given values, or what stands for them, in the layout of Hugging Face."""
    cells = [{"bytes": encode(grey(each)), "path": None} if isinstance(each, int) else each for each in values]
    layout = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {image: pa.array(cells, pa.binary() if any(isinstance(each, bytes) for each in cells) else layout)}
    if labels is not None:
        columns[label] = labels if isinstance(labels, pa.Array) else pa.array(labels, pa.int64())
    table = pa.table(columns)
    if features is None and names is not None:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows)
    return path


@pytest.fixture
def make():
    """The functions above; this folder is no package."""
    return SimpleNamespace(encode=encode, grey=grey, parquet=write_parquet)
