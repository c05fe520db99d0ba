"""Features of frozen backbones: each image is read once, into memory or into memory-mapped files."""

import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from fastalign.backbones.precision import autocast
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Loader
from fastalign.data.sources import Source
from fastalign.data.transforms import Transform
from fastalign.evaluation.fit import Track, untracked
from fastalign.evaluation.label_maps import LabelledImages, patch_labels
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World, on_first_rank
from fastalign.utils.errors import SharedError, UserError


def make_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None, world: World) -> Tensor:
    """Zeros: in memory, or mapped from an unnamed file in `folder` that a machine's ranks share.

    The file's space is freed when the tensor is dropped or the process ends, even if it is killed.
    """
    if folder is None:
        if world.size > 1:
            raise UserError("several ranks share features in files: give an output")
        return torch.zeros(shape, dtype=dtype)
    if world.size > int(os.environ.get("LOCAL_WORLD_SIZE", world.size)):
        raise UserError("features are in files that the ranks of one machine share: use one machine")
    size = math.prod(shape) * dtype.itemsize
    with ExitStack() as stack:

        def allocate() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(TemporaryFile(dir=folder)).fileno()
            # Writing to the map of a sparse file on a full disk kills the process with SIGBUS.
            os.posix_fallocate(handle, 0, size)
            return f"/proc/{os.getpid()}/fd/{handle}"

        try:
            path = on_first_rank(world, allocate)
        except SharedError as error:
            about = f"{folder} cannot hold features of {size / 1e9:.1f} GB ({error})"
            raise SharedError(f"{about}; name another folder: probe --cache, classify --output") from error
        # Shared, because Linux counts copy-on-write maps as memory.
        tensor = torch.from_file(path, True, math.prod(shape), dtype=dtype).view(shape)
        world.barrier()
    return tensor


@torch.no_grad()
def read_features(
    encode: Callable[[Tensor], Sequence[Tensor]],
    outputs: Sequence[Tensor],
    source: Source,
    transform: Transform,
    world: World,
    *,
    batch_size: int = 64,  # images per forward pass and rank
    threads: int = 4,  # for reading, and as many for decoding and for `each`
    dtype: torch.dtype = torch.float32,  # of autocast
    track: Track = untracked,
    each: Callable[[int], None] = lambda index: None,  # called with the id of each image
) -> None:
    """Fill rows of outputs with the features of a source's images; each rank does its share."""
    how = {"device": world.device, "rank": world.rank, "world_size": world.size, "dtype": dtype}
    loader = Loader(source, transform, train=False, batch_size=batch_size, threads=threads, **how)
    with closing(loader), report_rank_error(world.rank), ThreadPoolExecutor(threads) as pool:
        for batch in track(loader.batches(), f"features of {len(source)} images", len(loader)):
            others = pool.map(each, batch.ids.tolist())
            with autocast(world.device, dtype):
                found = encode(batch.images)
            for output, features in zip(outputs, found, strict=True):
                output[batch.ids] = features.to(output.dtype).cpu()
            deque(others, maxlen=0)  # raises their errors
    world.barrier()


@dataclass(frozen=True)
class PatchFeatures:
    """A split's tokens and labels of patches; row i is image i. Tensors may be memory-mapped."""

    tokens: dict[int, Tensor]  # number of last blocks skipped -> [n, T, D] bf16
    union: Tensor  # [n, N, ceil(C / 8)] uint8, packed bits
    majority: Tensor  # [n, N] int16
    image: Tensor  # [n, C] bool
    classes: int

    def __len__(self) -> int:
        return len(self.majority)

    def labels(self, rows: Tensor, kind: str) -> Tensor:
        """Labels of some images: int64 [b, N] for `majority`, bool [b, 1, C] for `global-union`, else [b, N, C]."""
        if kind == "majority":
            return self.majority[rows].long()
        if kind == "union":
            bits = np.unpackbits(self.union[rows].numpy(), axis=-1, count=self.classes)
            return torch.from_numpy(bits).bool()
        image = self.image[rows].unsqueeze(1)
        return image.expand(-1, self.majority.shape[1], -1) if kind == "global-in-patch" else image


def read_patch_features(
    vit: ViT, data: LabelledImages, world: World, *, skip_blocks=(0,), folder: Path | None = None, **reading
) -> PatchFeatures:
    """Read a split's patch labels and its tokens after the final norm, kept as bf16; each rank does its share.

    The backbone is in evaluation mode and on the world's device. There are tokens for each entry of `skip_blocks`,
    the number of last blocks to leave out (all: the embedding). `folder` is that of `make_tensor`.
    """
    spec, count, classes = vit.spec, len(data), len(data.classes)
    make = partial(make_tensor, folder=folder, world=world)
    shape = count, spec.prefix + spec.patches, spec.block.width
    features = PatchFeatures(
        tokens={skip: make(shape, torch.bfloat16) for skip in dict.fromkeys(skip_blocks)},
        union=make((count, spec.patches, -(-classes // 8)), torch.uint8),
        majority=make((count, spec.patches), torch.int16),
        image=make((count, classes), torch.bool),
        classes=classes,
    )
    about = {"size": spec.image_size, "patch": spec.patch_size, "classes": classes}

    def read_labels(index: int) -> None:
        union, majority, image = patch_labels(data.label_map(index), unlabeled=data.unlabeled, **about)
        features.union[index] = torch.from_numpy(np.packbits(union, axis=-1))
        features.majority[index] = torch.from_numpy(majority)
        features.image[index] = torch.from_numpy(image)

    mean, std = (tuple(vit.data[name]) for name in ("mean", "std"))
    transform = Transform(spec.image_size, mean, std, interpolation="bilinear", crop="center")
    encode = lambda images: vit.forward_layers(images, tuple(features.tokens))  # noqa: E731
    outputs = list(features.tokens.values())
    read_features(encode, outputs, data.source, transform, world, each=read_labels, **reading)
    return features
