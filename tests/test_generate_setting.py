import io

import pytest
import torch
from torch import nn

import generate_setting
import penult
from generate_setting import (
    KINDS,
    ROWS,
    SETTINGS,
    SHARES,
    Pictures,
    accuracy,
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

MNIST, USPS = SETTINGS["mnist"], SETTINGS["mnist-usps"]
SMALL = {
    "mnist": {
        "classifier": range(40),
        "generator": range(40, 150),
        "evaluator": range(150, 170),
        "held-out": range(170, 175),
        "selection": range(175, 180),
    },
    "usps": {"generator": range(200), "evaluator": range(200, 220), "selection": range(220, 230)},
}


def drawn(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def write(path, count, size, seed):
    pa, image = pytest.importorskip("pyarrow"), pytest.importorskip("PIL.Image")
    table = []
    for number, picture in enumerate((drawn(seed, count, size, size) * 255).byte()):
        image.fromarray(picture.numpy()).save(png := io.BytesIO(), "png")
        table.append({"image": {"bytes": png.getvalue()}, "label": number % 10})
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(table), path)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of small training files, without test files; shares and training are as small."""
    for name, rows in SMALL.items():
        monkeypatch.setitem(ROWS, name, rows)
    monkeypatch.setattr(generate_setting, "EPOCHS", 2)
    monkeypatch.setattr(generate_setting, "FEW_EPOCHS", 2)
    monkeypatch.setattr(generate_setting, "EVALUATOR_EPOCHS", 2)
    write(tmp_path / "mnist-train.parquet", 185, 28, seed=0)
    write(tmp_path / "usps-train.parquet", 230, 16, seed=1)
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
    }
    for name, count in {"mnist": 60_000, "usps": 7_291}.items():
        assert sorted(row for rows in ROWS[name].values() for row in rows) == list(range(count))


def test_shares_of_mnist(data):
    images, labels, _ = parquet(data / "mnist-train.parquet").load()
    for share, rows in SMALL["mnist"].items():
        found = pictures(MNIST, share, data)
        assert torch.equal(found.images, images[list(rows)])
        assert torch.equal(found.labels, labels[list(rows)])
        assert pictures(MNIST, share, data) is found


def test_shares_of_usps(data):
    images, labels, _ = parquet(data / "usps-train.parquet").load()
    expected = as_mnist(images)
    seen = []
    for share, rows in SMALL["usps"].items():
        found = pictures(USPS, share, data)
        assert found.images.shape == (len(rows), 1, 28, 28)
        same = (found.images[:, None] == expected).flatten(2).all(2)  # which row is which
        assert torch.equal(same.sum(1), torch.ones(len(rows), dtype=torch.long))
        seen += (numbers := same.long().argmax(1)).tolist()
        assert torch.equal(found.labels, labels[numbers])
    assert sorted(seen) == list(range(230))
    assert seen != sorted(seen)
    assert pictures(USPS, "held-out", data) is None
    assert pictures(USPS, "classifier", data) is pictures(MNIST, "classifier", data)


def test_test_pictures_are_loaded_only_when_asked_for(data):
    for setting, name, size in ((MNIST, "mnist", 28), (USPS, "usps", 16)):
        for share in SHARES[:-1]:
            pictures(setting, share, data)  # there is no test file yet
        with pytest.raises(FileNotFoundError):
            pictures(setting, "test", data)
        write(data / f"{name}-test.parquet", 13, size, seed=2)
        images, labels, _ = parquet(data / f"{name}-test.parquet").load()
        found = pictures(setting, "test", data)
        assert torch.equal(found.images, as_mnist(images))
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
    "relu": lambda data, cache: classifier(1, data, cache),
    "linear": lambda data, cache: classifier(1, data, cache, "linear"),
    "few": lambda data, cache: few_classifier(USPS, 1, data, cache),
    "mnist": lambda data, cache: evaluator(MNIST, data, cache),
    "usps": lambda data, cache: evaluator(USPS, data, cache),
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
    for function in (classifier, few_classifier, evaluator):
        function.cache_clear()
    again = NETWORKS[name](data, data / "one")
    assert again is not made
    assert alike(made, again)
    assert not again.training
    torch.random.set_rng_state(state)


def test_seeds_and_kinds_have_weights_of_their_own(data):
    assert classifier(0, data, data) is classifier(0, data, data)
    assert not alike(classifier(0, data, data), classifier(1, data, data))
    assert not alike(classifier(0, data, data), classifier(0, data, data, "linear"))
    assert not alike(evaluator(MNIST, data, data), evaluator(USPS, data, data))
    assert len(list(data.glob("*.safetensors"))) == 5


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


def test_shifts():
    images = torch.zeros(200, 1, 28, 28)
    images[:, 0, 10, 15] = torch.arange(1.0, 201)
    found = generate_setting._shifted(images, 2, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert torch.equal(found.sum((1, 2, 3)), torch.arange(1.0, 201))  # every picture is still there, in its place
    places = {tuple(place) for place in found[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(i, j) for i in range(8, 13) for j in range(13, 18)}
    images[:] = 1
    dark = 784 - generate_setting._shifted(images, 2, torch.Generator().manual_seed(0)).sum((1, 2, 3))
    assert float(dark.max()) == 2 * 28 + 2 * 28 - 4  # over black


# --- the command line ---------------------------------------------------------------------------------------


def test_command(data, capsys):
    threads = torch.get_num_threads()
    arguments = ["--data", str(data), "--cache", str(data / "cache"), "--threads", str(threads)]
    assert generate_setting.main([*arguments, "--only", "mnist"]) == 0  # without any test file
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["setting", "network", "generator", "selection", "s"]
    assert [line.split()[0] for line in lines] == ["mnist"] * 7
    assert len(list((data / "cache").iterdir())) == 7
    for name, size in (("mnist", 28), ("usps", 16)):
        write(data / f"{name}-test.parquet", 5, size, seed=2)
    assert generate_setting.main([*arguments, "--test"]) == 0
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["test", "s"]
    assert len(lines) == 14
    assert len(list((data / "cache").iterdir())) == 10


def test_help(capsys):
    with pytest.raises(SystemExit) as outcome:
        generate_setting.main(["--help"])
    assert outcome.value.code == 0
    assert "python benchmarks/generate_setting.py" in capsys.readouterr().out
