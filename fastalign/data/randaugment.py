"""RandAugment in timm's spelling and op set, on uint8 tensors of any device.

Integer arithmetic and look-up tables wherever PIL uses them, so that an image comes out the same on every device
and in every batch. Two things differ from PIL's pixels: bicubic sampling uses a = -0.75 (PIL: -1), and bilinear
sampling may round one level apart.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastalign.utils.errors import UserError

DRAWS_PER_LAYER = 6
_MAX_LEVEL = 10.0
_TRANSLATE = 0.45


@dataclass(frozen=True)
class RandAugment:
    """A parsed policy: `layers` ops an image, each applied with `probability`."""

    magnitude: float = _MAX_LEVEL
    layers: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    magnitude_max: float = _MAX_LEVEL
    increasing: bool = False


def parse_randaugment(text: str) -> RandAugment:
    """Reads timm's spelling.

    Args:
        text: `rand-m9-mstd0.5-inc1`: m magnitude (10), n layers (2), p probability (0.5), mstd standard deviation
            of the magnitude (0; above 100: uniform in 0..m), mmax its upper bound (10), inc 1 for ops whose
            severity grows with the magnitude (0).

    Raises:
        UserError: another spelling; timm's weighted sets (`t...`) are not implemented.
    """
    keys = {"m": "magnitude", "n": "layers", "p": "probability", "mstd": "magnitude_std"}
    keys |= {"mmax": "magnitude_max", "inc": "increasing"}
    head, *parts = text.split("-")
    fields: dict[str, float | int | bool] = {}
    for part in parts:
        match = re.fullmatch(r"(m|n|p|mstd|mmax|inc)(\d+(?:\.\d+)?)", part)
        if match is None or (match[1] in ("n", "inc") and "." in match[2]):
            raise UserError(
                f"randaugment {text!r}: cannot read {part!r}; write for example rand-m9-mstd0.5-inc1"
            )
        fields[keys[match[1]]] = float(match[2])
    if head != "rand":
        raise UserError(
            f"randaugment {text!r} must start with `rand`; write for example rand-m9-mstd0.5-inc1"
        )
    fields["layers"] = int(fields.get("layers", 2))
    fields["increasing"] = bool(fields.get("increasing", 0))
    if fields.get("probability", 0) > 1:
        raise UserError(f"randaugment {text!r}: p is a probability, in 0..1; write for example rand-m9-p0.5")
    if fields.get("magnitude_std", 0) > 100:
        fields["magnitude_std"] = math.inf
    return RandAugment(**fields)


def gray(images: Tensor) -> Tensor:
    """Luma of ITU-R 601-2 as PIL rounds it. images: [..., 3, h, w] uint8; returns [..., 1, h, w] int32."""
    red, green, blue = images.to(torch.int32).unbind(-3)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).unsqueeze(-3)


def mean_gray(images: Tensor) -> Tensor:
    """Rounded mean of `gray` over each image. [..., 3, h, w] uint8; returns [..., 1, 1, 1] int32."""
    luma = gray(images)
    count = luma.shape[-1] * luma.shape[-2]
    total = luma.sum(dim=(-3, -2, -1), keepdim=True, dtype=torch.int64)
    return ((2 * total + count) // (2 * count)).to(torch.int32)


def blend(images: Tensor, other: Tensor | int, factor: Tensor | float) -> Tensor:
    """other + factor * (images - other), truncated to uint8 as PIL's enhancers do.

    Args:
        images: [..., 3, h, w] uint8.
        other: int, or int32 that broadcasts.
        factor: float, or float32 that broadcasts.
    """
    moved = (images.to(torch.int32) - other).to(torch.float32) * factor + other
    return moved.clamp_(0, 255).to(torch.uint8)


def _look_up(image: Tensor, table: Tensor) -> Tensor:
    """table: [3, 256] uint8."""
    return torch.gather(table, 1, image.flatten(1).to(torch.int64)).view_as(image)


def _auto_contrast(image: Tensor) -> Tensor:
    flat = image.flatten(1).to(torch.float64)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scale = 255.0 / (high - low).clamp(min=1)
    levels = torch.arange(256, device=image.device, dtype=torch.float64)
    stretched = (levels * scale - low * scale).trunc().clamp(0, 255)
    return _look_up(image, torch.where(high > low, stretched, levels).to(torch.uint8))


def _equalize(image: Tensor) -> Tensor:
    levels = torch.arange(256, device=image.device)
    channel = torch.arange(3, device=image.device).view(3, 1) * 256
    counts = torch.bincount((image.flatten(1).to(torch.int64) + channel).flatten(), minlength=768).view(
        3, 256
    )
    last = torch.where(counts > 0, levels, -1).amax(1, keepdim=True)
    step = (counts.sum(1, keepdim=True) - counts.gather(1, last)) // 255
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    return _look_up(image, torch.where(step > 0, table, levels).to(torch.uint8))


def _posterize(image: Tensor, bits: int) -> Tensor:
    return image if bits >= 8 else image & (0xFF & ~((1 << (8 - bits)) - 1))


def _solarize(image: Tensor, threshold: int) -> Tensor:
    return torch.where(image.to(torch.int32) < threshold, image, 255 - image)


def _solarize_add(image: Tensor, amount: int) -> Tensor:
    wide = image.to(torch.int32)
    return torch.where(wide < 128, (wide + amount).clamp(max=255), wide).to(torch.uint8)


def _sharpness(image: Tensor, factor: float) -> Tensor:
    wide = image.to(torch.int32)
    height, width = image.shape[-2:]
    smooth = wide.clone()
    if min(height, width) > 2:
        total = 4 * wide[:, 1:-1, 1:-1]
        for y in range(3):
            for x in range(3):
                total = total + wide[:, y : height - 2 + y, x : width - 2 + x]
        smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return blend(image, smooth, factor)


def _affine(image: Tensor, matrix: tuple[float, ...], fill: tuple[int, int, int], bicubic: bool) -> Tensor:
    """Samples at (a x + b y + c, d x + e y + f), pixel centres at half integers; outside the image is `fill`."""
    height, width = image.shape[-2:]
    options = {"device": image.device, "dtype": torch.float32}
    y = torch.arange(height, **options)[:, None] + 0.5
    x = torch.arange(width, **options)[None, :] + 0.5
    a, b, c, d, e, f = matrix
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    grid = torch.stack([source_x * (2 / width) - 1, source_y * (2 / height) - 1], dim=-1)
    sampled = functional.grid_sample(
        image[None].to(torch.float32),
        grid[None],
        mode="bicubic" if bicubic else "bilinear",
        padding_mode="border",
        align_corners=False,
    )[0]
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    color = torch.tensor(fill, **options).view(3, 1, 1)
    return torch.where(inside, sampled.round_().clamp_(0, 255), color).to(torch.uint8)


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """The sampling matrix of a counter-clockwise rotation about the centre."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y


def _geometric(name: str, value: float, height: int, width: int) -> tuple[float, ...]:
    if name == "Rotate":
        return _rotation(30 * value, height, width)
    return {
        "ShearX": (1, 0.3 * value, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * value, 1, 0),
        "TranslateXRel": (1, 0, _TRANSLATE * value * width, 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, _TRANSLATE * value * height),
    }[name]


_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_ENHANCE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Color": lambda image, factor: blend(image, gray(image), factor),
    "Contrast": lambda image, factor: blend(image, mean_gray(image), factor),
    "Brightness": lambda image, factor: blend(image, 0, factor),
    "Sharpness": _sharpness,
}
OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
)
OPS += ("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def apply_op(
    image: Tensor,
    name: str,
    magnitude: float,
    *,
    increasing: bool,
    negative: bool,
    bicubic: bool,
    fill: tuple[int, int, int],
) -> Tensor:
    """One op.

    Args:
        image: [3, h, w] uint8.
        name: one of OPS.
        magnitude: 0 to 10 (more where mmax says so).
        increasing: severity grows with the magnitude.
        negative: the other direction, for ops that have two.
        bicubic: the sampling of geometric ops, else bilinear.
        fill: RGB outside the image.

    Returns:
        [3, h, w] uint8.
    """
    level = magnitude / _MAX_LEVEL
    signed = -level if negative else level
    if name in _GEOMETRIC:
        return _affine(image, _geometric(name, signed, *image.shape[-2:]), fill, bicubic)
    if name in _ENHANCE:
        return _ENHANCE[name](image, max(0.1, 1 + 0.9 * signed) if increasing else 1.8 * level + 0.1)
    if name == "Posterize":
        return _posterize(image, 4 - int(4 * level) if increasing else int(4 * level))
    if name == "Solarize":
        threshold = min(256, int(256 * level))
        return _solarize(image, 256 - threshold if increasing else threshold)
    if name == "SolarizeAdd":
        return _solarize_add(image, min(128, int(110 * level)))
    return {"AutoContrast": _auto_contrast, "Equalize": _equalize, "Invert": lambda i: 255 - i}[name](image)


def rand_augment(
    image: Tensor, policy: RandAugment, draws: list[float], fill: tuple[int, int, int]
) -> Tensor:
    """One image through a policy.

    Args:
        image: [3, h, w] uint8.
        policy: the policy.
        draws: `policy.layers * DRAWS_PER_LAYER` numbers in [0, 1).
        fill: RGB outside the image.

    Returns:
        [3, h, w] uint8.
    """
    for layer in range(policy.layers):
        which, apply, first, second, sign, sampling = draws[layer * DRAWS_PER_LAYER :][:DRAWS_PER_LAYER]
        if apply >= policy.probability:
            continue
        magnitude = policy.magnitude
        if math.isinf(policy.magnitude_std):
            magnitude *= first
        elif policy.magnitude_std > 0:
            normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
            magnitude += policy.magnitude_std * normal
        image = apply_op(
            image,
            OPS[int(which * len(OPS))],
            max(0.0, min(magnitude, policy.magnitude_max)),
            increasing=policy.increasing,
            negative=sign < 0.5,
            bicubic=sampling < 0.5,
            fill=fill,
        )
    return image
