"""Bad samples: what is known of them, their list on disk, and how many are too many.

A list has one JSON object a line: `id` (null for a tar shard or a folder), `name` (portable, without the place of the
data set) and `reason`. A run's `bad_samples.jsonl` and the quarantine list of `fastalign.scan` are of this form.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastalign.data.source import Source
from fastalign.utils.errors import UserError

ALWAYS_ALLOWED = 10
"""So many bad samples never stop a run (unless the limit is 0): a share of a few images says nothing."""


FILE = "bad_samples.jsonl"
"""What a run finds, in its folder."""


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used."""

    id: int | None
    "index in the source; None for what `Source.damaged` names"
    name: str
    "portable; bytes that are not UTF-8 as surrogates, as Python spells file names"
    reason: str
    "a few words"


class BadSamples:
    """The samples of one source that are known to be bad; all threads of a loader may use it.

    Args:
        quarantined: ids that were known before the run: passed over, never reported again.
        found: what was found since: passed over and reported by each batch that meets them.
    """

    def __init__(self, quarantined: Iterable[int] = (), found: Iterable[BadSample] = ()):
        self.quarantined = frozenset(quarantined)
        self.found: dict[int, BadSample] = {}
        self.add(found)

    def add(self, samples: Iterable[BadSample]) -> None:
        """Remembers samples, such as another rank's; the first reason stays."""
        for sample in samples:
            if sample.id is not None and sample.id not in self.quarantined:
                self.found.setdefault(sample.id, sample)  # one step for the interpreter: no lock is needed


def too_many(bad: int, drawn: int, share: float) -> bool:
    """Whether a run must stop: more than 10 bad samples, and more than `share` of the images drawn so far.

    Args:
        bad: different bad samples found in training, without quarantined ones, tar shards and folders.
        drawn: images drawn by all ranks since the first step.
        share: `faults.bad_samples`, 0..1; 0 stops at the first.
    """
    return bad > ALWAYS_ALLOWED * (share > 0) and bad > share * drawn


def to_line(sample: BadSample) -> bytes:
    """The line of a list, ASCII: odd bytes in a name are escaped, and survive."""
    return json.dumps(asdict(sample)).encode() + b"\n"


def _parse(line: bytes) -> BadSample | None:
    try:
        row = json.loads(line)
        sample = BadSample(row["id"], row["name"], str(row.get("reason", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    right = sample.id is None or (type(sample.id) is int and sample.id >= 0)
    return sample if right and isinstance(sample.name, str) else None


def read_list(path: Path) -> list[BadSample]:
    """The samples of a list. A last line that a kill tore is passed over.

    Args:
        path: of the list.

    Raises:
        UserError: it cannot be read, or another line is not one of such a list.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    samples = []
    for number, line in enumerate(lines, 1):
        sample = _parse(line) if line.strip() else None
        if sample is not None:
            samples.append(sample)
        elif line.strip() and number < len(lines):
            raise UserError(
                f'{path} line {number} is not {{"id": ..., "name": ..., "reason": ...}}; remove that line'
            )
    return samples


def append_to_list(path: Path, samples: Iterable[BadSample]) -> None:
    """Adds samples to the end of a list, flushed to the disk; a line that a kill tore is removed first.

    Args:
        path: of the list; made where it is missing.
        samples: to add; the caller sees to it that each comes once.
    """
    text = b"".join(to_line(sample) for sample in samples)
    if not text:
        return
    with path.open("a+b") as file:
        file.seek(0)
        old = file.read()
        if old and not old.endswith(b"\n"):
            begin = old.rfind(b"\n") + 1
            if _parse(old[begin:]) is None:
                file.truncate(begin)
            else:
                text = b"\n" + text
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def match(samples: Iterable[BadSample], source: Source) -> dict[int, BadSample]:
    """A list's samples by their ids in a source, whose ids may have shifted since: the name counts.

    Args:
        samples: of a list; tar shards and folders are left out.
        source: the data set.

    Returns:
        id -> sample, for those that are still there.
    """
    found, elsewhere = {}, {}
    for sample in samples:
        if sample.id is None:
            continue
        if sample.id < len(source) and source.portable_name(sample.id) == sample.name:
            found[sample.id] = sample
        else:
            elsewhere[sample.name] = sample
    if elsewhere:
        for index in range(len(source)):
            sample = elsewhere.get(source.portable_name(index))
            if sample is not None:
                found[index] = BadSample(index, sample.name, sample.reason)
    return found


def read_quarantine(path: str | Path, source: Source) -> set[int]:
    """The ids in a source that a quarantine list names.

    Args:
        path: the list, as `fastalign.scan` writes it.
        source: the data set that it is of.

    Returns:
        Ids; names that are gone from the data set are passed over.

    Raises:
        UserError: no such list, not one, or one of another data set: none of its names is there.
    """
    samples = [sample for sample in read_list(Path(path)) if sample.id is not None]
    found = match(samples, source)
    if samples and not found:
        raise UserError(
            f"faults.quarantine={path}: none of its {len(samples)} names, such as {samples[0].name!r}, is in the "
            "data set: make the list with python -m fastalign.scan, or leave the key out"
        )
    return set(found)
