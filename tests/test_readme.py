"""The first screen runs, line by line, on a real model."""

import re
from pathlib import Path

import pytest
import torch

import penult
import penult.testing
from penult.data import digits
from penult.demo.networks import DigitsNet

README = Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_code():
    assert len(blocks()) >= 1
    assert "penult.find_head" in blocks()[0]


@pytest.mark.parametrize("code", blocks())
def test_every_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("penult.realism._two_sample._STEPS", 3)
    monkeypatch.setattr("penult.realism._compare._POOL", 300)
    model = DigitsNet().eval()  # which gives its own labels, since it is not trained
    data = digits()
    labels = model(data.images[:300]).argmax(-1)
    names = {
        "model": model,
        "images": data.images[:64],
        "weight": model.fc.weight,
        "bias": model.fc.bias,
        "shifted_loader": [(1 - data.images[:100], labels[:100])],
        "loader": list(zip(data.images[:300].split(100), labels.split(100), strict=True)),
    }
    exec(compile(code, str(README), "exec"), names)
    pair, h = names["pair"], names["h"]
    assert isinstance(pair, penult.GenerativePair)
    assert torch.allclose(pair.posterior(h).probs, pair.head(h).softmax(-1), atol=1e-5)
    assert (tmp_path / "resnet.penult.safetensors").exists()


def test_every_name_in_the_table_exists():
    table = README.read_text().split("## Features")[1].split("##")[0]
    for name in re.findall(r"`((?:[A-Z]\w+|penult\.)[\w.]*)", table):
        parts = name.removeprefix("penult.").split(".")
        found = penult.testing if parts[0] == "testing" else penult
        parts = [part for part in parts if part != "testing"]
        for part in parts:
            found = getattr(found, part)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
