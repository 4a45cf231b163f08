"""Networks and images behind the saved files, and the numbers that are computed from what a file holds."""

import copy
import pickle
import types
from pathlib import Path

import numpy
import torch
from torch import nn

from penult import VonMisesFisher, scores
from penult.bases import Sphere

__all__ = [
    "CLASSES", "CLASS_NAMES", "DISTILL", "EXTRACT", "FEATURES", "GENERATE", "IMAGE", "batches_of", "classifier",
    "normed_classifier", "numbers_of_distributions", "numbers_of_gate", "numbers_of_generator", "numbers_of_losses",
    "numbers_of_pair", "numbers_of_score", "numbers_of_student", "numbers_of_threshold", "read_images", "seeded",
    "student", "tensors_of", "unpickled",
]  # fmt: skip

CLASSES, FEATURES, IMAGE = 4, 6, (1, 8, 8)
CLASS_NAMES = ("circle", "cross", "line", "wave")
EXTRACT = {"class_names": CLASS_NAMES, "shard_size": 2000}  # options of the extraction
DISTILL = (
    "distill pairs/certificate-relu.penult.safetensors --student compatibility.computed:student --data images.npz "
    "--out distilled --kind activation --epochs 2 --batch-size 32"
).split()
GENERATE = (
    "generate pairs/certificate-relu-mixture.penult.safetensors --model compatibility.computed:classifier "
    "--weights classifier.safetensors --images images.npz --out generated --epochs 2 --batch-size 32 --latent 2 "
    "--width 6"
).split()

_SCORES_OF_PAIRS = ("density", "directional", "energy", "max_logit", "msp")


def seeded(seed):
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


# --- networks, by factories that commands are given ---------------------------------------------------------


def classifier():
    """A network with a ReLU right before its head, K = 4 and d = 8."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def normed_classifier():
    """A network with a LayerNorm right before its head, which is folded into it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES))


def student():
    """A smaller network for distillation."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, CLASSES))


# --- images and activations ---------------------------------------------------------------------------------


def read_images(path):
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,) of the ``.npz`` file."""
    with numpy.load(path) as arrays:
        return torch.from_numpy(arrays["images"]).unsqueeze(1) / 255, torch.from_numpy(arrays["labels"])


def batches_of(images, labels):
    """The loader of the extraction."""
    return list(zip(images.split(24), labels.split(24), strict=True))


def tensors_of(acts):
    """The tensors of a set of activations."""
    held = {name: getattr(acts, name) for name in ("activations", "logits", "labels")}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


# --- numbers ------------------------------------------------------------------------------------------------
# Names that begin with "drawn" are those of what a random generator takes part in, in the precision of the file. All
# others are computed in float64, where rounding differs between machines by much less than tests allow.


def numbers_of_pair(pair, rows):
    """Laws of a pair at positive rows (N, d), N >= K, its scores of them, and draws."""
    wide, rows = copy.deepcopy(pair).double(), rows.double()
    labels = torch.arange(len(rows)) % pair.head.num_classes
    found = {"log_prior": wide.prior.logits, "log_posterior": wide.posterior(rows).logits}
    if pair.base.info.has_density:
        found["log_prob"] = wide.log_prob(rows)
        found["log_joint"] = wide.log_joint(rows)
        found["given_log_prob"] = wide.given(labels).log_prob(rows)
    for name in _SCORES_OF_PAIRS:
        applies = {"density": pair.base.info.has_density, "directional": isinstance(pair.base, Sphere)}
        if applies.get(name, True):
            found[f"score_{name}"] = getattr(scores, name)(wide, rows)
    found["drawn_activations"], found["drawn_labels"] = pair.sample((6,), generator=seeded(1))
    found["drawn_given"] = pair.given(labels[: pair.head.num_classes]).sample((2,), generator=seeded(2))
    return found


def numbers_of_distributions(laws, rows):
    """Draws of laws by name, and log densities at rows (N, d) where there are any."""
    found = {}
    for name, law in laws.items():
        found[f"drawn_{name}"] = law.sample((3,), generator=seeded(3))
        if getattr(law, "has_density", True):
            at = nn.functional.normalize(rows, dim=-1) if isinstance(law, VonMisesFisher) else rows
            found[f"log_prob_{name}"] = law.log_prob(at)
    return found


def numbers_of_score(score, rows):
    """Scores of rows (N, d)."""
    return {"score": score(rows)}


def numbers_of_threshold(threshold, rows):
    """What a threshold says of rows (N, d), and what it promises."""
    told = {"value": threshold.value, "false_alarm": threshold.false_alarm, "rate_bound": threshold.rate_bound()}
    found = {"score": threshold.score(rows), "p_value": threshold.p_value(rows), "strange": threshold(rows)}
    return found | {name: torch.tensor(value, dtype=torch.float64) for name, value in told.items()}


def numbers_of_gate(gate, rows):
    """How far a teacher is believed on rows (N, d)."""
    return {"belief": gate(rows, torch.arange(len(rows)) % CLASSES)}


def numbers_of_losses(losses):
    """Losses of a fixed output of a student, and what it predicts."""
    labels, soft = torch.arange(CLASSES), torch.full((CLASSES, CLASSES), 1 / CLASSES).double()
    logits, features, targets = (torch.eye(CLASSES, width).double() for width in (CLASSES, 5, 8))
    by_activation = copy.deepcopy(losses["activation"]).double()
    return {
        "soft": losses["soft"](logits, labels, soft),
        "activation": by_activation(features, labels, targets),
        "predicted": by_activation.predict(features),
    }


def numbers_of_student(network, images):
    """Logits of images (N, 1, 8, 8)."""
    return {"logits": copy.deepcopy(network).double()(images.double())}


def numbers_of_generator(generator, images=None):
    """Images of fixed labels, and, where there is a classifier, images that were shown to it."""
    found = {
        "drawn_images": generator.generate(torch.arange(CLASSES), generator=seeded(4)),
        "drawn_way": generator.interpolate(0, 1, steps=3, generator=seeded(5)),
    }
    if generator.tap is not None:
        found["drawn_edited"] = generator.edit(images[:2], 2, generator=seeded(6))
        if hasattr(generator, "reconstruct"):
            found["drawn_reconstructed"] = generator.reconstruct(images[:2])
    return found


# --- pickles ------------------------------------------------------------------------------------------------


def unpickled(path, folder):
    """The object in a pickle or in a file of torch.save, and the dotted names of penult that it holds.

    Args:
        path: A ``.pkl`` or ``.pt``.
        folder: Where files named in it are, whose paths were those of the machine that wrote it.
    """
    names = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.partition(".")[0] == "pathlib":
                return lambda *parts: Path(folder, *parts[-2:])
            if module.partition(".")[0] == "penult":
                names.add(f"{module}.{name}")
            return super().find_class(module, name)

    if path.suffix == ".pt":
        reader = types.SimpleNamespace(Unpickler=Unpickler, load=None, __name__="pickle")
        return torch.load(path, weights_only=False, pickle_module=reader), names
    with open(path, "rb") as file:
        return Unpickler(file).load(), names
