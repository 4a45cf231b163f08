"""One protocol for all scores: functions of a pair as modules of activations, and the state and files of scores."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from penult import io
from penult._checks import described, usable_device
from penult._row_blocks import same_values
from penult.bases import Base
from penult.head import Head
from penult.pair import GenerativePair, from_parts, to_parts
from penult.scores._composite import usual
from penult.scores._pair_scores import density, directional, energy, max_logit, msp
from penult.scores._score import KINDS, Score

__all__ = [
    "HEAD_SCORES",
    "PAIR_SCORES",
    "PairScore",
    "bound",
    "check_calibration",
    "load",
    "save",
    "score_from_state",
    "score_name",
    "score_state",
    "stored_score",
]

# Functions of a pair by name. Those of the head alone do not depend on the base.
PAIR_SCORES: dict[str, Callable[[GenerativePair, Tensor], Tensor]] = {
    score.__name__: score for score in (density, directional, energy, max_logit, msp)
}
HEAD_SCORES = (energy, max_logit, msp)

_SCORE = "score"


@final
class PairScore(Score):
    """A function of a pair and activations as a score, which holds the pair.

    Args:
        function: Function of a pair and activations (B, d), such as `directional`, that returns scores (B,).
        pair: The pair.

    Example:
        >>> score = PairScore(energy, GenerativePair(Head(torch.eye(3))))
        >>> score(torch.tensor([[9.0, 0.0, 0.0]]))
        tensor([-9.0002])
    """

    def __init__(self, function: Callable[[GenerativePair, Tensor], Tensor], pair: GenerativePair) -> None:
        super().__init__()
        self.function, self.pair = function, pair

    @property
    def in_features(self) -> int:
        """The dimension d of activations."""
        return self.pair.head.in_features

    @property
    def _fitted_digest(self) -> str | None:
        return None if self.function in HEAD_SCORES else self.pair.base.reference

    def score(self, h: Tensor) -> Tensor:
        """Return the function's scores (B,) of activations (B, d)."""
        return self.function(self.pair, h.to(self.pair.head.weight.device))

    def extra_repr(self) -> str:
        """Return the name of the function, for ``print``."""
        return score_name(self.function)


def bound(score: Callable[..., Tensor], pair: GenerativePair | None = None) -> Callable[[Tensor], Tensor]:
    """Return a score as a function of activations alone.

    Args:
        score: A `Score`, any function or module that maps activations (B, d) to scores (B,), or a function of a pair
            and activations.
        pair: The pair, for a function that takes one; other scores ignore it.

    Raises:
        TypeError: `score` cannot be called, or it takes a pair and there is none.
    """
    if not callable(score):
        raise TypeError(
            f"score is {described(score)}; expected a penult.scores.Score or a function of activations (B, d)"
        )
    if isinstance(score, nn.Module) or not _takes_pair(score):
        return score
    if pair is None:
        raise TypeError(f"{score_name(score)} is a score of a pair: give it, pair=pair")
    return PairScore(score, pair)


def _takes_pair(score: Callable[..., Tensor]) -> bool:
    """Whether a function has two positional arguments without defaults."""
    if score in PAIR_SCORES.values():
        return True
    try:
        parameters = inspect.signature(score).parameters.values()
    # Functions of C have no signature.
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters) == 2


def score_name(score: object) -> str:
    """Return the name of a score: that of the function, or of the class."""
    if isinstance(score, PairScore | partial):
        score = score.function if isinstance(score, PairScore) else score.func
    return getattr(score, "__name__", type(score).__name__)


def check_calibration(score: object, digest: str, role: str = "calibration") -> None:
    """Raise if calibration activations are the set that a score, or the base of its pair, was fitted to."""
    fitted = _fitted_digests(score)
    if digest in fitted:
        part = "score" if isinstance(score, Score) and not isinstance(score, PairScore) else "base"
        raise ValueError(
            f"the {role} activations are the very set that the {part} of "
            f"{score_name(score)} was fitted to; expected others of the same distribution. Scores of the former are "
            "too low, so that false alarms would be too frequent: fit to one part, and calibrate with another, as from "
            "acts.split"
        )


def _fitted_digests(score: object) -> list[str | None]:
    if isinstance(score, Score):
        return [score._fitted_digest]
    if isinstance(score, partial):
        pairs = [part for part in (*score.args, *score.keywords.values()) if isinstance(part, GenerativePair)]
        return [PairScore(score.func, pair)._fitted_digest for pair in pairs]
    return []


# --- state --------------------------------------------------------------------------------------------------


def score_state(score: Callable[..., Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the kind of a score and the tensors that it consists of, without those of its head or pair.

    Args:
        score: A fitted score of penult, a `PairScore`, or one of the functions of a pair.

    Raises:
        TypeError: It is another score, which nothing but its own code can rebuild.
    """
    function = score.function if isinstance(score, PairScore) else score
    name = getattr(function, "__name__", "")
    if PAIR_SCORES.get(name) is function:
        return name, {}
    if isinstance(score, Score) and KINDS.get(score.kind) is type(score):
        return score.kind, score._stored()
    raise TypeError(
        f"score is {score_name(score)}, which is not one of penult's, so that no file can hold it; expected one of "
        f"{', '.join([*PAIR_SCORES, *(kind.__name__ for kind in KINDS.values())])}"
    )


def score_from_state(kind: str, tensors: Mapping[str, Tensor], pair: GenerativePair) -> Score:
    """Rebuild a score from its kind and tensors, and the pair that it belongs to.

    Raises:
        ValueError: There is no such kind, a tensor is missing, superfluous or wrong.
    """
    if kind in PAIR_SCORES:
        return PairScore(PAIR_SCORES[kind], pair)
    if kind not in KINDS:
        raise ValueError(f"the kind of the score is {kind!r}; expected one of {', '.join([*PAIR_SCORES, *KINDS])}")
    return KINDS[kind]._restored(tensors, pair.head)


# --- files --------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], score: Callable[..., Tensor], pair: GenerativePair) -> Path:
    """Write a pair and an outlier score to one safetensors file, without pickle.

    :func:`penult.load` reads the pair of the file, :func:`penult.scores.load` the score. :meth:`GenerativePair.save`
    writes a file without a score.

    Args:
        path: File. It is written under another name and renamed when it is complete.
        score: A fitted score of penult, or one of the functions of a pair.
        pair: The pair. A score that has a head must have the pair's head.

    Returns:
        The path.

    Raises:
        TypeError: The score is not one of penult's.
        ValueError: The score has another head or another dimension than the pair, or is bound to another pair.

    Example:
        >>> import pathlib, tempfile
        >>> from penult.scores import Composite
        >>> pair = GenerativePair(Head(4 * torch.eye(3)))
        >>> h, _ = pair.sample((200,), generator=torch.Generator().manual_seed(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(pathlib.Path(folder) / "toy.penult.safetensors", Composite.fit(pair, h), pair)
        ...     print(type(load(path)).__name__, penult.load(path).base)
        Composite Sphere(radius=1.273, subspace=(2, 3))
    """
    kind, state = score_state(score)
    if isinstance(score, PairScore) and score.pair is not pair:
        raise ValueError(f"{score_name(score)} is bound to another pair; pass the function itself")
    if isinstance(score, Score) and score.in_features != pair.head.in_features:
        raise ValueError(
            f"the score takes activations of dimension {score.in_features}; expected {pair.head.in_features}, as the "
            "pair's head takes. Fit it to activations of this head"
        )
    head = getattr(score, "head", None)
    if isinstance(head, Head) and not _same_head(head, pair.head):
        raise ValueError(
            f"the score {score_name(score)} was fitted with another head than that of the pair; fit it with pair.head"
        )
    tensors, metadata = to_parts(pair)
    tensors |= {f"{_SCORE}.{name}": tensor for name, tensor in state.items()}
    return io.write(path, tensors, "pair", metadata | {_SCORE: {"kind": kind}})


def load(
    path: str | os.PathLike[str], *, bases: Sequence[type[Base]] = (), device: str | torch.device = "cpu"
) -> Score:
    """Read the outlier score of a file: the one that `save` wrote, else the usual score of the file's pair.

    Args:
        path: File that `save` or :meth:`GenerativePair.save` wrote.
        bases: As for :func:`penult.load`.
        device: Device of the tensors.

    Raises:
        FileNotFoundError: There is no such file.
        penult.io.FileFormatError: The file is damaged, of another program or of a newer schema.
        TypeError, ValueError: `device` is no device, or cannot be used here.

    Example:
        >>> import pathlib, tempfile
        >>> pair = GenerativePair(Head(torch.eye(3)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(load(pair.save(pathlib.Path(folder) / "toy.penult.safetensors")).function.__name__)
        directional
    """
    device = usable_device("device", device)
    file = io.read(path, kind="pair")
    pair = from_parts(path, file.tensors, file.metadata, bases)
    stored = _stored(path, file, pair)
    return (PairScore(usual(pair), pair) if stored is None else stored).to(device)


def stored_score(path: str | os.PathLike[str], pair: GenerativePair) -> Score | None:
    """Return the score that a file holds for its pair, which has been read already, or None if it holds none."""
    return _stored(path, io.read(path, kind="pair"), pair)


def _stored(path: str | os.PathLike[str], file: io.File, pair: GenerativePair) -> Score | None:
    description, prefix = file.metadata.get(_SCORE), f"{_SCORE}."
    if description is None:
        return None
    # The tensors may be the file, mapped into memory: whoever writes to it would change the score.
    state = {
        name.removeprefix(prefix): tensor.clone() for name, tensor in file.tensors.items() if name.startswith(prefix)
    }
    try:
        return score_from_state(str(description["kind"]), state, pair)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise io.FileFormatError(f"{path}: the score cannot be rebuilt from the file: {error}") from error


def _same_head(one: Head, other: Head) -> bool:
    pairs: list[tuple[Any, Any]] = [(one.weight, other.weight), (one.full_bias, other.full_bias)]
    return all(a.shape == b.shape and a.dtype == b.dtype and same_values(a, b) for a, b in pairs)
