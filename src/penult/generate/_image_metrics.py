"""Metrics of generated images: Fréchet distance, nearest neighbours, classification accuracy score."""

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
    """Normal distribution with mean (d,) and covariance Σ = RᵀR, given by its root R (r, d), in float64.

    The root is from the QR decomposition of the centered rows. Σ itself is never computed, because rounding would
    remove its small eigenvalues. This also needs no special case for a singular Σ, of fewer rows than dimensions.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Normal:
        """Fit the distribution to rows (N, d), N ≥ 2, with the unbiased covariance."""
        wide = rows.double()
        mean = wide.mean(0)
        root = torch.linalg.qr((wide - mean) / (len(wide) - 1) ** 0.5, mode="r").R
        return cls(mean, root)

    def distance(self, other: Normal) -> float:
        """Return the Fréchet distance, see `frechet_distance`."""
        # tr (Σ1 Σ2)^½ is the sum of the singular values of R1 R2ᵀ. It is also the sum of the square roots of the
        # eigenvalues of Σ1^½ Σ2 Σ1^½, but these would turn a rounding error of 1e-16 into 1e-8.
        trace = torch.linalg.svdvals(self.root @ other.root.T).sum()
        covariance_term = self.root.square().sum() + other.root.square().sum() - 2 * trace
        return float((self.mean - other.mean).square().sum() + covariance_term.clamp_min(0.0))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    r"""Return the Fréchet distance, squared as usual, between normal distributions fitted to two sets of features.

    .. math:: \lVert m_1 - m_2 \rVert^2 + \operatorname{tr}\bigl(\Sigma_1 + \Sigma_2
              - 2 (\Sigma_1 \Sigma_2)^{1/2}\bigr)

    It is computed in float64, and never negative. It is biased upwards for few rows, so compare it with the distance
    of as many real ones.

    References:
        Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.
        Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.

    Args:
        x: Rows (N, d), N ≥ 2.
        y: Rows (M, d), M ≥ 2.

    Raises:
        ValueError: The shapes do not fit, there are fewer than two rows, or values are not finite.

    Example:
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> round(frechet_distance(x, x + 1), 6)
        4.0
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (N, d), (M, d), N, M >= 2"
        )
    for name, rows in (("x", x), ("y", y)):
        check_finite(name, rows)
    return Normal.of(x).distance(Normal.of(y))


# --- nearest neighbours -------------------------------------------------------------------------------------


# Rows and columns of a block of distances, which then fits in the cache.
_ROWS = 512
_POOL = 2048


class Overlap(NamedTuple):
    """Fidelity and variety of generated features relative to real ones; see `overlap`."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Balls:
    """Balls around rows (n, d) in float64, with the distance (n,) to the k-th nearest other row as radius."""

    rows: Tensor
    radii: Tensor
    neighbours: int

    @classmethod
    def of(cls, rows: Tensor, neighbours: int) -> Balls:
        """Compute the balls of rows (n, d), n > k."""
        wide, start, radii = rows.double(), 0, []
        for block in wide.split(_ROWS):
            distance = _distances(block, wide)
            index = torch.arange(len(block), device="cpu")
            # A row is not a neighbour of itself, but a copy of it is.
            distance[index, start + index] = torch.inf
            radii.append(distance.kthvalue(neighbours, dim=1).values)
            start += len(block)
        return cls(wide, torch.cat(radii), neighbours)


def overlap(real: Balls, generated: Balls) -> Overlap:
    r"""Compute the overlap of real rows x_1..x_N and generated rows y_1..y_M, by balls around them.

    B(x_i) is the closed ball around x_i up to its k-th nearest neighbour among the real rows, and B(y_j) that around
    y_j up to its k-th nearest neighbour among the generated rows.

    - precision: fraction of the y_j in any B(x_i); recall: fraction of the x_i in any B(y_j);
    - density: number of pairs with y_j in B(x_i), divided by kM; 1 on average if both have the same distribution;
    - coverage: fraction of the B(x_i) that contain any y_j; for the same distribution and M = N it is
      1 − (N−1)⋯(N−k) / ((2N−1)⋯(2N−k)) on average, nearly 1 − 2⁻ᵏ.

    References:
        Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019.
        Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.

    Args:
        real: Balls of the real rows.
        generated: Balls of the generated rows, with the same number of neighbours.

    Returns:
        Precision, recall, density and coverage.

    Example:
        >>> # The radii of the real rows are 1, 1 and 2.
        >>> real = Balls.of(torch.tensor([[0.0], [1.0], [3.0]]), 1)
        >>> overlap(real, Balls.of(torch.tensor([[2.0], [9.0]]), 1))
        Overlap(precision=0.5, recall=1.0, density=1.0, coverage=0.6666666666666666)
    """
    num_pairs, num_precise, start = 0, 0, 0
    recalled = torch.zeros(len(real.rows), dtype=torch.bool, device="cpu")
    covered = torch.zeros(len(real.rows), dtype=torch.bool, device="cpu")
    for block in generated.rows.split(_ROWS):
        distance = _distances(block, real.rows)
        in_real_ball = distance <= real.radii
        num_pairs += int(in_real_ball.sum())
        num_precise += int(in_real_ball.any(1).sum())
        covered |= in_real_ball.any(0)
        recalled |= (distance <= generated.radii[start : start + len(block), None]).any(0)
        start += len(block)
    count = len(generated.rows)
    return Overlap(
        num_precise / count,
        float(recalled.double().mean()),
        num_pairs / (real.neighbours * count),
        float(covered.double().mean()),
    )


def nearest(rows: Tensor, pool: Tensor, own: Tensor | None = None) -> Tensor:
    """Return the distance (n,) of each of rows (n, d) to the nearest of a pool (m, d), in float64.

    Args:
        rows: Rows.
        pool: The pool.
        own: Index (n,) of each row in the pool, which is skipped; for rows that are part of the pool.
    """
    # Products lose fewer digits for values close to 0.
    center = pool.mean(0, dtype=torch.float64)
    wide = pool.double() - center
    norms = wide.square().sum(1)
    distances = []
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS].double() - center
        smallest = torch.full((len(block),), torch.inf, dtype=torch.float64, device="cpu")
        nearest_index = torch.zeros(len(block), dtype=torch.int64, device="cpu")
        for offset in range(0, len(wide), _POOL):
            part = slice(offset, offset + _POOL)
            # Squared distances, up to a constant for each row.
            values = torch.addmm(norms[part], block, wide[part].T, alpha=-2)
            if own is not None:
                own_column = own[start : start + len(block)] - offset
                in_part = ((own_column >= 0) & (own_column < values.shape[1])).nonzero().flatten()
                values[in_part, own_column[in_part]] = torch.inf
            part_smallest, column = values.min(1)
            is_smaller = part_smallest < smallest
            smallest = torch.where(is_smaller, part_smallest, smallest)
            nearest_index = torch.where(is_smaller, column + offset, nearest_index)
        # Products only find the nearest row. Differences give a copy the distance 0, not the root of a rounding error.
        distances.append(torch.linalg.vector_norm(block - wide[nearest_index], dim=1))
    return torch.cat(distances)


def nearer(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Compare distances (n,) of generated images to the training images with those (m,) of unseen real images.

    References:
        Meehan, Chaudhuri and Dasgupta, "A non-parametric test to detect data-copying in generative models", 2020.

    Returns:
        P(generated < real) + P(generated = real) / 2 over pairs, and the fraction of `generated` below at least 99% of
        `real`.

    Example:
        >>> nearer(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]))
        (0.625, 0.5)
    """
    ordered = real.sort().values
    not_above = torch.searchsorted(ordered, generated, right=True).double() / len(ordered)
    below = torch.searchsorted(ordered, generated).double() / len(ordered)
    # This is (1 - not_above) >= .99, without the digits that the subtraction loses.
    return float(1 - (below + not_above).mean() / 2), float((not_above <= 0.01).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return distances (n, m), computed by differences, so that equal rows have distance 0 and ties stay ties."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


# --- classification accuracy score --------------------------------------------------------------------------


_EPOCHS = 4
# Fewest optimizer steps, for training on a few hundred images.
_STEPS = 200
_BATCH = 100
_RATE = 2e-3
# Images of a batch for testing.
_TEST_BATCH = 500


def classification_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    order: Tensor,
    classes: int,
    make: Callable[[], nn.Module] | None,
    seed: int,
    device: torch.device,
) -> float:
    """Train a network on some images and return its accuracy on others.

    References:
        Ravuri and Vinyals, "Classification accuracy score for conditional generative models", 2019.

    Args:
        train: Training images (N, C, H, W) and labels (N,) on the CPU.
        test: Test images and labels.
        order: Order (N,) of the training images before shuffling.
        classes: K.
        make: Function that makes the network; None for two convolutions and two linear layers.
        seed: Seed of first weights, batches and dropout. The global random state is restored.
        device: Device for training.
    """
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    devices = [device.index or 0] if device.type == "cuda" else []
    # First weights of layers and dropout use the global random state, which is restored, also on this device.
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
            order = order[torch.randperm(len(order), generator=generator, device="cpu")]
            for index in order[: len(order) // batch * batch].split(batch):
                logits = _logits(network, images[index.to(images.device)].to(device), classes)
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[index].to(device)).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            network.eval()
            predicted = [_logits(network, x.to(device), classes).argmax(-1).cpu() for x in test[0].split(_TEST_BATCH)]
    return float((torch.cat(predicted) == test[1]).double().mean())


def _logits(network: nn.Module, images: Tensor, classes: int) -> Tensor:
    logits = _logits_of(network(images.to(torch.float32)))
    if logits.shape != (len(images), classes):
        raise ValueError(
            f"the classifier has logits of shape {tuple(logits.shape)} for {len(images)} images; expected "
            f"{(len(images), classes)}, one for each of the evaluator's {classes} classes"
        )
    return logits


def _small_network(shape: torch.Size, classes: int) -> nn.Module:
    """Make a network of two convolutions and two linear layers for images (C, H, W)."""
    channels, height, width = shape
    size = 5 if min(height, width) >= 16 else 3
    pixels = math.ceil(height / 4) * math.ceil(width / 4)
    # On the CPU first, so that the weights do not depend on the default device.
    with torch.device("cpu"):
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
