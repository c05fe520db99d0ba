"""Measurements of an export: parity with our own model, the effect of dropping the soft-cap, feature statistics."""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import transform
from fastalign.data.sources import Source, SyntheticSource, open_source
from fastalign.utils.errors import UserError

PARITY = 1e-4
"""The largest relative error that an export may have: a misplaced weight causes a larger one."""
PARITY_OF = "any token, fp32, 4 images of noise in batches of 1 and 3"
EPSILON = (
    "tokens near zero, as of random weights, also feel that the student's final norm has an epsilon of {ours:g}, "
    "the library's perhaps {theirs:g}: then use --to onnx"
)
IMAGES, BATCH = 256, 16
"""Images that features are measured on, at most."""


def noise(vit: ViT, count: int = 4) -> Tensor:
    """[count, C, height, width]: the same normalised noise for each export."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, vit.spec.channels, *vit.spec.image_size, generator=generator)


@torch.no_grad()
def parity(vit: ViT, tokens: Callable[[Tensor], Tensor]) -> float:
    """The `token_error` of the exported model in fp32 on noise."""
    images = noise(vit)
    found = torch.cat([tokens(batch) for batch in images.split([1, 3])])
    return token_error(found, vit.forward_features(images))


def token_error(found: Tensor, wanted: Tensor) -> float:
    """The largest error of a token relative to the token's norm; infinite for another shape or what is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().nan_to_num(float("inf")).item()


def check_parity(vit: ViT, tokens: Callable[[Tensor], Tensor], name: str) -> float:
    """`parity`, or UserError if it exceeds `PARITY`; `name` is what was exported."""
    if (error := parity(vit, tokens)) > PARITY:
        ours, theirs = getattr(vit.norm, "eps", None), vit.spec.block.norm_eps
        raise UserError(
            f"{name}: the exported model differs from ours by {error:.1e} (at most {PARITY:g}): not written; check "
            "the versions of the libraries"
            + ("" if ours in (None, theirs) else f"; {EPSILON.format(ours=ours, theirs=theirs)}")
        )
    return error


def find_images(given: str | None, val: str | None) -> tuple[Source | None, str]:
    """The images to measure on, and which they are or why there are none. `given`: --images; `val`: the run's."""
    if given is not None:
        return open_source(given), f"--images {Path(given).name}"
    if val is None:
        return None, "not measured: the run had no validation data, and --images was not given"
    try:
        return open_source(val), "the run's validation data"
    except UserError:
        return None, "not measured: the run's validation data is not reachable; give --images FOLDER"


def _batches(vit: ViT, source: Source) -> Iterator[Tensor]:
    """At most `IMAGES` images, evenly spaced, transformed as for evaluation."""
    read = transform(vit)
    for ids in torch.linspace(0, len(source) - 1, min(len(source), IMAGES)).long().split(BATCH):
        if isinstance(source, SyntheticSource):
            yield source.images(ids, vit.spec.image_size, seed=0, dtype=torch.float32)
            continue
        images = []
        for index in ids.tolist():
            try:
                images.append(read(Image.open(io.BytesIO(source.read(index).tobytes())).convert("RGB")))
            except OSError as error:
                raise UserError(f"{source.name(index)} is not a readable image: remove it") from error
        yield torch.stack(images)


@torch.no_grad()
def moments(vit: ViT, source: Source) -> dict[str, Any]:
    """Mean and standard deviation of each channel of the patch tokens, without the prefix, summed in float64."""
    count, total, squares = 0, 0.0, 0.0
    for batch in _batches(vit, source):
        patches = vit.forward_features(batch)[:, vit.num_prefix_tokens :].flatten(0, 1).double()
        count, total = count + len(patches), total + patches.sum(0)
        squares = squares + patches.square().sum(0)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist(), "images": min(len(source), IMAGES)}


def without_softcap(vit: ViT, source: Source | None) -> dict[str, Any]:
    """How dropping the cap changes the features on noise and, if there are any, on real images.

    The relative change in the Euclidean norm, and the lowest cosine of a token.
    """
    images = {} if source is None else {"images": _change(vit, itertools.islice(_batches(vit, source), 4))}
    return {"noise": _change(vit, [noise(vit)])} | images


@torch.no_grad()
def _change(vit: ViT, batches: Iterable[Tensor]) -> dict[str, float]:
    cap, change, norm, cosine = vit.softcap, 0.0, 0.0, 1.0
    for batch in batches:
        capped = vit.forward_features(batch).double()
        vit.softcap = None
        plain = vit.forward_features(batch).double()
        vit.softcap = cap
        change, norm = change + (plain - capped).square().sum().item(), norm + capped.square().sum().item()
        cosine = min(cosine, torch.cosine_similarity(plain, capped, dim=-1).min().item())
    return {"relative_change": (change / norm) ** 0.5, "lowest_cosine": cosine}
