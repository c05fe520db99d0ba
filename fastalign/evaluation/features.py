"""Features of frozen backbones: each image is read once, into memory or into memory-mapped files."""

import errno
import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign import __version__
from fastalign.backbones.precision import autocast
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Loader
from fastalign.data.transforms import Transform
from fastalign.evaluation.heads import TokenShape
from fastalign.evaluation.label_maps import LabelledImages, patch_labels
from fastalign.training.checkpoint_files import checksum
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World, on_first_rank
from fastalign.utils.errors import UserError
from fastalign.utils.files import remove_leftovers, temporary_name

Array = tuple[tuple[int, ...], type]
"""shape and dtype; uint16 holds bf16"""


@dataclass(frozen=True)
class Encoder:
    """A frozen function from images to tokens, and the facts about it that reading and heads need."""

    encode: Callable[[Tensor], Sequence[Tensor]]
    """normalized images [B, 3, h, w] -> tokens [B, T, D], for each entry of skip_blocks"""
    skip_blocks: tuple[int, ...]  # how many of the last blocks are left out
    spec: ViTSpec  # of the backbone: image size, patches
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    identity: str  # encoders of the same identity give the same tokens

    @property
    def shape(self) -> TokenShape:
        """Of the tokens."""
        return TokenShape(self.spec.patches, self.spec.prefix, self.spec.block.width, self.spec.block.heads)


def frozen_encoder(vit: ViT, skip_blocks: Sequence[int] = (0,)) -> Encoder:
    """A backbone's tokens after the final norm, without some of its last blocks (all of them: the embedding)."""
    skip_blocks, blocks = tuple(dict.fromkeys(skip_blocks)), len(vit.blocks)
    if min(skip_blocks) < 0 or max(skip_blocks) > blocks:
        given = f"--skip-blocks {' '.join(map(str, skip_blocks))}"
        raise UserError(f"{given}: the backbone has {blocks} blocks; give numbers from 0 to {blocks}")
    vit = vit.freeze()
    identity = f"{vit.spec} {vit.softcap} {getattr(vit.norm, 'eps', None)} {checksum(vit):08x}"
    mean, std = tuple(vit.data["mean"]), tuple(vit.data["std"])
    encode = lambda images: vit.forward_layers(images, skip_blocks)  # noqa: E731
    return Encoder(encode, skip_blocks, vit.spec, mean, std, identity)


@dataclass(frozen=True)
class ArrayFiles:
    """Arrays by name, and their folder, which contains nothing else; without a folder they are in memory."""

    folder: Path | None
    arrays: dict[str, Array]

    @classmethod
    def named(cls, parent: Path | None, arrays: dict[str, Array], *parts: object) -> "ArrayFiles":
        """In a subfolder of `parent` that is named by the parts, which decide the content."""
        code = hashlib.sha256(repr((__version__, *parts)).encode()).hexdigest()[:16]
        return cls(parent and parent / code, arrays)

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in self.arrays.values())

    def complete(self) -> bool:
        """Whether the folder is there: it gets its name when all is written."""
        return self.folder is not None and self.folder.is_dir()

    def create(self) -> "ArrayFiles":
        """Empty arrays in a temporary folder, with their space allocated; UserError for too little."""
        remove_leftovers(self.folder.parent, self.folder.name)
        made = replace(self, folder=temporary_name(self.folder))
        made.folder.mkdir(parents=True)
        try:
            for name, (shape, kind) in self.arrays.items():
                np.lib.format.open_memmap(made._path(name), mode="w+", dtype=kind, shape=shape).flush()
                with made._path(name).open("r+b") as file:
                    # Writing to the map of a sparse file on a full disk kills the process with SIGBUS.
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            made.remove()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{self.folder.parent} has no space for features of {self.size / 1e9:.1f} GB; "
                "name a folder with enough space (probe --cache, classify --output)"
            ) from error
        return made

    def open(self, *, write: bool) -> dict[str, np.ndarray]:
        """The mapped arrays. Not copy-on-write: Linux counts such maps as memory."""
        return {name: np.load(self._path(name), mmap_mode="r+" if write else "r") for name in self.arrays}

    def remove(self) -> None:
        """Deletes the folder. Open maps stay valid."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor that shares its memory; uint16 holds bf16."""
    with warnings.catch_warnings():
        # torch has no read-only tensors; nobody writes to those of read-only maps.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


@torch.no_grad()
def read_features(
    files: ArrayFiles,
    encode: Callable[[Tensor], Sequence[Tensor]],
    loader: Loader,
    world: World,
    dtype: torch.dtype,
    each: Callable[[dict[str, np.ndarray], int], None] = lambda arrays, index: None,
    threads: int = 1,
) -> dict[str, np.ndarray]:
    """Fills arrays, each rank its share of a loader's images, or finds them complete.

    `encode`, under autocast of `dtype`, gives the rows of the first arrays. `each` is called for each image,
    in so many threads, and fills the others. Ranks need a folder, and share it on one machine; else UserError.
    """

    def fill(arrays: dict[str, np.ndarray]) -> None:
        outputs = [as_tensor(array) for array in arrays.values()]
        with ThreadPoolExecutor(threads) as pool:
            for batch in loader.batches():
                others = [pool.submit(each, arrays, index) for index in batch.ids.tolist()]
                with autocast(world.device, dtype):
                    found = encode(batch.images)
                for output, features in zip(outputs, found, strict=False):
                    output[batch.ids] = features.to(output.dtype).cpu()
                for other in others:
                    other.result()

    with closing(loader):
        if files.folder is None:
            arrays = {name: np.zeros(*array) for name, array in files.arrays.items()}
            fill(arrays)
            return arrays
        if world.size > int(os.environ.get("LOCAL_WORLD_SIZE", world.size)):
            raise UserError("features are in files that the ranks of one machine share: use one machine")
        if not all(world.gather(files.complete())):  # every rank looks before any writes
            with report_rank_error(world.rank):
                made = on_first_rank(world, files.create)
                try:
                    arrays = made.open(write=True)
                    fill(arrays)
                    for array in arrays.values():
                        array.flush()
                    world.barrier()
                    if world.main:
                        with suppress(OSError):  # another command was faster, with the same arrays
                            made.folder.rename(files.folder)
                    world.barrier()
                finally:
                    if world.main:
                        made.remove()
    return files.open(write=False)


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


def patch_files(
    encoder: Encoder, data: LabelledImages, folder: Path | None, dtype: torch.dtype
) -> ArrayFiles:
    """The arrays of a split's features, and their place within `folder`."""
    shape, count, classes = encoder.shape, len(data), len(data.classes)
    tokens = (count, shape.prefix + shape.patches, shape.width)
    arrays = {f"tokens-{skip}": (tokens, np.uint16) for skip in encoder.skip_blocks} | {
        "union": ((count, shape.patches, -(-classes // 8)), np.uint8),
        "majority": ((count, shape.patches), np.int16),
        "image": ((count, classes), np.bool_),
    }
    parts = (encoder.identity, encoder.skip_blocks, encoder.mean, encoder.std, dtype, data.fingerprint())
    return ArrayFiles.named(folder, arrays, *parts)


def read_patch_features(
    encoder: Encoder,
    data: LabelledImages,
    world: World,
    *,
    folder: Path | None = None,
    batch_size: int = 64,
    threads: int = 4,
    dtype: torch.dtype = torch.float32,
) -> PatchFeatures:
    """Reads a split's tokens and patch labels, each rank its share, or finds them in `folder`.

    Args:
        encoder, data: the encoder, on the world's device, and the split.
        folder: of memory-mapped files, which the ranks share; None = in memory, with one rank only.
        batch_size: images per forward pass and rank.
        threads: reading threads, and as many for decoding and for label maps.
        dtype: of autocast; tokens are kept as bf16.
    """
    size, patch = encoder.spec.image_size, encoder.spec.patch_size
    facts = {"size": size, "patch": patch, "classes": len(data.classes), "unlabeled": data.unlabeled}

    def read_labels(arrays: dict[str, np.ndarray], index: int) -> None:
        union, arrays["majority"][index], arrays["image"][index] = patch_labels(
            data.label_map(index), **facts
        )
        arrays["union"][index] = np.packbits(union, axis=-1)

    transform = Transform(size, encoder.mean, encoder.std, interpolation="bilinear", crop="center")
    how = {"device": world.device, "rank": world.rank, "world_size": world.size, "dtype": dtype}
    loader = Loader(data.source, transform, train=False, batch_size=batch_size, threads=threads, **how)
    files = patch_files(encoder, data, folder, dtype)
    arrays = read_features(files, encoder.encode, loader, world, dtype, read_labels, threads)
    tokens = {skip: as_tensor(arrays[f"tokens-{skip}"]) for skip in encoder.skip_blocks}
    return PatchFeatures(tokens, arrays["union"], arrays["majority"], arrays["image"], len(data.classes))
