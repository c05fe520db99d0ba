"""Files that could stop a run, through the whole loader: unusual formats, bombs, random damage."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastalign.data.bad_samples import BadSamples
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from tests.data.odd_images import GOOD, SIXTEEN_BITS, bomb, mutate, webp_claiming_exif
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


BOMB = """
import resource, sys
from fastalign.data import Loader, Transform, open_source
from fastalign.data.bad_samples import BadSamples
def peak(root):
    small = Transform((32, 32), (0,) * 3, (1,) * 3)
    options = {"batch_size": 4, "device": "cpu", "train": False, "threads": 1, "bad": BadSamples()}
    loader = Loader(open_source(root), small, **options)
    seen = [i for batch in loader.batches() for i in batch.ids.tolist()]
    loader.close()
    return seen, len(loader.bad.found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print([*peak(sys.argv[1]), *peak(sys.argv[2])])
"""


def test_a_bomb_costs_no_memory(tmp_path):
    files = {f"{i}.jpg": photo for i, photo in enumerate(small_photos(8))}
    good = write_folder(tmp_path / "good", files)
    odd = {"3.jpg": bomb(), "5.png": bomb(), "6.jpg": webp_claiming_exif(2_000_000_000)}
    bad = write_folder(tmp_path / "bad", files | odd)
    command = [sys.executable, "-c", BOMB, str(good), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seen, count, before, without, found, after = json.loads(done.stdout)
    assert (seen, count, without, found) == (list(range(8)), 0, [0, 1, 2, 4, 5, 8], 3)
    assert after - before < 40  # MB; decoded, one is 588


@pytest.mark.parametrize("kind", ["jpeg", "every kind"])
def test_two_thousand_mutations(tmp_path, kind):
    """Each is delivered with the size of its header or named, nothing crashes, and the loader works on."""
    draw, files = np.random.default_rng(0), {}
    sound = small_photos(50) if kind == "jpeg" else [make() for make in GOOD.values()] + [SIXTEEN_BITS]
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
