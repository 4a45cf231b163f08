"""Classifier two-sample tests: can a classifier that saw two thirds of the rows tell the rest apart?"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["FOLDS", "TESTS", "auc_standard_error", "require_sklearn", "two_sample_auc"]

TESTS = ("logistic", "mlp", "knn")

FOLDS = 3
_NEIGHBOURS = 15
_HIDDEN = 64
_STEPS = 300  # of the network's optimiser, whatever the number of rows
_BATCH = 64


def require_sklearn(module: str = "sklearn") -> Any:
    """A module of scikit-learn.

    Raises:
        ImportError: It is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            'realism is measured with the classifiers of scikit-learn: pip install "penult[data]"', name=error.name
        ) from error


def two_sample_auc(
    x: Tensor, y: Tensor, tests: tuple[str, ...] = TESTS, seed: int = 0, step: Callable[[], object] | None = None
) -> dict[str, float]:
    """How well classifiers tell two samples apart: the area under the ROC curve, where 0.5 is not at all.

    Threefold cross-validation, stratified; coordinates are standardised by the training fold. What the tests see:

    - ``logistic``: differences of means, with an L2 penalty (C = 0.1).
    - ``mlp``: correlations and shapes, with one hidden layer of 64 units and an L2 penalty of 0.1, trained for 300
      steps. It is told what so small a network does not find in a few hundred rows: which coordinates are exactly
      zero (a continuous law must not pass for ReLU activations), the norm of the standardised row (radial laws), and
      how evenly the row spreads over coordinates, ‖z‖₁ / ‖z‖₂ (heavy tails).
    - ``knn``: the share of either sample among the 15 nearest neighbours: locality, and repeated rows.

    References:
        Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", 2017.

    Args:
        x: Rows (N, d), N ≥ 10.
        y: Rows (M, d), M ≥ 10, all different from those of x.
        tests: Which tests.
        seed: Seed of the folds and of the network. No global random state is touched.
        step: Called after each test.

    Returns:
        Name of the test to AUC, the mean over the folds.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If the shapes do not fit, there are fewer than ten rows, or a test is unknown.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(200, 4, generator=g), torch.randn(200, 4, generator=g) + 3
        >>> round(two_sample_auc(x, y, ("logistic",))["logistic"], 2)
        1.0
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 10:
        raise ValueError(f"x and y must be rows (N, d) and (M, d), N, M >= 10; got {tuple(x.shape)}, {tuple(y.shape)}")
    if unknown := set(tests) - set(TESTS):
        raise ValueError(f"tests must be among {TESTS}; got {sorted(unknown)}")
    selection = require_sklearn("sklearn.model_selection")
    rows = torch.cat([x, y]).detach().cpu().float()
    which = torch.cat([torch.ones(len(x)), torch.zeros(len(y))]).long()
    folds = selection.StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(which, which)
    auc = dict.fromkeys(tests, 0.0)
    # Networks this small are slower with more threads, and by much where others use the cores too.
    with require_sklearn("threadpoolctl").threadpool_limits(1, user_api="blas"):
        for training, held_out in ((torch.from_numpy(one), torch.from_numpy(two)) for one, two in folds):
            raw = rows[training], rows[held_out]
            plain = _standardised(*raw)
            told = _told(raw, plain) if "mlp" in tests else plain
            for test in tests:
                seen, judged = told if test == "mlp" else plain
                score = _scores(_model(test, len(training), seed), seen, which[training], judged)
                auc[test] += _area(score, which[held_out]) / FOLDS
    for _ in auc:
        if step is not None:
            step()
    return auc


def _scores(model: Any, seen: Tensor, which: Tensor, judged: Tensor) -> Tensor:
    """The fitted model's probability of a 1 for rows (N, d), (N,)."""
    with warnings.catch_warnings():  # it is stopped on purpose, and says so
        warnings.simplefilter("ignore", require_sklearn("sklearn.exceptions").ConvergenceWarning)
        model.fit(seen.numpy(), which.numpy())
    return torch.from_numpy(model.predict_proba(judged.numpy())[:, 1])


def _area(score: Tensor, which: Tensor) -> float:
    """P(score of a 1 > score of a 0) + P(equal) / 2, over pairs of (N,) scores."""
    _, place, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2).double()[place]  # the mean one among equals
    ones = int(which.sum())
    return float(rank[which == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(which) - ones))


def auc_standard_error(auc: float, n: int) -> float:
    """Standard error of an AUC of n rows against n, all judged by one classifier.

    An AUC of :func:`two_sample_auc` has about that of a third of the rows: its folds are no independent repetitions,
    since each is judged by what was learnt from the others.

    References:
        Hanley and McNeil, "The meaning and use of the area under a ROC curve", 1982.

    Example:
        >>> round(auc_standard_error(0.5, 300), 4), auc_standard_error(1.0, 300)
        (0.0236, 0.0)
    """
    a = max(auc, 1 - auc)
    first, second = a / (2 - a), 2 * a * a / (1 + a)
    return math.sqrt(max(a * (1 - a) + (n - 1) * (first + second - 2 * a * a), 0.0)) / n


def _standardised(seen: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """Both by mean and deviation of the first; what is constant there keeps its scale."""
    wide = seen.double()
    mean, deviation = wide.mean(0), wide.std(0, correction=0)
    deviation = torch.where(deviation > 1e-7 * mean.abs(), deviation, torch.ones_like(deviation))
    one, two = (((rows.double() - mean) / deviation).float() for rows in (seen, judged))
    return one, two


def _told(raw: tuple[Tensor, Tensor], scaled: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Standardised rows with what the network is told of them: exact zeros, norm and evenness."""
    share = (raw[0] == 0).double().mean(0)
    column = (share > 0) & (share < 1)
    norms = [torch.linalg.vector_norm(z, dim=-1).clamp_min(1e-12) for z in scaled]
    even = [z.abs().sum(-1) / norm for z, norm in zip(scaled, norms, strict=True)]
    shape = _standardised(*(torch.stack([n.log(), e], dim=-1) for n, e in zip(norms, even, strict=True)))
    one, two = (
        torch.cat([z, (rows[:, column] == 0).float(), s], dim=-1) for z, rows, s in zip(scaled, raw, shape, strict=True)
    )
    return one, two


def _model(test: str, rows: int, seed: int) -> Any:
    if test == "logistic":
        return require_sklearn("sklearn.linear_model").LogisticRegression(C=0.1, max_iter=1000)
    if test == "knn":
        neighbours = min(_NEIGHBOURS, rows // 2)
        return require_sklearn("sklearn.neighbors").KNeighborsClassifier(neighbours, algorithm="brute")
    batch = min(_BATCH, rows)
    return require_sklearn("sklearn.neural_network").MLPClassifier(
        (_HIDDEN,),
        alpha=0.1,
        learning_rate_init=1e-2,
        batch_size=batch,
        max_iter=max(1, round(_STEPS * batch / rows)),
        n_iter_no_change=_STEPS,
        random_state=seed,
    )
