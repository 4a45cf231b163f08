import copy
import json
import subprocess
import sys
from functools import partial

import lightning
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

import generators
import penult
from generators import QUIET, SHAPE, labels, right, seeded
from penult.generate import ActivationVAE, load
from penult.generate._conditions import Standardizer, draw
from penult.generate._networks import autoencoder
from tiers import in_default_tier

pytestmark = QUIET

make = partial(generators.make, ActivationVAE)
fit = partial(generators.fit, epochs=40)


@pytest.fixture(scope="module")
def trained(setting):
    return fit(make(setting), setting.images, epochs=8 if in_default_tier() else 40)


# --- conditions -----------------------------------------------------------------------------------------------


def test_standardizer_floors_the_deviation_at_a_tenth_of_the_mean_one():
    h = torch.randn(5000, 4, generator=seeded()) * torch.tensor([1.0, 2.0, 0.0, 1e-4]) + 1000
    standardize = Standardizer.of([h[:1234], h[1234:]])
    mean_deviation = h.double().std(0, unbiased=False).mean()
    torch.testing.assert_close(standardize.mean, h.double().mean(0).float())
    assert standardize.scale[2] == standardize.scale[3] == pytest.approx(0.1 * float(mean_deviation), rel=1e-5)
    torch.testing.assert_close(standardize.scale[:2].double(), h.double().std(0, unbiased=False)[:2], rtol=1e-4, atol=0)
    assert standardize(h)[:, :2].std(0, unbiased=False).sub(1).abs().max() < 1e-3


def test_standardizer_refuses_activations_that_are_all_the_same():
    with pytest.raises(ValueError, match="all activations are the same"):
        Standardizer.of([torch.ones(5, 3)])


def test_statistics_come_from_the_pair_or_from_activations(setting):
    h = setting.bank.base.distribution.activations
    own, given = make(setting), make(setting, activations=h)
    torch.testing.assert_close(given.standardize.mean, h.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.standardize.mean, h.mean(0), rtol=0.1, atol=0.1)  # of 8192 draws of the bank
    pre = penult.extract(setting.tap, list(setting.images.split(200)), progress=False)
    assert torch.equal(make(setting, activations=pre).standardize.mean, given.standardize.mean)


def test_confident_draws_are_above_and_of_the_law_given_that(setting):
    y = labels(200)
    h = draw(setting.bank, y, 0.9, seeded())
    assert setting.bank.posterior(h).probs.gather(1, y[:, None]).min() > 0.9
    bank = setting.bank.base.distribution.activations  # of which rows of class 0 come with p ∝ softmax, above 0.9
    p = setting.bank.posterior(bank).probs[:, 0]
    weight = torch.where(p > 0.9, p, 0.0)
    expected = (weight[:, None] * bank).sum(0) / weight.sum()
    drawn = draw(setting.bank, torch.zeros(4000, dtype=torch.long), 0.9, seeded(1))
    error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - expected).abs() < 5 * error + 1e-6).all()


def test_rare_confident_draws_are_found_for_many_rows():
    pair = penult.GenerativePair(penult.Head(0.01 * torch.eye(4)), penult.Sphere(1.0))
    y = labels(50)
    y[y > 3] = 3
    p = pair.posterior(pair.given(torch.zeros(40_000, dtype=torch.long)).sample(generator=seeded())).probs[:, 0]
    rare = float(p.sort().values[-40])  # one draw in a thousand
    h = draw(pair, y, rare, seeded(1))
    assert (pair.posterior(h).probs.gather(1, y[:, None]) > rare).all()
    assert len(h.unique(dim=0)) == len(y)


def test_confidence_that_no_draw_reaches_is_an_error(setting):
    pair = penult.GenerativePair(penult.Head(0.01 * torch.eye(4)), penult.Sphere(1.0))
    with pytest.raises(ValueError, match=r"class 3, 0 have p\(y\|h\) > 0\.99.*the highest is"):
        draw(pair, torch.tensor([3]), 0.99, seeded())
    for wrong, error in ((1.0, ValueError), (-0.1, ValueError), ("high", TypeError), (float("nan"), ValueError)):
        with pytest.raises(error, match=r"confident is .*from 0 to below 1"):
            draw(setting.bank, torch.tensor([3]), wrong)


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_digits_of_every_class_without_labels(setting, trained):
    y = labels()
    assert right(setting, trained.generate(y, generator=seeded()), y) > 0.9
    assert trained.history[-1]["loss"] < 0.65 * trained.history[0]["loss"]
    assert [each["epoch"] for each in trained.history] == list(range(1, 41))
    for each in trained.history:
        assert each["loss"] == pytest.approx(each["reconstruction"] + each["divergence"], rel=1e-4)
    images = setting.test.images
    error = (trained.reconstruct(images) - images).square().mean()
    assert error < 0.4 * (images - images.mean(0)).square().mean()


def test_activations_in_the_batches_stand_for_the_classifier(setting):
    h = setting.bank.base.distribution.activations
    one = fit(make(setting), setting.images, epochs=1)
    other = fit(make(setting, tap=None), setting.images, h, epochs=1)
    for a, b in zip(one.decoder.parameters(), other.decoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"activations of a batch have shape \(64, 5\); expected \(64, 32\)"):
        fit(make(setting), setting.images, h[:, :5], epochs=1)


def test_labels_are_not_looked_at_when_conditions_are_activations(setting):
    generator = seeded()
    wrong = torch.randint(10, (len(setting.images),), generator=generator)
    one = fit(make(setting), setting.images, setting.labels, epochs=2)
    other = fit(make(setting), setting.images, wrong, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(one.decoder.parameters(), other.decoder.parameters(), strict=True))


@pytest.mark.slow
def test_training_on_the_law_of_labels(setting):
    vae = fit(make(setting, condition="label", tap=None), setting.images, setting.labels)
    y = labels()
    assert right(setting, vae.generate(y, generator=seeded()), y) > 0.9
    with pytest.raises(ValueError, match="no labels; expected \\(images, labels\\)"):
        fit(make(setting, condition="label"), setting.images, epochs=1)


def test_the_classifier_is_left_as_it_was(setting):
    before = copy.deepcopy(setting.model.state_dict())
    for parameter in setting.model.parameters():
        parameter.requires_grad_(True)
    setting.model.features[1].train()
    try:
        fit(make(setting, consistency=10.0), setting.images, epochs=1)
        assert setting.model.features[1].training
        assert not setting.model.training
    finally:
        setting.model.eval()
    for name, value in setting.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in setting.model.parameters())


@pytest.mark.slow
def test_consistency_brings_images_nearer_to_their_activations(setting):
    plain = fit(make(setting), setting.images, epochs=10)
    strong = fit(make(setting, consistency=50.0), setting.images, epochs=10)
    assert "cosine" not in plain.history[-1]
    assert strong.history[-1]["cosine"] > strong.history[0]["cosine"]
    h = plain.activations(setting.test.images)
    cosine = [float(v.agreement(v.reconstruct(setting.test.images), h)) for v in (plain, strong)]
    assert cosine[1] > cosine[0]


def test_gradients_of_consistency_reach_the_images_alone(setting):
    vae = make(setting, consistency=1.0)
    images = setting.images[:4].clone().requires_grad_(True)
    vae.agreement(images, vae.activations(images)).backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert float(vae.agreement(images, vae.activations(images)).detach()) == pytest.approx(1, abs=1e-5)


def test_the_gaussian_bound_is_a_density_at_the_best_deviation(setting):
    vae = make(setting, likelihood="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        h = vae.activations(setting.images)
        figures = vae._metrics(setting.images, h)
        torch.manual_seed(0)
        mean, log_variance = vae.encode(setting.images, h)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        made = vae.decode(z, h)
    deviation = (made - setting.images).square().mean().sqrt()
    law = torch.distributions.Normal(made, deviation)
    expected = -law.log_prob(setting.images).flatten(1).sum(1).mean()
    torch.testing.assert_close(figures["reconstruction"], expected, rtol=1e-4, atol=1e-3)
    code = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(figures["divergence"], kl, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_gives_the_same_generator(setting, tmp_path):
    kept = {"enable_checkpointing": True, "default_root_dir": tmp_path}

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 1

    def run(vae, epochs, callbacks=(), **options):
        class Order(torch.utils.data.Sampler):  # a function of the epoch
            def __iter__(self):
                torch.manual_seed(epoch_of(vae))
                return iter(torch.randperm(len(setting.images), generator=seeded(epoch_of(vae))).tolist())

            def __len__(self):
                return len(setting.images)

        with torch.random.fork_rng(devices=[]):
            trainer = lightning.Trainer(
                max_epochs=epochs, min_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                accelerator="cpu", callbacks=list(callbacks), **kept,
            )  # fmt: skip
            trainer.fit(vae, DataLoader(setting.images, 64, sampler=Order()), **options)
            if not options:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
        return vae

    def epoch_of(vae):
        return vae.trainer.current_epoch

    whole = run(make(setting), 4)
    run(make(setting), 4, [Stop()])
    again = run(make(setting, seed=9), 4, ckpt_path=tmp_path / "last.ckpt")
    assert [each["epoch"] for each in again.history] == [1, 2, 3, 4]
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoints_hold_what_is_trained_and_no_more(setting, tmp_path):
    vae = fit(make(setting), setting.images, epochs=1)
    vae.trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in held["state_dict"]} == {"encoder", "decoder", "standardize"}
    again = ActivationVAE.load_from_checkpoint(
        tmp_path / "a.ckpt", pair=setting.bank, tap=setting.tap, image_shape=SHAPE, weights_only=True
    )
    assert torch.equal(again.generate(labels(1), generator=seeded()), vae.generate(labels(1), generator=seeded()))
    assert again.history == vae.history


def test_validation_is_kept_in_the_history(setting):
    vae = make(setting)
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", check_val_every_n_epoch=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        trainer.fit(vae, DataLoader(setting.images, 64), DataLoader(setting.test.images, 64))
    assert ["val_loss" in each for each in vae.history] == [False, True]


def test_own_networks_and_optimiser(setting, tmp_path):
    encoder, decoder = autoencoder(SHAPE, 32, 5, width=16)
    vae = make(
        setting, latent=5, encoder=encoder, decoder=decoder,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01), scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
    )  # fmt: skip
    fit(vae, setting.images, epochs=2)
    assert vae.decoder is decoder
    assert vae.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    path = vae.save(tmp_path / "own.safetensors", store_activations=True)
    with pytest.raises(ValueError, match="networks of your own"):
        load(path)
    again = load(path, encoder=autoencoder(SHAPE, 32, 5, 16)[0], decoder=autoencoder(SHAPE, 32, 5, 16)[1])
    assert torch.equal(again.generate(3, generator=seeded()), vae.generate(3, generator=seeded()))
    with pytest.raises(penult.io.FileFormatError, match="cannot be rebuilt"):
        load(path, encoder=encoder, decoder=nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 48, 64), (1, 64, 64)])
def test_default_networks_fit_common_images(shape):
    encoder, decoder = autoencoder(shape, 7, 4)
    h = torch.randn(2, 7)
    assert encoder(torch.rand(2, *shape), h).shape == (2, 8)
    assert decoder(torch.randn(2, 4), h).shape == (2, *shape)


def test_colour_images_can_be_trained_on(setting):
    class Colour(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4))

    model = Colour(setting.model).eval()
    images = nn.functional.interpolate(setting.images[:128], 32).expand(-1, 3, -1, -1)
    head = penult.find_head(model, images[:8])
    pair = penult.GenerativePair(head, setting.bank.base)
    vae = ActivationVAE(pair, penult.Tap(model, head), (3, 32, 32), width=8)
    assert vae.likelihood == "gaussian"
    fit(vae, images, epochs=4)
    assert vae.history[-1]["loss"] < vae.history[0]["loss"]
    assert vae.generate(torch.tensor([[1, 2]]), generator=seeded()).shape == (1, 2, 3, 32, 32)


# --- images ---------------------------------------------------------------------------------------------------


def test_images_have_the_shape_of_the_labels_and_lie_in_the_unit_interval(trained):
    for y in (torch.arange(6).view(2, 3), torch.tensor([4]), 4, torch.empty(0, dtype=torch.long)):
        images = trained.generate(y, generator=seeded())
        assert images.shape == (*torch.as_tensor(y).shape, *SHAPE)
        assert not images.numel() or (images.min() >= 0 and images.max() <= 1)
    many = labels(120)  # more than are decoded at a time
    assert trained.generate(many, generator=seeded()).shape == (1200, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_every_integer_dtype_give_the_same_images(setting, dtype):
    vae, y = make(setting), torch.tensor([7, 0, 1, 1])
    x = setting.images[:4]
    for images in (
        lambda y: vae.generate(y, confident=0.1, generator=seeded()),
        lambda y: vae.interpolate(y, y.flip(0), 3, generator=seeded()),
        lambda y: vae.edit(x, y, generator=seeded()),
    ):
        assert torch.equal(images(y.to(dtype)), images(y))


def test_seeds_decide_and_the_global_state_is_left_alone(trained, setting):
    state = torch.random.get_rng_state()
    first = trained.generate(labels(2), confident=0.9, reject=True, generator=seeded(3))
    again = trained.generate(labels(2), confident=0.9, reject=True, generator=seeded(3))
    trained.interpolate(0, 1, generator=seeded())
    trained.edit(setting.test.images[:2], 3, generator=seeded())
    trained.reconstruct(setting.test.images[:2])
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, trained.generate(labels(2), confident=0.9, reject=True, generator=seeded(4)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        a, b = trained.generate(labels(2)), trained.generate(labels(2))
    assert not torch.equal(a, b)  # without a generator, torch's own goes on


def test_modes_are_left_as_they_were(trained):
    for mode in (True, False):
        trained.train(mode)
        trained.generate(3)
        assert trained.training is trained.decoder.training is mode
        assert not trained.tap.model.training


@pytest.mark.slow
def test_confident_images_are_clearer(setting):
    half = penult.GenerativePair(setting.head, setting.bank.base)
    vae = fit(make(setting, half), setting.images, epochs=15)
    y = labels(60)
    plain, sure = (right(setting, vae.generate(y, confident=c, generator=seeded()), y) for c in (None, 0.95))
    assert sure >= plain


@pytest.mark.slow
def test_rejection_leaves_what_the_classifier_agrees_with(trained, setting):
    y = labels(60)
    images = trained.generate(y, reject=True, generator=seeded())
    assert right(setting, images, y) == 1
    fresh = make(setting)  # untrained: everything is one grey picture
    with pytest.raises(RuntimeError, match="classifier assigns none to it"):
        fresh.generate(y, reject=True, generator=seeded())


def test_interpolation_ends_in_its_classes(trained, setting):
    y0, y1 = torch.full((40,), 0), torch.full((40,), 1)
    ways = trained.interpolate(y0, y1, steps=5, confident=0.9, generator=seeded())
    assert ways.shape == (40, 5, *SHAPE)
    assert right(setting, ways[:, 0], y0) > 0.9
    assert right(setting, ways[:, -1], y1) > 0.9
    step = (ways[:, 1:] - ways[:, :-1]).flatten(2).norm(dim=-1).mean(0)
    assert step.max() < 0.8 * (ways[:, -1] - ways[:, 0]).flatten(1).norm(dim=-1).mean()
    with pytest.raises(ValueError, match="expected the same shape"):
        trained.interpolate(y0, y1[:3])
    with pytest.raises(ValueError, match="steps is 1"):
        trained.interpolate(y0, y1, steps=1)


def test_editing_goes_from_the_image_to_the_class(trained, setting):
    images, y = setting.test.images[:60], torch.full((60,), 8)
    edited = trained.edit(images, y, torch.tensor([0.0, 0.5, 1.0]), confident=0.9, generator=seeded())
    assert edited.shape == (60, 3, *SHAPE)
    torch.testing.assert_close(edited[:, 0], trained.reconstruct(images))
    assert right(setting, edited[:, 2], y) > 0.9
    assert torch.equal(trained.edit(images, 8, confident=0.9, generator=seeded()), edited[:, 2])
    drawn = trained.generate(y, confident=0.9, generator=seeded())
    near, far = ((each - images).square().mean() for each in (edited[:, 2], drawn))
    assert near < far  # it goes to the nearest draw
    with pytest.raises(ValueError, match="strength has shape"):
        trained.edit(images, y, torch.zeros(2, 2))


def test_another_law_for_the_same_networks(trained, setting):
    mixture = penult.Marginal.fit(setting.head, setting.bank.base.distribution.activations, "class", rectified=False)
    other = trained.with_pair(penult.GenerativePair(setting.head, mixture))
    y = labels()
    assert other.decoder is trained.decoder
    assert right(setting, other.generate(y, generator=seeded()), y) > 0.7
    assert trained.pair is setting.bank
    assert other.history == trained.history
    assert other.history is not trained.history
    with pytest.raises(ValueError, match="as the generator was made for"):
        trained.with_pair(penult.GenerativePair(penult.Head(torch.eye(3))))
    with pytest.raises(TypeError, match=r"expected a penult\.GenerativePair"):
        trained.with_pair(setting.head)


def test_preprocessing_stands_before_the_classifier(setting):
    class Normalize(nn.Module):
        def forward(self, x):
            return (x - 0.5) / 0.25

    class Raw(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(0.25 * x + 0.5)

    model = Raw(setting.model).eval()
    head = penult.find_head(model, setting.images[:8])
    vae = make(setting, tap=penult.Tap(model, head), preprocess=Normalize())
    torch.testing.assert_close(vae.activations(setting.images[:9]), setting.tap(setting.images[:9])[0].detach())


def test_casts_reach_what_is_trained_alone(setting):
    vae = make(setting).double()
    assert {p.dtype for p in vae.decoder.parameters()} == {torch.float64}
    assert {p.dtype for p in setting.model.parameters()} == {torch.float32}
    y = labels(1)
    assert vae.generate(y, reject=False, generator=seeded()).dtype == torch.float64
    assert vae.edit(setting.images[:3], 4, generator=seeded()).shape == (3, *SHAPE)
    setting.bank.sample((3,), generator=seeded())


def test_training_in_half_precision_leaves_the_classifier_as_it_was(setting):
    before = {name: value.clone() for name, value in setting.model.state_dict().items()}
    vae = fit(make(setting, consistency=3.0), setting.images, epochs=2, precision="bf16-true")
    assert {p.dtype for p in vae.decoder.parameters()} == {torch.bfloat16}
    assert vae.history[1]["loss"] < vae.history[0]["loss"]
    for name, value in setting.model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_classifiers_of_other_precisions(setting, dtype):
    model = copy.deepcopy(setting.model).to(dtype)
    tap = penult.Tap(model, penult.find_head(model, setting.images[:8].to(dtype)))
    vae = make(setting, tap=tap)
    h = setting.tap(setting.images[:9])[0].detach()
    torch.testing.assert_close(vae.activations(setting.images[:9]), h, rtol=0.05, atol=0.1)
    assert vae.reconstruct(setting.images[:9]).dtype == torch.float32


def test_many_images_are_shown_in_parts(setting):
    seen = []
    handle = setting.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        make(setting).reconstruct(setting.images[:1].expand(1201, -1, -1, -1))
    finally:
        handle.remove()
    assert seen == [500, 500, 201]


def test_a_module_that_preprocesses_is_left_as_it_was(setting):
    noisy = nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Dropout(0.9))
    vae = make(setting, preprocess=noisy)
    assert torch.equal(vae.reconstruct(setting.images[:9]), vae.reconstruct(setting.images[:9]))
    assert noisy[0].num_batches_tracked == 0
    assert noisy[1].training


# --- files ----------------------------------------------------------------------------------------------------


def test_a_saved_generator_needs_no_classifier(trained, setting, tmp_path):
    path = trained.save(tmp_path / "digits.safetensors")
    drawn = trained.without_data().generate(labels(), 0.9, generator=seeded())
    for again in (load(path), ActivationVAE.load(path)):
        assert not again.training
        assert again.tap is None
        # tensors of a file lie otherwise in memory, so that products of them are rounded otherwise
        torch.testing.assert_close(again.generate(labels(), 0.9, generator=seeded()), drawn, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=r"there is no classifier for the activations.*penult\.Tap"):
            again.reconstruct(setting.test.images[:2])
        with pytest.raises(ValueError, match="there is no classifier to reject"):
            again.generate(3, reject=True)
    seeing = load(path, tap=setting.tap)
    assert torch.equal(seeing.reconstruct(setting.test.images[:5]), trained.reconstruct(setting.test.images[:5]))
    with safe_open(path, "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"encoder", "decoder", "standardize", "pair"}
        assert json.loads(file.metadata()["penult"])["kind"] == "generator"


def test_a_file_holds_no_activation_of_an_image_unless_asked_to(trained, setting, tmp_path):
    real = setting.bank.base.distribution.activations
    path = trained.save(tmp_path / "digits.safetensors")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        assert json.loads(file.metadata()["penult"])["stored_activations"] == 0
    for name, tensor in tensors.items():
        assert len(real) not in tensor.shape, name
        if tensor.dim() == 2 and tensor.shape[1] == real.shape[1]:
            assert torch.cdist(tensor.float(), real).min() > 1e-3, name
    whole = trained.save(tmp_path / "whole.safetensors", store_activations=True)
    again = load(whole)
    assert again.stored_activations == penult.io.read(whole).metadata["stored_activations"] == len(real)
    assert torch.equal(again.pair.base.distribution.activations, real)
    assert torch.equal(again.generate(labels(), 0.9, generator=seeded()),
                       trained.generate(labels(), 0.9, generator=seeded()))  # fmt: skip


def test_a_mixture_stands_for_a_bank(trained, setting):
    state = torch.random.get_rng_state()
    apart = trained.without_data()
    assert torch.equal(state, torch.random.get_rng_state())
    assert (trained.stored_activations, apart.stored_activations) == (len(setting.images), 0)
    assert trained.pair is setting.bank
    assert apart.decoder is trained.decoder
    assert apart.without_data() is apart
    law = apart.pair.base.distribution
    assert isinstance(law, penult.distributions.PrincipalMixture)
    assert law.num_parameters < setting.bank.base.distribution.num_parameters
    y = labels(60)
    bank, mixture = (right(setting, vae.generate(y, generator=seeded()), y) for vae in (trained, apart))
    assert mixture == pytest.approx(bank, abs=0.07)
    prior = setting.bank.prior.probs
    torch.testing.assert_close(apart.pair.prior.probs, prior, rtol=0, atol=0.02)


def test_a_pair_that_is_no_bank_is_written_as_it_is(trained, setting, tmp_path):
    real = setting.bank.base.distribution.activations
    for base in (penult.Marginal.fit(setting.head, real, components=8), penult.Sphere.fit(setting.head, real)):
        vae = trained.with_pair(penult.GenerativePair(setting.head, base))
        assert vae.without_data() is vae
        again = load(vae.save(tmp_path / "digits.safetensors"))
        for (name, a), b in zip(vae.pair.state_dict().items(), again.pair.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_a_bank_of_pre_activations_becomes_a_mixture_of_them(setting):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    head = penult.find_head(model, setting.images[:8])
    tap = penult.Tap(model, head)
    acts = penult.extract(tap, list(setting.images.split(200)), progress=False, pre_activation=True)
    pair = penult.GenerativePair(head, penult.Marginal.fit(head, acts, kind="bank"))
    vae = ActivationVAE(pair, tap, SHAPE)
    law = vae.without_data().pair.base.distribution
    assert law.rectified
    h = law.sample((2000,), generator=seeded())
    zeros = (pair.base.distribution.rows == 0).float().mean()
    assert h.min() == 0
    assert float((h == 0).float().mean()) == pytest.approx(float(zeros), abs=0.03)


def test_a_bank_too_small_for_a_mixture_is_named(setting, tmp_path):
    real = setting.bank.base.distribution.activations
    few = make(setting, penult.GenerativePair(setting.head, penult.Marginal.fit(setting.head, real[:39], kind="bank")))
    for call in (few.without_data, lambda: few.save(tmp_path / "digits.safetensors")):
        with pytest.raises(ValueError, match=r"holds 39 real activations, too few.*store_activations=True"):
            call()
    assert not list(tmp_path.iterdir())
    assert load(few.save(tmp_path / "digits.safetensors", store_activations=True)).stored_activations == 39


@pytest.mark.slow
def test_a_saved_generator_draws_in_a_fresh_process(trained, tmp_path):
    path = trained.save(tmp_path / "digits.safetensors", store_activations=True)
    code = (
        "import sys, torch, penult; vae = penult.generate.load(sys.argv[1]); "
        "print(float(vae.generate(torch.arange(10), generator=torch.Generator().manual_seed(0)).double().sum()))"
    )
    outcome = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    drawn = trained.generate(torch.arange(10), generator=seeded())
    assert float(outcome.stdout.split()[-1]) == pytest.approx(float(drawn.double().sum()), rel=1e-6)


def test_damaged_and_foreign_files_are_refused(trained, setting, tmp_path):
    path = trained.save(tmp_path / "digits.safetensors")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(penult.io.FileFormatError, match="truncated or damaged"):
        load(tmp_path / "short.safetensors")
    pair = setting.bank.save(tmp_path / "pair.penult.safetensors")
    with pytest.raises(penult.io.FileFormatError, match="pair"):
        load(pair)
    tensors, metadata = penult.io.read(path).tensors, penult.io.read(path).metadata
    wrong = {**tensors, "decoder.layers.0.weight": torch.zeros(3, 3)}
    penult.io.write(tmp_path / "wrong.safetensors", wrong, "generator", metadata)
    with pytest.raises(penult.io.FileFormatError, match="cannot be rebuilt"):
        load(tmp_path / "wrong.safetensors")
    for change in ({"class": "Other"}, {"config": None}, {"config": {}}, {"pair": {}}):
        penult.io.write(tmp_path / "other.safetensors", tensors, "generator", metadata | change)
        with pytest.raises(penult.io.FileFormatError):
            load(tmp_path / "other.safetensors")


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_shape": (28, 28)}, ValueError, "image_shape is"),
        ({"image_shape": (1, 8.0, 8)}, ValueError, "image_shape is"),
        ({"image_shape": (3, 30, 30)}, ValueError, "cannot be halved"),
        ({"condition": "labels"}, ValueError, "condition is 'labels'; expected"),
        ({"likelihood": "poisson"}, ValueError, "likelihood is 'poisson'; expected"),
        ({"latent": 0}, ValueError, "latent"),
        ({"beta": -1.0}, ValueError, "beta"),
        ({"consistency": -1.0}, ValueError, "consistency"),
        ({"consistency": float("nan")}, ValueError, "consistency"),
        ({"encoder": nn.Identity()}, ValueError, "decoder is None; expected a network"),
        ({"tap": nn.Identity()}, TypeError, "expected a penult.Tap"),
        ({"pair": nn.Identity()}, TypeError, "expected a penult.GenerativePair"),
    ],
)
def test_wrong_options_are_named(setting, options, error, message):
    given = {"pair": setting.bank, "tap": setting.tap, "image_shape": SHAPE} | options
    with pytest.raises(error, match=message):
        ActivationVAE(**given)


def test_wrappers_of_a_tap_are_removed(setting):
    for wrapped in (torch.compile(setting.tap, backend="eager"), nn.DataParallel(setting.tap)):
        assert make(setting, tap=wrapped).tap is setting.tap


def test_wrong_images_are_named(setting, trained):
    for images, error, message in (
        (setting.images * 255, ValueError, r"images go from 0 to 255.*preprocess"),
        (setting.images[:, :, :7], ValueError, r"expected \(B, \*\(1, 8, 8\)\)"),
        ((255 * setting.images).byte(), TypeError, "uint8"),
        (setting.images * float("nan"), ValueError, "images go from nan"),
    ):
        with pytest.raises(error, match=message):
            fit(make(setting), images, epochs=1)
        with pytest.raises(error, match=message):
            trained.reconstruct(images[:2])


def test_images_that_turn_wrong_later_in_the_first_epoch_are_named(setting):
    images = setting.images.clone()
    images[-1] = float("nan")
    with pytest.raises(ValueError, match="images go from nan"):
        fit(make(setting), images, epochs=1)


def test_a_training_that_diverges_is_an_error(setting):
    vae = make(setting, rate=1e9)
    with pytest.raises(ValueError, match=r"the training diverged in epoch \d+: .*smaller rate"):
        fit(vae, setting.images, epochs=3)
    assert all(torch.tensor(list(figures.values())).isfinite().all() for figures in vae.history)


def test_labels_of_a_wrong_shape_are_named(setting, trained):
    with pytest.raises(ValueError, match=r"y has shape \(3,\); give one label, or one for each of 4 images"):
        trained.edit(setting.images[:4], torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"labels has shape \(64, 1\)"):
        fit(make(setting, condition="label"), setting.images, setting.labels[:, None], epochs=1)


def test_a_classifier_of_another_head_is_refused(setting):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)).eval()
    tap = penult.Tap(model, penult.find_head(model, setting.images[:8]))
    with pytest.raises(ValueError, match="make the pair from this classifier"):
        make(setting, tap=tap)


def test_labels_out_of_range_are_named(trained):
    with pytest.raises(ValueError, match=r"labels\[1\] is 10, out of range"):
        trained.generate(torch.tensor([3, 10]))
    with pytest.raises(TypeError, match=r"labels is a torch\.float32 tensor; expected a tensor of integer"):
        trained.generate(torch.tensor([3.0]))
