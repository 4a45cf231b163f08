"""One process of several: ``python worker.py FOLDER RANK COUNT``. What it finds, it writes to the folder."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import penult
from penult.distributions import PrincipalMixture

ROWS = 83
BATCH = 8
BASES = {
    "elliptic": lambda head, acts, **more: penult.Sphere.fit(head, acts, shape="elliptic", **more),
    "span": lambda head, acts, **more: penult.Sphere.fit(head, acts, shape="centered", ambient=False, **more),
    "trimmed": lambda head, acts, **more: penult.Sphere.fit(head, acts, shape="elliptic", trim=0.2, **more),
    "gaussian": penult.Gaussian.fit,
    "mixture": lambda head, acts, **more: penult.Marginal.fit(head, acts, components=4, dims=5, **more),
    "class": lambda head, acts, **more: penult.Marginal.fit(head, acts, kind="class", dims=5, **more),
    "bank": lambda head, acts, **more: penult.Marginal.fit(head, acts, kind="bank", **more),
    "flow": lambda head, acts, **more: penult.Marginal.fit(head, acts, kind="flow", **more),
}


class Counting(Dataset):
    """Remembers which items were loaded."""

    def __init__(self, data):
        self.data, self.loaded = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.loaded.append(index)
        return self.data[index]


def material():
    """A network and data, the same in every process."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    x = torch.randn(ROWS, 6, generator=g)
    return penult.Tap(model, penult.find_head(model, x[:16])), TensorDataset(x, torch.arange(ROWS) % 4)


def loader(data, **options):
    return DataLoader(data, batch_size=BATCH, **options)


def refusal(work):
    try:
        work()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def work(folder, group):
    tap, data = material()
    counting = Counting(data)
    facts = {}
    acts = penult.extract(tap, loader(counting), folder / "acts", shard_size=300, group=group)
    facts["loaded"] = sorted(set(counting.loaded))
    batches = [data[:30], data[30:31]]  # fewer than three processes
    penult.extract(tap, batches, folder / "few", group=group)
    penult.extract(tap, loader(data), folder / "acts", shard_size=300, group=group)  # is complete
    facts["shuffled"] = refusal(lambda: penult.extract(tap, loader(data, shuffle=True), folder / "no", group=group))
    facts["endless"] = refusal(lambda: penult.extract(tap, (b for b in batches), folder / "no", group=group))
    facts["memory"] = refusal(lambda: penult.extract(tap, batches, group=group))
    for name, fit in BASES.items():
        base = fit(tap.head, acts, group=group)
        facts[name] = {key: value.tolist() for key, value in base.state_dict().items() if value.is_floating_point()}
    own = acts.activations[ROWS * distributed.get_rank() // 7 :: 7]  # rows of its own, more or fewer
    facts["own"] = PrincipalMixture.fit(own, 2, 3, group=group).means.tolist()
    bad = acts.activations.clone()
    bad[-1] = float("nan")  # which the last process alone reads
    facts["bad"] = refusal(lambda: penult.Gaussian.fit(tap.head, bad, group=group))
    return facts


if __name__ == "__main__":
    place, rank, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=count)
    found = work(place, distributed.group.WORLD)
    (place / f"facts-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
