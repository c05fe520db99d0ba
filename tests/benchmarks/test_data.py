"""`benchmarks.data`: it runs at a tiny size, and its two sides do the same work on the same cores."""

import os
from contextlib import closing
from itertools import islice

import pytest
import torch

from benchmarks import data

CPU = torch.device("cpu")


def test_the_pipelines_take_turns(capsys, tmp_path):
    cores = os.sched_getaffinity(0)
    (row,) = data.main(["--tiny"])
    assert os.sched_getaffinity(0) == cores
    assert row["threads"] == 1
    assert row["ratio"] > 0
    assert "1 threads, rkrc: " in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(SystemExit):
        data.main(["--threads", "100000"])


@pytest.mark.parametrize("crop", ["rkrc", "rrc"])
def test_both_sides_deliver_the_same_images(tmp_path, monkeypatch, crop):
    """In any order, with the interpolation as the only random choice."""
    monkeypatch.setattr(data, "PIXELS", (60, 60))
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    monkeypatch.setattr(data, "TRANSFORM", data.TRANSFORM | whole)
    common = (data.make_images(tmp_path, 8), crop, 4, 1, CPU)
    found = []
    for batches in (data.ours(*common, 0.0), data.plain(*common)):
        with closing(batches):
            images = torch.cat(list(islice(batches, 2)))
        assert (images.shape, images.dtype) == ((8, 3, data.SIZE, data.SIZE), torch.float32)
        found.append(images[images.mean((1, 2, 3)).argsort()])
    assert (found[0] - found[1]).abs().mean() < 0.02  # of values in -1..1
