"""Bad samples are replaced by a rule, left out of evaluation, listed, and too many of them end a run."""

import json
import os

import numpy as np
import pytest
import torch

from fastalign.data import fetch
from fastalign.data.bad_samples import (
    BadSample,
    BadSamples,
    append_to_list,
    read_list,
    read_quarantine,
    to_line,
    too_many,
)
from fastalign.data.pipeline import DecodeError, Decoder
from fastalign.data.sources import open_source
from fastalign.utils.errors import UserError
from fastalign.utils.random import permutation
from tests.data.odd_images import SMALL, damaged
from tests.data_helpers import EVAL, TRAIN, age, batches_of, encode, needs_dali, small_photos, write_folder

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
        for batch in batches_of(clean, TRAIN, batch_size=16, **options)
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

    whole = batches_of(dirty, TRAIN, batch_size=16, bad=(known := BadSamples()), **options)
    check(whole)
    assert {s.id for batch in whole for s in batch.bad} == set(known.found) == set(BAD)
    assert {s.name for s in known.found.values()} == {f"{i:03d}.jpg" for i in BAD}
    reasons = {i: known.found[i].reason for i in BAD}
    assert "GIF" in reasons[4]
    assert "zero bytes" in reasons[18]
    assert "truncated" in reasons[5]
    assert "cannot decode" in reasons[30]
    # Found already, as in the next epoch or after a resume: the same again, and the same is reported.
    again = batches_of(dirty, TRAIN, batch_size=16, bad=known, **options)
    check(again)
    assert [set(batch.bad) for batch in again] == [set(batch.bad) for batch in whole]
    check(batches_of(dirty, TRAIN, batch_size=16, bad=BadSamples(BAD), **options), quarantined=BAD)
    check(
        batches_of(dirty, TRAIN, batch_size=16, bad=BadSamples([3, 17, 47]), **options),
        quarantined=(3, 17, 47),
    )
    for start in (1, 2):
        check(
            batches_of(dirty, TRAIN, batch_size=16, bad=BadSamples(), start=start, **options),
            start=start * 16,
        )
    for world in (2, 4):
        parts = [
            batches_of(
                dirty, TRAIN, batch_size=16 // world, bad=BadSamples(), rank=r, world_size=world, **options
            )
            for r in range(world)
        ]
        for step, ranks in enumerate(zip(*parts, strict=True)):
            ids = expected[step * 16 : step * 16 + 16]
            assert np.concatenate([b.ids_host for b in ranks]).tolist() == ids
            assert torch.equal(torch.cat([b.images for b in ranks]), torch.stack([pixels[i] for i in ids]))


@needs_dali
def test_evaluation_leaves_bad_samples_out(folders):
    clean, dirty = (open_source(str(folder)) for folder in folders)
    images = torch.cat([b.images for b in batches_of(clean, EVAL, batch_size=16, train=False)])
    for size in (1, 7, 16):
        batches = batches_of(dirty, EVAL, batch_size=size, train=False, bad=(known := BadSamples()))
        ids = np.concatenate([b.ids_host for b in batches]).tolist()
        assert ids == [i for i in range(COUNT) if i not in BAD]
        assert torch.equal(torch.cat([b.images for b in batches]), images[ids])
        assert set(known.found) == set(BAD)
    only = open_source(str(folders[1]))
    assert batches_of(only, EVAL, batch_size=16, train=False, bad=BadSamples(range(COUNT))) == []


@needs_dali
def test_without_tolerance_the_first_bad_batch_is_an_error(folders):
    with pytest.raises(UserError, match=r"cannot decode 030\.jpg \(damaged: DALI.*1 of a batch of 10"):
        batches_of(open_source(str(folders[1])), EVAL, batch_size=10, train=False, start=3)
    (first,) = batches_of(open_source(str(folders[0])), EVAL, batch_size=COUNT, train=False)
    assert first.bad == ()


@needs_dali
@pytest.mark.parametrize("largest", [1, 0])
def test_a_batch_that_fails_without_a_culprit_is_decoded_image_by_image(folders, monkeypatch, largest):
    """As where memory is short: DALI fails on batches, and on none of their images as the examiner sees them."""
    clean, dirty = (open_source(str(folder)) for folder in folders)
    wanted = torch.cat([b.images for b in batches_of(clean, EVAL, batch_size=16, train=False)])
    collect = Decoder.collect

    def short_of_memory(decoder):
        count, pixels = len(decoder._in_flight[0]), collect(decoder)
        if count > largest and decoder._size != (1, 1):
            raise DecodeError("Error in MIXED operator:\nout of memory")
        return pixels

    monkeypatch.setattr(Decoder, "collect", short_of_memory)
    if largest:
        batches = batches_of(dirty, EVAL, batch_size=16, train=False, bad=BadSamples())
        ids = np.concatenate([b.ids_host for b in batches])
        assert set(ids.tolist()) == set(range(COUNT)) - set(BAD)
        assert torch.equal(torch.cat([b.images for b in batches]), wanted[ids])
        return
    told = (
        r"from .*000\.jpg to .*015\.jpg, but .*\(Error in MIXED operator: out of memory\): .* smaller batches"
    )
    with pytest.raises(UserError, match=told) as caught:
        batches_of(clean, EVAL, batch_size=16, train=False)
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
        batches_of(open_source(str(folders[0])), EVAL, batch_size=16, train=False)


@needs_dali
def test_a_hundred_in_a_row_are_no_accident(tmp_path):
    photos = small_photos(4)
    files = {f"{i:03d}.jpg": photos[0] for i in range(4)}
    files |= {f"{i:03d}.jpg": np.frombuffer(b"text", np.uint8) for i in range(4, 104)}
    source = open_source(str(write_folder(tmp_path / "a", files)))
    for train in (True, False):
        with pytest.raises(UserError, match=r"100 images in a row cannot be used.*'103\.jpg'.*is the\s+disk"):
            batches_of(source, EVAL, batch_size=4, train=train, bad=BadSamples())
        rest = batches_of(source, EVAL, batch_size=4, train=train, bad=BadSamples([50]))
        assert {int(i) for batch in rest for i in batch.ids_host} == {0, 1, 2, 3}
    for name in files:
        (tmp_path / "a" / name).write_bytes(b"text" if name > "090" else b"")
    few = open_source(str(write_folder(tmp_path / "b", dict(list(files.items())[4:20]))))
    with pytest.raises(UserError, match="none of the 16 images can be used"):
        batches_of(few, TRAIN, batch_size=4, bad=BadSamples())


def test_unreadable_files_are_bad_and_hold_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_WAITS", (0.01, 0.01))
    root = write_folder(tmp_path / "a", {f"{i}.jpg": p for i, p in enumerate(small_photos(6))})
    os.mkfifo(root / "6.jpg")
    (root / "7.jpg").symlink_to(root / "nowhere")
    source = open_source(str(root))
    assert len(source) == 8
    for name in ("0", "1", "2", "3"):
        (root / f"{name}.jpg").unlink()
    os.mkfifo(root / "0.jpg")
    (root / "1.jpg").mkdir()
    (root / "2.jpg").symlink_to(root / "nowhere")
    fetcher = fetch.Fetcher(source, (bad := BadSamples()), replace=True)
    assert [fetcher.fetch(i).id for i in range(8)] == [4, 4, 4, 4, 4, 5, 4, 4]
    dead, other = "a link that leads nowhere", "no regular file"
    reasons = {0: other, 1: other, 2: dead, 3: "No such file or directory", 6: other, 7: dead}
    assert {i: s.reason for i, s in bad.found.items()} == reasons
    for index in reasons:
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
    (batch,) = batches_of(source, EVAL, batch_size=6, bad=BadSamples())
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
