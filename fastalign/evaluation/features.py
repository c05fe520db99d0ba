"""Frozen features: memory-mapped files of arrays, and reading images through an encoder, each once."""

import errno
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.backbones.precision import autocast
from fastalign.data.index import lock
from fastalign.data.loader import Batch, Loader
from fastalign.training.distributed import World, on_first_rank
from fastalign.utils.errors import SharedError, UserError
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
        return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in self.arrays.values())

    def complete(self) -> bool:
        """Whether every array was written to its end."""
        sizes = [path.stat().st_size for path in map(self._path, self.arrays) if path.is_file()]
        return (self.folder / _COMPLETE).is_file() and sum(sizes) >= self.size

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other commands from writing here, until the process ends; UserError if one already does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            if not lock(handle, wait=False):
                raise UserError(
                    f"--cache {self.folder.parent}: another command is reading the same features into it; "
                    "wait until it is done, or name another folder"
                )
            yield
        finally:
            os.close(handle)

    def create(self) -> None:
        """Replaces the content of the folder by empty arrays, with space allocated; UserError for too little."""
        self._empty()
        try:
            for name, (shape, kind) in self.arrays.items():
                np.lib.format.open_memmap(self._path(name), mode="w+", dtype=kind, shape=shape).flush()
                with self._path(name).open("r+b") as file:
                    # Writing to the map of a sparse file on a full disk kills the process with SIGBUS.
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._empty()
            check_space(self.folder.parent, [self], full=True)

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
            with suppress(UserError), self.lock():
                shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


def check_space(folder: Path, wanted: Iterable[ArrayFiles], *, full: bool = False) -> None:
    """Raises UserError where the disk cannot hold the arrays, or is known to be full."""
    by_folder = {files.folder: files for files in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    leftovers = sum(path.stat().st_blocks * 512 for place in by_folder for path in place.glob("*"))
    need, free = sum(files.size for files in by_folder.values()), shutil.disk_usage(folder).free
    if full or need > free + leftovers:
        raise UserError(
            f"the features take {need / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free; "
            "name a folder with enough space (probe --cache, classify --output)"
        )


_ALLREDUCE_BYTES = 2**26


@torch.no_grad()
def read_features(
    encode: Callable[[Tensor], Sequence[Tensor]],
    batches: Iterable[Batch],
    outputs: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Encodes every image, under autocast of `dtype`, and writes each result to the image's row of its output."""
    for batch in batches:
        with autocast(device, dtype):
            found = encode(batch.images)
        for output, features in zip(outputs, found, strict=True):
            output[torch.from_numpy(batch.ids_host)] = features.to(output.dtype).cpu()


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor that shares its memory; uint16 holds bf16."""
    with warnings.catch_warnings():
        # torch has no read-only tensors; nobody writes to those of read-only maps.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def read_image_features(
    encode: Callable[[Tensor], Tensor],
    loader: Loader,
    shape: tuple[int, ...],
    kept: torch.dtype,
    world: World,
    *,
    dtype: torch.dtype,
    folder: Path,
    share: float,
) -> Tensor:
    """`encode` of every image, [n, *shape] of dtype `kept` on the CPU of each rank, which divide the reading.

    Where the features take more than `share` of the machine's free memory they are in a temporary file in `folder`;
    UserError if there are several machines. `dtype` is of autocast.
    """
    array = ((len(loader.source), *shape), np.uint16 if kept == torch.bfloat16 else np.float32)
    needed = ArrayFiles(folder, {"features": array}).size
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    short = torch.tensor(float(needed * ranks > share * _free_memory()), device=world.device)
    mapped = bool(world.sum(short))
    if mapped and world.size > ranks:
        # Each machine would write back whole pages of a shared file, over the rows of the others in them.
        raise SharedError(
            f"the features of {array[0][0]} images take {needed / 1e9:.1f} GB, more than --memory-share allows; "
            "a file works on one machine only: raise --memory-share, or use one machine"
        )
    features = as_tensor(_temporary_file(array, folder, world) if mapped else np.zeros(*array))
    read_features(lambda images: [encode(images)], loader.batches(), [features], world.device, dtype)
    if mapped:
        world.barrier()
    elif world.size > 1:
        for part in features.split(max(1, _ALLREDUCE_BYTES * len(features) // needed)):
            # The rows of the other ranks are zero, so the sum is exact.
            part.copy_(world.sum(part.to(world.device, torch.float32)))
    return features


def _free_memory() -> int:
    """Bytes that a process can still allocate without swapping, by the kernel's estimate."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _temporary_file(array: Array, folder: Path, world: World) -> np.ndarray:
    """An array that the ranks share, in a file that is deleted once it is mapped: it ends with the last rank."""

    with ExitStack() as stack:

        def create() -> ArrayFiles:
            files = ArrayFiles(Path(tempfile.mkdtemp(prefix=".features-", dir=folder)), {"features": array})
            stack.callback(files.remove)
            check_space(folder, [files])
            files.create()
            return files

        mapped = on_first_rank(world, create).open(write=True)["features"]
        world.barrier()
    return mapped
