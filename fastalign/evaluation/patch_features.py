"""Tokens of a frozen encoder and the labels of their patches, in memory or in memory-mapped files."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign import __version__
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Batch, Loader
from fastalign.data.transforms import Transform
from fastalign.evaluation.features import Array, ArrayFiles, as_tensor, read_features
from fastalign.evaluation.heads import TokenShape
from fastalign.evaluation.label_maps import LabelledImages, patch_labels
from fastalign.training.checkpoint_files import checksum
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError


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


def _arrays(encoder: Encoder, data: LabelledImages) -> dict[str, Array]:
    shape, count, classes = encoder.shape, len(data), len(data.classes)
    tokens = (count, shape.prefix + shape.patches, shape.width)
    return {f"tokens-{skip}": (tokens, np.uint16) for skip in encoder.skip_blocks} | {
        "union": ((count, shape.patches, -(-classes // 8)), np.uint8),
        "majority": ((count, shape.patches), np.int16),
        "whole": ((count, classes), np.bool_),
    }


def feature_files(encoder: Encoder, data: LabelledImages, folder: Path, dtype: torch.dtype) -> ArrayFiles:
    """The files of a split's features, in a subfolder of `folder` that is named by all that decides them."""
    parts = (__version__, encoder.identity, encoder.skip_blocks, encoder.spec.image_size)
    parts += (encoder.mean, encoder.std, dtype, data.fingerprint())
    code = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return ArrayFiles(folder / code, _arrays(encoder, data))


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
    """Reads a split, each rank its share, or finds it in `folder`.

    Args:
        encoder, data: the encoder, on the world's device, and the split.
        world: the ranks; they share `folder`.
        folder: of memory-mapped files; None = in memory, with one rank only.
        batch_size: images per forward pass and rank.
        threads: reading and decoding threads, and as many for label maps.
        dtype: of autocast; tokens are kept as bf16.
    """
    how = {"batch_size": batch_size, "threads": threads, "dtype": dtype}
    if folder is None:
        arrays = {name: np.zeros(*array) for name, array in _arrays(encoder, data).items()}
        _read(arrays, encoder, data, world, **how)
    else:
        files = feature_files(encoder, data, folder, dtype)
        if not all(world.gather(files.complete())):  # every rank looks before any writes
            with ExitStack() as stack, report_rank_error(world.rank):
                if world.main:
                    stack.enter_context(files.lock())
                    files.create()
                world.barrier()
                arrays = files.open(write=True)
                _read(arrays, encoder, data, world, **how)
                for array in arrays.values():
                    array.flush()
                world.barrier()
                if world.main:
                    files.finish({"backbone": encoder.identity, "images": len(data)})
                world.barrier()
        arrays = files.open(write=False)
    tokens = {skip: as_tensor(arrays[f"tokens-{skip}"]) for skip in encoder.skip_blocks}
    return PatchFeatures(tokens, arrays["union"], arrays["majority"], arrays["whole"], len(data.classes))


def _read(arrays: dict, encoder: Encoder, data: LabelledImages, world: World, **how) -> None:
    size, patch = encoder.spec.image_size, encoder.spec.patch_size
    transform = Transform(size, encoder.mean, encoder.std, interpolation="bilinear", crop="center")
    facts = {"size": size, "patch": patch, "unlabeled": data.unlabeled}

    def read_labels(index: int) -> None:
        union, majority, image = patch_labels(data.label_map(index), classes=len(data.classes), **facts)
        arrays["union"][index] = np.packbits(union, axis=-1)
        arrays["majority"][index], arrays["whole"][index] = majority, image

    def batches() -> Iterator[Batch]:
        """The images; their labels are read meanwhile."""
        for batch in loader.batches():
            labels = [pool.submit(read_labels, int(index)) for index in batch.ids_host]
            yield batch
            for label in labels:
                label.result()

    outputs = [as_tensor(arrays[f"tokens-{skip}"]) for skip in encoder.skip_blocks]
    how |= {"device": world.device, "rank": world.rank, "world_size": world.size}
    loader = Loader(data.source, transform, train=False, **how)
    with closing(loader), ThreadPoolExecutor(how["threads"]) as pool:
        read_features(encoder.encode, batches(), outputs, world.device, how["dtype"])
