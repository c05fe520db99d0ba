"""Measurements of an export: parity with our own model, the effect of dropping the soft-cap, feature statistics."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import transform
from fastalign.data.sources import Source, SyntheticSource, open_source
from fastalign.utils.errors import UserError

PARITY = 1e-4  # the largest relative error of an export; a misplaced weight causes a larger one
PARITY_OF = "any token, fp32, 4 images of noise in batches of 1 and 3"
IMAGES, BATCH = 256, 16  # the largest number of images to measure features on, and per batch
_UNREADABLE = (UserError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors of our reader and of PIL for an image that cannot be read."""


def noise(vit: ViT) -> Tensor:
    """[4, C, height, width]: the same normalized noise for each export."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, vit.spec.channels, *vit.spec.image_size, generator=generator)


def token_error(found: Tensor, wanted: Tensor) -> float:
    """The largest error of a token relative to its norm; infinite if shapes differ or a value is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().nan_to_num(float("inf")).item()


@torch.no_grad()
def check_parity(vit: ViT, tokens: Callable[[Tensor], Tensor], name: str) -> float:
    """The `token_error` of the exported model on noise; UserError, naming the export, if it exceeds `PARITY`."""
    images = noise(vit)
    found = torch.cat([tokens(batch) for batch in images.split([1, 3])])
    if (error := token_error(found, vit.forward_features(images))) <= PARITY:
        return error
    raise UserError(
        f"{name}: the exported model differs from ours by {error:.1e} (at most {PARITY:g}): not written; check the "
        "versions of the libraries. If tokens are near zero, as with random weights, the library's epsilon of the "
        f"final norm (ours is {getattr(vit.norm, 'eps', None)}) can cause this: then use --to onnx"
    )


def find_images(given: str | None, val: str | None) -> tuple[Source | None, str]:
    """The images to measure on, those of --images or the validation data, and their origin or why there are none."""
    if given is not None:
        return open_source(given), f"--images {Path(given).name}"
    with suppress(UserError):
        if val is not None:
            return open_source(val), "the run's validation data"
    return None, "not measured: no validation data is available; give --images FOLDER"


def _images(vit: ViT, source: Source) -> Iterator[Tensor]:
    """At most `IMAGES` images, evenly spaced, transformed as for evaluation; unreadable ones are left out."""
    ids = torch.linspace(0, len(source) - 1, min(len(source), IMAGES)).long()
    if isinstance(source, SyntheticSource):
        yield from source.images(ids, vit.spec.image_size, seed=0, dtype=torch.float32)
        return
    read, found = transform(vit), False
    for index in ids.tolist():
        try:
            image = read(Image.open(io.BytesIO(source.read(index).tobytes())).convert("RGB"))
        except _UNREADABLE:
            continue
        found = True
        yield image
    if not found:
        raise UserError(f"{source.name(index)} and all others cannot be read: give --images FOLDER")


def _batches(vit: ViT, source: Source) -> Iterator[Tensor]:
    images = _images(vit, source)
    while batch := list(islice(images, BATCH)):
        yield torch.stack(batch)


@torch.no_grad()
def moments(vit: ViT, source: Source | None) -> dict[str, Any]:
    """Mean and standard deviation of each channel of the patch tokens, without the prefix, summed in float64."""
    if source is None:
        return {"mean": None, "std": None}
    images, count, total, squares = 0, 0, 0.0, 0.0
    for batch in _batches(vit, source):
        patches = vit.forward_features(batch)[:, vit.num_prefix_tokens :].flatten(0, 1).double()
        images, count, total = images + len(batch), count + len(patches), total + patches.sum(0)
        squares = squares + patches.square().sum(0)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist(), "images": images}


@torch.no_grad()
def without_softcap(vit: ViT, source: Source | None) -> dict[str, Any]:
    """How dropping the cap changes features of noise and real images: relative change, lowest cosine of a token."""
    measured: dict[str, Iterable[Tensor]] = {"noise": [noise(vit)]}
    if source is not None:
        measured["images"] = islice(_batches(vit, source), 4)
    found, cap = {}, vit.softcap
    for name, batches in measured.items():
        change, norm, cosine = 0.0, 0.0, 1.0
        for batch in batches:
            capped = vit.forward_features(batch).double()
            vit.softcap = None
            plain = vit.forward_features(batch).double()
            vit.softcap = cap
            change += (plain - capped).square().sum().item()
            norm += capped.square().sum().item()
            cosine = min(cosine, torch.cosine_similarity(plain, capped, dim=-1).min().item())
        found[name] = {"relative_change": (change / norm) ** 0.5, "lowest_cosine": cosine}
    return found
