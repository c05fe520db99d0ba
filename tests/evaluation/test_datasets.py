"""Labelled data in miniature: label maps (one's own, COCO, ADE20K), and classes of images."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import fastalign as fa
from fastalign.data.sources import open_source
from fastalign.evaluation import datasets
from fastalign.evaluation.datasets import open_image_splits, open_labelled
from fastalign.evaluation.label_maps import VOID
from tests.data_helpers import encode, write_tar
from tests.evaluation.helpers import (
    PUBLISHED,
    SINGLE,
    coloured,
    expected,
    grey,
    names,
    picture,
    put,
    refused,
    write_split,
)

# --- one's own


def test_a_folder_with_nested_images(own, tmp_path):
    """A colon in its path; a byte-order mark, Windows line ends and spaces in classes.txt."""
    own = Path(shutil.move(own, tmp_path / "mine:2026"))
    (own / "classes.txt").write_bytes("\ufeffchâteau\r\nunlabeled \r\nla mer\r\n\r\n".encode())
    train = open_labelled(str(own), "train")
    assert names(train) == ["a.jpg", "deep/er/b.jpg"]
    assert (train.classes, train.unlabeled) == (("château", "unlabeled", "la mer"), 1)
    for index in range(2):
        assert train.label_map(index).dtype == np.int16
        assert np.array_equal(train.label_map(index), expected(1, 2, VOID))
    for split, name in (("val", "c.jpg"), ("test", "d.jpg")):
        assert names(open_labelled(str(own), split)) == [name]


def test_tar_shards(tars):
    train = open_labelled(str(tars), "train")
    assert [name.rpartition("/")[2] for name in names(train)] == [
        f"train-{shard}.tar:{i:04d}.jpg" for shard in ("000", "001") for i in range(2)
    ]
    for index in range(4):
        assert np.array_equal(train.source.read(index), encode(picture(index)))
        assert np.array_equal(train.label_map(index), expected(index % 2, VOID))
    assert np.array_equal(open_labelled(str(tars), "val").source.read(1), encode(picture(5)))
    assert (train.classes, train.unlabeled) == (("sea", "land"), None)


def test_maps_follow_their_images_whatever_the_suffixes(tmp_path):
    """a.jpg comes before a.k.jpg, but a.k.png before a.png."""
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    for value, name in enumerate(("a.jpg", "a.k.jpg", "b.webp", "A.JPG")):
        put(tmp_path / "train/images" / name, picture(value))
        put(tmp_path / "train/labels" / f"{name.rpartition('.')[0]}.png", grey(*[value] * 24))
    train = open_labelled(str(tmp_path), "train")
    assert names(train.maps) != sorted(names(train.maps))
    written = {"a.jpg": 0, "a.k.jpg": 1, "b.webp": 2, "A.JPG": 3}
    assert {name: int(train.label_map(i)[0, 0]) for i, name in enumerate(names(train))} == written


def test_the_fingerprint_is_of_the_contents_not_of_the_location(own, tmp_path):
    first = open_labelled(str(own), "train").fingerprint()
    shutil.copytree(own, tmp_path / "copy")
    assert open_labelled(str(tmp_path / "copy"), "train").fingerprint() == first
    seen = {first}
    for change in (
        lambda: put(own / "train/labels/a.png", grey(2)),
        lambda: put(own / "train/images/a.jpg", picture(99)),
        lambda: (own / "classes.txt").write_text("unlabeled\ncat\nmouse\n"),
        lambda: [path.rename(path.with_stem("x")) for path in (own / "train").glob("*/a.*")],
    ):
        change()
        seen.add(open_labelled(str(own), "train").fingerprint())
    assert len(seen) == 5


def test_kinds_of_png(own):
    path = own / "train/labels/a.png"
    (own / "classes.txt").write_text("\n".join(f"class {i}" for i in range(1000)))
    train = open_labelled(str(own), "train")
    put(path, grey(999, 256, 65535, dtype=np.uint16))
    assert np.array_equal(train.label_map(0), expected(999, 256, VOID))
    put(path, grey(1, 2, 255, dtype=np.uint16))
    assert np.array_equal(train.label_map(0), expected(1, 2, 255)), "void only in a map of 8 bits"
    palette = grey(1, 2, 255).convert("P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    palette.putdata([1, 2, 255] + [0] * 21)
    put(path, palette)
    assert np.array_equal(train.label_map(0), expected(1, 2, VOID))
    palette.putdata([1, 2] + [0] * 22)
    palette.save(path, bits=2)
    assert path.read_bytes()[24] == 2
    assert np.array_equal(train.label_map(0), expected(1, 2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is missing"),
        (b"\n\n", "has 0 lines"),
        (b"cat\ndog\ncat\n", "line 3 is empty or occurs before: 'cat'"),
        (b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_classes_txt_is_refused(own, text, words):
    path = own / "classes.txt"
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    refused(own, words, path)


def test_bad_maps_are_refused_with_their_file(own):
    path = own / "train/labels/a.png"
    valid = path.read_bytes()
    for words, data in {
        "mode RGB, 8 bits": encode(picture(), "PNG").tobytes(),
        "not a PNG": encode(grey(1), "JPEG").tobytes(),
        "cannot decode": valid[: len(valid) // 2 + 10],
        "the id 3": encode(grey(1, 3), "PNG").tobytes(),
        "5 x 4 pixels": encode(grey(1, size=(5, 4)), "PNG").tobytes(),
        "mode 1, 1 bits": encode(grey(1).convert("1"), "PNG").tobytes(),  # PIL would scale its values
    }.items():
        path.write_bytes(data)
        refused(own, words, path)
    path.write_bytes(valid)
    (own / "train/images/a.jpg").write_bytes(b"no image")
    refused(own, "a.jpg")


def test_images_and_maps_must_pair(own, tars):
    labels = own / "train/labels"
    shutil.move(labels / "deep/er/b.png", labels / "deep/b.png")
    refused(own, "1 of 2 images", own / "train/images/deep/er/b.jpg")
    put(labels / "deep/er/b.png", grey(0))
    refused(own, "1 of 3 label maps", labels / "deep/b.png")
    put(own / "train/images/a.png", picture())
    refused(own, "two files of one name")
    write_tar(tars / "train-001.tar", [("x.jpg", encode(picture())), ("y.png", encode(grey(0), "PNG"))])
    refused(tars, "1 of 3 images", "train-001.tar:x.jpg")
    write_tar(tars / "val-000.tar", [("x.jpg", encode(picture()))])
    refused(tars, "1 of 1 images have no label map", split="val")
    write_tar(tars / "test-000.tar", [("x.png", encode(grey(7), "PNG")), ("x.jpg", encode(picture()))])
    refused(tars, "test-000.tar:x.png has the id 7", split="test")


def test_missing_parts_are_named(own, tars, tmp_path):
    refused(tmp_path / "nothing", "no such folder")
    refused("", "no such folder: ''")
    refused("coco-panoptik:/data", "nearest is coco-panoptic")
    refused(own, "the nearest is val", split="valid")
    shutil.rmtree(own / "train/labels")
    refused(own, own / "train/labels")
    shutil.rmtree(own / "test")
    refused(own, "has neither test/ nor test-*.tar: give one", split="test")
    (tars / "test").mkdir()
    refused(tars, "has both test/ and test-*.tar", split="test")


# --- COCO and ADE20K


@pytest.mark.parametrize(
    ("kind", "pixels", "count", "classes"),
    [
        # The annotations say: 255 unlabeled, 0 person; 91 is the first stuff class, 181 the last.
        ("coco", expected(0, 1, 91, 92, 182, rest=1), 183, {1: "person", 92: "banner", 182: "wood"}),
        ("coco-things", expected(0, 1, 91, 0, 0, rest=1), 92, {90: "toothbrush", 91: "hair brush"}),
        ("coco-panoptic", expected(2, 1, 1), 3, {1: "person", 2: "rug"}),  # by category id
        ("ade20k", expected(0, 1, 150), 151, {1: "wall", 3: "sky", 150: "flag"}),
    ],
)
def test_published_data(coco, ade, kind, pixels, count, classes):
    """`val` has the two files whose names have the lowest SHA-256, as `printf NAME | sha256sum` prints them."""
    data = f"{kind}:{ade if kind == 'ade20k' else coco}"
    test, val, train = (open_labelled(data, split) for split in ("test", "val", "train"))
    assert np.array_equal(test.label_map(0), pixels)
    assert (len(test.classes), test.unlabeled, test.classes[0]) == (count, 0, "unlabeled")
    assert {index: test.classes[index] for index in classes} == classes
    training, validation = ([f"{name}.jpg" for name in part] for part in PUBLISHED[kind.partition("-")[0]])
    assert names(test) == validation
    ordered = sorted(training, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert (set(names(val)), set(names(train))) == (set(ordered[:2]), set(ordered[2:]))
    assert [name[:-4] for name in names(train.maps)] == [name[:-4] for name in names(train)]


def test_bad_published_data_is_refused(coco, ade, monkeypatch):
    put(coco / "annotations/val2017/000000000139.png", grey(3, 182))
    refused(f"coco:{coco}", "000000000139.png has the id 182", split="test")
    (coco / "annotations/val2017/000000000285.png").unlink()
    refused(f"coco:{coco}", "000000000285.jpg", split="test")
    monkeypatch.setitem(datasets.HELD_OUT, "coco", 7)
    refused(f"coco:{coco}", "7 images")
    shutil.rmtree(coco / "annotations/train2017")
    missing = f"{coco / 'annotations/train2017'} is missing; `bash examples/download.sh coco {coco}`"
    refused(f"coco:{coco}", missing)
    put(ade / "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png", grey(151))
    refused(f"ade20k:{ade}", "the id 151", split="test", index=1)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("KeyError('categories')", lambda c: c.pop("categories")),
        ("KeyError(77)", lambda c: c["annotations"][1]["segments_info"][0].update(category_id=77)),
        ("lacks the label map", lambda c: c["annotations"].pop(0)),
        ("segment 197121", lambda c: c["annotations"][0]["segments_info"].pop()),
        ("is missing; `bash examples/download.sh coco-panoptic", None),
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
    refused(f"coco-panoptic:{coco}", words, path, split="test")


# --- classes


def labels_of(root: Path):
    said = []
    splits, classes = open_image_splits(root, SINGLE, said.append)
    return {name: split.labels.tolist() for name, split in splits.items()}, classes, said


def test_classes_are_matched_by_name(tmp_path):
    """Validation lacks the middle one: its images must not slide into the gap."""
    write_split(tmp_path, "train", {"a/0.png": 0, "b/0.png": 0, "c/x/0.png": 0})
    write_split(tmp_path, "val", {"c/0.png": 0, "a/0.png": 0})
    labels, classes, said = labels_of(tmp_path)
    assert (labels, classes) == ({"train": [0, 1, 2], "val": [0, 2]}, ["a", "b", "c"])
    assert said == ["val/ has no image of 1 classes, such as b: mean per class is over the others"]


def test_labels_in_a_table(tmp_path):
    """Integers sort by value; images next to images/ are ignored."""
    for split in ("train", "val"):
        write_split(tmp_path / split, "images", {"0.png": 10, "1.png": 9, "2.png": 100}, table=True)
        write_split(tmp_path / split, "masks", {"0.png": 0})
    labels, classes, said = labels_of(tmp_path)
    assert (labels["val"], classes, said) == ([1, 0, 2], ["9", "10", "100"], [])
    for row, words in {
        "0.png,1,0": r"0\.png has the label '1,0'; write an integer",  # a comma in a name, or a column too many
        f"0.png,{'9' * 5000}": "write an integer",
        f"{'x' * 200_000},1": "is not a CSV file",
    }.items():
        (tmp_path / "val/images/labels.csv").write_text(f"name,label\n{row}\n")
        with pytest.raises(fa.UserError, match=words):
            labels_of(tmp_path)


def test_labels_in_shards(tmp_path):
    pixels = encode(coloured(0, np.random.default_rng(0)), "PNG")
    for path in (tmp_path / split / f"{shard}.tar" for split in ("train", "val") for shard in (0, 1)):
        # A dot in a folder's name ends no key.
        names = ("dir.x/0.cls", "dir.x/0.crop.png", "dir.x/1.cls", "dir.x/1.crop.png")
        write_tar(path, list(zip(names, (b"2\n", pixels, b"1\n", pixels), strict=True)))
    labels, classes, _ = labels_of(tmp_path)
    assert (labels["train"], classes) == ([1, 0, 1, 0], ["1", "2"])
    write_tar(tmp_path / "val" / "1.tar", [("a.png", pixels)])
    with pytest.raises(fa.UserError, match=r"1 of 3 images have no label, the first is .*1.tar:a.png"):
        labels_of(tmp_path)


@pytest.mark.parametrize("joined", [False, True])
def test_labels_of_names_with_dots(tmp_path, joined):
    """Each image has the `.cls` of its own name before that of its key, also behind a tar's end mark."""
    classes = {"2020.01.05": b"cat", "2020.01.06": b"dog", "2021": b"cow", "2022.07": b"pig"}
    images = ("2020.01.05", "2020.01.06", "2021.left", "2021.right", "2022.08")
    files = [(f"{name}.jpg", b"i") for name in images]
    files += [(f"{name}.cls", label) for name, label in classes.items()]
    path, content = tmp_path / "t.tar", b""
    for group in [[file] for file in files] if joined else [files]:
        content += write_tar(path, group).read_bytes()
    path.write_bytes(content)
    assert open_source(str(path)).class_names() == ["cat", "dog", "cow", "cow", None]


def test_labels_that_contradict_one_another_are_refused(tmp_path):
    members = [("a.jpg", b"i"), ("a.cls", b"cat"), ("b.cls", b"cat"), ("b.cls", b"cat"), ("a.cls", b"dog")]
    path = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(fa.UserError, match=r"t.tar:a.cls has two labels, 'cat' and 'dog'"):
        open_source(str(path)).class_names()
