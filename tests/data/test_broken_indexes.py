"""Damaged and crafted tar shards, and damaged lists in the cache."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fastalign.data import tars
from fastalign.data.cache import cache_folder, load_index, save_index
from fastalign.data.sources import open_source
from fastalign.utils.errors import UserError
from tests.data_helpers import age, small_photos, write_folder, write_tar


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
    with pytest.raises(UserError, match=r"cannot read .*t/1\.tar: Input/output error; is the disk there\?"):
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
