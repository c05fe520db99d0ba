"""Files that are no images, or broken ones: told from the header, replaced, listed; the decoder goes on."""

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fastalign.data import fetch, tars
from fastalign.data.bad_samples import (
    BadSample,
    BadSamples,
    append_to_list,
    read_list,
    read_quarantine,
    to_line,
    too_many,
)
from fastalign.data.cache import cache_folder, load_index, save_index
from fastalign.data.headers import MAX_PIXELS, inspect
from fastalign.data.loader import Loader
from fastalign.data.pipeline import DecodeError, Decoder
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from fastalign.errors import UserError
from fastalign.random import permutation
from tests.data_helpers import (
    EVAL,
    TRAIN,
    age,
    decode,
    encode,
    needs_dali,
    photo,
    small_photos,
    write_folder,
    write_tar,
)

SMALL = photo("chelsea").resize((90, 60))


def ycck() -> np.ndarray:
    """A JPEG whose Adobe segment says YCCK. Pillow writes CMYK only: the flag is changed, the colours with it."""
    data = bytearray(encode(SMALL.convert("CMYK"), quality=90))
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    data[place] = 2
    return np.frombuffer(bytes(data), np.uint8)


def turned(orientation: int) -> np.ndarray:
    exif = type(SMALL.getexif())()
    exif[0x0112] = orientation
    return encode(SMALL, quality=90, exif=exif)


def with_thumbnail() -> np.ndarray:
    """A JPEG with a whole little JPEG in front, as cameras write it."""
    inner = encode(SMALL.resize((16, 16))).tobytes()
    whole = encode(SMALL, quality=90).tobytes()
    return np.frombuffer(
        whole[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner + whole[2:], np.uint8
    )


def png(width: int, height: int, raw: bytes) -> bytes:
    """A grey PNG of one bit a pixel around compressed rows."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", raw) + chunk(b"IEND", b"")


def bomb() -> np.ndarray:
    """A true PNG of 14,000 x 14,000 white pixels, 25 kB."""
    rows = zlib.compress((b"\0" + b"\xff" * 1750) * 14_000)
    return np.frombuffer(png(14_000, 14_000, rows), np.uint8)


def jpeg_of(bits: int = 8, frames: int = 1) -> bytes:
    """A good JPEG but for its bits a sample, or one that has its size several times."""
    data = encode(SMALL, quality=90).tobytes()
    place = data.index(b"\xff\xc0")
    frame = data[place : place + 4] + bytes([bits]) + data[place + 5 : place + 19]
    return data[:place] + frame * frames + data[place + 19 :]


def bmp_with(place: int, value: int) -> bytes:
    """A BMP with a palette and a number of its header changed."""
    data = bytearray(encode(SMALL.quantize(64), "BMP").tobytes())
    data[place : place + 4] = struct.pack("<I", value)
    return bytes(data)


def webp_with_exif(size: int) -> bytes:
    """A WebP whose Exif chunk claims a size."""
    data = bytearray(encode(SMALL.convert("RGBA").rotate(20), "WEBP").tobytes())
    data[20] |= 8
    return bytes(data[:30]) + b"EXIF" + struct.pack("<I", size) + bytes(data[30:])


GOOD = {
    "jpeg": lambda: encode(SMALL, quality=90),
    "progressive": lambda: encode(SMALL, quality=90, progressive=True),
    "thumbnail": with_thumbnail,
    "garbage after the end": lambda: np.append(encode(SMALL, quality=90), np.arange(200, dtype=np.uint8)),
    "cmyk": lambda: encode(SMALL.convert("CMYK"), quality=90),
    "ycck": ycck,
    "grey": lambda: encode(SMALL.convert("L"), quality=90),
    **{f"exif {n}": lambda n=n: turned(n) for n in range(1, 9)},
    "png": lambda: encode(SMALL, "PNG"),
    "palette png": lambda: encode(SMALL.quantize(64), "PNG"),
    "one-bit png": lambda: encode(SMALL.convert("1"), "PNG"),
    "webp": lambda: encode(SMALL, "WEBP"),
    "lossless webp": lambda: encode(SMALL, "WEBP", lossless=True),
    "webp with alpha": lambda: encode(SMALL.convert("RGBA").rotate(20), "WEBP"),
    "bmp": lambda: encode(SMALL, "BMP"),
    "palette bmp": lambda: encode(SMALL.quantize(64), "BMP"),
    "one-bit bmp": lambda: encode(SMALL.convert("1"), "BMP"),
}
SIXTEEN_BITS = encode(SMALL.convert("L").convert("I;16"), "PNG")
REFUSED = {
    "GIF": encode(SMALL, "GIF"),
    "TIFF": encode(SMALL, "TIFF"),
    "JPEG 2000": encode(SMALL, "JPEG2000"),
    "AVIF": b"\0\0\0\x20ftypavif" + bytes(40),
    "PDF": b"%PDF-1.7 and so on",
    "HTML": b"\n<!DOCTYPE html><title>404</title>",
    "neither JPEG": b"this is no image at all",
    "zero bytes": b"",
    "truncated": encode(SMALL)[:-2],
    "more than 100 million": bomb(),
    "a JPEG of 40 bits": jpeg_of(bits=40),
    "two sizes": jpeg_of(frames=2),
    "a BMP of 8 bits and compression 1": bmp_with(30, 1),
    "a BMP of 8 bits and compression 7143424": bmp_with(30, 7_143_424),
    "broken BMP header": bmp_with(46, 14_850),
    "a PNG without its end": encode(SMALL, "PNG").tobytes()[:33] + b"\x77\x35\x94\0eXIf" + bytes(50),
    "2000000000 bytes of Exif": webp_with_exif(2_000_000_000),
    "0 x 5 pixels": png(5, 0, b""),
    "a side": png(70_000, 3, b""),
}


def test_good_headers_give_the_size_that_pillow_reads():
    for name, make in GOOD.items():
        assert inspect(make()) == decode(make()).size[::-1] == (60, 90), name
    assert inspect(SIXTEEN_BITS) == (60, 90)


@pytest.mark.parametrize("reason", REFUSED)
def test_other_files_are_refused_by_name(reason):
    assert reason in inspect(REFUSED[reason])


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "thumbnail", "exif 6", "png", "webp", "bmp"])
def test_every_truncation_is_noticed(kind):
    whole = GOOD[kind]()
    for length in range(len(whole)):
        # A PNG's last bytes are its end mark's checksum, which no decoder needs.
        if kind != "png" or length < len(whole) - 4:
            assert isinstance(inspect(whole[:length]), str), length


def test_a_size_that_would_fill_memory_is_refused_in_any_format():
    big = struct.pack(">HH", 65_000, 65_000)
    jpeg = bytearray(encode(SMALL).tobytes())
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = big
    bmp = bytearray(encode(SMALL, "BMP").tobytes())
    bmp[18:26] = struct.pack("<ii", 1 << 30, -(1 << 30))
    webp = bytearray(encode(SMALL.convert("RGBA").rotate(20), "WEBP").tobytes())
    webp[24:30] = b"\xff" * 6
    for data in (jpeg, bmp, webp):
        assert f"more than {MAX_PIXELS // 10**6} million" in inspect(bytes(data))


STARTS = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"RIFF\0\0\0\0WEBPVP8X", b"BM", b""]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=200))
def test_the_header_check_survives_any_bytes(start, rest):
    found = inspect(start + rest)
    assert isinstance(found, str) or 0 < found[0] * found[1] <= MAX_PIXELS


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["thumbnail", "png", "webp", "webp with alpha", "bmp"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    st.integers(0, 500),
)
def test_the_header_check_survives_mutations(kind, changes, cut):
    data = bytearray(GOOD[kind]().tobytes())
    for place, value in changes:
        data[place] = value
    found = inspect(bytes(data[: len(data) - cut]))
    assert isinstance(found, str) or 0 < found[0] * found[1] <= MAX_PIXELS


def made(source, transform, *, start=0, epoch=0, **options):
    loader = Loader(source, transform, device="cpu", threads=2, **options)
    batches = list(loader.batches(epoch, start))
    loader.close()
    return batches


def damaged(data: np.ndarray) -> np.ndarray:
    """A JPEG with a good size and end, and an impossible Huffman table."""
    data = bytearray(data.tobytes())
    place = data.index(b"\xff\xc4")
    data[place + 5 : place + 21] = b"\xff" * 16
    return np.frombuffer(bytes(data), np.uint8)


COUNT = 48
BAD = {3: "no image", 4: "GIF", 5: "cut", 17: "damaged", 18: "empty", 30: "damaged", 47: "damaged"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """48 good images; the same with seven bad ones among them, of which three only the decoder notices."""
    photos = small_photos(COUNT)
    good = {f"{i:03d}.jpg": p for i, p in enumerate(photos)}
    kinds = {
        "no image": np.frombuffer(b"no image", np.uint8),
        "GIF": encode(SMALL, "GIF"),
        "empty": np.zeros(0, np.uint8),
    }
    bad = dict(good)
    for index, kind in BAD.items():
        photo_ = photos[index]
        own = {"cut": photo_[: len(photo_) // 2], "damaged": damaged(photo_)}
        bad[f"{index:03d}.jpg"] = (kinds | own)[kind]
    root = tmp_path_factory.mktemp("bad")
    return write_folder(root / "good", good), write_folder(root / "bad", bad)


def stands_for(index: int) -> int:
    while index in BAD:
        index = (index + 1) % COUNT
    return index


@needs_dali
def test_bad_samples_are_replaced_by_the_next_good_one_bit_for_bit(folders):
    """Against the pixels of a clean data set, whatever the ranks, the start and what was known before."""
    clean, dirty = (open_source(str(folder)) for folder in folders)
    order = permutation(COUNT, seed=3, epoch=1)
    options = {"seed": 3, "epoch": 1}
    pixels = {
        int(i): image
        for batch in made(clean, TRAIN, batch_size=16, **options)
        for i, image in zip(batch.ids_host, batch.images, strict=True)
    }
    expected = [stands_for(int(i)) for i in order]

    def check(batches, start=0, quarantined=()):
        for batch in batches:
            ids = expected[start : start + 16]
            assert batch.ids_host.tolist() == batch.ids.tolist() == ids
            assert torch.equal(batch.images, torch.stack([pixels[i] for i in ids]))
            assert [s for s in batch.bad if s.id in quarantined] == []
            start += 16

    whole = made(dirty, TRAIN, batch_size=16, bad=(known := BadSamples()), **options)
    check(whole)
    assert {s.id for batch in whole for s in batch.bad} == set(known.found) == set(BAD)
    assert {s.name for s in known.found.values()} == {f"{i:03d}.jpg" for i in BAD}
    reasons = {i: known.found[i].reason for i in BAD}
    assert "GIF" in reasons[4]
    assert "zero bytes" in reasons[18]
    assert "truncated" in reasons[5]
    assert "cannot decode" in reasons[30]
    # Found already, as in the next epoch or after a resume: the same again, and the same is reported.
    again = made(dirty, TRAIN, batch_size=16, bad=known, **options)
    check(again)
    assert [set(batch.bad) for batch in again] == [set(batch.bad) for batch in whole]
    check(made(dirty, TRAIN, batch_size=16, bad=BadSamples(BAD), **options), quarantined=BAD)
    check(made(dirty, TRAIN, batch_size=16, bad=BadSamples([3, 17, 47]), **options), quarantined=(3, 17, 47))
    for start in (1, 2):
        check(made(dirty, TRAIN, batch_size=16, bad=BadSamples(), start=start, **options), start=start * 16)
    for world in (2, 4):
        parts = [
            made(dirty, TRAIN, batch_size=16 // world, bad=BadSamples(), rank=r, world_size=world, **options)
            for r in range(world)
        ]
        for step, ranks in enumerate(zip(*parts, strict=True)):
            ids = expected[step * 16 : step * 16 + 16]
            assert np.concatenate([b.ids_host for b in ranks]).tolist() == ids
            assert torch.equal(torch.cat([b.images for b in ranks]), torch.stack([pixels[i] for i in ids]))


@needs_dali
def test_evaluation_leaves_bad_samples_out(folders):
    clean, dirty = (open_source(str(folder)) for folder in folders)
    images = torch.cat([b.images for b in made(clean, EVAL, batch_size=16, train=False)])
    for size in (1, 7, 16):
        batches = made(dirty, EVAL, batch_size=size, train=False, bad=(known := BadSamples()))
        ids = np.concatenate([b.ids_host for b in batches]).tolist()
        assert ids == [i for i in range(COUNT) if i not in BAD]
        assert torch.equal(torch.cat([b.images for b in batches]), images[ids])
        assert set(known.found) == set(BAD)
    only = open_source(str(folders[1]))
    assert made(only, EVAL, batch_size=16, train=False, bad=BadSamples(range(COUNT))) == []


@needs_dali
def test_without_tolerance_the_first_bad_batch_is_an_error(folders):
    with pytest.raises(UserError, match=r"cannot decode 030\.jpg \(damaged: DALI.*1 of a batch of 10"):
        made(open_source(str(folders[1])), EVAL, batch_size=10, train=False, start=3)
    (first,) = made(open_source(str(folders[0])), EVAL, batch_size=COUNT, train=False)
    assert first.bad == ()


@needs_dali
@pytest.mark.parametrize("largest", [1, 0])
def test_a_batch_that_fails_without_a_culprit_is_decoded_image_by_image(folders, monkeypatch, largest):
    """As where memory is short: DALI fails on batches, and on none of their images as the examiner sees them."""
    clean, dirty = (open_source(str(folder)) for folder in folders)
    wanted = torch.cat([b.images for b in made(clean, EVAL, batch_size=16, train=False)])
    collect = Decoder.collect

    def short_of_memory(decoder):
        count, pixels = len(decoder._in_flight[0]), collect(decoder)
        if count > largest and decoder._size != (1, 1):
            raise DecodeError("Error in MIXED operator:\nout of memory")
        return pixels

    monkeypatch.setattr(Decoder, "collect", short_of_memory)
    if largest:
        batches = made(dirty, EVAL, batch_size=16, train=False, bad=BadSamples())
        ids = np.concatenate([b.ids_host for b in batches])
        assert set(ids.tolist()) == set(range(COUNT)) - set(BAD)
        assert torch.equal(torch.cat([b.images for b in batches]), wanted[ids])
        return
    told = (
        r"from .*000\.jpg to .*015\.jpg, but .*\(Error in MIXED operator: out of memory\): .* smaller batches"
    )
    with pytest.raises(UserError, match=told) as caught:
        made(clean, EVAL, batch_size=16, train=False)
    assert "\n" not in str(caught.value)


@needs_dali
def test_headers_that_fail_without_a_culprit_end_in_one_line(folders, monkeypatch):
    shapes = Decoder.shapes

    def broken(decoder, encoded):
        if len(encoded) > 1:
            raise DecodeError("too much")
        return shapes(decoder, encoded)

    monkeypatch.setattr(Decoder, "shapes", broken)
    with pytest.raises(UserError, match=r"batch from .*000\.jpg to .*015\.jpg, .*\(too much\)"):
        made(open_source(str(folders[0])), EVAL, batch_size=16, train=False)


@needs_dali
def test_a_hundred_in_a_row_are_no_accident(tmp_path):
    photos = small_photos(4)
    files = {f"{i:03d}.jpg": photos[0] for i in range(4)}
    files |= {f"{i:03d}.jpg": np.frombuffer(b"text", np.uint8) for i in range(4, 104)}
    source = open_source(str(write_folder(tmp_path / "a", files)))
    for train in (True, False):
        with pytest.raises(UserError, match=r"100 images in a row cannot be used.*'103\.jpg'.*is the\s+disk"):
            made(source, EVAL, batch_size=4, train=train, bad=BadSamples())
        rest = made(source, EVAL, batch_size=4, train=train, bad=BadSamples([50]))
        assert {int(i) for batch in rest for i in batch.ids_host} == {0, 1, 2, 3}
    for name in files:
        (tmp_path / "a" / name).write_bytes(b"text" if name > "090" else b"")
    few = open_source(str(write_folder(tmp_path / "b", dict(list(files.items())[4:20]))))
    with pytest.raises(UserError, match="none of the 16 images can be used"):
        made(few, TRAIN, batch_size=4, bad=BadSamples())


@needs_dali
def test_every_kind_of_good_file_passes_as_pillow_shows_it(tmp_path):
    """Whatever the files are called."""
    root = write_folder(tmp_path / "a", {f"{i:02d}.jpg": make() for i, make in enumerate(GOOD.values())})
    (root / "99.png").write_bytes(SIXTEEN_BITS.tobytes())
    source, same = open_source(str(root)), Transform((60, 90), (0,) * 3, (1,) * 3, "bilinear", crop_pct=1.0)
    (batch,) = made(source, same, batch_size=len(source), train=False, bad=BadSamples())
    assert len(batch.ids) == len(GOOD) + 1
    assert batch.bad == ()
    levels = (batch.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for (name, make), image in zip(GOOD.items(), levels, strict=False):
        np.testing.assert_array_equal(image, np.asarray(decode(make())), err_msg=name)
    assert (levels[-1] == levels[-1][..., :1]).all()


def test_unreadable_files_are_bad_and_hold_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_WAITS", (0.01, 0.01))
    root = write_folder(tmp_path / "a", {f"{i}.jpg": p for i, p in enumerate(small_photos(6))})
    os.mkfifo(root / "pipe.jpg")  # in the folder from the start: not in the list
    (root / "gone.jpg").symlink_to(root / "nowhere")
    source = open_source(str(root))
    assert len(source) == 6
    for name in ("0", "1", "2", "3"):
        (root / f"{name}.jpg").unlink()
    os.mkfifo(root / "0.jpg")
    (root / "1.jpg").mkdir()
    (root / "2.jpg").symlink_to(root / "nowhere")
    fetcher = fetch.Fetcher(source, (bad := BadSamples()), replace=True)
    assert [fetcher.fetch(i).id for i in range(6)] == [4, 4, 4, 4, 4, 5]
    missing = "No such file or directory"
    reasons = {0: "no regular file", 1: "no regular file", 2: missing, 3: missing}
    assert {i: s.reason for i, s in bad.found.items()} == reasons
    for index in range(4):
        with pytest.raises(UserError, match=rf"{index}\.jpg"):
            fetch.Fetcher(source, None, replace=True).fetch(index)


def test_a_disk_that_hiccups_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_WAITS", (0.01, 0.01))
    root = write_folder(tmp_path / "a", {f"{i}.jpg": p for i, p in enumerate(small_photos(2))})
    source, opened, real = open_source(str(root)), [], os.open

    def hiccup(path, *arguments):
        opened.append(path)
        if len(opened) <= failures:
            raise OSError(5, "Input/output error")
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", hiccup)
    for failures, expected in ((2, 0), (3, 1)):  # noqa: B007, the function reads it
        opened.clear()
        assert fetch.Fetcher(source, BadSamples(), replace=True).fetch(0).id == expected


@needs_dali
def test_odd_names_survive_the_list(tmp_path):
    names = [
        b"new\nline.jpg",
        b"not utf-8 \xff\xfe.jpg",
        "\N{GRINNING FACE}.jpg".encode(),
        b"x" * 251 + b".jpg",
        b'"\\.jpg',
    ]
    root = tmp_path / "a"
    root.mkdir()
    for name in names:
        with open(os.path.join(os.fsencode(root), name), "wb") as file:  # noqa: PTH118, PTH123
            file.write(b"no image")
    (root / "good.jpg").write_bytes(small_photos(1)[0].tobytes())
    source = open_source(str(root))
    (batch,) = made(source, EVAL, batch_size=6, bad=BadSamples())
    assert {os.fsencode(s.name) for s in batch.bad} == set(names)
    append_to_list(path := tmp_path / "bad_samples.jsonl", batch.bad)
    assert len(path.read_bytes().splitlines()) == 5
    assert set(read_list(path)) == set(batch.bad)
    assert read_quarantine(path, source) == {s.id for s in batch.bad}


def test_lists_on_disk(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    a, b, c = BadSample(1, "1.jpg", "GIF"), BadSample(None, "a.tar", "damaged"), BadSample(3, "3.jpg", "cut")
    append_to_list(path, [a])
    append_to_list(path, [])
    append_to_list(path, [b])
    for torn in range(1, len(to_line(c)) - 1):
        path.write_bytes(to_line(a) + to_line(b) + to_line(c)[:torn])
        assert read_list(path) == ([a, b, c] if torn == len(to_line(c)) - 1 else [a, b])
        append_to_list(path, [c])
        assert read_list(path) == [a, b, c]
    path.write_bytes((to_line(a) + to_line(b)).rstrip())  # written by hand
    append_to_list(path, [c])
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == [1, None, 3]
    for wrong in (b"no json\n", b"[1]\n", b'{"id": "x", "name": "y"}\n', b'{"id": 1}\n', b"[" * 9999 + b"\n"):
        path.write_bytes(to_line(a) + wrong + to_line(c))
        with pytest.raises(UserError, match=r"line 2 is not .*; remove that line$"):
            read_list(path)
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        read_list(tmp_path / "nowhere")


def test_a_list_is_matched_by_name(tmp_path):
    root = write_folder(tmp_path / "a", {f"{i}.jpg": p for i, p in enumerate(small_photos(5))})
    path = tmp_path / "q.jsonl"
    append_to_list(path, [BadSample(1, "1.jpg", ""), BadSample(4, "4.jpg", ""), BadSample(None, "a.tar", "")])
    assert read_quarantine(path, open_source(str(root))) == {1, 4}
    (root / "0.jpg").unlink()  # every id shifts
    (root / "4.jpg").unlink()
    age(root)
    source = open_source(str(root))
    assert read_quarantine(path, source) == {0}
    (other := tmp_path / "other.jsonl").write_bytes(to_line(BadSample(0, "else.jpg", "")))
    with pytest.raises(
        UserError, match=r"faults\.quarantine=.*other\.jsonl: none of its 1 names.*'else\.jpg'"
    ):
        read_quarantine(other, source)


@pytest.mark.parametrize(
    ("bad", "drawn", "share", "stop"),
    [
        (0, 100, 0.0, False),
        (1, 100, 0.0, True),
        (10, 100, 0.01, False),
        (11, 100, 0.01, True),
        (11, 1100, 0.01, False),
        (12, 1100, 0.01, True),
        (11, 11, 1.0, False),
        (500, 50_000, 0.01, False),
    ],
)
def test_how_many_are_too_many(bad, drawn, share, stop):
    assert too_many(bad, drawn, share) is stop


def test_a_damaged_shard_is_used_up_to_its_damage(tmp_path):
    photos = small_photos(4)
    write_tar(tmp_path / "t/0.tar", [("a.jpg", photos[0])])
    whole = write_tar(tmp_path / "t/1.tar", [(f"{i}.jpg", p) for i, p in enumerate(photos)])
    second = 512 + -(-len(photos[0]) // 512) * 512
    content = whole.read_bytes()
    flipped = bytearray(content)
    flipped[second + 20] ^= 255
    cuts = {"data": content[: second + 600], "header": content[: second + 100], "none": content[:second]}
    for broken in (*cuts.values(), bytes(flipped)):
        whole.write_bytes(broken)
        age(tmp_path / "t")
        for _ in range(2):  # scanned, then from the cache
            source = open_source(str(tmp_path / "t"), damaged=True)
            assert [source.portable_name(i) for i in range(len(source))] == ["0.tar:a.jpg", "1.tar:0.jpg"]
            np.testing.assert_array_equal(source.read(1), photos[0])
            ((name, reason),) = source.damaged
            assert name == "1.tar"
            assert f"damaged at byte {second}" in reason
        with pytest.raises(UserError, match=r"broken tar shard .*/1\.tar: damaged at byte .*fetch it again"):
            open_source(str(tmp_path / "t"))
    whole.write_bytes(b"\x1f\x8b" + bytes(600))
    assert len(open_source(str(tmp_path / "t"), damaged=True)) == 1
    with pytest.raises(UserError, match=r"broken tar shard .*/1\.tar"):
        open_source(str(whole), damaged=True)


def test_a_disk_that_fails_is_no_damage_to_a_shard(tmp_path):
    """Else the images behind would leave the order of the data without a word. The file linked to gives EIO."""
    write_tar(tmp_path / "t/0.tar", [("a.jpg", small_photos(1)[0])])
    (tmp_path / "t/1.tar").symlink_to("/proc/self/mem")
    with pytest.raises(
        UserError, match=r"cannot read /proc/\d+/mem: Input/output error; is the disk there\?"
    ):
        open_source(str(tmp_path / "t"), damaged=True)


def header(name: bytes, size: int | bytes, kind: bytes = b"0") -> bytes:
    """A tar header by hand; `size` as bytes goes in as it is."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    head = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + field + b"0" * 11 + b"\0" + b" " * 8 + kind)
    head = head.ljust(257, b"\0") + b"ustar\x0000"
    head = bytearray(bytes(head).ljust(512, b"\0"))
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


@pytest.mark.parametrize(
    "crafted",
    [
        header(b"b.jpg", b"\xff" * 12),  # negative, base 256
        header(b"b.jpg", b"\x80" + b"\x7f" * 11),
        header(b"b.jpg", 8**11 - 1),
        header(b"long", b"\x80" + b"\0" * 6 + b"\x7f" * 5, b"L"),  # a name of half a terabyte
        header(b"pax", b"\x80" + b"\0" * 6 + b"\x7f" * 5, b"x"),
        header(b"pax", 512, b"x") + b"20 size=-1000000000\n".ljust(512, b"\0") + header(b"b.jpg", 0),
        header(b"pax", 512, b"x") + b"999999999 a=b\n".ljust(512, b"\0") + header(b"b.jpg", 0),
        (header(b"long", 1, b"L") + b"a".ljust(512, b"\0")) * 3000,
        header(b"pax", 512, b"x")
        + b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
        + header(b"b.jpg", 512)
        + b"9" * 512,
    ],
)  # fmt: skip
def test_crafted_members_end_a_shard_without_harm(tmp_path, crafted):
    photo_ = small_photos(1)[0]
    size = len(photo_)
    begin = header(b"../../a.jpg", size) + photo_.tobytes().ljust(-(-size // 512) * 512, b"\0")
    begin += header(b"/etc/passwd.jpg", 0, b"2") + header(b"dev.jpg", 0, b"3") + header(b"dev2.jpg", 0, b"4")
    path = tmp_path / "deep/t.tar"
    path.parent.mkdir()
    path.write_bytes(begin + crafted + bytes(1024))
    source = open_source(str(path), damaged=True)
    np.testing.assert_array_equal(source.read(0), photo_)
    assert source.name(0).endswith("t.tar:../../a.jpg")
    # Whatever else is in the list lies within the file.
    assert all(int(source._start[i] + source._size[i]) <= path.stat().st_size for i in range(len(source)))
    assert sorted(p.name for p in tmp_path.rglob("*") if "cache" not in str(p)) == ["deep", "t.tar"]


def test_the_crafted_name_that_claims_half_a_terabyte_reserves_none(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(header(b"long", b"\x80" + b"\0" * 6 + b"\x7f" * 5, b"L") + bytes(1024))
    _, _, damage = tars._scan_shard(str(path))
    assert "a header of" in damage


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_mutated_index_is_safe(tmp_path, kind):
    """Any damage to the cached list: the source opens, or is refused, and what it names can be asked for."""
    photos = small_photos(6)
    if kind == "folder":
        root = write_folder(tmp_path / "a", {f"{i % 2}/{i}.jpg": p for i, p in enumerate(photos)})
    else:
        root = write_tar(tmp_path / "a/t.tar", [(f"{i}.jpg", p) for i, p in enumerate(photos)])
    expected = [open_source(str(root)).read(i).tobytes() for i in range(6)]
    (file,) = cache_folder().glob("*.idx")
    good, seen = file.read_bytes(), set()
    body = good.index(b"\n")

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4),
        st.integers(0, 3).map(lambda n: 0 if n else 1),
        st.integers(0, len(good)),
    )
    def check(changes, cutting, cut):
        data = bytearray(good)
        for place, value in changes:
            data[place] = value
        file.write_bytes(data[:cut] if cutting else data)
        source = open_source(str(root), damaged=True)
        for index in range(len(source)):
            source.name(index)
            try:
                seen.add(source.read(index).tobytes() == expected[index])
            except UserError:
                seen.add(False)

    check()
    assert True in seen
    # Numbers of the layout that the dtype, the length or the place of an array are made of.
    for old, new in ((b"|u1", b"|O8"), (b"<i8", b"<f8"), (b"<i8", b"|O8"), (b"[", b"{"), (b", 7", b",-7")):
        file.write_bytes(good[:body].replace(old, new) + good[body:])
        assert [open_source(str(root)).read(i).tobytes() for i in range(6)] == expected


def test_an_index_of_pointers_is_refused():
    arrays = {"a": np.arange(3), "b": np.frombuffer(b"xyz", np.uint8)}
    assert save_index("k", "key", arrays)
    (file,) = cache_folder().glob("*.idx")
    good = file.read_bytes()
    assert load_index("k", "key")["a"].tolist() == [0, 1, 2]
    for old, new in (
        (b'"<i8", 3, 0', b'"|O8", 3, 0'),
        (b'"|u1", 3, 64', b'"|u1", 9, 64'),
        (b", 3, 0", b",-3, 0"),
    ):
        assert old in good
        file.write_bytes(good.replace(old, new))
        assert load_index("k", "key") is None


BOMB = """
import resource, sys
from fastalign.data.bad_samples import BadSamples
from fastalign.data.loader import Loader
from fastalign.data.pipeline import DecodeError, Decoder
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
def peak(root):
    small = Transform((32, 32), (0,) * 3, (1,) * 3)
    options = {"batch_size": 4, "device": "cpu", "train": False, "threads": 1, "bad": BadSamples()}
    loader = Loader(open_source(root), small, **options)
    seen = [i for batch in loader.batches() for i in batch.ids_host.tolist()]
    loader.close()
    return seen, len(loader.bad.found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print([*peak(sys.argv[1]), *peak(sys.argv[2])])
"""


@needs_dali
def test_a_bomb_costs_no_memory(tmp_path):
    photos = small_photos(8)
    good = write_folder(tmp_path / "good", {f"{i}.jpg": p for i, p in enumerate(photos)})
    data = bomb()
    assert len(data) < 100_000
    bad = write_folder(
        tmp_path / "bad", {f"{i}.jpg": p for i, p in enumerate(photos)} | {"3.jpg": data, "5.png": data}
    )
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(good), str(bad)], capture_output=True, text=True, check=True
    )
    seen, count, before, without, found, after = json.loads(done.stdout)
    assert (seen, count, without, found) == (list(range(8)), 0, [0, 1, 2, 4, 5, 7, 8], 2)
    assert after - before < 40  # MB; decoded, one is 588


def mutate(data: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Bytes changed, anywhere or in the header, cut out, doubled or cut off."""
    data, kind = bytearray(data.tobytes()), draw.integers(5)
    place, length = int(draw.integers(len(data))), int(draw.integers(1, 64))
    if kind <= 1:
        for at in draw.integers(len(data) if kind else min(200, len(data)), size=draw.integers(1, 9)):
            data[at] = draw.integers(256)
    elif kind == 2:
        del data[place : place + length]
    elif kind == 3:
        data[place:place] = data[place : place + length]
    else:
        data = data[:place]
    return np.frombuffer(bytes(data), np.uint8)


def mutations(kind: str) -> list[np.ndarray]:
    photos = small_photos(50)
    return photos if kind == "jpeg" else [make() for make in GOOD.values()] + [SIXTEEN_BITS]


@needs_dali
@pytest.mark.parametrize("kind", ["jpeg", "every kind"])
def test_two_thousand_mutations(tmp_path, kind):
    """Each is delivered or named, nothing crashes, and the loader works on."""
    draw, sound, files = np.random.default_rng(0), mutations(kind), {}
    for i in range(2500):
        # Every fifth one is whole: 100 bad ones in a row would end the run.
        data = sound[i % len(sound)]
        files[f"{i:04d}.jpg"] = mutate(data, draw) if i % 5 else data
    source = open_source(str(write_folder(tmp_path / "a", files)))
    known = BadSamples()
    loader = Loader(source, EVAL, device="cpu", batch_size=50, threads=2, train=False, bad=known)
    delivered = [int(i) for batch in loader.batches() for i in batch.ids_host]
    assert sorted(delivered + list(known.found)) == list(range(2500))
    assert set(range(0, 2500, 5)) <= set(delivered)
    assert 200 < len(known.found) < 1800
    # The same loader after it, without trouble: the same once more.
    assert [int(i) for batch in loader.batches() for i in batch.ids_host] == delivered
    loader.close()
    # The size that the header check read is the one that DALI decodes.
    decoder = Decoder((1, 1), batch_size=1, device=torch.device("cpu"), threads=1)
    for index in delivered:
        assert tuple(decoder.shapes([source.read(index)])[0]) == inspect(source.read(index))
    kinds = Counter(re.sub(r"\d+", "N", sample.reason) for sample in known.found.values())
    print(f"delivered {len(delivered)}, bad {len(known.found)}: {kinds}")


@needs_dali
@pytest.mark.parametrize("reason", ["a JPEG of 40 bits", "compression 7143424"])
def test_what_crashes_dali_never_reaches_it(tmp_path, reason):
    """In a batch of more than four images a thread, DALI 2.4 ends the process on these."""
    data = next(data for name, data in REFUSED.items() if reason in name)
    files = {f"{i:02d}.jpg": p for i, p in enumerate(small_photos(40))}
    for index in (5, 20, 39):
        files[f"{index:02d}.jpg"] = np.frombuffer(data, np.uint8)
    source = open_source(str(write_folder(tmp_path / "a", files)))
    (batch,) = made(source, EVAL, batch_size=40, train=False, bad=BadSamples())
    assert [sample.id for sample in batch.bad] == [5, 20, 39]
    assert len(batch.ids) == 37
