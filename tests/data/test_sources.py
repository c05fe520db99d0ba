"""Folders, tar shards and synthetic data: names, the cached index, labels, damage, and refused data sets."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalign.data import index, sources
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

SORTED = ["top.webp", "a/ä ö.Jpg", "a/deep/er/x.png", "b/a.JPEG", "b/c.jpg", "b/z.jpg"]


@pytest.fixture
def root(tmp_path):
    """Six images at several depths, among files that do not count."""
    others = ("b/notes.txt", ".hidden.jpg", ".git/x.jpg", "a/._x.jpg")
    files = dict(zip(reversed(SORTED), small_photos(6), strict=True))
    return write_folder(tmp_path / "data", files | dict.fromkeys(others, files["top.webp"]))


def test_folder_index_is_cached_and_renewed(root, monkeypatch):
    scans = count_calls(monkeypatch, index, "_scan_folder")

    def opened():
        return names_of(open_source(str(root))), len(scans)

    assert [opened(), opened()] == [(SORTED, 1)] * 2
    source = open_source(str(root))
    assert [source.read(i).tobytes() for i in range(6)] == [(root / name).read_bytes() for name in SORTED]
    assert str(index.cache_folder()) in Path("/proc/self/maps").read_text(), "mapped, not read"
    shutil.copy(root / "top.webp", root / "a/deep/er/new.jpg")
    renewed, count = opened()
    assert ("a/deep/er/new.jpg" in renewed, count) == (True, 2)
    # That folder changed a moment ago: another change in the same clock tick would not be noticed.
    assert opened() == (renewed, 3)
    age(root)
    assert [opened(), opened()] == [(renewed, 4)] * 2
    (root / "b/z.jpg").unlink()
    assert "b/z.jpg" not in opened()[0]


def test_damaged_or_unwritable_cache_is_ignored(root, monkeypatch):
    scans = count_calls(monkeypatch, index, "_scan_folder")
    open_source(str(root))
    (file,) = index.cache_folder().glob("*.safetensors")
    good = file.read_bytes()
    for content in (b"", b"\xff\xfe\x00", good[:-8], b"\2\0\0\0\0\0\0\0{}"):
        file.write_bytes(content)
        assert names_of(open_source(str(root))) == SORTED
        assert file.read_bytes() == good
    assert len(scans) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # not a directory
    assert names_of(open_source(str(root))) == SORTED


def test_a_slow_scan_says_how_far_it_is(root, monkeypatch, capsys):
    monkeypatch.setattr(index, "_LINE_SECONDS", 0)
    open_source(str(root))
    assert f"indexing the data set: {len(SORTED)} images so far\n" in capsys.readouterr().err


def test_links_are_followed(root, tmp_path):
    """A dangling link to an image is a sample that cannot be read; one to a folder is refused."""
    (root / "b/again").symlink_to(root, target_is_directory=True)  # a cycle
    (root / "linked").symlink_to(write_folder(tmp_path / "outside", {"o.jpg": small_photos(1)[0]}))
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source = open_source(str(root))
    names = names_of(source)
    assert len(source) == 8
    assert source.read(names.index("linked/o.jpg")).tobytes() == (tmp_path / "outside/o.jpg").read_bytes()
    with pytest.raises(UserError, match=r"cannot read .*gone\.jpg: No such file or directory; repair"):
        source.read(names.index("gone.jpg"))
    (root / "cat").symlink_to(tmp_path / "mount/cat")
    assert f"cannot read {root}/cat: No such file or directory; repair, mount" in message(root)
    shutil.copytree(root / "b", tmp_path / "mount/cat", symlinks=True)
    assert "cat/z.jpg" in names_of(open_source(str(root)))


def test_class_names(root):
    source, table = open_source(str(root)), root / "labels.csv"
    assert source.class_names() == [None, "a", "a", "b", "b", "b"]
    lines = ["name,label", *(f"{name},{i * 10}" for i, name in enumerate(SORTED[:5]))]
    table.write_text("\n".join(lines), encoding="utf-8-sig")
    assert source.class_names() == ["0", "10", "20", "30", "40", None]
    for content, text in (
        ("name,label\ntop.webp,0.5", "line 2: top.webp has the label '0.5'"),
        ("name,label\na,0\nb,1\na,0\na,1\n", "line 5: a has two labels, 0 and 1"),
        ("image,label\n", "the first line must be `name,label`"),
        ("name,label\na/ä.jpg,1", "not a CSV file in UTF-8"),
    ):
        table.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=rf"labels\.csv.*{text}"):
            source.class_names()


def test_messages_name_the_path_and_the_remedy(tmp_path):
    photo = small_photos(1)[0]
    names = ("text/sub/a.txt", "text/b.pdf", "f/a.jpg", "mixed/stray.png", "mixed/0.tar")
    write_folder(tmp_path, dict.fromkeys(names, photo))
    write_tar(tmp_path / "t/000.tar", [("a.jpg", photo)])
    write_tar(tmp_path / "n/000.tar", [("a.txt", photo)])
    for spec, expected in (
        ("nowhere", f"no such folder: {tmp_path}/nowhere"),
        ("text", f"no images in {tmp_path}/text; looked for .jpg .jpeg .png .webp"),
        ("x-*.tar", f"no such tar file: {tmp_path}/x-*.tar"),
        ("t/{000..001}.tar", f"no such tar file: {tmp_path}/t/001.tar"),
        ("{t,x}/*.tar", f"no such tar file: {tmp_path}/x/*.tar"),
        ("t/{001..000}.tar", f"no such tar file: {tmp_path}/t/{{001..000}}.tar"),
        ("n", f"no images in {tmp_path}/n/000.tar; looked for"),
        ("mixed", "has tar files (0.tar) and others (stray.png)"),
        ("f/a.jpg", "is a file"),
    ):
        assert expected in message(tmp_path / spec)
    assert "at least 1" in message("synthetic:0")
    assert "no data set given" in message("")


def test_files_that_change_while_in_use(tmp_path, monkeypatch):
    shards(tmp_path / "t", count=1)
    tar = open_source(str(tmp_path / "t"))
    os.truncate(tmp_path / "t/000.tar", 1000)
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", int(tar._size[3]))
    large = int(tar._size.argmax())
    for number, reason in ((3, "it became shorter while in use"), (large, "[0-9]+ bytes, more than")):
        with pytest.raises(UserError, match=rf"cannot read .*/000\.tar:000{number}\.jpg: {reason}"):
            tar.read(number)


def test_tar_forms_agree_and_a_changed_shard_is_noticed(tmp_path, monkeypatch):
    photos, scans = shards(tmp_path / "t"), count_calls(monkeypatch, index, "members")
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
    assert len(open_source(str(joined), allow_damaged=True)) == 2


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


def test_a_shard_with_the_mtime_of_the_one_that_it_replaces_is_read_again(tmp_path):
    old, new = (write_tar(tmp_path / part / "0.tar", [("a.jpg", small_photos(1)[0])]) for part in "ab")
    assert names_of(open_source(str(old))) == ["0.tar:a.jpg"]
    write_tar(new, [("b.jpg", small_photos(1)[0])])
    os.utime(new, ns=(0, old.stat().st_mtime_ns))
    new.replace(old)
    assert names_of(open_source(str(old))) == ["0.tar:b.jpg"]


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
            source = open_source(str(tmp_path / "t"), allow_damaged=True)
            assert names_of(source) == ["0.tar:a.jpg", "1.tar:0.jpg"]
            np.testing.assert_array_equal(source.read(1), photos[0])
            ((name, reason),) = source.damaged
            assert name == "1.tar"
            assert f"damaged at byte {second}" in reason
        assert f"broken tar shard {path}: damaged at byte {second}" in (text := message(tmp_path / "t"))
        assert "download it again" in text
    for broken in (b"", b"x" * 2000, b"\x1f\x8b" + bytes(600)):
        path.write_bytes(broken)
        assert len(open_source(str(tmp_path / "t"), allow_damaged=True)) == 1
        with pytest.raises(UserError, match=r"broken tar shard .*/1\.tar"):
            open_source(str(path), allow_damaged=True)


def test_a_failing_disk_is_not_damage_of_a_shard(tmp_path):
    """Images would silently leave the order of the data. The target of the link gives EIO."""
    write_tar(tmp_path / "t/0.tar", [("a.jpg", small_photos(1)[0])])
    (tmp_path / "t/1.tar").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"cannot read .*t/1\.tar: Input/output error; is the disk"):
        open_source(str(tmp_path / "t"), allow_damaged=True)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


SPARSE = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
CRAFTED = {
    "negative size": header("b.jpg", -1),
    "half a terabyte": header("long", 1 << 39, b"L"),
    "backwards": header("pax", 512, b"x") + b"20 size=-1000000000\n".ljust(512, b"\0") + header("b.jpg", 0),
    "nested": (header("long", 1, b"L") + b"a".ljust(512, b"\0")) * 3000,
    "sparse": header("pax", 512, b"x") + SPARSE + header("b.jpg", 512) + b"9" * 512,
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_crafted_members_end_a_shard_without_harm(tmp_path, crafted):
    """Links and devices called .jpg are no images; nothing is extracted."""
    photo, path = small_photos(1)[0].tobytes(), tmp_path / "t.tar"
    begin = header("../../a.jpg", len(photo)) + photo.ljust(-(-len(photo) // 512) * 512, b"\0")
    begin += b"".join(header(f"{kind}.jpg", 0, b"%d" % kind) for kind in range(1, 7))
    path.write_bytes(begin + CRAFTED[crafted] + bytes(1024))
    source = open_source(str(path), allow_damaged=True)
    assert source.read(0).tobytes() == photo
    assert source.name(0) == "t.tar:../../a.jpg"
    assert set(names_of(source)) <= {"t.tar:../../a.jpg", "t.tar:b.jpg"}
    assert all(int(source._start[i] + source._size[i]) <= path.stat().st_size for i in range(len(source)))


def test_synthetic_images_are_a_function_of_the_id():
    source = open_source("synthetic:100")
    options = {"size": (24, 40), "dtype": torch.float32}
    images = source.images(torch.arange(100), seed=1, **options)
    assert images.shape == (100, 3, 24, 40)
    assert torch.equal(images[[50]], source.images(torch.tensor([50]), seed=1, **options))
    assert not torch.equal(images, source.images(torch.arange(100), seed=2, **options))
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
