"""Pictures with label maps, and what is read of them."""

import numpy as np
import pytest
from PIL import Image

from fastalign.evaluation.datasets import open_labelled
from fastalign.utils.errors import UserError

SIZE = (6, 4)  # width, height


def picture(number=0, size=SIZE):
    draw = np.random.default_rng(number)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def grey(*values, size=SIZE, dtype=np.uint8):
    """A map with the given values in its first pixels, 0 elsewhere."""
    pixels = np.zeros((size[1], size[0]), dtype=dtype)
    pixels.flat[: len(values)] = values
    return Image.fromarray(pixels)


def put(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def expected(*values, size=SIZE, rest=0):
    labels = np.full((size[1], size[0]), rest, dtype=np.int16)
    labels.flat[: len(values)] = values
    return labels


COCO_TRAIN = [f"{number:012d}" for number in (9, 25, 30, 34, 36, 42, 49)]
COCO_VAL = ["000000000139", "000000000285"]


def refused(data, split="train", index=None):
    """The one line with which a split, or a label map of it, is refused."""
    if index is None:
        with pytest.raises(UserError) as caught:
            open_labelled(str(data), split)
    else:
        images = open_labelled(str(data), split)
        with pytest.raises(UserError) as caught:
            images.label_map(index)
    text = str(caught.value)
    assert "\n" not in text
    return text


def names(images):
    source = getattr(images, "source", images)
    return [source.name(index) for index in range(len(source))]
