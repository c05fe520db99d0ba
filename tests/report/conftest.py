"""A finished run of four updates on real JPEGs."""

import json
import shutil

import pytest
import yaml

from fastalign import train
from tests.data_helpers import small_photos, write_folder
from tests.report.helpers import MODEL, probe_facts


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    for split, count in (("train", 16), ("val", 5)):
        write_folder(root / split, {f"{i}.jpg": photo for i, photo in enumerate(small_photos(count))})
    (root / "recipe.yaml").write_text(yaml.safe_dump({"student": MODEL}))
    keys = [f"output={root}/run", f"data.train={root}/train", f"data.val={root}/val", "data.threads=1"]
    keys += ["optim.batch_size=8", "optim.epochs=2", "log.every_steps=1"]
    assert train.main([str(root / "recipe.yaml"), *keys]) == 0
    return root / "run"


@pytest.fixture
def run(trained, tmp_path):
    """The run's files without its checkpoints, to be damaged at will."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))


@pytest.fixture
def probed(run):
    """The same with the results of a probe."""
    (run / "probe.json").write_text(json.dumps(probe_facts()))
    return run
