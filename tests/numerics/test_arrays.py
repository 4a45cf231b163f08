"""Arrays of NumPy and of other libraries in place of tensors: the same numbers, and a TypeError for other types."""

import warnings

import numpy as np
import pytest
import torch

import penult
from penult import Activations, Head
from penult._checks import as_activations
from penult.scores import KNN, Composite, Mahalanobis, Threshold, ViM, density, directional, energy, max_logit, msp

K, D, N = 3, 5, 120
GENERATOR = torch.Generator().manual_seed(0)
HEAD = Head(torch.randn(K, D, generator=GENERATOR), torch.randn(K, generator=GENERATOR))
PAIR = penult.GenerativePair(HEAD)
H = torch.randn(N, D, generator=GENERATOR) + 1
Y = torch.arange(N) % K
NOISY = torch.where(torch.arange(N) % 2 == 0, H[:, :K].argmax(1), Y)


class Exported:
    """An array of a library that torch knows through DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Frame:
    """A table of a library that NumPy knows through ``__array__`` alone."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


KINDS = {
    "array": lambda h: h,
    "columns first": np.asfortranarray,
    "reversed": lambda h: np.ascontiguousarray(h[::-1])[::-1],
    "every second": lambda h: np.repeat(h, 2, axis=0)[::2],
    "bytes of another machine": lambda h: h.astype(h.dtype.newbyteorder()),
    "read only": frozen,
    "DLPack": Exported,
    "frame": Frame,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_tensor(kind):
    assert torch.equal(as_activations(KINDS[kind](H.numpy())), H)


def test_arrays_are_not_copied():
    assert as_activations(H.numpy()).data_ptr() == H.data_ptr()
    assert as_activations(Exported(H.numpy())).data_ptr() == H.data_ptr()


FUNCTIONS = {
    "head": HEAD,
    "head.centered_logits": HEAD.centered_logits,
    "posterior": lambda h: PAIR.posterior(h).logits,
    "log_prob": PAIR.log_prob,
    "log_joint": PAIR.log_joint,
    **{f.__name__: lambda h, f=f: f(PAIR, h) for f in (density, directional, energy, max_logit, msp)},
    "Composite": Composite.fit(HEAD, H),
    "Mahalanobis": Mahalanobis.fit(H, Y),
    "KNN": KNN.fit(H, k=3),
    "Threshold": Threshold.fit(energy, H, pair=PAIR),
    "p_value": Threshold.fit(energy, H, pair=PAIR).p_value,
    "Threshold of scores": lambda h: Threshold(lambda s: s, h[:, 0]).calibration,
    "Sphere.fit": lambda h: penult.Sphere.fit(HEAD, h).radius,
    "Gaussian.fit": lambda h: penult.Gaussian.fit(HEAD, h).loc,
    "Marginal.fit": lambda h: penult.Marginal.fit(HEAD, h, components=2).distribution.loc,
    "PrincipalMixture.fit": lambda h: penult.distributions.PrincipalMixture.fit(h, 2, 2).loc,
    "Composite.fit": lambda h: Composite.fit(HEAD, h).means,
    "Mahalanobis.fit": lambda h: Mahalanobis.fit(h, Y.numpy()).means,
    "ViM.fit": lambda h: ViM.fit(Head(HEAD.weight, HEAD.full_bias + 9), h, dims=2).alpha,
    "estimate_prior": lambda h: PAIR.estimate_prior(h, iterations=3).probs,
    "targets": lambda h: penult.distill.targets(PAIR, Y.numpy(), activations=h),
    "Gate.fit": lambda h: penult.distill.Gate.fit(PAIR, h, Y.numpy())(h),
    "Activations": lambda h: Activations(h, h[:, :K], Y.numpy()).activations,
    "calibrate": lambda h: HEAD.calibrate(h[:, :K], NOISY).weight,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_in_and_tensors_out(name):
    function = FUNCTIONS[name]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the base .* was not fitted to activations")
        expected, result = function(H), function(H.numpy())
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, expected)


WRONG = {
    "list": H[:4].tolist(),
    "masked": np.ma.array(H.numpy(), mask=H.numpy() < 0),
    "text": np.full((4, D), "a"),
    "objects": np.full((4, D), None),
    "integers": np.ones((4, D), dtype=np.int64),
    "complex": np.ones((4, D), dtype=np.complex64),
    "integer tensor": torch.ones(4, D, dtype=torch.int32),
    "nothing": None,
    "string": "h.npy",
    "mapping": {"h": H},
}
ENTRIES = {name: FUNCTIONS[name] for name in ("head", "log_prob", "energy", "directional", "KNN", "Sphere.fit")}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("kind", WRONG)
def test_other_types_are_refused(name, kind):
    with pytest.raises(TypeError, match=r"(h|activations) is a .*; expected a floating-point tensor or array.* Pass"):
        ENTRIES[name](WRONG[kind])


def test_a_set_of_activations_is_no_tensor():
    acts = Activations(H, HEAD(H))
    with pytest.raises(TypeError, match=r"h is a Activations; expected .* Pass h.activations"):
        PAIR.log_prob(acts)


def test_the_precision_of_an_array_is_not_changed():
    assert PAIR.log_prob(H.double().numpy()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"h is torch.float64; expected torch.float32. Use torch.as_tensor"):
        HEAD(H.double().numpy())
