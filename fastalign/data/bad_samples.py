"""Bad samples: those that are known, their list on disk, and how many are too many.

In training the next good sample in source order replaces a bad one. That depends on the files alone: not on ranks,
resuming, a quarantine list, or when a sample was found to be bad. Evaluation leaves bad samples out.

A list has one JSON object per line: `id` (null for a tar shard), `name` and `reason`.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastalign.data.sources import Source
from fastalign.utils.errors import UserError

FILE = "bad_samples.jsonl"
ALWAYS_ALLOWED = 10
MAX_IN_A_ROW = 100


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, by index (None for an entry of `Source.damaged`) and name."""

    id: int | None
    name: str
    reason: str = ""


class BadSamples:
    """The known bad samples of one source: `quarantined` ids are skipped, `found` ones also reported. Thread-safe."""

    def __init__(self, quarantined: Iterable[int] = ()):
        self.quarantined = frozenset(quarantined)
        self.found: dict[int, BadSample] = {}

    def add(self, samples: Iterable[BadSample]) -> None:
        """Adds samples, such as another rank's; the first reason stays."""
        for sample in samples:
            self.found.setdefault(sample.id, sample)


def check_in_a_row(bad: list[BadSample]) -> None:
    """Raises a UserError if 100 bad samples follow one another."""
    if len(bad) >= MAX_IN_A_ROW:
        raise UserError(
            f"{len(bad)} images in a row cannot be used, the last one is {bad[-1].name!r}: {bad[-1].reason}; is the "
            "disk available, and is this a data set of images? fastalign scan lists what is bad"
        )


def too_many(bad: int, drawn: int, share: float) -> bool:
    """Whether a run must stop: more than 10 bad samples and `share` of the drawn images; with 0 at the first."""
    return bad > ALWAYS_ALLOWED * (share > 0) and bad > share * drawn


def to_line(sample: BadSample) -> bytes:
    """The line of a list, in ASCII."""
    return json.dumps(asdict(sample)).encode() + b"\n"


def read_list(path: Path) -> list[BadSample]:
    """The samples of a list. An incomplete last line, from a process that was killed, is skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            sample = BadSample(**json.loads(line or b"{}"))
            if not isinstance(sample.name, str):
                raise TypeError(sample.name)
        except (ValueError, TypeError) as error:
            if line.strip() and number < len(lines):
                wanted = '{"id": ..., "name": ..., "reason": ...}'
                raise UserError(f"{path} line {number} is not {wanted}; remove that line") from error
        else:
            samples.append(sample)
    return samples


def append_to_list(path: Path, samples: Iterable[BadSample]) -> None:
    """Appends samples to a list and flushes it to the disk; an incomplete last line is removed first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.writelines(map(to_line, samples))
        file.flush()
        os.fsync(file.fileno())


def read_quarantine(path: str | Path, source: Source) -> set[int]:
    """The ids of the samples of a source that a quarantine list names; ids may have shifted since."""
    names = {sample.name for sample in read_list(Path(path)) if sample.id is not None}
    ids = {index for index in range(len(source)) if source.name(index) in names} if names else set()
    if names and not ids:
        raise UserError(
            f"faults.quarantine={path}: none of its {len(names)} names, such as {min(names)!r}, is in the "
            "data set: make the list with fastalign scan, or leave the key out"
        )
    return ids
