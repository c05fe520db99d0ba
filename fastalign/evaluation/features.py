"""Reading images through a frozen encoder, each once; features of images."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.backbones.precision import autocast
from fastalign.data.loader import Loader
from fastalign.data.prefetch import Batch
from fastalign.data.source import Source
from fastalign.data.transforms import Transform
from fastalign.evaluation.cache import Array, ArrayFiles, check_space
from fastalign.training.distributed import World, on_first_rank
from fastalign.utils.errors import SharedError, UserError

_ALLREDUCE_BYTES = 2**26


def open_loader(
    source: Source, transform: Transform, world: World, *, train: bool = False, **options
) -> Loader:
    """A loader of this rank's share of the images."""
    options |= {"device": world.device, "rank": world.rank, "world_size": world.size}
    return Loader(source, transform, train=train, **options)


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
    """One feature per image, of all images on each rank; ranks divide the reading.

    Args:
        encode: normalized images [B, 3, h, w] -> [B, *shape].
        loader: in order, without augmentation.
        shape: (D,) or (T, D).
        kept: float32 or bfloat16, the dtype of the result.
        world: all ranks.
        dtype: of autocast.
        folder: for a temporary file where memory is short; it works on one machine only.
        share: of the free memory that the machine's ranks may take together.

    Returns:
        [n, *shape] on the CPU.

    Raises:
        UserError: memory is short, and so is the disk or there are several machines.
    """
    array = ((len(loader.source), *shape), np.uint16 if kept == torch.bfloat16 else np.float32)
    needed = ArrayFiles(folder, {"features": array}).size
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    short = torch.tensor(float(needed * ranks > share * _free_memory()), device=world.device)
    mapped = bool(world.sum(short))
    if mapped and world.size > ranks:
        # Each machine would write back whole pages of a shared file, over the rows of the others in them.
        raise SharedError(
            f"the features of {array[0][0]} images take {needed / 1e9:.1f} GB, more than --memory-share allows, and "
            "a file instead works on one machine only: raise --memory-share, or use one machine"
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

    def create() -> ArrayFiles:
        files = ArrayFiles(Path(tempfile.mkdtemp(prefix=".features-", dir=folder)), {"features": array})
        try:
            check_space(folder, [files])
            files.create()
        except UserError:
            files.remove()
            raise
        return files

    files = on_first_rank(world, create)
    mapped = files.open(write=True)["features"]
    world.barrier()
    if world.main:
        files.remove()
    return mapped
