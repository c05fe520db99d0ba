"""Memory-mapped arrays in a folder, which is complete once `complete.json` is there."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastalign.data.index import lock
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically

_COMPLETE = "complete.json"

Array = tuple[tuple[int, ...], type]
"""shape and dtype"""


@dataclass(frozen=True)
class ArrayFiles:
    """Arrays by name, and their folder, which contains nothing else."""

    folder: Path
    arrays: dict[str, Array]

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(map(_bytes, self.arrays.values()))

    def complete(self) -> bool:
        """Whether every array was written to its end."""
        try:
            finished = set(json.loads((self.folder / _COMPLETE).read_bytes())["arrays"])
            sizes = {name: self._path(name).stat().st_size for name in self.arrays}
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return all(name in finished and sizes[name] >= _bytes(self.arrays[name]) for name in sizes)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other commands from writing here; UserError if one already does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder) as free:
            if not free:
                raise UserError(
                    f"--cache {self.folder.parent}: another command is reading the same features into it; "
                    "wait until it is done, or name another folder"
                )
            yield

    def create(self) -> None:
        """Replaces the content of the folder by empty arrays, with their space on the disk allocated.

        Raises:
            UserError: too little space.
        """
        _empty(self.folder)
        try:
            for name, (shape, kind) in self.arrays.items():
                np.lib.format.open_memmap(self._path(name), mode="w+", dtype=kind, shape=shape).flush()
                with self._path(name).open("r+b") as file:
                    # Writing to the map of a sparse file on a full disk kills the process with SIGBUS.
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _empty(self.folder)
            raise _too_little_space(self.folder.parent, self.size) from None

    def open(self, *, write: bool) -> dict[str, np.ndarray]:
        """The mapped arrays. Not copy-on-write: Linux counts such maps as memory."""
        return {name: np.load(self._path(name), mmap_mode="r+" if write else "r") for name in self.arrays}

    def finish(self, facts: dict) -> None:
        """Marks the arrays as complete; `facts` are for people who look."""
        text = json.dumps({**facts, "arrays": list(self.arrays)}, indent=1) + "\n"
        write_atomically(self.folder / _COMPLETE, lambda file: file.write(text.encode()))

    def remove(self) -> None:
        """Deletes the folder, unless another command is writing to it. Open maps stay valid."""
        if self.folder.is_dir():
            with _locked(self.folder) as free:
                if free:
                    shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def check_space(folder: Path, wanted: Iterable[ArrayFiles]) -> None:
    """Raises UserError where the disk cannot hold the arrays."""
    by_folder = {files.folder: files for files in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    leftovers = sum(path.stat().st_blocks * 512 for place in by_folder for path in place.glob("*"))
    need = sum(files.size for files in by_folder.values())
    if need > shutil.disk_usage(folder).free + leftovers:
        raise _too_little_space(folder, need)


def _too_little_space(folder: Path, need: int) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"the features take {need / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free; "
        "name a folder with enough space (probe --cache, classify --output)"
    )


def _bytes(array: Array) -> int:
    return int(np.prod(array[0], dtype=np.int64)) * np.dtype(array[1]).itemsize


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the folder was free to lock; the lock ends with the block, or with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lock(handle, wait=False)
    finally:
        os.close(handle)
