"""COCO, ADE20K and tar shards, as they are published, in miniature."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from fastalign.evaluation import datasets
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.label_maps import VOID
from tests.data_helpers import encode, write_tar
from tests.evaluation.helpers import COCO_TRAIN, COCO_VAL, data_error, expected, grey, names, picture, put


def lowest_digests(files, count):
    """The files whose names have the lowest SHA-256, as `printf NAME | sha256sum` prints them, and the others."""
    ordered = sorted(files, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(ordered[:count]), set(ordered[count:])


def test_tar_shards(tars):
    train = open_labelled(str(tars), "train")
    assert [name.rpartition("/")[2] for name in names(train)] == [
        f"train-{shard}.tar:{i:04d}.jpg" for shard in ("000", "001") for i in range(2)
    ]
    for index in range(4):
        assert np.array_equal(train.source.read(index), encode(picture(index)))
        assert np.array_equal(train.label_map(index), expected(index % 2, VOID))
    assert np.array_equal(open_labelled(str(tars), "val").source.read(1), encode(picture(5)))
    assert len(open_labelled(str(tars), "test")) == 2
    assert (train.classes, train.unlabeled) == (("sea", "land"), None)


def test_coco_stuff(coco):
    test = open_labelled(f"coco:{coco}", "test")
    assert names(test) == [f"{number}.jpg" for number in COCO_VAL]
    # The annotations say: 255 unlabeled, 0 person; 91 is the first stuff class, 181 the last.
    assert np.array_equal(test.label_map(0), expected(0, 1, 91, 92, 182, rest=1))
    assert len(test.classes) == 183
    spot = {0: "unlabeled", 1: "person", 90: "toothbrush", 92: "banner", 157: "sky-other", 182: "wood"}
    assert {i: test.classes[i] for i in spot} == spot
    assert test.unlabeled == 0
    things = open_labelled(f"coco-things:{coco}", "test")
    assert np.array_equal(things.label_map(0), expected(0, 1, 91, 0, 0, rest=1))
    assert (len(things.classes), things.classes[91], things.unlabeled) == (92, "hair brush", 0)


def test_coco_panoptic(coco):
    test = open_labelled(f"coco-panoptic:{coco}", "test")
    assert test.classes == ("unlabeled", "person", "rug")  # by category id
    assert np.array_equal(test.label_map(1), expected(2, 1, 1))
    assert test.unlabeled == 0


@pytest.mark.parametrize("kind", ["coco", "coco-panoptic"])
def test_val_is_a_fixed_part_of_the_training_split(coco, kind):
    val, train = lowest_digests([f"{number}.jpg" for number in COCO_TRAIN], 2)
    assert set(names(open_labelled(f"{kind}:{coco}", "val"))) == val
    rest = open_labelled(f"{kind}:{coco}", "train")
    assert set(names(rest)) == train
    assert [name[:-4] for name in names(rest.maps)] == [name[:-4] for name in names(rest)]


def test_ade20k(ade):
    test = open_labelled(f"ade20k:{ade}", "test")
    assert names(test) == ["ADE_val_00000001.jpg", "ADE_val_00000002.jpg"]
    assert np.array_equal(test.label_map(1), expected(0, 1, 150))
    assert len(test.classes) == 151
    spot = {0: "unlabeled", 1: "wall", 3: "sky", 150: "flag"}
    assert {i: test.classes[i] for i in spot} == spot
    val, train = lowest_digests([f"ADE_train_{n:08d}.jpg" for n in (1, 2, 3)], 1)
    assert set(names(open_labelled(f"ade20k:{ade}", "val"))) == val
    assert set(names(open_labelled(f"ade20k:{ade}", "train"))) == train
    put(ade / "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png", grey(151))
    assert "the id 151" in data_error(f"ade20k:{ade}", "test", index=1)


def test_bad_tar_shards_are_refused(tars):
    write_tar(tars / "train-001.tar", [("x.jpg", encode(picture())), ("y.png", encode(grey(0), "PNG"))])
    message = data_error(tars)
    assert "1 of 3 images" in message
    assert "train-001.tar:x.jpg" in message
    write_tar(tars / "val-000.tar", [("x.jpg", encode(picture()))])
    assert "no label maps" in data_error(tars, "val")
    write_tar(tars / "test-000.tar", [("x.png", encode(grey(7), "PNG")), ("x.jpg", encode(picture()))])
    assert "test-000.tar:x.png has the id 7" in data_error(tars, "test", index=0)
    (tars / "test").mkdir()
    assert "both" in data_error(tars, "test")


def test_bad_coco_is_refused(coco, monkeypatch):
    put(coco / "annotations/val2017/000000000139.png", grey(3, 182))
    assert "000000000139.png has the id 182" in data_error(f"coco:{coco}", "test", index=0)
    (coco / "annotations/val2017/000000000285.png").unlink()
    assert "000000000285.jpg" in data_error(f"coco:{coco}", "test")
    monkeypatch.setitem(datasets.HELD_OUT, "coco", 7)
    assert "7 images" in data_error(f"coco:{coco}", "train")
    shutil.rmtree(coco / "annotations/train2017")
    message = data_error(f"coco:{coco}", "train")
    assert f"examples/download.sh coco {coco}`" in message
    assert str(coco / "annotations/train2017") in message


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("no 'categories'", lambda c: c.pop("categories")),
        ("no 77", lambda c: c["annotations"][1]["segments_info"][0].update(category_id=77)),
        ("lacks 1 maps", lambda c: c["annotations"].pop()),
        ("segment 197121", lambda c: c["annotations"][0]["segments_info"].pop()),
        ("not a panoptic JSON", lambda c: c.clear()),
        ("download.sh coco-panoptic", None),
    ],
)
def test_a_bad_panoptic_json_is_refused(coco, words, change):
    path = coco / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    if change:
        change(content)
        path.write_text(json.dumps(content))
    else:
        path.unlink()
    message = data_error(f"coco-panoptic:{coco}", "test", index=0)
    assert words in message
    assert str(path) in message
