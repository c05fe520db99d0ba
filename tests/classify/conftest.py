"""Six classes as folders, and a tiny ViT."""

import numpy as np
import pytest

import fastalign as fa
from tests.classify.helpers import KWARGS, NAME, picture


@pytest.fixture
def vit():
    return fa.create_backbone(NAME, **KWARGS)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six classes as folders: 36 training images, 18 for validation, 12 for the test."""
    root, draw = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 3), ("test", 2)):
        for label in range(6):
            for number in range(each):
                path = root / split / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(label, draw).save(path)
    return root
