"""The head: the last linear layer of a classifier, and how it is found by evidence in any model."""

from penult.head._certificate import HeadCertificate, HeadNotFoundError
from penult.head._find import find_head
from penult.head._head import Head

__all__ = ["Head", "HeadCertificate", "HeadNotFoundError", "find_head"]
