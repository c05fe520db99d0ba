"""A frozen backbone's features, computed once: shared among ranks, in memory or in a file, and read as batches."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.classify.heads import represent
from fastalign.data.loader import Loader
from fastalign.data.prefetch import Batch
from fastalign.engine.distributed import World
from fastalign.engine.memory import free_memory
from fastalign.errors import UserError
from fastalign.models.precision import autocast
from fastalign.models.vit import ViT
from fastalign.random import permutation

_CHUNK = 2**26  # bytes sent between ranks at a time


@torch.no_grad()
def extract(
    vit: ViT, head: str, loader: Loader, world: World, *, dtype: torch.dtype, path: Path, share: float
) -> Tensor:
    """What a head reads, for every image of a source; each rank computes its loader's part.

    Args:
        vit: the backbone, on the rank's device.
        head: decides what is read, see `represent`.
        loader: in order, without augmentation. Ranks with equal batch sizes give the bits of one rank.
        world: all ranks.
        dtype: to compute in. Tokens are kept in it, one vector an image in float32.
        path: the file that takes them where memory is short; ranks on several machines must share it.
        share: of the free memory that the machine's ranks may take together.

    Returns:
        [n, D] or [n, T, D] on the CPU, on each rank; mapped from `path` where it was needed.

    Raises:
        UserError: neither memory nor disk has room.
    """
    tokens = () if head == "linear" else (vit.spec.prefix + vit.spec.patches,)
    kept = dtype if tokens else torch.float32
    shape = (len(loader.source), *tokens, vit.embed_dim)
    needed = int(np.prod(shape)) * kept.itemsize
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    short = torch.tensor(float(needed * ranks > share * free_memory()), device=world.device)
    mapped = bool(world.sum(short))
    store = _mapped(path, shape, kept, needed, world) if mapped else torch.zeros(shape, dtype=kept)
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


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, needed: int, world: World) -> Tensor:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"the features of {shape[0]} images take {needed / 1e9:.1f} GB, more than the free memory that "
            f"--memory-share allows and than {path.parent} has ({free / 1e9:.1f} GB): "
            "choose a larger disk's --output, or --augment"
        )
    if world.main:
        with path.open("wb") as file:
            file.truncate(needed)
    world.barrier()
    return torch.from_file(str(path), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)


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
