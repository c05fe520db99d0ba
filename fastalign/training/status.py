"""What the ranks tell each other at each update, in one small all-reduce that does not make the host wait.

On a GPU the host reads it one update later, when the device has finished it. Every rank reads the same statuses in
the same order, so that all can act on them together.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalign.training.command import StopReason
from fastalign.training.distributed import World


@dataclass(frozen=True, eq=False)
class StepStatus:
    """One update, as every rank knows it."""

    step: int  # number of the update, from 1
    skipped: bool  # the loss or the gradient was not finite, and the weights did not change
    ranks: tuple[int, ...]  # whose loss was not finite; empty if only the gradient was not
    stop: StopReason
    overdue: bool  # a rank asks for a checkpoint, because the newest one is old
    bad: int  # bad samples found in the update's batches, over all ranks
    ids: np.ndarray  # [n] int64, this rank's samples
    found: tuple  # this rank's bad samples


class Status:
    """The exchange; `lag`: updates after which a status is read, None = 1 on a GPU, 0 on a CPU.

    With `sticky`, after one skipped update all that follow are skipped: the weights stay those from before it.
    """

    def __init__(self, world: World, *, sticky: bool = False, lag: int | None = None):
        self._world = world
        self._tripped = torch.zeros((), dtype=torch.bool, device=world.device) if sticky else None
        self._lag = lag if lag is not None else int(world.device.type == "cuda")
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None, np.ndarray, tuple]] = deque()

    def exchange(
        self,
        step: int,
        loss: Tensor,
        norm: Tensor,
        *,
        ids: np.ndarray,
        found: tuple,
        stop: int,
        overdue: bool,
    ) -> tuple[Tensor, Tensor]:
        """Share an update's status, with the fields of `StepStatus`; a collective. `read` returns it later.

        `loss`: [] this rank's; `norm`: [] of the gradient over all ranks; both on the device. Returns [] fp32, the
        mean loss over ranks, and [] bool, whether to skip the update; on the device.
        """
        rank, size = self._world.rank, self._world.size
        values = torch.zeros(3 + 2 * size, dtype=torch.float32, device=loss.device)
        total, nonfinite, stops = values[0], values[3 : 3 + size], values[3 + size :]
        total.copy_(loss)
        nonfinite[rank] = ~loss.isfinite()
        # Filled, not copied: a copy from the host would wait for the device.
        for place, number in ((values[1], len(found)), (values[2], overdue), (stops[rank], stop)):
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
        self._pending.append((step, host, event, ids, found))
        return total / size, skip

    def read(self, *, everything: bool = False) -> list[StepStatus]:
        """The statuses that are due, oldest first; with `everything` the newest too, for which the host waits."""
        size, due = self._world.size, []
        while len(self._pending) > (0 if everything else self._lag):
            step, host, event, ids, found = self._pending.popleft()
            if event is not None:
                event.synchronize()
            bad, overdue, *flags, skipped = host.tolist()
            ranks = tuple(rank for rank in range(size) if flags[rank])
            stop = StopReason(next((int(number) for number in flags[size:] if number), 0))
            due.append(StepStatus(step, bool(skipped), ranks, stop, bool(overdue), int(bad), ids, found))
        return due
