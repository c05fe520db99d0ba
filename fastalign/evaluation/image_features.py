"""A frozen backbone's features, computed once: shared among ranks, in memory or in a file, and read as batches."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.backbones.precision import autocast
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Loader
from fastalign.data.prefetch import Batch
from fastalign.evaluation.image_heads import represent
from fastalign.training.distributed import World
from fastalign.training.memory import free_memory
from fastalign.utils.errors import SharedError
from fastalign.utils.random import permutation

_CHUNK = 2**26  # bytes sent between ranks at a time


@torch.no_grad()
def extract(
    vit: ViT, head: str, loader: Loader, world: World, *, dtype: torch.dtype, folder: Path, share: float
) -> Tensor:
    """What a head reads, for every image of a source; each rank computes its loader's part.

    Args:
        vit: the backbone, on the rank's device.
        head: decides what is read, see `represent`.
        loader: in order, without augmentation. Ranks with equal batch sizes give the bits of one rank.
        world: all ranks.
        dtype: to compute in. Tokens are kept in it, one vector an image in float32.
        folder: has room for a file that takes them where memory is short, which one machine alone can do.
        share: of the free memory that the machine's ranks may take together.

    Returns:
        [n, D] or [n, T, D] on the CPU, on each rank; mapped from a file where it was needed.

    Raises:
        UserError: neither memory nor disk has room, or memory has none and ranks are on several machines.
    """
    tokens = () if head == "linear" else (vit.spec.prefix + vit.spec.patches,)
    kept = dtype if tokens else torch.float32
    shape = (len(loader.source), *tokens, vit.embed_dim)
    needed = int(np.prod(shape)) * kept.itemsize
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    short = torch.tensor(float(needed * ranks > share * free_memory()), device=world.device)
    mapped = bool(world.sum(short))
    if mapped and world.size > ranks:
        # Each machine would write back whole pages of a shared file, over the rows of the others in them.
        raise SharedError(
            f"{_need(shape, needed)}; the file that they need instead works on one machine only: "
            "raise --memory-share, or use one machine"
        )
    store = _mapped(folder, shape, kept, needed, world) if mapped else torch.zeros(shape, dtype=kept)
    vit.eval()
    for batch in loader.batches():
        with autocast(world.device, dtype):
            features = represent(vit, vit.forward_features(batch.images), head)
        store[batch.ids_host[0] : batch.ids_host[-1] + 1] = features.to(kept).cpu()
    if mapped:
        world.barrier()
    elif world.size > 1:
        for part in store.split(max(1, _CHUNK * len(store) // needed)):
            part.copy_(
                world.sum(part.to(world.device, torch.float32))
            )  # the other ranks' rows are zero: exact
    return store


def fits(features: Tensor, device: torch.device, share: float) -> bool:
    """Whether features take no more than a share of a GPU's free memory."""
    return features.nbytes <= share * torch.cuda.mem_get_info(device)[0]


def _need(shape: tuple[int, ...], needed: int) -> str:
    return (
        f"the features of {shape[0]} images take {needed / 1e9:.1f} GB, more than the free memory that "
        "--memory-share allows"
    )


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, needed: int, world: World) -> Tensor:
    """Memory that all ranks share, in a file without a name: it ends with the last rank, however that ends."""
    path = world.share(_file(folder, needed) if world.main else None)
    if path is None:
        free = shutil.disk_usage(folder).free
        raise SharedError(
            f"{_need(shape, needed)}, and more than {folder} has room for ({free / 1e9:.1f} GB free): "
            "choose a larger disk's --output, or --augment"
        )
    try:
        store = torch.from_file(str(path), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)
        world.barrier()
    finally:
        if world.main:
            path.unlink()
    return store


def _file(folder: Path, size: int) -> Path | None:
    """A new file with its room on the disk; None where there is too little."""
    if size > shutil.disk_usage(folder).free:
        return None
    handle, name = tempfile.mkstemp(prefix=".features-", suffix=".bin", dir=folder)
    try:
        # Writing to a map of a file for which the disk has no room kills the process without a word.
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        Path(name).unlink()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return None
    finally:
        os.close(handle)
    return Path(name)


class FeatureLoader:
    """Batches of features, in the order that a `Loader` gives images in; one rank.

    Args:
        features: [n, ...].
        batch_size: b.
        device: where batches come out.
        seed: decides the order.
        train: shuffle and drop the remainder, or go through once in order.
    """

    def __init__(self, features: Tensor, *, batch_size: int, device: torch.device, seed: int, train: bool):
        self.features, self.device, self.seed, self.train = features, device, seed, train
        self._batch = batch_size

    def __len__(self) -> int:
        count = len(self.features)
        return count // self._batch if self.train else -(-count // self._batch)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on; `images` holds features."""
        count = len(self.features)
        order = permutation(count, seed=self.seed, epoch=epoch) if self.train else np.arange(count)
        for step in range(start, len(self)):
            host = order[step * self._batch : (step + 1) * self._batch]
            ids = torch.from_numpy(host)
            features = self.features[ids.to(self.features.device)].to(self.device)
            yield Batch(features, ids.to(self.device), host, 0.0)

    def close(self) -> None:
        """Nothing runs in the background."""
