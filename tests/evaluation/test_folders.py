"""A folder of images with label maps: every kind of map, and what is refused."""

import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from demo import mosaics
from fastalign.evaluation.datasets import VOID, open_labelled
from tests.data_helpers import encode
from tests.evaluation.helpers import data_error, expected, grey, names, picture, put


def test_a_folder_with_nested_images(own):
    train = open_labelled(str(own), "train")
    assert names(train) == ["a.jpg", "deep/er/b.jpg"]
    assert train.classes == ("unlabeled", "cat", "dog")
    assert train.unlabeled == 0
    for index in range(2):
        labels = train.label_map(index)
        assert labels.dtype == np.int16
        assert np.array_equal(labels, expected(1, 2, VOID))
    for split, name in (("val", "c.jpg"), ("test", "d.jpg")):
        assert names(open_labelled(str(own), split)) == [name]


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
    message = data_error(own)
    assert words in message
    assert str(path) in message


def test_a_split_that_is_missing(own):
    shutil.rmtree(own / "val")
    assert "has neither val/ nor val-*.tar: give one" in data_error(own, "val")


def test_the_fingerprint_is_of_the_contents_not_of_the_location(own, tmp_path):
    first = open_labelled(str(own), "train").fingerprint()
    shutil.copytree(own, tmp_path / "copy")
    assert open_labelled(str(tmp_path / "copy"), "train").fingerprint() == first
    seen = {first}
    for change in (
        lambda: put(own / "train/labels/a.png", grey(2)),
        lambda: put(own / "train/images/a.jpg", picture(99)),
        lambda: (own / "classes.txt").write_text("unlabeled\ncat\nmouse\n"),
        lambda: [
            shutil.move(own / f"train/{old}", own / f"train/{old.replace('a.', 'x.')}")
            for old in ("images/a.jpg", "labels/a.png")
        ],
    ):
        change()
        seen.add(open_labelled(str(own), "train").fingerprint())
    assert len(seen) == 5


def test_the_demos_mosaics_are_such_a_folder(tmp_path):
    few = {field.name: 2 for field in fields(mosaics.Settings) if field.name not in ("seed", "size")}
    mosaics.render(tmp_path / "mosaics", mosaics.Settings(**few, size=32), workers=1)
    for split in mosaics.SPLITS:
        images = open_labelled(str(tmp_path / "mosaics"), split)
        assert images.classes == mosaics.CLASSES
        assert images.unlabeled is None
        _, labels = mosaics.draw_mosaic(0, split, 1, 32)
        assert np.array_equal(images.label_map(1), labels)


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


def test_bad_maps_are_refused_with_their_file(own):
    path = own / "train/labels/a.png"
    valid = path.read_bytes()
    for words, data in {
        "is RGB": encode(picture(), "PNG").tobytes(),
        "not a PNG": encode(grey(1), "JPEG").tobytes(),
        "cannot decode": valid[: len(valid) // 2 + 10],
        "the id 3": encode(grey(1, 3), "PNG").tobytes(),
        "5 x 4 pixels": encode(grey(1, size=(5, 4)), "PNG").tobytes(),
        "grey with 1 bits": encode(grey(1).convert("1"), "PNG").tobytes(),  # PIL would scale its values
    }.items():
        path.write_bytes(data)
        message = data_error(own, index=0)
        assert words in message
        assert str(path) in message
    path.write_bytes(valid)
    (own / "train/images/a.jpg").write_bytes(b"no image")
    assert "a.jpg" in data_error(own, index=0)


def test_images_and_maps_must_pair(own):
    labels = own / "train/labels"
    shutil.move(labels / "deep/er/b.png", labels / "deep/b.png")
    message = data_error(own)
    assert "1 of 2 images" in message
    assert str(own / "train/images/deep/er/b.jpg") in message
    put(labels / "deep/er/b.png", grey(0))
    message = data_error(own)
    assert "1 of 3 label maps" in message
    assert str(labels / "deep/b.png") in message
    put(own / "train/images/a.png", picture())
    assert "two files of one name" in data_error(own)


def test_missing_parts_are_named(own, tmp_path):
    for data, words in (
        (tmp_path / "nothing", "no such folder"),
        ("", "no labelled data"),
        ("coco-panoptik:/data", "nearest is coco-panoptic"),
    ):
        assert words in data_error(data)
    assert "there are train, val and test" in data_error(own, "valid")
    shutil.rmtree(own / "train/labels")
    assert str(own / "train/labels") in data_error(own)
    shutil.rmtree(own / "test")
    assert "test-*.tar" in data_error(own, "test")


def test_names_of_folders_and_classes(own, tmp_path):
    """A colon in the path; a byte-order mark, Windows line ends and spaces in classes.txt."""
    own = Path(shutil.move(own, tmp_path / "mine:2026"))
    (own / "classes.txt").write_bytes("\ufeffchâteau\r\nunlabeled \r\nla mer\r\n\r\n".encode())
    train = open_labelled(str(own), "train")
    assert train.classes == ("château", "unlabeled", "la mer")
    assert train.unlabeled == 1
