"""A finished run of four updates on real JPEGs."""

import numpy as np
import pytest
import yaml
from PIL import Image

from fastalign import train
from tests.report.helpers import MODEL


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of four updates on real JPEGs."""
    root, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for index in range(count):
            path = root / split / f"{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            noise = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC).save(path)
    tree = {
        "output": str(root / "run"),
        "student": MODEL,
        "data": {"train": str(root / "train"), "val": str(root / "val"), "threads": 1},
        "optim": {"batch_size": 8, "epochs": 2},
        "log": {"every_steps": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert train.main([str(root / "recipe.yaml")]) == 0
    return root / "run"


@pytest.fixture
def run(trained, tmp_path):
    """The run's small files, to be damaged at will."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "config.yaml", "backbone.json", "backbone.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder
