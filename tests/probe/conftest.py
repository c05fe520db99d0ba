"""Scenes, whole and damaged, and how often features are read."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastalign.backbones.vit import ViT
from tests.probe.helpers import CLASSES, COUNTS, scene


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            for kind, image in zip(("images", "labels"), scene(draw, split), strict=True):
                path = root / split / kind / f"{split}{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture
def damaged(data, tmp_path):
    """A copy to be spoilt."""
    return Path(shutil.copytree(data, tmp_path / "damaged"))


@pytest.fixture
def passes(monkeypatch):
    """How many images each pass through a backbone had."""
    counted, original = [], ViT.forward_layers

    def forward(self, images, skip_blocks):
        counted.append(len(images))
        return original(self, images, skip_blocks)

    monkeypatch.setattr(ViT, "forward_layers", forward)
    return counted
