import io
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import generate_colour
import generate_setting
import networks
import penult
from generate_setting import (
    KINDS,
    ROWS,
    SETTINGS,
    SHARES,
    Pictures,
    accuracy,
    activations,
    as_mnist,
    classifier,
    classifier_net,
    evaluator,
    evaluator_net,
    few,
    few_classifier,
    pictures,
)
from penult.data import parquet

MNIST, USPS, CIFAR = SETTINGS["mnist"], SETTINGS["mnist-usps"], SETTINGS["cifar10"]
SMALL = {
    "mnist": {
        "classifier": range(40),
        "generator": range(40, 150),
        "evaluator": range(150, 170),
        "held-out": range(170, 175),
        "selection": range(175, 180),
    },
    "usps": {"generator": range(200), "evaluator": range(200, 220), "selection": range(220, 230)},
    "cifar10": {
        "generator": range(110),
        "evaluator": range(110, 130),
        "held-out": range(130, 135),
        "selection": range(135, 140),
    },
}
SIZES = {"mnist": (28, 28), "usps": (16, 16), "cifar10": (32, 32, 3)}  # of pictures in the files


def drawn(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder, name, split, count, seed):
    pa, image = pytest.importorskip("pyarrow"), pytest.importorskip("PIL.Image")
    table = []
    for number, picture in enumerate((drawn(seed, count, *SIZES[name]) * 255).byte()):
        image.fromarray(picture.numpy()).save(png := io.BytesIO(), "png")
        table.append({"image": {"bytes": png.getvalue()}, "label": number % 10})
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(table), folder / f"{name}-{split}.parquet")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of small training files and published networks, without test files; shares and training are as small."""
    for name, rows in SMALL.items():
        monkeypatch.setitem(ROWS, name, rows)
    monkeypatch.setattr(generate_setting, "EPOCHS", 2)
    monkeypatch.setattr(generate_setting, "FEW_EPOCHS", 2)
    monkeypatch.setattr(generate_setting, "EVALUATOR_EPOCHS", 2)
    monkeypatch.setattr(generate_colour, "EPOCHS", 2)
    write(tmp_path, "mnist", "train", 185, seed=0)
    write(tmp_path, "usps", "train", 230, seed=1)
    write(tmp_path, "cifar10", "train", 145, seed=2)
    for seed, name in enumerate(CIFAR.published):
        small = replace(networks.NETWORKS[name], build=partial(networks.ResNet, 1))
        monkeypatch.setitem(networks.NETWORKS, name, small)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = small.build().state_dict()
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        save_file(state, tmp_path / f"{name.replace('-', '10-')}.safetensors")
    return tmp_path


def alike(one, other):
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))


# --- shares -------------------------------------------------------------------------------------------------


def test_rows_are_disjoint_and_sized_as_told():
    sizes = {name: {share: len(rows) for share, rows in shares.items()} for name, shares in ROWS.items()}
    assert sizes == {
        "mnist": {
            "classifier": 20_000,
            "generator": 20_000,
            "evaluator": 10_000,
            "held-out": 6_000,
            "selection": 4_000,
        },
        "usps": {"generator": 4_200, "evaluator": 2_400, "selection": 691},
        "cifar10": {"generator": 20_000, "evaluator": 20_000, "held-out": 6_000, "selection": 4_000},
    }
    for name, count in {"mnist": 60_000, "usps": 7_291, "cifar10": 50_000}.items():
        assert sorted(row for rows in ROWS[name].values() for row in rows) == list(range(count))


@pytest.mark.parametrize("setting", [MNIST, CIFAR], ids=["mnist", "cifar10"])
def test_shares(setting, data):
    images, labels, _ = parquet(data / f"{setting.name}-train.parquet").load()
    for share, rows in SMALL[setting.name].items():
        found = pictures(setting, share, data)
        assert found.images.shape == (len(rows), *setting.shape)
        assert torch.equal(found.images, images[list(rows)])
        assert torch.equal(found.labels, labels[list(rows)])
        assert pictures(setting, share, data) is found
    assert (pictures(setting, "classifier", data) is None) == (setting is CIFAR)


def test_shares_of_usps(data):
    images, labels, _ = parquet(data / "usps-train.parquet").load()
    expected = as_mnist(images)
    seen = []
    for share, rows in SMALL["usps"].items():
        found = pictures(USPS, share, data)
        assert found.images.shape == (len(rows), *USPS.shape)
        same = (found.images[:, None] == expected).flatten(2).all(2)  # which row is which
        assert torch.equal(same.sum(1), torch.ones(len(rows), dtype=torch.long))
        seen += (numbers := same.long().argmax(1)).tolist()
        assert torch.equal(found.labels, labels[numbers])
    assert sorted(seen) == list(range(230))
    assert seen != sorted(seen)
    assert pictures(USPS, "held-out", data) is None
    assert pictures(USPS, "classifier", data) is pictures(MNIST, "classifier", data)


def test_test_pictures_are_loaded_only_when_asked_for(data):
    for setting in SETTINGS.values():
        for share in SHARES[:-1]:
            pictures(setting, share, data)  # there is no test file yet
        with pytest.raises(FileNotFoundError):
            pictures(setting, "test", data)
        write(data, setting.target, "test", 13, seed=3)
        images, labels, _ = parquet(data / f"{setting.target}-test.parquet").load()
        found = pictures(setting, "test", data)
        assert torch.equal(found.images, images if setting is CIFAR else as_mnist(images))
        assert torch.equal(found.labels, labels)


def test_bad_shares(data, monkeypatch):
    with pytest.raises(ValueError, match="must be one of classifier, generator"):
        pictures(MNIST, "validation", data)
    monkeypatch.setitem(ROWS["mnist"], "selection", range(175, 186))
    with pytest.raises(ValueError, match="which has 185"):
        pictures(MNIST, "selection", data)


def test_geometry():
    images = 0.2 + 2 * drawn(3, 5, 1, 16, 16)
    found = as_mnist(images)
    assert found.shape == (5, 1, 28, 28)
    content = found[..., 4:24, 4:24].clone()
    assert float(content.min()) >= 0.2
    assert float(content.max()) > 2  # nothing is clipped
    found[..., 4:24, 4:24] = 0
    assert int(found.count_nonzero()) == 0
    # linear in each direction between the centres of pixels, and constant outside of them
    place = (0.8 * (torch.arange(20) + 0.5) - 0.5).clamp(0, 15)
    weights = (1 - (place[:, None] - torch.arange(16)).abs()).clamp(min=0)
    torch.testing.assert_close(content, weights @ images @ weights.T)
    mnist = drawn(4, 2, 1, 28, 28)
    assert torch.equal(as_mnist(mnist), mnist)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_few(setting, data):
    share, found = pictures(setting, "generator", data), few(setting, 0, data)
    assert found.labels.bincount().tolist() == [10] * 10
    same = (found.images[:, None] == share.images).flatten(2).all(2)  # which picture of the share is which
    rows = same.long().argmax(1)
    assert torch.equal(same.sum(1), torch.ones(100, dtype=torch.long))
    assert rows.unique().numel() == 100
    assert torch.equal(found.labels, share.labels[rows])
    assert not torch.equal(found.images, few(setting, 1, data).images)
    assert few(setting, 0, data, 3).labels.bincount().tolist() == [3] * 10
    with pytest.raises(ValueError, match="fewer than 30"):
        few(setting, 0, data, 30)


# --- networks -----------------------------------------------------------------------------------------------


def test_the_head_of_the_colour_evaluator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = generate_colour.evaluator_net().eval()
    head = penult.find_head(model, drawn(5, 16, *CIFAR.shape))
    assert (head.num_classes, head.in_features) == (10, 128)
    assert head.certificate.rectified


@pytest.mark.parametrize("kind", [*KINDS, "evaluator"])
def test_heads(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (evaluator_net() if kind == "evaluator" else classifier_net(kind)).eval()
    head = penult.find_head(model, drawn(5, 16, 1, 28, 28))
    assert (head.num_classes, head.in_features) == (10, 64)
    assert head.certificate.rectified == (kind != "linear")
    assert head.certificate.support == ("reals" if kind == "linear" else "orthant")
    assert isinstance(model[-1], nn.Linear)


def test_bad_kind():
    with pytest.raises(ValueError, match="must be one of relu, linear"):
        classifier_net("tanh")


NETWORKS = {
    "relu": lambda data, cache: classifier(MNIST, 1, data, cache),
    "linear": lambda data, cache: classifier(USPS, 1, data, cache, "linear"),
    "few": lambda data, cache: few_classifier(USPS, 1, data, cache),
    "mnist": lambda data, cache: evaluator(MNIST, data, cache),
    "usps": lambda data, cache: evaluator(USPS, data, cache),
    "cifar10": lambda data, cache: evaluator(CIFAR, data, cache),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_training(name, data, monkeypatch):
    state = torch.random.get_rng_state()
    made = NETWORKS[name](data, data / "one")
    assert torch.equal(state, torch.random.get_rng_state())
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert isinstance(made[-1], nn.Linear)
    torch.manual_seed(7)  # of no consequence
    assert alike(made, NETWORKS[name](data, data / "two"))
    (path,) = (data / "one").iterdir()
    tensors = penult.io.read(path, kind="benchmark-network").tensors
    assert all(torch.equal(tensors[key], value) for key, value in made.state_dict().items())

    # found there the next time
    monkeypatch.setattr(generate_setting, "_train", None)
    monkeypatch.setattr(generate_colour, "train", None)
    for function in (classifier, few_classifier, evaluator):
        function.cache_clear()
    again = NETWORKS[name](data, data / "one")
    assert again is not made
    assert alike(made, again)
    assert not again.training
    torch.random.set_rng_state(state)


def test_seeds_and_kinds_have_weights_of_their_own(data):
    first = classifier(MNIST, 0, data, data / "cache")
    assert classifier(MNIST, 0, data, data / "cache") is first
    assert not alike(first, classifier(MNIST, 1, data, data / "cache"))
    assert not alike(first, classifier(MNIST, 0, data, data / "cache", "linear"))
    assert alike(first, classifier(USPS, 0, data, data / "cache"))
    assert not alike(evaluator(MNIST, data, data / "cache"), evaluator(USPS, data, data / "cache"))
    assert len(list((data / "cache").iterdir())) == 5


def test_classifiers_of_cifar10_are_published(data):
    images = pictures(CIFAR, "selection", data).images
    for seed, name in enumerate(CIFAR.published):
        made = classifier(CIFAR, seed, data, data / "cache")
        assert classifier(CIFAR, seed, data, data / "cache") is made
        assert not made.training
        assert not any(parameter.requires_grad for parameter in made.parameters())
        torch.testing.assert_close(made(images), networks.model(name, data, data)(images).detach())
    assert not alike(*(classifier(CIFAR, seed, data, data / "cache") for seed in (0, 1)))
    assert not (data / "cache").exists()  # nothing to keep
    for seed, kind in ((0, "linear"), (2, "relu"), (-1, "relu")):
        with pytest.raises(ValueError, match=f"no {kind} classifier {seed} of cifar10"):
            classifier(CIFAR, seed, data, data, kind)
    with pytest.raises(ValueError, match="cifar10 has no few-label classifier"):
        few_classifier(CIFAR, 0, data, data)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_trained_classifiers(kind, data):
    found = activations(USPS, "selection", 1, data, data / "cache", kind)
    model, images = classifier(USPS, 1, data, data / "cache", kind), pictures(USPS, "selection", data).images
    torch.testing.assert_close(found.activations, model[:6](images))  # before the ReLU, if there is one
    torch.testing.assert_close(found.logits, model(images))
    assert float(found.activations.min()) < 0
    assert found.labels is None
    assert len(list((data / "cache").iterdir())) == 1  # the weights
    with pytest.raises(ValueError, match="mnist-usps has no held-out share"):
        activations(USPS, "held-out", 1, data, data)


def test_activations_of_published_classifiers_are_kept(data):
    found = [activations(CIFAR, "generator", seed, data, data / "cache") for seed in (0, 1)]
    images = pictures(CIFAR, "generator", data).images
    for seed, acts in enumerate(found):
        assert acts.activations.shape == (110, 64)
        assert float(acts.activations.min()) >= 0  # pooled after the ReLU
        torch.testing.assert_close(acts.logits, classifier(CIFAR, seed, data, data)(images))
    assert sorted(path.name for path in (data / "cache").iterdir()) == [
        "generate-cifar-resnet32-generator",
        "generate-cifar-resnet44-generator",
    ]
    stamps = {path: path.stat().st_mtime_ns for path in (data / "cache").rglob("*.safetensors")}
    again = activations(CIFAR, "generator", 1, data, data / "cache")
    assert torch.equal(again.activations, found[1].activations)
    assert stamps == {path: path.stat().st_mtime_ns for path in (data / "cache").rglob("*.safetensors")}


def test_training_learns_and_accuracy_counts():
    labels = torch.arange(40) % 4
    images = 0.1 * drawn(6, 40, 1, 28, 28)
    for image, y in zip(images, labels.tolist(), strict=True):
        image[0, 7 * y : 7 * y + 7] += 0.9
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = classifier_net()
    generate_setting._train(model, Pictures(images, labels), seed=0, epochs=25)
    assert accuracy(model, Pictures(images, labels)) == 1
    assert accuracy(model, Pictures(images, torch.where(torch.arange(40) < 10, labels + 1, labels))) == 0.75


def test_training_in_colour_learns():
    labels = torch.arange(20) % 4
    images = 0.1 * drawn(6, 20, *CIFAR.shape)
    for image, y in zip(images, labels.tolist(), strict=True):
        image[y % 3, 16 * (y // 3) :] += 0.9
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = generate_colour.evaluator_net()
    generate_colour.train(model, Pictures(images, labels))
    assert accuracy(model.eval(), Pictures(images, labels)) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_shifts(channels):
    images = torch.zeros(200, channels, 28, 28)
    images[:, :, 10, 15] = torch.arange(1.0, 200 * channels + 1).view(200, channels)
    found = generate_colour.shifted(images, 2, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert torch.equal(found.sum((2, 3)), images.sum((2, 3)))  # every picture is still there, in its place
    assert bool((found.count_nonzero(1) % channels == 0).all())  # channels move together
    places = {tuple(place) for place in found[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(i, j) for i in range(8, 13) for j in range(13, 18)}
    images[:] = 1
    dark = 784 - generate_colour.shifted(images, 2, torch.Generator().manual_seed(0))[:, 0].sum((1, 2))
    assert float(dark.max()) == 2 * 28 + 2 * 28 - 4  # over black


def test_flips():
    images = drawn(7, 200, 3, 4, 5)
    found = generate_colour._flipped(images, torch.Generator().manual_seed(0))
    kept, turned = ((found == each).flatten(1).all(1) for each in (images, images.flip(3)))
    assert bool((kept ^ turned).all())
    assert 60 < int(turned.sum()) < 140


# --- the command line ---------------------------------------------------------------------------------------


def test_command(data, capsys):
    threads = torch.get_num_threads()
    arguments = ["--data", str(data), "--cache", str(data / "cache"), "--threads", str(threads)]
    assert generate_setting.main([*arguments, "--only", "mnist"]) == 0  # without any test file
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["setting", "network", "generator", "selection", "s"]
    assert [line.split()[0] for line in lines] == ["mnist"] * 7
    assert len(list((data / "cache").iterdir())) == 7
    for name in SIZES:
        write(data, name, "test", 5, seed=3)
    assert generate_setting.main([*arguments, "--test"]) == 0
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["test", "s"]
    assert len(lines) == 17
    assert [line.split()[1:-4] for line in lines[-3:]] == [
        ["classifier", "relu", "0"],
        ["classifier", "relu", "1"],
        ["evaluator"],
    ]
    assert len(list((data / "cache").iterdir())) == 11


def test_help(capsys):
    with pytest.raises(SystemExit) as outcome:
        generate_setting.main(["--help"])
    assert outcome.value.code == 0
    assert "python benchmarks/generate_setting.py" in capsys.readouterr().out
