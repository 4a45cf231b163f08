import io
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import generate_colour
import networks
import outliers_sets
import outliers_setting
import penult
from outliers_sets import compressed, drawn, set_names, training
from outliers_setting import (
    FAMILIAR,
    FAR,
    HELD_OUT,
    NETWORKS,
    SELECTION,
    SHIFTED,
    features,
    halves,
    head,
    model,
    pictures,
    sets,
)
from penult.data import parquet, shift

SIZES = {"mnist": (28, 28), "usps": (16, 16), "cifar10": (32, 32, 3)}  # of pictures in the files
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
DRAWN = (
    "textures",
    "dead leaves",
    "photographs",
    "gaussian noise",
    "uniform noise",
    "gratings",
    "checkerboards",
    "blobs",
    "salt and pepper",
)
EVERY = [(name, each) for name in SHAPES for each in set_names(name, (2, 5))]
TESTED, CONTAMINATING = 7, 2


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make(name, count, shape, seed=0):
    """A drawn set; photographs are those that scikit-learn brings."""
    if name == "photographs":
        pytest.importorskip("sklearn.datasets")
    return drawn(name, count, shape, torch.Generator().manual_seed(seed))


def write(folder, name, split, count, seed):
    pa, image = pytest.importorskip("pyarrow"), pytest.importorskip("PIL.Image")
    table = []
    for number, picture in enumerate((uniform(seed, count, *SIZES[name]) * 255).byte()):
        image.fromarray(picture.numpy()).save(png := io.BytesIO(), "png")
        table.append({"image": {"bytes": png.getvalue()}, "label": number % 10})
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(table), folder / f"{name}-{split}.parquet")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of small files and published networks."""
    folder = tmp_path_factory.mktemp("files")
    for seed, (name, split) in enumerate((name, split) for name in SIZES for split in ("train", "test")):
        write(folder, name, split, 40, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = networks.ResNet(1).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for depth in (32, 44):
        save_file(state, folder / f"cifar10-resnet{depth}.safetensors")
    return folder


@pytest.fixture
def data(files, tmp_path, monkeypatch):
    """A copy of that folder; sets, networks and training are as small."""
    pytest.importorskip("sklearn.datasets")
    for module in (outliers_sets, outliers_setting):
        monkeypatch.setattr(module, "TESTED", TESTED)
        monkeypatch.setattr(module, "CONTAMINATING", CONTAMINATING)
    monkeypatch.setattr(outliers_setting, "BATCH", 16)
    monkeypatch.setattr(outliers_setting, "SMALL", 20)
    monkeypatch.setattr(generate_colour, "EPOCHS", 1)
    monkeypatch.setattr(generate_colour, "BATCH", 10)
    for name in ("cifar-resnet32", "cifar-resnet44"):
        small = replace(networks.NETWORKS[name], build=partial(networks.ResNet, 1))
        monkeypatch.setitem(networks.NETWORKS, name, small)
    shutil.copytree(files, tmp_path / "data")
    return tmp_path / "data"


def alike(one, other):
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))


def blocks(image, side):
    """The square blocks of a picture, as rows in lexicographic order."""
    rows = image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).reshape(16, -1)
    return sorted(rows.tolist())


# --- sets ---------------------------------------------------------------------------------------------------


def test_names():
    for name in SHAPES:
        kinds = FAR[name], SHIFTED[name], SELECTION[name]
        everything = [each for kind in kinds for each in kind]
        assert len(set(everything)) == len(everything)
        assert set_names(name) == (FAMILIAR, *everything)
        assert set_names(name, (1, 2)) == (FAMILIAR, HELD_OUT, *everything)
        assert len(SHIFTED[name]) == 15
        assert SHIFTED[name][3] == "noise 0.25"
    assert set(FAR["cifar10"]) - set(FAR["mnist"]) == {"mnist", "usps"}
    assert set(FAR["mnist"]) - set(FAR["cifar10"]) == {"cifar10"}
    assert (outliers_sets.TESTED, outliers_sets.CONTAMINATING) == (1000, 100)


def test_halves():
    fit, test = halves()
    assert len(fit) == len(test) == 5000
    assert torch.equal(torch.cat([fit, test]).sort().values, torch.arange(10_000))
    assert all(torch.equal(*pair) for pair in zip(halves(), (fit, test), strict=True))
    assert not torch.equal(fit.sort().values, torch.arange(5000))
    assert [len(rows) for rows in halves(7)] == [3, 4]
    with pytest.raises(ValueError, match="n is 1"):
        halves(1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", DRAWN)
def test_drawn_sets(name, shape):
    state = torch.random.get_rng_state()
    images = make(name, 12, shape)
    assert images.shape == (12, *shape)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, make(name, 12, shape))
    assert not torch.equal(images, make(name, 12, shape, seed=1))
    assert len(images.flatten(1).unique(dim=0)) == 12
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_is_drawn():
    grey, colour = SHAPES.values()
    noise = make("gaussian noise", 100, colour)
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(noise.std()) == pytest.approx(0.2405, abs=0.005)  # what is cut off makes it less than 0.25
    assert float(make("uniform noise", 100, colour).std()) == pytest.approx(12**-0.5, abs=0.005)
    for image in make("checkerboards", 50, colour):
        assert len(image.flatten(1).unique(dim=1).T) == 2
    sides = set()
    for image in make("checkerboards", 200, grey):
        edges = (image[0, 0, 1:] != image[0, 0, :-1]).nonzero().flatten()
        assert len(edges.diff().unique()) == 1
        sides.add(int(edges.diff()[0]))
    assert sides == set(range(1, 9))
    for image in make("salt and pepper", 20, colour):
        assert len(image.flatten(1).unique(dim=1).T) == 3
    blobs = make("blobs", 20, grey)
    assert float(blobs[blobs > 0].min()) >= 0.75
    assert 0.1 < float((blobs > 0).float().mean()) < 0.9
    leaves = make("dead leaves", 50, colour)  # neighbours are mostly of one disc, and those far away are not
    assert float((leaves[..., 1:] == leaves[..., :-1]).all(1).float().mean()) > 0.5
    assert float((leaves[..., 16:] == leaves[..., :-16]).all(1).float().mean()) < 0.1
    for image in make("gratings", 20, colour):  # on a line between two colours
        points = image.flatten(1).T.double()
        values = torch.linalg.svdvals(points - points.mean(0))
        assert float(values[1]) < 1e-4 * float(values[0])


def test_photographs_are_of_two_scenes_in_colour_or_grey():
    colour, grey = make("photographs", 9, (3, 32, 32)), make("photographs", 9, (1, 32, 32))
    luma = (colour * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(grey, luma)


def test_compression():
    pytest.importorskip("PIL.Image")
    images = uniform(4, 3, 3, 32, 32)
    once = compressed(images)
    assert once.shape == images.shape
    assert 0 <= float(once.min()) < float(once.max()) <= 1
    assert float((once - images).abs().mean()) > 0.05  # noise in colour is what JPEG keeps least
    torch.testing.assert_close(once * 255, (once * 255).round())
    plain = torch.full((1, 3, 32, 32), 128 / 255)
    torch.testing.assert_close(compressed(plain), plain)
    sides = torch.zeros(1, 3, 32, 16)  # where is left, and which channel is red
    sides[:, 0, :, :8] = 1
    assert float((compressed(sides) - sides).abs().max()) < 0.5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scrambled_pictures_are_permuted_blocks(shape):
    images, side = uniform(5, 6, *shape), shape[1] // 4
    found = outliers_sets._scrambled(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    orders = set()
    for image, other in zip(images, found, strict=True):
        assert blocks(image, side) == blocks(other, side)
        orders.add(tuple(other[0, ::side, ::side].flatten().argsort().tolist()))
        assert not torch.equal(image, other)
    assert len(orders) == 6


@pytest.mark.parametrize(("name", "each"), EVERY)
def test_sets(name, each, data, monkeypatch):
    held_out = (2, 5) if each == HELD_OUT else ()
    found, shape = pictures(name, each, data, held_out), SHAPES[name]
    count = TESTED if each in SHIFTED[name] else TESTED + CONTAMINATING
    count = {FAMILIAR: 40, HELD_OUT: 8}.get(each, count)
    assert found.images.shape == (count, *shape)
    assert found.images.dtype == torch.float32
    assert 0 <= float(found.images.min()) < float(found.images.max()) <= 1
    assert (found.labels is not None) == (each == FAMILIAR or each in SHIFTED[name])
    assert torch.equal(found.images, pictures(name, each, data, held_out).images)
    if shape[0] == 3:  # every set but those of the file itself went through JPEG, and last of all
        monkeypatch.setattr(outliers_sets, "compressed", lambda images: images - 5)
        again = pictures(name, each, data, held_out).images
        assert (float(again.min()) < -3) == (each not in (FAMILIAR, HELD_OUT))


def test_sets_do_not_depend_on_others(data):
    names = [each for each in set_names("mnist") if each != FAMILIAR]
    one = {each: pictures("mnist", each, data).images for each in names}
    outliers_sets._test_file.cache_clear()
    outliers_sets._familiar.cache_clear()
    other = {each: pictures("mnist", each, data).images for each in reversed(names)}
    assert all(torch.equal(one[each], other[each]) for each in names)
    assert not torch.equal(one["textures"], make("textures", TESTED + CONTAMINATING, SHAPES["mnist"]))


@pytest.mark.parametrize("held_out", [(), (2, 5)])
def test_familiar_and_shifted_pictures(held_out, data):
    images, labels, _ = parquet(data / "mnist-test.parquet").load()
    known = torch.tensor([y not in held_out for y in labels.tolist()])
    numbers = {y: number for number, y in enumerate(y for y in range(10) if y not in held_out)}
    renumbered = torch.tensor([numbers[y] for y in labels[known].tolist()])
    familiar = pictures("mnist", FAMILIAR, data, held_out)
    assert torch.equal(familiar.images, images[known])
    assert torch.equal(familiar.labels, renumbered)
    rows = halves(len(renumbered))[1][:TESTED]
    found = pictures("mnist", "blur 0.5", data, held_out)
    torch.testing.assert_close(found.images, shift(images[known][rows], "blur", 0.5))
    assert torch.equal(found.labels, renumbered[rows])
    sources = images[known][halves(len(renumbered))[1]]
    for image in pictures("mnist", "scrambled", data, held_out).images:
        assert blocks(image, 7) in [blocks(each, 7) for each in sources]


def test_held_out_classes(data):
    images, labels, _ = parquet(data / "cifar10-test.parquet").load()
    found = pictures("cifar10", HELD_OUT, data, (5, 2))
    assert torch.equal(found.images, images[(labels == 2) | (labels == 5)])
    images, labels, _ = parquet(data / "cifar10-train.parquet").load()
    rows = [row for row, y in enumerate(labels.tolist()) if y not in (2, 5)][:11]
    known = training("cifar10", data, (5, 2), 11)
    assert torch.equal(known.images, images[rows])
    assert known.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    assert len(training("mnist", data, ()).labels) == 40


@pytest.mark.parametrize("held_out", [(), (2, 5)])
def test_half_and_half(held_out, data):
    images, labels, _ = parquet(data / "mnist-train.parquet").load()
    found = pictures("mnist", "half and half", data, held_out).images
    left, right = (
        (found[:, None, ..., part] == images[..., part]).flatten(2).all(2).long().argmax(1)
        for part in (slice(14), slice(14, None))
    )
    assert torch.equal(found, torch.cat([images[left][..., :14], images[right][..., 14:]], -1))
    assert bool((labels[left] != labels[right]).all())
    assert not set(labels[torch.cat([left, right])].tolist()) & set(held_out)


def test_foreign_pictures(data):
    digits = pictures("cifar10", "mnist", data).images
    assert float(digits[:, :, 0].max()) < 0.1  # a dark border
    assert float(digits[..., 0].max()) < 0.1
    assert float((digits[:, 0] - digits[:, 1]).abs().max()) < 0.05  # grey
    usps = pictures("cifar10", "usps", data).images
    assert float(usps[:, :, 0].mean()) > 0.2  # no border
    found = pictures("mnist", "cifar10", data).images
    whole = parquet(data / "cifar10-test.parquet", mode="L", size=28).load().images
    assert int((found[:, None] == whole).flatten(2).all(2).sum()) == len(found)


def test_bad_sets(data):
    with pytest.raises(ValueError, match="data set is 'svhn'; it must be one of mnist, cifar10"):
        pictures("svhn", FAMILIAR, data)
    for unknown in ("usps", HELD_OUT, "noise 0.3"):
        with pytest.raises(ValueError, match=f"set is '{unknown}'; it must be one of familiar, cifar10"):
            pictures("mnist", unknown, data)
    with pytest.raises(ValueError, match="classes are numbers from 0 to 9"):
        pictures("mnist", FAMILIAR, data, (3, 10))
    with pytest.raises(ValueError, match="those that are drawn are textures"):
        drawn("scrambled", 3, (1, 28, 28), torch.Generator())


def test_too_few_pictures(data, monkeypatch):
    monkeypatch.setattr(outliers_sets, "TESTED", 100)
    for name, each in (("mnist", "scrambled"), ("mnist", "noise 0.5"), ("mnist", "cifar10"), ("cifar10", "usps")):
        with pytest.raises(ValueError, match=r"pictures; a set needs 10\d"):
            pictures(name, each, data)


# --- networks -----------------------------------------------------------------------------------------------


def test_networks():
    assert len(NETWORKS) == 12
    for name, network in NETWORKS.items():
        assert network.name == name
        assert len(network.held_out) == (2 if name.endswith("-8") else 0)
        assert list(network.held_out) == sorted(set(network.held_out))
        assert (HELD_OUT in sets(name)) == name.endswith("-8")
        assert network.source is None or network.source in networks.NETWORKS
        assert (network.fit is None) == name.startswith("cifar-resnet")
    assert [NETWORKS[f"mnist-{kind}-0"].source for kind in ("relu", "linear")] == ["mnist-relu", "mnist-linear"]
    assert NETWORKS["mnist-relu-1"].source is None


@pytest.mark.parametrize("name", ["mnist-relu-1", "mnist-linear-0", "mnist-relu-8", "cifar-resnet44", "cifar-small-8"])
def test_heads_and_weights(name, data, monkeypatch):
    state = torch.random.get_rng_state()
    made, found = model(name, data, data / "one"), head(name, data, data / "one")
    assert torch.equal(state, torch.random.get_rng_state())
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert found.num_classes == 10 - len(NETWORKS[name].held_out)
    assert found.certificate.support == ("reals" if "linear" in name else "orthant")
    torch.manual_seed(7)  # of no consequence
    assert alike(made, model(name, data, data / "two"))
    torch.random.set_rng_state(state)

    for module, function in ((networks, "train_mnist"), (generate_colour, "train")):  # found there the next time
        monkeypatch.setattr(module, function, None)
    model.cache_clear()
    if NETWORKS[name].source is None:
        assert alike(made, model(name, data, data / "one"))
        assert [path.name for path in (data / "one").rglob("*.safetensors")] == [f"{name}.safetensors"]


def test_seeds_and_sources(data):
    (data / "cache").mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        kept = networks.mnist_net(relu=True)
    penult.io.write(data / "cache" / "mnist-relu.safetensors", kept.state_dict(), networks.KIND, {})
    assert alike(model("mnist-relu-0", data, data / "cache"), kept)
    assert not alike(*(model(f"mnist-relu-{seed}", data, data / "cache") for seed in (1, 2)))


def test_training_on_given_pictures_and_seeds(data):
    images, labels, _ = parquet(data / "mnist-train.parquet").load()

    def trained(*arguments, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = networks.mnist_net(relu=True).train()
            networks.train_mnist(made, data, *arguments, **options, batch=8)
        return made

    whole = trained()
    assert alike(whole, trained(pictures=(images, labels)))
    assert not alike(whole, trained(pictures=(images[:20], labels[:20])))
    assert not alike(whole, trained(seed=1))


def test_unknown_names(data):
    for function in (sets, lambda name: model(name, data, data), lambda name: head(name, data, data)):
        with pytest.raises(ValueError, match="network is 'vgg'; it must be one of mnist-relu-0"):
            function("vgg")
    with pytest.raises(ValueError, match="network is 'vgg'"):
        features("vgg", FAMILIAR, data, data)
    for unknown in (HELD_OUT, "textures 0.5"):
        with pytest.raises(ValueError, match=f"set is '{unknown}'; those of mnist-relu-0 are familiar"):
            features("mnist-relu-0", unknown, data, data)


# --- activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist-relu-8", "cifar-resnet32"])
def test_features(name, data, monkeypatch):
    network, cache = NETWORKS[name], data / "cache"
    made, penultimate = model(name, data, cache), head(name, data, cache)
    kept = {}
    for each in (FAMILIAR, "noise 0.25", "dead leaves"):
        found, expected = features(name, each, data, cache), pictures(network.data, each, data, network.held_out)
        torch.testing.assert_close(found.logits, made(expected.images))
        torch.testing.assert_close(penultimate(found.activations), found.logits)
        assert float(found.activations.min()) >= 0  # what the head reads, not what the ReLU does
        assert (found.labels is None) == (each == "dead leaves")
        if found.labels is not None:
            assert torch.equal(found.labels, expected.labels)
        kept[each] = found
    assert {path.name for path in (cache / "outliers" / name).iterdir()} == {"familiar", "noise-0.25", "dead-leaves"}

    for function in ("pictures", "model", "head"):  # complete, so that nothing is made again
        monkeypatch.setattr(outliers_setting, function, None)
    for each, found in kept.items():
        assert torch.equal(features(name, each, data, cache).activations, found.activations)


def test_features_continue(data, monkeypatch):
    cache, whole = data / "cache", penult.extract

    def stopped(tap, loader, **options):
        def some():
            yield from loader[:2]
            raise KeyboardInterrupt

        return whole(tap, some(), shard_size=1, **options)

    monkeypatch.setattr(penult, "extract", stopped)
    with pytest.raises(KeyboardInterrupt):
        features("mnist-relu-1", FAMILIAR, data, cache)
    monkeypatch.setattr(penult, "extract", partial(whole, shard_size=1))
    found = features("mnist-relu-1", FAMILIAR, data, cache)
    assert torch.equal(found.labels, pictures("mnist", FAMILIAR, data).labels)
    images = pictures("mnist", FAMILIAR, data).images
    torch.testing.assert_close(found.logits, model("mnist-relu-1", data, cache)(images))


# --- the command line ---------------------------------------------------------------------------------------


def test_command(data, capsys):
    names = ("mnist-relu-8", "cifar-resnet32")
    arguments = ["--data", str(data), "--cache", str(data / "cache"), "--threads", str(torch.get_num_threads())]
    assert outliers_setting.main([*arguments, *(part for name in names for part in ("--only", name))]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(1 + len(sets(name)) for name in names)
    assert lines[0].startswith("mnist-relu-8: weights after")
    assert lines[1].split()[:2] == ["mnist-relu-8", FAMILIAR]
    test = features("mnist-relu-8", FAMILIAR, data, data / "cache")[halves(32)[1]]
    right = float((test.predicted == test.labels).double().mean())
    assert float(lines[1].split()[-1]) == pytest.approx(100 * right, abs=0.01)
    assert float(lines[1].split()[2]) == pytest.approx(float(test.logits.softmax(1).amax(1).mean()), abs=1e-4)


def test_help(capsys):
    with pytest.raises(SystemExit) as outcome:
        outliers_setting.main(["--help"])
    assert outcome.value.code == 0
    assert "python benchmarks/outliers_setting.py" in capsys.readouterr().out


def test_the_small_network_has_eight_rows():
    made = NETWORKS["cifar-small-8"].build()
    assert isinstance(made[-1], nn.Linear)
    assert made[-1].weight.shape == (8, 128)
