"""What commands that train share: folders of runs, the classifier that is watched, and training that resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from torch.utils.data import DataLoader

from penult.cli._console import RichReporter, quiet

if TYPE_CHECKING:
    from torch import Tensor

    from penult.cli._launch import Launch

__all__ = [
    "CHECKPOINT",
    "LOG_FILE",
    "PAGE_FILE",
    "SETTINGS_FILE",
    "digest",
    "fit",
    "is_complete",
    "say_complete",
    "trainer_of",
]

SETTINGS_FILE, LOG_FILE, PAGE_FILE = "settings.json", "log.json", "index.html"
CHECKPOINT = "checkpoints/last.ckpt"
_OTHER = {  # settings that say nothing to a reader
    "head": "the head has other weights",
    "content": "images, labels or files hold something else",
}
_COMMANDS = {"distill": "distillation", "generate": "generator"}  # what the folder of a command holds


def digest(*parts: Tensor | str | Path) -> str:
    """SHA-256 of tensors and files."""
    import hashlib

    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str | Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 24):
                    found.update(block)
        else:
            found.update(part.cpu().numpy().tobytes())
    return found.hexdigest()


def is_complete(
    out: Path, settings: Mapping[str, Any], overwrite: bool, command: str, free: Collection[str] = ()
) -> bool:
    """Whether all is there already; what the folder holds has to be of these settings, or to be overwritten.

    Args:
        out: The folder of the run.
        settings: What its results depend on.
        overwrite: Whether to start anew in any case.
        command: That the settings are of.
        free: Settings that may differ, for what can be done again without training.
    """
    what = _COMMANDS[command]
    stored = _facts(out / SETTINGS_FILE) if (out / SETTINGS_FILE).exists() else None
    if stored is None or stored.get("command", "distill") != command:
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} holds other files, and no {what}; give a new folder")
        return False
    if overwrite:
        return False
    changed = [name for name, value in settings.items() if stored.get(name) != value]
    differing = [
        _OTHER.get(name, "") or f"{name} is {stored.get(name)} there and {settings[name]} now"
        for name in changed
        if name not in free
    ]
    if differing:
        raise ValueError(
            f"{out} holds another {what}: {', '.join(differing)}. To continue it, give the same; else another "
            "folder, or --overwrite to start anew"
        )
    return not changed and (out / LOG_FILE).exists()


def _facts(file: Path) -> dict[str, Any]:
    """What penult wrote to a file of a run.

    Raises:
        ValueError: It holds something else.
    """
    try:
        facts = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); give a new folder") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is not what penult writes there; give a new folder")
    return facts


def say_complete(out: Path, as_json: bool, reporter: RichReporter) -> None:
    """Say that nothing is left to do, and give the facts of the run."""
    reporter.line(f"{out} is complete: nothing is done; --overwrite starts anew")
    if as_json:
        typer.echo(json.dumps(_facts(out / LOG_FILE) | {"was_complete": True}, indent=2))


def trainer_of(
    out: Path,
    seed: int,
    *,
    epochs: int,
    launch: Launch,
    precision: Any,
    callbacks: Collection[Any] = (),
) -> Any:
    """A Trainer that is silent, and keeps a checkpoint of the last whole epoch."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
    from lightning.pytorch.plugins import TorchCheckpointIO

    from penult import io

    class Whole(TorchCheckpointIO):
        """Writes beside the checkpoint and renames.

        Lightning's own copies it from the system's temporary folder, piece by piece where that is another disk, so
        that a kill or a full disk would tear the only one there is.
        """

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            buffer = BytesIO()
            torch.save(checkpoint, buffer)
            io.write_bytes(path, buffer.getvalue())

    def begin(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # so that what the training draws is the same after a resume
            torch.manual_seed(seed + 7919 * (1 + trainer.current_epoch) + 104729 * trainer.global_rank)

    folder, name, where = (out / CHECKPOINT).parent, Path(CHECKPOINT).stem, launch.device
    saving = ModelCheckpoint(folder, name, save_on_train_epoch_end=True, enable_version_counter=False)
    with quiet():
        return Trainer(
            max_epochs=epochs,
            accelerator={"cuda": "gpu"}.get(where.type, where.type),
            devices=[where.index] if where.index is not None and not launch.several else launch.devices,
            num_nodes=launch.num_nodes,
            strategy=launch.strategy,
            precision=precision,
            callbacks=[LambdaCallback(on_train_batch_start=begin), *callbacks, saving],
            plugins=[Whole()],
            default_root_dir=out,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def fit(
    trainer: Any,
    module: Any,
    data: Any,
    examined: Any,
    *,
    out: Path,
    seed: int,
    loading: dict[str, Any],
    resume: bool,
    figure: Callable[[dict[str, float]], str],
    reporter: RichReporter,
) -> int:
    """Fit, from the last checkpoint if there is one; gives the number of epochs that were done before.

    Args:
        trainer: From `trainer_of`.
        module: A LightningModule with a ``history``, which its checkpoints hold under "penult".
        data: The data set to train on.
        examined: A loader of images to validate by, or None.
        out: The folder of the run.
        seed: Of the order of the images.
        loading: Options of a loader.
        resume: Whether to go on from a checkpoint that is there.
        figure: What to say of the last epoch's figures, behind the number of the epoch.
        reporter: Shows how far it is.
    """
    import torch
    from lightning.pytorch.callbacks import LambdaCallback
    from torch.utils.data.distributed import DistributedSampler

    file, before, epochs = out / CHECKPOINT, 0, trainer.max_epochs
    if resume and file.exists():
        before = len(torch.load(file, map_location="cpu", weights_only=True)["penult"]["history"])
        what = "a run that was stopped" if before < epochs else "a training that is done"
        reporter.line(f"{out} holds {what}: resuming after epoch {before} of {epochs}")
    # This sampler's order is a function of seed and epoch, on one device too.
    order: Any = DistributedSampler(data, trainer.world_size, trainer.global_rank, seed=seed)
    order.set_epoch(before)  # Lightning does, but workers that are asked ahead begin before
    # A last batch of one image would have no variance to normalise by.
    loader = DataLoader(
        data,
        sampler=order,
        drop_last=len(order) % loading["batch_size"] == 1 and len(order) > 1,
        generator=torch.Generator().manual_seed(seed),
        **loading,
    )
    with quiet(), reporter.steps(epochs * len(loader)) as report:

        def told(trainer: Any, module: Any, *_: Any) -> None:
            last = figure(module.history[-1]) if module.history else ""
            report(trainer.global_step, f"epoch {min(trainer.current_epoch + 1, epochs)} of {epochs}{last}")

        trainer.callbacks.append(LambdaCallback(on_train_batch_end=told))
        try:
            trainer.fit(module, loader, examined, ckpt_path=file if before else None)
        except SystemExit:  # what Lightning makes of Ctrl-C, without a word
            pass
        told(trainer, module)
    if len(module.history) < epochs:
        raise RuntimeError(
            f"the training was interrupted after epoch {len(module.history)} of {epochs}; the same command continues it"
        )
    return before
