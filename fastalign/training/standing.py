"""Where each rank of a run stands, and which one the others wait for: the judgement behind `ranks/watchdog.py`."""

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

WAITING = "waiting for the other ranks"
"""The station before a call that returns when all ranks have come: who stands there is not who they wait for."""
FREE, BACKWARD, COLLECTIVE = range(3)
"""How a main thread depends on other ranks: not at all; a backward pass may wait for them; it waits for them."""
_TORCH = str(Path(torch.__file__).parent)
_LIBRARY = (_TORCH, sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class Standing:
    """Where a rank is, as it tells the others."""

    rank: int
    host: str
    pid: int
    turn: int
    "how many times it has told: where this number stands still, the rank does not answer"
    step: int
    doing: str
    beats: int
    "since the step began"
    age: float
    "seconds since the last beat"
    place: str
    "the line of code where its main thread is"
    waits: int
    "FREE, BACKWARD or COLLECTIVE"
    paused: bool
    ended: str | None
    "None while it runs, empty after a normal end, else the error that ended it"
    saved: int | None = None
    "the step of the newest checkpoint that it knows to be on the disk"
    heard: bool = False
    "it knows why the run ends"
    silence: float = 0.0
    "seconds since it told this; found out by who listens, as is the next"
    mute: bool = False
    "it has not told anything for long"

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def beat(self) -> tuple[int, str, int]:
        """The station that it came to last."""
        return self.step, self.doing, self.beats


class Table:
    """What each rank told last; one thread hears, others read.

    Args:
        mute: seconds of silence after which a rank does not answer.
    """

    def __init__(self, mute: float):
        self._mute = mute
        self._rows: dict[int, tuple[Standing, float, float]] = {}
        """by rank: what it told, when that came here, and when its last beat did"""

    def hear(self, told: Standing, now: float) -> None:
        """`now`: seconds by the listener's clock."""
        before, _, moved = self._rows.get(told.rank, (None, now, now))
        if before is None or before.turn != told.turn:
            self._rows[told.rank] = told, now, moved if before and before.beat == told.beat else now

    def at(self, now: float) -> list[Standing]:
        """Where the ranks stand by now.

        A rank that is starved counts few seconds of its own: those since its last beat came here count as well.
        """
        return [
            replace(
                told,
                age=max(told.age + now - came, now - moved),
                silence=now - came,
                mute=now - came > self._mute,
            )
            for told, came, moved in list(self._rows.values())
        ]


def where(frame: FrameType | None) -> tuple[str, int]:
    """Where a thread is.

    Args:
        frame: its innermost; None where it has ended.

    Returns:
        The innermost line outside of torch and Python's library, as "folder/file.py:12, function", and FREE, BACKWARD
        or COLLECTIVE.
    """
    place, waits = "", FREE
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(f"{_TORCH}/distributed/"):
            waits = COLLECTIVE
        elif code.co_filename == f"{_TORCH}/autograd/graph.py":
            waits = max(waits, BACKWARD)
        if not place and not code.co_filename.startswith(_LIBRARY):
            place = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno}, {code.co_name}"
        frame = frame.f_back
    return place or "an unknown place", waits


def furthest_behind(standings: Sequence[Standing]) -> list[Standing]:
    """The rank that the others wait for; several, where nothing tells them apart.

    It is one that ended with an error, else one that does not answer, else the one with the fewest updates; among
    equals one that depends on no other rank, and then the one that came past the fewest stations of this update. The
    time of the last beat does not count: who stops late in a step has often beaten after those who wait for it.
    """
    running = [told for told in standings if told.ended != ""]
    keys = {told.rank: _order(told) for told in running}
    first = min(keys.values(), default=None)
    return [told for told in running if keys[told.rank] == first]


def _order(told: Standing) -> tuple:
    waits = COLLECTIVE if told.doing == WAITING else told.waits
    return (told.ended is None, not told.mute, told.step, waits, told.beats)


def accusation(suspects: Sequence[Standing]) -> str:
    """Who stopped, where, and for how long: half a line for people. One rank or more, of `furthest_behind`."""
    first, seconds = suspects[0], f"{min(told.age for told in suspects):.0f} s"
    if first.ended:
        return (
            f"{first.name} ended at step {first.step} with {first.ended}, {seconds} ago, and the others wait"
        )
    if first.mute:
        names = ", ".join(told.name for told in suspects[:4]) + (", ..." if len(suspects) > 4 else "")
        verb, process = ("has", "its process or machine is") if len(suspects) == 1 else ("have", "these are")
        return (
            f"{names} {verb} not answered for {seconds}: {process} stopped, or gone; "
            f"last seen at step {first.step}, {first.doing}"
        )
    if len(suspects) > 1:
        ranks = ", ".join(str(told.rank) for told in suspects[:8]) + (", ..." if len(suspects) > 8 else "")
        return (
            f"{len(suspects)} ranks ({ranks}) stopped responding at the same place, step {first.step}: {first.doing} "
            f"for {seconds}: a GPU or the network hangs; {first.name} is at {first.place}"
        )
    return (
        f"{first.name} stopped responding at step {first.step}: {first.doing} for {seconds}, at {first.place}"
    )


def silent_store(own: Standing, keeper: str, seconds: float) -> str:
    """That the ranks' store does not answer, and where this rank waits: half a line for people."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"{keeper} has not answered for {seconds:.0f} s (it keeps the ranks' store, {address}): its process or "
        f"machine is stopped, or gone; {own.name} waits at step {own.step}, {own.doing}, at {own.place}"
    )


def departure(gone: Standing) -> str:
    """That a rank was lost, and what is known of it: half a line for people."""
    last = f"which ended with {gone.ended}" if gone.ended else f"last seen at step {gone.step}, {gone.doing}"
    return f"lost {gone.name}, {last}"


def in_a_line(error: BaseException) -> str:
    """An error for the other ranks: its class and what it says."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
