"""Lists of images: packed names, scans of folders, and the cache on disk; `tars.py` reads tar shards.

Names are one blob of bytes with int64 offsets, memory-mapped from the cache: 13 million Python strings would cost
every process more than a gigabyte.
"""

import fcntl
import hashlib
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fastalign.utils.errors import UserError
from fastalign.utils.files import write_tensors

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
_SUFFIXES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
# A directory that changes twice within one tick of its file system's clock keeps its mtime, so a list made this soon
# after a change is not cached.
_SETTLE_NS = 2_000_000_000

Index = dict[str, np.ndarray]
"""What is known of a data set, as [n] uint8 and int64 arrays. A list of names is two of them, see `pack`.

`places_names`, `places_offsets`, `mtimes`: the directories or shards that it was read from, and their times in ns.
"""


def pack(names: Iterable[bytes], key: str = "") -> Index:
    """Names as `names` [total] uint8, their bytes, and `offsets` [n + 1] int64 of each; `key` goes before both."""
    blob, offsets = bytearray(), array("q", [0])
    for name in names:
        blob += name
        offsets.append(len(blob))
    return {f"{key}names": np.frombuffer(blob, np.uint8), f"{key}offsets": np.frombuffer(offsets, np.int64)}


class Names(Sequence[str]):
    """A list of names that was packed into an index."""

    def __init__(self, index: Index, key: str = ""):
        self._blob, self._offsets = index[f"{key}names"], index[f"{key}offsets"]

    def crc(self, start: int = 0) -> int:
        """CRC-32 of all names, continued from `start`."""
        return zlib.crc32(self._blob, zlib.crc32(self._offsets, start))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._blob[self._offsets[index] : self._offsets[index + 1]].tobytes())


def is_image(name: bytes) -> bool:
    """Whether a path ends in one of IMAGE_EXTENSIONS (in any case) and no part of it is hidden."""
    if not name.lower().endswith(_SUFFIXES):
        return False
    return not any(part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


def scan_folder(root: str) -> Index:
    """The images below a folder as `names` relative to it, sorted in each directory, depth first."""
    folders, mtimes = [], array("q")

    def images() -> Iterator[bytes]:
        stack: list[tuple[bytes, tuple]] = [(b"", ())]
        while stack:
            folder, ancestors = stack.pop()
            path, prefix = os.fsencode(root) + b"/" + folder, folder + b"/" if folder else b""
            status = os.stat(path)  # noqa: PTH116
            inode = (status.st_dev, status.st_ino)
            if inode in ancestors:
                continue  # a link to a directory that contains it
            folders.append(path)
            mtimes.append(status.st_mtime_ns)
            found, inside = [], []  # names relative to root
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        inside.append(prefix + entry.name)
                    elif is_image(entry.name):
                        found.append(prefix + entry.name)
                    elif entry.is_symlink():
                        os.stat(entry.path)  # noqa: PTH116, fails if it is to a folder that is not mounted
            yield from sorted(found)
            stack += [(name, (*ancestors, inode)) for name in sorted(inside, reverse=True)]

    try:
        index = pack(images())
    except OSError as error:
        path = os.fsdecode(error.filename)
        raise UserError(f"cannot read {path}: {error.strerror}; repair, mount or remove it") from error
    return index | pack(folders, "places_") | {"mtimes": np.frombuffer(mtimes, np.int64)}


def _is_current(index: Index) -> bool:
    with suppress(OSError):
        pairs = zip(Names(index, "places_"), index["mtimes"].tolist(), strict=True)
        return all(Path(place).stat().st_mtime_ns == mtime for place, mtime in pairs)
    return False


def cached_index(key: str, scan: Callable[[], Index]) -> Index:
    """The index that `scan` makes, or the cached one if the times of all its places are the same.

    It is cached if they are old.
    """
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(os.fsencode(f"{IMAGE_EXTENSIONS} {key}")).hexdigest()
        file = cache_folder() / f"index-{digest[:32]}.safetensors"
        locked = file.with_suffix(".lock").open("w")
    except (OSError, RuntimeError):  # no cache, or no home folder
        return scan()
    with locked:
        with suppress(OSError):  # of a file system without locks
            # One process of a machine scans while the others wait for its index.
            fcntl.flock(locked, fcntl.LOCK_EX)
        index = _load(file)
        if index is None or not _is_current(index):
            start = time.time_ns()
            index = scan()
            if start - index["mtimes"].max() > _SETTLE_NS:
                with suppress(OSError):
                    write_tensors(file, {name: torch.from_numpy(values) for name, values in index.items()})
                    index = _load(file) or index  # processes of a machine share mapped pages
    return index


def _load(file: Path) -> Index | None:
    """The arrays of a cache file, memory-mapped; None if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name).numpy() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastalign, else ~/.cache/fastalign; raises RuntimeError without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastalign"
