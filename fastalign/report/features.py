"""The pictures of a report, and principal components and cosines of their patch tokens, in float64."""

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
from fastalign.utils.errors import UserError

COMPONENTS = 3


def read_pictures(wanted: int | list[str], data: str | None, vit: ViT) -> tuple[list[str], Tensor]:
    """Names and backbone inputs of image files, or of this many pictures of a data set, evenly spaced."""
    if isinstance(wanted, int):
        if data is None:
            raise UserError("the run names no data set; give image files, --images FILE ...")
        source = open_source(data)
        ids = torch.linspace(0, len(source) - 1, min(wanted, len(source))).long()
        names = [source.name(index) for index in ids.tolist()]
        if isinstance(source, SyntheticSource):
            return names, source.images(ids, vit.spec.image_size, seed=0, dtype=torch.float32)
        files = [io.BytesIO(source.read(index).tobytes()) for index in ids.tolist()]
    else:
        files = names = wanted
    read, inputs = transform(vit), []
    for name, file in zip(names, files, strict=True):
        try:
            inputs.append(read(Image.open(file).convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            message = f"{name} cannot be read as an image ({error}): --images takes a number, or image files"
            raise UserError(message) from error
    return [Path(name).name for name in names], torch.stack(inputs)


@torch.no_grad()
def patch_tokens(vit: ViT, images: Tensor) -> np.ndarray:
    """The patch tokens after the final norm: [B, 3, height, width] normalized -> [B, N, D] float64."""
    tokens = torch.cat([vit.forward_features(image[None]) for image in images])
    return tokens[:, vit.num_prefix_tokens :].double().numpy()


def principal_components(tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Principal components with positive third moments, [B, N, D] -> [B, N, 3], and their share of the variance."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows - rows.mean(0)
    variances, vectors = np.linalg.eigh(rows.T @ rows)
    values = rows @ vectors[:, ::-1][:, :COMPONENTS]
    values = values * np.where((values**3).sum(0) < 0, -1.0, 1.0)
    share = variances[-COMPONENTS:].sum() / variances.sum()
    return values.reshape(*tokens.shape[:2], COMPONENTS), float(share)


def match_components(values: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """Components [B, N, 3] in the order, and with the signs, that correlate best with those of another model."""
    pair = np.concatenate([anchor, values], -1).reshape(-1, 2 * COMPONENTS)
    correlation = np.corrcoef(pair.T)[:COMPONENTS, COMPONENTS:]
    own = range(COMPONENTS)
    order = max(permutations(own), key=lambda order: np.abs(correlation[own, order]).sum())
    return values[..., list(order)] * np.where(correlation[own, order] < 0, -1.0, 1.0)


def component_colours(values: np.ndarray) -> np.ndarray:
    """[B, N, 3] components -> uint8 RGB: each from its 1st percentile over all images (0) to its 99th (255)."""
    low, high = np.percentile(values.reshape(-1, COMPONENTS), [1, 99], axis=0)
    return np.rint(255 * ((values - low) / (high - low)).clip(0, 1)).astype(np.uint8)


def cosines(tokens: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Cosine similarity of the patches of each image with Q of them: [B, N, D], [B, Q] -> [B, Q, N]."""
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    return np.take_along_axis(unit, queries[..., None], 1) @ unit.swapaxes(-1, -2)


@dataclass(frozen=True)
class PatchMaps:
    """The maps of B pictures, by model; R rows and C columns of patches."""

    names: list[str]
    shown: np.ndarray  # [B, h, w, 3] uint8: the part of the input that the patches cover
    colours: dict[str, np.ndarray]  # [B, R, C, 3] uint8: principal components
    shares: dict[str, float]  # of the variance, by the three components together
    queries: np.ndarray  # [B, 2]: the central patch, A, and the one least similar to it, B
    cosines: dict[str, np.ndarray]  # [B, 2, R, C] float64, with each of the two
    low: float  # lower end of the colour scale of all cosines


def compute_maps(names: list[str], inputs: Tensor, models: dict[str, ViT]) -> PatchMaps:
    """Maps of normalized images, [B, 3, height, width]; the first model sets query patches and component order."""
    vit = next(iter(models.values()))
    (rows, columns), count = vit.spec.grid, len(inputs)
    tokens = {name: patch_tokens(each, inputs) for name, each in models.items()}
    centre = np.full((count, 1), rows // 2 * columns + columns // 2)
    others = cosines(next(iter(tokens.values())), centre).argmin(-1)
    queries = np.concatenate([centre, others], 1)
    anchor, colours, shares, similar = None, {}, {}, {}
    for name, values in tokens.items():
        similar[name] = cosines(values, queries).reshape(count, 2, rows, columns)
        components, shares[name] = principal_components(values)
        anchor = components if anchor is None else anchor
        colours[name] = component_colours(match_components(components, anchor))
        colours[name] = colours[name].reshape(count, rows, columns, COMPONENTS)
    low = float(min(np.percentile(np.stack(list(similar.values())), 1), 0.99))
    mean, std = (torch.tensor(vit.data[key])[:, None, None] for key in ("mean", "std"))
    height, width = np.multiply(vit.spec.grid, vit.spec.patch_size)
    pixels = (255 * (inputs * std + mean)[..., :height, :width]).clamp(0, 255).round().byte()
    return PatchMaps(names, pixels.permute(0, 2, 3, 1).numpy(), colours, shares, queries, similar, low)
