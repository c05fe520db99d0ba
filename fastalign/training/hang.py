"""A timer in each rank ends the process, and prints where it was, if a step takes longer than `faults.timeout`."""

import faulthandler
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from fastalign.training.command import RANK_FAILED
from fastalign.training.distributed import World

WAITING = "waiting for the device or the other ranks"
_TORCH = Path(torch.__file__).parent
_COLLECTIVES = (f"{_TORCH}/distributed/", f"{_TORCH}/autograd/graph.py")  # backward passes, where DDP reduces


def collective_timeout(timeout: float) -> timedelta:
    """The process group's timeout for `faults.timeout` seconds: longer, as ranks wait for rank 0 to save or probe."""
    return timedelta(seconds=max(30 * 60, 2 * min(timeout, 1e8) + 60))


class HangTimer:
    """Ends the process with exit code `RANK_FAILED` after `timeout` seconds without a `beat`.

    A rank that waits for others has half as long again, so that the rank that hangs reports first. Only seconds in
    which the process runs count: a run goes on after its machine was suspended.
    """

    def __init__(self, world: World, timeout: float):
        self._world, self._timeout = world, timeout
        self._progress, self._paused = (0, "starting"), False
        self._stop, self._main = threading.Event(), threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="hang-timer", daemon=True)

    def beat(self, step: int, doing: str) -> None:
        """Restart the timer. `step`: updates done; `doing`: what comes next, such as "waiting for data"."""
        self._progress = (step, doing)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The timer restarts at the end."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

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
        """Whether the main thread is where it may wait for another rank."""
        frames = traceback.walk_stack(sys._current_frames()[self._main])
        inside = any(frame.f_code.co_filename.startswith(_COLLECTIVES) for frame, _ in frames)
        return self._world.size > 1 and (inside or self._progress[1] == WAITING)

    def _end(self, idle: float) -> None:
        guard = threading.Timer(10, os._exit, [RANK_FAILED])  # printing may block, too
        guard.daemon = True
        guard.start()
        (step, doing), rank = self._progress, self._world.rank
        if doing != WAITING and self._waits():
            doing += f", {WAITING}"
        line = (
            f"fastalign: rank {rank} ({socket.gethostname()}, pid {os.getpid()}) hangs at step {step}: {doing} for "
            f"{idle:.0f} s; the run ends after faults.timeout={self._timeout:g} s; the same command goes on from the "
            "newest checkpoint; if the run was only slow, set a larger faults.timeout"
        )
        print(line, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)
        if distributed.is_initialized() and distributed.get_backend() == "nccl":
            # NCCL's flight recorder, as NCCL's own timeout would write it; torch's `torchfrtrace` reads it.
            prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE", f"{tempfile.gettempdir()}/nccl_trace_rank_")
            Path(f"{prefix}{rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
        os._exit(RANK_FAILED)
