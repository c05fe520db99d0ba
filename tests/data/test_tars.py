"""Tar shards: the ways to name them, their index, damaged and malicious ones."""

import shutil
import subprocess

import numpy as np
import pytest

from fastalign.data import index
from fastalign.data.pipeline import BadSample, append_to_list, read_quarantine
from fastalign.data.sources import open_source
from fastalign.utils.errors import UserError
from tests.data_helpers import (
    age,
    count_calls,
    message,
    names_of,
    shards,
    small_photos,
    write_folder,
    write_tar,
)


@pytest.fixture
def scans(monkeypatch):
    return count_calls(monkeypatch, index, "members")


def test_tar_forms_agree_and_a_changed_shard_is_noticed(tmp_path, scans):
    photos = shards(tmp_path / "t")
    for form in ("t", "t/*.tar", "t/{000..002}.tar", "t/{000,001,002}.tar"):
        source = open_source(str(tmp_path / form))
        for i in range(12):
            np.testing.assert_array_equal(source.read(i), photos[i])
        assert (len(source), source.name(5)) == (12, "001.tar:1001.jpg")
    assert len(scans) == 3
    assert len(open_source(str(tmp_path / "t/001.tar"))) == 4
    write_tar(tmp_path / "t/001.tar", [("new.jpg", photos[0])])
    assert len(open_source(str(tmp_path / "t"))) == 9
    assert len(scans) == 7


def test_tars_joined_end_to_end_are_read_as_tar_lists_them(tmp_path):
    """`cat a.tar b.tar` has an end mark in its middle; zeros, members or damage may follow it."""
    photos, joined = small_photos(6), tmp_path / "t/joined.tar"
    named = [(f"{i}.jpg", photo) for i, photo in enumerate(photos)]
    parts = [write_tar(tmp_path / "0.tar", named[i : i + 2]).read_bytes() for i in (0, 2, 4)]
    joined.parent.mkdir()
    joined.write_bytes(parts[0] + bytes(3 << 20) + parts[1] + parts[2].rstrip(b"\0") + bytes(512 + 100))
    listed = subprocess.run(["tar", "itf", str(joined)], capture_output=True, text=True, check=True)
    source = open_source(str(joined))
    assert names_of(source) == [f"joined.tar:{name}" for name in listed.stdout.split()]
    assert [source.read(i).tobytes() for i in range(6)] == [photo.tobytes() for photo in photos]
    joined.write_bytes(parts[0] + b"what is this" + parts[1])
    assert f"joined.tar: damaged at byte {len(parts[0])}: no member and no end mark" in message(joined)
    assert len(open_source(str(joined), damaged=True)) == 2


def test_names_tell_shards_of_different_folders_apart(tmp_path):
    """img2dataset calls the first shard of every data set 00000.tar, and its first image 000000000.jpg."""
    photos = dict(zip(("cc0", "cc12m", "cc3m"), small_photos(3), strict=True))
    for name, photo in photos.items():
        write_tar(tmp_path / f"{name}/00000.tar", [("000000000.jpg", photo)])
    two, three = (open_source(f"{tmp_path}/{sets}/00000.tar") for sets in ("{cc3m,cc12m}", "*"))
    assert two.name(0) == "cc12m/00000.tar:000000000.jpg"
    append_to_list(tmp_path / "q.jsonl", [BadSample(i, two.name(i), "GIF") for i in range(2)])
    found = read_quarantine(tmp_path / "q.jsonl", three)
    assert {three.read(i).tobytes() for i in found} == {photos[n].tobytes() for n in ("cc12m", "cc3m")}
    for name in photos:
        path = tmp_path / f"{name}/00000.tar"
        path.write_bytes(path.read_bytes().rstrip(b"\0") + b"damaged")
    broken = open_source(f"{tmp_path}/*/00000.tar", damaged=True)
    assert [name for name, _ in broken.damaged] == [f"{name}/00000.tar" for name in photos]


def test_links_to_shards_keep_their_own_names(tmp_path):
    """`cp -L` to a local disk makes the same data set, whatever the targets of the links are called."""
    photos = small_photos(2)
    (tmp_path / "links/deep").mkdir(parents=True)
    for name, stored, photo in zip(("0.tar", "deep/1.tar"), ("f/9f.tar", "0a"), photos, strict=True):
        (tmp_path / "links" / name).symlink_to(write_tar(tmp_path / "store" / stored, [("a.jpg", photo)]))
    shutil.copytree(tmp_path / "links", tmp_path / "local")
    links, local = (open_source(f"{tmp_path}/{place}/**/*.tar") for place in ("links", "local"))
    assert names_of(links) == ["0.tar:a.jpg", "deep/1.tar:a.jpg"]
    assert [links.read(i).tobytes() for i in range(2)] == [photo.tobytes() for photo in photos]
    assert links.crc_of_names() == local.crc_of_names()


def test_hidden_entries_are_ignored_and_names_are_unique(tmp_path):
    photos, long = small_photos(2), "../" * 40 + "long/" * 40 + "e.jpg"
    names = (long, "./a/x.jpg", "./.cache/x.jpg", "./a/.git/deep/y.png", "./a/b.c/..w.webp")
    write_tar(tmp_path / "t/0.tar", [(name, photos[0]) for name in names])
    (tmp_path / "t/.cache").mkdir()
    for name in ("._000.tar", "._a.jpg"):
        (tmp_path / "t" / name).write_bytes(b"resource fork")
    source = open_source(str(tmp_path / "t"))
    assert names_of(source) == [f"0.tar:{long}", "0.tar:./a/x.jpg"]
    np.testing.assert_array_equal(source.read(0), photos[0])
    write_folder(tmp_path / "images", {"a.jpg": photos[0], "._0.tar": photos[1]})
    assert names_of(open_source(str(tmp_path / "images"))) == ["a.jpg"]
    path = write_tar(tmp_path / "double.tar", [(f"{name}.jpg", photos[0]) for name in "aba"])
    assert "double.tar has two images called 'a.jpg'" in message(path)


def test_a_damaged_shard_is_refused_or_used_up_to_its_damage(tmp_path):
    photos = small_photos(4)
    write_tar(tmp_path / "t/0.tar", [("a.jpg", photos[0])])
    path = write_tar(tmp_path / "t/1.tar", [(f"{i}.jpg", p) for i, p in enumerate(photos)])
    second = 512 + -(-len(photos[0]) // 512) * 512
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[second + 20] ^= 255
    for broken in (whole[: second + 600], whole[: second + 100], whole[:second], bytes(flipped)):
        path.write_bytes(broken)
        age(tmp_path / "t")
        for _ in range(2):  # scanned, then from the cache
            source = open_source(str(tmp_path / "t"), damaged=True)
            assert names_of(source) == ["0.tar:a.jpg", "1.tar:0.jpg"]
            np.testing.assert_array_equal(source.read(1), photos[0])
            ((name, reason),) = source.damaged
            assert name == "1.tar"
            assert f"damaged at byte {second}" in reason
        assert f"broken tar shard {path}: damaged at byte {second}" in (text := message(tmp_path / "t"))
        assert "fetch it again" in text
    for broken in (b"", b"x" * 2000, b"\x1f\x8b" + bytes(600)):
        path.write_bytes(broken)
        assert len(open_source(str(tmp_path / "t"), damaged=True)) == 1
        with pytest.raises(UserError, match=r"broken tar shard .*/1\.tar"):
            open_source(str(path), damaged=True)


def test_a_failing_disk_is_not_damage_of_a_shard(tmp_path):
    """Images would silently leave the order of the data. The target of the link gives EIO."""
    write_tar(tmp_path / "t/0.tar", [("a.jpg", small_photos(1)[0])])
    (tmp_path / "t/1.tar").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"cannot read .*t/1\.tar: Input/output error; is the disk"):
        open_source(str(tmp_path / "t"), damaged=True)


def header(name: bytes, size: int | bytes, kind: bytes = b"0") -> bytes:
    """A tar header; `size` as bytes is written as it is."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    head = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + field + b"0" * 11 + b"\0" + b" " * 8 + kind)
    head = head.ljust(257, b"\0") + b"ustar\x0000"
    head = bytearray(bytes(head).ljust(512, b"\0"))
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


LARGE = b"\x80" + b"\0" * 6 + b"\x7f" * 5
SPARSE = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
CRAFTED = {
    "negative size": header(b"b.jpg", b"\xff" * 12),
    "half a terabyte": header(b"long", LARGE, b"L"),
    "backwards": header(b"pax", 512, b"x") + b"20 size=-1000000000\n".ljust(512, b"\0") + header(b"b.jpg", 0),
    "nested": (header(b"long", 1, b"L") + b"a".ljust(512, b"\0")) * 3000,
    "sparse": header(b"pax", 512, b"x") + SPARSE + header(b"b.jpg", 512) + b"9" * 512,
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_crafted_members_end_a_shard_without_harm(tmp_path, crafted):
    """Links and devices called .jpg are no images; nothing is extracted."""
    photo, path = small_photos(1)[0].tobytes(), tmp_path / "t.tar"
    begin = header(b"../../a.jpg", len(photo)) + photo.ljust(-(-len(photo) // 512) * 512, b"\0")
    begin += b"".join(header(f"{kind}.jpg".encode(), 0, b"%d" % kind) for kind in range(1, 7))
    path.write_bytes(begin + CRAFTED[crafted] + bytes(1024))
    source = open_source(str(path), damaged=True)
    assert source.read(0).tobytes() == photo
    assert source.name(0) == "t.tar:../../a.jpg"
    assert set(names_of(source)) <= {"t.tar:../../a.jpg", "t.tar:b.jpg"}
    assert all(int(source._start[i] + source._size[i]) <= path.stat().st_size for i in range(len(source)))
