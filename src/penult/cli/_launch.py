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

_INTERVAL = 0.2  # Seconds between two checks of the other processes.
_TIMEOUT = timedelta(days=30)  # One process may have more to do than the others.
_RANKS = "RANK", "LOCAL_RANK", "SLURM_PROCID"  # Set by the program that starts the processes.


def own_rank() -> int:
    """Return the number of this process among those started together, from the environment; 0 for a single one."""
    return max((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), default=0)


def lost(error: BaseException) -> bool:
    """Return whether an error means that another process ended."""
    from torch import distributed

    if not isinstance(error, RuntimeError) or not distributed.is_initialized():
        return False
    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    )


class Launch:
    """The processes of a command: as many as the command line says, or as torchrun started.

    Args:
        device: A device, or the type of several devices.
        devices: Number of devices per machine; None for 1, or as torchrun started.
        num_nodes: Number of machines; None for 1, or as torchrun started.
        strategy: Strategy of Lightning.

    Attributes:
        several: Whether there is more than one process.
        rank: The number of this process.
        device: The device that this process computes on.
        devices: Number of devices per machine.
        num_nodes: Number of machines.
        strategy: Strategy of Lightning.

    Raises:
        ValueError: torchrun started other numbers of processes, or there is no such device.
    """

    def __init__(self, device: str, devices: int | None, num_nodes: int | None, strategy: str) -> None:
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        counts = (
            {"--devices": int(os.environ["LOCAL_WORLD_SIZE"]), "--num-nodes": int(os.environ["GROUP_WORLD_SIZE"])}
            if by_torchrun
            else {"--devices": devices or 1, "--num-nodes": num_nodes or 1}
        )
        for (option, count), given in zip(counts.items(), (devices, num_nodes), strict=True):
            if given not in (None, count):
                raise ValueError(f"{option} is {given}; expected {count}, as torchrun started. Leave {option} out")
        self.devices, self.num_nodes = counts.values()
        self.strategy = strategy
        self.several = self.devices * self.num_nodes > 1
        self.rank = own_rank() if self.several else 0
        own_device = device_of(device)
        if self.several and own_device.type != "cpu":
            if ":" in device:
                raise ValueError(
                    f"--device is {device}, a single device; expected {own_device.type}, since there are several"
                )
            own_device = device_of(f"{own_device.type}:{os.environ.get('LOCAL_RANK', 0)}")
        self.device: torch.device = own_device

    def start(self) -> ProcessGroup | None:
        """Start the other processes, which run the same command, unless torchrun did; return their group, None for one.

        Called after all checks of the arguments, so that their errors are printed once, by the first process.
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
            raise ValueError(f"--strategy is {self.strategy}, which starts no group of processes; use ddp")
        children = getattr(fabric.strategy.launcher, "procs", [])
        if children:
            _watch(lambda: _ended(children))
        elif "TORCHELASTIC_RUN_ID" not in os.environ and int(os.environ.get("LOCAL_RANK", 0)):
            parent = os.getppid()
            _watch(lambda: "" if os.getppid() != parent else None)
        # Commands exchange little, and wait for the slowest process as long as it takes.
        group: ProcessGroup = distributed.new_group(backend="gloo", timeout=_TIMEOUT)
        return group


def _ended(children: Sequence[Any]) -> str | None:
    """If a child process failed, kill the others and return the message; else None."""
    for rank, child in enumerate(children, start=1):
        if code := child.poll():
            for other in children:
                other.kill()
            how = f"was killed (signal {-code})" if code < 0 else f"failed (exit code {code})"
            return (
                f"process {rank} of {len(children) + 1} {how}, so the others were ended; give the same command again "
                "to continue"
            )
    return None


def _watch(check: Callable[[], str | None]) -> None:
    """Check the other processes in a thread; as soon as that check returns a message, print it and end this process.

    The process ends without any cleanup, because a process that waits for a lost one cannot be interrupted otherwise.
    Files on disk stay whole, since they are written atomically.
    """

    def run() -> None:
        while (message := check()) is None:
            time.sleep(_INTERVAL)
        if message:
            show_cursor()
            tell(message)
        os._exit(2)

    threading.Thread(target=run, name="penult-watch", daemon=True).start()
