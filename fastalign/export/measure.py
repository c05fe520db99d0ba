"""What an export measures: parity with our own model, what dropping the soft-cap changes, and the features' scale."""

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from fastalign.backbones.vit import ViT
from fastalign.data.source import SyntheticSource
from fastalign.data.sources import open_source
from fastalign.utils.errors import UserError

PARITY = 1e-4
"""The largest relative error that an export may have: no weight that went astray stays below it."""
IMAGES, BATCH = 256, 16
"""Images that features are measured on, at most."""


def noise(vit: ViT, count: int = 4) -> Tensor:
    """[count, C, height, width]: the same normalised noise for each export."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, vit.spec.channels, *vit.spec.image_size, generator=generator)


@torch.no_grad()
def parity(vit: ViT, tokens: Callable[[Tensor], Tensor]) -> float:
    """The largest error of a token of the exported model, relative to the token's norm, in fp32 on random images."""
    images = noise(vit)
    wanted, found = vit.forward_features(images).double(), tokens(images).double()
    if found.shape != wanted.shape:
        raise UserError(
            f"the export gives tokens {list(found.shape)}, ours are {list(wanted.shape)}: not written"
        )
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().nan_to_num(float("inf")).item()


class Images:
    """Batches of real images, as the backbone sees them in evaluation; or synthetic ones.

    Args:
        spec: image folder, tar shards or ``synthetic:COUNT``.
        vit: whose size and constants they get.
    """

    def __init__(self, spec: str, vit: ViT):
        self.spec, self.vit, self.source = spec, vit, open_source(spec)
        self.count = min(len(self.source), IMAGES)

    def __iter__(self) -> Iterator[Tensor]:
        ids = torch.linspace(0, len(self.source) - 1, self.count).long()
        return (self._batch(part) for part in ids.split(BATCH))

    def _batch(self, ids: Tensor) -> Tensor:
        size, data = self.vit.spec.image_size, self.vit.data
        if isinstance(self.source, SyntheticSource):
            return self.source.images(ids, size, seed=0, dtype=torch.float32)
        transform = create_transform((3, *size), is_training=False, **data)
        return torch.stack([transform(self._image(index)) for index in ids.tolist()])

    def _image(self, index: int) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.source.read(index).tobytes())).convert("RGB")
        except OSError as error:
            raise UserError(
                f"{self.source.name(index)} is not an image that can be read: remove it"
            ) from error


def find_images(given: str | None, val: str | None, vit: ViT) -> tuple[Images | None, str]:
    """The images to measure on, and a line that says which, or why there are none.

    Args:
        given: --images.
        val: the run's validation data.
        vit: the backbone.
    """
    if given is not None:
        return Images(given, vit), f"--images {Path(given).name}"
    if val is None:
        return None, "not measured: the run had no validation data, and --images was not given"
    try:
        return Images(val, vit), "the run's validation data"
    except UserError:
        return (
            None,
            "not measured: the run's validation data is not reachable from here; give --images FOLDER",
        )


@torch.no_grad()
def moments(vit: ViT, images: Images) -> dict[str, Any]:
    """Mean and standard deviation of each channel of the patch tokens, prefix left out, summed in float64."""
    count, total, squares = 0, 0.0, 0.0
    for batch in images:
        patches = vit.forward_features(batch)[:, vit.num_prefix_tokens :].flatten(0, 1).double()
        count, total, squares = (
            count + len(patches),
            total + patches.sum(0),
            squares + patches.square().sum(0),
        )
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist(), "images": images.count}


@torch.no_grad()
def without_softcap(vit: ViT, images: Images | None) -> dict[str, Any]:
    """What features lose with the cap: relative change in the Euclidean norm, and the worst token's cosine.

    On noise, and on real images where there are some.
    """
    batches = {"noise": [noise(vit)]}
    if images is not None:
        batches["images"] = itertools.islice(images, 4)
    return {name: _change(vit, group) for name, group in batches.items()}


def _change(vit: ViT, batches) -> dict[str, float]:
    cap, change, norm, cosine = vit.softcap, 0.0, 0.0, 1.0
    for batch in batches:
        capped = vit.forward_features(batch).double()
        try:
            vit.softcap = None
            plain = vit.forward_features(batch).double()
        finally:
            vit.softcap = cap
        change, norm = change + (plain - capped).square().sum().item(), norm + capped.square().sum().item()
        cosine = min(cosine, torch.cosine_similarity(plain, capped, dim=-1).min().item())
    return {"relative_change": (change / norm) ** 0.5, "lowest_cosine": cosine}
