"""Ranks: who am I, which device is mine, and sums over everybody."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from fastalign.errors import SharedError, UserError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class World:
    """The place of this process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and talks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on each rank, in place."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def agree(self, value: int) -> bool:
        """Whether every rank has the same number."""
        bounds = torch.tensor([value, -value], dtype=torch.int64, device=self.device)
        if self.size > 1:
            distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
        return bool(bounds[0] == -bounds[1])

    def gather(self, value) -> list:
        """Every rank's value (anything that pickles), by rank, on each rank."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank; it may be anything that can be pickled."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            distributed.barrier()


def start(patience: timedelta | None = None) -> World:
    """Join the ranks that torchrun started, or be alone. NCCL with GPUs, gloo without.

    Args:
        patience: how long a rank waits for the others before it gives up; default torch's, 10 to 30 minutes.

    Raises:
        UserError: more processes on this machine than it has GPUs.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(
                f"--nproc-per-node={processes}, but this machine has {gpus} GPUs: ask for at most {gpus}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        options = {"device_id": device} if device.type == "cuda" else {}
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=patience, **options
        )
    return World(rank, size, device)


def stop() -> None:
    """Leave the group of ranks."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def on_first_rank(world: World, work: Callable[[], _Result]) -> _Result:
    """What rank 0's work comes to (anything that pickles), on every rank.

    Raises:
        SharedError: the work ended with a `UserError` or an `OSError`; on every rank, so that nobody is left waiting.
    """
    outcome = None, None
    if world.main:
        try:
            outcome = work(), None
        except UserError as error:
            outcome = None, str(error)
        except OSError as error:
            outcome = None, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    result, failure = world.share(outcome)
    if failure is not None:
        raise SharedError(failure)
    return result
