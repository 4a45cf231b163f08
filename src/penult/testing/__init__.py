"""Checks of the laws that distributions, bases and pairs must satisfy, for those of penult and for yours.

A posterior that equals the softmax does not prove that a base is right: M cancels in the posterior, so a wrong M
passes such a test. A wrong M fails the laws below. Each check samples with a fixed seed, compares with a stated limit,
and raises :class:`AssertionError` with the table of laws if one fails.

Example:
    >>> import penult
    >>> report = check_base(penult.Sphere(2.0), penult.Head(torch.eye(3)))
    >>> report.passed
    True
"""

from penult.testing._bases import check_base, check_pair
from penult.testing._distributions import check_distribution
from penult.testing._laws import Law, LawReport

__all__ = ["Law", "LawReport", "check_base", "check_distribution", "check_pair"]
