"""Labels of patches, by hand and against PIL."""

import numpy as np
import pytest
from PIL import Image

from fastalign.evaluation.label_maps import VOID, crop_and_resize, patch_labels


def test_a_label_map_is_cropped_and_resized_as_pil_does():
    rng = np.random.default_rng(0)
    for height, width, size in ((37, 61, 24), (61, 37, 24), (24, 24, 24), (16, 40, 48), (333, 500, 224)):
        labels = rng.integers(0, 200, (height, width)).astype(np.uint8)
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        wanted = Image.fromarray(labels).crop((left, top, left + side, top + side))
        wanted = np.asarray(wanted.resize((size, size), Image.Resampling.NEAREST))
        assert np.array_equal(crop_and_resize(labels, (size, size)), wanted)


def test_a_rectangular_input_takes_the_largest_crop_of_its_shape():
    labels = np.arange(8 * 12).reshape(8, 12)
    assert np.array_equal(
        crop_and_resize(labels, (4, 8)), labels[np.ix_((1, 3, 4, 6), (0, 2, 3, 5, 6, 8, 9, 11))]
    )


@pytest.mark.parametrize(
    ("rows", "unlabeled", "union", "majority", "image"),
    [
        (["0011", "0211", "00..", "00.."], None, [{0, 2}, {1}, {0}, set()], [0, 1, 0, VOID], {0, 1, 2}),
        (["0300", "0000"], 0, [{3}, {0}], [0, 0], {0, 3}),  # unlabeled, but not next to another class
        (["210", "120", "000"], None, [{1, 2}], [1], {1, 2}),  # a tie, and a remainder
    ],
)
def test_patch_labels_worked_by_hand(rows, unlabeled, union, majority, image):
    labels = np.array([[VOID if pixel == "." else int(pixel) for pixel in row] for row in rows], np.int16)
    found = patch_labels(labels, size=labels.shape, patch=(2, 2), classes=4, unlabeled=unlabeled)
    assert [set(np.flatnonzero(patch)) for patch in found[0]] == union
    assert found[1].tolist() == majority
    assert set(np.flatnonzero(found[2])) == image
