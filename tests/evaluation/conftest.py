"""Labelled data sets in small, and a tiny backbone."""

import json

import numpy as np
import pytest
from PIL import Image

import fastalign as fa
from fastalign.evaluation import datasets, label_maps
from tests.data_helpers import encode, write_tar
from tests.evaluation.helpers import (
    CLASSES,
    COUNTS,
    KWARGS,
    NAME,
    PUBLISHED,
    SIZE,
    coloured,
    grey,
    picture,
    put,
    scene,
)


@pytest.fixture
def own(tmp_path):
    """A folder as users have it: two training images, one of them nested, one image in val and in test."""
    root = tmp_path / "own"
    for name in ("train/{}/a", "train/{}/deep/er/b", "val/{}/c", "test/{}/d"):
        put(root / f"{name.format('images')}.jpg", picture(ord(name[-1])))
        put(root / f"{name.format('labels')}.png", grey(1, 2, 255))
    (root / "classes.txt").write_text("unlabeled\ncat\ndog\n")
    return root


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """COCO in small, as the download leaves it: COCO-Stuff's maps and panoptic ones."""
    monkeypatch.setitem(datasets.HELD_OUT, "coco", 2)
    label_maps.read_panoptic.cache_clear()
    root = tmp_path / "coco"
    categories = [{"id": 200, "name": "rug", "isthing": 0}, {"id": 1, "name": "person", "isthing": 1}]
    for split, numbers in zip(("train", "val"), PUBLISHED["coco"], strict=True):
        annotations = []
        for number in numbers:
            put(root / f"images/{split}2017/{number}.jpg", picture(int(number)))
            put(root / f"annotations/{split}2017/{number}.png", grey(255, 0, 90, 91, 181))
            pixels = np.zeros((*SIZE[::-1], 3), dtype=np.uint8)
            pixels[0, :3] = (7, 0, 0), (1, 2, 3), (0, 0, 200)
            put(root / f"annotations/panoptic_{split}2017/{number}.png", Image.fromarray(pixels))
            # 1 + 2 * 256 + 3 * 65536 = 197121; 200 * 65536 = 13107200
            ids = {13107200: 1, 7: 200, 197121: 1}
            segments = [{"id": i, "category_id": c, "iscrowd": 0, "area": 1} for i, c in ids.items()]
            annotations.append({"file_name": f"{number}.png", "segments_info": segments})
        content = {"annotations": annotations, "categories": categories}
        (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def ade(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.HELD_OUT, "ade20k", 2)
    place = tmp_path / "ade" / "ADEChallengeData2016"
    for folder, numbers in zip(("training", "validation"), PUBLISHED["ade20k"], strict=True):
        for name in numbers:
            put(place / "images" / folder / f"{name}.jpg", picture())
            put(place / "annotations" / folder / f"{name}.png", grey(0, 1, 150))
    return place.parent


@pytest.fixture
def tars(tmp_path):
    """Two training shards with the same keys, one shard each for val and test."""
    root = tmp_path / "tars"
    for name, first in (("train-000", 0), ("train-001", 2), ("val-000", 4), ("test-000", 6)):
        members = []
        for i in range(2):
            members += [(f"{i:04d}.json", b"{}"), (f"{i:04d}.png", encode(grey(i, 255), "PNG"))]
            members += [(f"{i:04d}.jpg", encode(picture(first + i)))]
        write_tar(root / f"{name}.tar", members)
    (root / "classes.txt").write_text("sea\nland\n")
    return root


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            for kind, image in zip(("images", "labels"), scene(draw, split), strict=True):
                put(root / split / kind / f"{split}{number:02d}.png", image)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture
def vit():
    return fa.create_backbone(NAME, **KWARGS)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Six classes as folders: 36 training images, 18 for validation, 12 for the test."""
    root, draw = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 3), ("test", 2)):
        for label in range(6):
            for number in range(each):
                put(root / split / f"class{label}" / f"{number}.png", coloured(label, draw))
    return root
