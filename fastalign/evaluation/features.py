"""Features of frozen backbones: each image is read once, into memory or into memory-mapped files."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from fastalign.backbones.precision import autocast
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Loader
from fastalign.data.transforms import Transform
from fastalign.evaluation.fit import Track, untracked
from fastalign.evaluation.label_maps import LabelledImages, patch_labels
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World, on_first_rank
from fastalign.utils.errors import SharedError, UserError

Arrays = dict[str, np.ndarray]
Layout = dict[str, tuple[tuple[int, ...], type]]
"""shape and dtype of arrays by name; uint16 holds bf16"""


@dataclass(frozen=True)
class Encoder:
    """A frozen function from images to tokens, and the facts about it that reading and heads need."""

    encode: Callable[[Tensor], Sequence[Tensor]]
    """normalized images [B, 3, h, w] -> tokens [B, T, D], for each entry of skip_blocks"""
    skip_blocks: tuple[int, ...]  # how many of the last blocks are left out
    spec: ViTSpec  # of the backbone: image size, patches
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def frozen_encoder(vit: ViT, skip_blocks: Sequence[int] = (0,)) -> Encoder:
    """A backbone's tokens after the final norm, without some of its last blocks (all of them: the embedding)."""
    skip_blocks, blocks = tuple(dict.fromkeys(skip_blocks)), len(vit.blocks)
    if min(skip_blocks) < 0 or max(skip_blocks) > blocks:
        given = f"--skip-blocks {' '.join(map(str, skip_blocks))}"
        raise UserError(f"{given}: the backbone has {blocks} blocks; give numbers from 0 to {blocks}")
    vit = vit.freeze()
    encode = lambda images: vit.forward_layers(images, skip_blocks)  # noqa: E731
    return Encoder(encode, skip_blocks, vit.spec, tuple(vit.data["mean"]), tuple(vit.data["std"]))


def make_arrays(layout: Layout, folder: Path | None, world: World) -> Arrays:
    """Arrays of zeros: in memory, or mapped from nameless files in `folder`, which the ranks of one machine share.

    The space of the files is free when their last array is dropped, and when the process ends, however it ends.
    """
    if folder is None:
        return {name: np.zeros(*array) for name, array in layout.items()}
    if world.size > int(os.environ.get("LOCAL_WORLD_SIZE", world.size)):
        raise UserError("features are in files that the ranks of one machine share: use one machine")
    sizes = {name: math.prod(shape) * np.dtype(kind).itemsize for name, (shape, kind) in layout.items()}
    with ExitStack() as files:

        def allocate() -> dict[str, str]:
            folder.mkdir(parents=True, exist_ok=True)
            handles = {name: files.enter_context(TemporaryFile(dir=folder)).fileno() for name in layout}
            for name, handle in handles.items():
                # Writing to the map of a sparse file on a full disk kills the process with SIGBUS.
                os.posix_fallocate(handle, 0, sizes[name])
            return {name: f"/proc/{os.getpid()}/fd/{handle}" for name, handle in handles.items()}

        try:
            paths = on_first_rank(world, allocate)
        except SharedError as error:
            text = f"{folder} cannot hold features of {sum(sizes.values()) / 1e9:.1f} GB: {error}"
            raise SharedError(f"{text}; name another folder (probe --cache, classify --output)") from error
        # Not copy-on-write: Linux counts such maps as memory.
        arrays = {
            name: np.memmap(paths[name], kind, "r+", shape=shape) for name, (shape, kind) in layout.items()
        }
        world.barrier()
    return arrays


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor that shares its memory; uint16 holds bf16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


@torch.no_grad()
def read_features(
    layout: Layout,
    encode: Callable[[Tensor], Sequence[Tensor]],
    loader: Loader,
    world: World,
    dtype: torch.dtype,
    *,
    folder: Path | None,
    each: Callable[[Arrays, int], None] = lambda arrays, index: None,
    threads: int = 1,
    track: Track = untracked,
) -> Arrays:
    """New arrays, filled by each rank for its share of a loader's images; `folder`: of `make_arrays`.

    `encode`, under autocast of `dtype`, gives the rows of the first arrays. `each` is called for each image, in so
    many threads, and fills the others. Several ranks need a folder.
    """
    with closing(loader), report_rank_error(world.rank), ThreadPoolExecutor(threads) as pool:
        arrays = make_arrays(layout, folder, world)
        outputs = [as_tensor(array) for array in arrays.values()]
        for batch in track(loader.batches(), f"features of {len(loader.source)} images", len(loader)):
            others = [pool.submit(each, arrays, index) for index in batch.ids.tolist()]
            with autocast(world.device, dtype):
                found = encode(batch.images)
            for output, features in zip(outputs, found, strict=False):
                output[batch.ids] = features.to(output.dtype).cpu()
            for other in others:
                other.result()
    world.barrier()
    return arrays


@dataclass(frozen=True)
class PatchFeatures:
    """A split's tokens and labels of patches; row i is image i. Arrays may be memory-mapped."""

    tokens: dict[int, Tensor]  # [n, T, D] bf16 by blocks left out
    union: np.ndarray  # [n, N, ceil(C / 8)] uint8, packed bits
    majority: np.ndarray  # [n, N] int16
    image: np.ndarray  # [n, C] bool
    classes: int

    def __len__(self) -> int:
        return len(self.majority)

    def labels(self, rows: np.ndarray, kind: str) -> Tensor:
        """Labels of some images: int64 [b, N] for `majority`, bool [b, 1, C] for `global-union`, else [b, N, C]."""
        if kind == "majority":
            return torch.from_numpy(self.majority[rows].astype(np.int64))
        if kind == "union":
            bits = np.unpackbits(self.union[rows], axis=-1, count=self.classes)
            return torch.from_numpy(bits.astype(bool))
        image = torch.from_numpy(self.image[rows]).unsqueeze(1)
        return image.expand(-1, self.majority.shape[1], -1) if kind == "global-in-patch" else image


def read_patch_features(
    encoder: Encoder,
    data: LabelledImages,
    world: World,
    *,
    folder: Path | None = None,
    batch_size: int = 64,
    threads: int = 4,
    dtype: torch.dtype = torch.float32,
    track: Track = untracked,
) -> PatchFeatures:
    """Reads a split's tokens, kept as bf16, and patch labels, each rank its share.

    Args:
        encoder, data: the encoder, on the world's device, and the split.
        folder: of memory-mapped files, which the ranks share; None = in memory, with one rank only.
        batch_size: images per forward pass and rank.
        threads: reading threads, and as many for decoding and for label maps.
        dtype: of autocast.
    """
    spec, count, classes = encoder.spec, len(data), len(data.classes)
    size, patch = spec.image_size, spec.patch_size
    tokens = {skip: f"tokens-{skip}" for skip in encoder.skip_blocks}
    layout = dict.fromkeys(
        tokens.values(), ((count, spec.prefix + spec.patches, spec.block.width), np.uint16)
    ) | {
        "union": ((count, spec.patches, -(-classes // 8)), np.uint8),
        "majority": ((count, spec.patches), np.int16),
        "image": ((count, classes), np.bool_),
    }

    def read_labels(arrays: Arrays, index: int) -> None:
        facts = {"size": size, "patch": patch, "classes": classes, "unlabeled": data.unlabeled}
        union, arrays["majority"][index], arrays["image"][index] = patch_labels(
            data.label_map(index), **facts
        )
        arrays["union"][index] = np.packbits(union, axis=-1)

    transform = Transform(size, encoder.mean, encoder.std, interpolation="bilinear", crop="center")
    how = {"device": world.device, "rank": world.rank, "world_size": world.size, "dtype": dtype}
    loader = Loader(data.source, transform, train=False, batch_size=batch_size, threads=threads, **how)
    more = {"folder": folder, "each": read_labels, "threads": threads, "track": track}
    arrays = read_features(layout, encoder.encode, loader, world, dtype, **more)
    found = {skip: as_tensor(arrays[name]) for skip, name in tokens.items()}
    return PatchFeatures(found, arrays["union"], arrays["majority"], arrays["image"], classes)
