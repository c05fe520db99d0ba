"""Ranks: who am I, which device is mine, and sums over everybody; whether another one is lost."""

import gc
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastalign.training.memory import keep_freed_memory
from fastalign.utils.errors import SharedError, UserError, describe_os_error

_Result = TypeVar("_Result")
_meshes: list[DeviceMesh] = []


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
        keep_freed_memory()
    if size > 1:
        # Before there is a group: some of its functions have it as the default of an argument, which would keep it
        # alive after `stop` if torch._dynamo imported them later.
        importlib.import_module("torch.distributed.fsdp")
        # NCCL's flight recorder keeps the last collectives; a rank that hangs writes them.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        options = {"device_id": device} if device.type == "cuda" else {}
        options |= _store_of_this_attempt(rank, size, patience)
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=patience, **options
        )
    return World(rank, size, device)


def _store_of_this_attempt(rank: int, size: int, patience: timedelta | None) -> dict:
    """For ranks that torchrun started again: a part of its store without what the dead ranks left there.

    It keeps one store over all attempts, and a new rank may read the address of one that is dead. Only on a single
    machine do all ranks count the same attempts; on several torchrun must not share its store (examples/elastic.sh).
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not attempt or not agent_keeps_the_store() or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store = open_store(patience or timedelta(minutes=30))
    return {"store": distributed.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": size}


def agent_keeps_the_store() -> bool:
    """Whether the ranks' store lives in torchrun on the first machine, and not in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(patience: timedelta) -> distributed.TCPStore:
    """A connection of its own to the keys and values that the ranks share; needs `start` with several ranks.

    Its requests wait for nobody else's: those of the process group have another connection. The store lives in
    torchrun on the first machine; without torchrun, in rank 0.

    Args:
        patience: how long a request waits for a key.

    Raises:
        torch.distributed.DistNetworkError: the store does not answer.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)


_GLOO = ("connection closed", "connection reset", "broken pipe", "timed out")
_GLOO += ("no route to host", "application timeout", "network is unreachable", "connection refused")
_NCCL = ("ncclRemoteError", "ncclSystemError")


def connection_lost(error: BaseException) -> bool:
    """Whether an error of torch says that another rank, or the ranks' store, cannot be reached.

    gloo raises plain RuntimeErrors, known by the file they come from; an error of NCCL about a wrong call is none.
    """
    text = str(error)
    if isinstance(error, (distributed.DistNetworkError, distributed.DistStoreError)):
        return True
    if isinstance(error, distributed.DistBackendError):
        return any(name in text for name in _NCCL)
    gloo = isinstance(error, RuntimeError) and ("/gloo/" in text or text.startswith("Gloo "))
    return gloo and any(sign in text.lower() for sign in _GLOO)


def open_mesh(world: World) -> DeviceMesh:
    """All ranks in one row, for FSDP; `stop` closes it."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    _meshes.append(mesh)
    return mesh


def stop() -> None:
    """Leave the group of ranks, and end its threads.

    FSDP's caches keep its mesh, and a mesh the group, for ever. Gloo's threads would then outlive Python, and one
    that lets go of a tensor so late aborts the process (pytorch #179291).
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if _meshes:
        for mesh in _meshes:
            getattr(mesh, "_pg_registry", {}).clear()  # torch has no public way
        _meshes.clear()
        gc.collect()  # modules that FSDP split hold the group too, in cycles


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
            outcome = None, describe_os_error(error)
    result, failure = world.share(outcome)
    if failure is not None:
        raise SharedError(failure)
    return result
