"""Image files: their size as the header has it, those that are refused, and those that could stop a run."""

import numpy as np
import pytest
import torch

from fastalign.data.headers import MAX_PIXELS, read_size, without_exif
from fastalign.data.loader import Loader
from fastalign.data.pipeline import BadSamples, load_dali
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from tests.data.odd_images import GOOD, REFUSED, SIXTEEN_BITS, SMALL, jpeg_of, mutate
from tests.data_helpers import EVAL, batches_of, decode, encode, needs_dali, small_photos, write_folder


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
    webp = bytearray(encode(SMALL.convert("RGBA").rotate(20), "WEBP").tobytes())
    webp[24:30] = b"\xff" * 6
    for data in (jpeg_of(size=65_000), bytes(webp)):
        assert f"more than {MAX_PIXELS // 10**6} million" in read_size(data)


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


@needs_dali
def test_every_kind_of_good_file_comes_out_as_pillow_shows_it(tmp_path):
    """Whatever the files are called."""
    root = write_folder(tmp_path / "a", {f"{i:02d}.jpg": make() for i, make in enumerate(GOOD.values())})
    (root / "99.png").write_bytes(SIXTEEN_BITS.tobytes())
    source, same = open_source(str(root)), Transform((60, 90), (0,) * 3, (1,) * 3, "bilinear", crop_pct=1.0)
    (batch,) = batches_of(source, same, batch_size=len(source), train=False, bad=BadSamples())
    assert batch.bad == ()
    levels = (batch.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for (name, make), image in zip(GOOD.items(), levels, strict=False):
        np.testing.assert_array_equal(image, np.asarray(decode(make())), err_msg=name)
    assert (levels[-1] == levels[-1][..., :1]).all()


@needs_dali
def test_two_thousand_mutations(tmp_path):
    """Each is delivered with the size of its header or named, nothing crashes, and the loader works on."""
    draw, files = np.random.default_rng(0), {}
    sound = [make() for make in GOOD.values()] + [SIXTEEN_BITS, *small_photos(10)]
    for i in range(2500):  # every fifth is intact: 100 bad ones in a row would end the run
        data = sound[i % len(sound)]
        files[f"{i:04d}.jpg"] = mutate(data, draw) if i % 5 else data
    source = open_source(str(write_folder(tmp_path / "a", files)))
    loader = Loader(source, EVAL, device="cpu", batch_size=50, train=False, bad=(known := BadSamples()))
    delivered = [int(i) for batch in loader.batches() for i in batch.ids]
    assert sorted(delivered + list(known.found)) == list(range(2500))
    assert set(range(0, 2500, 5)) <= set(delivered)
    assert 200 < len(known.found) < 1800
    assert [int(i) for batch in loader.batches() for i in batch.ids] == delivered
    loader.close()
