"""Pictures of a report and what backbones make of their patches: principal components and cosines, in float64."""

import io
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import transform
from fastalign.data.sources import SyntheticSource, open_source
from fastalign.data.transforms import Transform, geometry
from fastalign.utils.errors import UserError

COMPONENTS = 3
SHOWN = 256
"""Pixels of a shown picture's longer side, at least."""


@dataclass(frozen=True)
class Pictures:
    """B pictures."""

    names: list[str]
    inputs: Tensor
    """[B, 3, height, width] float32, normalised"""
    shown: list[np.ndarray]
    """[h, w, 3] uint8: the part that the patches cover, at least `SHOWN` pixels on the longer side"""


def load_pictures(wanted: int | list[str], data: str | None, vit: ViT) -> Pictures:
    """So many pictures of a data set, evenly spread, or image files, as inputs of a backbone.

    Raises:
        UserError: data or a picture that cannot be read.
    """
    if not isinstance(wanted, int):
        return _prepare(wanted, [_open(Path(path), f"--images {path}") for path in wanted], vit)
    if data is None:
        raise UserError("the run names no data set; give image files, --images FILE ...")
    source = open_source(data)
    ids = torch.linspace(0, len(source) - 1, min(wanted, len(source))).long()
    names = [source.name(index) for index in ids.tolist()]
    if isinstance(source, SyntheticSource):
        inputs = source.images(ids, vit.spec.image_size, seed=0, dtype=torch.float32)
        levels = ((inputs + 3) * (255 / 6)).round().byte()
        return Pictures(names, inputs, [*levels.permute(0, 2, 3, 1).numpy()])
    files = [io.BytesIO(source.read(index).tobytes()) for index in ids.tolist()]
    return _prepare(names, [_open(*pair) for pair in zip(files, names, strict=True)], vit)


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        return Image.open(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name} cannot be read as an image ({error}): give a number, or image files"
        ) from error


def _prepare(names: list[str], images: list[Image.Image], vit: ViT) -> Pictures:
    read = transform(vit)
    inputs = torch.stack([read(image) for image in images])
    return Pictures([Path(name).name for name in names], inputs, [_enlarge(image, vit) for image in images])


def _enlarge(image: Image.Image, vit: ViT) -> np.ndarray:
    """The part of an image that the patches cover, with more pixels than the input has."""
    shape, size = np.array([image.height, image.width]), np.array(vit.spec.image_size)
    cut = Transform(vit.spec.image_size, crop="eval", **vit.data)
    place = geometry(cut, shape[None], np.zeros(1, np.int64), seed=0, epoch=0)
    start, end = place.roi_start[0].astype(float), place.roi_end[0].astype(float)
    covered = np.multiply(vit.spec.grid, vit.spec.patch_size)
    end = (start + (end - start) * covered / size).clip(0, shape)
    height, width = -(-SHOWN // max(size)) * covered
    box = (*start.clip(0, end)[::-1], *end[::-1])
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))


@torch.no_grad()
def patch_tokens(vit: ViT, images: Tensor) -> np.ndarray:
    """The patch tokens after the final norm: [B, 3, height, width] normalised -> [B, N, D] float64."""
    tokens = [vit.forward_features(image[None])[0, vit.num_prefix_tokens :] for image in images]
    return torch.stack(tokens).double().numpy()


def principal_components(tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """The first three principal components of all patches of all images, signed for a positive third moment.

    Returns:
        Of tokens [B, N, D] the values, [B, N, 3], and the share of the variance that they hold.
    """
    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows - rows.mean(0)
    variances, vectors = np.linalg.eigh(rows.T @ rows)
    values = rows @ vectors[:, ::-1][:, :COMPONENTS]
    values = values * np.where((values**3).sum(0) < 0, -1.0, 1.0)
    share = variances[-COMPONENTS:].sum() / max(variances.sum(), 1e-300)
    return values.reshape(*tokens.shape[:2], COMPONENTS), float(share)


def match_components(values: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """Components [B, N, 3] in the order, and with the signs, that correlate best with those of another model."""
    pair = np.concatenate([anchor, values], -1).reshape(-1, 2 * COMPONENTS)
    with np.errstate(invalid="ignore"):  # constant components
        correlation = np.nan_to_num(np.corrcoef(pair.T)[:COMPONENTS, COMPONENTS:])
    own = range(COMPONENTS)
    order = max(permutations(own), key=lambda order: np.abs(correlation[own, order]).sum())
    return values[..., list(order)] * np.where(correlation[own, order] < 0, -1.0, 1.0)


def component_colours(values: np.ndarray) -> np.ndarray:
    """[B, N, 3] components -> uint8 RGB: each from its 1st percentile over all images (0) to its 99th (255)."""
    low, high = np.percentile(values.reshape(-1, COMPONENTS), [1, 99], axis=0)
    scaled = np.where(high > low, (values - low) / np.where(high > low, high - low, 1.0), 0.5)
    return np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)


def cosines(tokens: np.ndarray, query: int) -> np.ndarray:
    """Cosine similarity of each patch of an image with one of them: [N, D] -> [N]."""
    norms = np.linalg.norm(tokens, axis=1, keepdims=True)
    unit = tokens / np.where(norms > 0, norms, 1.0)
    return unit @ unit[query]


def query_patches(tokens: np.ndarray, grid: tuple[int, int]) -> tuple[int, int]:
    """The patch in the centre of the grid (rows, columns), and the patch whose cosine with it is lowest."""
    centre = grid[0] // 2 * grid[1] + grid[1] // 2
    return centre, int(cosines(tokens, centre).argmin())


@dataclass(frozen=True)
class PatchMaps:
    """What is drawn of B pictures, by model; R rows and C columns of patches."""

    grid: tuple[int, int]
    """R, C"""
    colours: dict[str, np.ndarray]
    """[B, R, C, 3] uint8: principal components"""
    shares: dict[str, float]
    """of the variance, by the three components together"""
    queries: list[tuple[int, int]]
    """two patches a picture"""
    cosines: dict[str, np.ndarray]
    """[B, 2, R, C] float64, with each of the two"""
    low: float
    """where the colour scale of all cosines begins"""


def compute_maps(models: dict[str, ViT], images: Tensor) -> PatchMaps:
    """Maps of normalised images, [B, 3, height, width]; the first model sets query patches and component order."""
    grid = next(iter(models.values())).spec.grid
    tokens = {name: patch_tokens(vit, images) for name, vit in models.items()}
    queries = [query_patches(picture, grid) for picture in next(iter(tokens.values()))]
    anchor, colours, shares, similar = None, {}, {}, {}
    for name, rows in tokens.items():
        values, shares[name] = principal_components(rows)
        anchor = values if anchor is None else anchor
        colours[name] = component_colours(match_components(values, anchor)).reshape(len(rows), *grid, 3)
        pairs = zip(rows, queries, strict=True)
        maps = [[cosines(picture, query) for query in two] for picture, two in pairs]
        similar[name] = np.array(maps).reshape(len(rows), 2, *grid)
    low = np.percentile(np.stack(list(similar.values())), 1)
    return PatchMaps(grid, colours, shares, queries, similar, float(min(low, 0.99)))
