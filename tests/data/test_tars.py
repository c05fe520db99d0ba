"""Tar shards: every way to name them, their index, and hostile or broken files."""

import io
import os
import shutil
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastalign.data import sources, tars
from fastalign.data.bad_samples import BadSample, append_to_list, read_quarantine
from fastalign.data.cache import cache_folder
from fastalign.data.sources import open_source
from fastalign.utils.errors import UserError
from tests.data_helpers import count_calls, message, shards, small_photos, write_tar


@pytest.fixture
def scans(monkeypatch):
    return count_calls(monkeypatch, tars, "_scan_shard")


def test_tar_forms_agree(tmp_path, scans):
    photos = shards(tmp_path / "t")
    forms = ["t", "t/*.tar", "t/{000..002}.tar", "t/{000,001,002}.tar"]
    for form in forms:
        source = open_source(str(tmp_path / form))
        assert source.kind == "tar"
        assert len(source) == 12
        for i in range(12):
            np.testing.assert_array_equal(source.read(i), photos[i])
        assert source.name(5).endswith("001.tar:1001.jpg")
        source.close()
    assert len(scans) == 3
    assert len(open_source(str(tmp_path / "t/001.tar"))) == 4


def test_ranks_that_start_together_scan_once(tmp_path, monkeypatch):
    shards(tmp_path / "t")
    counted, scan = [], tars._scan_shard
    monkeypatch.setattr(
        tars, "_scan_shard", lambda path: counted.append(path) or time.sleep(0.1) or scan(path)
    )
    with ThreadPoolExecutor(4) as pool:
        sources_ = list(pool.map(open_source, [str(tmp_path / "t")] * 4))
    assert len(counted) == 3
    assert [len(source) for source in sources_] == [12] * 4


def test_tar_index_notices_a_changed_shard(tmp_path, scans):
    shards(tmp_path / "t")
    open_source(str(tmp_path / "t"))
    write_tar(tmp_path / "t/001.tar", [("new.jpg", small_photos(1)[0])])
    assert len(open_source(str(tmp_path / "t"))) == 9
    assert len(scans) == 6


def test_tar_without_open_descriptors(tmp_path, monkeypatch):
    photos = shards(tmp_path / "t")
    monkeypatch.setattr(sources, "_OPEN_SHARDS", 2)
    source = open_source(str(tmp_path / "t"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    np.testing.assert_array_equal(source.read(7), photos[7])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_tar_takes_regular_files_only(tmp_path):
    path = tmp_path / "t.tar"
    photo = small_photos(1)[0]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("d.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("../" * 40 + "long/" * 40 + "e.jpg")
        info.size = len(photo)
        tar.addfile(info, io.BytesIO(bytes(photo)))
    source = open_source(str(path))
    assert len(source) == 1
    np.testing.assert_array_equal(source.read(0), photo)


def test_tars_joined_end_to_end_are_read_as_tar_lists_them(tmp_path):
    """`cat a.tar b.tar` has an end mark in its middle; what follows it may be zeros, members or damage."""
    photos, parts = small_photos(6), []
    for part in range(3):
        members = [(f"{part}{i}.jpg", photos[2 * part + i]) for i in range(2)]
        parts.append(write_tar(tmp_path / f"{part}.tar", members).read_bytes())
    joined = tmp_path / "t" / "joined.tar"
    joined.parent.mkdir()
    joined.write_bytes(parts[0] + bytes(3 << 20) + parts[1] + parts[2].rstrip(b"\0") + bytes(512 + 100))
    listed = subprocess.run(["tar", "itf", str(joined)], capture_output=True, text=True, check=True)
    source = open_source(str(joined))
    assert [source.portable_name(i) for i in range(6)] == [f"joined.tar:{n}" for n in listed.stdout.split()]
    for i, photo in enumerate(photos):
        np.testing.assert_array_equal(source.read(i), photo)
    joined.write_bytes(parts[0] + b"what is this" + parts[1])
    assert f"joined.tar: damaged at byte {len(parts[0])}: no member and no end mark" in message(joined)
    assert len(open_source(str(joined), damaged=True)) == 2


def test_a_tar_has_the_images_of_the_tree_that_it_holds(tmp_path):
    photo = small_photos(1)[0]
    names = [
        "./a/x.jpg",
        "./.ipynb_checkpoints/x.jpg",
        "./a/.git/deep/y.png",
        "./a/.z.jpg",
        "./a/b.c/..w.webp",
    ]
    path = write_tar(tmp_path / "t/t.tar", [(name, photo) for name in names])
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "tree", filter="data")
    tree, source = open_source(str(tmp_path / "tree")), open_source(str(path))
    assert [source.portable_name(i) for i in range(len(source))] == ["t.tar:./a/x.jpg"]
    assert [tree.name(i) for i in range(len(tree))] == ["a/x.jpg"]


def test_names_tell_shards_of_different_folders_apart(tmp_path):
    """img2dataset calls the first shard of every data set 00000.tar, and its first image 000000000.jpg."""
    photos = dict(zip(("cc0", "cc12m", "cc3m"), small_photos(3), strict=True))
    for name, photo in photos.items():
        write_tar(tmp_path / f"{name}/00000.tar", [("000000000.jpg", photo)])
    two, three = (
        open_source(f"{tmp_path}/{{{sets}}}/00000.tar") for sets in ("cc3m,cc12m", "cc0,cc12m,cc3m")
    )
    assert two.portable_name(0) == "cc12m/00000.tar:000000000.jpg"
    append_to_list(tmp_path / "q.jsonl", [BadSample(i, two.portable_name(i), "GIF") for i in range(2)])
    found = read_quarantine(tmp_path / "q.jsonl", three)
    assert {three.read(i).tobytes() for i in found} == {photos[n].tobytes() for n in ("cc12m", "cc3m")}
    assert two.fingerprint() != three.fingerprint()
    assert open_source(str(tmp_path / "cc0/00000.tar")).portable_name(0) == "00000.tar:000000000.jpg"
    for name in photos:
        path = tmp_path / f"{name}/00000.tar"
        path.write_bytes(path.read_bytes().rstrip(b"\0") + b"damaged")
    broken = open_source(f"{tmp_path}/*/00000.tar", damaged=True)
    assert [name for name, _ in broken.damaged] == [f"{name}/00000.tar" for name in photos]


def test_links_to_shards_are_what_they_are_called(tmp_path):
    """`cp -L` to a local disk makes the same data set; a store's names for its files say nothing."""
    photos = small_photos(2)
    (tmp_path / "links/deep").mkdir(parents=True)
    for name, stored, photo in zip(("0.tar", "deep/1.tar"), ("f/9f.tar", "0a"), photos, strict=True):
        (tmp_path / "links" / name).symlink_to(write_tar(tmp_path / "store" / stored, [("a.jpg", photo)]))
    shutil.copytree(tmp_path / "links", tmp_path / "local")
    links, local = (open_source(f"{tmp_path}/{place}/**/*.tar") for place in ("links", "local"))
    assert [links.portable_name(i) for i in range(2)] == ["0.tar:a.jpg", "deep/1.tar:a.jpg"]
    assert [links.read(i).tobytes() for i in range(2)] == [photo.tobytes() for photo in photos]
    assert links.differs_from(local.identity) is None
    (tmp_path / "links/again.tar").symlink_to("0.tar")
    assert len(open_source(f"{tmp_path}/links/*.tar")) == 1, "a file counts once"


def test_two_images_of_one_name_are_refused(tmp_path):
    photos = small_photos(3)
    path = write_tar(tmp_path / "t.tar", [("a.jpg", photos[0]), ("b.jpg", photos[1]), ("a.jpg", photos[2])])
    with tarfile.open(path) as tar:
        first, _, second = (member.offset_data for member in tar)
    assert f"t.tar has two images called 'a.jpg', at bytes {first} and {second}" in message(path)


def test_a_list_of_an_earlier_version_is_made_anew(tmp_path, scans):
    shards(tmp_path / "t", count=1)
    open_source(str(tmp_path / "t"))
    (file,) = cache_folder().glob("*.idx")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"fastalign-index-2", b"fastalign-index-1"))
    open_source(str(tmp_path / "t"))
    assert len(scans) == 2
    assert file.read_bytes() == content


def test_broken_tars_are_named(tmp_path):
    photos = small_photos(3)
    whole = write_tar(tmp_path / "t/whole.tar", [(f"{i}.jpg", p) for i, p in enumerate(photos)]).read_bytes()
    second = 512 + -(-len(photos[0]) // 512) * 512
    path = tmp_path / "cut.tar"
    flipped = bytearray(whole)
    flipped[second + 20] ^= 255
    cuts = {"data": whole[: second + 600], "header": whole[: second + 100], "boundary": whole[:second]}
    cuts |= {"checksum": bytes(flipped), "empty": b"", "text": b"x" * 2000, "gzip": b"\x1f\x8b" + b"\0" * 600}
    for content in cuts.values():
        path.write_bytes(content)
        assert "broken tar shard" in (text := message(path))
        assert str(path) in text
        assert "fetch it again" in text


def test_tar_member_of_monstrous_size(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "t.tar", [("a.jpg", small_photos(1)[0])])
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(UserError, match=r"t\.tar:a\.jpg has \d+ bytes, an image has 1 to 100"):
        open_source(str(path)).read(0)


def test_images_beside_tars_are_not_left_out(tmp_path):
    photos = shards(tmp_path / "t", count=1)
    (tmp_path / "t/stray.png").write_bytes(photos[0])
    text = message(tmp_path / "t")
    assert "holds both tar files (000.tar) and images (stray.png)" in text


def test_hidden_entries_beside_tars_are_passed_over(tmp_path):
    shards(tmp_path / "t", count=2)
    (tmp_path / "t/.cache").mkdir()
    for name in ("._000.tar", "._a.jpg"):
        (tmp_path / "t" / name).write_bytes(b"resource fork")
    source = open_source(str(tmp_path / "t"))
    assert [Path(shard).name for shard in source.shards] == ["000.tar", "001.tar"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(source.read(0))
    (tmp_path / "images/._0.tar").write_bytes(b"resource fork")
    assert open_source(str(tmp_path / "images")).kind == "folder"


def test_a_long_list_of_shards_is_cached(tmp_path, scans):
    shards(tmp_path / "t", count=1, each=1)
    for i in range(50):
        os.link(tmp_path / "t/000.tar", tmp_path / "t" / f"{'x' * 200}{i}.tar")
    for _ in range(2):
        assert len(open_source(str(tmp_path / "t"))) == 51
    assert len(scans) == 51
    (file,) = cache_folder().glob("*.idx")
    # `load_index` reads a header of at most 1 MiB: it must not grow with the list.
    assert len(file.read_bytes().split(b"\n", 1)[0]) < 2000
