"""A whole loader through a tap."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from penult import io
from penult._progress import Progress, reporting
from penult.activations._activations import Activations
from penult.activations._batch import Reader, share_of
from penult.activations._blocks import Memory
from penult.activations._folder import Stored, finished, name_of, record_of, unfinished, writing
from penult.activations._tap import Tap
from penult.activations._writer import SHARD_SIZE, Writer, check_batch, check_record, checksum, refusal, write_index
from penult.head import _evaluating, _refuse_unrectified
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
    class_names: Sequence[str] | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    group: ProcessGroup | None = None,
) -> Activations:
    """Run a whole loader through a tap, in eval mode and without gradients, into memory or into a folder.

    A batch may be

    - a tensor: what the model takes;
    - a tuple or list: what the model takes, and the labels if there is a second entry (None for no labels);
      further entries are left out;
    - a mapping, also a Hugging Face BatchEncoding or BatchFeature: the labels are under ``"labels"``, ``"label"`` or
      ``"y"``, if any; of the rest, what is no tensor is left out. One tensor goes to the model by position, several
      go by keyword.

    Models that give logits (B, T, K) for tokens or (B, H, W, K) for pixels are read as so many samples, with labels
    (B, T) or (B, H, W). Samples are left out where the label is -100, and where an ``attention_mask`` of the shape of
    the samples is 0.

    With `out`, batches gather until they are a shard, which is written and forgotten: memory does not grow with the
    data. The folder is complete once its index is written. A run that was interrupted or killed leaves whole shards,
    and the same call resumes: it goes through the loader from the start, skips what is stored without running the
    model, and recomputes the last stored batch to see that loader and model are the same. A complete folder is
    returned, after the same look at its first batch.

    With a `group`, its processes share the batches: each runs the model on a part of them, one after the other, and
    writes shards of its own; the first writes the one index, in which all rows lie in the loader's order. Each calls
    with the same arguments; a run that was stopped is resumed by as many processes. Nobody else writes to the folder.

    Args:
        tap: The model with its head.
        loader: Batches; a DataLoader or any iterable, in the same order each time. They are moved to the model's
            device.
        out: A folder that is new, empty, or of an extraction; None gathers in memory.
        device: Where to gather in memory; None means the CPU.
        dtype: How to keep activations and logits, for example ``torch.float16``; None means as the model gives them.
        pre_activation: Deliver the input u of the ReLU right before the head in place of its output h = max(u, 0); the
            logits stay the model's own. A law fitted to u and then rectified has the exact zeros of h, which a law
            fitted to h can only come near.
        class_names: K names to keep with them.
        shard_size: Bytes after which a shard ends, at the end of a batch; memory holds about two shards.
        overwrite: Start anew where `out` holds activations. Other files are never touched.
        progress: True for a bar on stderr, False for none, or what to call after each batch with the number of
            batches done and their total (None if unknown). None means a bar if `out` is given and stderr is a
            terminal. Of several processes each has its own.
        group: Processes of ``torch.distributed`` that share the work, such as ``torch.distributed.group.WORLD``.
            Needs `out`, and a loader of known length; of a DataLoader each process loads its own batches alone.

    Returns:
        All activations and logits, and all labels if the batches have them; with `out`, ``Activations.open(out)``.

    Raises:
        FileExistsError: `out` holds other files and no activations.
        RuntimeError: Another process is writing to `out`; or, with `pre_activation`, what the head read of a batch is
            not max(u, 0).
        TypeError: `tap` is no Tap, a batch is of another kind, labels are no integers, or a dtype is not floating.
        ValueError: The head does not make the model's logits, as after further training; no batch at all, labels in
            some batches only, of a wrong shape or out of range; labels that are the input_ids; a value too large for
            `dtype`; a wrong number of class names; `pre_activation` where no ReLU stands right before the head; or
            `out` holds what other arguments, another model, another loader or another number of processes gave.
        penult.io.FileFormatError: A file in `out` is damaged.

    Example:
        >>> from penult.head import find_head
        >>> model = nn.Linear(4, 3)
        >>> batches = [(torch.randn(2, 4), torch.tensor([0, 2])), (torch.randn(1, 4), torch.tensor([1]))]
        >>> extract(Tap(model, find_head(model, torch.randn(2, 4))), batches).labels
        tensor([0, 2, 1])

        What a ReLU before the head reads:

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> acts = extract(Tap(model, find_head(model, torch.randn(2, 4))), batches, pre_activation=True)
        >>> acts
        Activations(N=3, d=8, K=3, labels=True, dtype=torch.float32, device=cpu, pre_activation=True)
        >>> torch.allclose(model[2](acts.activations.clamp(min=0)), acts.logits)
        True
    """
    if not isinstance(tap, Tap):
        raise TypeError(
            f"tap is a {type(tap).__name__}; make one of the model: penult.Tap(model, penult.find_head(model, batch))"
        )
    names = None if class_names is None else tuple(class_names)
    if names is not None and len(names) != tap.head.num_classes:
        raise ValueError(f"there are {len(names)} class_names for {tap.head.num_classes} classes")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; activations are kept in a floating dtype")
    if out is not None and device is not None:
        raise ValueError(f"device={device} says where to gather in memory, but out={out} is a folder; give one of them")
    if group is not None and out is None:
        raise ValueError("a group of processes gathers in a folder that all can read: give out")
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; it is a positive number of bytes")
    if pre_activation:
        assert tap.head.certificate is not None
        _refuse_unrectified(tap.head.certificate)
    reader = Reader(tap, dtype, torch.device("cpu" if device is None else device), pre_activation=pre_activation)
    with _evaluating(tap), reporting(progress, streams=out is not None) as report:
        if out is None:
            return _in_memory(reader, loader, names, pre_activation, report)
        asked = {
            "in_features": tap.head.in_features,
            "num_classes": tap.head.num_classes,
            "class_names": None if names is None else list(names),
            "shard_size": shard_size,
            "head": checksum(tap.head),
            "pre_activation": pre_activation,
        }
        if dtype is not None:
            asked |= {"dtype": name_of(dtype), "logits_dtype": name_of(dtype)}
        return _on_disk(reader, loader, Path(out), asked, overwrite, report, Processes(group))


def _in_memory(
    reader: Reader, loader: Iterable[Any], names: tuple[str, ...] | None, pre_activation: bool, report: Progress
) -> Activations:
    parts: list[Memory] = []
    total = _length(loader)
    for batch in loader:
        parts.append(reader.rows(batch))
        report(len(parts), total)
    _check_any(len(parts), sum(map(len, parts)))
    with torch.inference_mode(False):  # ordinary tensors, so that autograd takes them
        labels = [part.labels for part in parts if part.labels is not None]
        return Activations(
            torch.cat([part.activations for part in parts]),
            torch.cat([part.logits for part in parts]),
            torch.cat(labels) if labels else None,
            names,
            pre_activation=pre_activation,
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
    total = _length(share)
    if processes.first((folder / io.INDEX_NAME).exists() and not overwrite):
        stored = finished(folder)
        if processes.rank == 0:  # whose error ends the others, too
            _check_finished(reader, loader, folder, asked, stored)
        processes.wait()
        report(stored.batches, stored.batches)
        return Activations.open(folder)
    with writing(folder, processes, overwrite) as part:
        stored = unfinished(folder, part)
        if stored.shards:
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
    check_record(folder, stored.record, asked)
    total = _length(loader)
    if total is not None and total != stored.batches:
        raise refusal(folder, f"the loader has {total} batches, but {stored.batches} are stored")
    for batch in loader:
        rows = reader.rows(batch)
        check_record(folder, stored.record, record_of(rows.facts, **asked))
        check_batch(folder, 0, stored.first_batch(), rows)
        return
    _check_any(0, 0)


def _length(loader: Iterable[Any]) -> int | None:
    length = operator.length_hint(loader, -1)
    return length if length >= 0 else None


def _check_any(batches: int, rows: int) -> None:
    if not batches:
        raise ValueError("the loader gave no batch at all; is the data set empty, or a generator used up?")
    if not rows:
        raise ValueError(f"no sample is left of {batches} batches: every label is -100, or every attention_mask 0")
