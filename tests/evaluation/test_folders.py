"""A folder of images with label maps: every kind of map, and what is refused."""

import shutil
import struct
import threading
import zlib
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from demo import mosaics
from fastalign.evaluation import datasets
from fastalign.evaluation.datasets import VOID, open_labelled
from tests.data_helpers import encode
from tests.evaluation.label_maps import SIZE, expected, grey, names, picture, put, refused

# --- a folder of one's own


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
    (tmp_path / "classes.txt").write_text("\n".join("abcd"))
    for value, name in enumerate(("a.jpg", "a.k.jpg", "b.webp", "A.JPG")):
        put(tmp_path / "train/images" / name, picture(value))
        put(tmp_path / "train/labels" / f"{name.rpartition('.')[0]}.png", grey(*[value] * 24))
    train = open_labelled(str(tmp_path), "train")
    assert names(train.maps) != sorted(names(train.maps))
    written = {"a.jpg": 0, "a.k.jpg": 1, "b.webp": 2, "A.JPG": 3}
    assert {name: int(train.label_map(i)[0, 0]) for i, name in enumerate(names(train))} == written


def test_kinds_of_png(own):
    path = own / "train/labels/a.png"
    train = open_labelled(str(own), "train")
    put(path, grey(1, 2, 65535, dtype=np.uint16))
    assert np.array_equal(train.label_map(0), expected(1, 2, VOID))
    put(path, grey(1, 2, 255, dtype=np.uint16))
    assert "255" in refused(own, index=0)  # VOID only in a map of 8 bits
    palette = grey(1, 2, 255).convert("P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    palette.putdata([1, 2, 255] + [0] * 21)
    put(path, palette)
    assert Image.open(path).mode == "P"
    assert np.array_equal(train.label_map(0), expected(1, 2, VOID))
    palette.putdata([1, 2] + [0] * 22)
    palette.save(path, bits=2)
    assert path.read_bytes()[24] == 2
    assert np.array_equal(train.label_map(0), expected(1, 2))


def test_more_classes_than_8_bits_hold(own):
    (own / "classes.txt").write_text("\n".join(f"class {i}" for i in range(1000)))
    put(own / "train/labels/a.png", grey(999, 256, 65535, dtype=np.uint16))
    train = open_labelled(str(own), "train")
    assert np.array_equal(train.label_map(0), expected(999, 256, VOID))
    assert train.unlabeled is None


def small_grey(bits):
    """A grey PNG of 6 x 4 pixels with few bits a pixel, by hand: PIL reads such ones, but scales the values."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes([0b01000000] * (-(-6 * bits // 8)))) * 4
    header = struct.pack(">IIBBBBB", 6, 4, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_maps_of_few_bits_are_refused(own, bits):
    path = own / "train/labels/a.png"
    path.write_bytes(small_grey(bits))
    assert f"{bits} bits" in refused(own, index=0)
    assert Image.open(path).size == SIZE  # a proper PNG, by PIL's word


def test_bad_maps_are_one_line_with_the_file(own):
    path = own / "train/labels/a.png"
    whole = path.read_bytes()
    cases = {
        "is RGB": encode(picture(), "PNG").tobytes(),
        "RGB with alpha": encode(picture().convert("RGBA"), "PNG").tobytes(),
        "grey with alpha": encode(grey(1).convert("LA"), "PNG").tobytes(),
        "not a PNG": encode(grey(1), "JPEG").tobytes(),
        "is not a PNG": b"\x89PNG",
        "cannot decode": whole[: len(whole) // 2 + 10],
        "the id 3": encode(grey(1, 3), "PNG").tobytes(),
        "3 classes": encode(grey(1, 3), "PNG").tobytes(),
        "5 x 4 pixels": encode(grey(1, size=(5, 4)), "PNG").tobytes(),
    }
    for words, data in cases.items():
        path.write_bytes(data)
        message = refused(own, index=0)
        assert words in message
        assert str(path) in message
    path.write_bytes(b"")
    assert "a.png" in refused(own, index=0)
    path.write_bytes(whole)
    (own / "train/images/a.jpg").write_bytes(b"no image")
    assert "a.jpg" in refused(own, index=0)


def test_a_turned_photograph_has_the_size_it_is_stored_with(own):
    """As in the loader, EXIF orientations are not applied."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    picture().save(own / "train/images/a.jpg", exif=exif)
    assert open_labelled(str(own), "train").label_map(0).shape == (4, 6)


def test_images_and_maps_must_pair(own):
    labels = own / "train/labels"
    shutil.move(labels / "deep/er/b.png", labels / "deep/b.png")
    message = refused(own)
    assert "1 of 2 images" in message
    assert str(own / "train/images/deep/er/b.jpg") in message
    shutil.move(labels / "deep/b.png", labels / "deep/er/b.png")
    put(labels / "z.png", grey(0))
    message = refused(own)
    assert "1 of 3 label maps" in message
    assert str(labels / "z.png") in message
    (labels / "z.png").unlink()
    put(own / "train/images/a.png", picture())
    message = refused(own)
    assert "a.jpg" in message
    assert "a.png" in message


def test_missing_parts_are_one_line(own, tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing")
    assert "no such folder" in refused("coco:")
    assert "no such folder" in refused(f"ade20k:{tmp_path / 'nothing'}")
    assert "no labelled data" in refused("")
    shutil.rmtree(own / "train/labels")
    assert str(own / "train/labels") in refused(own)
    (own / "train/labels").mkdir()
    assert str(own / "train/labels") in refused(own)  # empty
    shutil.rmtree(own / "val/images")
    assert str(own / "val/images") in refused(own, "val")
    shutil.rmtree(own / "test")
    message = refused(own, "test")
    assert "test/" in message
    assert "test-*.tar" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no "),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"cat\ndog\ncat\n", "lines 1 and 3"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"\n".join(b"%d" % i for i in range(40000)), "40000 lines"),
    ],
)
def test_bad_classes_txt_is_one_line(own, text, words):
    path = own / "classes.txt"
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    message = refused(own)
    assert words in message
    assert str(path) in message


def test_classes_txt_of_other_editors(own):
    (own / "classes.txt").write_bytes("\ufeffchâteau\r\nunlabeled \r\nla mer\r\n\r\n".encode())
    train = open_labelled(str(own), "train")
    assert train.classes == ("château", "unlabeled", "la mer")
    assert train.unlabeled == 1


def test_unknown_kinds_and_splits_name_the_nearest(own):
    assert "nearest coco-panoptic" in refused("coco-panoptik:/data")
    assert "nearest ade20k" in refused("ade:/data")
    assert "nearest is val" in refused(own, "valid")
    assert "test" in refused(own, "")


def test_a_path_may_hold_a_colon(own, tmp_path):
    shutil.move(own, tmp_path / "mine:2026")
    assert len(open_labelled(str(tmp_path / "mine:2026"), "train")) == 2


def test_label_maps_from_threads(own):
    train = open_labelled(str(own), "train")
    put(own / "train/labels/a.png", grey(2, 2, 2))
    wanted, wrong = [expected(2, 2, 2), expected(1, 2, VOID)], []

    def work():
        for _ in range(50):
            wrong.extend(i for i in range(2) if not np.array_equal(train.label_map(i), wanted[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_fingerprint_tells_data_sets_apart_but_not_places(own, tmp_path):
    first = open_labelled(str(own), "train").fingerprint()
    shutil.copytree(own, tmp_path / "copy")
    assert open_labelled(str(tmp_path / "copy"), "train").fingerprint() == first
    seen = {first}
    for change in (
        lambda: put(own / "train/labels/a.png", grey(2)),
        lambda: put(own / "train/images/a.jpg", picture(99)),
        lambda: (own / "classes.txt").write_text("unlabeled\ncat\nmouse\n"),
        lambda: (own / "classes.txt").write_text("nothing\ncat\nmouse\n"),
        lambda: (
            shutil.move(own / "train/images/a.jpg", own / "train/images/x.jpg")
            and shutil.move(own / "train/labels/a.png", own / "train/labels/x.png")
        ),
    ):
        change()
        seen.add(open_labelled(str(own), "train").fingerprint())
    assert len(seen) == 6


def test_the_demos_mosaics_are_such_a_folder(tmp_path):
    few = {field.name: 2 for field in fields(mosaics.Settings) if field.name not in ("seed", "size")}
    mosaics.render(tmp_path / "mosaics", mosaics.Settings(**few, size=32), workers=1)
    for split in mosaics.SPLITS:
        images = open_labelled(str(tmp_path / "mosaics"), split)
        assert images.classes == mosaics.CLASSES
        assert images.unlabeled is None
        _, labels = mosaics.draw_mosaic(mosaics.load_photos(), 0, split, 1, 32)
        assert np.array_equal(images.label_map(1), labels)


def test_a_folder_that_cannot_be_read_is_one_line(own, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(datasets, "FolderSource", denied)
    assert "Permission denied" in refused(own)
