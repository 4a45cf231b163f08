"""What tests of all kinds of generators share."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

SHAPE = (1, 8, 8)  # of digits
QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # remarks about Lightning's own options
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:DeprecationWarning"),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(kind, setting, pair=None, seed=0, **options):
    """A generator of that class with first weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(pair or setting.bank, options.pop("tap", setting.tap), SHAPE, **options)


def fit(generator, *tensors, epochs, seed=0, **options):
    """Train on images, alone or with something behind them."""
    data = tensors[0] if len(tensors) == 1 else TensorDataset(*tensors)
    loader = DataLoader(data, 64, shuffle=True, generator=seeded(seed))
    plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainer = lightning.Trainer(max_epochs=epochs, enable_model_summary=False, accelerator="cpu", **plain)
        trainer.fit(generator, loader)
    return generator


def labels(each=20):
    return torch.arange(10).repeat_interleave(each)


def right(setting, images, y):
    """The share of images that the classifier puts into their class."""
    with torch.no_grad():
        return float((setting.model(images).argmax(-1) == y).double().mean())
