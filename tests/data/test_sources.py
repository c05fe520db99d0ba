"""Folders and synthetic data, their cached index, labels, and the messages of a refused data set."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from fastalign.data import index, sources
from fastalign.data.index import cache_folder
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
def scans(monkeypatch):
    return count_calls(monkeypatch, index, "_scan_folder")


@pytest.fixture
def root(tmp_path):
    """Six images at several depths, among files that do not count."""
    others = ("b/notes.txt", ".hidden.jpg", ".git/x.jpg", "a/._x.jpg")
    files = dict(zip(reversed(SORTED), small_photos(6), strict=True))
    return write_folder(tmp_path / "data", files | dict.fromkeys(others, files["top.webp"]))


def test_folder_lists_images_in_a_stable_order(root):
    source = open_source(str(root))
    assert names_of(source) == SORTED
    for i, name in enumerate(SORTED):
        assert source.read(i).tobytes() == (root / name).read_bytes()


def test_folder_index_is_cached_and_renewed(root, scans):
    def opened():
        return names_of(open_source(str(root))), len(scans)

    assert [opened(), opened()] == [(SORTED, 1)] * 2
    source = open_source(str(root))
    assert str(cache_folder()) in Path("/proc/self/maps").read_text(), "mapped, not read"
    del source
    shutil.copy(root / "top.webp", root / "a/deep/er/new.jpg")
    renewed, count = opened()
    assert ("a/deep/er/new.jpg" in renewed, count) == (True, 2)
    # That folder changed a moment ago: another change in the same clock tick would not be noticed.
    assert opened() == (renewed, 3)
    age(root)
    assert [opened(), opened()] == [(renewed, 4)] * 2
    (root / "b/z.jpg").unlink()
    assert "b/z.jpg" not in opened()[0]


def test_damaged_or_unwritable_cache_is_ignored(root, scans, monkeypatch):
    open_source(str(root))
    (file,) = cache_folder().glob("*.safetensors")
    good = file.read_bytes()
    for content in (b"", b"\xff\xfe\x00", good[:-8]):
        file.write_bytes(content)
        assert names_of(open_source(str(root))) == SORTED
        assert file.read_bytes() == good
    assert len(scans) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # not a directory
    assert names_of(open_source(str(root))) == SORTED


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
    write_folder(tmp_path / "text", {"sub/a.txt": photo, "b.pdf": photo})
    write_folder(tmp_path / "f", {"a.jpg": photo})
    write_tar(tmp_path / "t/000.tar", [("a.jpg", photo)])
    write_tar(tmp_path / "n/000.tar", [("a.txt", photo)])
    write_folder(tmp_path / "mixed", {"stray.png": photo, "0.tar": photo})
    for spec, expected in (
        ("nowhere", f"no such folder: {tmp_path}/nowhere"),
        ("text", f"no images in {tmp_path}/text; looked for .jpg .jpeg .png .webp"),
        ("x-*.tar", f"no such tar file: {tmp_path}/x-*.tar"),
        ("t/{000..001}.tar", f"no such tar file: {tmp_path}/t/001.tar"),
        ("{t,x}/*.tar", f"no such tar file: {tmp_path}/x/*.tar"),
        ("t/{001..000}.tar", f"no such tar file: {tmp_path}/t/{{001..000}}.tar"),
        ("n", f"no images in {tmp_path}/n; looked for"),
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


def test_synthetic_images_are_a_function_of_the_id():
    source = open_source("synthetic:100")
    options = {"size": (24, 40), "dtype": torch.float32}
    images = source.images(torch.arange(100), seed=1, **options)
    assert images.shape == (100, 3, 24, 40)
    assert torch.equal(images[[50]], source.images(torch.tensor([50]), seed=1, **options))
    assert not torch.equal(images, source.images(torch.arange(100), seed=2, **options))
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
