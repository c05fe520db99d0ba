"""From a sample's id to bytes that may go to the decoder; what happens where they may not.

In training a bad sample is replaced by the next good one in source order, the first after the last. That is a
function of the files alone, so that a step's samples depend neither on when or by which rank a sample was found bad,
nor on resuming, nor on a quarantine list. In evaluation it is left out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastalign.data.bad_samples import BadSample, BadSamples
from fastalign.data.headers import inspect
from fastalign.data.source import Source, Unreadable
from fastalign.utils.errors import UserError

IN_A_ROW = 100
"""So many bad samples one after the other are no accident."""
_WAITS = (0.1, 0.4)
# Where the disk is gone, waiting for each of a hundred files would only delay the message.
_WAITED_FOR = 3


@dataclass
class Fetched:
    """What a sample of the epoch's order became."""

    wanted: int
    "id in the order"
    id: int
    "the sample's, or its replacement's"
    encoded: np.ndarray | None
    "[bytes] uint8; None: left out, or (without tolerance) refused"
    bad: list[BadSample] = field(default_factory=list)
    "met on the way, quarantined ones left aside"


class Fetcher:
    """Reads samples and checks their headers. Safe to use from several threads.

    Args:
        source: the data set.
        bad: what is known; None: an unreadable file is an error, and a refused header ends the search.
        replace: bad samples by the next good ones; else leave them out.
    """

    def __init__(self, source: Source, bad: BadSamples | None, *, replace: bool):
        self.source, self._bad, self._replace = source, bad, replace

    def fetch(self, wanted: int) -> Fetched:
        """A sample, or what stands for it.

        Args:
            wanted: id.

        Raises:
            UserError: 100 bad ones in a row, none that is good, or (without tolerance) an unreadable file.
        """
        if self._bad is None:
            data = self.source.read(wanted)
            claimed = inspect(data)
            if isinstance(claimed, str):
                return Fetched(wanted, wanted, None, [self._record(wanted, claimed)])
            return Fetched(wanted, wanted, data)
        made, total = Fetched(wanted, wanted, None), len(self.source)
        for step in range(total if self._replace else 1):
            made.id = (wanted + step) % total
            if made.id in self._bad.quarantined:
                continue
            found = self._bad.found.get(made.id) or self._judge(made.id, patient=len(made.bad) < _WAITED_FOR)
            if isinstance(found, np.ndarray):
                made.encoded = found
                return made
            made.bad.append(found)
            refuse_rows(made.bad)
        if self._replace:
            raise UserError(
                f"none of the {total} images can be used; is {self.source.root or 'the data'} there?"
            )
        return made

    def settle(self, made: Fetched, reason_of: Callable[[np.ndarray], str | None]) -> Fetched:
        """Looks at a sample with the decoder's own eyes, and at its replacements, until one is good.

        Args:
            made: by `fetch`.
            reason_of: why the decoder refuses bytes; None: it takes them.
        """
        while made.encoded is not None and (reason := reason_of(made.encoded)):
            if self._bad is None:
                return Fetched(made.wanted, made.id, None, [self._record(made.id, reason)])
            self._bad.add([self._record(made.id, reason)])
            made = self.fetch(made.wanted)
        return made

    def _record(self, index: int, reason: str) -> BadSample:
        return BadSample(index, self.source.portable_name(index), reason)

    def _judge(self, index: int, *, patient: bool) -> np.ndarray | BadSample:
        """The bytes of a sample, or why it is bad, which is remembered."""
        for wait in (*(_WAITS if patient else ()), None):
            try:
                data = self.source.read(index)
                found = inspect(data)
                break
            except UserError as error:
                found = error.reason if isinstance(error, Unreadable) else str(error)
                # A network's disk hiccups; a file that is empty or no file stays so.
                if wait is None or not isinstance(error.__cause__, OSError):
                    break
                time.sleep(wait)
        if not isinstance(found, str):
            return data
        self._bad.add([self._record(index, found)])
        return self._bad.found[index]


def refuse_rows(row: list[BadSample]) -> None:
    """Refuses what is no accident.

    Args:
        row: bad samples that lie one after the other.

    Raises:
        UserError: there are 100 of them.
    """
    if len(row) >= IN_A_ROW:
        raise UserError(
            f"{len(row)} images in a row cannot be used, the last one is {row[-1].name!r}: {row[-1].reason}; is the "
            "disk there, and is this a data set of images? python -m fastalign.scan lists what is bad"
        )
