"""Model families as people have them: transformers' classifiers, and a real ImageNet network."""

import json
from pathlib import Path

import pytest
import torch

import families
import penult

RESULTS = Path(__file__).parent.parent / "results" / "families.json"
pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's packages warn of is not the subject


def committed():
    return json.loads(RESULTS.read_text(encoding="utf-8"))["sections"]["families"]["cells"]


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_found_or_refused_as_the_table_says(family):
    cell, shown = families.examine(family), committed()[family.name]
    if family.support is None:
        assert cell["refused"] == shown["refused"]
        return
    assert cell["support"] == family.support
    assert cell["residual"] <= 1e-6
    assert cell["confirmed"] <= 1e-6
    assert cell["softmax_error"] <= 1e-6
    rounding = ("residual", "confirmed", "softmax_error")
    assert {k: v for k, v in cell.items() if k not in rounding} == {k: v for k, v in shown.items() if k not in rounding}


def test_the_table_is_whole():
    assert list(committed()) == [family.name for family in families.FAMILIES]


def test_a_refused_family_names_its_reason():
    cells = committed()
    assert "soft cap" in cells["Gemma 2, language model"]["refused"]
    assert "multi_label" in cells["BERT, several labels at once"]["refused"]
    assert "one logit" in cells["BERT, regression"]["refused"]


def test_labels_and_tuples_of_transformers():
    family = next(family for family in families.FAMILIES if family.name == "BERT")
    model, inputs = families.build(family), family.inputs(0)
    labels = torch.tensor([0, 1, 2])
    plain = penult.find_head(model, **inputs)
    for extra in ({"labels": labels}, {"return_dict": False}, {"labels": labels, "return_dict": False}):
        head = penult.find_head(model, **inputs, **extra)
        assert torch.equal(head.weight, plain.weight)


def test_the_real_imagenet_classifier(tmp_path):
    family = next(family for family in families.FAMILIES if "ImageNet" in family.name)
    model, inputs = families.build(family), family.inputs(0)
    head = penult.find_head(model, **inputs)
    certificate = head.certificate
    assert (certificate.path, certificate.shape, certificate.bias) == ("_fc", (1000, 1280), True)
    assert certificate.residual == 0
    assert certificate.support == "box"
    assert head.rank == 999
    h, logits = penult.Tap(model, head)(**family.inputs(1))
    h, logits = h.detach(), logits.detach()
    pair = penult.GenerativePair(head)
    assert torch.allclose(pair.posterior(h).probs, logits.softmax(-1), atol=1e-5)
    wide = penult.GenerativePair(head.clone().double(), penult.Sphere.from_head(head.clone().double()))
    assert (wide.posterior(h.double()).probs - wide.head(h.double()).softmax(-1)).abs().max() < 1e-9
    again = penult.load(pair.save(tmp_path / "lite0.penult.safetensors"))
    assert again.head.certificate == certificate
    assert torch.equal(again.log_prob(h), pair.log_prob(h))
    g = torch.Generator().manual_seed(0)
    drawn = again.given(torch.arange(0, 1000, 100)).sample((20,), generator=g)
    predicted = again.head(drawn).argmax(-1)
    assert (predicted == torch.arange(0, 1000, 100)).double().mean() > 0.8
    fitted = penult.GenerativePair(head, penult.Sphere.fit(head, h, ambient=False))
    assert torch.allclose(fitted.posterior(h).probs, logits.softmax(-1), atol=1e-5)
