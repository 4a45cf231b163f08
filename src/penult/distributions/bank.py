"""The empirical law of a set of activations, as a citizen of torch.distributions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from penult.special import in_double

__all__ = ["Bank"]


class Bank(Distribution):
    r"""Activations kept as they are, each drawn with probability 1/N.

    It has what no compact law has to the full, such as exact zeros with their correlations, and as many floats as it
    has rows. Draws are activations of real data: where these must not leave the house, fit a
    :class:`PrincipalMixture`. It has atoms, hence no density.

    Args:
        activations: Rows (N, d), held by reference.
        replacement: Whether a row may be drawn more than once. Without, one call of :meth:`sample` gives each row at
            most once, so that its draws are not independent: for two-sample tests, which duplicates would mislead.
        rectified: Whether the rows are pre-activations u, and draws max(u, 0). More can be told from these: a
            compact law of them has the exact zeros of a ReLU.
        validate_args: Whether to look for values that are not finite.

    Raises:
        TypeError: If ``activations`` is no floating tensor.
        ValueError: If it has a wrong shape, no row, or values that are not finite.

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
    _validate_args = __debug__  # torch.compile switches validation off on torch's own base class, for good

    def __init__(
        self,
        activations: Tensor,
        replacement: bool = True,
        rectified: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(activations, Tensor) or not activations.is_floating_point():
            kind = activations.dtype if isinstance(activations, Tensor) else type(activations).__name__
            raise TypeError(f"activations must be a floating tensor (N, d), got {kind}")
        if activations.dim() != 2 or 0 in activations.shape:
            raise ValueError(f"activations has shape {tuple(activations.shape)}; expected (N, d) with N, d >= 1")
        validate = self._validate_args if validate_args is None else validate_args
        if validate and not bool(activations.isfinite().all()):
            bad = int((~activations.isfinite().all(-1)).sum())
            raise ValueError(f"{bad} of {len(activations)} activations hold NaN or infinity; leave them out first")
        self.activations = activations.detach()
        self.replacement, self.rectified = bool(replacement), bool(rectified)
        super().__init__(Size(), activations.shape[-1:], validate_args=False)

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def rows(self) -> Tensor:
        """What is drawn from, (N, d): the rows, or their positive part."""
        return self.activations.clamp_min(0) if self.rectified else self.activations

    @property
    def num_parameters(self) -> int:
        """How many floats the law takes."""
        return self.activations.numel()

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, shape (*B, d)."""
        return self._spread(in_double(self.rows).mean(0))

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate over the rows, shape (*B, d)."""
        return self._spread(in_double(self.rows).var(0, correction=0))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Bank:
        """The same law with a batch shape; the rows are shared."""
        new: Bank = self._get_checked_instance(Bank, _instance)
        new.activations, new.replacement, new.rectified = self.activations, self.replacement, self.rectified
        super(Bank, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """None: a law of finitely many points has no density.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a Bank has no density, and so no log_prob: its mass is on finitely many points; fit a PrincipalMixture"
        )

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw rows of shape (*sample_shape, *B, d), from ``generator`` or torch's default.

        Raises:
            ValueError: If more rows are asked for than there are, without replacement.
        """
        shape = self._extended_shape(Size(sample_shape))
        count, rows, device = shape[:-1].numel(), len(self.activations), self.activations.device
        if self.replacement:
            index = torch.randint(rows, (count,), generator=generator, device=device)
        elif count > rows:
            raise ValueError(f"{count} draws without replacement were asked of a Bank of {rows} rows")
        else:
            index = torch.randperm(rows, generator=generator, device=device)[:count]
        drawn = self.activations[index].reshape(shape)
        return drawn.clamp_min(0) if self.rectified else drawn

    def _spread(self, moment: Tensor) -> Tensor:
        return moment.to(self.activations).expand(self.batch_shape + self.event_shape)

    def __repr__(self) -> str:
        (n, d), how = self.activations.shape, ", rectified" if self.rectified else ""
        how += "" if self.replacement else ", without replacement"
        return f"Bank({n} row{'s' * (n != 1)} of dimension {d}{how})"
