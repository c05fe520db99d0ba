"""The pictures of a report: as the backbone sees them, and as people do."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import transform
from fastalign.data.index import IMAGE_EXTENSIONS
from fastalign.data.source import Source, SyntheticSource
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform, geometry
from fastalign.utils.errors import UserError

SHOWN = 256
"""Pixels of a shown picture's longer side, at least."""


@dataclass(frozen=True)
class Pictures:
    """Pictures with what was read of them. B pictures."""

    names: list[str]
    inputs: Tensor
    """[B, 3, height, width] float32, normalised"""
    shown: list[Image.Image]
    """the same cut, at least `SHOWN` pixels on the longer side"""


def pick(wanted: int | list[str], data: str | None, vit: ViT) -> Pictures:
    """Pictures for a report.

    Args:
        wanted: how many of `data`, evenly spread; or image files.
        data: image folder, tar shards or ``synthetic:COUNT``; not read where files are given.
        vit: whose size and constants the inputs get.

    Raises:
        UserError: data or a picture that cannot be read.
    """
    if not isinstance(wanted, int):
        return _prepared(wanted, [_from_file(path) for path in wanted], vit)
    if data is None:
        raise UserError("the run names no data set; give pictures, --images FILE ...")
    source = open_source(data)
    try:
        ids = torch.linspace(0, len(source) - 1, min(wanted, len(source))).long()
        names = [_short(source.name(index)) for index in ids.tolist()]
        if isinstance(source, SyntheticSource):
            inputs = source.images(ids, vit.spec.image_size, seed=0, dtype=torch.float32)
            return Pictures(names, inputs, [_synthetic(image) for image in inputs])
        return _prepared(names, [_from_source(source, index) for index in ids.tolist()], vit)
    finally:
        source.close()


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _from_source(source: Source, index: int) -> Image.Image:
    return _decode(source.read(index).tobytes(), source.name(index))


def _from_file(path: str) -> Image.Image:
    if not Path(path).is_file() or Path(path).suffix.lower() not in IMAGE_EXTENSIONS:
        raise UserError(
            f"--images {path}: it is no image file; give a number, or files ({' '.join(IMAGE_EXTENSIONS)})"
        )
    return _decode(Path(path).read_bytes(), f"--images {path}")


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not an image that can be read: remove it, or give others") from error


def _prepared(names: list[str], images: list[Image.Image], vit: ViT) -> Pictures:
    read = transform(vit)
    inputs = torch.stack([read(image) for image in images])
    return Pictures([_short(name) for name in names], inputs, [_larger(image, vit) for image in images])


def _larger(image: Image.Image, vit: ViT) -> Image.Image:
    """What the backbone sees of an image, with more pixels."""
    crop = Transform(vit.spec.image_size, crop="eval", **vit.data)
    shape = np.array([[image.height, image.width]])
    place = geometry(crop, shape, np.zeros(1, np.int64), seed=0, epoch=0)
    size = np.array(vit.spec.image_size)
    # A remainder that is no whole patch is not read, and not shown.
    read = np.array(vit.spec.grid) * vit.spec.patch_size
    start, end = place.roi_start[0].astype(float), place.roi_end[0].astype(float)
    end = (start + (end - start) * read / size).clip(0, shape[0])
    start = start.clip(0, end)
    factor = max(1, -(-SHOWN // max(size)))
    height, width = (int(n) for n in factor * read)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(start[1], start[0], end[1], end[0]))


def _synthetic(image: Tensor) -> Image.Image:
    levels = ((image + 3) * (255 / 6)).clamp(0, 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))
