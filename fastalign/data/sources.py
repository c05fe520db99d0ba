"""Where samples come from: `open_source` tells folders, tar shards and `synthetic` apart."""

import hashlib
import os
import re
import stat
import threading
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from fastalign.data.index import (
    DEAD_LINK,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    Names,
    index_folder,
    is_dead_link,
    is_image,
)
from fastalign.data.label_files import class_of, read_classes, read_table
from fastalign.data.source import SYNTHETIC_LENGTH, Source, SyntheticSource, Unreadable
from fastalign.data.tars import expand_shards, index_tars, is_tar
from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path

_OPEN_SHARDS = 256
_LOOKED_FOR = " ".join(IMAGE_EXTENSIONS)


def _read_all(descriptor: int, size: int, offset: int, name: str) -> np.ndarray:
    if not 0 < size <= MAX_IMAGE_BYTES:
        reason = f"{size} bytes, more than {MAX_IMAGE_BYTES}" if size else "zero bytes"
        raise Unreadable(
            f"{name} has {size} bytes, an image has 1 to {MAX_IMAGE_BYTES}; remove or replace it", reason
        )
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise Unreadable(
            f"{name} got shorter while in use ({len(data)} of {size} bytes); leave data sets unchanged",
            f"it got shorter while in use, {len(data)} of {size} bytes",
        )
    return np.frombuffer(data, dtype=np.uint8)


class FolderSource(Source):
    """Every image below a folder, however deep.

    Labels: a file `labels.csv` at the root with the header `name,label` (name relative to the root, label an
    integer), else the first-level sub-folders in sorted order, else none.

    Args:
        root: the folder.
        damaged: links to folders that are not there are named in `damaged`; else they are refused.

    Raises:
        UserError: no such folder, no image in it, or a link in it that leads nowhere.
    """

    kind = "folder"

    def __init__(self, root: str, *, damaged: bool = False):
        path = Path(root)
        if not path.is_dir():
            raise UserError(f"no such folder: {root}; check the path of the data set")
        self.root = str(path.resolve())
        self._names, self._folders, missing, others = index_folder(self.root)
        self.damaged = tuple((missing[index], DEAD_LINK) for index in range(len(missing)))
        if self.damaged and not damaged:
            raise UserError(f"{path / missing[0]} is {DEAD_LINK}; mount what it leads to, or remove it")
        if len(self._names) == 0:
            found = f"none of the {others} files is one" if others else "it is empty"
            raise UserError(f"no images in {root}: {found}; looked for {_LOOKED_FOR} in all sub-folders")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> np.ndarray:
        path = os.path.join(self.root, self._names[index])  # noqa: PTH118, the hot path
        try:
            # A pipe that nobody writes to would be waited for: opened without waiting, it is told by its kind.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise Unreadable(f"{path} is no regular file; remove it", "no regular file")
                return _read_all(descriptor, status.st_size, 0, path)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and is_dead_link(path):
                # Not caused by a disk: it is not tried again.
                raise Unreadable(
                    f"{path} is {DEAD_LINK}; mount what it leads to, or remove it", DEAD_LINK
                ) from None
            reason = getattr(error, "strerror", None) or str(error)
            raise Unreadable(
                f"cannot read {path}: {reason}; the data set changed since the start", reason
            ) from error

    @cached_property
    def _labels(self) -> dict[str, int] | None:
        path = Path(self.root) / "labels.csv"
        return read_table(path) if path.is_file() else None

    @cached_property
    def _classes(self) -> dict[str, int]:
        tree = (self._folders[i] for i in range(len(self._folders)))
        return {name: i for i, name in enumerate(sorted({d.split("/", 1)[0] for d in tree if d}))}

    def _crc_of_all_names(self) -> int:
        return self._names.crc()

    def label(self, index: int) -> int | None:
        name = self._names[index]
        if self._labels is None:
            return self._classes.get(name.split("/", 1)[0]) if "/" in name else None
        if name not in self._labels:
            raise UserError(f"{self.root}/labels.csv has no line for {name}; add it or remove the image")
        return self._labels[name]

    def class_names(self) -> list[str | None]:
        names = (self._names[index] for index in range(len(self)))
        if self._labels is None:
            return [name.split("/", 1)[0] if "/" in name else None for name in names]
        found = (self._labels.get(name) for name in names)
        return [None if label is None else str(label) for label in found]


class TarSource(Source):
    """The image members of plain tar files (WebDataset layout), read in place and never extracted.

    Labels: the member with the image's name and `.cls` for its suffix, else for all that follows its first dot, in
    the same shard.

    Args:
        spec: one .tar, a folder of .tar files, or a pattern (`shards/{000..009}.tar`, `shards/*.tar`).
        shards: paths of the .tar files where they are known already; `spec` then only names them in messages.
        damaged: use the images before the damage of a broken shard, and name it in `damaged`; else refuse it.

    Raises:
        UserError: no such shard, a broken one, or no image in any.
    """

    kind = "tar"

    def __init__(self, spec: str, shards: list[str] | None = None, *, damaged: bool = False):
        self.shards = expand_shards(spec) if shards is None else shards
        # The key goes into the cache file's header, which a list of thousands of paths would make too long.
        key = hashlib.sha256(os.fsencode("\n".join(self.shards))).hexdigest()
        arrays = index_tars(key, self.shards)
        self._names = Names(arrays["names"], arrays["offsets"])
        self._shard, self._start, self._size = arrays["shard"], arrays["start"], arrays["size"]
        # Below their common folder: many data sets have a 00000.tar.
        common = os.path.commonpath([os.path.dirname(shard) for shard in self.shards])  # noqa: PTH120
        self._portable = [os.path.relpath(shard, common) for shard in self.shards]
        damage = Names(arrays["damage"], arrays["damage_offsets"])
        self.damaged = tuple(
            (name, damage[number]) for number, name in enumerate(self._portable) if damage[number]
        )
        if self.damaged and not (damaged and len(self._names)):
            shard = next(shard for number, shard in enumerate(self.shards) if damage[number])
            raise UserError(
                f"broken tar shard {shard}: {self.damaged[0][1]}; fetch it again (plain .tar only, not compressed)"
            )
        if len(self._names) == 0:
            raise UserError(f"no images in the {len(self.shards)} shards of {spec}; looked for {_LOOKED_FOR}")
        self._keep_open = len(self.shards) <= _OPEN_SHARDS
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard[index]]}:{self._names[index]}"

    def portable_name(self, index: int) -> str:
        return f"{self._portable[self._shard[index]]}:{self._names[index]}"

    def _crc_of_all_names(self) -> int:
        shards = zlib.crc32("\0".join(self._portable).encode("utf-8", "surrogateescape"))
        return self._names.crc(zlib.crc32(self._shard, shards))

    def class_names(self) -> list[str | None]:
        found = [read_classes(shard) for shard in self.shards]
        return [class_of(self._names[i], found[shard]) for i, shard in enumerate(self._shard.tolist())]

    def read(self, index: int) -> np.ndarray:
        shard = int(self._shard[index])
        try:
            descriptor = self._open(shard)
            try:
                return _read_all(
                    descriptor, int(self._size[index]), int(self._start[index]), self.name(index)
                )
            finally:
                if not self._keep_open:
                    os.close(descriptor)
        except OSError as error:
            message = f"cannot read {self.shards[shard]}: {error.strerror}; is the disk there?"
            raise Unreadable(message, error.strerror or str(error)) from error

    def _open(self, shard: int) -> int:
        if not self._keep_open:
            return os.open(self.shards[shard], os.O_RDONLY)
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self.shards[shard], os.O_RDONLY)
            return self._descriptors[shard]

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __del__(self):
        if hasattr(self, "_lock"):
            self.close()


def _holds_tars(path: Path, spec: str) -> bool:
    first: dict[str, str] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                kind = "folders"
            elif is_tar(name):
                kind = "tar files"
            elif is_image(os.fsencode(name)):
                kind = "images"
            else:
                continue
            first[kind] = min(first.get(kind, name), name)
    tar = first.pop("tar files", None)
    if tar is not None and first:
        others = " and ".join(f"{kind} ({name})" for kind, name in sorted(first.items()))
        raise UserError(
            f"{spec} holds both tar files ({tar}) and {others}; "
            f"write {spec}/*.tar for the tar files, or move them elsewhere"
        )
    return tar is not None


def open_source(spec: str, *, damaged: bool = False) -> Source:
    """Opens a data set.

    Args:
        spec: `synthetic` or `synthetic:N`; a .tar file, a folder of .tar files or a pattern of them; else a
            folder of images.
        damaged: use what there is of a broken data set, see `TarSource` and `FolderSource`; else refuse it.

    Returns:
        The source.

    Raises:
        UserError: nothing usable there; the message names the path and the remedy.
    """
    if spec == "synthetic" or re.fullmatch(r"synthetic:\d+", spec):
        return SyntheticSource(int(spec.partition(":")[2] or SYNTHETIC_LENGTH))
    if not spec:
        raise UserError("no data set given; name a folder of images, a .tar pattern or `synthetic`")
    try:
        return _open_path(user_path(spec), damaged)
    except OSError as error:
        raise UserError(
            f"cannot open {spec}: {error.strerror or error}; check the path and its permissions"
        ) from error


def _open_path(spec: str, damaged: bool) -> Source:
    path = Path(spec)
    if path.is_dir():
        source = TarSource if _holds_tars(path, spec) else FolderSource
        return source(spec, damaged=damaged)
    if path.is_file() and path.suffix.lower() != ".tar":
        raise UserError(f"{spec} is a file; name a folder of images, a .tar file or `synthetic`")
    if path.suffix.lower() == ".tar" or any(c in spec for c in "*?[{"):
        return TarSource(spec, damaged=damaged)
    return FolderSource(spec, damaged=damaged)
