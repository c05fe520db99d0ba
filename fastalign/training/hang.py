"""A timer in each rank: the process ends, and prints where it was, if a step takes longer than `faults.timeout`."""

import faulthandler
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
from torch import distributed

from fastalign.training.distributed import World

RANK_FAILED = 70
"""exit code after a hang, or after the connection to another rank was lost: run the same command again"""
WAITING = "waiting for the device or the other ranks"
"""what a rank does that can only wait"""
_TORCH = str(Path(torch.__file__).parent)


def collective_timeout(timeout: float) -> timedelta:
    """The process group's timeout: above the timers', and at least 30 minutes because ranks wait for slow writes.

    Args:
        timeout: `faults.timeout`, seconds.
    """
    return timedelta(seconds=max(30 * 60, 2 * min(timeout, 1e8) + 60))


class HangTimer:
    """Ends the process with exit code `RANK_FAILED` after `timeout` seconds without a `beat`.

    A rank that waits for others has half as long again, so that the rank that hangs reports first. Only seconds in
    which the process runs count: after a suspended machine wakes up, its run goes on.

    Args:
        world: this process among the ranks.
        timeout: seconds.
        step: where the run starts.
        saved: returns the step of the newest checkpoint on disk, None where unknown; must not block.
    """

    def __init__(
        self, world: World, timeout: float, step: int = 0, *, saved: Callable[[], int | None] = lambda: None
    ):
        self._world, self._timeout, self._saved = world, timeout, saved
        self._progress = (step, "starting")
        self._paused = 0
        self._stop = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="hang-timer", daemon=True)

    def beat(self, step: int, doing: str) -> None:
        """Restart the timer.

        Args:
            step: updates done.
            doing: what this rank does next, such as "waiting for data".
        """
        self._progress = (step, doing)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The timer stands still within, and restarts at the end."""
        self._paused += 1
        try:
            yield
        finally:
            self._progress = (*self._progress,)
            self._paused -= 1

    def __enter__(self) -> "HangTimer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        period = min(1.0, self._timeout / 10)
        seen, idle = None, 0.0
        while not self._stop.wait(period):
            if self._paused or seen is not self._progress:
                seen, idle = self._progress, 0.0
                continue
            idle += period
            if idle > self._timeout and (idle > 1.5 * self._timeout or not self._waits()):
                self._end(idle)

    def _waits(self) -> bool:
        """Whether the main thread is in a call that may wait for another rank."""
        frame = sys._current_frames().get(self._main)
        return self._world.size > 1 and (self._progress[1] == WAITING or _in_collective(frame))

    def _end(self, idle: float) -> None:
        guard = threading.Timer(10, os._exit, [RANK_FAILED])  # printing may block, too
        guard.daemon = True
        guard.start()
        (step, doing), saved = self._progress, self._saved()
        if doing != WAITING and self._waits():
            doing += f", {WAITING}"
        checkpoint = "newest checkpoint" if saved is None else f"checkpoint of step {saved}"
        print(
            f"fastalign: rank {self._world.rank} ({socket.gethostname()}, pid {os.getpid()}) hangs at step {step}: "
            f"{doing} for {idle:.0f} s; the run ends after faults.timeout={self._timeout:g} s; the same command goes "
            f"on from the {checkpoint}; if the run was only slow, set a larger faults.timeout",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(2)
        _dump_collectives(self._world)
        os._exit(RANK_FAILED)


def _in_collective(frame: FrameType | None) -> bool:
    """Whether a stack is within torch.distributed, or within a backward pass, where DDP exchanges gradients."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(f"{_TORCH}/distributed/") or name == f"{_TORCH}/autograd/graph.py":
            return True
        frame = frame.f_back
    return False


def _dump_collectives(world: World) -> None:
    """Write NCCL's flight recorder, as NCCL's own timeout would, for torch's `torchfrtrace`."""
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE", f"{tempfile.gettempdir()}/nccl_trace_rank_")
        Path(f"{prefix}{world.rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
