"""Preemption: a signal is remembered, the run saves and stops, and a marker in its folder says that it can go on."""

import signal
import threading
from enum import IntEnum
from pathlib import Path
from types import FrameType

PREEMPTED = 75  # exit code of a run that was asked to stop and has saved: EX_TEMPFAIL, try again later
INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as in shells
MARKER = "preempted"  # the file in the run folder that tells a script to start the same command again


class StopReason(IntEnum):
    """Why a run is to stop before its last step; signals by their number."""

    SAVE_FAILED = -1
    NONE = 0
    SIGINT = signal.SIGINT
    SIGUSR1 = signal.SIGUSR1
    SIGTERM = signal.SIGTERM


class Preempted(Exception):
    """The run was asked to stop, and its checkpoint is on disk; `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Preemption:
    """A context around a run: remembers SIGTERM and SIGUSR1 instead of ending the process.

    On exit the old handlers come back. Only after `Preempted` both signals stay ignored: the process is about to end
    with its own exit code, while torchrun sends SIGTERM to all ranks as soon as the first one has ended. Outside of
    the main thread, which alone receives signals, nothing is installed.
    """

    def __init__(self) -> None:
        self.reason = StopReason.NONE  # the first signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        for number, handler in self._before.items():
            ignored = isinstance(error, Preempted) and number != signal.SIGINT
            # None is a handler that was not installed from Python: it cannot be put back.
            signal.signal(number, signal.SIG_IGN if ignored else handler or signal.SIG_DFL)

    def hold_interrupts(self) -> None:
        """From here on there is something to save: remember the first SIGINT; a second one ends the process at once.

        An ignored SIGINT stays ignored, as of `command &` in a shell script.
        """
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or StopReason(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # which also ends a process inside a collective or a kernel


def preempted(folder: Path, reason: StopReason, step: int, *, main: bool) -> Preempted:
    """What every rank raises after the checkpoint of `step` is on disk; rank 0 (`main`) writes the marker."""
    if main:
        (folder / MARKER).write_text(f"{reason.name} at step {step}\n")
    return Preempted(
        f"{reason.name}: saved {folder} at step {step}; run the same command again to go on from there",
        INTERRUPTED if reason == StopReason.SIGINT else PREEMPTED,
    )


def clear_marker(folder: Path) -> None:
    """Remove the marker, if there is one."""
    (folder / MARKER).unlink(missing_ok=True)
