"""Folders and synthetic data, their cached index, labels, and what a user is told when something is wrong."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch

from fastalign.data import index, sources
from fastalign.data.index import Names
from fastalign.data.sources import open_source
from fastalign.utils.errors import UserError
from tests.data_helpers import age, count_calls, message, shards, small_photos, write_folder, write_tar


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "fastalign"


@pytest.fixture
def scans(monkeypatch):
    return count_calls(monkeypatch, index, "_scan_folder")


def nested(root):
    photos = small_photos(6)
    names = ["b/z.jpg", "b/a.JPEG", "a/deep/er/x.png", "a/ä ö.Jpg", "top.webp", "b/c.bmp"]
    files = dict(zip(names, photos, strict=True))
    extra = {
        "b/notes.txt": photos[0],
        ".hidden.jpg": photos[0],
        ".git/x.jpg": photos[0],
        "a/._x.jpg": photos[0],
    }
    return write_folder(root, files | extra), files


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_folder_lists_images_in_a_stable_order(tmp_path):
    root, files = nested(tmp_path / "data")
    expected = ["top.webp", "a/ä ö.Jpg", "a/deep/er/x.png", "b/a.JPEG", "b/c.bmp", "b/z.jpg"]
    source = open_source(str(root))
    assert source.kind == "folder"
    assert names(source) == expected
    for i, name in enumerate(expected):
        np.testing.assert_array_equal(source.read(i), files[name])


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    root, _ = nested(tmp_path / "data")
    expected = names(open_source(str(root)))
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = list(scandir(path))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(index.os, "scandir", Reversed)
    assert names(open_source(str(root))) == expected


def test_folder_index_is_cached_and_renewed(tmp_path, cache, scans):
    root, files = nested(tmp_path / "data")
    first = names(open_source(str(root)))
    assert names(open_source(str(root))) == first
    assert len(scans) == 1
    assert isinstance(open_source(str(root))._names.blob, np.memmap)
    (root / "a/deep/er/new.jpg").write_bytes(files["top.webp"].tobytes())
    renewed = names(open_source(str(root)))
    assert len(scans) == 2
    assert "a/deep/er/new.jpg" in renewed
    # That folder changed a moment ago: another change in the same clock tick would go unseen, so not cached yet.
    open_source(str(root))
    assert len(scans) == 3
    age(root)
    open_source(str(root))
    assert len(scans) == 4
    assert names(open_source(str(root))) == renewed
    assert len(scans) == 4
    (root / "b/z.jpg").unlink()
    assert "b/z.jpg" not in names(open_source(str(root)))


def test_damaged_or_unwritable_cache_is_no_obstacle(tmp_path, cache, scans, monkeypatch):
    root, _ = nested(tmp_path / "data")
    expected = names(open_source(str(root)))
    (file,) = cache.glob("*.idx")
    for content in (b"", b"{}\n", b"\xff\xfe\x00", file.read_bytes()[:-8], b"[1]\n"):
        file.write_bytes(content)
        assert names(open_source(str(root))) == expected
    assert len(scans) == 6
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert names(open_source(str(root))) == expected


def test_links_are_followed_and_loops_end(tmp_path):
    root, files = nested(tmp_path / "data")
    (root / "b/again").symlink_to(root, target_is_directory=True)
    outside = write_folder(tmp_path / "outside", {"o.jpg": files["top.webp"]})
    (root / "linked").symlink_to(outside, target_is_directory=True)
    found = names(open_source(str(root)))
    assert "linked/o.jpg" in found
    assert len(found) == 7


def test_what_is_not_mounted_is_told(tmp_path, scans):
    """Links to images are samples that cannot be read; a link to a folder is named, until it leads somewhere."""
    root, _ = nested(tmp_path / "data")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "b/circle.png").symlink_to(root / "b/circle.png")
    source = open_source(str(root))
    assert len(source) == 8
    for name in ("gone.jpg", "b/circle.png"):
        with pytest.raises(UserError, match=f"{name} is a link that leads nowhere; mount"):
            source.read(names(source).index(name))
    (root / "cat").symlink_to(tmp_path / "mount/cat")
    age(root)
    for _ in range(2):
        assert open_source(str(root), damaged=True).damaged == (("cat", "a link that leads nowhere"),)
    assert f"{root}/cat is a link that leads nowhere; mount what it leads to" in message(root)
    assert len(scans) == 2
    shutil.copytree(root / "b", tmp_path / "mount/cat", symlinks=True)
    assert {"cat/z.jpg", "cat/circle.png"} < set(names(open_source(str(root))))


def test_packed_names_hold_many():
    many = [b"folder/%08d.jpg" % i for i in range(200_000)]
    packed = Names.pack(many)
    assert packed.blob.nbytes + packed.offsets.nbytes < 30 * len(many)
    assert packed[123_456] == "folder/00123456.jpg"
    with pytest.raises(IndexError):
        packed[200_000]


def test_labels(tmp_path):
    root, _ = nested(tmp_path / "data")
    source = open_source(str(root))
    assert [source.label(i) for i in range(6)] == [None, 0, 0, 1, 1, 1]
    lines = ["name,label", *(f"{name},{i * 10}" for i, name in enumerate(names(source)))]
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    assert [open_source(str(root)).label(i) for i in range(6)] == [0, 10, 20, 30, 40, 50]
    for wrong in (",one", ",", "", ",0.5"):
        (root / "labels.csv").write_text(f"name,label\ntop.webp{wrong}")
        told = rf"labels.csv line 2: top.webp has the label '{wrong[1:]}'; write an integer"
        with pytest.raises(UserError, match=told):
            open_source(str(root)).label(0)
    (root / "labels.csv").write_text("name,label\ntop.webp,1")
    with pytest.raises(UserError, match=r"labels.csv has no line for a/"):
        open_source(str(root)).label(1)
    (root / "labels.csv").write_text("name,label\ntop.webp,0\nb/z.jpg,1\ntop.webp,0\ntop.webp,1\n")
    with pytest.raises(UserError, match=r"labels.csv line 5: top.webp is 1, and 0 in a line before; remove"):
        open_source(str(root)).label(0)
    (root / "labels.csv").write_text("name,label\ntop.webp,7", encoding="utf-8-sig")
    assert open_source(str(root)).label(0) == 7
    for wrong in ("name,label\na/ä.jpg,1", "nämé,label\n"):
        (root / "labels.csv").write_text(wrong, encoding="latin-1")
        with pytest.raises(UserError, match=r"labels.csv is not UTF-8"):
            open_source(str(root)).label(0)


def test_messages_name_the_path_and_the_remedy(tmp_path):
    photo = small_photos(1)[0]
    assert "no such folder" in (text := message(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in text
    (tmp_path / "empty").mkdir()
    assert "it is empty" in (text := message(tmp_path / "empty"))
    assert str(tmp_path / "empty") in text
    write_folder(tmp_path / "text", {"sub/a.txt": photo, "b.pdf": photo})
    for _ in range(2):
        assert "none of the 2 files" in (text := message(tmp_path / "text"))
        assert ".jpg .jpeg .png .webp .bmp" in text
    assert "no tar file matches" in (text := message(tmp_path / "x-*.tar"))
    assert "x-*.tar" in text
    write_tar(tmp_path / "t/000.tar", [("a.jpg", photo)])
    assert "no such tar file" in (text := message(tmp_path / "t/{000..001}.tar"))
    assert "001.tar" in text
    write_tar(tmp_path / "n/000.tar", [("a.txt", photo)])
    assert "no images in the 1 shards" in message(tmp_path / "n")
    (tmp_path / "t/folder").mkdir()
    assert "both tar files" in message(tmp_path / "t")
    write_folder(tmp_path / "f", {"a.jpg": photo})
    assert "is a file" in message(tmp_path / "f/a.jpg")
    assert "at least 1" in message("synthetic:0")
    assert "no data set given" in message("")


def test_paths_that_cannot_be_looked_at(tmp_path, monkeypatch):
    assert "File name too long; check the path" in message(tmp_path / ("x" * 300))
    assert "the home folder of ~nobody-at-all is not known" in message("~nobody-at-all/x")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources.Path, "is_dir", denied)
    assert "cannot open /locked/data: Permission denied; check" in message("/locked/data")


def test_fingerprint_tells_data_sets_apart(tmp_path):
    root, files = nested(tmp_path / "data")
    twin = write_folder(tmp_path / "elsewhere", files)
    mark = open_source(str(root)).fingerprint()
    assert mark == open_source(str(twin)).fingerprint()
    assert 0 <= mark < 2**32
    (twin / "b/z.jpg").rename(twin / "b/zz.jpg")
    marks = [open_source(s).fingerprint() for s in (str(twin), "synthetic:6", "synthetic:7")]
    for place in ("t", "u"):
        shards(tmp_path / place)
        marks.append(open_source(str(tmp_path / place)).fingerprint())
    assert marks[-1] == marks[-2]
    assert len({mark, *marks}) == 5


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_identity_knows_a_copy_and_mended_images_but_no_other_data(tmp_path, kind):
    files = {f"{i // 4}/{i}.jpg": p for i, p in enumerate(small_photos(12))}
    others = dict(zip(files, small_photos(12, seed=1), strict=True))
    mended = {**files, "0/0.jpg": others["0/0.jpg"]}
    moved = {name: files[name] for name in files if name != "1/6.jpg"} | {"1/6-7.jpg": files["1/6.jpg"]}

    def made(name, content):
        if kind == "folder":
            return open_source(str(write_folder(tmp_path / name, content)))
        for shard in range(3):
            write_tar(
                tmp_path / f"{name}/{shard}/0.tar",
                [(n[2:], p) for n, p in sorted(content.items()) if n[0] == str(shard)],
            )
        return open_source(str(tmp_path / f"{name}/*/0.tar"))

    kept = made("a", files).identity
    assert kept == json.loads(json.dumps(kept))
    assert made("elsewhere/b", files).differs_from(kept) is None
    assert made("mended", mended).differs_from(kept) is None
    assert made("others", others).differs_from(kept) == "other images of the same names"
    assert made("moved", moved).differs_from(kept) == "other names"


def test_files_that_change_while_in_use(tmp_path):
    root = write_folder(tmp_path / "f", {"a.jpg": small_photos(1)[0], "b.jpg": np.zeros(0, np.uint8)})
    source = open_source(str(root))
    with pytest.raises(UserError, match=r"b\.jpg has 0 bytes"):
        source.read(1)
    (root / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.jpg"):
        source.read(0)
    shards(tmp_path / "t", count=1)
    tar = open_source(str(tmp_path / "t"))
    os.truncate(tmp_path / "t/000.tar", 1000)
    with pytest.raises(UserError, match=r"000\.tar:0003\.jpg got shorter"):
        tar.read(3)


def test_synthetic_images_are_a_function_of_the_id():
    source = open_source("synthetic:100")
    assert (source.kind, len(source), source.label(0)) == ("synthetic", 100, None)
    ids = torch.tensor([3, 50, 99])
    options = {"size": (24, 40), "dtype": torch.float32}
    images = source.images(ids, seed=1, **options)
    assert images.shape == (3, 3, 24, 40)
    assert torch.equal(images[1:2], source.images(ids[1:2], seed=1, **options))
    assert not torch.equal(images, source.images(ids, seed=2, **options))
    many = source.images(torch.arange(100), seed=0, size=(64, 64), dtype=torch.float32)
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
    assert source.images(ids, seed=1, size=(8, 8), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_indexing_is_quick(tmp_path):
    for folder in range(20):
        path = tmp_path / "data" / f"{folder:02d}"
        path.mkdir(parents=True)
        for i in range(100):
            (path / f"{i}.jpg").touch()
    age(tmp_path / "data")
    begin = time.perf_counter()
    assert len(open_source(str(tmp_path / "data"))) == 2000
    assert time.perf_counter() - begin < 10
