"""Sources of images: folders, tar shards, synthetic images; `open_source` opens what a specification names.

A source is a list: a sample's id is its index in the source's sorted order, which is the same in every process.
"""

import csv
import io
import os
import re
import stat
import zlib
from contextlib import nullcontext
from functools import lru_cache
from glob import glob
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.data.index import IMAGE_EXTENSIONS, Names, classes_of, is_image, read_index
from fastalign.utils.errors import UserError
from fastalign.utils.files import user_path
from fastalign.utils.random import Stream, random_uniform

MAX_IMAGE_BYTES = 256 * 1024 * 1024
_OPEN_SHARDS = 256


class Unreadable(UserError):
    """A sample's bytes cannot be read. `reason` says why, without the path of the data set."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"cannot read {name}: {reason}; repair, replace or remove it")
        self.reason = reason


class Source:
    """A list of encoded images below the folder `root`.

    Subclasses define `read(index)`: [bytes] uint8, thread-safe, raises `Unreadable`. Those with labels define
    `class_names()`: each sample's class as the data set writes it, or None. `damaged`: (name, reason) of tar shards.
    """

    damaged: tuple[tuple[str, str], ...] = ()

    def __init__(self, root: str | None, names: Names, place: str = ""):
        if len(names) == 0:
            raise UserError(f"no images in {place or root}; looked for {' '.join(IMAGE_EXTENSIONS)}")
        self.root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """A sample's name, without the location of the data set."""
        return self._names[index]

    def location(self, index: int) -> str:
        """A sample's path, for messages."""
        return f"{self.root}/{self.name(index)}" if self.root else self.name(index)

    def crc_of_names(self) -> int:
        """CRC-32 of all names."""
        return self._names.crc()

    def identity(self) -> list[int]:
        """CRC-32 of all names, then of the bytes of nine samples, for checkpoints; 0 = unreadable."""
        found = [self.crc_of_names()]
        for index in sorted({i * (len(self) - 1) // 8 for i in range(9)}):
            try:
                found.append(zlib.crc32(self.read(index)))
            except Unreadable:
                found.append(0)
        return found


def differ(before: list[int], now: list[int]) -> bool:
    """Whether two `identity` lists describe different data. Up to half of the samples may be repaired bad images."""
    same = sum(old == new for old, new in zip(before[1:], now[1:], strict=False))
    return before[0] != now[0] or 2 * same < len(now) - 1


class Subset(Source):
    """The samples `indices` [n >= 1] of another source."""

    def __init__(self, whole: Source, indices: np.ndarray):
        self.whole, self.indices = whole, np.asarray(indices, dtype=np.int64)
        self.root = whole.root

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def read(self, index: int) -> np.ndarray:
        return self.whole.read(int(self.indices[index]))


class SyntheticSource(Source):
    """Random images made on the device, without disk and decoder, for benchmarks and tests."""

    def __init__(self, length: int):
        if length < 1:
            raise UserError(f"synthetic:{length}: the number of samples must be at least 1")
        self.root, self._length = None, length

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return f"synthetic:{index}"

    def crc_of_names(self) -> int:
        return self._length

    def identity(self) -> list[int]:
        return [self._length]

    def images(self, ids: Tensor, size: tuple[int, int], *, seed: int, dtype: torch.dtype) -> Tensor:
        """Normalized images [B, 3, h, w], a function of (seed, id): mean 0, variance 1, values in -3..3.

        Each channel is the outer product of a random column and a random row. The result is on the device of `ids`.
        """
        height, width = size
        draws = random_uniform(ids, 3 * (height + width), seed=seed, stream=Stream.SYNTHETIC).float()
        waves = ((2 * draws - 1) * 3**0.5).view(len(ids), 3, height + width)
        return (waves[..., :height, None] * waves[..., None, height:]).to(dtype)


def _open(path: str) -> io.FileIO:
    # O_NONBLOCK: opening a pipe would wait for a writer.
    return open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))


def _read(path: str, name: str, offset: int = 0, size: int | None = None, open_file=_open) -> np.ndarray:
    """Bytes of a file, to its end if `size` is None; raises Unreadable with `name`."""
    try:
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(name, "not a regular file")
            size = status.st_size if size is None else size
            if not 0 < size <= MAX_IMAGE_BYTES:
                raise Unreadable(name, f"{size} bytes, more than {MAX_IMAGE_BYTES}" if size else "zero bytes")
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise Unreadable(name, error.strerror) from error
    if len(data) != size:
        raise Unreadable(name, f"it became shorter while in use ({len(data)} of {size} bytes)")
    return np.frombuffer(data, dtype=np.uint8)


class FolderSource(Source):
    """Every image below the folder `root`.

    Classes: `labels.csv` in the folder with the header `name,label` (an integer), else the first-level sub-folders.
    """

    def __init__(self, root: str):
        path = Path(root)
        if not path.is_dir():
            raise UserError(f"no such folder: {root}; check the path of the data set")
        root = str(path.resolve())
        super().__init__(root, Names(read_index(root)))

    def read(self, index: int) -> np.ndarray:
        return _read(self.location(index), self.location(index))

    def class_names(self) -> list[str | None]:
        table = Path(self.root) / "labels.csv"
        if table.is_file():
            labels = _read_labels(table)
            return [labels.get(name) for name in self._names]
        return [name.split("/", 1)[0] if "/" in name else None for name in self._names]


def _read_labels(path: Path) -> dict[str, str]:
    """The labels of a `labels.csv`, by image name."""
    labels: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            reader = csv.reader(file)
            if next(reader, None) != ["name", "label"]:
                raise UserError(f"{path}: the first line must be `name,label`")
            for name, *rest in filter(None, reader):
                where, label = f"{path} line {reader.line_num}: {name}", ",".join(rest)
                if not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", label):
                    raise UserError(f"{where} has the label {label!r:.40}; write an integer")
                if (other := labels.setdefault(name, str(int(label)))) != str(int(label)):
                    raise UserError(f"{where} has two labels, {other} and {label}; remove one")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return labels


class TarSource(Source):
    """The image members of the plain tar files `shards` (WebDataset layout), read in place.

    `allow_damaged`: use the images before the damage of a shard and list it in `damaged`, instead of raising.
    """

    def __init__(self, shards: list[str], *, allow_damaged: bool = False):
        self.shards = shards
        index = read_index(shards)
        self._shard, self._start, self._size = index["shard"], index["start"], index["size"]
        # Relative to their common folder: many data sets have a 00000.tar.
        root = os.path.commonpath([os.path.dirname(shard) for shard in shards])  # noqa: PTH120
        self._portable = [os.path.relpath(shard, root) for shard in shards]
        damages = zip(self._portable, Names(index, "damage_"), strict=True)
        self.damaged = tuple((shard, damage) for shard, damage in damages if damage)
        if self.damaged and not (allow_damaged and len(index["shard"])):
            shard, damage = self.damaged[0]
            place = f"{root}/{shard}: {damage}"
            raise UserError(f"broken tar shard {place}; download it again (only uncompressed .tar)")
        # Opening a file is slow on network disks. A file that the cache drops closes when its last reader is done.
        self._open = lru_cache(_OPEN_SHARDS)(_open)
        super().__init__(root, Names(index), ", ".join(shards[:3]))

    def name(self, index: int) -> str:
        return f"{self._portable[self._shard[index]]}:{self._names[index]}"

    def crc_of_names(self) -> int:
        shards = "\0".join(self._portable).encode("utf-8", "surrogateescape")
        return self._names.crc(zlib.crc32(self._shard, zlib.crc32(shards)))

    def class_names(self) -> list[str | None]:
        return classes_of(self._names, self._shard, self.shards)

    def read(self, index: int) -> np.ndarray:
        shard, start, size = self.shards[self._shard[index]], int(self._start[index]), int(self._size[index])
        return _read(shard, self.location(index), start, size, lambda path: nullcontext(self._open(path)))


def _expand_braces(pattern: str) -> list[str]:
    """`{000..009}` and `{a,b}` as a shell expands them, with zero padding."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    words, before, after = found[1].split(","), pattern[: found.start()], pattern[found.end() :]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        words = [f"{number:0{len(span[1])}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    return [text for word in words for text in _expand_braces(f"{before}{word}{after}")]


def _find_shards(spec: str) -> list[str]:
    """The tar files of a path, folder or pattern ({000..009}, {a,b}, *, **, ?); [] if it may be an image folder."""
    path, found = Path(spec), []
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        found = [entry for entry in entries if entry.suffix.lower() == ".tar" and not entry.is_dir()]
        others = [entry.name for entry in entries if is_image(os.fsencode(entry.name)) or entry.is_dir()]
        if found and others:
            both = f"tar files ({found[0].name}) and others ({others[0]})"
            raise UserError(f"{spec} has {both}; for the tars write {spec}/*.tar")
    elif path.is_file():
        found = [path]
        if path.suffix.lower() != ".tar":
            raise UserError(f"{spec} is a file; name a folder of images, a .tar file or `synthetic`")
    elif spec.lower().endswith(".tar") or any(c in spec for c in "*?[{"):
        patterns = _expand_braces(spec) or [spec]
        found = [name for pattern in patterns for name in glob(pattern, recursive=True) or [pattern]]  # noqa: PTH207
    if missing := next((each for each in found if not Path(each).is_file()), None):
        raise UserError(f"no such tar file: {missing}; check the pattern, a range is written {{000..009}}")
    return sorted({str(Path(each).absolute()) for each in found})


def open_source(spec: str, *, allow_damaged: bool = False) -> Source:
    """Opens `synthetic` or `synthetic:N`; a .tar file, a folder or a pattern of them; else a folder of images.

    `allow_damaged`: use the images before the damage of a tar shard, instead of raising.
    """
    if synthetic := re.fullmatch(r"synthetic(?::(\d+))?", spec):
        return SyntheticSource(int(synthetic[1] or 50_000))
    if not spec:
        raise UserError("no data set given; name a folder of images, a .tar pattern or `synthetic`")
    spec = user_path(spec)
    shards = _find_shards(spec)
    return TarSource(shards, allow_damaged=allow_damaged) if shards else FolderSource(spec)
