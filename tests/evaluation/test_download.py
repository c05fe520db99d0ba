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


def pack(path, folder, *names):
    """A zip file of the named files and folders below a folder."""
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            found = [folder / name] if (folder / name).is_file() else sorted((folder / name).rglob("*"))
            for file in found:
                archive.write(file, file.relative_to(folder))


@pytest.fixture
def published(coco, ade, tmp_path):
    """The archives as they are published, from the small data sets of the other tests."""
    site, both = tmp_path / "site", ("train2017", "val2017")
    for split in both:
        pack(site / f"{split}.zip", coco / "images", split)
        pack(coco / f"annotations/panoptic_{split}.zip", coco / "annotations", f"panoptic_{split}")
    pack(site / "stuffthingmaps_trainval2017.zip", coco / "annotations", *both)
    panoptic = [f"annotations/panoptic_{split}.{kind}" for split in both for kind in ("zip", "json")]
    pack(site / "panoptic_annotations_trainval2017.zip", coco, *panoptic)
    pack(site / "ADEChallengeData2016.zip", ade, "ADEChallengeData2016")
    return site


def script_for(site):
    """The script with these archives' digests in place of the published ones."""
    text = SCRIPT.read_text()
    for name, digest in re.findall(r"/([\w.]+\.zip) \\\n +([0-9a-f]{40,})", text):
        algorithm = hashlib.sha1 if len(digest) == 40 else hashlib.sha256
        text = text.replace(digest, algorithm((site / name).read_bytes()).hexdigest())
    path = site.parent / "download.sh"
    path.write_text(text)
    return path


def run(script, site, *arguments):
    line = ["bash", str(script), *map(str, arguments)]
    environment = {**os.environ, "BASE_URL": f"file://{site}"}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("data", "train"), [("coco", 5), ("coco-panoptic", 5), ("ade20k", 1)])
def test_what_it_fetches_is_what_the_probe_reads(data, train, published, tmp_path):
    script, root = script_for(published), tmp_path / "root folder"
    result = run(script, published, data, root)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"ready: {data}:{root}\n")
    for split, count in (("train", train), ("test", 2)):
        images = open_labelled(f"{data}:{root}", split)
        assert len(images) == count
        images.label_map(0)
    shutil.rmtree(published)  # nothing is fetched twice
    assert run(script, published, data, root).returncode == 0


def test_another_file_is_deleted_and_an_interrupted_one_continued(published, tmp_path):
    result = run(SCRIPT, published, "coco", tmp_path / "root")
    assert result.returncode == 1
    assert "train2017.zip was not the published file and is deleted" in result.stderr
    assert not list((tmp_path / "root/archives").iterdir())
    part = tmp_path / "root/archives/train2017.zip.part"
    part.write_bytes((published / "train2017.zip").read_bytes()[:100])
    assert run(script_for(published), published, "coco", tmp_path / "root").returncode == 0
    assert run(SCRIPT, published, "imagenet", tmp_path).returncode == 2
