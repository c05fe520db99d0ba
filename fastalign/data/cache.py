"""Indices on disk: named arrays in one file, written atomically, memory-mapped when read; locks.

A cache saves time and is never needed: whatever keeps it from being used is an OSError, and then there is none.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastalign.utils.files import write_atomically
from fastalign.utils.paths import home_folder

_FORMAT = "fastalign-index-2"
"""Another number for other content: a list that an earlier version made is then made anew."""
_ALIGN = 64
_DTYPES = {"|u1", "<i8"}


def cache_folder() -> Path:
    """Where indices are kept: $XDG_CACHE_HOME/fastalign, else ~/.cache/fastalign.

    Raises:
        OSError: there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        home = home_folder()
        if home is None:
            raise FileNotFoundError("no home folder")
        base = f"{home}/.cache"
    return Path(base) / "fastalign"


def _cache_file(kind: str, key: str) -> Path:
    return cache_folder() / f"{kind}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.idx"


def save_index(kind: str, key: str, arrays: dict[str, np.ndarray]) -> bool:
    """Writes one-dimensional arrays to the cache, atomically.

    Returns:
        False when the cache cannot be written (no home, a read-only one, full disk): the caller goes on without it.
    """
    layout, position = {}, 0
    for name, array in arrays.items():
        position = -(-position // _ALIGN) * _ALIGN
        layout[name] = [array.dtype.str, len(array), position]
        position += array.nbytes
    header = json.dumps({"format": _FORMAT, "key": key, "arrays": layout, "bytes": position}).encode() + b"\n"
    body = -(-len(header) // _ALIGN) * _ALIGN

    def write(file: BinaryIO) -> None:
        file.write(header)
        for name, array in arrays.items():
            file.seek(body + layout[name][2])
            file.write(memoryview(np.ascontiguousarray(array)))
        file.truncate(body + position)

    try:
        write_atomically(_cache_file(kind, key), write)
    except (OSError, UnicodeEncodeError):
        return False
    return True


def load_index(kind: str, key: str) -> dict[str, np.ndarray] | None:
    """The arrays that `save_index` wrote, memory-mapped; None when there are none, or they are damaged.

    Whatever the file holds, the arrays lie within it. Their values may be anything: the caller checks them.

    Args:
        kind: of index.
        key: that it was saved under.

    Returns:
        One-dimensional uint8 and int64 arrays by name.
    """
    try:
        with _cache_file(kind, key).open("rb") as file:
            line = file.readline(1 << 20)
            header = json.loads(line)
            body = -(-len(line) // _ALIGN) * _ALIGN
            size = os.fstat(file.fileno()).st_size
            if (header["format"], header["key"], body + header["bytes"]) != (_FORMAT, key, size):
                return None
            arrays = {}
            for name, (dtype, length, offset) in header["arrays"].items():
                # A dtype of objects would turn the file's bytes into pointers.
                if dtype not in _DTYPES or type(length) is not int or type(offset) is not int:
                    return None
                if length < 0 or offset < 0 or body + offset + length * np.dtype(dtype).itemsize > size:
                    return None
                if length == 0:
                    arrays[name] = np.empty(0, dtype=dtype)
                else:
                    arrays[name] = np.memmap(file, dtype, mode="r", offset=body + offset, shape=(length,))
            return arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@contextlib.contextmanager
def one_scanner(kind: str, key: str) -> Iterator[None]:
    """Let one process of a machine scan while the others wait for the list it makes; without a cache, all scan."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        opened = _cache_file(kind, key).with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with opened:
        lock(opened.fileno(), wait=True)
        yield


def lock(descriptor: int, *, wait: bool) -> bool:
    """Locks an open file or folder for this process, until it is closed.

    Returns:
        False where another process has it and `wait` is not asked for. A disk that knows no locks keeps nobody out.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # ENOSYS, ENOTSUP, ENOLCK
        return True
    return True
