"""A rank that stops responding ends the run, and is named.

Each rank notes where it is (`beat`). A thread tells the others once a second through the ranks' store, and a second
thread judges: where this rank has not moved for `timeout` seconds, the rank furthest behind is the one that all wait
for. The verdict is shared, so that every rank ends with the same line. The store may itself stop answering, which
blocks whoever asks it: that is why the thread that talks is not the thread that judges. Seconds are those that this
process was awake: a machine that stood still blames nobody for it when it goes on.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta

from torch import distributed

from fastalign.training.distributed import (
    LostConnection,
    World,
    agent_keeps_the_store,
    connection_lost,
    open_store,
)
from fastalign.training.preemption import Preempted
from fastalign.training.standing import (
    Standing,
    Table,
    accusation,
    departure,
    furthest_behind,
    in_a_line,
    silent_store,
    where,
)

BROKEN = 70
"""The exit code where another rank, or this one, stopped responding or is gone: the same command goes on."""
_SHORT, _LONG = 0.2, 1.0
_FOREVER = 1e8
_LOST = "a lost connection"


def patience(timeout: float) -> timedelta:
    """How long the process group waits for a rank: longer than the watchdog, and no less than gloo's own 30 minutes.

    Args:
        timeout: of the watchdog, seconds. For `distributed.start`.
    """
    return timedelta(seconds=max(30 * 60, 2 * min(timeout, _FOREVER) + 60))


class Watchdog:
    """Around a run; all ranks enter together, each in its main thread.

    Args:
        world: this process among the ranks.
        timeout: seconds without a beat after which the run is ended, with exit code 70 on every rank.
        step: where the run starts.
        saved: gives the step of the newest checkpoint that is on the disk, for the message; it must not wait.

    Left by a lost connection it raises `LostConnection`, which names the rank that is gone where that can be found
    out; every other exception passes, and the other ranks hear of it.
    """

    def __init__(
        self, world: World, timeout: float, step: int = 0, *, saved: Callable[[], int | None] = lambda: None
    ):
        self.world, self.timeout = world, timeout
        self._saved = saved
        # The rounds are longer with many ranks, because each reads what all others wrote.
        self._period = min(max(_LONG, world.size / 64), max(_SHORT, timeout / 10))
        self._mute = max(3 * self._period + 0.5, timeout / 2)  # seconds without a word: it does not answer
        self._quiet = 3 * self._period + 0.7  # the same, where a connection has broken already
        self._awake = 0.0, time.monotonic()  # seconds awake when it was last looked, and when that was
        self._main, self._host = threading.get_ident(), socket.gethostname()
        self._beat = (step, "starting", 0)
        self._seen = self._beat, self._clock()  # one tuple, because both threads replace it
        self._paused, self._ended = 0, None
        self._stop, self._fall_silent = threading.Event(), threading.Event()
        self._table = Table(self._mute)
        self._contact, self._proposal, self._verdict = self._clock(), "", ""
        self._speaks: bool | None = None  # whether this is the rank of its machine that says the verdict
        self._threads: list[threading.Thread] = []

    def beat(self, step: int, doing: str) -> None:
        """This rank has come to a station. Costs as much as storing a tuple.

        Args:
            step: updates done; the same on every rank at the same place.
            doing: what it does next, such as "waiting for data"; `WAITING` before what returns when all have come.
        """
        before = self._beat
        self._beat = (step, doing, before[2] + 1 if before[0] == step else 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take longer than `timeout`: while the rank furthest behind is in it, nobody is accused."""
        self._paused += 1
        try:
            yield
        finally:
            self.beat(*self._beat[:2])
            self._paused -= 1

    def __enter__(self) -> "Watchdog":
        tasks = [self._judge]
        if self.world.size > 1:
            tasks.append(self._talk)
            # A store that torchrun keeps over restarts still holds what earlier ranks said: a word of our own.
            word = self.world.share(str(time.time_ns()))
            self._store = open_store(patience(self.timeout))
            self._store.set_timeout(timedelta(seconds=min(self.timeout, _FOREVER) + 1))
            self._keys = [f"fastalign/{word}/{rank}" for rank in range(self.world.size)]
            self._verdict_key = f"fastalign/{word}/verdict"
            self._tell(0)
            if self.world.main:
                self._store.set(self._verdict_key, "")
            self.world.barrier()  # from here on no request waits for a key
        self._contact = self._clock()
        for task in tasks:
            thread = threading.Thread(target=task, name=f"fastalign-watchdog{task.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        lost = self.world.size > 1 and error is not None and connection_lost(error)
        gone = self._find_gone() if lost else None
        normal = error is None or isinstance(error, Preempted)
        self._ended = "" if normal else _LOST if lost else in_a_line(error)
        self._stop.set()
        self._threads[0].join()  # the judge, who waits for nobody, or ends the process
        if self._verdict:
            self._end(self._verdict)
        self._fall_silent.set()
        for thread in self._threads[1:]:
            thread.join(2 * self._period + 2)  # a store that does not answer holds it: leave it there
        if lost:
            raise LostConnection(self._loss(error, gone)) from error

    def _clock(self) -> float:
        """Seconds that this process was awake; the judge looks every period, and is half a second late at most."""
        awake, looked = self._awake
        return awake + min(time.monotonic() - looked, self._period + 0.5)

    def _own(self, turn: int) -> Standing:
        """Where this rank is; both threads ask."""
        beat, now = self._beat, self._clock()
        if beat is not self._seen[0] or self._paused:
            self._seen = beat, now
        age = now - self._seen[1]
        place, waits = "", 0
        # Who looks into a frame that is still running keeps its variables alive.
        if age > min(5, self.timeout / 2):
            place, waits = where(sys._current_frames().get(self._main))
        return Standing(
            rank=self.world.rank,
            host=self._host,
            pid=os.getpid(),
            turn=turn,
            step=beat[0],
            doing=beat[1],
            beats=beat[2],
            age=age,
            place=place,
            waits=waits,
            paused=bool(self._paused),
            ended=self._ended,
            saved=self._saved(),
            heard=self._speaks is not None,
        )

    def _tell(self, turn: int) -> None:
        self._store.set(self._keys[self.world.rank], json.dumps(asdict(self._own(turn))))

    def _talk(self) -> None:
        """A thread: tell the others where this rank is and hear them, until the end, and then tell that."""
        turn = 0
        while not self._fall_silent.wait(self._period):
            turn += 1
            try:
                self._exchange(turn)
            except distributed.DistStoreError:
                continue  # too late; the judge sees how long nothing has come
            except distributed.DistNetworkError:
                return  # the connection does not come back
        with suppress(distributed.DistError):
            self._tell(turn + 1)

    def _exchange(self, turn: int) -> None:
        self._tell(turn)
        if self._proposal:
            self._store.compare_set(self._verdict_key, "", self._proposal)
        *told, verdict = self._store.multi_get([*self._keys, self._verdict_key])
        now = self._clock()
        for text in told:
            self._table.hear(Standing(**json.loads(text)), now)
        again = bool(self._verdict)
        self._contact, self._verdict = now, verdict.decode()
        # The first process of a machine claims a round before the others: torchrun may show its lines only.
        if self._verdict and self._speaks is None and (again or os.environ.get("LOCAL_RANK", "0") == "0"):
            self._speaks = self._store.add(f"{self._verdict_key}/{self._host}", 1) == 1

    def _judge(self) -> None:
        """A thread: end the process when there is a verdict, of this rank or of another."""
        while not self._stop.wait(self._period):
            self._awake = self._clock(), time.monotonic()
            line = self._verdict or self._accuse()
            if not line:
                continue
            self._proposal = line
            until = time.monotonic() + 3 * self._period
            while self.world.size > 1 and not self._verdict and time.monotonic() < until:
                time.sleep(self._period / 4)
            if not self._stop.is_set():
                self._end(self._verdict or line)

    def _accuse(self) -> str:
        """The line that ends the run, or nothing."""
        own, silence = self._own(-1), self._clock() - self._contact
        if own.age <= self.timeout or own.paused:
            return ""
        if self.world.size > 1 and silence > self._mute:
            keeper = "torchrun on the first machine" if agent_keeps_the_store() else "rank 0"
            return f"{silent_store(own, keeper, silence)}; {self._remedy()}"
        suspects = furthest_behind([told for told in self._now() if told.rank != own.rank] + [own])
        if min(told.age for told in suspects) <= self.timeout or any(told.paused for told in suspects):
            return ""
        return f"{accusation(suspects)}; {self._remedy()}"

    def _now(self) -> list[Standing]:
        return self._table.at(self._clock())

    def _remedy(self) -> str:
        return (
            f"the run ends after faults.timeout={self.timeout:g} s; {self._go_on()}, "
            "with a larger faults.timeout if it was only slow"
        )

    def _go_on(self) -> str:
        known = [self._saved(), *(told.saved for told in self._now())]
        step = max((step for step in known if step is not None), default=None)
        return "the same command goes on" + ("" if step is None else f" from the checkpoint of step {step}")

    def _end(self, line: str) -> None:
        """Say it once a machine, leave the others the time to read the verdict, and end the process from here.

        The main thread may never return, and what it holds is not to be waited for.
        """
        # Nothing here is waited for without end: writing may hang, too.
        last = threading.Timer(5 + 3 * self._period + 2 * self._quiet, os._exit, [BROKEN])
        last.daemon = True
        last.start()
        self._wait(lambda: not self._verdict or self._speaks is not None)
        if self._speaks is not False:
            print(f"fastalign: {line}", file=sys.stderr, flush=True)
        time.sleep(3 * self._period)
        self._wait(lambda: all(told.heard or told.mute or told.ended is not None for told in self._now()))
        os._exit(BROKEN)

    def _wait(self, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + self._quiet
        while not ready() and time.monotonic() < until:
            time.sleep(self._period / 4)

    def _find_gone(self) -> Standing | None:
        """After a lost connection: the rank that no longer tells anything, or ended first. Takes some rounds."""
        until = self._clock() + 2 * self._quiet
        while (now := self._clock()) < until:
            if now - self._contact > self._quiet:
                kept = not agent_keeps_the_store() and not self.world.main
                return next((told for told in self._now() if kept and told.rank == 0), None)
            gone = [
                told
                for told in self._now()
                if told.rank != self.world.rank
                and (told.silence > self._quiet if told.ended is None else told.ended not in ("", _LOST))
            ]
            if gone:
                return max(gone, key=lambda told: told.silence)
            time.sleep(self._period / 4)
        return None

    def _loss(self, error: BaseException, gone: Standing | None) -> str:
        """The line about a lost connection; empty where an earlier rank of this machine says it."""
        if gone and any(
            told.rank < self.world.rank and told.host == self._host and told.silence <= self._quiet
            for told in self._now()
            if told.rank != gone.rank
        ):
            return ""
        reason = departure(gone) if gone else f"lost the connection to another rank ({in_a_line(error)})"
        step, doing, _ = self._beat
        return f"rank {self.world.rank}, at step {step}, {doing}: {reason}; {self._go_on()}"
