"""Labelled data sets in small, written pixel by pixel; what comes out is compared with what was written."""

import hashlib
import json
import shutil
import struct
import subprocess
import threading
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import mosaics
from fastalign.data import Loader
from fastalign.data.sources import FolderSource
from fastalign.errors import UserError
from fastalign.probe import datasets, maps
from fastalign.probe.datasets import VOID, open_labelled
from tests.data_helpers import EVAL, encode, needs_dali, write_tar

SIZE = (6, 4)  # width, height


def picture(number=0, size=SIZE):
    draw = np.random.default_rng(number)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def grey(*values, size=SIZE, dtype=np.uint8):
    """A map with the given values in its first pixels, 0 elsewhere."""
    pixels = np.zeros((size[1], size[0]), dtype=dtype)
    pixels.flat[: len(values)] = values
    return Image.fromarray(pixels)


def put(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def expected(*values, size=SIZE, rest=0):
    labels = np.full((size[1], size[0]), rest, dtype=np.int16)
    labels.flat[: len(values)] = values
    return labels


@pytest.fixture
def own(tmp_path):
    """A folder as users have it: two training images, one of them nested, one image in val and in test."""
    root = tmp_path / "own"
    for name in ("train/{}/a", "train/{}/deep/er/b", "val/{}/c", "test/{}/d"):
        put(root / f"{name.format('images')}.jpg", picture(ord(name[-1])))
        put(root / f"{name.format('labels')}.png", grey(1, 2, 255))
    (root / "classes.txt").write_text("unlabeled\ncat\ndog\n")
    return root


COCO_TRAIN = [f"{number:012d}" for number in (9, 25, 30, 34, 36, 42, 49)]
COCO_VAL = ["000000000139", "000000000285"]


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """COCO in small, as the download leaves it: COCO-Stuff's maps and panoptic ones."""
    monkeypatch.setitem(datasets.HELD_OUT, "coco", 2)
    root = tmp_path / "coco"
    categories = [{"id": 200, "name": "rug", "isthing": 0}, {"id": 1, "name": "person", "isthing": 1}]
    for split, numbers in (("train", COCO_TRAIN), ("val", COCO_VAL)):
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
            annotations.append(
                {"file_name": f"{number}.png", "image_id": int(number), "segments_info": segments}
            )
        content = {"info": {}, "images": [], "annotations": annotations, "categories": categories}
        (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def ade(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.HELD_OUT, "ade20k", 1)
    root = tmp_path / "ade"
    for part, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(1, count + 1):
            put(root / f"images/{part}/ADE_{short}_{number:08d}.jpg", picture(number))
            put(root / f"annotations/{part}/ADE_{short}_{number:08d}.png", grey(0, 1, 150))
    return root


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


def refused(data, split="train", index=None):
    """The one line with which a split, or a label map of it, is refused."""
    if index is None:
        with pytest.raises(UserError) as caught:
            open_labelled(str(data), split)
    else:
        images = open_labelled(str(data), split)
        with pytest.raises(UserError) as caught:
            images.label_map(index)
    text = str(caught.value)
    assert "\n" not in text
    return text


def names(images):
    source = getattr(images, "source", images)
    return [source.name(index) for index in range(len(source))]


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


@needs_dali
def test_the_loader_takes_a_part_of_a_folder(coco):
    """The images of `val` are those of the whole training folder that have its names."""

    def loaded(source):
        loader = Loader(source, EVAL, batch_size=3, device="cpu", train=False, threads=1)
        images = torch.cat([batch.images for batch in loader.batches()])
        loader.close()
        return {source.name(index): image for index, image in enumerate(images)}

    whole = loaded(FolderSource(str(coco / "images/train2017")))
    for split, count in (("train", 5), ("val", 2)):
        part = loaded(open_labelled(f"coco:{coco}", split).source)
        assert len(part) == count
        assert all(torch.equal(image, whole[name]) for name, image in part.items())


# --- tar shards


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


def test_bad_tar_shards_are_one_line(tars):
    write_tar(tars / "train-001.tar", [("x.jpg", encode(picture())), ("y.png", encode(grey(0), "PNG"))])
    message = refused(tars)
    assert "1 of 3 images" in message
    assert "train-001.tar:x.jpg" in message
    write_tar(tars / "val-000.tar", [("x.jpg", encode(picture()))])
    assert "no label maps" in refused(tars, "val")
    write_tar(tars / "val-000.tar", [("x.png", encode(grey(0), "PNG"))])
    assert "no images" in refused(tars, "val")
    (tars / "val-000.tar").write_bytes(b"torn")
    assert "val-000.tar" in refused(tars, "val")
    write_tar(
        tars / "test-000.tar", [("x.png", encode(grey(7), "PNG")), ("x.webp", encode(picture(), "WEBP"))]
    )
    assert "test-000.tar:x.png has the id 7" in refused(tars, "test", index=0)
    (tars / "test").mkdir()
    assert "both" in refused(tars, "test")


# --- COCO


def test_coco_stuff(coco):
    test = open_labelled(f"coco:{coco}", "test")
    assert names(test) == [f"{number}.jpg" for number in COCO_VAL]
    # The annotations say: 255 unlabeled, 0 person; 91 is the first stuff class, 181 the last.
    assert np.array_equal(test.label_map(0), expected(0, 1, 91, 92, 182, rest=1))
    assert len(test.classes) == 183
    spot = {
        0: "unlabeled",
        1: "person",
        18: "dog",
        90: "toothbrush",
        92: "banner",
        157: "sky-other",
        182: "wood",
    }
    assert {i: test.classes[i] for i in spot} == spot
    assert test.unlabeled == 0


def test_coco_things(coco):
    test = open_labelled(f"coco-things:{coco}", "test")
    assert np.array_equal(test.label_map(0), expected(0, 1, 91, 0, 0, rest=1))
    assert len(test.classes) == 92
    assert (test.classes[91], test.unlabeled) == ("hair brush", 0)


def test_coco_panoptic(coco):
    test = open_labelled(f"coco-panoptic:{coco}", "test")
    assert test.classes == ("unlabeled", "person", "rug")  # by category id
    assert np.array_equal(test.label_map(1), expected(2, 1, 1))
    assert test.unlabeled == 0


@pytest.mark.parametrize("kind", ["coco", "coco-panoptic"])
def test_val_is_a_fixed_part_of_the_training_split(coco, kind):
    """The two lowest SHA-256 of the file names, as `printf NAME | sha256sum` prints them."""
    digests = {}
    for number in COCO_TRAIN:
        result = subprocess.run(
            ["sha256sum"], input=f"{number}.jpg".encode(), capture_output=True, check=True
        )
        digests[f"{number}.jpg"] = result.stdout.split()[0]
    val = set(sorted(digests, key=digests.get)[:2])
    assert set(names(open_labelled(f"{kind}:{coco}", "val"))) == val
    assert set(names(open_labelled(f"{kind}:{coco}", "train"))) == set(digests) - val
    train = open_labelled(f"{kind}:{coco}", "train")
    for index in range(len(train.source)):
        assert train.maps.name(index)[:-4] == train.source.name(index)[:-4]
        train.label_map(index)


def test_the_held_out_parts_are_of_the_documented_size():
    assert datasets.HELD_OUT == {"coco": 5000, "ade20k": 2000}


def test_a_data_set_cut_short_is_refused(coco, monkeypatch):
    monkeypatch.setitem(datasets.HELD_OUT, "coco", 7)
    assert "7 images" in refused(f"coco:{coco}", "train")
    assert len(open_labelled(f"coco:{coco}", "test")) == 2


def test_the_publishers_own_layout(coco):
    """As the archives unpack by themselves, with the panoptic folders beside the images."""
    for year in ("train2017", "val2017"):
        shutil.move(coco / "images" / year, coco / year)
        shutil.move(coco / "annotations" / year, coco / "stuffthingmaps" / year)
        shutil.move(coco / f"annotations/panoptic_{year}", coco / f"panoptic_{year}")
    for kind, width in (("coco", 183), ("coco-things", 92), ("coco-panoptic", 3)):
        images = open_labelled(f"{kind}:{coco}", "test")
        assert images.label_map(0).shape == (4, 6)
        assert len(images.classes) == width


def test_bad_coco_is_one_line(coco):
    put(coco / "annotations/val2017/000000000139.png", grey(3, 182))
    message = refused(f"coco:{coco}", "test", index=0)
    assert "000000000139.png has the id 182" in message
    assert "183 classes" in message
    assert "id 182" in refused(f"coco-things:{coco}", "test", index=0)
    put(coco / "annotations/val2017/000000000139.png", grey(3, dtype=np.uint16))
    assert "16 bits" in refused(f"coco:{coco}", "test", index=0)
    (coco / "annotations/val2017/000000000285.png").unlink()
    assert "000000000285.jpg" in refused(f"coco:{coco}", "test")
    shutil.rmtree(coco / "annotations/train2017")
    message = refused(f"coco:{coco}", "train")
    assert "fastalign.probe.download" in message
    assert str(coco / "annotations/train2017") in message
    shutil.rmtree(coco / "images/val2017")
    assert str(coco / "images/val2017") in refused(f"coco:{coco}", "test")


def test_bad_panoptic_is_one_line(coco):
    path = coco / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    png = coco / "annotations/panoptic_val2017/000000000139.png"

    def message(index=None):
        return refused(f"coco-panoptic:{coco}", "test", index)

    def write(change):
        edited = json.loads(json.dumps(content))
        change(edited)
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(edited))

    write(lambda c: c["annotations"][0]["segments_info"].pop())
    assert "segment 197121" in message(0)
    assert str(png) in message(0)
    for words, change in {
        "no 'categories'": lambda c: c.pop("categories"),
        "no 77": lambda c: c["annotations"][1]["segments_info"][0].update(category_id=77),
        "no 'segments_info'": lambda c: c["annotations"][1].pop("segments_info"),
        "twice": lambda c: c["categories"].append(c["categories"][0]),
        "says nothing of 1 maps": lambda c: c["annotations"].pop(),
    }.items():
        write(change)
        assert words in message()
        assert str(path) in message()
    for text in ("{", "[]", "3", '{"categories": 3, "annotations": []}'):
        path.unlink()
        path.write_text(text)
        assert "not a panoptic JSON" in message()
    path.unlink()
    assert "--panoptic" in message()
    write(lambda c: None)
    put(png, grey(7))
    assert "RGB" in message(0)


def test_ade20k(ade):
    test = open_labelled(f"ade20k:{ade}", "test")
    assert names(test) == ["ADE_val_00000001.jpg", "ADE_val_00000002.jpg"]
    assert np.array_equal(test.label_map(1), expected(0, 1, 150))
    assert len(test.classes) == 151
    spot = {
        0: "unlabeled",
        1: "wall",
        3: "sky",
        13: "person, individual, someone, somebody, mortal, soul",
        150: "flag",
    }
    assert {i: test.classes[i] for i in spot} == spot
    numbers = {f"ADE_train_{n:08d}.jpg" for n in (1, 2, 3)}
    lowest = min(numbers, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert names(open_labelled(f"ade20k:{ade}", "val")) == [lowest]
    assert set(names(open_labelled(f"ade20k:{ade}", "train"))) == numbers - {lowest}
    put(ade / "annotations/validation/ADE_val_00000002.png", grey(151))
    assert "the id 151" in refused(f"ade20k:{ade}", "test", index=1)
    # As its archive unpacks by itself.
    (ade / "ADEChallengeData2016").mkdir()
    for name in ("images", "annotations"):
        shutil.move(ade / name, ade / "ADEChallengeData2016" / name)
    assert len(open_labelled(f"ade20k:{ade}", "test")) == 2


def test_opening_decodes_nothing(coco, monkeypatch):
    monkeypatch.setattr(maps.Image, "open", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("fastalign.data.sources.FolderSource.read", lambda *_: pytest.fail("read"))
    for kind in ("coco", "coco-panoptic"):
        assert len(open_labelled(f"{kind}:{coco}", "train")) == 5


def test_class_names_are_distinct_and_come_with_the_package():
    for key, count in (("coco", 183), ("ade20k", 151)):
        assert len(set(datasets.class_names(key))) == len(datasets.class_names(key)) == count
    listed = (Path(__file__).parent.parent / "pyproject.toml").read_text().partition("package-data]")[2]
    assert '"fastalign.probe" = ["classes.json"]' in listed


def test_a_folder_that_cannot_be_read_is_one_line(own, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(datasets, "FolderSource", denied)
    assert "Permission denied" in refused(own)
