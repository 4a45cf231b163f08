"""Quality of generated images of given classes, measured with an independent classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from penult._checks import check_finite, check_integer, check_seed, described, integer_labels
from penult.activations import Tap, _tap_in
from penult.generate._image_metrics import Balls, Normal, classification_accuracy, nearer, nearest, overlap
from penult.generate._images import Source, check_images, read_source, shuffled
from penult.head import _untouched, find_head

__all__ = ["Judge", "Quality", "quality"]

_COLUMNS = ("accuracy", "frechet", "class_frechet", "precision", "recall", "density", "coverage")
# Columns that a table omits if all their values are None.
_OPTIONAL_COLUMNS = ("cas", "nearness", "copies")


@final
@dataclass(frozen=True)
class Quality:
    """Quality of generated images; ``print`` shows a table, with a second row for real images if it is known.

    Attributes:
        accuracy: Fraction of images that the evaluator assigns to the class that they were generated for.
        frechet: Fréchet distance to the real images, see `frechet_distance`; 0 is a perfect match of mean and
            covariance.
        class_frechet: Mean over classes of the Fréchet distance between images of one class.
        precision: Fraction of generated images that are close to real images (fidelity).
        recall: Fraction of real images that are close to generated images (variety).
        density: Like precision, but counts how many real images are close; 1 for a perfect match.
        coverage: Fraction of real images with a generated image close to them.
        cas: Classification accuracy score: accuracy on the real images of a network that was trained on the generated
            images; None if it was not computed.
        nearness: Probability that a generated image is closer to the training images than an unseen real image: 0.5 is
            ideal, 1 means copies; None without training images.
        copies: Fraction of images that are closer to a training image than 99% of the unseen real images; .01 is
            ideal; None without training images.
        count: Number of images.
        reference: The same for real images instead of generated ones; None if it was not computed.
    """

    accuracy: float
    frechet: float
    class_frechet: float
    precision: float
    recall: float
    density: float
    coverage: float
    cas: float | None
    nearness: float | None
    copies: float | None
    count: int
    reference: Quality | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the table."""
        rows = [("generated", self)] + ([] if self.reference is None else [("real", self.reference)])
        optional = (name for name in _OPTIONAL_COLUMNS if any(getattr(row, name) is not None for _, row in rows))
        names = (*_COLUMNS, *optional)
        lines = [["", "images", *names]]
        for title, row in rows:
            lines.append([title, str(row.count), *(_formatted(name, getattr(row, name)) for name in names)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([title.ljust(widths[0]), *(x.rjust(w) for x, w in zip(cells, widths[1:], strict=True))])
            for title, *cells in lines
        )


def _formatted(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if "frechet" in name else f"{value:.3f}"


@dataclass(frozen=True)
class _EvaluatedImages:
    """Images with their features and predictions. All but the images are on the CPU.

    Attributes:
        images: (N, C, H, W).
        labels: (N,), -1 if unknown.
        features: (N, d).
        predicted: Predicted classes (N,).
        nearest: Distances (N,) to the training images; None without training images.
    """

    images: Tensor
    labels: Tensor
    features: Tensor
    predicted: Tensor
    nearest: Tensor | None

    def at(self, index: Tensor) -> _EvaluatedImages:
        """Return the images of an index (M,)."""
        distances = None if self.nearest is None else self.nearest[index]
        images = self.images[index.to(self.images.device)]
        return _EvaluatedImages(images, self.labels[index], self.features[index], self.predicted[index], distances)


@dataclass(frozen=True)
class _RealStatistics:
    """Statistics of the real images, computed once and shared by all generated images.

    Attributes:
        evaluated: The real images.
        counts: Number of images of each class (K,).
        normal: Normal distribution of all features.
        class_normals: Normal distribution of the features of each class.
        balls: Balls around a sample of the features.
    """

    evaluated: _EvaluatedImages
    counts: Tensor
    normal: Normal
    class_normals: dict[int, Normal]
    balls: Balls


@final
class Judge:
    r"""Measures the quality of generated images by held-out real images, in the feature space of an evaluator.

    Features are the penultimate activations of the evaluator, not normalized; statistics are in float64. The evaluator
    should be another network than the one whose head the images were generated from, because generators are trained to
    satisfy that one. Statistics of the real images are computed once, so judging many generators, or one during its
    training, takes little time for each. All figures depend on the number of images and, to a small extent, on the
    choice of images: compare them with `reference`, and only for equal numbers.

    - ``accuracy``: the evaluator's predictions compared with the labels.
    - ``frechet``, ``class_frechet``: :math:`\lVert m_1 - m_2 \rVert^2 + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2
      (\Sigma_1 \Sigma_2)^{1/2})` (Heusel et al. 2017).
    - ``precision``, ``recall`` (Kynkäänniemi et al. 2019), ``density``, ``coverage`` (Naeem et al. 2020): by k nearest
      neighbours, in random samples of real and generated images, of equal size if there are enough images.
    - ``cas``: accuracy on the real images of a new network that is trained on the generated images (Ravuri and Vinyals
      2019): 4 epochs or 200 steps, whichever is longer, of AdamW with batches of 100, in float32.
    - ``nearness``, ``copies``: distances to the nearest training image, of generated images compared with unseen real
      images. The distributions are equal if nothing was copied. Nearness is the Mann-Whitney statistic of Meehan et al.
      2020. Copies depends on the nearest hundredth of the real images: of 300 these are three, and then .02 does not
      indicate copying.

    References:
        Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.
        Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019.
        Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.
        Ravuri and Vinyals, "Classification accuracy score for conditional generative models", 2019.
        Meehan, Chaudhuri and Dasgupta, "A non-parametric test to detect data-copying in generative models", 2020.

    Args:
        evaluator: A classifier, images (B, C, H, W) -> logits (B, K), or a `Tap` of one.
        real: Held-out real images in [0, 1] and their labels: (images, labels) as tensors (N, C, H, W) and (N,), or a
            map-style data set of (image, label).
        train: The training images of the generator, in the same form; labels are optional. Without them ``nearness``
            and ``copies`` are None.
        neighbours: k.
        most: Most images on either side for nearest neighbours.
        classifier: Function that makes a new network for ``cas``: () -> module, images -> logits (B, K). Default: two
            convolutions and two linear layers.
        cas: Whether to compute ``cas``, which takes most of the time.
        seed: Seed of all random choices. No global random state is touched.
        batch_size: Images in a batch of the evaluator.

    Raises:
        HeadNotFoundError: The evaluator's head cannot be found.
        TypeError: An argument has a wrong type, images are not floating, or labels are not integers.
        ValueError: Shapes do not fit, images are not in [0, 1] or not finite, labels do not fit the evaluator, a class
            has fewer than two images, there are too few images for k, or an option is out of range.

    Example:
        >>> # In images of class y, row y of the pixels is bright.
        >>> def stripes(n, seed):
        ...     labels, generator = torch.arange(n) % 3, torch.Generator().manual_seed(seed)
        ...     images = 0.3 * torch.rand(n, 1, 3, 8, generator=generator)
        ...     return images + 0.6 * torch.eye(3)[labels].reshape(n, 1, 3, 1), labels
        >>> evaluator = nn.Sequential(nn.Flatten(), nn.Linear(24, 3, bias=False))
        >>> evaluator[1].weight.data = torch.eye(3).repeat_interleave(8, 1)
        >>> judge = Judge(evaluator, stripes(150, 0), stripes(300, 1), cas=False)
        >>> judge(*stripes(150, 2)).accuracy
        1.0
        >>> copied = judge(*(x[:150] for x in stripes(300, 1)))
        >>> copied.nearness, copied.copies
        (1.0, 1.0)
    """

    def __init__(
        self,
        evaluator: nn.Module,
        real: Source,
        train: Source | None = None,
        *,
        neighbours: int = 5,
        most: int = 2000,
        classifier: Callable[[], nn.Module] | None = None,
        cas: bool = True,
        seed: int = 0,
        batch_size: int = 500,
    ) -> None:
        self._neighbours = check_integer("neighbours", neighbours)
        self._most = check_integer("most", most, self._neighbours + 1)
        self._batch_size, self._seed = check_integer("batch_size", batch_size), check_seed(seed)
        self._classifier, self._cas = classifier, cas
        if not isinstance(evaluator, nn.Module):
            raise TypeError(
                f"evaluator is {described(evaluator)}; expected a torch.nn.Module, images -> logits, or a penult.Tap"
            )
        images, labels = read_source("real", real)
        self._shape = images.shape[1:]
        check_images("real", images, self._shape)
        state = chain(evaluator.parameters(), evaluator.buffers())
        example = next((tensor for tensor in state if tensor.is_floating_point()), images)
        self._device, self._dtype = example.device, example.dtype
        tap = _tap_in(evaluator)
        if tap is None:
            tap = Tap(evaluator, find_head(evaluator, images[:16].to(self._device, self._dtype)))
        self._tap = tap
        self._k = tap.head.num_classes
        labels = self._checked_labels("real", labels, len(images))
        counts = labels.bincount(minlength=self._k)
        self._check_counts("real", counts, counts)
        self._train = None if train is None else self._training_images(train, counts)
        self._real = self._statistics(self._evaluated("real", images, labels))

    def __call__(self, images: Tensor, labels: Tensor) -> Quality:
        """Measure the quality of generated images.

        Args:
            images: Floats (N, C, H, W) in [0, 1]; of each class of the real images at least two, and no other classes.
            labels: Integers (N,), the classes that they were generated for.

        Returns:
            Their quality, without a reference; the quality of real images is `reference`.

        Raises:
            TypeError: An argument has a wrong type, images are not floating, or labels are not integers.
            ValueError: Shapes do not fit, images are not in [0, 1] or not finite, a label is out of range, a class has
                fewer than two images, or there are too few images for k.
        """
        images, labels = read_source("generated", (images, labels))
        check_images("generated", images, self._shape)
        labels = self._checked_labels("generated", labels, len(images))
        counts = labels.bincount(minlength=self._k)
        self._check_counts("generated", counts, self._real.counts)
        self._check_counts("real", self._real.counts, counts)
        return self._quality(self._evaluated("generated", images, labels), self._real)

    @cached_property
    def reference(self) -> Quality:
        """Quality of real images, to compare that of generated images with. Computed once, at the first access.

        If training images have labels, it is the quality of a random sample of them, with at most as many images of
        each class as `real`. Each is excluded from the training images when its own distance to them is measured. If
        the evaluator was trained on these images, the figures differ slightly from those of unseen images. Without
        labels, it is the quality of a random half of `real` compared with the other half; because of the smaller
        number of images, it is slightly worse than that of a perfect generator.

        Raises:
            ValueError: `real` has to be halved, and has fewer than four images of a class or too few for k.
        """
        return self._reference(self._real.counts)

    def _reference(self, counts: Tensor) -> Quality:
        """Compute the reference for at most `counts` (K,) images of each class; not used if `real` is halved."""
        real, train = self._real.evaluated, self._train
        if train is None or bool((train.labels < 0).any()):
            order = shuffled(real.images, real.labels, self._seed)
            # After sorting by class, every other image is half of each class.
            order = order[real.labels[order].argsort(stable=True)]
            one, two = real.at(order[::2]), real.at(order[1::2])
            try:
                for name, half in (("one half of real", one), ("the other half of real", two)):
                    self._check_counts(name, half.labels.bincount(minlength=self._k), self._real.counts)
            except ValueError as error:
                raise ValueError(
                    f"{error}; or give labels for the reference by passing train=(images, labels)"
                ) from None
            return self._quality(one, self._statistics(two))
        order = shuffled(train.images, train.labels, self._seed)
        labels = train.labels[order]
        index = torch.cat([order[labels == y][: int(counts[y])] for y in range(self._k)])
        distances = nearest(train.features[index], train.features, own=index)
        return self._quality(replace(train.at(index), nearest=distances), self._real)

    def _training_images(self, source: Source, real_counts: Tensor) -> _EvaluatedImages:
        """Evaluate the training images; if they have labels, check that there are enough for a reference."""
        images, labels = read_source("train", source)
        check_images("train", images, self._shape)
        if len(images) < 2:
            raise ValueError(f"train has {len(images)} images; give at least 2, those that the generator was fitted to")
        if labels is None:
            labels = torch.full((len(images),), -1, device="cpu")
        else:
            labels = self._checked_labels("train", labels, len(images))
            counts = labels.bincount(minlength=self._k).where(real_counts > 0, 0)
            self._check_counts("train", counts, real_counts)
        return _EvaluatedImages(images, labels, *self._forward("train", images), None)

    def _checked_labels(self, name: str, labels: Any, count: int) -> Tensor:
        """Check labels and return them as int64 (N,) on the CPU."""
        if labels is None:
            raise ValueError(f"{name} has no labels; give ({name} images, labels), or a data set of (image, label)")
        return integer_labels(labels, (count,), self._k, name=f"{name} labels").detach().cpu()

    def _check_counts(self, name: str, counts: Tensor, real: Tensor) -> None:
        """Raise unless there are enough images for all figures, given the numbers (K,) of real images."""
        few = ((counts < 2) & (counts + real > 0)).nonzero().flatten().tolist()
        if few:
            raise ValueError(
                f"{name} has fewer than 2 images of the classes {few}, so their covariance is unknown; give at least 2 "
                "of each class of real or generated images"
            )
        if int(counts.sum()) <= self._neighbours:
            raise ValueError(
                f"{name} has {int(counts.sum())} images, too few for {self._neighbours} neighbours of each; give more "
                "images, or pass a smaller neighbours="
            )

    def _evaluated(self, name: str, images: Tensor, labels: Tensor) -> _EvaluatedImages:
        """Evaluate images and measure their distances to the training images."""
        features, predicted = self._forward(name, images)
        distances = None if self._train is None else nearest(features, self._train.features)
        return _EvaluatedImages(images, labels, features, predicted, distances)

    def _forward(self, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, d) and predicted classes (N,) of the evaluator."""
        features, predicted = [], []
        with _untouched(self._tap):
            for block in images.split(self._batch_size):
                h, logits = self._tap(block.to(self._device, self._dtype))
                if h.ndim != 2 or len(h) != len(block):
                    raise ValueError(
                        f"the evaluator has features of shape {tuple(h.shape)} for {len(block)} images; expected one "
                        "vector for each image. Give a classifier of whole images"
                    )
                features.append(h.to("cpu", torch.promote_types(h.dtype, torch.float32), copy=True))
                predicted.append(logits.argmax(-1).cpu())
        joined = torch.cat(features)
        check_finite(f"the evaluator's features of {name} images", joined)
        return joined, torch.cat(predicted)

    def _balls(self, evaluated: _EvaluatedImages, max_rows: int) -> Balls:
        """Compute the balls of a random sample of images."""
        index = shuffled(evaluated.images, evaluated.labels, self._seed)[:max_rows]
        return Balls.of(evaluated.features[index], self._neighbours)

    def _statistics(self, real: _EvaluatedImages) -> _RealStatistics:
        counts = real.labels.bincount(minlength=self._k)
        class_normals = {y: Normal.of(real.features[real.labels == y]) for y in counts.nonzero().flatten().tolist()}
        return _RealStatistics(real, counts, Normal.of(real.features), class_normals, self._balls(real, self._most))

    def _quality(self, images: _EvaluatedImages, real: _RealStatistics) -> Quality:
        """Compute the quality of images relative to real ones."""
        class_distances = [
            normal.distance(Normal.of(images.features[images.labels == y])) for y, normal in real.class_normals.items()
        ]
        neighbour_metrics = overlap(real.balls, self._balls(images, len(real.balls.rows)))
        nearness, copies = None, None
        if images.nearest is not None and real.evaluated.nearest is not None:
            nearness, copies = nearer(images.nearest, real.evaluated.nearest)
        return Quality(
            accuracy=float((images.predicted == images.labels).double().mean()),
            frechet=real.normal.distance(Normal.of(images.features)),
            class_frechet=math.fsum(class_distances) / len(class_distances),
            **neighbour_metrics._asdict(),
            cas=self._classification_accuracy(images, real.evaluated) if self._cas else None,
            nearness=nearness,
            copies=copies,
            count=len(images.images),
        )

    def _classification_accuracy(self, generated: _EvaluatedImages, real: _EvaluatedImages) -> float:
        order = shuffled(generated.images, generated.labels, self._seed)
        train, test = (generated.images, generated.labels), (real.images, real.labels)
        return classification_accuracy(train, test, order, self._k, self._classifier, self._seed, self._device)


def quality(images: Tensor, labels: Tensor, evaluator: nn.Module, real: Source, **options: Any) -> Quality:
    """Measure the quality of generated images, and that of real images as a reference.

    This uses a `Judge` once. If its reference is a sample of training images, the sample has at most as many images of
    each class as the generated images.

    Args:
        images: Generated images (N, C, H, W) in [0, 1].
        labels: Integers (N,), the classes that they were generated for.
        evaluator: A classifier that was not used to generate them, or a `Tap` of it.
        real: Held-out real images and their labels, as tensors or as a data set.
        **options: Further arguments of `Judge`, such as ``train``.

    Returns:
        Their quality, with ``reference``.

    Raises:
        HeadNotFoundError: As for `Judge`.
        TypeError: As for `Judge`.
        ValueError: As for `Judge`, and for its `reference`.

    Example:
        >>> x, y = torch.rand(120, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 2
        >>> evaluator = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> result = quality(x[:40] ** 3, y[:40], evaluator, (x[40:], y[40:]), cas=False)
        >>> result.frechet > result.reference.frechet
        True
        >>> print(str(result).splitlines()[0])
                   images  accuracy  frechet  class_frechet  precision  recall  density  coverage
    """
    judge = Judge(evaluator, real, **options)
    result = judge(images, labels)
    counts = integer_labels(labels).detach().cpu().bincount(minlength=judge._k)
    return replace(result, reference=judge._reference(counts))
