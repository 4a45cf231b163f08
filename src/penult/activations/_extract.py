"""Extraction of the activations of a whole loader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from penult import io
from penult._checks import check_integer, class_names_tuple, described
from penult._progress import Progress, reporting
from penult.activations._activations import Activations
from penult.activations._batch import Reader, check_loader, length_of, share_of
from penult.activations._blocks import Memory
from penult.activations._folder import Stored, finished, name_of, record_of, unfinished, writing
from penult.activations._tap import Tap, tap_in
from penult.activations._writer import SHARD_SIZE, Writer, check_batch, check_record, checksum, refusal, write_index
from penult.head import _evaluating, _refuse_unrectified
from penult.io import _as_json, _user_path
from penult.processes import Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["extract"]


def extract(
    tap: Tap,
    loader: Iterable[Any],
    out: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    pre_activation: bool = False,
    class_names: Sequence[str] | Mapping[int, str] | Mapping[str, str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    group: ProcessGroup | None = None,
) -> Activations:
    """Run a whole loader through a tap, in eval mode and without gradients, into memory or into a folder.

    A batch may be

    - a tensor: the model's input;
    - a tuple or list: the model's input and the labels, or None for no labels. If there are further entries and several
      are integers, as in (image, index, label), the labels are the one whose values repeat or are predicted by the
      model; if that is not one of them, it is an error. Other entries are ignored;
    - a mapping, also a Hugging Face BatchEncoding or BatchFeature: the labels are under ``"labels"``, ``"label"``,
      ``"targets"``, ``"target"`` or ``"y"``, if any. One other tensor is the input. Of several, those are passed by
      keyword that the model's forward names, and the input may have a usual name such as ``"image"``; others, such as
      an index, are left out.

    Arrays of NumPy are taken for tensors.

    Logits (B, T, K) for tokens or (B, H, W, K) for pixels count as that many samples, with labels (B, T) or (B, H, W).
    Samples are left out if their label is -100, or if an ``attention_mask`` of the shape of the samples is 0 there. A
    mask (B, T') for other positions, as with learned prompts, needs labels.

    With `out`, batches are collected until they fill a shard, which is written and released: memory does not grow with
    the data. The folder is complete once its index is written. A run that was interrupted or killed leaves whole
    shards, and the same call resumes it: it iterates over the loader from the start, skips stored batches without
    running the model, and recomputes the last stored batch to check that loader and model are the same. For a complete
    folder the call checks the first batch in this way and returns the stored set.

    With a `group`, its processes share the batches: each runs the model on a contiguous part of them and writes shards
    of its own. The first process writes the one index, with all rows in the loader's order. All processes make the
    same call. A run that was stopped is resumed by the same number of processes. Nobody else may write to the folder.

    Args:
        tap: The model with its head. Wrappers such as torch.compile are removed.
        loader: Batches: a DataLoader or any iterable, in the same order each time. They are moved to the model's
            device. A data set is no loader: pass ``DataLoader(dataset, batch_size=64)``.
        out: Folder that is new, empty, or of an extraction; None keeps the rows in memory.
        device: Device of rows in memory. Default: the CPU.
        dtype: Dtype of activations and logits, for example ``torch.float16``. Default: that of the model.
        pre_activation: Return the input u of the ReLU right before the head instead of its output h = max(u, 0); the
            logits stay those of the model. A distribution fitted to u and then rectified has the exact zeros of h,
            which a distribution fitted to h can only approximate.
        class_names: K names that are stored with the rows, or a mapping of class numbers to names such as
            ``model.config.id2label``.
        preprocessing: How the inputs are prepared, a mapping of JSON values that is stored with the rows. Default: that
            of ``loader.dataset``, if it is a data set of `penult.data`.
        shard_size: Bytes after which a shard ends, at the end of a batch; memory holds about two shards.
        overwrite: Replace activations in `out`. Other files are never touched.
        progress: True for a bar on stderr, False for none, or a function that is called after each batch with the
            number of batches done and their total (None if unknown). Default: a bar if `out` is given and stderr is a
            terminal. Each process of a group has its own.
        group: Processes of ``torch.distributed`` that share the work, such as ``torch.distributed.group.WORLD``.
            Needs `out`, and a loader of known length. Each process loads only its own batches of a DataLoader.

    Returns:
        All activations and logits, and all labels if the batches have them; with `out`, ``Activations.open(out)``.

    Warns:
        UserWarning: Labels are taken from an entry other than the second, or are like row numbers; or fields of a
            mapping are left out and there are no labels.

    Raises:
        FileExistsError: `out` contains other files and no activations.
        RuntimeError: Another process is writing to `out`; or, with `pre_activation`, the input of the head is not
            max(u, 0).
        TypeError: `tap` is not a Tap, `loader` is a data set or one batch, a batch is of another kind or one sample,
            the inputs of a mapping are not known, labels are not integers, or a dtype is not floating.
        ValueError: The head does not give the model's logits, as after further training; there is no batch; several
            entries of a batch may be the labels; labels are in some batches only, of a wrong shape or out of range;
            labels are the input_ids; a value is too large for `dtype`; class names do not fit the classes;
            `pre_activation` is set and no ReLU stands right before the head; or `out` was written with other arguments,
            another model, another loader or another number of processes.
        penult.io.FileFormatError: A file in `out` is damaged.

    Example:
        >>> from penult.head import find_head
        >>> model = nn.Linear(4, 3)
        >>> batches = [(torch.randn(2, 4), torch.tensor([0, 2])), (torch.randn(1, 4), torch.tensor([1]))]
        >>> extract(Tap(model, find_head(model, torch.randn(2, 4))), batches).labels
        tensor([0, 2, 1])

        The inputs of a ReLU before the head:

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> acts = extract(Tap(model, find_head(model, torch.randn(2, 4))), batches, pre_activation=True)
        >>> acts
        Activations(N=3, d=8, K=3, labels=True, dtype=torch.float32, device=cpu, pre_activation=True)
        >>> torch.allclose(model[2](acts.activations.clamp(min=0)), acts.logits)
        True
    """
    inner = tap_in(tap)
    if inner is None:
        raise TypeError(
            f"tap is {described(tap)}; expected a penult.Tap. Make one of the model: "
            "penult.Tap(model, penult.find_head(model, batch))"
        )
    tap = inner
    check_loader(loader)
    names = None if class_names is None else class_names_tuple(class_names, tap.head.num_classes)
    if preprocessing is None:
        preprocessing = getattr(getattr(loader, "dataset", None), "preprocessing", None)
        # Data sets of other libraries may use this name for something else.
        preprocessing = preprocessing if isinstance(preprocessing, dict) and "inputs" in preprocessing else None
    preprocessing = _as_json("preprocessing", preprocessing)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; expected a floating-point dtype")
    if out is not None and device is not None:
        raise ValueError(f"device={device} is for rows in memory, but out={out} is a folder; pass one of them")
    if group is not None and out is None:
        raise ValueError("out is None; expected a folder that all processes of the group can read")
    shard_size = check_integer("shard_size", shard_size)
    if pre_activation:
        assert tap.head.certificate is not None
        _refuse_unrectified(tap.head.certificate)
    reader = Reader(tap, dtype, torch.device("cpu" if device is None else device), pre_activation=pre_activation)
    with _evaluating(tap), reporting(progress, streams=out is not None) as report:
        if out is None:
            more = {"pre_activation": pre_activation, "preprocessing": preprocessing}
            return _in_memory(reader, loader, names, report, **more)
        asked = {
            "in_features": tap.head.in_features,
            "num_classes": tap.head.num_classes,
            "class_names": None if names is None else list(names),
            "shard_size": shard_size,
            "head": checksum(tap.head),
            "pre_activation": pre_activation,
            "preprocessing": preprocessing,
        }
        if dtype is not None:
            asked |= {"dtype": name_of(dtype), "logits_dtype": name_of(dtype)}
        return _on_disk(reader, loader, _user_path(out), asked, overwrite, report, Processes(group))


def _in_memory(
    reader: Reader, loader: Iterable[Any], names: tuple[str, ...] | None, report: Progress, **more: Any
) -> Activations:
    parts: list[Memory] = []
    total = length_of(loader)
    for batch in loader:
        parts.append(reader.rows(batch))
        report(len(parts), total)
    _check_any(len(parts), sum(map(len, parts)))
    # Autograd does not take tensors that were created in inference mode.
    with torch.inference_mode(False):
        labels = [part.labels for part in parts if part.labels is not None]
        return Activations(
            torch.cat([part.activations for part in parts]),
            torch.cat([part.logits for part in parts]),
            torch.cat(labels) if labels else None,
            names,
            **more,
        )


def _on_disk(
    reader: Reader,
    loader: Iterable[Any],
    folder: Path,
    asked: dict[str, Any],
    overwrite: bool,
    report: Progress,
    processes: Processes,
) -> Activations:
    first, share = share_of(loader, processes)
    total = length_of(share)
    if processes.first((folder / io.INDEX_NAME).exists() and not overwrite):
        stored = finished(folder)
        # An error in the first process ends the others, too.
        if processes.rank == 0:
            _check_finished(reader, loader, folder, asked, stored)
        processes.wait()
        report(stored.batches, stored.batches)
        return Activations.open(folder)
    with writing(folder, processes, overwrite) as part:
        stored = unfinished(folder, part)
        if stored.shards:
            asked = _with_stored(asked, stored)
            check_record(folder, stored.record, asked)
        writer = Writer(folder, part, stored, **asked)
        done, count = 0, stored.rows
        for done, batch in enumerate(share, start=1):
            if done < stored.batches:
                reader.skip(batch)
            elif done == stored.batches:
                rows = reader.rows(batch)
                check_record(folder, stored.record, record_of(rows.facts, **asked))
                check_batch(folder, first + done - 1, stored.last_batch(), rows)
            else:
                rows = reader.rows(batch)
                writer.add(rows)
                count += len(rows)
            report(done, total)
        if done < stored.batches:
            raise refusal(folder, f"the loader gave {done} batches, but {stored.batches} are stored")
        _check_any(*(int(processes.total(number)) for number in (done, count)))
        parts = processes.objects(writer.finish())
        if part.rank == 0:
            write_index(folder, parts)
        processes.wait()
    return Activations.open(folder)


def _check_finished(reader: Reader, loader: Iterable[Any], folder: Path, asked: dict[str, Any], stored: Stored) -> None:
    """Raise unless a complete folder has the record that is asked for, and the first batch of the loader."""
    asked = _with_stored(asked, stored)
    check_record(folder, stored.record, asked)
    total = length_of(loader)
    if total is not None and total != stored.batches:
        raise refusal(folder, f"the loader has {total} batches, but {stored.batches} are stored")
    for batch in loader:
        rows = reader.rows(batch)
        check_record(folder, stored.record, record_of(rows.facts, **asked))
        check_batch(folder, 0, stored.first_batch(), rows)
        return
    _check_any(0, 0)


def _with_stored(asked: dict[str, Any], stored: Stored) -> dict[str, Any]:
    """Return what is asked for, with the stored preprocessing where the call, or the older writer, states none."""
    unstated = None in (asked["preprocessing"], stored.preprocessing)
    return {**asked, "preprocessing": stored.preprocessing} if unstated else asked


def _check_any(batches: int, rows: int) -> None:
    if not batches:
        raise ValueError("loader has no batch; expected at least one. Is the data set empty, or a generator used up?")
    if not rows:
        raise ValueError(f"no sample of {batches} batches is left: every label is -100, or every attention_mask is 0")
