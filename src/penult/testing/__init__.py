"""Law checks for distributions, bases and pairs: what proves a base, for penult's own and for yours.

That a pair's posterior equals the softmax proves the wiring alone: M cancels in it, so a wrong M passes. What
a wrong M cannot pass are the laws below. Each check draws with a fixed seed, compares with a stated bar, and
raises :class:`AssertionError` with the table of laws when one fails.

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
