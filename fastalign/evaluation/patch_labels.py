"""From a map of class ids to what each patch is asked.

Classes are 0..C-1; `VOID` pixels belong to none. N patches stand in rows, as the backbone's do.
"""

from typing import NamedTuple

import numpy as np

from fastalign.evaluation.maps import VOID


class PatchLabels(NamedTuple):
    """What is asked of one image."""

    union: np.ndarray
    """[N, C] bool: the classes that a patch holds"""
    majority: np.ndarray
    """[N] int16: the class of most of its pixels, VOID where it has none; of equals the lowest id"""
    whole: np.ndarray
    """[C] bool: the classes anywhere in the image, which is the label `global-union`"""


def crop_and_resize(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centre crop of the size's shape, resized to it by nearest neighbour.

    Args:
        labels: [H, W] ids.
        size: (h, w) pixels, as the backbone sees the image.

    Returns:
        [h, w] ids.
    """
    scale = min(have / want for have, want in zip(labels.shape, size, strict=True))
    places = []
    for have, want in zip(labels.shape, size, strict=True):
        side = min(have, round(want * scale))
        # The pixel whose area holds the centre of each output pixel, as PIL's NEAREST takes it.
        places.append((have - side) // 2 + ((np.arange(want) + 0.5) * (side / want)).astype(np.int64))
    return labels[np.ix_(*places)]


def patch_labels(
    labels: np.ndarray,
    *,
    size: tuple[int, int],
    patch: tuple[int, int],
    classes: int,
    unlabeled: int | None = None,
) -> PatchLabels:
    """Reduces a map of class ids to patches.

    Args:
        labels: [H, W] integers, 0..classes-1 or VOID.
        size: of the backbone's input, (h, w) pixels.
        patch: (h, w) pixels; a remainder of the input is ignored.
        classes: C.
        unlabeled: the class that stands for "no label": a patch has it only where it has no other.

    Returns:
        Union, majority and whole-image labels, as in Covert et al. (2025), section 4.
    """
    labels = crop_and_resize(labels, size)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    cut = labels[: rows * patch[0], : columns * patch[1]]
    pixels = cut.reshape(rows, patch[0], columns, patch[1]).swapaxes(1, 2).reshape(rows * columns, -1)
    # One histogram for all patches; column 0 takes the void pixels.
    place = np.arange(len(pixels))[:, None] * (classes + 1) + pixels.astype(np.int64) + 1
    counts = np.bincount(place.ravel(), minlength=len(pixels) * (classes + 1)).reshape(len(pixels), -1)[:, 1:]
    majority = np.where(counts.any(1), counts.argmax(1), VOID).astype(np.int16)
    union = counts > 0
    whole = union.any(0)
    if unlabeled is not None:
        union[union.sum(1) > 1, unlabeled] = False
    return PatchLabels(union, majority, whole)
