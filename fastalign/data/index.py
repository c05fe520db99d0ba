"""Lists of images: packed names, scans of folders, and the cache of both on disk; `tars.py` scans tar shards.

Names are one blob of bytes with int64 offsets, memory-mapped from the cache: 13 million Python strings would cost
every process more than a gigabyte.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically
from fastalign.utils.paths import home_folder

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
DANGLING = "a link that leads nowhere"
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_SUFFIXES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
# A directory that changes twice within one tick of its file system's clock keeps its mtime, so a list made this soon
# after a change is not cached.
_SETTLE_NS = 2_000_000_000
_FORMAT = "fastalign-index-2"
_ALIGN = 64
_ITEM_SIZES = {"|u1": 1, "<i8": 8}


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


def is_dangling(path: str | bytes) -> bool:
    """Whether a path is a link to nothing, or part of a cycle of links; raises OSError if the disk fails."""
    try:
        os.stat(path)  # noqa: PTH116, names are bytes
    except OSError as error:
        if error.errno not in MISSING:
            raise
        return os.path.islink(path)  # noqa: PTH114
    return False


def _walk(root: str) -> Iterator[tuple[bytes, int, list[bytes], list[bytes]]]:
    """Each directory below `root`, depth first: name, mtime in ns, its images, its dangling links to other things.

    Names are relative to `root` and sorted. A dangling link whose name is an image's counts as an image.
    """
    stack: list[tuple[bytes, tuple]] = [(b"", ())]
    while stack:
        relative, ancestors = stack.pop()
        path = os.path.join(os.fsencode(root), relative)  # noqa: PTH118
        status = os.stat(path)  # noqa: PTH116
        inode = (status.st_dev, status.st_ino)
        if inode in ancestors:
            continue  # a link to a directory that contains it
        prefix = relative + b"/" if relative else b""
        images, folders, dangling = [], [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                leads_nowhere = entry.is_symlink() and is_dangling(entry.path)
                if not leads_nowhere and entry.is_dir():
                    folders.append(prefix + entry.name)
                elif is_image(entry.name):
                    images.append(prefix + entry.name)
                elif leads_nowhere:
                    dangling.append(prefix + entry.name)
        yield relative, status.st_mtime_ns, sorted(images), sorted(dangling)
        stack += [(name, (*ancestors, inode)) for name in sorted(folders, reverse=True)]


def _scan_folder(root: str) -> dict[str, np.ndarray]:
    directories, mtimes, dangling = [], [], []

    def images() -> Iterator[bytes]:
        for directory, mtime, found, lost in _walk(root):
            directories.append(directory)
            mtimes.append(mtime)
            dangling.extend(lost)
            yield from found

    try:
        arrays = Names.pack(images()).arrays()
    except OSError as error:
        raise UserError(f"cannot read {error.filename!r}: {error.strerror}; check its permissions") from error
    arrays |= Names.pack(directories).arrays("tree_") | Names.pack(dangling).arrays("missing_")
    return arrays | {"mtimes": np.array(mtimes, dtype=np.int64)}


def _is_current(root: str, arrays: dict[str, np.ndarray]) -> bool:
    """Whether all directories still have the mtimes of the index and its dangling links still lead nowhere."""
    tree, dangling = Names.of(arrays, "tree_"), Names.of(arrays, "missing_")
    try:
        return all(
            (Path(root) / folder).stat().st_mtime_ns == mtime
            for folder, mtime in zip(tree, arrays["mtimes"].tolist(), strict=True)
        ) and all(is_dangling(f"{root}/{link}") for link in dangling)
    except OSError:
        return False


def index_folder(root: str) -> tuple[Names, Names]:
    """The images below a folder, depth first, and dangling links that are not named as images; relative to `root`."""
    arrays = cached_index(
        "folder", root, lambda index: _is_current(root, index), lambda: _scan_folder(root), "mtimes"
    )
    return Names.of(arrays), Names.of(arrays, "missing_")


def cached_index(
    kind: str,
    key: str,
    is_current: Callable[[dict[str, np.ndarray]], bool],
    scan: Callable[[], dict[str, np.ndarray]],
    mtimes: str,
) -> dict[str, np.ndarray]:
    """The index that `scan` makes, or the cached one if `is_current`.

    `mtimes` names its array of modification times in ns: an index is cached if all of them are more than 2 s old.
    """
    with _scan_lock(kind, key):
        arrays = load_index(kind, key)  # another process may have made it while this one waited
        if arrays is None or not is_current(arrays):
            start = time.time_ns()
            arrays = scan()
            settled = start - arrays[mtimes].max() > _SETTLE_NS
            if settled and save_index(kind, key, arrays):
                # Processes of a machine share mapped pages.
                arrays = load_index(kind, key) or arrays
    return arrays


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastalign, else ~/.cache/fastalign; raises OSError without a home folder."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fastalign"
    if (home := home_folder()) is None:
        raise FileNotFoundError("no home folder")
    return Path(home) / ".cache/fastalign"


def _cache_file(kind: str, key: str) -> Path:
    return cache_folder() / f"{kind}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.idx"


def save_index(kind: str, key: str, arrays: dict[str, np.ndarray]) -> bool:
    """Writes [n] uint8 and int64 arrays to the cache, atomically; False if it cannot be written."""
    layout, position = {}, 0
    for name, values in arrays.items():
        position = -(-position // _ALIGN) * _ALIGN
        layout[name] = [values.dtype.str, len(values), position]
        position += values.nbytes
    header = json.dumps({"format": _FORMAT, "key": key, "arrays": layout, "bytes": position}).encode() + b"\n"
    body = -(-len(header) // _ALIGN) * _ALIGN

    def write(file: BinaryIO) -> None:
        file.write(header)
        for name, values in arrays.items():
            file.seek(body + layout[name][2])
            file.write(memoryview(np.ascontiguousarray(values)))
        file.truncate(body + position)

    try:
        write_atomically(_cache_file(kind, key), write)
    except (OSError, UnicodeEncodeError):
        return False
    return True


def load_index(kind: str, key: str) -> dict[str, np.ndarray] | None:
    """The arrays that `save_index` wrote, memory-mapped; None if there are none or the file is damaged."""
    try:
        file = np.memmap(_cache_file(kind, key), np.uint8, "r")
        line = file[: 1 << 20].tobytes().partition(b"\n")[0]
        header = json.loads(line)
        body = -(-(len(line) + 1) // _ALIGN) * _ALIGN
        if (header["format"], header["key"], body + header["bytes"]) != (_FORMAT, key, len(file)):
            return None
        arrays = {}
        for name, (dtype, length, offset) in header["arrays"].items():
            begin = body + offset
            arrays[name] = file[begin : begin + length * _ITEM_SIZES[dtype]].view(dtype)
        return arrays
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _scan_lock(kind: str, key: str) -> Iterator[None]:
    """Lets one process of a machine scan while the others wait for its index; without a cache, all scan."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        file = _cache_file(kind, key).with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with file:
        lock(file.fileno(), wait=True)
        yield


def lock(descriptor: int, *, wait: bool) -> bool:
    """Locks an open file or folder until it is closed; False if another process has it. Without support, True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:  # ENOSYS, ENOTSUP, ENOLCK: no locks
        return not isinstance(error, BlockingIOError)
    return True
