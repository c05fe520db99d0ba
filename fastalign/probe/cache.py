"""Memory-mapped files of what was read: a folder for each backbone and split, whole once `complete.json` is there."""

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

_DONE = "complete.json"


@dataclass(frozen=True)
class Files:
    """The files of a split read through a backbone."""

    place: Path
    """the folder, which is theirs alone"""
    arrays: dict[str, tuple[tuple[int, ...], type]]
    """shape and dtype by name"""

    def size(self) -> int:
        """Bytes that the arrays take."""
        return sum(_bytes(*array) for array in self.arrays.values())

    def complete(self) -> bool:
        """Whether every array is there and was written to its end."""
        try:
            finished = set(json.loads((self.place / _DONE).read_bytes())["arrays"])
            return all(
                name in finished and self._path(name).stat().st_size >= _bytes(*array)
                for name, array in self.arrays.items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Around writing, on one rank: no other command may write here meanwhile.

        Raises:
            UserError: another command does.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        with _locked(self.place) as mine:
            if not mine:
                raise UserError(
                    f"--cache {self.place.parent}: another command is reading the same features into it; "
                    "wait until it is done, or name another folder"
                )
            yield

    def make(self) -> None:
        """Makes the arrays, empty, with their room on the disk; whatever is in the folder goes.

        Raises:
            UserError: too little room.
        """
        _empty(self.place)
        try:
            for name, (shape, kind) in self.arrays.items():
                np.lib.format.open_memmap(self._path(name), mode="w+", dtype=kind, shape=shape).flush()
                with self._path(name).open("r+b") as file:
                    # Writing to a map of a file for which the disk has no room kills the process without a word.
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _empty(self.place)
            raise _too_little(self.place.parent, self.size()) from None

    def open(self, *, write: bool) -> dict[str, np.ndarray]:
        """The arrays, mapped; for reading only without `write`.

        Not copy-on-write, which counts as memory: Linux refuses such maps of files larger than what it has.
        """
        mode = "r+" if write else "r"
        return {name: np.load(self._path(name), mmap_mode=mode) for name in self.arrays}

    def finish(self, about: dict) -> None:
        """From now on the arrays are complete; `about` is for people who look."""
        text = json.dumps({**about, "arrays": list(self.arrays)}, indent=1) + "\n"
        write_atomically(self.place / _DONE, lambda file: file.write(text.encode()))

    def remove(self) -> None:
        """Deletes the folder, unless another command is writing to it. Who has mapped the files keeps them."""
        if self.place.is_dir():
            with _locked(self.place) as mine:
                if mine:
                    _empty(self.place)
                    self.place.rmdir()

    def _path(self, name: str) -> Path:
        return self.place / f"{name}.npy"


def check_room(folder: Path, wanted: Iterable[Files]) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        UserError: with the bytes that are needed and those that are free.
    """
    by_place = {files.place: files for files in wanted}
    if not by_place:
        return
    folder.mkdir(parents=True, exist_ok=True)
    leftovers = sum(path.stat().st_blocks * 512 for place in by_place for path in place.glob("*"))
    need = sum(files.size() for files in by_place.values())
    if need > shutil.disk_usage(folder).free + leftovers:
        raise _too_little(folder, need)


def _too_little(folder: Path, need: int) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"--cache {folder}: the features take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
        "name a folder with room"
    )


def _bytes(shape: tuple[int, ...], kind: type) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize


def _empty(place: Path) -> None:
    for path in place.iterdir():
        path.unlink()


@contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """Whether the folder was free to lock; the lock ends with the block, or with the process."""
    handle = os.open(place, os.O_RDONLY)
    try:
        yield lock(handle, wait=False)
    finally:
        os.close(handle)
