import pytest
import torch

import penult
from penult.distributions import Bank
from penult.testing import check_distribution


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_contract():
    check_distribution(Bank(torch.randn(50, 3, generator=seeded())))


def test_moments():
    x = torch.randn(50, 3, generator=seeded())
    bank = Bank(x)
    torch.testing.assert_close(bank.mean, x.mean(0))
    torch.testing.assert_close(bank.variance, x.var(0, correction=0))
    assert bank.expand((2, 5)).sample((4,)).shape == (4, 2, 5, 3)
    assert bank.activations.data_ptr() == x.data_ptr()
    assert (len(bank), bank.num_parameters) == (50, 150)


def test_without_replacement_each_row_comes_once():
    x = torch.randn(50, 3, generator=seeded())
    drawn = Bank(x, replacement=False).sample((50,), generator=seeded(1))
    assert torch.equal(drawn[drawn[:, 0].argsort()], x[x[:, 0].argsort()])
    assert not torch.equal(drawn, x)
    with pytest.raises(ValueError, match="samples without replacement is 51"):
        Bank(x, replacement=False).sample((51,))


def test_each_row_is_as_likely():
    index = torch.arange(5.0).unsqueeze(-1)
    counts = Bank(index).sample((10_000,), generator=seeded()).flatten().long().bincount()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 25  # chi-square with 4 degrees of freedom, p = 5e-5


def test_rectified_rows_are_drawn_as_their_positive_part():
    u = torch.randn(50, 3, generator=seeded())
    bank, after = Bank(u, rectified=True), Bank(u.clamp_min(0))
    assert bank.activations.data_ptr() == u.data_ptr()
    assert torch.equal(bank.rows, u.clamp_min(0))
    assert torch.equal(Bank(u).rows, u)
    assert torch.equal(bank.sample((7, 2), generator=seeded(1)), after.sample((7, 2), generator=seeded(1)))
    torch.testing.assert_close(bank.mean, after.mean)
    torch.testing.assert_close(bank.variance, after.variance)
    assert float(u.min()) < 0  # the rows are left as they are
    drawn = Bank(u, replacement=False, rectified=True).sample((50,), generator=seeded(1))
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, u.clamp_min(0).tolist()))
    check_distribution(bank)


def test_rectification_is_told_and_kept():
    u = torch.randn(50, 3, generator=seeded())
    bank = Bank(u, rectified=True)
    wide = bank.expand((2, 5))
    assert wide.rectified
    assert wide.replacement
    assert wide.activations is bank.activations
    assert wide.sample((4,)).shape == (4, 2, 5, 3)
    assert float(wide.sample((4,)).min()) == 0
    assert wide.mean.shape == (2, 5, 3)
    assert not Bank(u).expand((2,)).rectified
    assert repr(bank) == "Bank(50 rows of dimension 3, rectified)"
    assert repr(Bank(u[:1], False, True)) == "Bank(1 row of dimension 3, rectified, without replacement)"


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("replacement", [True, False])
def test_options_go_through_files(tmp_path, rectified, replacement):
    u = torch.randn(200, 3, generator=seeded())
    head = penult.Head(torch.eye(3))
    pair = penult.GenerativePair(head, penult.Marginal(head, Bank(u, replacement, rectified)))
    again = penult.load(pair.save(tmp_path / "bank.penult.safetensors"))
    law = again.base.distribution
    assert (law.replacement, law.rectified) == (replacement, rectified)
    assert torch.equal(law.activations, u)
    assert torch.equal(again.prior.probs, pair.prior.probs)
    y = torch.arange(3).repeat(10)
    drawn, expected = (each.given(y).sample(generator=seeded(1)) for each in (again, pair))
    assert torch.equal(drawn, expected)
    assert (float(drawn.min()) == 0) is rectified


@pytest.mark.usefixtures("validation")
def test_bad_input():
    with pytest.raises(ValueError, match="no density"):
        Bank(torch.eye(2)).log_prob(torch.zeros(2))
    with pytest.raises(TypeError, match="floating"):
        Bank(torch.eye(2).long())
    with pytest.raises(ValueError, match="expected"):
        Bank(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="1 of 2 rows of activations hold NaN"):
        Bank(torch.tensor([[1.0], [torch.nan]]))


@pytest.mark.parametrize("shape", [(-2,), (3, -1)])
def test_impossible_batch_shapes_are_refused(shape):
    with pytest.raises(RuntimeError):
        Bank(torch.eye(3)).expand(shape)
    with pytest.raises(RuntimeError):
        Bank(torch.eye(3)).expand(2).expand((3,))
