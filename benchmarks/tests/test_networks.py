import pytest
import torch
from torch import nn

import penult
from networks import NETWORKS, Enlarged, mnist_net

D, K = 64, 10
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
SUPPORTS = {"mnist-linear": "reals"}
SMALL = [name for name in NETWORKS if name != "efficientnet-lite0"]


def built(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name].build().eval()


@pytest.mark.parametrize("name", SMALL)
def test_find_head_finds_the_head(name):
    model = built(name)
    pictures = torch.rand(4, *SHAPES[NETWORKS[name].data], generator=torch.Generator().manual_seed(1))
    head = penult.find_head(model, pictures)
    assert (head.num_classes, head.in_features) == (K, D)
    assert head.certificate.support == SUPPORTS.get(name, "orthant")
    with torch.no_grad():
        h, logits = penult.Tap(model, head)(pictures)
    assert h.shape == (4, D)
    assert logits.shape == (4, K)
    torch.testing.assert_close(logits, model(pictures))


@pytest.mark.parametrize(("name", "layers"), [("cifar-resnet32", 32), ("cifar-resnet44-ft", 44)])
def test_depth(name, layers):
    model = built(name)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == layers
    assert not any(name in model.state_dict() for name in ("mean", "sd"))  # not in the published files


def test_resnet_normalises_by_itself():
    model = built("cifar-resnet32")
    seen = []
    model.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 32, 32))


def test_enlarged_pictures_stay_in_range():
    seen = []
    model = Enlarged(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)))
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    corner = torch.zeros(2, 3, 32, 32)
    corner[..., 16:] = 1  # bicubic interpolation overshoots at an edge
    assert model(corner).shape == (2, 5)
    assert seen[0].shape == (2, 3, 224, 224)
    assert float(seen[0].min()) == -127 / 128
    assert float(seen[0].max()) == 1


def test_mnist_networks_differ_in_the_relu_alone():
    with_relu, without = mnist_net(relu=True).eval(), mnist_net(relu=False).eval()
    without.load_state_dict(with_relu.state_dict())
    pictures = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(with_relu[:-2](pictures).relu(), with_relu[:-1](pictures))
    torch.testing.assert_close(without[:-1](pictures), with_relu[:-2](pictures))
