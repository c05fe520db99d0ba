"""Labels of patches, by hand and against PIL."""

import numpy as np
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


def test_patch_labels_of_a_map_worked_by_hand():
    labels = np.array(
        [
            [0, 0, 1, 1],
            [0, 2, 1, 1],
            [0, 0, VOID, VOID],
            [0, 0, VOID, VOID],
        ],
        np.int16,
    )
    union, majority, image = patch_labels(labels, size=(4, 4), patch=(2, 2), classes=4)
    assert union.tolist() == [
        [True, False, True, False],
        [False, True, False, False],
        [True, False, False, False],
        [False] * 4,
    ]
    assert majority.tolist() == [0, 1, 0, VOID]
    assert image.tolist() == [True, True, True, False]


def test_unlabeled_counts_only_where_a_patch_has_nothing_else():
    labels = np.array([[0, 3, 0, 0], [0, 0, 0, 0]], np.int16)
    union, majority, image = patch_labels(labels, size=(2, 4), patch=(2, 2), classes=4, unlabeled=0)
    assert union.tolist() == [[False, False, False, True], [True, False, False, False]]
    assert majority.tolist() == [0, 0]
    assert image.tolist() == [True, False, False, True]


def test_a_tie_goes_to_the_lowest_id_and_a_remainder_is_left_out():
    labels = np.array([[2, 1, 0], [1, 2, 0], [0, 0, 0]], np.int16)
    assert patch_labels(labels, size=(3, 3), patch=(2, 2), classes=3)[1].tolist() == [1]
