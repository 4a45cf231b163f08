"""What all generators that are conditioned on activations share: conditions, images for classes, files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from penult._checks import check_positive
from penult.activations import Activations, Tap
from penult.bases import Base
from penult.generate import _file as stored
from penult.generate._classifier import Sight, moving
from penult.generate._conditions import Standardizer, bank_of, draw, without_data
from penult.generate._lightning import Recorded
from penult.generate._networks import check_image_shape
from penult.head import _untouched
from penult.pair import GenerativePair

__all__ = ["AT_ONCE", "ActivationGenerator", "Condition"]

Condition = Literal["activation", "label"]
Self = TypeVar("Self", bound="ActivationGenerator")

AT_ONCE = 500  # images that a network is shown
_CANDIDATES = 256  # draws of a class that an edited image may go to
_ROUNDS = 100  # tries for an image that the classifier puts into its class


class ActivationGenerator(Recorded, ABC):
    """A network G(z, h) that makes images of activations; subclasses say how it is trained.

    Args:
        pair: The law of activations that `generate` draws from.
        tap: The classifier; None where nothing has to be seen by it.
        image_shape: (C, H, W).
        latent: Numbers of a code z.
        condition: ``"activation"``: trained on h = tap(x), no labels needed; ``"label"``: on h ~ p(h|y).
        activations: What mean and scale of the condition are taken from; draws of the pair when left out.
        preprocess: What brings images in [0, 1] to what the classifier takes, differentiable.
    """

    networks: ClassVar[tuple[str, ...]]  # names of the parts that files hold
    beside: ClassVar[tuple[str, ...]] = ()  # of those that training alone needs, and no file holds
    _outside = "sight.", "pair."  # the classifier and the law

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
            raise TypeError(f"pair is a {type(pair).__name__}, not a penult.GenerativePair")
        if condition not in get_args(Condition):
            raise ValueError(f"condition must be 'activation' or 'label', got {condition!r}")
        self.image_shape = check_image_shape(tuple(image_shape))
        check_positive("latent", latent)
        self.latent, self.condition = int(latent), condition
        self.pair = pair
        self.sight = Sight(tap, preprocess, pair.head)
        self.standardize = Standardizer.of_pair(pair, activations)

    @property
    def tap(self) -> Tap | None:
        """The classifier, or None."""
        return self.sight.tap

    # --- what a subclass is -----------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Codes (B, latent) and activations (B, d) to images (B, C, H, W) in [0, 1], part of the autograd graph."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON facts that rebuild its networks."""

    @classmethod
    @abstractmethod
    def from_config(cls: type[Self], config: dict[str, Any], pair: GenerativePair, **networks: nn.Module) -> Self:
        """A generator as `config` says, its weights still to be loaded, networks of the user's own given."""

    def code_of(self, x: Tensor, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codes (B, latent) for images and their activations; random ones where nothing tells them."""
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
        """Images of classes: h ~ p(h|y), z ~ N(0, I), G(z, h).

        Args:
            y: Labels (*B,).
            confident: Keeps activations with p(y|h) above it: clearer images, of less variety.
            reject: Whether images have to be put into class y by the classifier, and are drawn again until they are.
            generator: Source of randomness, or None for torch's default.

        Returns:
            Images (*B, C, H, W) in [0, 1].

        Raises:
            ValueError: A label is out of range, no activation is as confident, or there is no classifier to reject by.
            RuntimeError: The classifier puts none of a hundred images into its class.
        """
        labels = torch.as_tensor(y, device=self.pair.head.weight.device)
        flat = labels.reshape(-1)
        if reject:
            self.sight.needed("to reject images by")
        images = self._drawn(flat, confident, generator)
        wrong, rounds = self._misread(images, flat) if reject else flat[:0], 1
        while len(wrong):
            if rounds == _ROUNDS:
                raise RuntimeError(
                    f"of {_ROUNDS} images for class {int(flat[wrong[0]])} the classifier puts none into it; train the "
                    "generator for longer, or leave reject out"
                )
            images[wrong] = again = self._drawn(flat[wrong], confident, generator)
            wrong, rounds = wrong[self._misread(again, flat[wrong])], rounds + 1
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
        """Images on the straight way from an activation of one class to one of another, with one code for all.

        Args:
            y0: Labels (*B,) of the first images.
            y1: Labels (*B,) of the last.
            steps: Images on a way, both ends included.
            confident: As for `generate`.
            generator: Source of randomness, or None for torch's default.

        Returns:
            Images (*B, steps, C, H, W) in [0, 1].

        Raises:
            ValueError: As for `generate`; labels of different shapes; fewer than two steps.
        """
        device = self.pair.head.weight.device
        first, last = torch.as_tensor(y0, device=device), torch.as_tensor(y1, device=device)
        if first.shape != last.shape:
            raise ValueError(f"y0 has shape {tuple(first.shape)} and y1 {tuple(last.shape)}; they must be the same")
        if steps < 2:
            raise ValueError(f"steps is {steps}; a way has at least its two ends")
        h0, h1 = (draw(self.pair, y.reshape(-1), confident, generator) for y in (first, last))
        z = self.random_codes(len(h0), generator)
        shares = torch.linspace(0, 1, steps, device=device)
        ways = torch.lerp(h0.unsqueeze(1), h1.unsqueeze(1), shares.view(1, -1, 1).to(h0))
        images = self._decoded(z.repeat_interleave(steps, 0), ways.flatten(0, 1))
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
        """Images moved towards a class: their activations go to the nearest of 256 draws of p(h|y), and are decoded.

        The nearest draw (in deviations, see `Standardizer`) shares with the image what does not make the class. A
        generator that cannot tell the code of an image takes a random one, and begins with another image of its
        activation.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Labels (B,), or one for all.
            strength: How far they go, from 0, nowhere, to 1, all the way. A tensor (S,) gives S images each.
            confident: As for `generate`, of the draws.
            generator: Source of randomness, or None for torch's default.

        Returns:
            Images (B, C, H, W) in [0, 1], or (B, S, C, H, W).

        Raises:
            ValueError: There is no classifier; images, labels or strengths have a wrong shape or range.
        """
        self._check_images(x)
        x = x.to(self.standardize.mean)
        labels = torch.as_tensor(y, device=x.device)
        if labels.shape not in ((), (len(x),)):
            raise ValueError(f"y has shape {tuple(labels.shape)}; give one label, or one for each of {len(x)} images")
        classes = labels.expand(len(x))
        amount = torch.as_tensor(strength, device=x.device).to(x)
        if amount.dim() > 1:
            raise ValueError(f"strength has shape {tuple(amount.shape)}; it is a number, or a tensor (S,)")
        h = self.activations(x)
        goal = torch.empty_like(h)
        for one in classes.unique():
            drawn = draw(self.pair, one.expand(_CANDIDATES), confident, generator).to(h)
            mine = classes == one
            nearest = torch.cdist(self.standardize(h[mine]), self.standardize(drawn)).argmin(1)
            goal[mine] = drawn[nearest]
        z = self.code_of(x, h, generator)
        shares = amount.reshape(1, -1, 1)
        ways = torch.lerp(h.unsqueeze(1), goal.unsqueeze(1), shares)
        images = self._decoded(z.repeat_interleave(shares.numel(), 0), ways.flatten(0, 1))
        return images.reshape(len(x), *amount.shape, *self.image_shape)

    def activations(self, x: Tensor) -> Tensor:
        """What the classifier makes of images in [0, 1], (B, C, H, W): h (B, d). It is left as it was.

        Raises:
            ValueError: There is no classifier.
        """
        return self.sight.activations(x.to(self.standardize.mean)).to(self.standardize.mean)

    def random_codes(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Codes (count, latent) of the standard normal law."""
        mean = self.standardize.mean
        return torch.randn(count, self.latent, dtype=mean.dtype, device=mean.device, generator=generator)

    def with_pair(self: Self, pair: GenerativePair) -> Self:
        """The same networks, no copies, with another law of activations, such as one of another base.

        Raises:
            TypeError: `pair` is no pair.
            ValueError: It is of other activations or classes.
        """
        if not isinstance(pair, GenerativePair):
            raise TypeError(f"pair is a {type(pair).__name__}, not a penult.GenerativePair")
        if pair.head.weight.shape != self.pair.head.weight.shape:
            raise ValueError(
                f"the pair's head is {tuple(pair.head.weight.shape)}, but the generator was made for "
                f"{tuple(self.pair.head.weight.shape)}: activations mean other things"
            )
        other = type(self).__new__(type(self))
        other.__dict__ = dict(self.__dict__)
        other.history = list(self.history)
        other._modules = {**self._modules, "pair": pair}
        return other

    # --- files ------------------------------------------------------------------------------------------------

    @property
    def stored_activations(self) -> int:
        """How many activations of real images the pair holds, 0 but for a bank."""
        bank = bank_of(self.pair)
        return 0 if bank is None else len(bank)

    def without_data(self: Self) -> Self:
        """The same networks; in place of a bank of real activations a mixture that is fitted to it, in some seconds.

        Raises:
            ValueError: The bank is too small for a mixture.
        """
        return self.with_pair(without_data(self.pair)) if self.stored_activations else self

    def save(self, path: str | os.PathLike[str], store_activations: bool = False) -> Path:
        """Write networks, mean and scale of the condition, and the pair to one safetensors file.

        `penult.generate.load` reads it, without the classifier. It holds no activation of a real image: a mixture goes
        into it in place of a bank, see `without_data`.

        Args:
            path: The file.
            store_activations: Whether a bank goes into it as it is, `stored_activations` rows of real data.

        Raises:
            FileNotFoundError: The folder does not exist.
            ValueError: The pair's law cannot be written, or its bank is too small for a mixture.
        """
        if not store_activations and self.stored_activations:
            return self.without_data().save(path)
        modules = {name: getattr(self, name) for name in (*self.networks, "standardize")}
        return stored.write(path, type(self).__name__, self.config(), self.pair, modules, self.stored_activations)

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
        """Read a generator that `save` wrote. No classifier and no pickle are needed to generate.

        Args:
            path: The file.
            tap: The classifier, for what sees images: `edit`, ``reject``, reconstructions, further training.
            preprocess: What the classifier needs before it.
            bases: Your own base classes that the file may hold.
            device: Where to put the tensors.
            **networks: Modules of your own by the names of its arguments, where it was made with such.

        Raises:
            FileNotFoundError: There is no such file.
            penult.io.FileFormatError: The file is damaged, foreign, or of another kind of generator.
            ValueError: It was made with networks of your own, and these are not given.
        """
        file = stored.read(path, cls.__name__, device)
        file.check_networks(networks, cls.networks, cls.beside)
        pair = file.pair(bases)
        sight = Sight(tap, preprocess, pair.head)
        with file.rebuilding():
            made = cls.from_config(file.config, pair, **networks)
            for part in (*cls.networks, "standardize"):
                getattr(made, part).load_state_dict(file.states.get(part, {}))
        made.sight = sight
        return made.to(device).eval()

    # --- training ---------------------------------------------------------------------------------------------

    def forward(self, y: Tensor) -> Tensor:
        """Images of classes (B,), see `generate`."""
        return self.generate(y)

    def read_batch(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images of a batch, the activations that they are conditioned on, and labels with ``condition="label"``.

        Behind images may stand their activations (B, d), as floats; then the classifier does not look at them.
        """
        held = batch if isinstance(batch, list | tuple) else (batch,)
        images, *behind = held or (None,)
        if not isinstance(images, Tensor):
            raise ValueError(f"a batch is a {type(batch).__name__}; expected images, or (images, labels)")
        if batch_idx == 0 or self.current_epoch == 0:  # later epochs show the same images
            self._check_images(images)
        images = images.to(self.standardize.mean)
        given = behind[0] if behind and isinstance(behind[0], Tensor) else None
        if self.condition == "activation":
            if given is None or not given.is_floating_point():
                return images, self.activations(images), None
            if given.shape != (shape := (len(images), self.pair.head.in_features)):
                raise ValueError(f"activations behind images are of shape {tuple(given.shape)}; expected {shape}")
            return images, given.to(images), None
        if given is None:
            raise ValueError("with condition='label' batches are (images, labels); these have no labels")
        if given.shape != (len(images),):
            raise ValueError(f"labels are of shape {tuple(given.shape)}; expected ({len(images)},), one an image")
        return images, draw(self.pair, given).to(images), given

    def agreement(self, images: Tensor, h: Tensor) -> Tensor:
        """Feature consistency: mean cosine of what the classifier makes of images to h, both in deviations.

        Gradients go to the images; the classifier is in eval mode meanwhile, and gets none.
        """
        seen = self.sight.features(images.to(self.standardize.mean))
        return torch.cosine_similarity(self.standardize(seen), self.standardize(h), dim=-1).mean()

    # --- inside -----------------------------------------------------------------------------------------------

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts are for what is trained: the pair moves with it, and keeps its precision, as the classifier does."""
        whole = self._modules
        self.pair._apply(moving(fn), recurse)
        try:
            self._modules = {name: module for name, module in whole.items() if name != "pair"}
            super()._apply(fn, recurse)
        finally:
            self._modules = whole
        return self

    def _core(self) -> nn.Module:
        return nn.ModuleList([getattr(self, name) for name in self.networks])

    def _drawn(self, y: Tensor, confident: float | None, generator: torch.Generator | None) -> Tensor:
        h = draw(self.pair, y, confident, generator)
        return self._decoded(self.random_codes(len(h), generator), h)

    def _decoded(self, z: Tensor, h: Tensor) -> Tensor:
        h = h.to(z)
        with _untouched(self._core()):
            parts = [self.decode(*both) for both in zip(z.split(AT_ONCE), h.split(AT_ONCE), strict=True)]
        return torch.cat(parts) if parts else z.new_empty(0, *self.image_shape)

    def _misread(self, images: Tensor, y: Tensor) -> Tensor:
        """Indices of images that the classifier does not put into their class."""
        return (self.sight.answers(images) != y).nonzero().flatten()

    def _check_images(self, x: Tensor) -> None:
        shape = tuple(x.shape[1:])
        if not x.is_floating_point() or x.dim() != 4 or shape != self.image_shape:
            raise ValueError(
                f"images are {x.dtype} of shape {tuple(x.shape)}; expected floats (B, *{self.image_shape}) in [0, 1]"
            )
        low, high = (float(x.min()), float(x.max())) if x.numel() else (0.0, 1.0)
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"images go from {low:.4g} to {high:.4g}; a generator makes images in [0, 1]. Give them so, and what "
                "the classifier needs, such as a normalisation, as preprocess"
            )
