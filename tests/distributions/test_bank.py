import pytest
import torch

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
    with pytest.raises(ValueError, match="51 draws without replacement"):
        Bank(x, replacement=False).sample((51,))


def test_each_row_is_as_likely():
    index = torch.arange(5.0).unsqueeze(-1)
    counts = Bank(index).sample((10_000,), generator=seeded()).flatten().long().bincount()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 25  # chi-square with 4 degrees of freedom, p = 5e-5


def test_bad_input():
    with pytest.raises(ValueError, match="no density"):
        Bank(torch.eye(2)).log_prob(torch.zeros(2))
    with pytest.raises(TypeError, match="floating"):
        Bank(torch.eye(2).long())
    with pytest.raises(ValueError, match="expected"):
        Bank(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="1 of 2 activations hold NaN"):
        Bank(torch.tensor([[1.0], [torch.nan]]))
