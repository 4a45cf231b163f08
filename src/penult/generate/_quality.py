"""How good generated images of given classes are, as an independent network sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from penult._checks import check_finite, check_labels
from penult.activations import Tap
from penult.generate._image_metrics import Balls, Normal, classification_accuracy, nearer, nearest, overlap
from penult.generate._images import Source, check_images, read_source, shuffled
from penult.head import _untouched, find_head

__all__ = ["Judge", "Quality", "quality"]

_COLUMNS = ("accuracy", "frechet", "class_frechet", "precision", "recall", "density", "coverage")
_MAYBE = ("cas", "nearness", "copies")  # left out of a table where nothing knows them


@final
@dataclass(frozen=True)
class Quality:
    """Quality of generated images; ``print`` shows a table, with a second row for real images where it is known.

    Attributes:
        accuracy: Share of images that the evaluator puts into the class that they were made for.
        frechet: Fréchet distance to the real images, see `frechet_distance`; 0 is a perfect match of mean and
            covariance.
        class_frechet: The mean over classes of the same between images of one class.
        precision: Share of generated images among the real ones (fidelity).
        recall: Share of real images among the generated ones (variety).
        density: Like precision, but it counts how many real images are near; 1 for a perfect match.
        coverage: Share of real images with a generated one near by.
        cas: Classification accuracy score: the accuracy on the real images of a fresh network that saw the generated
            ones alone; None if it was not asked for.
        nearness: Probability that a generated image is nearer to the training images than a real, unseen one is: 0.5 is
            the ideal, 1 means copies; None without training images.
        copies: Share of images that are nearer to a training image than 99% of the real, unseen ones are; .01 is the
            ideal; None without training images.
        count: Number of images.
        reference: The same for real images in place of generated ones; None where it was not asked for.
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
        """The same as plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The table."""
        rows = [("generated", self)] + ([] if self.reference is None else [("real", self.reference)])
        names = _COLUMNS + tuple(name for name in _MAYBE if any(getattr(row, name) is not None for _, row in rows))
        lines = [["", "images", *names]]
        for title, row in rows:
            lines.append([title, str(row.count), *(_shown(name, getattr(row, name)) for name in names)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))])
            for first, *rest in lines
        )


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if "frechet" in name else f"{value:.3f}"


@dataclass(frozen=True)
class _Seen:
    """Images (N, C, H, W), and on the CPU: labels (N,), -1 where unknown, features (N, d), predicted classes (N,)."""

    images: Tensor
    labels: Tensor
    features: Tensor
    predicted: Tensor
    nearest: Tensor | None  # (N,) distances to the training images

    def at(self, places: Tensor) -> _Seen:
        """Some of them."""
        near = None if self.nearest is None else self.nearest[places]
        images = self.images[places.to(self.images.device)]
        return _Seen(images, self.labels[places], self.features[places], self.predicted[places], near)


@dataclass(frozen=True)
class _Truth:
    """Real images, with all that can be known of them before any others are seen."""

    seen: _Seen
    counts: Tensor  # (K,)
    whole: Normal
    classes: dict[int, Normal]
    balls: Balls


@final
class Judge:
    r"""Judges generated images by held-out real ones, in the feature space of an independent network.

    Features are the penultimate activations of the evaluator, as they are; statistics are in float64. The evaluator
    should be another network than the one whose head the images were made from: that one is easily pleased. What real
    images have to say is computed once, so that many generators, or one while it is trained, are judged at little cost
    each. All figures depend on the number of images and, a little, on which these are, so that they are to be read
    against `reference` and compared for equal numbers only.

    - ``accuracy``: the evaluator's answers against the labels.
    - ``frechet``, ``class_frechet``: :math:`\lVert m_1 - m_2 \rVert^2 + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2
      (\Sigma_1 \Sigma_2)^{1/2})` (Heusel et al. 2017).
    - ``precision``, ``recall`` (Kynkäänniemi et al. 2019), ``density``, ``coverage`` (Naeem et al. 2020): by k nearest
      neighbours, on a random sample of both sides, of equal number where there are as many.
    - ``cas``: a fresh network is trained on the generated images, and its accuracy on the real ones is taken (Ravuri
      and Vinyals 2019): 4 epochs or 200 steps, whichever are more, of AdamW with batches of 100, in float32.
    - ``nearness``, ``copies``: distances to the nearest training image, of generated against real, unseen images, whose
      law is the same where nothing was copied; nearness is the Mann-Whitney statistic of Meehan et al. 2020. Copies
      rest on the nearest hundredth of the real images: of 300 that is three, and then .02 is no sign of copying.

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
        train: The images that the generator was trained on, in the same forms; they need no labels. Without them
            there is no ``nearness`` and no ``copies``.
        neighbours: k.
        most: Images of either side that the k nearest neighbours are sought among.
        classifier: Makes the network, fresh each time, that is trained for ``cas``: () -> module, images -> logits
            (B, K). When left out, two convolutions and two linear layers.
        cas: Whether to train one at all; it takes most of the time.
        seed: Seed of all that is random. No global random state is touched.
        batch_size: Images that the evaluator sees at a time.

    Raises:
        HeadNotFoundError: The evaluator's head cannot be found.
        TypeError: An argument is of a wrong type.
        ValueError: Shapes or dtypes do not fit, images are not within [0, 1] or not finite, labels do not fit the
            evaluator, a class has fewer than two images, there are too few images for k, or an option is out of range.

    Example:
        >>> def stripes(n, seed):  # class y has its y-th row of pixels bright
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
        if neighbours < 1 or most <= neighbours:
            raise ValueError(f"neighbours is {neighbours} and most is {most}; 1 <= neighbours < most must hold")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self._neighbours, self._most, self._seed, self._batch_size = neighbours, most, seed, batch_size
        self._classifier, self._cas = classifier, cas
        if not isinstance(evaluator, nn.Module):
            raise TypeError(f"evaluator is a {type(evaluator).__name__}; give an nn.Module, images -> logits, or a Tap")
        images, labels = read_source("real", real)
        self._shape = images.shape[1:]
        check_images("real", images, self._shape)
        place = next((x for x in chain(evaluator.parameters(), evaluator.buffers()) if x.is_floating_point()), images)
        self._device, self._dtype = place.device, place.dtype
        if not isinstance(evaluator, Tap):
            evaluator = Tap(evaluator, find_head(evaluator, images[:16].to(self._device, self._dtype)))
        self._tap = evaluator
        self._k = evaluator.head.num_classes
        known = self._checked_labels("real", labels, len(images))
        counts = known.bincount(minlength=self._k)
        self._check_counts("real", counts, counts)
        self._train = None if train is None else self._training_images(train, counts)
        self._truth = self._known(self._look("real", images, known))

    def __call__(self, images: Tensor, labels: Tensor) -> Quality:
        """Judge generated images.

        Args:
            images: (N, C, H, W) floats in [0, 1], at least two of each class that real ones have, and of no other.
            labels: (N,) integers, the classes that they were made for.

        Returns:
            Their quality, without a reference; that of real images is `reference`.

        Raises:
            TypeError: An argument is of a wrong type.
            ValueError: Shapes or dtypes do not fit, images are not within [0, 1] or not finite, a label is outside of
                the evaluator, a class has fewer than two images, or there are too few images for k.
        """
        images, given = read_source("generated", (images, labels))
        check_images("generated", images, self._shape)
        known = self._checked_labels("generated", given, len(images))
        counts = known.bincount(minlength=self._k)
        self._check_counts("generated", counts, self._truth.counts)
        self._check_counts("real", self._truth.counts, counts)
        return self._measure(self._look("generated", images, known), self._truth)

    @cached_property
    def reference(self) -> Quality:
        """Quality of real images, which that of generated ones is read against. Computed once, when it is asked for.

        Where training images came with labels, it is that of a random sample of them, as many of each class as `real`
        has or as there are, with each of them left out of the training images that its own distance is taken to. An
        evaluator that was itself trained on these images knows them, and then the row differs a little from that of
        fresh images. Otherwise it is that of a random half of `real` against the other half; with half as many images,
        it looks a little worse than the generated ones of a perfect generator would.

        Raises:
            ValueError: `real` has to be halved, and has fewer than four images of a class or too few for k.
        """
        return self._reference(self._truth.counts)

    def _reference(self, counts: Tensor) -> Quality:
        """The same for a number (K,) of images of each class, if real ones need not be halved."""
        seen, train = self._truth.seen, self._train
        if train is None or bool((train.labels < 0).any()):
            order = shuffled(seen.images, seen.labels, self._seed)
            order = order[seen.labels[order].argsort(stable=True)]  # every other one halves each class
            one, two = seen.at(order[::2]), seen.at(order[1::2])
            try:
                for name, half in (("one half of real", one), ("the other half of real", two)):
                    self._check_counts(name, half.labels.bincount(minlength=self._k), self._truth.counts)
            except ValueError as error:
                raise ValueError(
                    f"{error}; or give labels for the reference by passing train=(images, labels)"
                ) from None
            return self._measure(one, self._known(two))
        order = shuffled(train.images, train.labels, self._seed)
        labels = train.labels[order]
        taken = torch.cat([order[labels == y][: int(counts[y])] for y in range(self._k)])
        near = nearest(train.features[taken], train.features, own=taken)
        return self._measure(replace(train.at(taken), nearest=near), self._truth)

    def _training_images(self, source: Source, real: Tensor) -> _Seen:
        """Training images, and labels if they have any; those have to be enough for a reference."""
        images, labels = read_source("train", source)
        check_images("train", images, self._shape)
        if len(images) < 2:
            raise ValueError(f"train has {len(images)} images; give at least 2, those that the generator was fitted to")
        if labels is None:
            return _Seen(images, torch.full((len(images),), -1), *self._forward("train", images), None)
        known = self._checked_labels("train", labels, len(images))
        self._check_counts("train", known.bincount(minlength=self._k).where(real > 0, 0), real)
        return _Seen(images, known, *self._forward("train", images), None)

    def _checked_labels(self, name: str, labels: Tensor | None, count: int) -> Tensor:
        """Labels (N,), int64 on the CPU."""
        if labels is None:
            raise ValueError(f"{name} has no labels; give ({name} images, labels), or a data set of (image, label)")
        try:
            check_labels(labels, torch.Size((count, self._k)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        return labels.detach().to("cpu", torch.int64)

    def _check_counts(self, name: str, counts: Tensor, real: Tensor) -> None:
        """Raise unless a side has enough images for all figures, given the classes of the real one."""
        few = ((counts < 2) & (counts + real > 0)).nonzero().flatten().tolist()
        if few:
            raise ValueError(
                f"{name} has fewer than 2 images of the classes {few}, which leaves their covariance unknown; give at "
                "least 2 of each class that either side has"
            )
        if int(counts.sum()) <= self._neighbours:
            raise ValueError(
                f"{name} has {int(counts.sum())} images, too few for {self._neighbours} neighbours of each; give more "
                "images, or pass a smaller neighbours="
            )

    def _look(self, name: str, images: Tensor, labels: Tensor) -> _Seen:
        """Images as the evaluator sees them."""
        features, predicted = self._forward(name, images)
        near = None if self._train is None else nearest(features, self._train.features)
        return _Seen(images, labels, features, predicted, near)

    def _forward(self, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, d) and predicted classes (N,)."""
        features, predicted = [], []
        with _untouched(self._tap):
            for block in images.split(self._batch_size):
                h, logits = self._tap(block.to(self._device, self._dtype))
                if h.ndim != 2 or len(h) != len(block):
                    raise ValueError(
                        f"the evaluator gives features of shape {tuple(h.shape)} for {len(block)} images; it must have "
                        "one vector an image: give a classifier of whole images"
                    )
                features.append(h.to("cpu", torch.promote_types(h.dtype, torch.float32), copy=True))
                predicted.append(logits.argmax(-1).cpu())
        joined = torch.cat(features)
        check_finite(f"the evaluator's features of {name} images", joined)
        return joined, torch.cat(predicted)

    def _sample(self, seen: _Seen, most: int) -> Balls:
        places = shuffled(seen.images, seen.labels, self._seed)[:most]
        return Balls.of(seen.features[places], self._neighbours)

    def _known(self, seen: _Seen) -> _Truth:
        counts = seen.labels.bincount(minlength=self._k)
        classes = {y: Normal.of(seen.features[seen.labels == y]) for y in counts.nonzero().flatten().tolist()}
        return _Truth(seen, counts, Normal.of(seen.features), classes, self._sample(seen, self._most))

    def _measure(self, made: _Seen, truth: _Truth) -> Quality:
        """Quality of images by real ones."""
        by_class = [normal.distance(Normal.of(made.features[made.labels == y])) for y, normal in truth.classes.items()]
        shared = overlap(truth.balls, self._sample(made, len(truth.balls.rows)))
        near: tuple[float, float] | tuple[None, None] = (None, None)
        if made.nearest is not None and truth.seen.nearest is not None:
            near = nearer(made.nearest, truth.seen.nearest)
        return Quality(
            accuracy=float((made.predicted == made.labels).double().mean()),
            frechet=truth.whole.distance(Normal.of(made.features)),
            class_frechet=math.fsum(by_class) / len(by_class),
            **shared._asdict(),
            cas=self._accuracy_score(made, truth.seen) if self._cas else None,
            nearness=near[0],
            copies=near[1],
            count=len(made.images),
        )

    def _accuracy_score(self, made: _Seen, real: _Seen) -> float:
        order = shuffled(made.images, made.labels, self._seed)
        train, test = (made.images, made.labels), (real.images, real.labels)
        return classification_accuracy(train, test, order, self._k, self._classifier, self._seed, self._device)


def quality(images: Tensor, labels: Tensor, evaluator: nn.Module, real: Source, **options: Any) -> Quality:
    """Quality of generated images, with that of real ones to read it against.

    A `Judge` for one occasion. Its reference, where it is a sample of training images, has as many of each class as the
    generated ones.

    Args:
        images: Generated images (N, C, H, W) in [0, 1].
        labels: (N,) integers, the classes that they were made for.
        evaluator: A classifier that had no part in making them, or a `Tap` of it.
        real: Held-out real images and their labels, as tensors or as a data set.
        **options: The others of `Judge`, such as ``train``.

    Returns:
        Their quality, with ``reference``.

    Raises:
        HeadNotFoundError: As for `Judge`.
        TypeError: As for `Judge`.
        ValueError: As for `Judge`, and for its `reference`.

    Example:
        >>> x, y = torch.rand(120, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 2
        >>> evaluator = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = quality(x[:40] ** 3, y[:40], evaluator, (x[40:], y[40:]), cas=False)
        >>> found.frechet > found.reference.frechet
        True
        >>> print(str(found).splitlines()[0])
                   images  accuracy  frechet  class_frechet  precision  recall  density  coverage
    """
    judge = Judge(evaluator, real, **options)
    found = judge(images, labels)
    return replace(found, reference=judge._reference(labels.detach().cpu().long().bincount(minlength=judge._k)))
