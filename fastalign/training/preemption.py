"""A run that is asked to leave: the signal is remembered, the run saves, and its folder says that it goes on."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

PREEMPTED = 75
"""The exit code of a run that was asked to leave and has saved: EX_TEMPFAIL, try again later."""
MARKER = "preempted"
"""The file in the run folder that tells a script to start the same command again."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


class Preempted(Exception):
    """The run was asked to leave, and its checkpoint is on the disk.

    Args:
        message: one line for the user.
        code: what the process exits with.
    """

    def __init__(self, message: str, code: int = PREEMPTED):
        super().__init__(message)
        self.code = code


class Preemption:
    """Around a run, in the main thread: SIGTERM and SIGUSR1 end nothing, they are remembered here.

    However often they come: a rank that is saving is not to be killed by the second one. Afterwards the old handlers
    are back; only after `Preempted` these two are ignored from then on, because the process is about to end with
    its own exit code, and torchrun sends SIGTERM to all ranks as soon as the first one has ended.

    From `hold_interrupts` on the first SIGINT is remembered, too. The system's own handler waits for the second one,
    which ends the process at once, also inside a collective or a kernel.

    In another thread, which no signal reaches, nothing is installed.

    A handler of Python's runs between two instructions: while the main thread is inside a collective or a kernel, the
    signal is noticed when that returns.
    """

    def __init__(self) -> None:
        self.number = 0
        """the first signal that came, 0 before: a number, so that ranks can share it by a maximum"""
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leaving = isinstance(error, Preempted)
        for number, handler in self._before.items():
            ignored = leaving and number in SIGNALS
            # None is a handler that was not installed from Python: it cannot be put back.
            signal.signal(number, signal.SIG_IGN if ignored else handler or signal.SIG_DFL)

    def hold_interrupts(self) -> None:
        """From here on there is something to save: the first SIGINT is remembered, a second one ends the process.

        Where SIGINT is ignored it stays so: a shell script starts a command in the background (`&`) like that, and
        the Ctrl-C that ends the script must not end the run.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._remember(number, frame)
        signal.signal(number, signal.SIG_DFL)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number


def name_of(number: int) -> str | None:
    """The name of a signal's number; None for 0."""
    return signal.Signals(number).name if number else None


def preempted(folder: Path, number: int, step: int, *, main: bool) -> Preempted:
    """What every rank raises after the checkpoint is on the disk; one of them leaves the marker in the run folder.

    Args:
        folder: of the run; exists.
        number: the signal, as the ranks agreed on it.
        step: of the checkpoint.
        main: whether this rank writes the marker.
    """
    name = name_of(number)
    if main:
        (folder / MARKER).write_text(f"{name} at step {step}\n")
    return Preempted(
        f"{name}: saved {folder} at step {step}; run the same command again to go on from there",
        INTERRUPTED if number == signal.SIGINT else PREEMPTED,
    )


def clear_marker(folder: Path) -> None:
    """The run goes on: remove the marker, if there is one."""
    (folder / MARKER).unlink(missing_ok=True)
