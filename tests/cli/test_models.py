"""Files of weights that other programs wrote: tied weights, prefixes, and which matrix is the head."""

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from penult.cli._models import _load_weights, load_head


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def blocks():
    """Two blocks that are one module."""
    block = nn.Linear(4, 4)
    return nn.Sequential(block, nn.ReLU(), block, nn.Linear(4, 3))


def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def wrapped(prefix, model):
    """A model whose names all have a prefix."""
    for name in reversed(prefix.split(".")[:-1]):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    return model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("make", [Tied, blocks, plain])
def test_weights_of_save_model(make, tmp_path, capsys):
    model, other = make(), make()
    save_model(model, str(tmp_path / "m.safetensors"))
    _load_weights(other, tmp_path / "m.safetensors")
    assert same(model, other)
    assert capsys.readouterr().err == ""


def test_weights_that_are_not_tied_in_the_model(tmp_path):
    save_model(Tied(), str(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match=r"does not fit the model: missing \['(head|embedding).weight'\]"):
        _load_weights(Tied(tied=False), tmp_path / "m.safetensors")


def test_weights_that_are_not_tied_in_the_file(tmp_path):
    save_file(Tied(tied=False).state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"different tensors for embedding.weight and head.weight, which are one"):
        _load_weights(Tied(), tmp_path / "m.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "net.backbone."])
@pytest.mark.parametrize("make", [Tied, plain])
def test_one_prefix_is_left_out_or_put_before(prefix, make, tmp_path, capsys):
    model, other, third = make(), make(), make()
    save_model(wrapped(prefix, model), str(tmp_path / "long.safetensors"))
    _load_weights(other, tmp_path / "long.safetensors")
    assert same(model, other)
    assert f"the prefix '{prefix}' of all names is left out" in capsys.readouterr().err
    save_model(model, str(tmp_path / "short.safetensors"))
    _load_weights(wrapped(prefix, third), tmp_path / "short.safetensors")
    assert same(model, third)
    assert f"the prefix '{prefix}' of the model is put before" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {f"module.{name}": value for name, value in state.items()} | {"epoch": torch.ones(1)},
        lambda state: {f"module.{name}": value for name, value in [*state.items()][1:]},
        lambda state: {f"{name}.module": value for name, value in state.items()},
        lambda state: {("a." if i % 2 else "b.") + name: value for i, (name, value) in enumerate(state.items())},
        lambda state: {},
    ],
)
def test_other_names_do_not_fit(change, tmp_path):
    model = plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(change(before), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not fit the model: missing"):
        _load_weights(model, tmp_path / "m.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def matrices(*layers):
    return nn.Sequential(*layers).state_dict()


AMBIGUOUS = {
    "a head without a bias": matrices(nn.Linear(6, 5), nn.Linear(5, 3, bias=False)),
    "a head without a bias before a projection": matrices(nn.Linear(6, 3, bias=False), nn.Linear(3, 3)),
    "weight normalisation": matrices(nn.Linear(6, 5), nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))),
    "older weight normalisation": {
        **matrices(nn.Linear(6, 5)),
        "1.weight_g": torch.ones(3, 1),
        "1.weight_v": torch.ones(3, 5),
    },
    "a head of another name": {**matrices(nn.Linear(6, 5)), "classes": torch.ones(3, 5)},
    "only another name": {"classes": torch.ones(3, 5)},
    "two heads": matrices(nn.Linear(6, 5), nn.Linear(6, 5)),
}


@pytest.mark.parametrize("state", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_one_of_several_matrices_is_not_chosen(state, tmp_path):
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"cannot tell which matrix is the head; .*Matrices in the file"):
        load_head(tmp_path / "m.safetensors")


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False)])
def test_the_only_matrix_is_the_head(layer, tmp_path):
    save_file(matrices(nn.Conv2d(1, 5, 1), nn.BatchNorm2d(5), layer), tmp_path / "m.safetensors")
    head = load_head(tmp_path / "m.safetensors")
    assert torch.equal(head.weight, layer.weight)
    assert (head.bias is None) == (layer.bias is None)
