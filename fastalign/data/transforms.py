"""Resize, crop and flip, as numbers: where each output pixel comes from, a pure function of (seed, epoch, id).

The modes follow timm's transforms to the rounding, so that a backbone sees at training and evaluation what its
authors showed it. Nothing here touches pixels but `reflect` and `normalize`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalign.data.randaugment import parse_randaugment
from fastalign.utils.errors import UserError
from fastalign.utils.random import Stream, random_uniform

BILINEAR, BICUBIC = 0, 1
_INTERPOLATIONS = {"bilinear": BILINEAR, "bicubic": BICUBIC}
_CROPS = ("eval", "center", "rkrc", "rrc")
_RRC_TRIES = 10
_PROBABILITY = 0.5


def _is_size(size: tuple) -> bool:
    return len(size) == 2 and all(isinstance(n, int) and n >= 1 for n in size)


@dataclass(frozen=True)
class Transform:
    """How an image becomes an input. `crop` "eval" and "center" draw nothing: every random field is left aside."""

    size: tuple[int, int]
    "Output (height, width), pixels."
    mean: tuple[float, float, float]
    "Per channel, of values in 0..1."
    std: tuple[float, float, float]
    "Per channel, of values in 0..1."
    interpolation: str = "bicubic"
    "bilinear or bicubic, with antialiasing."
    crop: str = "eval"
    """eval: resize the short side to size / crop_pct, centre crop. center: the largest centre crop of the size's
    shape, in whole pixels, resized. rkrc: timm's. rrc: random resized crop."""
    crop_pct: float = 0.9
    "eval only: crop size over resized short side, in (0, 1]."
    scale: tuple[float, float] = (0.08, 1.0)
    "rkrc, rrc: range of the area kept, over the image's (or the largest centre crop's) area."
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    "rkrc, rrc: range of the aspect change, drawn log-uniformly."
    hflip: float = 0.5
    "Probability of a horizontal flip."
    color_jitter: float = 0.0
    "Brightness, contrast and saturation factors are drawn from U(1 - x, 1 + x); 0 is off."
    randaugment: str = ""
    "timm's spelling, e.g. rand-m9-mstd0.5-inc1; empty is off. Unlike timm's, it does not switch color_jitter off."
    random_interpolation: bool = True
    "rkrc, rrc: bilinear or bicubic with probability 1/2 each, whatever `interpolation` says."

    def __post_init__(self):
        checks = (
            ("size", _is_size(self.size), "two positive integers, height and width"),
            ("mean", len(self.mean) == 3, "three numbers"),
            ("std", len(self.std) == 3 and min(self.std) > 0, "three positive numbers"),
            ("interpolation", self.interpolation in _INTERPOLATIONS, "bilinear or bicubic"),
            ("crop", self.crop in _CROPS, "eval, rkrc or rrc"),
            ("crop_pct", 0 < self.crop_pct <= 1, "in (0, 1]"),
            ("scale", 0 < self.scale[0] <= self.scale[1], "positive, lowest first"),
            ("ratio", 0 < self.ratio[0] <= self.ratio[1], "positive, lowest first"),
            ("hflip", 0 <= self.hflip <= 1, "in 0..1"),
            ("color_jitter", self.color_jitter >= 0, "0 (off) or more"),
        )
        for name, right, rule in checks:
            if not right:
                raise UserError(f"transform {name}={getattr(self, name)!r}: it must be {rule}")
        if self.randaugment:
            parse_randaugment(self.randaugment)

    @property
    def is_random(self) -> bool:
        """Whether two epochs differ."""
        return self.crop in ("rkrc", "rrc")


@dataclass(frozen=True, eq=False)
class Geometry:
    """One batch's sampling. Arrays have a row a sample; (y, x) order."""

    roi_start: np.ndarray
    "[B, 2] float32, source pixels: where the output's first corner samples. Above `roi_end` in x: flipped."
    roi_end: np.ndarray
    "[B, 2] float32, source pixels."
    interpolation: np.ndarray
    "[B] int64, BILINEAR or BICUBIC."
    padded: np.ndarray
    "[P] int64, the samples of which a part lies outside the image: `rows` and `columns` are theirs."
    rows: np.ndarray
    "[P, h] int64, the output row to show in each row (reflection)."
    columns: np.ndarray
    "[P, w] int64, likewise."


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


def _center_boxes(transform: Transform, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (start, extent) of the crop in source pixels, both [B, 2]."""
    scale = (shapes / transform.size).min(axis=1, keepdims=True)
    extent = np.minimum(shapes, np.rint(scale * transform.size))
    return (shapes - extent) // 2, extent


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
    image_ratio = width / height
    lowest, highest = min(transform.ratio), max(transform.ratio)
    fallback = np.concatenate(
        [
            np.where(image_ratio < lowest, np.rint(width / lowest), height),
            np.where(image_ratio > highest, np.rint(height * highest), width),
        ],
        axis=1,
    )
    found = fits.any(axis=1)[:, None]
    return np.where(found, start, (shapes - fallback) // 2), np.where(found, extent, fallback)


def _reflected(first: np.ndarray, resized: np.ndarray, count: int) -> np.ndarray:
    """Output indices that a reflect-padded axis shows. first, resized: [P]; returns [P, count]."""
    position = np.arange(count) + first[:, None]
    period = np.maximum(2 * (resized - 1), 1)[:, None]
    position = np.mod(position, period)
    last = (resized - 1)[:, None]
    return (np.minimum(np.where(position > last, period - position, position), last) - first[:, None]).astype(
        np.int64
    )


def geometry(transform: Transform, shapes: np.ndarray, ids: np.ndarray, *, seed: int, epoch: int) -> Geometry:
    """Where a batch's output pixels come from.

    Args:
        transform: the transform.
        shapes: [B, 2] int, height and width of the decoded images.
        ids: [B] int64, sample ids.
        seed: of the run.
        epoch: 0..2^32-1.

    Returns:
        The geometry. A sample's row depends on its own shape and id alone.
    """
    shapes = np.asarray(shapes, dtype=np.float64)
    size = np.array(transform.size, dtype=np.float64)
    batch, flip = len(shapes), np.zeros(len(shapes), dtype=bool)
    interpolation = np.full(batch, _INTERPOLATIONS[transform.interpolation], dtype=np.int64)
    if transform.is_random:
        count = 2 + (4 if transform.crop == "rkrc" else 2 + 2 * _RRC_TRIES)
        draws = random_uniform(
            torch.from_numpy(ids), count, seed=seed, stream=Stream.GEOMETRY, epoch=epoch
        ).numpy()
        flip = draws[:, 1] < transform.hflip
        if transform.random_interpolation:
            interpolation = np.where(draws[:, 0] < _PROBABILITY, BILINEAR, BICUBIC)
    if transform.crop in ("rrc", "center"):
        if transform.crop == "rrc":
            start, extent = _rrc_boxes(transform, shapes, draws[:, 2:])
        else:
            start, extent = _center_boxes(transform, shapes)
        resized, first = np.repeat(size[None], batch, axis=0), np.zeros_like(start)
    else:
        if transform.crop == "rkrc":
            resized, first = _rkrc_boxes(transform, shapes, draws[:, 2:])
        else:
            resized, first = _eval_boxes(transform, shapes)
        start, extent = first * (shapes / resized), size * (shapes / resized)
    end = start + extent
    start[flip, 1], end[flip, 1] = end[flip, 1], start[flip, 1].copy()
    padded = np.flatnonzero((first < 0).any(axis=1))
    rows = _reflected(first[padded, 0], resized[padded, 0], transform.size[0])
    columns = _reflected(first[padded, 1], resized[padded, 1], transform.size[1])
    mirrored = transform.size[1] - 1 - columns[:, ::-1]
    columns = np.where(flip[padded, None], mirrored, columns)
    return Geometry(start.astype(np.float32), end.astype(np.float32), interpolation, padded, rows, columns)


def reflect(images: Tensor, sampling: Geometry) -> Tensor:
    """Fills what lies outside the image by reflection, for the samples that need it.

    Args:
        images: [B, h, w, 3] uint8.
        sampling: the batch's geometry.

    Returns:
        [B, h, w, 3] uint8, `images` itself when no sample is padded.
    """
    if len(sampling.padded) == 0:
        return images
    place = [
        torch.from_numpy(a).to(images.device) for a in (sampling.padded, sampling.rows, sampling.columns)
    ]
    padded, rows, columns = place
    images = images.clone()
    images[padded] = images[padded[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images


def normalize(images: Tensor, transform: Transform, dtype: torch.dtype) -> Tensor:
    """(value / 255 - mean) / std, computed in float32.

    Args:
        images: [B, h, w, 3] uint8.
        transform: has mean and std.
        dtype: of the result.

    Returns:
        [B, 3, h, w], contiguous.
    """
    mean = torch.tensor(transform.mean, dtype=torch.float64)
    std = torch.tensor(transform.std, dtype=torch.float64)
    scale, shift = (1 / (255 * std)).float(), (mean / std).float()
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    shape = (1, 3, 1, 1)
    planes.mul_(scale.to(images.device).view(shape)).sub_(shift.to(images.device).view(shape))
    return planes.to(dtype)
