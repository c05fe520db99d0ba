"""Augmentation on the device: colour jitter and RandAugment on uint8 batches, mixup and cutmix on normalised ones.

Colour jitter and RandAugment are pure functions of (seed, epoch, sample id). Mixup and cutmix pair the samples of
one batch, so they also depend on the batch, and hence on the number of ranks.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from fastalign.data.randaugment import (
    DRAWS_PER_LAYER,
    blend,
    gray,
    mean_gray,
    parse_randaugment,
    rand_augment,
)
from fastalign.data.transforms import Transform
from fastalign.utils.random import Stream, random_uniform, random_words

_JITTER_DRAWS = 4
_ORDERS = list(itertools.permutations(range(3)))
# What brightness, contrast and saturation blend with: black, the mean grey, the image without colour.
_LESS_OF = (lambda _: 0, mean_gray, gray)


def color_jitter(images: Tensor, strength: float, draws: np.ndarray) -> Tensor:
    """Brightness, contrast and saturation, in a random order, each by a factor of U(1 - strength, 1 + strength).

    Args:
        images: [B, 3, h, w] uint8.
        strength: > 0; the factors' lower bound is 0.
        draws: [B, 4] float64 in [0, 1): the order, then a factor an op.

    Returns:
        [B, 3, h, w] uint8.
    """
    lowest = max(0.0, 1 - strength)
    factors = torch.from_numpy(lowest + (1 + strength - lowest) * draws[:, 1:4]).to(
        images.device, torch.float32
    )
    orders = np.array(_ORDERS)[(draws[:, 0] * len(_ORDERS)).astype(np.int64)]
    images = images.clone()
    for position, op in itertools.product(range(3), range(3)):
        chosen = torch.from_numpy(np.flatnonzero(orders[:, position] == op)).to(images.device)
        if len(chosen) == 0:
            continue
        part = images[chosen]
        other = _LESS_OF[op](part)
        images[chosen] = blend(part, other, factors[chosen, op].view(-1, 1, 1, 1))
    return images


def augment(images: Tensor, transform: Transform, ids: np.ndarray, *, seed: int, epoch: int) -> Tensor:
    """Applies the transform's RandAugment, then its colour jitter.

    Args:
        images: [B, h, w, 3] uint8.
        transform: the transform; with `crop="eval"` nothing is done.
        ids: [B] int64, sample ids, on the host.
        seed: of the run.
        epoch: 0..2^32-1.

    Returns:
        [B, h, w, 3] uint8.
    """
    if not transform.is_random or not (transform.randaugment or transform.color_jitter):
        return images
    policy = parse_randaugment(transform.randaugment) if transform.randaugment else None
    count = _JITTER_DRAWS + (policy.layers * DRAWS_PER_LAYER if policy else 0)
    draws = random_uniform(
        torch.from_numpy(ids), count, seed=seed, stream=Stream.AUGMENT, epoch=epoch
    ).numpy()
    planes = images.permute(0, 3, 1, 2).contiguous()
    if policy:
        red, green, blue = (min(255, round(255 * m)) for m in transform.mean)
        rows = draws[:, _JITTER_DRAWS:].tolist()
        made = [rand_augment(p, policy, row, (red, green, blue)) for p, row in zip(planes, rows, strict=True)]
        planes = torch.stack(made)
    if transform.color_jitter:
        planes = color_jitter(planes, transform.color_jitter, draws)
    return planes.permute(0, 2, 3, 1)


def _generator(ids: np.ndarray, seed: int, epoch: int) -> np.random.Generator:
    first = torch.from_numpy(np.asarray(ids)[:1])
    words = random_words(first, 4, seed=seed, stream=Stream.MIX, epoch=epoch)[0].numpy().astype(np.uint64)
    key = np.array(
        [words[0] | words[1] << np.uint64(32), words[2] | words[3] << np.uint64(32)], dtype=np.uint64
    )
    return np.random.Generator(np.random.Philox(key=key))


def blend_pairs(images: Tensor, weight: float) -> Tensor:
    """weight * images + (1 - weight) * the batch reversed. [B, 3, h, w], any float dtype."""
    return torch.lerp(images.flip(0), images, weight)


def cut_box(height: int, width: int, weight: float, center: tuple[int, int]) -> tuple[int, int, int, int]:
    """timm's cutmix box: sides sqrt(1 - weight) of the image's, clipped at its border.

    Returns:
        (top, bottom, left, right), the ends exclusive.
    """
    side = (1 - weight) ** 0.5
    tall, wide = int(height * side), int(width * side)
    y, x = center
    top, bottom = max(y - tall // 2, 0), min(y + (tall + 1) // 2, height)
    return top, bottom, max(x - wide // 2, 0), min(x + (wide + 1) // 2, width)


def paste_pairs(images: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """A copy with the box of each image taken from the batch reversed. [B, 3, h, w]."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed


def mix(
    images: Tensor, ids: np.ndarray, *, mixup: float, cutmix: float, seed: int, epoch: int
) -> tuple[Tensor, float]:
    """Mixup or cutmix of a batch with itself reversed, timm's batch mode; each with probability 1/2 when both are on.

    Args:
        images: [B, 3, h, w], normalised.
        ids: [B] int64 on the host; the first one decides the draws.
        mixup: alpha of Beta(alpha, alpha); 0 is off.
        cutmix: likewise.
        seed: of the run.
        epoch: 0..2^32-1.

    Returns:
        The mixed images, and the weight that the batch's own images kept (after clipping the box).
    """
    if len(images) == 0 or not (mixup > 0 or cutmix > 0):
        return images, 1.0
    draw = _generator(ids, seed, epoch)
    use_cutmix = cutmix > 0 and (mixup <= 0 or draw.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    weight = float(draw.beta(alpha, alpha))
    if not use_cutmix:
        return blend_pairs(images, weight), weight
    height, width = images.shape[-2:]
    center = (int(draw.integers(height)), int(draw.integers(width)))
    top, bottom, left, right = box = cut_box(height, width, weight, center)
    return paste_pairs(images, box), 1 - (bottom - top) * (right - left) / (height * width)
