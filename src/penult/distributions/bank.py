"""The empirical distribution of a set of activations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from penult._checks import as_size, check_floating
from penult.special import _validates_by_default, in_double

__all__ = ["Bank"]


class Bank(Distribution):
    r"""The empirical distribution of activations: every row has the probability 1/N.

    It has all properties of the activations, such as exact zeros with their correlations, but is as large as they are.
    Samples are activations of real data: if these must stay private, fit a :class:`PrincipalMixture`. The distribution
    has no density, because its mass is on finitely many points.

    Args:
        activations: Rows (N, d); not copied.
        replacement: Whether a row may be sampled more than once. If False, one call of :meth:`sample` gives a row at
            most once, so that samples are not independent. This is for two-sample tests, which duplicates would bias.
        rectified: Whether the rows are pre-activations u, and samples are max(u, 0). A parametric distribution that is
            fitted to pre-activations has the exact zeros of a ReLU.
        validate_args: Whether to check that values are finite.

    Raises:
        TypeError: ``activations`` is not a floating tensor.
        ValueError: It has a wrong shape, no row, or values that are not finite.

    Example:
        >>> bank = Bank(torch.eye(3), replacement=False)
        >>> bank, bank.mean
        (Bank(3 rows of dimension 3, without replacement), tensor([0.3333, 0.3333, 0.3333]))
        >>> bank.sample((3,)).sum(0)
        tensor([1., 1., 1.])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "activations": constraints.independent(constraints.real, 2),
    }
    support = constraints.real_vector
    has_rsample = False
    has_density = False

    def __init__(
        self,
        activations: Tensor,
        replacement: bool = True,
        rectified: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        check_floating("activations", activations, "(N, d)")
        if activations.dim() != 2 or 0 in activations.shape:
            raise ValueError(f"activations has shape {tuple(activations.shape)}; expected (N, d) with N, d >= 1")
        validate = _validates_by_default() if validate_args is None else validate_args
        if validate and not bool(activations.isfinite().all()):
            bad = int((~activations.isfinite().all(-1)).sum())
            raise ValueError(
                f"{bad} of {len(activations)} rows of activations hold NaN or infinity; leave them out first"
            )
        self.activations = activations.detach()
        self.replacement, self.rectified = bool(replacement), bool(rectified)
        super().__init__(Size(), activations.shape[-1:], validate_args=False)

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def rows(self) -> Tensor:
        """The rows that samples are taken from, (N, d): the activations, or their positive part."""
        return self.activations.clamp_min(0) if self.rectified else self.activations

    @property
    def num_parameters(self) -> int:
        """Number of floats."""
        return self.activations.numel()

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, shape (*B, d)."""
        return self._expanded(in_double(self.rows).mean(0))

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate over the rows, shape (*B, d)."""
        return self._expanded(in_double(self.rows).var(0, correction=0))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Bank:
        """Return the same distribution with a batch shape; the rows are shared."""
        new: Bank = self._get_checked_instance(Bank, _instance)
        # A tensor without memory raises what torch raises for shapes that do not expand.
        torch.empty(self.batch_shape, device="meta").expand(as_size(batch_shape))
        new.activations, new.replacement, new.rectified = self.activations, self.replacement, self.rectified
        super(Bank, new).__init__(as_size(batch_shape), self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise a ValueError: a distribution on finitely many points has no density.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a Bank has no density, so log_prob is not defined: its mass is on finitely many points. Fit a "
            "PrincipalMixture"
        )

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Sample rows of shape (*sample_shape, *B, d), with ``generator`` or torch's default generator.

        Raises:
            ValueError: Without replacement, more samples are requested than there are rows.
        """
        shape = self._extended_shape(as_size(sample_shape))
        count, rows, device = shape[:-1].numel(), len(self.activations), self.activations.device
        if self.replacement:
            index = torch.randint(rows, (count,), generator=generator, device=device)
        elif count > rows:
            raise ValueError(f"the number of samples without replacement is {count}; expected at most {rows}, the rows")
        else:
            index = torch.randperm(rows, generator=generator, device=device)[:count]
        sampled = self.activations[index].reshape(shape)
        return sampled.clamp_min(0) if self.rectified else sampled

    def _expanded(self, moment: Tensor) -> Tensor:
        return moment.to(self.activations).expand(self.batch_shape + self.event_shape)

    def __repr__(self) -> str:
        (n, d), options = self.activations.shape, ", rectified" if self.rectified else ""
        options += "" if self.replacement else ", without replacement"
        return f"Bank({n} row{'s' * (n != 1)} of dimension {d}{options})"
