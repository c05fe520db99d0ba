"""Augmentation on the device: RandAugment and colour jitter of uint8 batches, mixup and cutmix of normalized ones.

RandAugment and colour jitter are functions of (seed, epoch, sample id), in integer arithmetic where PIL uses it, so
that an image comes out the same on every device. Two things differ from PIL: bicubic sampling uses a = -0.75 (PIL:
-1), and bilinear sampling may round to a neighbouring level. Mixup and cutmix depend on the batch.
"""

import itertools
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastalign.data.transforms import Transform
from fastalign.utils.random import Stream, random_uniform, random_words

_JITTER_DRAWS, _LAYER_DRAWS = 4, 6
_MAX_LEVEL, _TRANSLATE = 10.0, 0.45  # timm's


def _gray(images: Tensor) -> Tensor:
    """Luma of ITU-R 601-2 as PIL rounds it: [..., 3, h, w] uint8 -> [..., 1, h, w] int32."""
    red, green, blue = images.to(torch.int32).unbind(-3)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).unsqueeze(-3)


def _mean_gray(images: Tensor) -> Tensor:
    """Rounded mean luma of each image: [..., 3, h, w] uint8 -> [..., 1, 1, 1] int32."""
    luma = _gray(images)
    count = luma.shape[-1] * luma.shape[-2]
    total = luma.sum(dim=(-3, -2, -1), keepdim=True, dtype=torch.int64)
    return ((2 * total + count) // (2 * count)).to(torch.int32)


def _blend(images: Tensor, other: Tensor | int, factor: Tensor | float) -> Tensor:
    """other + factor * (images - other), truncated to uint8 as in PIL's enhancers."""
    moved = (images.to(torch.int32) - other).to(torch.float32) * factor + other
    return moved.clamp_(0, 255).to(torch.uint8)


def _auto_contrast(image: Tensor, level: float, increasing: bool) -> Tensor:
    flat = image.flatten(1).to(torch.float64)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scale = 255.0 / (high - low).clamp(min=1)
    stretched = (flat * scale - low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, flat).to(torch.uint8).view_as(image)


def _posterize(image: Tensor, level: float, increasing: bool) -> Tensor:
    bits = 4 - int(4 * level) if increasing else int(4 * level)
    return image if bits >= 8 else image & (0xFF & ~((1 << (8 - bits)) - 1))


def _solarize(image: Tensor, level: float, increasing: bool) -> Tensor:
    threshold = min(256, int(256 * level))
    threshold = 256 - threshold if increasing else threshold
    return torch.where(image.to(torch.int32) < threshold, image, 255 - image)


def _solarize_add(image: Tensor, level: float, increasing: bool) -> Tensor:
    wide = image.to(torch.int32)
    return torch.where(wide < 128, (wide + min(128, int(110 * level))).clamp(max=255), wide).to(torch.uint8)


def _vision() -> ModuleType:
    from torchvision.transforms.v2 import functional  # slow to import

    return functional


def _affine(image: Tensor, matrix: tuple[float, ...], fill: tuple[int, int, int], mode: str) -> Tensor:
    """Samples at (a x + b y + c, d x + e y + f), pixel centres at half integers; `fill` outside the image."""
    height, width = image.shape[-2:]
    options = {"device": image.device, "dtype": torch.float32}
    y = torch.arange(height, **options)[:, None] + 0.5
    x = torch.arange(width, **options)[None, :] + 0.5
    a, b, c, d, e, f = matrix
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    grid = torch.stack([source_x * (2 / width) - 1, source_y * (2 / height) - 1], dim=-1)
    wide = image[None].to(torch.float32)
    sampled = functional.grid_sample(wide, grid[None], mode, padding_mode="border", align_corners=False)[0]
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    color = torch.tensor(fill, **options).view(3, 1, 1)
    return torch.where(inside, sampled.round_().clamp_(0, 255), color).to(torch.uint8)


def _rotation(level: float, height: int, width: int) -> tuple[float, ...]:
    """Counter-clockwise, about the centre."""
    radians, x, y = math.radians(30 * level), width / 2, height / 2
    cosine, sine = math.cos(radians), math.sin(radians)
    return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y


# Sampling matrices by (signed level in -1..1, height, width).
_GEOMETRIC: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "Rotate": _rotation,
    "ShearX": lambda level, height, width: (1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda level, height, width: (1, 0, 0, 0.3 * level, 1, 0),
    "TranslateXRel": lambda level, height, width: (1, 0, _TRANSLATE * level * width, 0, 1, 0),
    "TranslateYRel": lambda level, height, width: (1, 0, 0, 0, 1, _TRANSLATE * level * height),
}
# The image or level that each of PIL's enhancers blends with.
_BLENDED: dict[str, Callable[[Tensor], Tensor | int]] = {
    "Brightness": lambda image: 0,
    "Contrast": _mean_gray,
    "Color": _gray,
    "Sharpness": lambda image: _vision().adjust_sharpness(image, 0.0),
}
_OTHER: dict[str, Callable[[Tensor, float, bool], Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": lambda image, level, increasing: _vision().equalize(image),
    "Invert": lambda image, level, increasing: 255 - image,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
}


def rand_augment(image: Tensor, policy, draws: list[float]) -> Tensor:
    """One image [3, h, w] uint8 through a policy of timm's; `draws`: 6 numbers in [0, 1) per layer."""
    for layer in range(policy.num_layers):
        which, apply, first, second, sign, sampling = draws[layer * _LAYER_DRAWS :][:_LAYER_DRAWS]
        op = policy.ops[int(which * len(policy.ops))]
        if apply >= op.prob:
            continue
        magnitude = op.magnitude
        if math.isinf(op.magnitude_std):
            magnitude *= first
        elif op.magnitude_std > 0:
            normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
            magnitude += op.magnitude_std * normal
        level = max(0.0, min(magnitude, op.magnitude_max or _MAX_LEVEL)) / _MAX_LEVEL
        name, signed = op.name.removesuffix("Increasing"), -level if sign < 0.5 else level
        increasing = name != op.name
        if name in _GEOMETRIC:
            matrix = _GEOMETRIC[name](signed, *image.shape[-2:])
            mode = "bicubic" if sampling < 0.5 else "bilinear"
            image = _affine(image, matrix, op.kwargs["fillcolor"], mode)
        elif name in _BLENDED:
            factor = max(0.1, 1 + 0.9 * signed) if increasing else 1.8 * level + 0.1
            image = _blend(image, _BLENDED[name](image), factor)
        else:
            image = _OTHER[name](image, level, increasing)
    return image


def color_jitter(images: Tensor, strength: float, draws: np.ndarray) -> Tensor:
    """Brightness, contrast and saturation of [B, 3, h, w] uint8, each by a factor of U(1 - strength, 1 + strength).

    draws: [B, 4] float64 in [0, 1): the order, then a factor for each of the three.
    """
    lowest = max(0.0, 1 - strength)
    factors = torch.from_numpy(lowest + (1 + strength - lowest) * draws[:, 1:4])
    factors = factors.to(images.device, torch.float32)
    orders = np.array(list(itertools.permutations(range(3))))[(draws[:, 0] * 6).astype(np.int64)]
    images = images.clone()
    for position, (op, name) in itertools.product(range(3), enumerate(("Brightness", "Contrast", "Color"))):
        chosen = torch.from_numpy(np.flatnonzero(orders[:, position] == op)).to(images.device)
        if len(chosen):
            part = images[chosen]
            images[chosen] = _blend(part, _BLENDED[name](part), factors[chosen, op].view(-1, 1, 1, 1))
    return images


def augment(images: Tensor, transform: Transform, ids: np.ndarray, *, seed: int, epoch: int) -> Tensor:
    """RandAugment, then colour jitter, of [B, h, w, 3] uint8 with ids [B] on the host; nothing in evaluation."""
    if not transform.is_random or not (transform.randaugment or transform.color_jitter):
        return images
    policy = None
    if transform.randaugment:
        from timm.data.auto_augment import rand_augment_transform  # slow to import

        fill = tuple(min(255, round(255 * m)) for m in transform.mean)
        policy = rand_augment_transform(transform.randaugment, {"img_mean": fill})
    count = _JITTER_DRAWS + (policy.num_layers * _LAYER_DRAWS if policy else 0)
    stream = {"seed": seed, "stream": Stream.AUGMENT, "epoch": epoch}
    draws = random_uniform(torch.from_numpy(ids), count, **stream).numpy()
    planes = images.permute(0, 3, 1, 2).contiguous()
    if policy:
        rows = draws[:, _JITTER_DRAWS:].tolist()
        planes = torch.stack([rand_augment(p, policy, row) for p, row in zip(planes, rows, strict=True)])
    if transform.color_jitter:
        planes = color_jitter(planes, transform.color_jitter, draws)
    return planes.permute(0, 2, 3, 1)


def cut_box(height: int, width: int, weight: float, center: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of timm's cutmix box: sides sqrt(1 - weight) of the image's, clipped at its border."""
    side = (1 - weight) ** 0.5
    tall, wide = int(height * side), int(width * side)
    y, x = center
    rows = slice(max(y - tall // 2, 0), min(y + (tall + 1) // 2, height))
    return rows, slice(max(x - wide // 2, 0), min(x + (wide + 1) // 2, width))


def mix(
    images: Tensor, ids: np.ndarray, *, mixup: float, cutmix: float, seed: int, epoch: int
) -> tuple[Tensor, float]:
    """Mixup or cutmix of a batch with itself reversed, timm's batch mode; each with probability 1/2 if both are on.

    `mixup`, `cutmix`: alpha of Beta(alpha, alpha); 0 is off. The first of `ids` decides the draws. Returns the mixed
    images [B, 3, h, w], and the share of the batch's own images (after clipping the box).
    """
    if not (mixup > 0 or cutmix > 0):
        return images, 1.0
    words = random_words(torch.from_numpy(ids[:1]), 4, seed=seed, stream=Stream.MIX, epoch=epoch)[0]
    low, high = words.numpy().astype(np.uint64).reshape(2, 2).T
    draw = np.random.Generator(np.random.Philox(key=low | high << np.uint64(32)))
    use_cutmix = cutmix > 0 and (mixup <= 0 or draw.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    weight = float(draw.beta(alpha, alpha))
    if not use_cutmix:
        return torch.lerp(images.flip(0), images, weight), weight
    height, width = images.shape[-2:]
    center = (int(draw.integers(height)), int(draw.integers(width)))
    rows, columns = cut_box(height, width, weight, center)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
