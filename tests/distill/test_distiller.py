"""The LightningModule: any student, plain checkpoints, plain exports."""

import copy
import functools
import json
import logging
import pickle
import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import penult
from penult.data import digits
from penult.demo.networks import DigitsNet
from penult.distill import ActivationLoss, Distiller, SoftTargetLoss, TargetDataset, targets
from tiers import thin

WIDTH = 16


@contextmanager
def quiet():
    """Lightning's advice about workers and tensor boards, which is no matter of these tests."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(unheard)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", category=UserWarning, message=".*does not have many workers")
        try:
            yield
        finally:
            log.removeFilter(unheard)


def unheard(record):
    return record.levelno > logging.INFO


def trainer(**options):
    options = {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )


def fit(distiller, *loaders, ckpt_path=None, **options):
    with quiet():
        trainer(**options).fit(distiller, *loaders, ckpt_path=ckpt_path)
    return distiller


@pytest.fixture(scope="module")
def pair():
    g = torch.Generator().manual_seed(0)
    return penult.GenerativePair(penult.Head(torch.randn(10, 12, generator=g), 0.3 * torch.randn(10, generator=g)))


@pytest.fixture(scope="module")
def images():
    return digits()


def loader_of(pair, images, kind, count=256):
    some = TensorDataset(images.images[:count], images.labels[:count])
    data = TargetDataset(some, targets(pair, images.labels[:count], kind))
    return DataLoader(data, batch_size=64, sampler=DistributedSampler(data, 1, 0, seed=0))  # by seed and epoch


def validation_of(images):
    return DataLoader(TensorDataset(images.images[-200:], images.labels[-200:]), batch_size=64)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def loss_of(pair, kind):
    return SoftTargetLoss() if kind == "soft" else seeded(lambda: ActivationLoss(pair, WIDTH))


class Returning(nn.Module):
    """A classifier whose output is a mapping."""

    def __init__(self):
        super().__init__()
        self.net = DigitsNet(width=WIDTH)

    def forward(self, x):
        return {"logits": self.net(x), "loss": None}


def extractor():
    return nn.Sequential(DigitsNet(width=WIDTH).features)


def headless_last():
    """A feature extractor that ends in a linear layer, which is no head."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, WIDTH))


def biasless():
    net = DigitsNet(width=WIDTH)
    net.fc = nn.Linear(WIDTH, 10, bias=False)
    return net


def dropped():
    net = DigitsNet(width=WIDTH)
    net.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, 10))
    return net


def normed():
    """A norm layer before the head, which is not folded here."""
    net = DigitsNet(width=WIDTH)
    norm = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, WIDTH))
    net.fc = nn.Sequential(norm, nn.Linear(WIDTH, 10))
    return net


def other_classes():
    return DigitsNet(classes=7, width=WIDTH)


def twice_named():
    net = DigitsNet(width=WIDTH)
    net.same = net.fc
    return net


def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


STUDENTS = [
    ("soft", functools.partial(DigitsNet, width=WIDTH), None),
    ("soft", biasless, None),
    ("soft", dropped, None),
    ("activation", functools.partial(DigitsNet, width=WIDTH), "fc"),
    ("activation", biasless, "fc"),
    ("activation", dropped, "fc.1"),
    ("activation", normed, "fc.1"),
    ("activation", other_classes, "fc"),
    ("activation", twice_named, "fc"),
    ("activation", bare, "4"),
    ("activation", extractor, None),
    ("activation", headless_last, None),
    ("activation", Returning, "net.fc"),
]


@pytest.mark.parametrize(("kind", "make", "path"), STUDENTS)
def test_any_student_is_trained_and_exported(pair, images, kind, make, path):
    student = seeded(make)
    before = copy.deepcopy(student.state_dict())
    distiller = Distiller(student, loss_of(pair, kind))
    fit(distiller, loader_of(pair, images, kind), validation_of(images), max_epochs=2)
    assert (distiller.certificate and distiller.certificate.path) == path
    assert [each["epoch"] for each in distiller.history] == [1, 2]
    assert distiller.history[1]["train_loss"] < distiller.history[0]["train_loss"]
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    if path is not None:  # the student's own head takes no part
        assert not any(name.startswith((path + ".", "same.")) for name in changed)
    assert changed

    x = images.images[-300:]
    plain = distiller.export()
    distiller.eval()
    with torch.no_grad():
        out = plain(x)
        out = out["logits"] if make is Returning else out
        assert out.shape == (300, 10)
        assert float((out - distiller(x)).abs().max()) < 1e-5
        accuracy = float((distiller(x[-200:]).argmax(-1) == images.labels[-200:]).double().mean())
    assert distiller.history[-1]["val_accuracy"] == pytest.approx(accuracy, abs=0.006)
    assert not plain.training
    assert all(module is not ours for module in plain.modules() for ours in distiller.modules())
    assert all(not type(module).__module__.startswith(("lightning", "penult.distill")) for module in plain.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    again = pickle.loads(pickle.dumps(plain))
    with torch.no_grad():
        assert torch.equal(again(x)["logits"] if make is Returning else again(x), out)
    addresses = {p.data_ptr() for p in distiller.state_dict().values()}
    assert not addresses & {p.data_ptr() for p in plain.parameters()}


def test_locating_leaves_everything_as_it_was(pair, images):
    student = seeded(dropped)
    student.features[1].eval()  # a norm layer that its owner froze
    flags = [module.training for module in student.modules()]
    values = copy.deepcopy(student.state_dict())
    distiller = Distiller(student, loss_of(pair, "activation"))
    state = torch.get_rng_state()
    distiller.locate(images.images[:8])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in student.modules()] == flags
    assert all(torch.equal(value, values[name]) for name, value in student.state_dict().items())
    assert distiller._ddp_params_and_buffers_to_ignore == ["student.fc.1.weight", "student.fc.1.bias"]
    assert all(parameter.requires_grad for parameter in student.parameters())


class Stop(Exception):
    """Of a machine that is switched off."""


class Off(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise Stop


@pytest.mark.parametrize("own", [False, True], ids=["one cycle", "own optimiser"])
@pytest.mark.parametrize(
    ("kind", "make"),
    thin([("soft", bare), ("activation", bare), ("activation", extractor)], keep=[("activation", extractor)]),
)
def test_a_run_that_was_killed_ends_as_if_nothing_had_happened(pair, images, tmp_path, kind, make, own):
    options = {}
    if own:
        options = {
            "optimizer": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            "scheduler": functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        }

    def fresh():
        return Distiller(seeded(make), loss_of(pair, kind), **options)

    def loaders():
        return loader_of(pair, images, kind), validation_of(images)

    def saving():
        return ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True, enable_version_counter=False)

    whole = fit(fresh(), *loaders(), max_epochs=4)
    with pytest.raises(Stop):
        fit(fresh(), *loaders(), max_epochs=4, enable_checkpointing=True, callbacks=[saving(), Off(2)])
    path = tmp_path / "last.ckpt"
    held = torch.load(path, weights_only=True)  # plain tensors and numbers
    assert len(held["penult"]["history"]) == 2
    json.dumps(held["penult"])
    resumed = fit(fresh(), *loaders(), ckpt_path=path, max_epochs=4, enable_checkpointing=True, callbacks=[saving()])
    assert resumed.history == whole.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    with quiet():
        loaded = Distiller.load_from_checkpoint(path, student=seeded(make), loss=loss_of(pair, kind), weights_only=True)
    x = images.images[:20]
    with torch.no_grad():
        assert torch.equal(loaded.export()(x), whole.export()(x))


def test_a_one_cycle_schedule_is_not_prolonged(pair, images, tmp_path):
    saving = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    loader = loader_of(pair, images, "soft")
    fit(Distiller(seeded(bare), SoftTargetLoss()), loader, enable_checkpointing=True, callbacks=[saving])
    with pytest.raises(ValueError, match="is of a training of 4 steps, and this one has 8"):
        fit(Distiller(seeded(bare), SoftTargetLoss()), loader, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    with pytest.raises(ValueError, match="needs the length of the training"):
        fit(Distiller(seeded(bare), SoftTargetLoss()), loader, max_epochs=-1)


def test_the_default_optimiser_is_that_of_the_evidence(pair, images):
    distiller = Distiller(seeded(bare), SoftTargetLoss(), rate=1e-3)
    with quiet():
        host = trainer(max_epochs=3)
        host.fit(distiller, loader_of(pair, images, "soft"))
    (optimizer,), (config,) = host.optimizers, host.lr_scheduler_configs
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 1e-2
    assert config.interval == "step"
    assert config.scheduler.total_steps == 12
    assert max(group["max_lr"] for group in optimizer.param_groups) == 2e-3
    host = trainer(max_epochs=2)
    distiller = Distiller(bare(), SoftTargetLoss(), optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    with quiet():
        host.fit(distiller, loader_of(pair, images, "soft"))
    assert type(host.optimizers[0]) is torch.optim.SGD
    assert not host.lr_scheduler_configs
    plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
    fit(Distiller(bare(), SoftTargetLoss(), scheduler=plateau), loader_of(pair, images, "soft"), max_epochs=2)


def test_any_loss_of_logits_labels_and_targets(pair, images):
    class Labels(nn.Module):
        def forward(self, logits, labels, target):
            return nn.functional.cross_entropy(logits, labels)

    distiller = fit(Distiller(seeded(bare), Labels()), loader_of(pair, images, "soft"), max_epochs=3)
    assert distiller.history[2]["train_loss"] < distiller.history[0]["train_loss"]
    assert distiller.predict_step((images.images[:4], 0)).shape == (4, 10)
    assert distiller.predict_step(images.images[:4]).shape == (4, 10)


class Functional(nn.Module):
    """A head that is no layer."""

    def __init__(self, transposed=False):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.Tanh())
        self.weight = nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, x):
        return self.features(x) @ self.weight.T


def test_a_head_that_nothing_can_stand_in_for(pair, images):
    distiller = fit(Distiller(seeded(Functional), loss_of(pair, "activation")), loader_of(pair, images, "activation"))
    assert distiller.certificate.path == ""
    with pytest.raises(ValueError, match="Train a feature extractor"):
        distiller.export()
    conv = nn.Sequential(nn.Conv2d(1, WIDTH, 8), nn.ReLU(), nn.Conv2d(WIDTH, 10, 1), nn.Flatten())
    distiller = Distiller(conv, loss_of(pair, "activation"))
    distiller.locate(images.images[:8])
    with pytest.raises(ValueError, match="conv at '2' in a Conv2d"):
        distiller.export()


def test_bad_input(pair, images):
    loss = loss_of(pair, "activation")
    with pytest.raises(TypeError, match="student is a function"):
        Distiller(bare, loss)
    with pytest.raises(TypeError, match="loss is a int; expected"):
        Distiller(bare(), 3)
    with pytest.raises(TypeError, match="optimizer is a AdamW; expected a function that makes one"):
        Distiller(bare(), loss, optimizer=torch.optim.AdamW(bare().parameters()))
    with pytest.raises(ValueError, match="rate"):
        Distiller(bare(), loss, rate=0)
    with pytest.raises(RuntimeError, match=r"distiller.locate\(images\) first"):
        Distiller(bare(), loss).export()
    with pytest.raises(
        ValueError, match=r"in_features = 16, but the student's output is \(8, 10\), and its head reads 64"
    ):
        Distiller(DigitsNet(), loss).locate(images.images[:8])
    with pytest.raises(ValueError, match=r"in_features = 16, but the student's output is \(8, 5\)"):
        Distiller(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Sigmoid()), loss).locate(images.images[:8])
    plain = DataLoader(TensorDataset(images.images, images.labels), batch_size=64)
    with pytest.raises(ValueError, match=r"a list of 2; expected \(image, label, target\)"):
        fit(Distiller(bare(), SoftTargetLoss()), plain)
    with pytest.raises(ValueError, match="The student must have the teacher's classes"):
        fit(Distiller(DigitsNet(classes=7), SoftTargetLoss()), loader_of(pair, images, "soft"))
    with pytest.raises(ValueError, match=r"a validation batch is a tensor of shape \(64, 1, 8, 8\)"):
        fit(Distiller(bare(), SoftTargetLoss()), loader_of(pair, images, "soft"), DataLoader(images.images, 64))


@pytest.mark.slow
def test_a_missing_extra_names_the_remedy():
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['lightning.pytorch'] = None\n"
        "import penult.distill; print('torch alone', 'torchmetrics' in sys.modules)\n"
        "penult.distill.Distiller"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "torch alone False\n"
    assert 'pip install "penult[train]"' in done.stderr.splitlines()[-1]


def test_history_has_an_accuracy_only_where_it_was_validated():
    pair = penult.GenerativePair(penult.Head(4 * torch.eye(3)))
    labels = torch.arange(3).repeat(8)
    images = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = TargetDataset(list(zip(images, labels.tolist(), strict=True)), targets(pair, labels))
    distiller = Distiller(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), SoftTargetLoss())
    fit(distiller, DataLoader(data, 8), DataLoader(data, 8), max_epochs=4, check_val_every_n_epoch=2)
    assert ["val_accuracy" in each for each in distiller.history] == [False, True, False, True]


def test_a_head_of_another_precision(images):
    """A head of float64 teaches a student of float32, which stays one."""
    pair = penult.GenerativePair(penult.Head(torch.eye(10, 12, dtype=torch.float64)))
    taught = targets(pair, images.labels[:64], "activation")
    data = TargetDataset(list(zip(images.images[:64], images.labels[:64].tolist(), strict=True)), taught)
    distiller = fit(Distiller(DigitsNet(width=WIDTH), ActivationLoss(pair, WIDTH)), DataLoader(data, 32))
    plain = distiller.export()
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    distiller.eval()
    assert torch.allclose(plain(images.images[:5]), distiller(images.images[:5]).float(), atol=1e-5)


def test_labels_of_other_integer_types():
    labels = torch.tensor([0, 1], dtype=torch.int32)
    assert SoftTargetLoss()(torch.zeros(2, 3), labels, torch.full((2, 3), 1 / 3)).isfinite()
