"""Lists of images: packed names, scans of folders, labels, and the cache on disk; `tars.py` reads tar shards.

Names are one blob of bytes with int64 offsets, memory-mapped from the cache: 13 million Python strings would cost
every process more than a gigabyte.
"""

import contextlib
import csv
import fcntl
import hashlib
import os
import re
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fastalign.utils.errors import UserError
from fastalign.utils.files import write_tensors
from fastalign.utils.paths import home_folder

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SUFFIXES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
# A directory that changes twice within one tick of its file system's clock keeps its mtime, so a list made this soon
# after a change is not cached.
_SETTLE_NS = 2_000_000_000
_LINE_SECONDS = 10  # between two lines about the progress of a scan


class Names:
    """A packed, read-only list of file names: `blob` [total] uint8, `offsets` [n + 1] int64 of the names in it."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def pack(cls, names: Iterable[bytes]) -> "Names":
        blob, offsets = bytearray(), array("q", [0])
        for name in names:
            blob += name
            offsets.append(len(blob))
        return cls(np.frombuffer(blob, np.uint8), np.frombuffer(offsets, np.int64))

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], key: str = "") -> "Names":
        """The inverse of `arrays`."""
        return cls(arrays[f"{key}names"], arrays[f"{key}offsets"])

    def arrays(self, key: str = "") -> dict[str, np.ndarray]:
        """Its arrays, as an index has them."""
        return {f"{key}names": self.blob, f"{key}offsets": self.offsets}

    def crc(self, start: int = 0) -> int:
        """CRC-32 of all names, continued from `start`."""
        return zlib.crc32(self.blob, zlib.crc32(self.offsets, start))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())


def is_image(name: bytes) -> bool:
    """Whether a path ends in one of IMAGE_EXTENSIONS (in any case) and no part of it is hidden."""
    if not name.lower().endswith(_SUFFIXES):
        return False
    return not any(part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


def _walk(root: str) -> Iterator[tuple[bytes, int, list[bytes]]]:
    """Each directory below `root`, depth first: name, mtime in ns and images; names relative to `root`, sorted."""
    stack: list[tuple[bytes, tuple]] = [(b"", ())]
    while stack:
        relative, ancestors = stack.pop()
        path = os.path.join(os.fsencode(root), relative)  # noqa: PTH118
        status = os.stat(path)  # noqa: PTH116
        inode = (status.st_dev, status.st_ino)
        if inode in ancestors:
            continue  # a link to a directory that contains it
        prefix = relative + b"/" if relative else b""
        images, folders = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    folders.append(prefix + entry.name)
                elif is_image(entry.name):
                    images.append(prefix + entry.name)
                elif entry.is_symlink():
                    os.stat(entry.path)  # noqa: PTH116, fails if it is to a folder that is not mounted
        yield relative, status.st_mtime_ns, sorted(images)
        stack += [(name, (*ancestors, inode)) for name in sorted(folders, reverse=True)]


def _scan_folder(root: str) -> dict[str, np.ndarray]:
    directories, mtimes = [], []

    def images() -> Iterator[bytes]:
        count, shown = 0, time.monotonic()
        for directory, mtime, found in _walk(root):
            directories.append(directory)
            mtimes.append(mtime)
            yield from found
            count += len(found)
            if time.monotonic() - shown > _LINE_SECONDS:
                shown = time.monotonic()
                print(f"indexing {root}: {count} images so far", file=sys.stderr, flush=True)

    try:
        arrays = Names.pack(images()).arrays() | Names.pack(directories).arrays("tree_")
    except OSError as error:
        path = os.fsdecode(error.filename)
        raise UserError(f"cannot read {path}: {error.strerror}; repair, mount or remove it") from error
    return arrays | {"mtimes": np.array(mtimes, dtype=np.int64)}


def _is_current(root: str, arrays: dict[str, np.ndarray]) -> bool:
    """Whether all directories still have the mtimes of the index."""
    pairs = zip(Names.of(arrays, "tree_"), arrays["mtimes"].tolist(), strict=True)
    try:
        return all((Path(root) / folder).stat().st_mtime_ns == mtime for folder, mtime in pairs)
    except OSError:
        return False


def index_folder(root: str) -> Names:
    """The images below a folder, depth first, relative to it."""
    return Names.of(
        cached_index(f"folder:{root}", lambda index: _is_current(root, index), lambda: _scan_folder(root))
    )


def read_labels(path: Path) -> dict[str, str]:
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
                if (other := labels.setdefault(row["name"], str(int(label)))) != str(int(label)):
                    raise UserError(f"{where} has two labels, {other} and {label}; remove one")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return labels


def cached_index(
    key: str, is_current: Callable[[dict[str, np.ndarray]], bool], scan: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The index that `scan` makes, or the cached one if `is_current`: [n] uint8 and int64 arrays.

    It is cached if all its `mtimes`, in ns, are more than 2 s old.
    """
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        file = cache_folder() / f"index-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.safetensors"
        locked = file.with_suffix(".lock").open("w")
    except OSError:  # no cache
        return scan()
    with locked:
        lock(locked.fileno(), wait=True)  # one process of a machine scans while the others wait for its index
        arrays = _load(file)
        if arrays is None or not is_current(arrays):
            start = time.time_ns()
            arrays = scan()
            if start - arrays["mtimes"].max() > _SETTLE_NS:
                with contextlib.suppress(OSError):
                    write_tensors(file, {name: torch.from_numpy(values) for name, values in arrays.items()})
                    arrays = _load(file) or arrays  # processes of a machine share mapped pages
    return arrays


def _load(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, memory-mapped; None if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name).numpy() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastalign, else ~/.cache/fastalign; raises OSError without a home folder."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fastalign"
    if (home := home_folder()) is None:
        raise FileNotFoundError("no home folder")
    return Path(home) / ".cache/fastalign"


def lock(descriptor: int, *, wait: bool) -> bool:
    """Locks an open file or folder until it is closed; False if another process has it. Without support, True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:  # ENOSYS, ENOTSUP, ENOLCK: no locks
        return not isinstance(error, BlockingIOError)
    return True
