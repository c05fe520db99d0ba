"""What the ranks tell each other at each update, in one small all-reduce that does not make the host wait.

On a GPU the host reads it one update later. Every rank reads the same statuses in the same order, so that all can
act on them together.
"""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastalign.training.command import StopReason
from fastalign.training.distributed import World


@dataclass(frozen=True, eq=False)
class StepStatus:
    """One update: as a rank knows it, and then with what all ranks know of it."""

    step: int  # number of the update, from 1
    ids: np.ndarray  # [n] int64, this rank's samples
    found: tuple  # this rank's bad samples
    stop: StopReason
    overdue: bool  # a rank asks for a checkpoint, because the newest one is old
    skipped: bool = False  # the loss or the gradient was not finite, and the weights did not change
    ranks: tuple[int, ...] = ()  # whose loss was not finite; empty if only the gradient was not
    bad: int = 0  # bad samples found in the update's batches, over all ranks


class Status:
    """The exchange; `lag`: updates after which a status is read, None = 1 on a GPU, 0 on a CPU.

    With `sticky`, after one skipped update all that follow are skipped: the weights stay those from before it.
    """

    def __init__(self, world: World, *, sticky: bool = False, lag: int | None = None):
        self._world = world
        self._tripped = torch.zeros((), dtype=torch.bool, device=world.device) if sticky else None
        self._lag = lag if lag is not None else int(world.device.type == "cuda")
        self._pending: deque[tuple[StepStatus, Tensor, torch.cuda.Event | None]] = deque()

    def exchange(self, loss: Tensor, norm: Tensor, own: StepStatus) -> tuple[Tensor, Tensor]:
        """Share this rank's status of an update; a collective. `read` returns that of all ranks later.

        On the device: `loss` [], this rank's; `norm` [], of the gradient over all ranks; returned are [] fp32, the
        mean loss over ranks, and [] bool, whether to skip the update.
        """
        rank, size = self._world.rank, self._world.size
        values = torch.zeros(3 + 2 * size, dtype=torch.float32, device=loss.device)
        total, nonfinite, stops = values[0], values[3 : 3 + size], values[3 + size :]
        total.copy_(loss)
        nonfinite[rank] = ~loss.isfinite()
        # Filled, not copied: a copy from the host would wait for the device.
        for place, number in ((values[1], len(own.found)), (values[2], own.overdue), (stops[rank], own.stop)):
            place.fill_(float(number))
        self._world.sum(values)
        skip = ~(norm.isfinite() & total.isfinite())
        if self._tripped is not None:
            skip = self._tripped.logical_or_(skip)
        host, event = torch.cat([values[1:], skip.float().reshape(1)]), None
        if host.is_cuda:
            pinned = torch.empty(host.shape, pin_memory=True)
            host, event = pinned.copy_(host, non_blocking=True), torch.cuda.Event()
            event.record()
        self._pending.append((own, host, event))
        return total / size, skip

    def read(self, *, everything: bool = False) -> list[StepStatus]:
        """The statuses that are due, oldest first; with `everything` the newest too, for which the host waits."""
        size, due = self._world.size, []
        while len(self._pending) > (0 if everything else self._lag):
            own, host, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            bad, overdue, *flags, skipped = host.tolist()
            ranks = tuple(rank for rank in range(size) if flags[rank])
            stop = StopReason(next((int(number) for number in flags[size:] if number), 0))
            common = {"skipped": bool(skipped), "ranks": ranks, "bad": int(bad)}
            due.append(replace(own, stop=stop, overdue=bool(overdue), **common))
        return due
