"""Abstract class of generators that are conditioned on activations."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from penult._checks import check_choice, check_integer, described, integer_labels
from penult.activations import Activations, Tap
from penult.bases import Base
from penult.generate import _file as generator_file
from penult.generate._classifier import FrozenClassifier, device_only
from penult.generate._conditions import Standardizer, bank_of, draw, without_data
from penult.generate._lightning import RecordedModule
from penult.generate._networks import check_image_shape
from penult.head import _untouched
from penult.pair import GenerativePair

__all__ = ["BATCH", "ActivationGenerator", "Condition"]

Condition = Literal["activation", "label"]
Self = TypeVar("Self", bound="ActivationGenerator")

# Images of a batch for generating and encoding.
BATCH = 500
# Sampled activations of a class from which `edit` takes the nearest.
_CANDIDATES = 256
# Tries for an image that the classifier assigns to its class.
_ROUNDS = 100


class ActivationGenerator(RecordedModule, ABC):
    """A network G(z, h) that generates images from activations; subclasses define the training.

    Args:
        pair: The pair that `generate` samples activations from.
        tap: The classifier; None if no image has to be classified.
        image_shape: (C, H, W).
        latent: Dimension of the code z.
        condition: ``"activation"``: trained on h = tap(x), no labels needed; ``"label"``: on h ~ p(h|y).
        activations: Activations for mean and scale of the condition. Default: samples of the pair.
        preprocess: Differentiable function from images in [0, 1] to inputs of the classifier.
    """

    # Names of the networks that files hold, and of those that only training needs.
    networks: ClassVar[tuple[str, ...]]
    training_networks: ClassVar[tuple[str, ...]] = ()
    # The classifier and the pair.
    _untrained = "sight.", "pair."

    def __init__(
        self,
        pair: GenerativePair,
        tap: Tap | None,
        image_shape: Sequence[int],
        latent: int,
        condition: Condition,
        activations: Tensor | Activations | None,
        preprocess: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        if not isinstance(pair, GenerativePair):
            raise TypeError(f"pair is {described(pair)}; expected a penult.GenerativePair")
        check_choice("condition", condition, get_args(Condition))
        self.image_shape = check_image_shape(tuple(image_shape))
        self.latent, self.condition = check_integer("latent", latent), condition
        self.pair = pair
        self.sight = FrozenClassifier(tap, preprocess, pair.head)
        self.standardize = Standardizer.of_pair(pair, activations)

    @property
    def tap(self) -> Tap | None:
        """The classifier, or None."""
        return self.sight.tap

    # --- for subclasses ---------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] of codes (B, latent) and activations (B, d), with gradients."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return JSON data from which the networks are rebuilt."""

    @classmethod
    @abstractmethod
    def from_config(cls: type[Self], config: dict[str, Any], pair: GenerativePair, **networks: nn.Module) -> Self:
        """Make a generator from its `config`, without its weights, with the networks of the user, if any."""

    def code_of(self, x: Tensor, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return codes (B, latent) of images and their activations; random codes unless a subclass has an encoder."""
        return self.random_codes(len(x), generator)

    # --- images -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        y: Tensor | int,
        confident: float | None = None,
        reject: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Generate images of classes: h ~ p(h|y), z ~ N(0, I), G(z, h).

        Args:
            y: Labels (*B,).
            confident: Only use activations with p(y|h) above this: images are clearer and vary less.
            reject: Whether to replace images that the classifier does not assign to class y.
            generator: Source of randomness, or None for torch's default.

        Returns:
            Images (*B, C, H, W) in [0, 1].

        Raises:
            TypeError: Labels are not integers.
            ValueError: A label is out of range, no activation is as confident, or there is no classifier to reject by.
            RuntimeError: The classifier assigns none of a hundred images to its class.
        """
        labels = self._labels("labels", y)
        flat = labels.reshape(-1)
        if reject:
            self.sight.check_present("to reject images")
        images = self._sampled_images(flat, confident, generator)
        wrong, rounds = self._misclassified(images, flat) if reject else flat[:0], 1
        while len(wrong):
            if rounds == _ROUNDS:
                raise RuntimeError(
                    f"of {_ROUNDS} images for class {int(flat[wrong[0]])} the classifier assigns none to it; train the "
                    "generator for longer, or leave reject out"
                )
            images[wrong] = new_images = self._sampled_images(flat[wrong], confident, generator)
            wrong, rounds = wrong[self._misclassified(new_images, flat[wrong])], rounds + 1
        return images.reshape(*labels.shape, *self.image_shape)

    @torch.no_grad()
    def interpolate(
        self,
        y0: Tensor | int,
        y1: Tensor | int,
        steps: int = 8,
        confident: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Generate images along the line from an activation of one class to one of another, with the same code.

        Args:
            y0: Labels (*B,) of the first images.
            y1: Labels (*B,) of the last images.
            steps: Number of images, both ends included.
            confident: As for `generate`.
            generator: Source of randomness, or None for torch's default.

        Returns:
            Images (*B, steps, C, H, W) in [0, 1].

        Raises:
            TypeError: Labels or `steps` are not integers.
            ValueError: As for `generate`; labels have different shapes, or there are fewer than two steps.
        """
        first, last = self._labels("y0", y0), self._labels("y1", y1)
        if first.shape != last.shape:
            raise ValueError(f"y0 has shape {tuple(first.shape)} and y1 {tuple(last.shape)}; expected the same shape")
        steps = check_integer("steps", steps, 2)
        h0, h1 = (draw(self.pair, y.reshape(-1), confident, generator) for y in (first, last))
        z = self.random_codes(len(h0), generator)
        weights = torch.linspace(0, 1, steps, device=h0.device)
        h = torch.lerp(h0.unsqueeze(1), h1.unsqueeze(1), weights.view(1, -1, 1).to(h0))
        images = self._decoded(z.repeat_interleave(steps, 0), h.flatten(0, 1))
        return images.reshape(*first.shape, steps, *self.image_shape)

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        y: Tensor | int,
        strength: float | Tensor = 1.0,
        confident: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Move images towards a class: decode activations on the line to the nearest of 256 samples of p(h|y).

        The nearest sample (after standardization, see `Standardizer`) shares properties with the image that do not
        depend on the class. A generator without an encoder uses a random code, so strength 0 gives another image with
        the same activation.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Labels (B,), or one for all.
            strength: Position on the line, from 0 (the image's activation) to 1 (the sample). A tensor (S,) gives S
                images for each.
            confident: As for `generate`, for the samples.
            generator: Source of randomness, or None for torch's default.

        Returns:
            Images (B, C, H, W) in [0, 1], or (B, S, C, H, W).

        Raises:
            TypeError: Images are not floating, or labels are not integers.
            ValueError: There is no classifier; images, labels or strengths have a wrong shape or range.
        """
        self._check_images(x)
        x = x.to(self.standardize.mean)
        labels = self._labels("labels", y)
        if labels.shape not in ((), (len(x),)):
            raise ValueError(f"y has shape {tuple(labels.shape)}; give one label, or one for each of {len(x)} images")
        labels = labels.expand(len(x))
        strengths = torch.as_tensor(strength, device=x.device).to(x)
        if strengths.dim() > 1:
            raise ValueError(f"strength has shape {tuple(strengths.shape)}; expected a number or a tensor (S,)")
        h = self.activations(x)
        target = torch.empty_like(h)
        for label in labels.unique():
            samples = draw(self.pair, label.expand(_CANDIDATES), confident, generator).to(h)
            of_class = labels == label
            nearest = torch.cdist(self.standardize(h[of_class]), self.standardize(samples)).argmin(1)
            target[of_class] = samples[nearest]
        z = self.code_of(x, h, generator)
        weights = strengths.reshape(1, -1, 1)
        h = torch.lerp(h.unsqueeze(1), target.unsqueeze(1), weights)
        images = self._decoded(z.repeat_interleave(weights.numel(), 0), h.flatten(0, 1))
        return images.reshape(len(x), *strengths.shape, *self.image_shape)

    def activations(self, x: Tensor) -> Tensor:
        """Return the classifier's activations (B, d) of images (B, C, H, W) in [0, 1].

        Raises:
            ValueError: There is no classifier.
        """
        return self.sight.activations(x.to(self.standardize.mean)).to(self.standardize.mean)

    def random_codes(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample codes (count, latent) from the standard normal distribution."""
        mean = self.standardize.mean
        return torch.randn(count, self.latent, dtype=mean.dtype, device=mean.device, generator=generator)

    def with_pair(self: Self, pair: GenerativePair) -> Self:
        """Return a generator with the same networks, not copies, and another pair, such as one with another base.

        Raises:
            TypeError: `pair` is not a pair.
            ValueError: Its head has another shape.
        """
        if not isinstance(pair, GenerativePair):
            raise TypeError(f"pair is {described(pair)}; expected a penult.GenerativePair")
        if pair.head.weight.shape != self.pair.head.weight.shape:
            raise ValueError(
                f"the weight of the pair's head has shape {tuple(pair.head.weight.shape)}; expected "
                f"{tuple(self.pair.head.weight.shape)}, as the generator was made for"
            )
        other = type(self).__new__(type(self))
        other.__dict__ = dict(self.__dict__)
        other.history = list(self.history)
        other._modules = {**self._modules, "pair": pair}
        return other

    # --- files ------------------------------------------------------------------------------------------------

    @property
    def stored_activations(self) -> int:
        """Number of activations of real images in the pair: the size of a bank, 0 for others."""
        bank = bank_of(self.pair)
        return 0 if bank is None else len(bank)

    def without_data(self: Self) -> Self:
        """Replace a bank of real activations by a mixture that is fitted to it, which takes some seconds.

        Returns:
            A generator with the same networks.

        Raises:
            ValueError: The bank is too small for a mixture.
        """
        return self.with_pair(without_data(self.pair)) if self.stored_activations else self

    def save(self, path: str | os.PathLike[str], store_activations: bool = False) -> Path:
        """Write networks, mean and scale of the condition, and the pair to one safetensors file.

        `penult.generate.load` reads it without the classifier. The file holds no activations of real images: a bank is
        replaced by a mixture, see `without_data`.

        Args:
            path: The file.
            store_activations: Whether to write a bank unchanged, with `stored_activations` rows of real data.

        Raises:
            FileNotFoundError: The folder does not exist.
            ValueError: The pair's base cannot be written, or its bank is too small for a mixture.
        """
        if not store_activations and self.stored_activations:
            return self.without_data().save(path)
        modules = {name: getattr(self, name) for name in (*self.networks, "standardize")}
        config = self.config()
        return generator_file.write(path, type(self).__name__, config, self.pair, modules, self.stored_activations)

    @classmethod
    def load(
        cls: type[Self],
        path: str | os.PathLike[str],
        *,
        tap: Tap | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        bases: Sequence[type[Base]] = (),
        device: str | torch.device = "cpu",
        **networks: nn.Module,
    ) -> Self:
        """Read a saved generator, without pickle. It generates without a classifier.

        Args:
            path: The file.
            tap: The classifier, which `edit`, ``reject``, reconstructions and further training need.
            preprocess: Function from images in [0, 1] to inputs of the classifier.
            bases: Your own base classes that the file may hold.
            device: Device for the tensors.
            **networks: Networks of your own, by the names of the constructor's arguments, if it was made with such.

        Raises:
            FileNotFoundError: There is no such file.
            penult.io.FileFormatError: The file is damaged, of another kind, or of another class of generator.
            ValueError: It was made with networks of your own, and these are not given.
        """
        file = generator_file.read(path, cls.__name__, device)
        file.check_networks(networks, cls.networks, cls.training_networks)
        pair = file.pair(bases)
        classifier = FrozenClassifier(tap, preprocess, pair.head)
        with file.rebuilding():
            generator = cls.from_config(file.config, pair, **networks)
            for part in (*cls.networks, "standardize"):
                getattr(generator, part).load_state_dict(file.states.get(part, {}))
        generator.sight = classifier
        return generator.to(device).eval()

    # --- training ---------------------------------------------------------------------------------------------

    def forward(self, y: Tensor) -> Tensor:
        """Generate images of classes (B,), see `generate`."""
        return self.generate(y)

    def read_batch(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return images of a batch, the activations of their condition, and labels with ``condition="label"``.

        A batch may also be (images, activations (B, d)) with floating activations; then the classifier is not used.
        """
        elements = batch if isinstance(batch, list | tuple) else (batch,)
        images, *others = elements or (None,)
        if not isinstance(images, Tensor):
            raise ValueError(f"a batch is {described(batch)}; expected images, or (images, labels)")
        # Later epochs have the same images.
        if batch_idx == 0 or self.current_epoch == 0:
            self._check_images(images)
        images = images.to(self.standardize.mean)
        second = others[0] if others and isinstance(others[0], Tensor) else None
        if self.condition == "activation":
            if second is None or not second.is_floating_point():
                return images, self.activations(images), None
            if second.shape != (shape := (len(images), self.pair.head.in_features)):
                raise ValueError(f"activations of a batch have shape {tuple(second.shape)}; expected {shape}")
            return images, second.to(images), None
        if second is None:
            raise ValueError("a batch has no labels; expected (images, labels) with condition='label'")
        # On an accelerator the values would have to be waited for; the pair checks them when it samples.
        labels = integer_labels(second, (len(images),), values=False)
        return images, draw(self.pair, labels).to(images), labels

    def agreement(self, images: Tensor, h: Tensor) -> Tensor:
        """Return the mean cosine between standardized activations of images and h, for feature consistency.

        The images get gradients; the classifier runs in eval mode and gets none.
        """
        activations = self.sight.features(images.to(self.standardize.mean))
        return torch.cosine_similarity(self.standardize(activations), self.standardize(h), dim=-1).mean()

    # --- private ----------------------------------------------------------------------------------------------

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the trained parts. The pair, like the classifier, moves with them but is not cast."""
        all_modules = self._modules
        self.pair._apply(device_only(fn), recurse)
        try:
            self._modules = {name: module for name, module in all_modules.items() if name != "pair"}
            super()._apply(fn, recurse)
        finally:
            self._modules = all_modules
        return self

    def _labels(self, name: str, y: Tensor | int) -> Tensor:
        """Check labels of any shape and return them as int64 on the device of the pair."""
        head = self.pair.head
        return integer_labels(y, num_classes=head.num_classes, name=name).to(head.weight.device)

    def _stored_networks(self) -> nn.Module:
        return nn.ModuleList([getattr(self, name) for name in self.networks])

    def _sampled_images(self, y: Tensor, confident: float | None, generator: torch.Generator | None) -> Tensor:
        """Generate images of labels (N,)."""
        h = draw(self.pair, y, confident, generator)
        return self._decoded(self.random_codes(len(h), generator), h)

    def _decoded(self, z: Tensor, h: Tensor) -> Tensor:
        """Decode codes and activations in batches, in eval mode."""
        h = h.to(z)
        with _untouched(self._stored_networks()):
            parts = [self.decode(*part) for part in zip(z.split(BATCH), h.split(BATCH), strict=True)]
        return torch.cat(parts) if parts else z.new_empty(0, *self.image_shape)

    def _misclassified(self, images: Tensor, y: Tensor) -> Tensor:
        """Return the indices of images that the classifier does not assign to their class."""
        return (self.sight.predictions(images) != y).nonzero().flatten()

    def _check_images(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"images are {x.dtype}; expected floats in [0, 1]. For bytes: images / 255")
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images have shape {tuple(x.shape)}; expected (B, *{self.image_shape})")
        low, high = (float(x.min()), float(x.max())) if x.numel() else (0.0, 1.0)
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"images go from {low:.4g} to {high:.4g}; expected values in [0, 1]. Give the normalisation that the "
                "classifier needs as preprocess"
            )
