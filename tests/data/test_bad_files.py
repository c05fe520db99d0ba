"""Files that could stop a run, through the whole loader: unusual formats, bombs, random damage."""

import numpy as np
import torch

from fastalign.data.bad_samples import BadSamples
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from tests.data.odd_images import GOOD, SIXTEEN_BITS, mutate
from tests.data_helpers import EVAL, batches_of, decode, needs_dali, small_photos, write_folder

pytestmark = needs_dali


def test_every_kind_of_good_file_comes_out_as_pillow_shows_it(tmp_path):
    """Whatever the files are called."""
    root = write_folder(tmp_path / "a", {f"{i:02d}.jpg": make() for i, make in enumerate(GOOD.values())})
    (root / "99.png").write_bytes(SIXTEEN_BITS.tobytes())
    source, same = open_source(str(root)), Transform((60, 90), (0,) * 3, (1,) * 3, "bilinear", crop_pct=1.0)
    (batch,) = batches_of(source, same, batch_size=len(source), train=False, bad=BadSamples())
    assert len(batch.ids) == len(GOOD) + 1
    assert batch.bad == ()
    levels = (batch.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for (name, make), image in zip(GOOD.items(), levels, strict=False):
        np.testing.assert_array_equal(image, np.asarray(decode(make())), err_msg=name)
    assert (levels[-1] == levels[-1][..., :1]).all()


def test_two_thousand_mutations(tmp_path):
    """Each is delivered with the size of its header or named, nothing crashes, and the loader works on."""
    draw, files = np.random.default_rng(0), {}
    sound = [make() for make in GOOD.values()] + [SIXTEEN_BITS, *small_photos(10)]
    for i in range(2500):
        # Every fifth is intact: 100 bad ones in a row would end the run.
        data = sound[i % len(sound)]
        files[f"{i:04d}.jpg"] = mutate(data, draw) if i % 5 else data
    source = open_source(str(write_folder(tmp_path / "a", files)))
    known = BadSamples()
    loader = Loader(source, EVAL, device="cpu", batch_size=50, threads=2, train=False, bad=known)
    delivered = [int(i) for batch in loader.batches() for i in batch.ids]
    assert sorted(delivered + list(known.found)) == list(range(2500))
    assert set(range(0, 2500, 5)) <= set(delivered)
    assert 200 < len(known.found) < 1800
    # The same loader once more.
    assert [int(i) for batch in loader.batches() for i in batch.ids] == delivered
    loader.close()
