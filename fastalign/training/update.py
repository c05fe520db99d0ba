"""Parts of an update besides the model: learning rate, seed, moving average, and the exchange of statuses.

The ranks exchange statuses in one small all-reduce that does not make the host wait: on a GPU it reads them one
update later. Every rank reads the same statuses in the same order, so that all can act on them together.
"""

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.training.command import StopReason
from fastalign.training.distributed import World


def learning_rate(
    step: int, *, total: int, warmup: int, lr: float, min_lr: float, start: float | None = None
) -> float:
    """timm's schedule: linear from `start` (default `min_lr`) over `warmup` updates, then a cosine to `min_lr`.

    The cosine runs over all `total` updates; the warm-up replaces its beginning. `step` counts from 0.
    """
    if step < warmup:
        start = min_lr if start is None else start
        return start + (lr - start) * step / warmup
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(step, total) / total))


def seed_update(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for an update (stochastic depth), so that a resumed run draws the same numbers."""
    number = ((seed * 1_000_003 + step) * 65_536 + rank) % 2**63
    # Not torch.manual_seed, which takes milliseconds for backends that are not in use.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


class MovingAverage:
    """An exponential moving average of a module's parameters and buffers in fp32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._live = [value.detach() for value in module.state_dict().values()]
        self.state = {name: value.detach().clone().float() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the module's current weights."""
        torch._foreach_lerp_(list(self.state.values()), self._live, 1 - self.decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in self.state.items():
            value.copy_(state[name])


@dataclass(frozen=True, eq=False)
class StepStatus:
    """The status of one update: first with what this rank knows, after the exchange with what all ranks know."""

    step: int  # number of the update, from 1
    ids: np.ndarray  # [n] int64, this rank's samples
    found: tuple  # this rank's bad samples
    stop: StopReason
    overdue: bool  # a rank asks for a checkpoint, because the newest one is old
    skipped: bool = False  # the loss or the gradient was not finite, and the weights did not change
    ranks: tuple[int, ...] = ()  # ranks whose loss was not finite; empty if only the gradient was not
    bad: int = 0  # bad samples found in the update's batches, over all ranks


class Status:
    """The exchange of statuses. `lag`: updates after which a status is read; None = 1 on a GPU, 0 on a CPU.

    With `sticky`, all updates after a skipped one are skipped too, so that the weights stay those from before it.
    """

    def __init__(self, world: World, *, sticky: bool = False, lag: int | None = None):
        self._world = world
        self._tripped = torch.zeros((), dtype=torch.bool, device=world.device) if sticky else None
        self._lag = lag if lag is not None else int(world.device.type == "cuda")
        self._pending: deque[tuple[StepStatus, Tensor, torch.cuda.Event | None]] = deque()

    def exchange(self, loss: Tensor, norm: Tensor, own: StepStatus) -> tuple[Tensor, Tensor]:
        """Share this rank's status of an update (a collective); `read` later returns that of all ranks.

        On the device: `loss` [], this rank's; `norm` [], of the gradient over all ranks; returned are [] fp32, the
        mean loss over ranks, and [] bool, whether to skip the update.
        """
        rank, size = self._world.rank, self._world.size
        values = torch.zeros(1 + 4 * size, device=loss.device)
        total, table = values[0], values[1:].view(4, size)
        total.copy_(loss)
        table[0, rank] = ~loss.isfinite()
        for row, number in enumerate((own.stop, own.overdue, len(own.found)), 1):
            table[row, rank].fill_(float(number))  # a copy from the host would wait for the device
        self._world.sum(values)
        skip = ~(norm.isfinite() & total.isfinite())
        if self._tripped is not None:
            skip = self._tripped.logical_or_(skip)
        host = torch.cat([values[1:], skip.float().reshape(1)]).to("cpu", non_blocking=True)
        event = torch.cuda.Event() if loss.is_cuda else None
        if event:
            event.record()
        self._pending.append((own, host, event))
        return total / size, skip

    def read(self, *, everything: bool = False) -> list[StepStatus]:
        """The statuses that are due, oldest first; with `everything` the newest too, for which the host waits."""
        size, due = self._world.size, []
        while len(self._pending) > (0 if everything else self._lag):
            own, host, event = self._pending.popleft()
            if event:
                event.synchronize()
            nonfinite, stops, overdue, bad = host[:-1].view(4, size).int().tolist()
            ranks = tuple(rank for rank in range(size) if nonfinite[rank])
            common = {"skipped": bool(host[-1]), "ranks": ranks, "bad": sum(bad)}
            stop = StopReason(next(filter(None, stops), 0))
            due.append(replace(own, stop=stop, overdue=any(overdue), **common))
        return due
