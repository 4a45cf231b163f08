"""Several processes for one command, started by Lightning or by torchrun."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from penult.cli._console import quiet, show_cursor, tell
from penult.cli._models import device_of

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["Launch", "lost", "own_rank"]

_LOOK = 0.2  # seconds between two looks at the other processes
_PATIENCE = timedelta(days=30)  # for a process that has more to do than the others
_RANKS = "RANK", "LOCAL_RANK", "SLURM_PROCID"  # set by who starts processes


def own_rank() -> int:
    """The number of this process among those that were started together, as their environment says; 0 for one alone."""
    return max((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), default=0)


def lost(error: BaseException) -> bool:
    """Whether an error says no more than that another process ended."""
    from torch import distributed

    if not isinstance(error, RuntimeError) or not distributed.is_initialized():
        return False
    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    )


class Launch:
    """The processes of a command: as many as are asked for on the command line, or as torchrun has started.

    Args:
        device: A device, or the kind of several.
        devices: How many on a machine.
        num_nodes: How many machines.
        strategy: Lightning's.

    Attributes:
        several: Whether there are others.
        rank: The number of this process.
        device: The one that this process computes on.
        devices: How many on a machine.
        num_nodes: How many machines.
        strategy: Lightning's.

    Raises:
        ValueError: torchrun has started other numbers than are asked for, or there is no such device.
    """

    def __init__(self, device: str, devices: int | None, num_nodes: int | None, strategy: str) -> None:
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        found = (
            {"--devices": int(os.environ["LOCAL_WORLD_SIZE"]), "--num-nodes": int(os.environ["GROUP_WORLD_SIZE"])}
            if by_torchrun
            else {"--devices": devices or 1, "--num-nodes": num_nodes or 1}
        )
        for (flag, count), asked in zip(found.items(), (devices, num_nodes), strict=True):
            if asked not in (None, count):
                raise ValueError(f"torchrun says {count} where {flag} says {asked}; leave {flag} out")
        self.devices, self.num_nodes = found.values()
        self.strategy = strategy
        self.several = self.devices * self.num_nodes > 1
        self.rank = own_rank() if self.several else 0
        place = device_of(device)
        if self.several and place.type != "cpu":
            if ":" in device:
                raise ValueError(f"--device {device} is one device, and there are {self.devices}; give {place.type}")
            place = device_of(f"{place.type}:{os.environ.get('LOCAL_RANK', 0)}")
        self.device: torch.device = place

    def start(self) -> ProcessGroup | None:
        """Start the others where Lightning has to, which then run the same command; the group of all, or None for one.

        To be called when all that can be wrong has been looked at: the errors of the first process are said once.
        """
        if not self.several:
            return None
        try:
            from lightning.fabric import Fabric
        except ImportError as error:
            raise ImportError('several processes need Lightning: pip install "penult[train]"') from error
        from torch import distributed

        with quiet():
            fabric = Fabric(
                accelerator={"cuda": "gpu"}.get(self.device.type, self.device.type),
                devices=self.devices,
                num_nodes=self.num_nodes,
                strategy=self.strategy,
            )
            fabric.launch()
        self.rank = fabric.global_rank
        if not distributed.is_initialized():
            raise ValueError(f"--strategy {self.strategy} starts no group of processes; use ddp")
        children = getattr(fabric.strategy.launcher, "procs", [])
        if children:
            _watch(lambda: _ended(children))
        elif "TORCHELASTIC_RUN_ID" not in os.environ and int(os.environ.get("LOCAL_RANK", 0)):
            parent = os.getppid()
            _watch(lambda: "" if os.getppid() != parent else None)
        # What commands exchange is small, and must wait for the slowest however long that takes.
        group: ProcessGroup = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return group


def _ended(children: Sequence[Any]) -> str | None:
    """What to say where a child ended badly, after all others are ended."""
    for rank, child in enumerate(children, start=1):
        if code := child.poll():
            for other in children:
                other.kill()
            how = f"was killed (signal {-code})" if code < 0 else f"failed (exit code {code})"
            return f"process {rank} of {len(children) + 1} {how}, so that the others were ended: give the same command "
    return None


def _watch(look: Callable[[], str | None]) -> None:
    """End this process as soon as a look at the others gives a text, and say it.

    At once, since a process that waits for one that is gone cannot be woken. What is on disk is made for that.
    """

    def run() -> None:
        while (text := look()) is None:
            time.sleep(_LOOK)
        if text:
            show_cursor()
            tell(f"{text}again to continue")
        os._exit(2)

    threading.Thread(target=run, name="penult-watch", daemon=True).start()
