"""What ranks tell one another at each update, in one small all-reduce, without the host waiting for the device.

On a GPU the host reads it one update later, when the device has long had it ready: the order in which ranks learn of
a thing is the same on each, so that all of them may act on it together.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalign.training.distributed import World

_LOSS, _BAD, _OVERDUE, _RANKS = range(4)


@dataclass(frozen=True, eq=False)
class Seen:
    """One update, as every rank knows it."""

    step: int
    """the update's number, from 1"""
    skipped: bool
    """the loss or the gradient was not finite, and the weights stayed as they were"""
    ranks: tuple[int, ...]
    """whose loss was not finite; empty where only the gradient was not"""
    signal: int
    """that asks the run to leave and that a rank received, or its own reason below zero; 0 = none"""
    overdue: bool
    """a rank asks for a checkpoint, because the newest one is old"""
    bad: int
    """samples found bad in making the update's batches, over all ranks"""
    ids: np.ndarray
    """[n] int64, this rank's samples"""
    found: tuple
    """what this rank found bad"""


class Status:
    """The exchange.

    Args:
        world: the ranks.
        lag: updates after which a status is read; None = 1 on a GPU, at once on a CPU, which waits for itself.
        sticky: once an update was left out, leave out all that follow: the weights stay those from before it.
    """

    def __init__(self, world: World, *, sticky: bool = False, lag: int | None = None):
        self._world = world
        self._tripped = torch.zeros((), dtype=torch.bool, device=world.device) if sticky else None
        self._lag = lag if lag is not None else int(world.device.type == "cuda")
        self._shared: Tensor | None = None
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None, np.ndarray, tuple]] = deque()

    def share(self, loss: Tensor, *, signal: int = 0, bad: int = 0, overdue: bool = False) -> Tensor:
        """Exchange an update's status; a collective.

        Args:
            loss: [] this rank's, on the device.
            signal: that this rank received, or another reason to leave, below zero; 0 = none.
            bad: samples that this rank found bad.
            overdue: this rank asks for a checkpoint.

        Returns:
            [] fp32, the mean loss over ranks.
        """
        rank, size = self._world.rank, self._world.size
        values = torch.zeros(_RANKS + 2 * size, dtype=torch.float32, device=loss.device)
        values[_LOSS] = loss
        values[_RANKS + rank] = ~loss.isfinite()
        # Filled, not copied: a copy from the host would wait for the device.
        values[_RANKS + size + rank].fill_(float(signal))
        values[_BAD].fill_(float(bad))
        values[_OVERDUE].fill_(float(overdue))
        self._shared = self._world.sum(values)
        return self._shared[_LOSS] / self._world.size

    def judge(self, norm: Tensor) -> Tensor:
        """Whether the update must be left out: [] bool on the device, the same on every rank.

        Args:
            norm: [] of the gradient over all ranks.
        """
        skip = ~(norm.isfinite() & self._shared[_LOSS].isfinite())
        if self._tripped is not None:
            skip = self._tripped.logical_or_(skip)
        return skip

    def post(self, step: int, skip: Tensor, ids: np.ndarray, found: tuple = ()) -> None:
        """Send the update's status on its way to the host, with what only this rank knows of it.

        Args:
            step: the update's number.
            skip: of `judge`.
            ids: [n] int64, this rank's samples.
            found: this rank's bad samples.
        """
        values, event = torch.cat([self._shared[1:], skip.float().reshape(1)]), None
        if values.is_cuda:
            host = torch.empty(values.shape, pin_memory=True)
            host.copy_(values, non_blocking=True)
            values, event = host, torch.cuda.Event()
            event.record()
        self._waiting.append((step, values, event, ids, found))

    def read(self, *, everything: bool = False) -> list[Seen]:
        """The updates whose status is due, oldest first; with `everything` the newest too: the host waits."""
        seen = []
        while len(self._waiting) > (0 if everything else self._lag):
            step, values, event, ids, found = self._waiting.popleft()
            if event is not None:
                event.synchronize()  # of the update before the newest: the device still has work
            bad, overdue, *flags, skipped = values.tolist()
            ranks = tuple(rank for rank in range(self._world.size) if flags[rank])
            signal = next((int(number) for number in flags[self._world.size :] if number), 0)
            seen.append(Seen(step, bool(skipped), ranks, signal, bool(overdue), int(bad), ids, found))
        return seen
