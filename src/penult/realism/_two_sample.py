"""Classifier two-sample tests."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from penult._checks import check_choice, check_seed

__all__ = ["FOLDS", "TESTS", "auc_standard_error", "require_sklearn", "two_sample_auc"]

TESTS = ("logistic", "mlp", "knn")

FOLDS = 3
_NEIGHBOURS = 15
_HIDDEN = 64
# Optimizer steps of the network, for any number of rows.
_STEPS = 300
_BATCH = 64


def require_sklearn(module: str = "sklearn") -> Any:
    """Import a module of scikit-learn.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            'realism tests use the classifiers of scikit-learn: pip install "penult[data]"', name=error.name
        ) from error


def two_sample_auc(
    x: Tensor, y: Tensor, tests: tuple[str, ...] = TESTS, seed: int = 0, step: Callable[[], object] | None = None
) -> dict[str, float]:
    """Return the area under the ROC curve of classifiers that separate two samples; 0.5 is chance level.

    Stratified threefold cross-validation, with coordinates standardized by the training fold. The tests are:

    - ``logistic``: logistic regression with an L2 penalty (C = 0.1). It detects differences of means.
    - ``mlp``: a network with one hidden layer of 64 units and an L2 penalty of 0.1, trained for 300 steps. It detects
      differences of correlations and shapes. A network this small does not learn some properties from a few hundred
      rows, so they are added as inputs: which coordinates are exactly zero (as in ReLU activations, but not in samples
      of a continuous distribution), the norm of the standardized row, and ‖z‖₁ / ‖z‖₂, which is small for heavy tails.
    - ``knn``: the fraction of each sample among the 15 nearest neighbours. It detects local differences and repeated
      rows.

    References:
        Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", 2017.

    Args:
        x: Rows (N, d), N ≥ 10.
        y: Rows (M, d), M ≥ 10, all different from those of x.
        tests: Names of the tests.
        seed: Seed of the folds and of the network. No global random state is touched.
        step: Called after each test.

    Returns:
        AUC of each test, by name: the mean over the folds.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: The shapes do not fit, there are fewer than ten rows, or a test is unknown.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(200, 4, generator=g), torch.randn(200, 4, generator=g) + 3
        >>> round(two_sample_auc(x, y, ("logistic",))["logistic"], 2)
        1.0
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 10:
        raise ValueError(
            f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (N, d), (M, d), N, M >= 10"
        )
    for test in tests:
        check_choice("a test", test, TESTS)
    seed = check_seed(seed)
    selection = require_sklearn("sklearn.model_selection")
    rows = torch.cat([x, y]).detach().cpu().float()
    is_x = torch.cat([torch.ones(len(x), device="cpu"), torch.zeros(len(y), device="cpu")]).long()
    folds = selection.StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(is_x, is_x)
    auc = dict.fromkeys(tests, 0.0)
    # Networks this small are slower with more threads, and much slower while other processes use the cores.
    with require_sklearn("threadpoolctl").threadpool_limits(1, user_api="blas"):
        for train, test_rows in ((torch.from_numpy(one), torch.from_numpy(two)) for one, two in folds):
            raw = rows[train], rows[test_rows]
            standardized = _standardized(*raw)
            extended = _with_extra_features(raw, standardized) if "mlp" in tests else standardized
            for test in tests:
                train_x, test_x = extended if test == "mlp" else standardized
                score = _scores(_model(test, len(train), seed), train_x, is_x[train], test_x)
                auc[test] += _area(score, is_x[test_rows]) / FOLDS
    for _ in auc:
        if step is not None:
            step()
    return auc


def _scores(model: Any, train_x: Tensor, train_y: Tensor, test_x: Tensor) -> Tensor:
    """Fit a model and return its probabilities (N,) of class 1 for rows (N, d)."""
    # The network stops after a fixed number of steps, for which scikit-learn warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", require_sklearn("sklearn.exceptions").ConvergenceWarning)
        model.fit(train_x.numpy(), train_y.numpy())
    return torch.from_numpy(model.predict_proba(test_x.numpy())[:, 1])


def _area(score: Tensor, target: Tensor) -> float:
    """Return P(score of a 1 > score of a 0) + P(equal) / 2, over all pairs of scores (N,) with targets (N,)."""
    _, value_index, counts = score.unique(return_inverse=True, return_counts=True)
    # Equal scores share their mean rank.
    rank = (counts.cumsum(0) - (counts - 1) / 2).double()[value_index]
    ones = int(target.sum())
    return float(rank[target == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(target) - ones))


def auc_standard_error(auc: float, n: int) -> float:
    """Return the standard error of the AUC of one classifier on n rows of each sample.

    For an AUC of :func:`two_sample_auc` use a third of its rows: the folds are not independent, since each classifier
    is trained on the rows that test the others.

    References:
        Hanley and McNeil, "The meaning and use of the area under a ROC curve", 1982.

    Example:
        >>> round(auc_standard_error(0.5, 300), 4), auc_standard_error(1.0, 300)
        (0.0236, 0.0)
    """
    a = max(auc, 1 - auc)
    first, second = a / (2 - a), 2 * a * a / (1 + a)
    return math.sqrt(max(a * (1 - a) + (n - 1) * (first + second - 2 * a * a), 0.0)) / n


def _standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Standardize both by mean and deviation of the first; coordinates that are constant there keep their scale."""
    wide = train.double()
    mean, deviation = wide.mean(0), wide.std(0, correction=0)
    deviation = torch.where(deviation > 1e-7 * mean.abs(), deviation, torch.ones_like(deviation))
    one, two = (((rows.double() - mean) / deviation).float() for rows in (train, test))
    return one, two


def _with_extra_features(raw: tuple[Tensor, Tensor], standardized: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Append exact zeros of the raw rows, and norms and ratios ‖z‖₁ / ‖z‖₂ of the standardized ones."""
    zero_fraction = (raw[0] == 0).double().mean(0)
    columns = (zero_fraction > 0) & (zero_fraction < 1)
    norms = [torch.linalg.vector_norm(z, dim=-1).clamp_min(1e-12) for z in standardized]
    ratios = [z.abs().sum(-1) / norm for z, norm in zip(standardized, norms, strict=True)]
    shape = _standardized(*(torch.stack([n.log(), r], dim=-1) for n, r in zip(norms, ratios, strict=True)))
    one, two = (
        torch.cat([z, (rows[:, columns] == 0).float(), s], dim=-1)
        for z, rows, s in zip(standardized, raw, shape, strict=True)
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
