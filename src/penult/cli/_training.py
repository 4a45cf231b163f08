"""Training runs that resume, for ``penult distill`` and ``penult generate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from penult import io
from penult.cli._console import RichReporter, json_text, print_json, quiet
from penult.cli._options import plain
from penult.processes import Processes

if TYPE_CHECKING:
    from penult.cli._launch import Launch

__all__ = ["LOG_FILE", "PAGE_FILE", "SETTINGS_FILE", "TrainingRun", "digest"]

SETTINGS_FILE, LOG_FILE, PAGE_FILE = "settings.json", "log.json", "index.html"
_CHECKPOINT = "checkpoints/last.ckpt"
# Settings whose values say nothing to a reader.
_DIFFERENCES = {
    "head": "the head has other weights",
    "content": "images, labels or files have other contents",
}
# The folder of a command, in messages.
_RESULTS = {"distill": "distillation", "generate": "generator"}


def digest(*parts: Tensor | str | Path) -> str:
    """Return the SHA-256 of tensors and of the contents of files."""
    import hashlib

    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, str | Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 24):
                    sha.update(block)
        else:
            sha.update(part.cpu().numpy().tobytes())
    return sha.hexdigest()


class TrainingRun:
    """A run of a command that trains, in a folder of its own: `start`, `fit`, then `finish`.

    The settings are written to the folder before the training, a checkpoint after each epoch, and the log at the end. A
    folder whose log has the same settings is complete. Files are written atomically, so that a killed run resumes from
    the last whole epoch.

    Args:
        command: ``"distill"`` or ``"generate"``.
        options: All options of the command.
        launch: The processes.
        reporter: Prints progress and results.
        file_name: File of the trained network, which `fit` removes along with page and log.
        samples: Folder of pictures that the training draws, or None.
        recorded: Names of the options that the results depend on.
        replaceable: Names of settings that may change without a new training.

    Attributes:
        out: The folder.
        loading: Options of loaders.
        settings: Values that the results depend on, by name; commands add to them before `start`.
        resumed_after: Number of epochs that were done before `fit`.
    """

    def __init__(
        self,
        command: str,
        options: Mapping[str, Any],
        launch: Launch,
        reporter: RichReporter,
        *,
        file_name: str,
        recorded: Sequence[str],
        samples: str | None = None,
        replaceable: Collection[str] = (),
    ) -> None:
        self.out: Path = options["out"]
        self.loading: dict[str, Any] = {"batch_size": options["batch_size"], "num_workers": options["workers"]}
        # Settings of a distillation name no command.
        self.settings: dict[str, Any] = {} if command == "distill" else {"command": command}
        self.settings |= {name: plain(options[name]) for name in recorded}
        self.settings |= {"devices": launch.devices, "num_nodes": launch.num_nodes}
        self.resumed_after = 0
        self._command, self._options, self._launch, self._reporter = command, options, launch, reporter
        self._file_name, self._samples, self._replaceable = file_name, samples, replaceable
        self._processes = Processes()

    @property
    def rank(self) -> int:
        """The number of this process; only the first, 0, writes files and prints."""
        return self._processes.rank

    def start(self) -> bool:
        """Start all processes; return whether there is anything to do, after printing the results if there is not."""
        self._processes = Processes(self._launch.start())
        complete = False
        if self.rank == 0:
            # Temporary files of a killed run do not make the folder one of something else.
            for folder in (self.out, *([] if self._samples is None else [self.out / self._samples])):
                io.sweep(folder)
            complete = self._is_complete()
        if not self._processes.first(complete):
            return True
        if self.rank == 0:
            self._reporter.line(f"{self.out} is complete: nothing to do; --overwrite starts again")
            self._print(_read_json(self.out / LOG_FILE) | {"was_complete": True})
        return False

    def _is_complete(self) -> bool:
        """Return whether the folder holds the results of these settings; raise if it holds something else."""
        result, out = _RESULTS[self._command], self.out
        stored = _read_json(out / SETTINGS_FILE) if (out / SETTINGS_FILE).exists() else None
        if stored is None or stored.get("command", "distill") != self._command:
            if out.exists() and any(out.iterdir()):
                raise FileExistsError(f"{out} holds other files, and no {result}; give a new folder")
            return False
        if self._options["overwrite"]:
            return False
        changed = [name for name, value in self.settings.items() if stored.get(name) != value]
        differences = [
            _DIFFERENCES.get(name, "") or f"{name} is {stored.get(name)} there and {self.settings[name]} now"
            for name in changed
            if name not in self._replaceable
        ]
        if differences:
            raise ValueError(
                f"{out} holds another {result}: {', '.join(differences)}. To resume it, give the same options; "
                "otherwise give another folder, or --overwrite to start again"
            )
        return not changed and (out / LOG_FILE).exists()

    def fit(
        self,
        module: Any,
        data: Any,
        validation: DataLoader[Any] | None,
        figure: Callable[[dict[str, float]], str],
        callbacks: Sequence[Any] = (),
    ) -> None:
        """Fit a LightningModule, from the last checkpoint if there is one.

        Args:
            module: The module, with a ``history`` that its checkpoints hold under "penult".
            data: Data set to train on.
            validation: Loader of images to validate on, or None.
            figure: Function from the metrics of the last epoch to the text that is printed after the number of the
                epoch.
            callbacks: Further callbacks of Lightning.
        """
        # Options that Lightning refuses leave the folder as it is.
        trainer = self._trainer(callbacks)
        if self.rank == 0:
            self._clear()
        self._processes.wait()
        checkpoint, epochs = self.out / _CHECKPOINT, self._options["epochs"]
        if checkpoint.exists() and not self._options["overwrite"]:
            history = torch.load(checkpoint, map_location="cpu", weights_only=True)["penult"]["history"]
            self.resumed_after = len(history)
            state = "a run that was stopped" if self.resumed_after < epochs else "a finished training"
            self._reporter.line(f"{self.out} holds {state}: resuming after epoch {self.resumed_after} of {epochs}")
        loader = self._loader(data, trainer)
        with quiet(), self._reporter.steps(epochs * len(loader)) as show:

            def report(trainer: Any, module: Any, *_: Any) -> None:
                last = figure(module.history[-1]) if module.history else ""
                show(trainer.global_step, f"epoch {min(trainer.current_epoch + 1, epochs)} of {epochs}{last}")

            from lightning.pytorch.callbacks import LambdaCallback

            trainer.callbacks.append(LambdaCallback(on_train_batch_end=report))
            try:
                trainer.fit(module, loader, validation, ckpt_path=checkpoint if self.resumed_after else None)
            except SystemExit:
                # Lightning exits on Ctrl-C without a message; the one below is printed instead.
                pass
            report(trainer, module)
        if len(module.history) < epochs:
            raise RuntimeError(
                f"the training was interrupted after epoch {len(module.history)} of {epochs}; the same command "
                "continues it"
            )

    def _clear(self) -> None:
        """Remove the results of an earlier run, and write the settings of this one."""
        out = self.out
        out.mkdir(parents=True, exist_ok=True)
        names = [LOG_FILE, PAGE_FILE, self._file_name]
        if self._options["overwrite"]:
            names.append(_CHECKPOINT)
            if self._samples is not None:
                names += [str(file.relative_to(out)) for file in (out / self._samples).glob("*.png")]
        for name in names:
            (out / name).unlink(missing_ok=True)
        # Settings are replaced and never absent: without them, the folder could not be resumed.
        io.write_bytes(out / SETTINGS_FILE, json.dumps(self.settings, indent=2).encode())

    def _loader(self, data: Any, trainer: Any) -> DataLoader[Any]:
        """Return the loader of the training data, whose order depends on seed and epoch alone."""
        seed = self._options["seed"]
        # With one device as well, this sampler's order is a function of seed and epoch.
        sampler: Any = DistributedSampler(data, trainer.world_size, trainer.global_rank, seed=seed)
        # Lightning sets the epoch too, but workers that load ahead begin before it does.
        sampler.set_epoch(self.resumed_after)
        return DataLoader(
            data,
            sampler=sampler,
            # A last batch of one image would have no variance to normalise by.
            drop_last=len(sampler) % self.loading["batch_size"] == 1 and len(sampler) > 1,
            generator=torch.Generator().manual_seed(seed),
            **self.loading,
        )

    def _trainer(self, callbacks: Sequence[Any]) -> Any:
        """Return a Trainer that prints nothing, and keeps a checkpoint of the last whole epoch."""
        from lightning.pytorch import Trainer
        from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
        from lightning.pytorch.plugins import TorchCheckpointIO

        class AtomicCheckpointIO(TorchCheckpointIO):
            """Writes a temporary file in the folder of the checkpoint and renames it.

            Lightning's own class copies the checkpoint from the system's temporary folder, in pieces if that is on
            another disk. A kill or a full disk would then destroy the only checkpoint.
            """

            def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
                buffer = BytesIO()
                torch.save(checkpoint, buffer)
                io.write_bytes(path, buffer.getvalue())

        seed, launch, device = self._options["seed"], self._launch, self._launch.device

        def begin(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            # After a resume, the training draws the same random numbers.
            if batch_idx == 0:
                torch.manual_seed(seed + 7919 * (1 + trainer.current_epoch) + 104729 * trainer.global_rank)

        path = self.out / _CHECKPOINT
        saving = ModelCheckpoint(path.parent, path.stem, save_on_train_epoch_end=True, enable_version_counter=False)
        with quiet():
            return Trainer(
                max_epochs=self._options["epochs"],
                accelerator={"cuda": "gpu"}.get(device.type, device.type),
                devices=[device.index] if device.index is not None and not launch.several else launch.devices,
                num_nodes=launch.num_nodes,
                strategy=launch.strategy,
                precision=self._options["precision"],
                callbacks=[LambdaCallback(on_train_batch_start=begin), *callbacks, saving],
                plugins=[AtomicCheckpointIO()],
                default_root_dir=self.out,
                num_sanity_val_steps=0,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

    def finish(self, results: Mapping[str, Any], *lines: str) -> None:
        """Write the log, which completes the folder, and print lines, the path of the page, and the results as JSON."""
        io.write_bytes(self.out / LOG_FILE, json_text(results).encode())
        for line in lines:
            self._reporter.line(line)
        self._reporter.line(f"{self.out / PAGE_FILE}")
        self._print({**results, "resumed_after_epochs": self.resumed_after, "was_complete": False})

    def _print(self, results: Mapping[str, Any]) -> None:
        if self._options["as_json"]:
            print_json(results)


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a run.

    Raises:
        ValueError: It is damaged, or holds something else.
    """
    try:
        facts = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); give a new folder") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is not written by penult; give a new folder")
    return facts
