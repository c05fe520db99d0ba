"""The ranks of a run: start, stop and collectives."""

import ctypes
import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from fastalign.utils.errors import SharedError, UserError, describe

_Result = TypeVar("_Result")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on each rank, in place."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def agree(self, value: int | str) -> bool:
        """Whether every rank has the same value."""
        return len(set(self.gather(value))) == 1

    def gather(self, value) -> list:
        """Every rank's value (anything that pickles), by rank, on each rank."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            distributed.barrier()


def collective_timeout(timeout: float) -> timedelta:
    """The process group's timeout for `faults.timeout` seconds: longer, as ranks wait for rank 0 to save or probe."""
    return timedelta(seconds=max(30 * 60, 2 * min(timeout, 1e8) + 60))


def start(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the ranks that torchrun started, if any: NCCL with GPUs, gloo without. `timeout`: of collectives."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"--nproc-per-node={processes}: this machine has {gpus} GPUs; use at most that")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    world = World(rank, size, device)
    if size == 1:
        return world
    # Before there is a group: if torch._dynamo imported this later, the group would become the default of some of its
    # functions' arguments, which keeps it alive after `stop`.
    importlib.import_module("torch.distributed.fsdp")
    # NCCL's flight recorder keeps the last collectives; a rank that hangs writes them to a file.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    options = {"backend": "gloo", "timeout": timeout}
    if device.type == "cuda":
        options |= {"backend": "nccl", "device_id": device}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store still has the addresses of the ranks before the restart: use other keys. Several machines
        # count restarts differently; there torchrun must not share its store (examples/elastic.sh).
        store, *_ = next(distributed.rendezvous("env://", timeout=timeout))
        options |= {"store": distributed.PrefixStore(attempt, store), "rank": rank, "world_size": size}
    distributed.init_process_group(**options)
    return world


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory: page faults take 1 to 15% of a step on a CPU. False without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_MMAP_MAX, 0))


_LOST = re.compile(
    r"gloo.*(connection (closed|reset|refused)|broken pipe|timed out|timeout|no route to host|unreachable)"
    r"|nccl(Remote|System)Error",
    re.IGNORECASE | re.DOTALL,
)


def connection_lost(error: BaseException) -> bool:
    """Whether an error of torch says that another rank, or the ranks' store, cannot be reached."""
    lost = isinstance(error, (distributed.DistNetworkError, distributed.DistStoreError))
    return lost or (isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None)


def stop(*, alone: bool = False) -> None:
    """Leave the process group and end its threads: gloo's may abort a process that exits first (pytorch #179291)."""
    if distributed.is_initialized():
        # After an error that other ranks may not have (`alone`), NCCL would wait for them, and hide the error.
        abort = alone and distributed.get_backend() == "nccl"
        (distributed.distributed_c10d._abort_process_group if abort else distributed.destroy_process_group)()


def on_first_rank(world: World, work: Callable[[], _Result]) -> _Result:
    """Call `work` on rank 0 and return its result (anything that pickles) on every rank.

    If it raises a `UserError` or an `OSError`, every rank raises a SharedError, so that none is left waiting.
    """
    result = failure = None
    try:
        result = work() if world.main else None
    except (UserError, OSError) as error:
        failure = describe(error)
    result, failure = world.gather((result, failure))[0]
    if failure is not None:
        raise SharedError(failure)
    return result
