"""The size of an image as its header has it, or why a file is refused."""

import struct

import numpy as np
import pytest

from fastalign.data.headers import MAX_PIXELS, read_size, without_exif
from fastalign.data.pipeline import load_dali
from tests.data.odd_images import GOOD, REFUSED, SIXTEEN_BITS, SMALL, mutate
from tests.data_helpers import decode, encode, needs_dali


def test_good_headers_give_the_size_that_pillow_reads():
    for name, make in GOOD.items():
        assert read_size(make()) == decode(make()).size[::-1] == (60, 90), name
    assert read_size(SIXTEEN_BITS) == (60, 90)


@pytest.mark.parametrize("reason", REFUSED)
def test_other_files_are_refused_by_name(reason):
    assert reason in read_size(REFUSED[reason])


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "thumbnail", "exif 6", "png", "webp"])
def test_every_truncation_is_noticed(kind):
    whole = GOOD[kind]()
    for length in range(len(whole)):
        # A PNG's last bytes are its end mark's checksum, which no decoder needs.
        if kind != "png" or length < len(whole) - 4:
            assert isinstance(read_size(whole[:length]), str), length


def test_a_size_that_would_fill_memory_is_refused_in_any_format():
    jpeg = bytearray(encode(SMALL).tobytes())
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 65_000, 65_000)
    webp = bytearray(encode(SMALL.convert("RGBA").rotate(20), "WEBP").tobytes())
    webp[24:30] = b"\xff" * 6
    for data in (jpeg, webp):
        assert f"more than {MAX_PIXELS // 10**6} million" in read_size(bytes(data))


@needs_dali
def test_dali_reads_the_same_size_from_whatever_is_accepted():
    """A header that DALI's parser refuses may crash the process when it meets the decoder in a batch."""
    dali, draw = load_dali(), np.random.default_rng(0)
    options = {"batch_size": 1, "num_threads": 1, "device_id": None, "exec_dynamic": True}
    pipeline = dali.Pipeline(prefetch_queue_depth=1, **options)
    with pipeline:
        encoded = dali.fn.external_source(name="encoded", ndim=1, dtype=dali.types.UINT8)
        pipeline.set_outputs(dali.fn.peek_image_shape(encoded, adjust_orientation=False))
    pipeline.build()
    sound, accepted = [make() for make in GOOD.values()] + [SIXTEEN_BITS], 0
    for number in range(8000):
        data = mutate(sound[number % len(sound)], draw)
        if len(data):
            data[draw.integers(min(len(data), 700))] = draw.integers(256)
        if isinstance(size := read_size(data), tuple):
            pipeline.feed_input("encoded", [without_exif(data)])
            assert tuple(np.array(pipeline.run()[0].as_array())[0, :2]) == size
            accepted += 1
    assert accepted > 2000
