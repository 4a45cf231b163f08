"""Labels and indices of every integer dtype mean what the same int64 numbers mean, in each place that takes them."""

import numpy as np
import pytest
import torch

import penult
from penult import GenerativePair, Head, Sphere, distill, scores
from penult.activations import Activations, _ActivationSource
from penult.distributions import Bank

NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32]
NARROW += [getattr(torch, name) for name in ("uint16", "uint32", "uint64") if hasattr(torch, name)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


HEAD = Head(torch.randn(5, 4, generator=seeded()), torch.randn(5, generator=seeded(1)))
PAIR = GenerativePair(HEAD, Sphere(torch.tensor([1.0, 2.0])))
H, Y = PAIR.sample((250,), generator=seeded(2))
BASES = {
    "sphere": Sphere(torch.tensor([1.0, 2.0])),
    "gaussian": penult.Gaussian.fit(HEAD, H),
    "bank": penult.Marginal(HEAD, Bank(H)),
}


def of_activations(y):
    acts = Activations(H, HEAD(H), y)
    return acts.labels, HEAD.weight[acts.labels], acts[acts.labels].activations


def fitted_state(fit):
    return lambda y: tuple(fit(y).state_dict().values())


ENTRIES = {
    "given": lambda y: PAIR.given(y).mean,
    "given, two axes": lambda y: PAIR.given(y.reshape(2, -1)).log_prob(H.reshape(2, -1, 4)),
    "samples of classes": lambda y: PAIR.given(y).sample((2,), seeded()),
    "centered rows": HEAD.centered_weight,
    "activations": of_activations,
    "rows of activations": lambda y: Activations(H, HEAD(H))[y].activations,
    "calibrate": lambda y: HEAD.calibrate(HEAD(H), y, biases=True).full_bias,
    "mahalanobis": fitted_state(lambda y: scores.Mahalanobis.fit(H, y)),
    "relative mahalanobis": fitted_state(lambda y: scores.RelativeMahalanobis.fit(H, y)),
    "source of rows, as realism reads them": lambda y: _ActivationSource(H, HEAD, labels=y).labels,
    "targets": lambda y: distill.targets(PAIR, y, activations=H),
    "hints": lambda y: distill.targets(PAIR, y, "hinted", activations=H),
    "gate": lambda y: distill.Gate.fit(PAIR, H, y)(H, y),
    "target data set": lambda y: torch.tensor([item[1] for item in distill.TargetDataset(H, H, y)]),
    "soft loss": lambda y: distill.SoftTargetLoss(2.0, 0.5)(HEAD(H), y, HEAD(H).softmax(-1)),
}
for kind, base in BASES.items():
    ENTRIES[f"draw of a {kind}"] = lambda y, base=base: base.draw(HEAD.centered_weight(), y, seeded())


@pytest.mark.parametrize("entry", ENTRIES)
def test_labels_of_every_integer_dtype_mean_the_same(entry):
    torch.manual_seed(0)
    wanted = ENTRIES[entry](Y)
    for dtype in NARROW:
        torch.manual_seed(0)
        torch.testing.assert_close(ENTRIES[entry](Y.to(dtype)), wanted, rtol=0, atol=0)


def test_labels_beyond_the_range_of_a_narrow_dtype_are_counted_in_a_wide_one():
    head = Head(torch.eye(200))
    y = torch.tensor([3, 199, 130], dtype=torch.uint8)
    assert torch.equal(GenerativePair(head, Sphere(1.0)).given(y).weight, head.centered_weight(y.long()))
    base = Sphere(torch.linspace(1, 2, 50))
    samples = [base.draw(head.centered_weight(), index, seeded()) for index in (y, y.long())]
    assert torch.equal(*samples)


def test_labels_of_numpy_and_of_python():
    wanted = PAIR.given(Y[:3]).mean
    for y in (Y[:3].numpy().astype(np.uint8), Y[:3].numpy().astype(np.uint16), Y[:3].tolist()):
        assert torch.equal(PAIR.given(y).mean, wanted)


@pytest.mark.parametrize("entry", ["given", "activations", "calibrate", "mahalanobis", "targets", "gate", "soft loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_no_integers_are_refused(entry, dtype):
    with pytest.raises(TypeError, match="expected a tensor of integer class indices"):
        ENTRIES[entry]((Y > 2).to(dtype))
