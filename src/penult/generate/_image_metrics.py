"""The Fréchet distance between the normal laws of two sets of features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult._checks import check_finite
from penult.head import _logits_of

__all__ = ["Balls", "Normal", "Overlap", "classification_accuracy", "frechet_distance", "nearer", "nearest", "overlap"]


@dataclass(frozen=True)
class Normal:
    """Mean (d,) and a root R (r, d) of the covariance Σ = RᵀR, in float64.

    The root is that of the QR decomposition of the centred rows. Σ itself is never formed: its small eigenvalues would
    be rounded away, and a singular one, of fewer rows than dimensions, needs no care this way.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Normal:
        """Of rows (N, d), N ≥ 2, with the unbiased covariance."""
        wide = rows.double()
        mean = wide.mean(0)
        root = torch.linalg.qr((wide - mean) / (len(wide) - 1) ** 0.5, mode="r").R
        return cls(mean, root)

    def distance(self, other: Normal) -> float:
        """See `frechet_distance`."""
        # tr (Σ1 Σ2)^½ is the sum of the singular values of R1 R2ᵀ: the same as of the eigenvalues' roots of
        # Σ1^½ Σ2 Σ1^½, without the roots, which would make 1e-8 of a rounding error of 1e-16.
        shared = torch.linalg.svdvals(self.root @ other.root.T).sum()
        spread = self.root.square().sum() + other.root.square().sum() - 2 * shared
        return float((self.mean - other.mean).square().sum() + spread.clamp_min(0.0))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    r"""The Fréchet distance, squared as is the custom, between the normal laws fitted to two sets of features.

    .. math:: \lVert m_1 - m_2 \rVert^2 + \operatorname{tr}\bigl(\Sigma_1 + \Sigma_2
              - 2 (\Sigma_1 \Sigma_2)^{1/2}\bigr)

    In float64, and never negative. It is biased upwards for few rows, so that it is to be read against that of as many
    real ones.

    References:
        Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.
        Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.

    Args:
        x: Rows (N, d), N ≥ 2.
        y: Rows (M, d), M ≥ 2.

    Raises:
        ValueError: The shapes do not fit, there are fewer than two rows, or numbers are not finite.

    Example:
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> round(frechet_distance(x, x + 1), 6)
        4.0
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"x and y must be rows (N, d) and (M, d), N, M >= 2; got {tuple(x.shape)}, {tuple(y.shape)}")
    for name, rows in (("x", x), ("y", y)):
        check_finite(name, rows)
    return Normal.of(x).distance(Normal.of(y))


# --- What two sets of features have in common by nearest neighbours, and how near one lies to a third -------


_ROWS = 512  # of a block of distances
_POOL = 2048  # its columns: blocks of this size stay in the cache


class Overlap(NamedTuple):
    """Fidelity and variety of generated features by real ones; see `overlap`."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Balls:
    """Rows (n, d) in float64, and the distance (n,) of each to its k-th nearest among the others."""

    rows: Tensor
    radii: Tensor
    neighbours: int

    @classmethod
    def of(cls, rows: Tensor, neighbours: int) -> Balls:
        """Of rows (n, d), n > k."""
        wide, start, radii = rows.double(), 0, []
        for block in wide.split(_ROWS):
            distance = _distances(block, wide)
            own = torch.arange(len(block))
            distance[own, start + own] = torch.inf  # no row is a neighbour of itself, though a copy of it is
            radii.append(distance.kthvalue(neighbours, dim=1).values)
            start += len(block)
        return cls(wide, torch.cat(radii), neighbours)


def overlap(real: Balls, made: Balls) -> Overlap:
    r"""How far real rows x_1..x_N and generated ones y_1..y_M lie within each other's balls.

    With B(x_i) the closed ball around x_i up to its k-th nearest neighbour among the real rows, and B(y_j) the like:

    - precision: share of the y_j in some B(x_i), and recall: share of the x_i in some B(y_j);
    - density: number of pairs with y_j in B(x_i), over kM, which is 1 on average where both have one law;
    - coverage: share of the B(x_i) that hold some y_j; for one law and M = N it is
      1 − (N−1)⋯(N−k) / ((2N−1)⋯(2N−k)) on average, nearly 1 − 2⁻ᵏ.

    References:
        Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019.
        Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.

    Args:
        real: Balls of the real rows.
        made: Balls of the generated rows, of as many neighbours.

    Returns:
        Precision, recall, density and coverage.

    Example:
        >>> real = Balls.of(torch.tensor([[0.0], [1.0], [3.0]]), 1)  # radii 1, 1 and 2
        >>> overlap(real, Balls.of(torch.tensor([[2.0], [9.0]]), 1))
        Overlap(precision=0.5, recall=1.0, density=1.0, coverage=0.6666666666666666)
    """
    inside, found, start = 0, 0, 0
    recalled = torch.zeros(len(real.rows), dtype=torch.bool)
    covered = torch.zeros(len(real.rows), dtype=torch.bool)
    for block in made.rows.split(_ROWS):
        distance = _distances(block, real.rows)
        within = distance <= real.radii
        inside += int(within.sum())
        found += int(within.any(1).sum())
        covered |= within.any(0)
        recalled |= (distance <= made.radii[start : start + len(block), None]).any(0)
        start += len(block)
    count = len(made.rows)
    return Overlap(
        found / count,
        float(recalled.double().mean()),
        inside / (real.neighbours * count),
        float(covered.double().mean()),
    )


def nearest(rows: Tensor, pool: Tensor, own: Tensor | None = None) -> Tensor:
    """Distance (n,) of each of rows (n, d) to the nearest of a pool (m, d), in float64.

    Args:
        rows: Rows.
        pool: The pool.
        own: (n,) place of each row in the pool, which is passed over: for rows that were taken out of it.
    """
    middle = pool.mean(0, dtype=torch.float64)  # nearer to zero, products lose fewer digits
    wide = pool.double() - middle
    norms = wide.square().sum(1)
    found = []
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS].double() - middle
        best = torch.full((len(block),), torch.inf, dtype=torch.float64)
        place = torch.zeros(len(block), dtype=torch.int64)
        for offset in range(0, len(wide), _POOL):
            part = slice(offset, offset + _POOL)
            score = torch.addmm(norms[part], block, wide[part].T, alpha=-2)
            if own is not None:
                mine = own[start : start + len(block)] - offset
                here = ((mine >= 0) & (mine < score.shape[1])).nonzero().flatten()
                score[here, mine[here]] = torch.inf
            least, column = score.min(1)
            better = least < best
            best = torch.where(better, least, best)
            place = torch.where(better, column + offset, place)
        # Products only say which is the nearest: a copy shall lie at 0, not at the root of a rounding error.
        found.append(torch.linalg.vector_norm(block - wide[place], dim=1))
    return torch.cat(found)


def nearer(made: Tensor, real: Tensor) -> tuple[float, float]:
    """Whether distances (n,) to the training images are smaller than those (m,) of unseen real images.

    References:
        Meehan, Chaudhuri and Dasgupta, "A non-parametric test to detect data-copying in generative models", 2020.

    Returns:
        P(made < real) + P(made = real) / 2 over pairs, and the share of `made` below at least 99% of `real`.

    Example:
        >>> nearer(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]))
        (0.625, 0.5)
    """
    ordered = real.sort().values
    not_above = torch.searchsorted(ordered, made, right=True).double() / len(ordered)
    below = torch.searchsorted(ordered, made).double() / len(ordered)
    # Of (1 - not_above) >= .99, without the digits that the subtraction loses.
    return float(1 - (below + not_above).mean() / 2), float((not_above <= 0.01).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m), difference by difference: equal rows lie at 0, and a row at its neighbour's radius is on the ball."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


# --- The classification accuracy score: what a fresh network learns from images that it will not meet aga ---


_EPOCHS = 4
_STEPS = 200  # of its optimiser at least, so that it also learns what there is to learn in a few hundred images
_BATCH = 100
_RATE = 2e-3
_AT_ONCE = 500


def classification_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    order: Tensor,
    classes: int,
    make: Callable[[], nn.Module] | None,
    seed: int,
    device: torch.device,
) -> float:
    """The accuracy on some images of a network that was trained on others.

    References:
        Ravuri and Vinyals, "Classification accuracy score for conditional generative models", 2019.

    Args:
        train: Images (N, C, H, W) and labels (N,) on the CPU, to learn from.
        test: The same, to be judged by.
        order: Order (N,) in which the training images are first taken.
        classes: K.
        make: Makes the network; None for two convolutions and two linear layers.
        seed: Of first weights, batches and dropout. The global random state is restored.
        device: Where to train.
    """
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    devices = [device.index or 0] if device.type == "cuda" else []
    # Layers draw first weights from the global state, and dropout more of it. It is restored, on this device too.
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        network = _small_network(images.shape[1:], classes) if make is None else make()
        network = network.to(device, torch.float32).train()
        batch = min(_BATCH, len(order))
        epochs = max(_EPOCHS, math.ceil(_STEPS / (len(order) // batch)))
        optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(order) // batch))
        for _ in range(epochs):
            order = order[torch.randperm(len(order), generator=generator)]
            for places in order[: len(order) // batch * batch].split(batch):
                logits = _logits(network, images[places.to(images.device)].to(device), classes)
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[places].to(device)).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            network.eval()
            answers = [_logits(network, x.to(device), classes).argmax(-1).cpu() for x in test[0].split(_AT_ONCE)]
    return float((torch.cat(answers) == test[1]).double().mean())


def _logits(network: nn.Module, images: Tensor, classes: int) -> Tensor:
    logits = _logits_of(network(images.to(torch.float32)))
    if logits.shape != (len(images), classes):
        raise ValueError(
            f"the classifier gives logits of shape {tuple(logits.shape)} for {len(images)} images; with the "
            f"evaluator's {classes} classes it must give {(len(images), classes)}"
        )
    return logits


def _small_network(shape: torch.Size, classes: int) -> nn.Module:
    """Two convolutions and two linear layers for images (C, H, W)."""
    channels, height, width = shape
    size = 5 if min(height, width) >= 16 else 3
    pixels = math.ceil(height / 4) * math.ceil(width / 4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, size, stride=2, padding=size // 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, size, stride=2, padding=size // 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * pixels, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
