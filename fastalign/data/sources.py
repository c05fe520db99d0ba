"""Images on disk: folders and tar shards; `open_source` opens what a specification names."""

import csv
import hashlib
import os
import re
import stat
import zlib
from pathlib import Path

import numpy as np

from fastalign.data.index import DANGLING, IMAGE_EXTENSIONS, Names, index_folder, is_dangling, is_image
from fastalign.data.source import SYNTHETIC_LENGTH, Source, SyntheticSource, Unreadable, crc_of_texts
from fastalign.data.tars import class_of, expand_shards, index_tars, is_tar, read_classes
from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path

MAX_IMAGE_BYTES = 256 * 1024 * 1024
_MAX_OPEN_SHARDS = 256
_EXTENSIONS = " ".join(IMAGE_EXTENSIONS)


def _read(descriptor: int, size: int, offset: int, name: str) -> np.ndarray:
    if not 0 < size <= MAX_IMAGE_BYTES:
        reason = f"{size} bytes, more than {MAX_IMAGE_BYTES}" if size else "zero bytes"
        raise Unreadable(
            f"{name} has {size} bytes, an image has 1 to {MAX_IMAGE_BYTES}; remove or replace it", reason
        )
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        reason = f"it became shorter while in use ({len(data)} of {size} bytes)"
        raise Unreadable(f"{name}: {reason}; do not change data sets during a run", reason)
    return np.frombuffer(data, dtype=np.uint8)


class FolderSource(Source):
    """Every image below the folder `root`.

    `damaged`: list dangling links to folders in `damaged`, instead of raising. Classes: `labels.csv` in the folder
    with the header `name,label` (name relative to it, label an integer), else the first-level sub-folders.
    """

    kind = "folder"

    def __init__(self, root: str, *, damaged: bool = False):
        path = Path(root)
        if not path.is_dir():
            raise UserError(f"no such folder: {root}; check the path of the data set")
        self.root = str(path.resolve())
        self._names, missing = index_folder(self.root)
        self.damaged = tuple((missing[index], DANGLING) for index in range(len(missing)))
        if self.damaged and not damaged:
            raise UserError(f"{path / missing[0]} is {DANGLING}; mount its target or remove it")
        if len(self._names) == 0:
            raise UserError(f"no images in {root}; looked for {_EXTENSIONS} in all sub-folders")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> np.ndarray:
        path = os.path.join(self.root, self._names[index])  # noqa: PTH118, faster
        try:
            # O_NONBLOCK: opening a pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise Unreadable(f"{path} is not a regular file; remove it", "not a regular file")
                return _read(descriptor, status.st_size, 0, path)
            finally:
                os.close(descriptor)
        except OSError as error:
            if is_dangling(path):
                # Without a cause, so that it is not tried again.
                raise Unreadable(f"{path} is {DANGLING}; mount its target or remove it", DANGLING) from None
            reason = error.strerror or str(error)
            message = f"cannot read {path}: {reason}; the data set changed since the start"
            raise Unreadable(message, reason) from error

    def _crc_of_names(self) -> int:
        return self._names.crc()

    def class_names(self) -> list[str | None]:
        names = (self._names[index] for index in range(len(self)))
        table = Path(self.root) / "labels.csv"
        if table.is_file():
            labels = _read_labels(table)
            return [labels.get(name) for name in names]
        return [name.split("/", 1)[0] if "/" in name else None for name in names]


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

    Classes: the `.cls` member with the image's stem, else with its WebDataset key, in the same shard.

    Args:
        spec: see `expand_shards`.
        shards: paths of the .tar files, if they are known already; `spec` is then used in messages only.
        damaged: use the images before the damage of a shard and list it in `damaged`, instead of raising.
    """

    kind = "tar"

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
        few = len(self.shards) <= _MAX_OPEN_SHARDS
        self._files = [os.open(shard, os.O_RDONLY) for shard in self.shards] if few else []

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
        shard = int(self._shard[index])
        try:
            descriptor = self._files[shard] if self._files else os.open(self.shards[shard], os.O_RDONLY)
            try:
                return _read(descriptor, int(self._size[index]), int(self._start[index]), self.name(index))
            finally:
                if not self._files:
                    os.close(descriptor)
        except OSError as error:
            message = f"cannot read {self.shards[shard]}: {error.strerror}; is the disk available?"
            raise Unreadable(message, error.strerror or str(error)) from error

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __del__(self):
        if hasattr(self, "_files"):
            self.close()


def _contains_tars(path: Path) -> bool:
    """Whether a folder holds tar files; raises a UserError if it also holds images or folders."""
    tar = other = None
    with os.scandir(path) as entries:
        for entry in entries:
            if is_tar(entry.name) and not entry.is_dir():
                tar = entry.name
            elif not entry.name.startswith(".") and (entry.is_dir() or is_image(os.fsencode(entry.name))):
                other = entry.name
    if tar and other:
        raise UserError(
            f"{path} has both tar files ({tar}) and images or folders ({other}); write {path}/*.tar for the tar "
            "files, or move them elsewhere"
        )
    return tar is not None


def open_source(spec: str, *, damaged: bool = False) -> Source:
    """Opens a data set.

    Args:
        spec: `synthetic` or `synthetic:N`; a .tar file, a folder or a pattern of them; else a folder of images.
        damaged: use what is left of a damaged data set (see `TarSource` and `FolderSource`), instead of raising.
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
