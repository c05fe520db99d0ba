"""Bad samples: reading and replacing them, their list on disk, and how many are too many.

In training the next good sample in source order replaces a bad one. That depends on the files alone: not on ranks,
resuming, a quarantine list, or when a sample was found to be bad. Evaluation leaves bad samples out.

A list has one JSON object per line: `id` (null for a tar shard), `name` (portable) and `reason`.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fastalign.data.headers import read_size
from fastalign.data.sources import Source, Unreadable
from fastalign.utils.errors import UserError

FILE = "bad_samples.jsonl"
ALWAYS_ALLOWED = 10
MAX_IN_A_ROW = 100
_RETRY_AFTER = (0.1, 0.4)


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, by index (None for an entry of `Source.damaged`) and portable name."""

    id: int | None
    name: str
    reason: str


class BadSamples:
    """The known bad samples of one source; thread-safe.

    `quarantined` ids are skipped silently; `found` samples are skipped and reported by each batch that meets them.
    """

    def __init__(self, quarantined: Iterable[int] = ()):
        self.quarantined = frozenset(quarantined)
        self.found: dict[int, BadSample] = {}

    def add(self, samples: Iterable[BadSample]) -> None:
        """Adds samples, such as another rank's; the first reason stays."""
        for sample in samples:
            if sample.id is not None and sample.id not in self.quarantined:
                self.found.setdefault(sample.id, sample)


@dataclass
class Sample:
    """The sample that is used in place of `wanted`: [bytes] uint8, None if it is left out, and (height, width).

    `bad`: samples met while looking for it, without quarantined ones.
    """

    wanted: int
    id: int
    encoded: np.ndarray | None = None
    size: tuple[int, int] | None = None
    bad: list[BadSample] = field(default_factory=list)


class SampleReader:
    """Reads samples and checks their headers; adds to `bad`. `replace`: do not leave bad ones out. Thread-safe."""

    def __init__(self, source: Source, bad: BadSamples, *, replace: bool):
        self.source, self._bad, self._replace = source, bad, replace

    def read(self, wanted: int) -> Sample:
        """A sample or its replacement; raises a UserError if 100 in a row are bad, or all."""
        sample, total = Sample(wanted, wanted), len(self.source)
        for step in range(total if self._replace else 1):
            sample.id = (wanted + step) % total
            if sample.id in self._bad.quarantined:
                continue
            bad = self._bad.found.get(sample.id) or self._load(sample)
            if bad is None:
                return sample
            sample.bad.append(bad)
            check_in_a_row(sample.bad)
        if self._replace:
            raise UserError(
                f"none of the {total} images can be used; is {self.source.root or 'the data'} available?"
            )
        return sample

    def _load(self, sample: Sample) -> BadSample | None:
        """Reads the bytes of a sample, or returns why it is bad."""
        for wait in (*_RETRY_AFTER, None):
            try:
                encoded = self.source.read(sample.id)
            except Unreadable as error:
                # A network disk may fail for a moment; an empty file stays empty.
                if wait is None or not isinstance(error.__cause__, OSError):
                    return self._record(sample.id, error.reason)
                time.sleep(wait)
            else:
                break
        size = read_size(encoded)
        if isinstance(size, str):
            return self._record(sample.id, size)
        sample.encoded, sample.size = encoded, size
        return None

    def _record(self, index: int, reason: str) -> BadSample:
        self._bad.add([BadSample(index, self.source.portable_name(index), reason)])
        return self._bad.found[index]

    def replace_undecodable(self, sample: Sample, error_of: Callable[[np.ndarray], str | None]) -> Sample:
        """The sample, or its replacement if the decoder fails on it; `error_of` says why it does."""
        while sample.encoded is not None and (reason := error_of(sample.encoded)):
            self._record(sample.id, reason)
            sample = self.read(sample.wanted)
        return sample


def check_in_a_row(bad: list[BadSample]) -> None:
    """Raises a UserError if 100 bad samples follow one another."""
    if len(bad) >= MAX_IN_A_ROW:
        raise UserError(
            f"{len(bad)} images in a row cannot be used, the last one is {bad[-1].name!r}: {bad[-1].reason}; is the "
            "disk available, and is this a data set of images? fastalign scan lists what is bad"
        )


def too_many(bad: int, drawn: int, share: float) -> bool:
    """Whether a run must stop: more than 10 bad samples, and more than `share` of the images drawn so far.

    Quarantined samples and tar shards do not count; share 0 stops at the first.
    """
    return bad > ALWAYS_ALLOWED * (share > 0) and bad > share * drawn


def to_line(sample: BadSample) -> bytes:
    """The line of a list, in ASCII."""
    return json.dumps(asdict(sample)).encode() + b"\n"


def _parse(line: bytes) -> BadSample | None:
    try:
        row = json.loads(line)
        sample = BadSample(row["id"], row["name"], str(row.get("reason", "")))
    except (ValueError, KeyError, TypeError):
        return None
    valid = sample.id is None or (type(sample.id) is int and sample.id >= 0)
    return sample if valid and isinstance(sample.name, str) else None


def read_list(path: Path) -> list[BadSample]:
    """The samples of a list. An incomplete last line, from a process that was killed, is skipped."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    samples = [_parse(line) for line in lines]
    for number, (line, sample) in enumerate(zip(lines[:-1], samples, strict=False), 1):
        if sample is None and line.strip():
            raise UserError(
                f'{path} line {number} is not {{"id": ..., "name": ..., "reason": ...}}; remove that line'
            )
    return [sample for sample in samples if sample is not None]


def append_to_list(path: Path, samples: Iterable[BadSample]) -> None:
    """Appends samples to a list and flushes it to the disk; an incomplete last line is removed first."""
    if not (text := b"".join(to_line(sample) for sample in samples)):
        return
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_quarantine(path: str | Path, source: Source) -> set[int]:
    """The ids of a source that a quarantine list names. Names count, because ids may have shifted."""
    samples = [sample for sample in read_list(Path(path)) if sample.id is not None]
    ids = {s.id for s in samples if s.id < len(source) and source.portable_name(s.id) == s.name}
    moved = {sample.name for sample in samples if sample.id not in ids}
    if moved:
        ids |= {index for index in range(len(source)) if source.portable_name(index) in moved}
    if samples and not ids:
        raise UserError(
            f"faults.quarantine={path}: none of its {len(samples)} names, such as {samples[0].name!r}, is in the "
            "data set: make the list with fastalign scan, or leave the key out"
        )
    return ids
