import copy
import json
import pickle
import subprocess
import sys
from functools import partial

import lightning
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

import generators
import penult
from generators import QUIET, SHAPE, labels, right, seeded
from penult.generate import ActivationGAN, ActivationVAE, load
from penult.generate._conditions import draw
from penult.generate._networks import Bounded, ProjectionDiscriminator, adversaries
from tiers import in_default_tier

pytestmark = QUIET

make = partial(generators.make, ActivationGAN)
fit = partial(generators.fit, epochs=1)


def step(gan, *batch, index=1, seed=0):
    """The loss of one batch, without a trainer, and what it would log."""
    gan.configure_model()
    figures = {}
    gan.log = lambda name, value, **_: figures.update({name: value})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = gan.training_step(batch, index)
    del gan.log
    return loss, figures


@pytest.fixture(scope="module")
def seen(setting):
    """What the classifier makes of the images, row by row."""
    return setting.bank.base.distribution.activations


@pytest.fixture(scope="module")
def trained(setting, seen):
    return fit(make(setting), setting.images, seen, epochs=10 if in_default_tier() else 20)


@pytest.fixture(scope="module")
def short(setting, seen):
    """After two batches."""
    return fit(make(setting), setting.images[:128], seen[:128])


def close(a, b):
    """Tensors of a file lie otherwise in memory, so that products of them are rounded otherwise."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class Layers(nn.Module):
    """A network of one's own, with a buffer that training moves; it keeps what it was told of."""

    def __init__(self, latent, features=32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent + features, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 64), nn.Unflatten(1, SHAPE)
        )
        self.told = []

    def forward(self, z, condition):
        self.told.append(condition.detach())
        return self.layers(torch.cat([z, condition], 1))


class Scores(nn.Module):
    """A discriminator of one's own, which keeps what it was told of."""

    def __init__(self, pixels=64, features=32):
        super().__init__()
        self.image, self.condition = nn.Linear(pixels, 16), nn.Linear(features, 16)
        self.told = []

    def forward(self, images, condition):
        self.told.append(condition.detach())
        return (self.image(images.flatten(1)).tanh() * self.condition(condition)).sum(1)


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_digits_of_every_class_without_labels(setting, trained):
    y = labels(40)
    images = trained.generate(y, generator=seeded())
    assert right(setting, images, y) > 0.88
    for label in range(10):
        assert right(setting, images[y == label], y[y == label]) > 0.6
        varied = images[y == label].std(0).mean() / setting.images[setting.labels == label].std(0).mean()
        assert 0.5 < varied < 1.5  # it has not collapsed
    assert [each["epoch"] for each in trained.history] == list(range(1, 21))
    assert all(set(each) == {"epoch", "loss", "discriminator_loss", "cosine"} for each in trained.history)
    assert trained.history[-1]["cosine"] > 0.8 > trained.history[0]["cosine"]


def test_hinge_loss_bounds_its_layers(trained):
    discriminator = copy.deepcopy(trained.discriminator).eval()
    bounded = [m for m in discriminator.modules() if isinstance(m, Bounded)]
    assert len(bounded) == 4
    for layer in bounded:
        assert 0.9 < torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.1  # power iterations are near


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_bounded_layers_are_those_of_torch(kind):
    layer = kind(*((5, 3) if kind is nn.Linear else (2, 4, 3, 2, 1))).double()
    ours, theirs = Bounded(copy.deepcopy(layer)), spectral_norm(copy.deepcopy(layer))
    x = torch.randn((6, 5) if isinstance(layer, nn.Linear) else (6, 2, 8, 8), dtype=torch.float64)
    for module in (ours, theirs):  # until all iterations have come to the same
        for _ in range(500):
            module(x)
        module(x).square().sum().backward()
    torch.testing.assert_close(torch.linalg.matrix_norm(ours.weight.flatten(1), 2), torch.tensor(1.0).double())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.layer.weight.grad, theirs.parametrizations.weight.original.grad)
    torch.testing.assert_close(ours.layer.bias.grad, theirs.bias.grad)
    held = [each.clone() for each in ours.buffers()]
    assert torch.equal(ours.eval()(x), ours(x))
    assert all(torch.equal(a, b) for a, b in zip(held, ours.buffers(), strict=True))


@pytest.mark.long
def test_the_other_loss_learns_digits_too(setting, seen):
    gan = fit(make(setting, loss="non-saturating"), setting.images, seen, epochs=20)
    y = labels(40)
    assert right(setting, gan.generate(y, generator=seeded()), y) > 0.8
    assert not any(isinstance(layer, Bounded) for layer in gan.discriminator.modules())


def test_labels_are_not_looked_at_when_conditions_are_activations(setting):
    images, y = setting.images[:128], setting.labels[:128]
    one, other = (fit(make(setting), images, each) for each in (y, y.flip(0)))
    alone = fit(make(setting), images)
    for a, b, c in zip(*(each.moving.parameters() for each in (one, other, alone)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_activations_in_the_batches_stand_for_the_classifier(setting, seen):
    images, h = setting.images[:128], seen[:128]
    shown = []
    handle = setting.model.register_forward_pre_hook(lambda module, args: shown.append(len(args[0])))
    try:
        one = fit(make(setting, consistency=0.0), images)
        assert len(shown) == 2
        other = fit(make(setting, consistency=0.0, tap=None), images, h)
        assert len(shown) == 2
    finally:
        handle.remove()
    assert set(other.history[0]) == {"epoch", "loss", "discriminator_loss"}
    for a, b in zip(one.moving.parameters(), other.moving.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)  # of other batches' rounding
    for wrong in (h[:, :5], h[:, 0], h.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"activations of a batch have shape \(64.*expected \(64, 32\)"):
            fit(make(setting), images, wrong)
    with pytest.raises(ValueError, match=r"there is no classifier for the activations.*penult\.Tap"):
        fit(make(setting, consistency=0.0, tap=None), images)
    with pytest.raises(ValueError, match="there is no classifier for feature consistency"):
        fit(make(setting, tap=None), images, h)


def test_equal_seeds_give_equal_steps(setting, seen):
    batch = setting.images[:64], seen[:64]
    for options in ({}, {"loss": "non-saturating"}, {"drawn": 0.5}):
        one, again, other = (fit(make(setting, **options), *batch, seed=seed) for seed in (3, 3, 4))
        for name, value in one.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        assert one.history == again.history != other.history
        assert not torch.equal(next(one.moving.parameters()), next(other.moving.parameters()))


@pytest.mark.parametrize("loss", ["non-saturating", "hinge"])
def test_losses_and_gradients_by_hand(setting, seen, loss):
    images, h = setting.images[:32], seen[:32]
    gan = make(setting, loss=loss, consistency=0.7)
    gan.discriminator.eval()  # no step of the spectral norm
    total, figures = step(gan, images, h)
    total.backward()
    made, scored = list(gan.moving.parameters()), list(gan.discriminator.parameters())

    torch.manual_seed(0)
    c = (h - gan.standardize.mean) / gan.standardize.scale
    fake = gan.moving(torch.randn(32, 32), c).sigmoid()
    real, fooled = gan.discriminator(images, c), gan.discriminator(fake, c)
    back = (setting.tap(fake)[0] - gan.standardize.mean) / gan.standardize.scale
    cosine = F.cosine_similarity(back, c).mean()
    if loss == "hinge":
        tells = (1 - real).clamp_min(0).mean() + (1 + fooled).clamp_min(0).mean()
        fools = -fooled.mean()
    else:
        tells = -(real.sigmoid().log().mean() + (1 - fooled.sigmoid()).log().mean())
        fools = -fooled.sigmoid().log().mean()
    fools = fools + 0.7 * (1 - cosine)
    torch.testing.assert_close(figures["loss"], fools)
    torch.testing.assert_close(figures["discriminator_loss"], tells)
    torch.testing.assert_close(figures["cosine"], cosine)
    torch.testing.assert_close(total, fools + tells)
    # each moves by its own loss alone
    for parameters, own in ((made, fools), (scored, tells)):
        for parameter, slope in zip(parameters, torch.autograd.grad(own, parameters, retain_graph=True), strict=True):
            torch.testing.assert_close(parameter.grad, slope, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in gan.generator.parameters())
    assert all(parameter.grad is None for parameter in setting.model.parameters())
    assert all(parameter.requires_grad for parameter in scored)


@pytest.mark.parametrize("loss", ["non-saturating", "hinge"])
def test_the_penalty_is_the_squared_gradient_of_every_fourth_batch(setting, seen, loss):
    images, h = setting.images[:8], seen[:8]
    gan = make(setting, loss=loss, penalty=0.3, consistency=0.0)
    gan.discriminator.eval()
    totals = [step(gan, images, h, index=index)[0] for index in range(9)]
    for index in (2, 3, 5, 6, 7):
        assert torch.equal(totals[index], totals[1])
    assert torch.equal(totals[0], totals[4])
    assert torch.equal(totals[0], totals[8])
    squares = []
    for x, c in zip(images, gan.standardize(h), strict=True):
        x = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(gan.discriminator(x[None], c[None]).sum(), x, create_graph=True)
        squares.append(slope.square().sum())
    penalty = 4 * 0.3 * torch.stack(squares).mean()
    assert penalty > 1e-4
    torch.testing.assert_close(totals[0] - totals[1], penalty, rtol=1e-3, atol=1e-6)
    parameters = list(gan.discriminator.parameters())
    slopes = [
        torch.autograd.grad(each, parameters, retain_graph=True, materialize_grads=True)
        for each in (*totals[:2], penalty)
    ]
    for both, plain, alone in zip(*slopes, strict=True):
        torch.testing.assert_close(both - plain, alone, rtol=1e-3, atol=1e-5)
    assert max(float(alone.norm()) for alone in slopes[2]) > 1e-3
    assert torch.equal(step(gan, images, h, index=0)[1]["discriminator_loss"],
                       step(gan, images, h, index=1)[1]["discriminator_loss"])  # fmt: skip


def test_penalties_when_left_out(setting):
    defaults = [make(setting, **options) for options in ({}, {"loss": "non-saturating"}, {"condition": "label"})]
    assert [gan.loss for gan in defaults] == ["hinge", "non-saturating", "non-saturating"]
    assert [gan.penalty for gan in defaults] == [0.0, 0.25, 0.25]
    assert make(setting, penalty=0.0).penalty == 0
    gan = make(setting, loss="non-saturating", penalty=0.0)
    batch = setting.images[:8], setting.labels[:8]
    assert torch.equal(step(gan, *batch, index=0)[0], step(gan, *batch, index=1)[0])


def test_what_generates_is_the_running_mean(setting, seen):
    network = Layers(32)
    first = [each.clone() for each in network.parameters()]
    moved = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            moved.append([each.detach().clone() for each in module.moving.parameters()])

    gan = make(setting, generator=network, decay=0.4)
    assert gan.moving is None
    fit(gan, setting.images[:320], seen[:320], epochs=2, callbacks=[Watch()])
    assert gan.generator is network
    assert len(moved) == 10
    means = first
    for steps, new in enumerate(moved, 1):  # of which six are as many as the decay remembers
        share = 1 - min(0.4, steps / (9 + steps))
        means = [torch.lerp(mean, each, share) for mean, each in zip(means, new, strict=True)]
    for mean, parameter in zip(means, network.parameters(), strict=True):
        assert torch.equal(mean, parameter)
    assert not torch.equal(means[0], moved[-1][0])
    for (name, held), followed in zip(network.named_buffers(), gan.moving.buffers(), strict=True):
        assert torch.equal(held, followed), name
    assert network.layers[1].num_batches_tracked == 10
    z, h = torch.randn(4, 32, generator=seeded()), seen[:4]
    network.eval()
    torch.testing.assert_close(gan.decode(z, h), network(z, gan.standardize(h)).sigmoid())


def test_the_classifier_is_left_as_it_was(setting):
    before = copy.deepcopy(setting.model.state_dict())
    for parameter in setting.model.parameters():
        parameter.requires_grad_(True)
    setting.model.features[1].train()
    try:
        fit(make(setting), setting.images[:128])
        assert setting.model.features[1].training
        assert not setting.model.training
    finally:
        setting.model.eval()
    for name, value in setting.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in setting.model.parameters())


def test_gradients_of_consistency_reach_the_images_alone(setting, seen):
    gan = make(setting)
    images = setting.images[:4].clone().requires_grad_(True)
    gan.agreement(images, seen[:4]).backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in gan.parameters())
    assert float(gan.agreement(images, seen[:4]).detach()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 16), (0.004, 0), (1.0, 64)])
def test_a_share_of_conditions_is_drawn_from_the_law(setting, seen, share, count):
    away = torch.linalg.svd(setting.head.weight.detach()).Vh[-1]  # what the head does not see
    far = penult.Marginal.fit(setting.head, seen + 1000 * away, kind="bank")
    scores = Scores()
    gan = make(
        setting, penult.GenerativePair(setting.head, far), generator=Layers(32), discriminator=scores, drawn=share,
        activations=seen,
    )  # fmt: skip
    step(gan, setting.images[:64], seen[:64])
    told = gan.moving.told[-1]
    plain = gan.standardize(seen[:64])
    assert torch.equal((told * gan.standardize.scale) @ away > 500, torch.arange(64) < count)
    torch.testing.assert_close(told[count:], plain[count:])
    assert len(scores.told) == 3
    assert torch.equal(scores.told[0], plain)  # the real pairs
    for asked in scores.told[1:]:
        assert torch.equal(asked, told)


def test_training_on_the_law_of_labels(setting):
    scores = Scores()
    gan = make(setting, condition="label", generator=Layers(32), discriminator=scores)
    images, y = setting.images[:64], setting.labels[:64]
    step(gan, images, y)
    rows = setting.head.weight.detach() - setting.head.weight.detach().mean(0)
    rows = rows / rows.square().mean().sqrt()
    assert len(scores.told) == 3
    for told in scores.told:  # the discriminator sees the class
        torch.testing.assert_close(told, rows[y])
    torch.manual_seed(0)
    torch.testing.assert_close(gan.moving.told[-1], gan.standardize(draw(setting.bank, y)))  # the generator draws of it
    for wrong in (y[:, None], y[None]):
        with pytest.raises(ValueError, match=r"labels has shape \(.*expected \(64,\)"):
            step(gan, images, wrong)
    with pytest.raises(ValueError, match="no labels; expected \\(images, labels\\)"):
        step(gan, images)
    quick = fit(make(setting, condition="label", tap=None, consistency=0.0), images, y)
    assert set(quick.history[0]) == {"epoch", "loss", "discriminator_loss"}
    assert quick.generate(y[:3], generator=seeded()).shape == (3, *SHAPE)


def test_validation_is_kept_in_the_history(setting, seen):
    def run(gan, *batch):
        trainer = lightning.Trainer(
            max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", check_val_every_n_epoch=2,
        )  # fmt: skip
        loader = DataLoader(TensorDataset(*batch), 64)
        with torch.random.fork_rng(devices=[]):
            trainer.fit(gan, loader, loader)
        return ["val_cosine" in each for each in gan.history]

    assert run(make(setting), setting.images[:64]) == [False, True]
    assert run(make(setting, tap=None, consistency=0.0), setting.images[:64], seen[:64]) == [False, False]


def test_own_networks_and_optimiser(setting, seen, tmp_path):
    network, scores = Layers(5), Scores()
    gan = make(
        setting, latent=5, generator=network, discriminator=scores,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01), scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
    )  # fmt: skip
    fit(gan, setting.images[:128], seen[:128], epochs=2)
    assert gan.generator is network
    assert gan.discriminator is scores
    assert gan.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    moved = {id(each) for group in gan.trainer.optimizers[0].param_groups for each in group["params"]}
    assert moved == {id(each) for part in (gan.moving, scores) for each in part.parameters()}
    path = gan.save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"networks of your own.*generator=\.\.\."):
        load(path)
    again = load(path, generator=Layers(5))
    close(again.generate(3, generator=seeded()), gan.without_data().generate(3, generator=seeded()))
    with pytest.raises(penult.io.FileFormatError, match="cannot be rebuilt"):
        load(path, generator=nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"\['encoder'\] are not networks of a ActivationGAN"):
        load(path, encoder=nn.Linear(2, 2))


def test_one_network_of_ones_own_beside_a_default(setting, seen):
    assert isinstance(make(setting, generator=Layers(32)).discriminator, ProjectionDiscriminator)
    gan = make(setting, discriminator=Scores())
    assert gan.config()["own_networks"] is False
    empty = nn.Sequential()  # which is false
    assert make(setting, generator=empty).generator is empty
    fit(gan, setting.images[:64], seen[:64])


def test_outputs_of_own_networks_are_checked(setting, seen):
    class Wrong(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.shape = shape

        def forward(self, first, condition):
            return first.new_zeros(len(first), *self.shape)

    batch = setting.images[:64], seen[:64]
    with pytest.raises(ValueError, match=r"generator has shape \(64, 3, 8, 8\); expected \(64, 1, 8, 8\), logits"):
        fit(make(setting, generator=Wrong(3, 8, 8)), *batch)
    with pytest.raises(ValueError, match=r"discriminator has shape \(64, 1\); expected \(64,\), one score"):
        fit(make(setting, discriminator=Wrong(1)), *batch)


def test_networks_of_ones_own_for_shapes_that_have_no_default(setting, tmp_path):
    shape = (3, 30, 30)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32 + 32, 2700)

        def forward(self, z, condition):
            return self.layer(torch.cat([z, condition], 1)).view(-1, *shape)

    with pytest.raises(ValueError, match="cannot be halved"):
        ActivationGAN(setting.bank, setting.tap, shape, generator=Flat())
    gan = ActivationGAN(setting.bank, setting.tap, shape, generator=Flat(), discriminator=Scores(2700))
    path = gan.save(tmp_path / "own.safetensors", store_activations=True)
    again = load(path, generator=Flat())
    close(again.generate(3, generator=seeded()), gan.generate(3, generator=seeded()))
    batch = torch.rand(4, *shape), torch.randn(4, 32)
    with pytest.raises(ValueError, match=r"discriminator was one of your own.*load\(path, discriminator=\.\.\.\)"):
        step(load(path, generator=Flat()), *batch)
    whole = load(path, generator=Flat(), discriminator=Scores(2700))
    whole.consistency = 0.0
    step(whole, *batch)[0].backward()


@pytest.mark.parametrize("loss", ["non-saturating", "hinge"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_default_networks_fit_common_images(shape, loss):
    head = penult.Head(torch.randn(4, 7, generator=seeded()))
    pair = penult.GenerativePair(head, penult.Sphere(1.0))
    gan = ActivationGAN(pair, None, shape, loss=loss, consistency=0.0, latent=4, width=4)
    loss, _ = step(gan, torch.rand(3, *shape), torch.randn(3, 7), index=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in (*gan.moving.parameters(), *gan.discriminator.parameters()))
    assert gan.generate(torch.tensor([[1, 2]]), generator=seeded()).shape == (1, 2, *shape)


def test_default_widths():
    grey, colour = (adversaries(shape, 7, 4)[0].grid for shape in ((1, 32, 32), (3, 32, 32)))
    assert (grey, colour) == ((64, 4, 4), (128, 4, 4))
    assert adversaries((3, 32, 32), 7, 4, width=8)[0].grid == (32, 4, 4)


@pytest.mark.parametrize("options", [{}, {"loss": "non-saturating"}, {"condition": "label"}])
def test_training_in_mixed_precision_leaves_the_classifier_as_it_was(setting, options):
    before = {name: value.clone() for name, value in setting.model.state_dict().items()}
    gan = fit(make(setting, **options), setting.images[:256], setting.labels[:256], precision="bf16-mixed")
    for part in (gan.generator, gan.moving, gan.discriminator):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert gan.generate(3, generator=seeded()).dtype == torch.float32
    for name, value in setting.model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_laws_draw_in_full_precision_while_training_is_mixed(setting, seen):
    y = setting.labels[:256]
    fine, coarse = Layers(32), Layers(32)
    for network, options in ((fine, {}), (coarse, {"precision": "bf16-mixed"})):
        gan = make(setting, condition="label", generator=network, discriminator=Scores(), consistency=0.0)
        fit(gan, setting.images[:256], y, **options)
        network.told = gan.moving.told
    torch.testing.assert_close(fine.told[0], coarse.told[0].float())


# --- stopping and going on ------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_gives_the_same_generator(setting, seen, tmp_path):
    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 0

    class Order(torch.utils.data.Sampler):  # a function of the epoch
        def __init__(self, gan):
            self.gan = gan

        def __iter__(self):
            epoch = self.gan.trainer.current_epoch
            torch.manual_seed(epoch)
            return iter(torch.randperm(320, generator=seeded(epoch)).tolist())

        def __len__(self):
            return 320

    def run(gan, callbacks=(), **options):
        with torch.random.fork_rng(devices=[]):
            trainer = lightning.Trainer(
                max_epochs=3, min_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path,
            )  # fmt: skip
            data = TensorDataset(setting.images[:320], seen[:320])
            trainer.fit(gan, DataLoader(data, 64, sampler=Order(gan)), **options)
            if callbacks:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
        return gan

    options = {"loss": "hinge", "penalty": 0.1, "drawn": 0.5}
    whole = run(make(setting, **options))
    assert [each["epoch"] for each in run(make(setting, **options), [Stop()]).history] == [1]
    again = run(make(setting, seed=9, **options), ckpt_path=tmp_path / "last.ckpt")
    assert again.history == whole.history
    assert [each["epoch"] for each in again.history] == [1, 2, 3]
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoints_hold_what_is_trained_and_no_more(setting, short, tmp_path):
    short.trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    parts = {"generator", "moving", "discriminator", "standardize"}
    assert {name.split(".")[0] for name in held["state_dict"]} == parts
    assert not any(len(value) == len(setting.images) for value in held["state_dict"].values() if value.dim())
    again = ActivationGAN.load_from_checkpoint(
        tmp_path / "a.ckpt", pair=setting.bank, tap=setting.tap, image_shape=SHAPE, weights_only=True
    )
    assert torch.equal(again.generate(labels(1), generator=seeded()), short.generate(labels(1), generator=seeded()))
    assert again.history == short.history
    for name, value in short.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_training_goes_on(setting, seen, short, tmp_path):
    gan = copy.deepcopy(short)
    moving = gan.moving
    fit(gan, setting.images[:128], seen[:128])
    assert gan.moving is moving
    assert len(gan.history) == 2
    changed = [torch.equal(a, b) for a, b in zip(gan.moving.parameters(), short.moving.parameters(), strict=True)]
    assert not any(changed)

    loaded = load(short.save(tmp_path / "digits.safetensors"), tap=setting.tap)
    assert (loaded.moving, loaded.history) == (None, [])
    before = [each.clone() for each in loaded.generator.parameters()]
    fit(loaded, setting.images[:128], seen[:128])
    for old, new, moved in zip(before, loaded.generator.parameters(), loaded.moving.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert (new - old).norm() < 2 * (moved - old).norm()
    assert len(loaded.history) == 1


def test_networks_that_two_laws_share_can_be_trained_with_either(setting, seen):
    gan = make(setting)
    other = gan.with_pair(setting.bank)
    fit(other, setting.images[:64], seen[:64])
    before = [each.clone() for each in gan.generator.parameters()]
    fit(gan, setting.images[:64], seen[:64])
    assert not any(torch.equal(a, b) for a, b in zip(before, gan.moving.parameters(), strict=True))


def test_steps_need_a_training(setting):
    with pytest.raises(RuntimeError, match=r"not set up for training.*fit\(gan, loader\)"):
        make(setting).training_step(setting.images[:4], 0)


# --- images ---------------------------------------------------------------------------------------------------


def test_images_have_the_shape_of_the_labels_and_lie_in_the_unit_interval(short):
    for y in (torch.arange(6).view(2, 3), torch.tensor([4]), 4, torch.empty(0, dtype=torch.long)):
        images = short.generate(y, generator=seeded())
        assert images.shape == (*torch.as_tensor(y).shape, *SHAPE)
        assert not images.numel() or (images.min() >= 0 and images.max() <= 1)
    with pytest.raises(ValueError, match=r"labels\[1\] is 10, out of range"):
        short.generate(torch.tensor([3, 10]))
    with pytest.raises(TypeError, match="integer"):
        short.generate(torch.tensor([3.0]))


def test_seeds_decide_and_the_global_state_is_left_alone(trained, setting, tmp_path):
    state = torch.random.get_rng_state()
    first = trained.generate(labels(2), confident=0.9, reject=True, generator=seeded(3))
    again = trained.generate(labels(2), confident=0.9, reject=True, generator=seeded(3))
    trained.interpolate(0, 1, generator=seeded())
    trained.edit(setting.test.images[:2], 3, generator=seeded())
    load(trained.save(tmp_path / "digits.safetensors"))
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, trained.generate(labels(2), confident=0.9, reject=True, generator=seeded(4)))


def test_modes_are_left_as_they_were(short):
    gan = copy.deepcopy(short)
    for mode in (True, False):
        gan.train(mode)
        gan.generate(3)
        assert gan.training is gan.generator.training is gan.discriminator.training is mode
        assert not gan.tap.model.training


def test_codes_vary_images(trained, setting):
    """The code says what the activation does not."""
    h = setting.bank.base.distribution.activations[:1].expand(20, -1)
    images = trained.decode(trained.random_codes(20, seeded()), h)
    assert images.std(0).mean() > 1e-3


def test_rejection_interpolation_and_editing(trained, setting):
    y = labels(20)
    assert right(setting, trained.generate(y, reject=True, generator=seeded()), y) == 1
    y0, y1 = torch.full((40,), 0), torch.full((40,), 1)
    ways = trained.interpolate(y0, y1, steps=5, confident=0.9, generator=seeded())
    assert ways.shape == (40, 5, *SHAPE)
    assert right(setting, ways[:, 0], y0) > 0.85
    assert right(setting, ways[:, -1], y1) > 0.85
    images, goal = setting.test.images[:60], torch.arange(10).repeat(6)
    edited = trained.edit(images, goal, torch.tensor([0.0, 0.5, 1.0]), confident=0.9, generator=seeded())
    assert edited.shape == (60, 3, *SHAPE)
    assert right(setting, edited[:, 2], goal) > 0.85
    assert right(setting, edited[:, 0], setting.test.labels[:60]) > 0.8  # of the same activation, with another code


def test_another_law_for_the_same_networks(trained, setting, seen):
    mixture = penult.GenerativePair(setting.head, penult.Marginal.fit(setting.head, seen, components=16, dims=16))
    other = trained.with_pair(mixture)
    y = labels()
    assert isinstance(other, ActivationGAN)
    assert other.generator is trained.generator
    assert right(setting, other.generate(y, generator=seeded()), y) > 0.75
    assert trained.pair is setting.bank
    assert (other.stored_activations, trained.stored_activations) == (0, len(setting.images))


def test_casts_reach_what_is_trained_alone(setting, seen, short):
    for cast in (lambda gan: gan.double(), lambda gan: gan.to(torch.float64)):
        gan = cast(copy.deepcopy(short))
        for part in (gan.generator, gan.moving, gan.discriminator):
            assert {p.dtype for p in part.parameters()} == {torch.float64}
        assert {p.dtype for p in gan.tap.model.parameters()} == {torch.float32}
        assert {b.dtype for b in gan.pair.buffers()} == {b.dtype for b in setting.bank.buffers()}
        assert gan.generate(labels(1), generator=seeded()).dtype == torch.float64
        fit(gan, setting.images[:64], seen[:64])


def test_copies_and_pickles(short, setting):
    expected = short.generate(labels(1), generator=seeded())
    for other in (copy.deepcopy(short), pickle.loads(pickle.dumps(short))):
        assert torch.equal(other.generate(labels(1), generator=seeded()), expected)
        assert other.history == short.history
        assert other.generator is not short.generator
        for (name, a), b in zip(short.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        fit(other, setting.images[:64])
    assert torch.equal(short.generate(labels(1), generator=seeded()), expected)


# --- files ----------------------------------------------------------------------------------------------------


def test_a_saved_generator_needs_neither_classifier_nor_data(trained, setting, seen, tmp_path):
    path = trained.save(tmp_path / "digits.safetensors")
    apart = trained.without_data()
    assert apart.generator is trained.generator
    y = labels()
    drawn = apart.generate(y, 0.9, generator=seeded())
    for again in (load(path), ActivationGAN.load(path)):
        assert not again.training
        assert again.tap is None
        assert again.stored_activations == 0
        close(again.generate(y, 0.9, generator=seeded()), drawn)
        with pytest.raises(ValueError, match=r"there is no classifier for the activations.*penult\.Tap"):
            again.edit(setting.test.images[:2], 3)
        with pytest.raises(ValueError, match="there is no classifier to reject"):
            again.generate(3, reject=True)
    assert right(setting, drawn, y) > 0.85
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(file.metadata()["penult"])
    assert {name.split(".")[0] for name in tensors} == {"generator", "standardize", "pair"}
    assert (facts["kind"], facts["stored_activations"]) == ("generator", 0)
    for name, tensor in tensors.items():
        assert len(seen) not in tensor.shape, name
        if tensor.dim() == 2 and tensor.shape[1] == seen.shape[1]:
            assert torch.cdist(tensor.float(), seen).min() > 1e-3, name
    with pytest.raises(penult.io.FileFormatError, match="holds a ActivationGAN, not a ActivationVAE"):
        ActivationVAE.load(path)


def test_a_loaded_generator_sees_images_with_a_classifier(trained, setting, tmp_path):
    again = load(trained.save(tmp_path / "digits.safetensors"), tap=setting.tap)
    y = labels()
    assert right(setting, again.generate(y, reject=True, generator=seeded()), y) == 1
    apart = trained.without_data()
    images = setting.test.images[:5]
    close(again.edit(images, 3, generator=seeded()), apart.edit(images, 3, generator=seeded()))
    close(again.interpolate(0, 1, generator=seeded()), apart.interpolate(0, 1, generator=seeded()))


def test_a_bank_is_stored_when_asked_for(trained, seen, tmp_path):
    path = trained.save(tmp_path / "digits.safetensors", store_activations=True)
    again = load(path)
    assert again.stored_activations == len(seen)
    assert torch.equal(again.pair.base.distribution.activations, seen)
    assert torch.equal(again.generate(labels(), generator=seeded()), trained.generate(labels(), generator=seeded()))
    assert penult.io.read(path, kind="generator").metadata["stored_activations"] == len(seen)


def test_a_bank_too_small_for_a_mixture_is_named(setting, seen, tmp_path):
    few = penult.GenerativePair(setting.head, penult.Marginal.fit(setting.head, seen[:39], kind="bank"))
    gan = make(setting, few)
    with pytest.raises(ValueError, match=r"holds 39 real activations, too few.*store_activations=True"):
        gan.save(tmp_path / "digits.safetensors")
    assert not list(tmp_path.iterdir())
    assert load(gan.save(tmp_path / "digits.safetensors", store_activations=True)).stored_activations == 39
    enough = penult.GenerativePair(setting.head, penult.Marginal.fit(setting.head, seen[:40], kind="bank"))
    assert load(make(setting, enough).save(tmp_path / "more.safetensors")).stored_activations == 0


def test_a_rectified_bank_without_negative_numbers_is_written(setting, seen, tmp_path):
    law = penult.distributions.Bank(seen, rectified=True)
    gan = make(setting, penult.GenerativePair(setting.head, penult.Marginal(setting.head, law)))
    assert load(gan.save(tmp_path / "digits.safetensors")).stored_activations == 0


@pytest.mark.long
def test_a_saved_generator_draws_in_a_fresh_process(trained, tmp_path):
    path = trained.save(tmp_path / "digits.safetensors")
    code = (
        "import sys, torch, penult; gan = penult.generate.load(sys.argv[1]); "
        "print(float(gan.generate(torch.arange(10), generator=torch.Generator().manual_seed(0)).double().sum()))"
    )
    outcome = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    drawn = trained.without_data().generate(torch.arange(10), generator=seeded())
    assert float(outcome.stdout.split()[-1]) == pytest.approx(float(drawn.double().sum()), rel=1e-6)


def test_settings_come_back(setting, tmp_path):
    options = {
        "loss": "hinge",
        "penalty": 0.1,
        "consistency": 2.0,
        "drawn": 0.25,
        "decay": 0.9,
        "latent": 5,
        "width": 8,
    }
    gan = make(setting, **options)
    again = load(gan.save(tmp_path / "digits.safetensors", store_activations=True))
    assert again.config() == gan.config()
    assert {name: getattr(again, name) for name in options} == options
    state = gan.discriminator.state_dict()
    assert {k: v.shape for k, v in again.discriminator.state_dict().items()} == {k: v.shape for k, v in state.items()}


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_shape": (28, 28)}, ValueError, "image_shape is"),
        ({"image_shape": (3, 30, 30)}, ValueError, "cannot be halved"),
        *(
            ({"image_shape": shape}, ValueError, rf"^images of {shape[1]}×{shape[2]} pixels are too small for conv")
            for shape in ((1, 5, 5), (1, 7, 9), (3, 4, 16), (2, 9, 6))
        ),
        ({"condition": "labels"}, ValueError, "condition is 'labels'; expected"),
        ({"loss": "wasserstein"}, ValueError, "loss is 'wasserstein'; expected 'non-saturating' or 'hinge'"),
        ({"latent": 0}, ValueError, "latent"),
        ({"width": 0}, ValueError, "width"),
        ({"rate": 0.0}, ValueError, "rate"),
        ({"penalty": -1.0}, ValueError, "penalty"),
        ({"penalty": float("inf")}, ValueError, "penalty"),
        ({"consistency": -1.0}, ValueError, "consistency"),
        ({"consistency": float("nan")}, ValueError, "consistency"),
        ({"drawn": 1.1}, ValueError, "drawn is 1.1; expected a number from 0 to 1"),
        ({"drawn": float("nan")}, ValueError, "drawn is nan"),
        ({"decay": 1.0}, ValueError, "decay is 1.0; expected a number from 0 to below 1"),
        ({"decay": -0.1}, ValueError, "decay is -0.1"),
        ({"generator": "network"}, TypeError, "generator is a str"),
        ({"discriminator": torch.relu}, TypeError, "discriminator is a"),
        ({"tap": nn.Identity()}, TypeError, "expected a penult.Tap"),
        ({"pair": nn.Identity()}, TypeError, "expected a penult.GenerativePair"),
    ],
)
def test_wrong_options_are_named(setting, options, error, message):
    given = {"pair": setting.bank, "tap": setting.tap, "image_shape": SHAPE} | options
    with pytest.raises(error, match=message):
        ActivationGAN(**given)


def test_wrong_images_are_named(setting):
    for images, message in (
        (setting.images * 255, r"images go from 0 to 255.*preprocess"),
        (setting.images[:, :, :7], r"expected \(B, \*\(1, 8, 8\)\)"),
        (setting.images * float("nan"), "images go from nan"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(make(setting), images[:64])


def test_a_training_that_diverges_is_an_error(setting, seen):
    gan = make(setting, rate=1e30)
    with pytest.raises(ValueError, match=r"the training diverged in epoch \d+: .*smaller rate"):
        fit(gan, setting.images[:256], seen[:256], epochs=3)
    assert all(torch.tensor(list(figures.values())).isfinite().all() for figures in gan.history)
