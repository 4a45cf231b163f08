"""Heads, the last linear layers of classifiers, and the search for the head of any model."""

from penult.head._capture import capture
from penult.head._certificate import HeadCertificate, HeadNotFoundError, HeadPart, certificate_of_no_model
from penult.head._find import find_head
from penult.head._foreign import in_memory
from penult.head._head import Head
from penult.head._model import evaluating, logits_of, submodule, tensor_at, untouched, unwrap
from penult.head._rectified import refuse_unrectified

__all__ = ["Head", "HeadCertificate", "HeadNotFoundError", "HeadPart", "find_head"]

# Lent to other rooms of the package; not public.
_capture_forward = capture
_certificate_of_no_model = certificate_of_no_model
_evaluating = evaluating
_in_memory = in_memory
_logits_of = logits_of
_refuse_unrectified = refuse_unrectified
_submodule = submodule
_tensor_at = tensor_at
_untouched = untouched
_unwrap = unwrap
