"""FSDP: each rank keeps a shard of every trained tensor; checkpoints hold full tensors.

Imports of torch.distributed.fsdp and .tensor are local: they are slow, and few runs shard.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from fastalign.training.distributed import World, open_mesh


def shard(module: nn.Module, parts: Iterable[nn.Module], world: World) -> None:
    """Shard a module's parameters in place, before optimizers are made; `parts` are unsharded one at a time."""
    from torch.distributed.fsdp import fully_shard

    mesh = open_mesh(world)
    for part in parts:
        fully_shard(part, mesh=mesh)
    # The root reshards too: weights loaded between two passes must take effect.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def broadcast_module(module: nn.Module) -> None:
    """Send rank 0's parameters and buffers to every rank, as DDP does."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            distributed.broadcast(value, src=0)


def _is_sharded(value: Tensor) -> bool:
    return hasattr(value, "device_mesh")  # a DTensor


def full_tensor(value: Tensor) -> Tensor:
    """The gathered tensor, for which every rank must call this; other tensors as they are."""
    return value.full_tensor() if _is_sharded(value) else value


def to_local(value: Tensor) -> Tensor:
    """This rank's shard, in the same memory; other tensors as they are."""
    return value.to_local() if _is_sharded(value) else value


def shard_like(value: Tensor, live: Tensor | None) -> Tensor:
    """A full tensor, the same on every rank, sharded as `live` is; the value itself if the two do not correspond."""
    if not _is_sharded(live) or getattr(value, "shape", ()) != live.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: each rank takes its shard of its own copy, nothing is sent.
    return distribute_tensor(value.to(live.device), live.device_mesh, live.placements, src_data_rank=None)


def load_module(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` of full tensors into a module that may be sharded, with its errors."""
    live = module.state_dict()
    module.load_state_dict({name: shard_like(value, live.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`load_state_dict` of full tensors into an optimizer whose parameters may be sharded, with its errors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    moments = {
        index: {key: shard_like(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Inside, forward passes without gradient need no other rank; every rank must enter and hold the full module."""
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
