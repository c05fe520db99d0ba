"""`examples/download.sh`, with small archives at file:// addresses in place of the publishers'."""

import hashlib
import os
import re
import shutil
import subprocess
import zipfile

import pytest

from fastalign.evaluation.datasets import open_labelled
from tests.run_helpers import ROOT

SCRIPT = ROOT / "examples/download.sh"


def pack(path, folder, *patterns):
    """A zip file of the files below a folder that match."""
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in (file for pattern in patterns for file in folder.glob(pattern)):
            archive.write(file, file.relative_to(folder))


@pytest.fixture
def published(coco, ade, tmp_path):
    """The archives as they are published, of small data sets, and the script with their digests."""
    site, both = tmp_path / "site", ("train2017", "val2017")
    for split in both:
        pack(site / f"{split}.zip", coco / "images", f"{split}/*")
        pack(coco / f"annotations/panoptic_{split}.zip", coco / "annotations", f"panoptic_{split}/*")
    pack(site / "stuffthingmaps_trainval2017.zip", coco / "annotations", *(f"{split}/*" for split in both))
    pack(site / "panoptic_annotations_trainval2017.zip", coco, "annotations/*.zip", "annotations/*.json")
    pack(site / "ADEChallengeData2016.zip", ade, "**/*.*")
    text, script = SCRIPT.read_text(), tmp_path / "download.sh"
    for name, digest in re.findall(r"/([\w.]+\.zip) \\\n +([0-9a-f]{40,})", text):
        algorithm = hashlib.sha1 if len(digest) == 40 else hashlib.sha256
        text = text.replace(digest, algorithm((site / name).read_bytes()).hexdigest())
    script.write_text(text)
    return site, script


def run(script, site, *arguments):
    line = ["bash", str(script), *map(str, arguments)]
    environment = {**os.environ, "BASE_URL": f"file://{site}"}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("data", "train"), [("coco", 5), ("coco-panoptic", 5), ("ade20k", 1)])
def test_what_it_fetches_is_what_the_probe_reads(data, train, published, tmp_path):
    (site, script), root = published, tmp_path / "root folder"
    result = run(script, site, data, root)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"ready: {data}:{root}\n")
    for split, count in (("train", train), ("test", 2)):
        images = open_labelled(f"{data}:{root}", split)
        assert len(images) == count
        images.label_map(0)
    shutil.rmtree(site)  # nothing is fetched twice
    assert run(script, site, data, root).returncode == 0


def test_another_file_is_deleted_and_an_interrupted_one_continued(published, tmp_path):
    (site, script), root = published, tmp_path / "root"
    result = run(SCRIPT, site, "coco", root)
    assert result.returncode == 1
    assert "train2017.zip was not the published file and is deleted" in result.stderr
    assert not list((root / "archives").iterdir())
    (root / "archives/train2017.zip.part").write_bytes((site / "train2017.zip").read_bytes()[:100])
    assert run(script, site, "coco", root).returncode == 0
    assert run(SCRIPT, site, "imagenet", tmp_path).returncode == 2
