"""Labels of patches, from a map of class ids 0..C-1 and VOID. The N patches are ordered by rows."""

import numpy as np

from fastalign.evaluation.maps import VOID


def crop_and_resize(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] -> [h, w]: the largest centre crop of the shape of `size`, resized to it by nearest neighbour."""
    scale = min(have / want for have, want in zip(labels.shape, size, strict=True))
    picked = []
    for have, want in zip(labels.shape, size, strict=True):
        side = min(have, round(want * scale))
        # The input pixel under the centre of each output pixel, as PIL's NEAREST.
        picked.append((have - side) // 2 + ((np.arange(want) + 0.5) * (side / want)).astype(np.int64))
    return labels[np.ix_(*picked)]


def patch_labels(
    labels: np.ndarray,
    *,
    size: tuple[int, int],
    patch: tuple[int, int],
    classes: int,
    unlabeled: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels of an image, as in Covert et al. (2025), section 4.

    Args:
        labels: [H, W] integers.
        size: of the backbone's input, (h, w) pixels.
        patch: (h, w) pixels; a remainder of the input is ignored.
        classes: C.
        unlabeled: the class that means "no label": a patch has it only if it has no other.

    Returns:
        union: [N, C] bool, the classes that a patch contains.
        majority: [N] int16, the class of most pixels, the lowest id of equals; VOID where all pixels are void.
        image: [C] bool, the classes anywhere in the image.
    """
    labels = crop_and_resize(labels, size)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    cut = labels[: rows * patch[0], : columns * patch[1]]
    pixels = cut.reshape(rows, patch[0], columns, patch[1]).swapaxes(1, 2).reshape(rows * columns, -1)
    # One histogram for all patches; column 0 counts the void pixels.
    cells = np.arange(len(pixels))[:, None] * (classes + 1) + pixels.astype(np.int64) + 1
    counts = np.bincount(cells.ravel(), minlength=len(pixels) * (classes + 1)).reshape(len(pixels), -1)[:, 1:]
    majority = np.where(counts.any(1), counts.argmax(1), VOID).astype(np.int16)
    union = counts > 0
    image = union.any(0)
    if unlabeled is not None:
        union[union.sum(1) > 1, unlabeled] = False
    return union, majority, image
