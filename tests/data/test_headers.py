"""What a file's header tells: the size of an image, or why it is none."""

import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fastalign.data.headers import MAX_PIXELS, inspect
from tests.data.odd_images import GOOD, REFUSED, SIXTEEN_BITS, SMALL
from tests.data_helpers import decode, encode


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
