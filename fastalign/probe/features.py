"""Tokens of a frozen backbone and the labels of their patches, read once.

They are kept as bf16 in memory, or in memory-mapped files that later probes of the same backbone find again.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign import __version__
from fastalign.backbones.precision import autocast
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Loader
from fastalign.data.transforms import Transform
from fastalign.evaluation.datasets import LabelledImages
from fastalign.probe.cache import Files
from fastalign.probe.heads import TokenShape
from fastalign.probe.labels import patch_labels
from fastalign.training.checkpoint_files import checksum
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError


@dataclass(frozen=True)
class Probed:
    """What is probed: a function from images to tokens, and what one must know of it."""

    encode: Callable[[Tensor], Sequence[Tensor]]
    """normalised images [B, 3, h, w] -> one or more sets of tokens [B, T, D]"""
    sets: tuple[int, ...]
    """for each set of tokens, how many of the last blocks were left out"""
    shape: TokenShape
    size: tuple[int, int]
    patch: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    identity: str
    """two of the same identity give the same tokens"""


def probed_backbone(vit: ViT, skip_blocks: Sequence[int] = (0,)) -> Probed:
    """A backbone, read with so many of its last blocks left out (0 = none, all of them = the embedding, normed).

    Raises:
        UserError: `skip_blocks` that the backbone has not got.
    """
    skip_blocks = list(dict.fromkeys(skip_blocks))
    if not skip_blocks or min(skip_blocks) < 0 or max(skip_blocks) > len(vit.blocks):
        raise UserError(
            f"--skip-blocks {' '.join(map(str, skip_blocks))}: the backbone has {len(vit.blocks)} blocks; "
            f"give numbers from 0 to {len(vit.blocks)}"
        )
    vit = vit.freeze()
    spec = vit.spec
    return Probed(
        encode=lambda images: vit.forward_layers(images, skip_blocks),
        sets=tuple(skip_blocks),
        shape=TokenShape(spec.patches, spec.prefix, spec.block.width, spec.block.heads),
        size=spec.image_size,
        patch=spec.patch_size,
        mean=tuple(vit.data["mean"]),
        std=tuple(vit.data["std"]),
        identity=f"{spec} {vit.softcap} {getattr(vit.norm, 'eps', None)} {checksum(vit):08x}",
    )


@dataclass(frozen=True)
class Features:
    """A split, read. Rows are images in the source's order; arrays may be memory-mapped."""

    tokens: dict[int, Tensor]
    """[n, T, D] bf16 by blocks left out"""
    union: np.ndarray
    """[n, N, ceil(C / 8)] uint8, packed bits"""
    majority: np.ndarray
    """[n, N] int16"""
    whole: np.ndarray
    """[n, C] bool"""
    classes: int

    def __len__(self) -> int:
        return len(self.majority)

    def labels(self, rows: np.ndarray, kind: str) -> Tensor:
        """The labels of some images: bool [b, N, C], for `majority` int64 [b, N]; for `global-union` [b, 1, C]."""
        if kind == "majority":
            return torch.from_numpy(self.majority[rows].astype(np.int64))
        if kind == "union":
            bits = np.unpackbits(self.union[rows], axis=-1, count=self.classes)
            return torch.from_numpy(bits.astype(bool))
        whole = torch.from_numpy(self.whole[rows]).unsqueeze(1)
        return whole.expand(-1, self.majority.shape[1], -1) if kind == "global-in-patch" else whole


def _arrays(probed: Probed, count: int, classes: int) -> dict[str, tuple[tuple[int, ...], type]]:
    shape = probed.shape
    tokens = (count, shape.prefix + shape.patches, shape.width)
    arrays = {f"tokens-{name}": (tokens, np.uint16) for name in probed.sets}
    return arrays | {
        "union": ((count, shape.patches, -(-classes // 8)), np.uint8),
        "majority": ((count, shape.patches), np.int16),
        "whole": ((count, classes), np.bool_),
    }


def feature_files(probed: Probed, data: LabelledImages, folder: Path, dtype: torch.dtype) -> Files:
    """Where a split's features are kept within `folder`: a place for all that decides them."""
    parts = (__version__, probed.identity, probed.sets, probed.size, probed.mean, probed.std, dtype)
    parts += (data.fingerprint(),)
    place = folder / hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return Files(place, _arrays(probed, len(data.source), len(data.classes)))


def read_features(
    probed: Probed,
    data: LabelledImages,
    world: World,
    *,
    folder: Path | None = None,
    batch_size: int = 64,
    threads: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Features:
    """Reads a split through the backbone, each rank its share, or finds it read already.

    Images are cut to their largest centre square and resized (bilinear, antialiased), label maps likewise by
    nearest neighbour; nothing is augmented.

    Args:
        probed: what is probed; on the world's device.
        data: the split.
        world: the ranks; they share `folder`.
        folder: where memory-mapped files are kept; None = in memory, which one rank alone can do.
        batch_size: images a forward pass of a rank.
        threads: reading and decoding threads, and as many for label maps.
        dtype: bf16 computes under autocast, fp32 without; tokens are kept as bf16.

    Raises:
        UserError: bad images or label maps, or too little room for the files.
    """
    if folder is None:
        wanted = _arrays(probed, len(data.source), len(data.classes))
        arrays = {name: np.zeros(shape, kind) for name, (shape, kind) in wanted.items()}
        _read_into(arrays, probed, data, world, batch_size, threads, dtype)
        return _features(arrays, probed, len(data.classes))
    files = feature_files(probed, data, folder, dtype)
    here = files.complete()
    # Nobody may begin to write while somebody still looks, so all look first.
    if not (world.agree(int(here)) and here):
        with ExitStack() as stack, report_rank_error(world.rank):
            if world.main:
                stack.enter_context(files.claimed())
                files.make()
            world.barrier()
            arrays = files.open(write=True)
            _read_into(arrays, probed, data, world, batch_size, threads, dtype)
            for array in arrays.values():
                array.flush()
            world.barrier()
            if world.main:
                files.finish({"backbone": probed.identity, "images": len(data.source)})
            world.barrier()
    return _features(files.open(write=False), probed, len(data.classes))


def _features(arrays: dict[str, np.ndarray], probed: Probed, classes: int) -> Features:
    with warnings.catch_warnings():
        # torch has no read-only tensors; nobody writes to these.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tokens = {
            name: torch.from_numpy(arrays[f"tokens-{name}"]).view(torch.bfloat16) for name in probed.sets
        }
    return Features(tokens, arrays["union"], arrays["majority"], arrays["whole"], classes)


@torch.no_grad()
def _read_into(
    arrays: dict[str, np.ndarray],
    probed: Probed,
    data: LabelledImages,
    world: World,
    batch_size: int,
    threads: int,
    dtype: torch.dtype,
) -> None:
    transform = Transform(
        size=probed.size, mean=probed.mean, std=probed.std, interpolation="bilinear", crop="center"
    )
    loader = Loader(
        data.source,
        transform,
        train=False,
        batch_size=batch_size,
        device=world.device,
        dtype=dtype,
        rank=world.rank,
        world_size=world.size,
        threads=threads,
    )
    classes = len(data.classes)

    def labels_of(index: int) -> None:
        found = patch_labels(
            data.label_map(index),
            size=probed.size,
            patch=probed.patch,
            classes=classes,
            unlabeled=data.unlabeled,
        )
        arrays["union"][index] = np.packbits(found.union, axis=-1)
        arrays["majority"][index], arrays["whole"][index] = found.majority, found.whole

    try:
        with ThreadPoolExecutor(threads) as pool:
            for batch in loader.batches():
                labels = [pool.submit(labels_of, int(index)) for index in batch.ids_host]
                with autocast(world.device, dtype):
                    sets = probed.encode(batch.images)
                for name, tokens in zip(probed.sets, sets, strict=True):
                    kept = tokens.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
                    arrays[f"tokens-{name}"][batch.ids_host] = kept
                for label in labels:
                    label.result()
    finally:
        loader.close()
