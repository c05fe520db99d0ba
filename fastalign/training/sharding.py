"""FSDP: each rank keeps a part of every trained tensor; checkpoints and everything written hold whole ones.

torch's FSDP is imported where something is split: few runs do that, and all of them pass through here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from fastalign.training.distributed import World, open_mesh


def shard(module: nn.Module, parts: Iterable[nn.Module], world: World) -> None:
    """Split a module's parameters among the ranks, in place, after which optimisers may be made.

    Args:
        module: on the device; its forward, called as a module, puts together what it needs.
        parts: modules within it that are put together one at a time, called as modules too.
        world: several ranks.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = open_mesh(world)
    for part in parts:
        fully_shard(part, mesh=mesh)
    # The root too gives its weights back after each pass: what is loaded between two passes is never passed over.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def from_first_rank(module: nn.Module) -> None:
    """Send rank 0's parameters and buffers to every rank, as DDP does at its start."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            distributed.broadcast(value, src=0)


def _is_split(value: Tensor) -> bool:
    """Whether this is a DTensor, the only kind that has a mesh."""
    return hasattr(value, "device_mesh")


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor that ranks share: every rank must call this. Other tensors as they are."""
    return value.full_tensor() if _is_split(value) else value


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor that ranks share, in the same memory. Other tensors as they are."""
    return value.to_local() if _is_split(value) else value


def like(value: Tensor, live: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, split as `live` is; as it is where `live` is not split."""
    if not _is_split(live):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Each rank takes its part of its own copy, nothing is sent.
    return distribute_tensor(value.to(live.device), live.device_mesh, live.placements, src_data_rank=None)


def load_module(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a module that may be split; errors are its own."""
    live = module.state_dict()
    fitting = {
        name: live[name] for name, value in state.items() if name in live and value.shape == live[name].shape
    }
    module.load_state_dict({name: like(value, fitting.get(name, value)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`load_state_dict` of whole tensors into an optimiser whose parameters may be split; errors are its own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def split(index: int, values: dict) -> dict:
        live = parameters[index] if index < len(parameters) else None
        shape = getattr(live, "shape", None)
        return {
            key: like(each, live) if getattr(each, "shape", ()) == shape else each
            for key, each in values.items()
        }

    optimizer.load_state_dict(
        {**state, "state": {index: split(index, values) for index, values in state["state"].items()}}
    )


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Passes within, without gradient, need no other rank: they may be more on one rank than on another.

    Every rank must enter; each holds the whole module meanwhile. Nothing for a module that is not split.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
