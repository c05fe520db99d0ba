"""Errors, signals and hangs of a command, alone and under torchrun: messages, exit codes, saving before a stop."""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch

from fastalign.training import distributed
from fastalign.training.distributed import World
from fastalign.utils.errors import SharedError, UserError, describe, first_line

RANK_FAILED = 70  # exit code after a hang, or after the connection to another rank was lost
PREEMPTED = 75  # exit code of a run that saved and stopped after a signal: EX_TEMPFAIL, try again later
INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as in shells
NO_READER = 141  # exit code if the reader of the output has ended: 128 + SIGPIPE, as in shells
MARKER = "preempted"  # the file in the run folder that tells a script to start the same command again
WAITING = "waiting for the device or the other ranks"
_TORCH = Path(torch.__file__).parent
_COLLECTIVES = (f"{_TORCH}/distributed/", f"{_TORCH}/autograd/graph.py")  # backward passes, where DDP reduces


class StopReason(IntEnum):
    """Why a run must stop before its last step; signals by their number."""

    SAVE_FAILED = -1
    NONE = 0
    SIGINT = signal.SIGINT
    SIGUSR1 = signal.SIGUSR1
    SIGTERM = signal.SIGTERM


class Preempted(Exception):
    """A signal stopped the run in `folder`; its checkpoint of `step` is on disk; `code` is the exit code."""

    def __init__(self, folder: Path, reason: StopReason, step: int):
        super().__init__(
            f"{reason.name}: saved {folder} at step {step}; run the same command again to continue"
        )
        self.code = INTERRUPTED if reason == StopReason.SIGINT else PREEMPTED


class Preemption:
    """A context around a run that records SIGTERM and SIGUSR1 instead of ending the process.

    On exit it restores the old handlers, except after `Preempted`, when both signals stay ignored: the process is
    about to end with its own exit code, while torchrun sends SIGTERM to all ranks as soon as the first one has ended.
    Outside the main thread, which alone receives signals, nothing is installed.
    """

    def __init__(self) -> None:
        self.reason = StopReason.NONE  # the first signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        self._remember(signal.SIGTERM, signal.SIGUSR1)
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        for number, handler in self._before.items():
            ignored = isinstance(error, Preempted) and number != signal.SIGINT
            # None is a handler that was not installed from Python: it cannot be put back.
            signal.signal(number, signal.SIG_IGN if ignored else handler or signal.SIG_DFL)

    def hold_interrupts(self) -> None:
        """From here on there is something to save: record the first SIGINT; a second one ends the process at once.

        An ignored SIGINT stays ignored, as for `command &` in a shell script.
        """
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._remember(signal.SIGINT)

    def _remember(self, *numbers: signal.Signals) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before |= {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or StopReason(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # also ends a process inside a collective or a kernel
            if os.environ.get("RANK", "0") == "0":  # not printed: the signal may have interrupted a print
                with suppress(OSError):
                    os.write(2, b"\nfastalign: SIGINT: saving soon; a second one ends the run at once\n")


def run_command(body: Callable[[], object]) -> int:
    """Run a command's body, then leave the process group.

    Returns the exit code: 0; 2 for bad input; 70 if another rank was lost; 75 if a signal stopped the run, which has
    saved; 130 after Ctrl-C; 141 if the reader of the output has ended, as in `fastalign doctor | head`.
    """
    rank, alone = os.environ.get("RANK", "0"), True
    try:
        try:
            body()
            alone = False
            print(end="", flush=True)  # sys.stdout is None if it was closed
            return 0
        except BrokenPipeError:
            # What is still buffered would raise the same error when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _exit_code(NO_READER, "stopped: the process that reads the output has ended (broken pipe)")
        except (UserError, OSError) as error:
            alone = not isinstance(error, SharedError)
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the first rank of each machine
                return _exit_code(2, describe(error))
            time.sleep(3)  # torchrun stops every rank when one ends: let the first one print
            return 2
        except Preempted as error:
            alone = False
            return _exit_code(error.code, str(error) if rank == "0" else "")
        except RuntimeError as error:
            if not distributed.connection_lost(error):
                raise
            message = f"rank {rank}: lost the connection to another rank: run again to resume"
            return _exit_code(RANK_FAILED, f"{message} ({first_line(error)})")
        finally:
            distributed.stop(alone=alone)
    except KeyboardInterrupt:
        return _exit_code(INTERRUPTED, "interrupted" if rank == "0" else "")


def _exit_code(code: int, message: str) -> int:
    if message:
        print(f"fastalign: {message}", file=sys.stderr, flush=True)
    return code


@contextmanager
def report_rank_error(rank: int) -> Iterator[None]:
    """Print a `UserError` that only one rank may have, if `run_command` prints nothing on this rank."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, SharedError):
            print(f"fastalign: rank {rank}: {error}", file=sys.stderr)
        raise


class HangTimer:
    """Ends the process with exit code `RANK_FAILED` after `timeout` seconds without a `beat`.

    A rank that waits for others has 1.5 times as long, so that the rank that hangs reports first. Time in which the
    process does not run is not counted, so that a run continues after its machine was suspended.
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
        """Pause the timer; it restarts at the end."""
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
        """Whether the main thread may be waiting for another rank."""
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
            f"{idle:.0f} s; the run ends after faults.timeout={self._timeout:g} s; run the same command again to "
            "resume from the newest checkpoint; if the run was only slow, set a larger faults.timeout"
        )
        print(line, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
            # NCCL's flight recorder, as NCCL's own timeout would write it; torch's `torchfrtrace` reads it.
            prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE", f"{tempfile.gettempdir()}/nccl_trace_rank_")
            Path(f"{prefix}{rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
        os._exit(RANK_FAILED)
