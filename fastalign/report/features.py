"""What patch features look like: principal components and cosines, in float64, and their colours."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from fastalign.backbones.vit import ViT
from fastalign.utils.errors import UserError

COMPONENTS = 3
_RAMP = ((16, 20, 56), (48, 66, 134), (40, 122, 146), (66, 172, 122), (172, 206, 72), (253, 240, 152))
"""Colours of low to high cosines, each lighter than the one before."""


@torch.no_grad()
def patch_tokens(vit: ViT, images: Tensor) -> np.ndarray:
    """The tokens after the final norm, prefix tokens left out.

    Args:
        vit: the backbone, in evaluation mode.
        images: [B, 3, height, width], normalised; one at a time is in memory.

    Returns:
        [B, N, D] float64.

    Raises:
        UserError: features that are not finite.
    """
    tokens = [vit.forward_features(image[None])[0, vit.num_prefix_tokens :] for image in images]
    found = torch.stack(tokens).double().numpy()
    if not np.isfinite(found).all():
        raise UserError(
            f"{vit.recipe['name']} gives features that are not finite: show curves only, --images 0"
        )
    return found


def principal_components(tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """The first three principal components, fitted over all patches of all images together.

    A component's sign is free: it is chosen so that the third moment of its values is positive.

    Args:
        tokens: [B, N, D] float64.

    Returns:
        [B, N, 3] values of the components, zeros where there are fewer, and the share of the variance they hold.
    """
    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows - rows.mean(0)
    variances, vectors = np.linalg.eigh(rows.T @ rows)
    values = rows @ vectors[:, ::-1][:, :COMPONENTS]
    values = np.pad(values, ((0, 0), (0, COMPONENTS - values.shape[1])))
    values = values * np.where((values**3).sum(0) < 0, -1.0, 1.0)
    total = variances.sum()
    share = float(variances[::-1][:COMPONENTS].sum() / total) if total > 0 else 1.0
    return values.reshape(*tokens.shape[:2], COMPONENTS), share


def aligned_to(values: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """Components reordered, and their signs turned, to go with those of another model of the same patches.

    Of all orders, the one with the largest sum of absolute correlations.

    Args:
        values: [B, N, 3].
        anchor: [B, N, 3], of the model to be compared with.

    Returns:
        [B, N, 3].
    """
    correlation = _standardised(anchor).T @ _standardised(values)
    own = range(COMPONENTS)
    order = max(permutations(own), key=lambda order: np.abs(correlation[own, order]).sum())
    return values[..., list(order)] * np.where(correlation[own, order] < 0, -1.0, 1.0)


def _standardised(values: np.ndarray) -> np.ndarray:
    rows = values.reshape(-1, COMPONENTS)
    rows = rows - rows.mean(0)
    norm = np.linalg.norm(rows, axis=0)
    return rows / np.where(norm > 0, norm, 1.0)


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


def queries(tokens: np.ndarray, grid: tuple[int, int]) -> tuple[int, int]:
    """The patch in the centre of the grid (rows, columns), and the patch whose cosine with it is lowest."""
    centre = grid[0] // 2 * grid[1] + grid[1] // 2
    return centre, int(cosines(tokens, centre).argmin())


def ramp_colours(values: np.ndarray, low: float) -> np.ndarray:
    """Cosines from `low` to 1 as uint8 RGB, dark to light: [...] -> [..., 3]."""
    place = ((values - low) / max(1 - low, 1e-12)).clip(0, 1) * (len(_RAMP) - 1)
    stops = np.arange(len(_RAMP))
    channels = [np.interp(place, stops, [colour[c] for colour in _RAMP]) for c in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def ramp_css() -> str:
    """The same colours as a CSS gradient, for the legend."""
    return f"linear-gradient(90deg,{','.join(f'rgb{colour}' for colour in _RAMP)})"


@dataclass(frozen=True)
class Maps:
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
    """where the scale of the cosines begins, for all of them"""


def compare(models: dict[str, ViT], images: Tensor) -> Maps:
    """Everything that is drawn of some pictures.

    The query patches and the order of the components are the first model's; the other follows.

    Args:
        models: one or two, by name, of the same grid.
        images: [B, 3, height, width], normalised.
    """
    grid = next(iter(models.values())).spec.grid
    tokens = {name: patch_tokens(vit, images) for name, vit in models.items()}
    first = next(iter(tokens.values()))
    chosen = [queries(picture, grid) for picture in first]
    anchor, colours, shares, similar = None, {}, {}, {}
    for name, rows in tokens.items():
        values, shares[name] = principal_components(rows)
        anchor = values if anchor is None else anchor
        colours[name] = component_colours(aligned_to(values, anchor)).reshape(len(rows), *grid, 3)
        pairs = zip(rows, chosen, strict=True)
        similar[name] = np.array([[cosines(picture, query) for query in two] for picture, two in pairs])
        similar[name] = similar[name].reshape(len(rows), 2, *grid)
    # A common scale: what looks alike in two maps is alike.
    low = np.percentile(np.stack(list(similar.values())), 1)
    return Maps(grid, colours, shares, chosen, similar, float(min(low, 0.99)))
