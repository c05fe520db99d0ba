"""Resize, crop and flip as numbers: where each output pixel comes from, a function of (seed, epoch, id).

The modes follow timm's transforms to the rounding, so that a backbone sees what it was trained on.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalign.utils.errors import UserError
from fastalign.utils.random import Stream, random_uniform

_RRC_TRIES = 10
_PROBABILITY = 0.5
_RANDAUGMENT = re.compile(r"(rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?)*)?")


@dataclass(frozen=True)
class Transform:
    """How an image becomes an input. With `crop` "eval" or "center" nothing is random."""

    size: tuple[int, int]  # of the output, (height, width)
    mean: tuple[float, float, float]  # per channel, of values in 0..1
    std: tuple[float, float, float]  # the same
    interpolation: str = "bicubic"  # or bilinear, with antialiasing; rkrc and rrc draw one of the two
    # eval: resize the short side to size / crop_pct, centre crop. center: the largest centre crop of the size's
    # shape, in whole pixels, resized. rkrc: timm's resize-keep-ratio, then centre crop. rrc: random resized crop.
    crop: str = "eval"
    crop_pct: float = 0.9  # eval: crop size over resized short side, in (0, 1]
    # rkrc, rrc: range of the area kept, over that of the image (or of the largest centre crop).
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # rkrc, rrc: range of the aspect change, drawn log-uniformly
    hflip: float = 0.5  # probability of a horizontal flip
    color_jitter: float = 0.0  # brightness, contrast, saturation: factors of U(1 - x, 1 + x); 0 = off
    randaugment: str = ""  # timm's syntax; empty = off. Unlike timm's, it does not switch color_jitter off

    def __post_init__(self):
        policy = _RANDAUGMENT.fullmatch(self.randaugment)
        checks = (
            ("interpolation", self.interpolation in ("bilinear", "bicubic"), "bilinear or bicubic"),
            ("crop", self.crop in ("eval", "center", "rkrc", "rrc"), "eval, center, rkrc or rrc"),
            ("scale", 0 < self.scale[0] <= self.scale[1], "positive, lowest first"),
            ("ratio", 0 < self.ratio[0] <= self.ratio[1], "positive, lowest first"),
            ("randaugment", policy, "such as rand-m9-mstd0.5-inc1, without weighted sets"),
        )
        for name, valid, rule in checks:
            if not valid:
                raise UserError(f"{name}={getattr(self, name)!r}: it must be {rule}")

    @property
    def is_random(self) -> bool:
        """Whether two epochs differ."""
        return self.crop in ("rkrc", "rrc")


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the output pixels of a batch come from."""

    roi_start: np.ndarray  # [B, 2] float32: where the region begins, in source pixels (y, x)
    roi_end: np.ndarray  # [B, 2] float32: where it ends; a flip swaps the two x
    bicubic: np.ndarray  # [B] bool: not bilinear
    padded: np.ndarray  # [P] int64: the samples whose region reaches outside the image
    rows: np.ndarray  # [P, h] int64: the output row to show in each of their rows (reflection)
    columns: np.ndarray  # [P, w] int64: the same for columns


def _eval_boxes(transform: Transform, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target = np.array([math.floor(s / transform.crop_pct) for s in transform.size], dtype=np.float64)
    if target[0] == target[1]:
        short = shapes.min(axis=1, keepdims=True)
        # torchvision truncates the long side.
        resized = np.where(shapes == short, target[0], np.floor(target[0] * shapes / short))
    else:
        resized = np.rint(shapes / (shapes / target).min(axis=1, keepdims=True))
    return resized, np.rint((resized - transform.size) / 2.0)


def _rkrc_boxes(transform: Transform, shapes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = np.array(transform.size, dtype=np.float64)
    ratio = (shapes / size).min(axis=1)
    low, high = transform.scale
    zoom = np.where(draws[:, 0] < _PROBABILITY, 1 / np.sqrt(low + (high - low) * draws[:, 1]), 1.0)
    low, high = np.log(transform.ratio)
    aspect = np.where(draws[:, 2] < _PROBABILITY, np.sqrt(np.exp(low + (high - low) * draws[:, 3])), 1.0)
    factor = np.stack([zoom / aspect, zoom * aspect], axis=1)
    resized = np.maximum(np.rint(shapes * factor / ratio[:, None]), 1)
    slack = resized - size
    # Reflection pads the smaller half first; a crop rounds half to even.
    return resized, np.where(slack < 0, -np.floor(-slack / 2), np.rint(slack / 2))


def _rrc_boxes(transform: Transform, shapes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (start, extent) of the crop in source pixels, both [B, 2]."""
    height, width = shapes[:, :1], shapes[:, 1:]
    low, high = transform.scale
    areas = (low + (high - low) * draws[:, 2 : 2 + _RRC_TRIES]) * height * width
    low, high = np.log(transform.ratio)
    aspects = np.exp(low + (high - low) * draws[:, 2 + _RRC_TRIES :])
    tries = np.stack([np.rint(np.sqrt(areas / aspects)), np.rint(np.sqrt(areas * aspects))], axis=2)
    fits = ((tries > 0) & (tries <= shapes[:, None])).all(axis=2)
    first = fits.argmax(axis=1)
    extent = tries[np.arange(len(shapes)), first]
    start = np.floor(draws[:, :2] * (shapes - extent + 1))
    lowest, highest = transform.ratio
    tall = np.where(width / height < lowest, np.rint(width / lowest), height)
    wide = np.where(width / height > highest, np.rint(height * highest), width)
    fallback = np.concatenate([tall, wide], axis=1)
    found = fits.any(axis=1)[:, None]
    return np.where(found, start, (shapes - fallback) // 2), np.where(found, extent, fallback)


def _reflected(first: np.ndarray, resized: np.ndarray, count: int) -> np.ndarray:
    """Output indices that a reflect-padded axis shows. first, resized: [P]; returns [P, count]."""
    first, last = first[:, None], resized[:, None] - 1
    position = np.mod(np.arange(count) + first, np.maximum(2 * last, 1))  # there and back
    return (last - np.abs(position - last) - first).astype(np.int64)


def geometry(transform: Transform, shapes: np.ndarray, ids: np.ndarray, *, seed: int, epoch: int) -> Geometry:
    """Where a batch's output pixels come from. A sample's row depends on its own shape and id alone.

    shapes: [B, 2] int, height and width of the decoded images, B >= 1; ids: [B] int64.
    """
    shapes, size = np.asarray(shapes, dtype=np.float64), np.array(transform.size, dtype=np.float64)
    flip = np.zeros(len(shapes), dtype=bool)
    bicubic = np.full(len(shapes), transform.interpolation == "bicubic")
    if transform.is_random:
        count = 6 if transform.crop == "rkrc" else 4 + 2 * _RRC_TRIES
        stream = {"seed": seed, "stream": Stream.GEOMETRY, "epoch": epoch}
        draws = random_uniform(torch.from_numpy(ids), count, **stream).numpy()
        bicubic, flip, draws = draws[:, 0] >= _PROBABILITY, draws[:, 1] < transform.hflip, draws[:, 2:]
    resized, first = np.broadcast_to(size, shapes.shape), np.zeros(shapes.shape)
    if transform.crop == "rrc":
        start, extent = _rrc_boxes(transform, shapes, draws)
    elif transform.crop == "center":
        extent = np.minimum(shapes, np.rint((shapes / size).min(axis=1, keepdims=True) * size))
        start = (shapes - extent) // 2
    else:
        if transform.crop == "rkrc":
            resized, first = _rkrc_boxes(transform, shapes, draws)
        else:
            resized, first = _eval_boxes(transform, shapes)
        start, extent = first * (shapes / resized), size * (shapes / resized)
    end = start + extent
    start[flip, 1], end[flip, 1] = end[flip, 1], start[flip, 1].copy()
    padded = np.flatnonzero((first < 0).any(axis=1))
    rows, columns = (_reflected(first[padded, i], resized[padded, i], transform.size[i]) for i in (0, 1))
    mirrored = transform.size[1] - 1 - columns[:, ::-1]
    columns = np.where(flip[padded, None], mirrored, columns)
    return Geometry(start.astype(np.float32), end.astype(np.float32), bicubic, padded, rows, columns)


def reflect(images: Tensor, sampling: Geometry) -> Tensor:
    """Fills the pixels outside the image by reflection: [B, h, w, 3] uint8; `images` itself if nothing is padded."""
    if len(sampling.padded) == 0:
        return images
    places = sampling.padded, sampling.rows, sampling.columns
    padded, rows, columns = (torch.from_numpy(each).to(images.device) for each in places)
    images = images.clone()
    images[padded] = images[padded[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images


def normalize(images: Tensor, transform: Transform, dtype: torch.dtype) -> Tensor:
    """(value / 255 - mean) / std in float32: [B, h, w, 3] uint8 -> [B, 3, h, w] of `dtype`, contiguous."""
    mean, std = np.array(transform.mean), np.array(transform.std)
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    scale, shift = (planes.new_tensor(each).view(1, 3, 1, 1) for each in (1 / (255 * std), mean / std))
    return planes.mul_(scale).sub_(shift).to(dtype)
