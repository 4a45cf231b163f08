from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import penult
from penult.demo.networks import DigitsNet


@dataclass(frozen=True)
class Setting:
    """A trained classifier of digits, and digits it has not seen."""

    model: torch.nn.Module
    tap: penult.Tap
    head: penult.Head
    images: torch.Tensor
    labels: torch.Tensor
    test: penult.data.Images
    bank: penult.GenerativePair


@pytest.fixture(scope="session")
def setting():
    train, pool, test = penult.data.digits().split(0.4, 0.4, 0.2, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsNet(width=32)
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
        for _ in range(15):
            for rows in torch.randperm(len(train.labels)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(train.images[rows]), train.labels[rows]).backward()
                optimizer.step()
    model.eval().zero_grad()
    head = penult.find_head(model, train.images[:8])
    tap = penult.Tap(model, head)
    acts = penult.extract(tap, list(pool.images.split(200)), progress=False)
    bank = penult.GenerativePair(head, penult.Marginal.fit(head, acts, kind="bank"))
    return Setting(model, tap, head, pool.images, pool.labels, test, bank)
