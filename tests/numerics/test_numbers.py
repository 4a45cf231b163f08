"""Numbers of other kinds, such as those of NumPy, are the same as Python's own, in results and in files."""

import json
from fractions import Fraction

import numpy
import pytest
import torch

import penult
from penult import io
from penult._checks import check_between, check_integer, check_not_negative, check_positive, check_seed, check_shares
from penult.data import shift
from penult.distill import class_soft_targets
from penult.realism import two_sample_auc
from penult.scores import KNN, Threshold


@pytest.fixture
def head():
    return penult.Head(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def h():
    return torch.randn(120, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", [numpy.int64, numpy.uint8, numpy.int16])
def test_checks_return_pythons_integers(kind):
    assert type(check_integer("count", kind(5))) is type(check_seed(kind(5))) is int
    assert check_integer("count", kind(5)) == check_seed(kind(5)) == 5


@pytest.mark.parametrize("kind", [numpy.float32, numpy.float64, Fraction])
def test_checks_return_pythons_floats(kind):
    for check in (check_positive, check_not_negative, check_between):
        value = check("share", kind(0.5))
        assert type(value) is float
        assert value == 0.5
    assert [type(share) for share in check_shares((kind(0.5), 1 / 4))] == [float, float]


@pytest.mark.parametrize("seed", [True, 1.0, "1", None, numpy.float64(1)])
def test_a_seed_is_an_integer(seed, head, h):
    for call in (penult.Activations(h, head(h)).split, lambda x, seed: penult.Marginal.fit(head, h, seed=seed)):
        with pytest.raises(TypeError, match=r"^seed is .*expected an integer"):
            call(0.5, seed=seed)


@pytest.mark.parametrize("kind", [numpy.int64, numpy.uint16, numpy.int8])
def test_numpys_integers_give_the_same_results(kind, head, h):
    acts, pair = penult.Activations(h, head(h)), penult.GenerativePair(head)
    x, other = torch.rand(2, 1, 8, 8), h + 1
    for function in (
        lambda n: acts.split(0.5, 0.5, seed=n(7))[0].activations,
        lambda n: next(acts.batches(n(7))).activations,
        lambda n: penult.Marginal.fit(head, h, components=n(2), dims=n(3), seed=n(7)).distribution.loc,
        lambda n: penult.Sphere.fit(head, h, radii=n(7)).radius,
        lambda n: class_soft_targets(pair, draws=n(20), seed=n(7)),
        lambda n: KNN.fit(h, k=n(7)).score(h),
        lambda n: shift(x, "noise", 0.5, seed=n(7), first=n(3)),
        lambda n: torch.tensor(list(two_sample_auc(h, other, ("knn",), seed=n(7)).values())),
    ):
        assert torch.equal(function(kind), function(int))


def test_numpys_numbers_can_be_saved(head, h, tmp_path):
    scaled, scale = penult.Head(head.weight, norm="layer").rescaled(numpy.float32(0.5))
    assert type(scale) is type(scaled.radius) is float
    base = penult.Marginal.fit(scaled, h, components=numpy.int32(2), seed=numpy.int64(3))
    again = penult.load(penult.GenerativePair(scaled, base).save(tmp_path / "a.safetensors"))
    assert again.head.radius == scaled.radius
    acts = penult.Activations(h, head(h), class_names=numpy.array(["a", "b", "c"]))
    assert acts.save(tmp_path / "acts", shard_size=numpy.int64(640)).class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (numpy.int8(3), 3),
        (numpy.float32(0.5), 0.5),
        (numpy.bool_(True), True),
        (numpy.array(7), 7),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(False), False),
        (Fraction(1, 4), 0.25),
        ([numpy.uint64(2**63)], [2**63]),
    ],
)
def test_metadata_may_hold_numbers_of_other_kinds(value, expected, tmp_path):
    metadata = io.read(io.write(tmp_path / "a", {}, "note", {"value": value})).metadata
    assert metadata == {"value": expected}
    assert json.dumps(metadata["value"]) == json.dumps(expected)


@pytest.mark.parametrize("value", [numpy.float32("nan"), torch.tensor(torch.inf)])
def test_metadata_may_not_hold_other_kinds_of_nan(value, tmp_path):
    with pytest.raises(ValueError, match="without NaN"):
        io.write(tmp_path / "a", {}, "note", {"value": value})


@pytest.mark.parametrize("value", [numpy.zeros(2), torch.zeros(2), object(), 1j])
def test_metadata_may_not_hold_other_objects(value, tmp_path):
    with pytest.raises(TypeError, match="metadata must be made of JSON values"):
        io.write(tmp_path / "a", {}, "note", {"value": value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_p_values_do_not_depend_on_the_default_dtype(dtype):
    threshold = Threshold(lambda rows: rows[:, 0], torch.arange(999.0), 0.05)
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        p_value = threshold.p_value(torch.tensor([[949.5], [997.5], [-1.0]], dtype=torch.float32))
    finally:
        torch.set_default_dtype(usual)
    assert p_value.dtype == torch.float32
    torch.testing.assert_close(p_value, torch.tensor([0.05, 0.002, 1.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shares", [([0.8, 0.2],), ((0.5, 0.5),), (torch.tensor([0.5, 0.5]),), ("0.5", 0.5)])
def test_shares_are_numbers(shares, head, h):
    for data in (penult.Activations(h, head(h)), penult.data.Images(torch.rand(4, 1, 2, 2), torch.arange(4), ())):
        with pytest.raises(TypeError, match=r"shares\[0\] is .*one argument each: split"):
            data.split(*shares)
