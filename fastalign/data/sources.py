"""Images on disk: folders and tar shards; `open_source` opens what a specification names."""

import csv
import functools
import hashlib
import io
import os
import re
import stat
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from fastalign.data.index import DANGLING, IMAGE_EXTENSIONS, MISSING, Names, index_folder, is_image
from fastalign.data.source import SYNTHETIC_LENGTH, Source, SyntheticSource, Unreadable, crc_of_texts
from fastalign.data.tars import class_of, expand_shards, index_tars, is_tar, read_classes
from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path

MAX_IMAGE_BYTES = 256 * 1024 * 1024
_OPEN_SHARDS = 256
_EXTENSIONS = " ".join(IMAGE_EXTENSIONS)


def _open(path: str) -> io.FileIO:
    # O_NONBLOCK: opening a pipe would wait for a writer.
    return open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))


def _read(
    path: str,
    name: str,
    offset: int = 0,
    size: int | None = None,
    open_file: Callable[[str], AbstractContextManager[io.FileIO]] = _open,
) -> np.ndarray:
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
        if len(data) != size:
            raise Unreadable(name, f"it became shorter while in use ({len(data)} of {size} bytes)")
        return np.frombuffer(data, dtype=np.uint8)
    except IsADirectoryError:
        raise Unreadable(name, "not a regular file") from None
    except OSError as error:
        if error.errno in MISSING and os.path.islink(path):  # noqa: PTH114
            raise Unreadable(name, DANGLING) from None  # without a cause it is not tried again
        raise Unreadable(name, error.strerror) from error


class FolderSource(Source):
    """Every image below the folder `root`.

    Classes: `labels.csv` in the folder with the header `name,label` (name relative to it, label an integer), else the
    first-level sub-folders. `damaged`: list dangling links to folders in `damaged`, instead of raising.
    """

    def __init__(self, root: str, *, damaged: bool = False):
        path = Path(root)
        if not path.is_dir():
            raise UserError(f"no such folder: {root}; check the path of the data set")
        self.root = str(path.resolve())
        self._names, missing = index_folder(self.root)
        self.damaged = tuple((name, DANGLING) for name in missing)
        if self.damaged and not damaged:
            raise UserError(f"{path / missing[0]} is {DANGLING}; mount its target or remove it")
        if len(self._names) == 0:
            raise UserError(f"no images in {root}; looked for {_EXTENSIONS} in all sub-folders")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> np.ndarray:
        path = f"{self.root}/{self._names[index]}"
        return _read(path, path)

    def _crc_of_names(self) -> int:
        return self._names.crc()

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
            reader = csv.DictReader(file)
            if reader.fieldnames != ["name", "label"]:
                raise UserError(f"{path}: the first line must be `name,label`")
            for row in reader:
                where, label = f"{path} line {reader.line_num}: {row['name']}", row["label"] or ""
                if not re.fullmatch(r"\s*[+-]?\d+\s*", label):
                    raise UserError(f"{where} has the label {label!r}; write an integer")
                label = str(int(label))
                if (other := labels.setdefault(row["name"], label)) != label:
                    raise UserError(f"{where} has two labels, {other} and {label}; remove one")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return labels


class TarSource(Source):
    """The image members of plain tar files (WebDataset layout), read in place.

    Classes: the `.cls` member with the image's stem, else with its WebDataset key, in the same shard. `shards`: paths
    of the .tar files, else those that `spec` names (see `expand_shards`). `damaged`: use the images before the damage
    of a shard and list it in `damaged`, instead of raising.
    """

    def __init__(self, spec: str, shards: list[str] | None = None, *, damaged: bool = False):
        self.shards = expand_shards(spec) if shards is None else shards
        # Hashed, because the header of a cache file holds the key.
        key = hashlib.sha256(os.fsencode("\n".join(self.shards))).hexdigest()
        arrays = index_tars(key, self.shards)
        self._names = Names.of(arrays)
        self._shard, self._start, self._size = arrays["shard"], arrays["start"], arrays["size"]
        # Relative to their common folder: many data sets have a 00000.tar.
        common = os.path.commonpath([os.path.dirname(shard) for shard in self.shards])  # noqa: PTH120
        self._portable = [os.path.relpath(shard, common) for shard in self.shards]
        damage = Names(arrays["damage"], arrays["damage_offsets"])
        broken = [number for number in range(len(self.shards)) if damage[number]]
        self.damaged = tuple((self._portable[number], damage[number]) for number in broken)
        if broken and not (damaged and len(self._names)):
            place = f"{self.shards[broken[0]]}: {damage[broken[0]]}"
            raise UserError(f"broken tar shard {place}; fetch it again (plain .tar only, not compressed)")
        if len(self._names) == 0:
            raise UserError(f"no images in the {len(self.shards)} shards of {spec}; looked for {_EXTENSIONS}")
        # Opening a file is slow on network disks. A file that is dropped here closes when its last reader is done.
        self._open = functools.lru_cache(_OPEN_SHARDS)(_open)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard[index]]}:{self._names[index]}"

    def portable_name(self, index: int) -> str:
        return f"{self._portable[self._shard[index]]}:{self._names[index]}"

    def _crc_of_names(self) -> int:
        return self._names.crc(zlib.crc32(self._shard, crc_of_texts(*self._portable)))

    def class_names(self) -> list[str | None]:
        found = [read_classes(shard) for shard in self.shards]
        return [class_of(self._names[i], found[shard]) for i, shard in enumerate(self._shard.tolist())]

    def read(self, index: int) -> np.ndarray:
        shard = self.shards[self._shard[index]]
        start, size = int(self._start[index]), int(self._size[index])
        return _read(shard, self.name(index), start, size, lambda path: nullcontext(self._open(path)))


def _contains_tars(path: Path) -> bool:
    """Whether a folder holds tar files; raises a UserError if it also holds images or folders."""
    tars, others = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if is_tar(entry.name) and not entry.is_dir():
                tars.append(entry.name)
            elif not entry.name.startswith(".") and (entry.is_dir() or is_image(os.fsencode(entry.name))):
                others.append(entry.name)
    if tars and others:
        raise UserError(
            f"{path} has tar files ({tars[0]}) and others ({others[0]}); for the tars write {path}/*.tar"
        )
    return bool(tars)


def open_source(spec: str, *, damaged: bool = False) -> Source:
    """Opens `synthetic` or `synthetic:N`; a .tar file, a folder or a pattern of them; else a folder of images.

    `damaged`: use what is left of a damaged data set (see `TarSource` and `FolderSource`), instead of raising.
    """
    if spec == "synthetic" or re.fullmatch(r"synthetic:\d+", spec):
        return SyntheticSource(int(spec.partition(":")[2] or SYNTHETIC_LENGTH))
    if not spec:
        raise UserError("no data set given; name a folder of images, a .tar pattern or `synthetic`")
    spec = user_path(spec)
    path, is_tar_file = Path(spec), spec.lower().endswith(".tar")
    try:
        if path.is_dir():
            tars = _contains_tars(path)
        elif path.is_file() and not is_tar_file:
            raise UserError(f"{spec} is a file; name a folder of images, a .tar file or `synthetic`")
        else:
            tars = is_tar_file or any(c in spec for c in "*?[{")
        return (TarSource if tars else FolderSource)(spec, damaged=damaged)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot open {spec}: {reason}; check the path and its permissions") from error
