"""Which rank gets which sample, that all get the same pixels, and that threads end whatever happens."""

import gc
import itertools
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.utils.errors import UserError
from fastalign.utils.random import permutation
from tests.data.odd_images import damaged
from tests.data_helpers import EVAL, HAS_DALI, TRAIN, batches_of, needs_dali, small_photos, write_folder

COUNT = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return write_folder(root, {f"{i % 3}/{i:03d}.jpg": p for i, p in enumerate(small_photos(COUNT))})


@pytest.fixture
def source(folder):
    return open_source(str(folder) if HAS_DALI else "synthetic:50")


def same(left, right):
    for ours, theirs in zip(left, right, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.images, theirs.images)


@needs_dali
def test_every_world_size_sees_the_same(source):
    options = {"seed": 7, "epoch": 2}
    one = batches_of(source, TRAIN, batch_size=16, **options)
    assert [batch.images.shape for batch in one] == [(16, 3, 32, 32)] * 3
    ids, images = torch.cat([batch.ids for batch in one]), torch.cat([batch.images for batch in one])
    assert ids.tolist() == permutation(COUNT, seed=7, epoch=2)[:48].tolist()
    for world, accumulate in ((2, 1), (4, 1), (1, 4)):
        size = {"batch_size": 16 // (world * accumulate), "world_size": world, "accumulate": accumulate}
        ranks = [batches_of(source, TRAIN, rank=rank, **size, **options) for rank in range(world)]
        parts = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert torch.equal(torch.cat([batch.ids for batch in parts]), ids)
        assert torch.equal(torch.cat([batch.images for batch in parts]), images)


@needs_dali
def test_a_start_inside_an_epoch_and_an_epoch_left_early(source):
    options = {"batch_size": 8, "mixup": 0.5, "cutmix": 1.0}
    expected = batches_of(source, TRAIN, epoch=1, **options)
    for start in (2, 5, 6):
        same(batches_of(source, TRAIN, epoch=1, start=start, **options), expected[start:])
    loader = Loader(source, TRAIN, device="cpu", threads=3, **options)
    for taken in range(3):
        assert len(list(itertools.islice(loader.batches(0), taken))) == taken
        same(loader.batches(1), expected)
    loader.close()


@pytest.mark.parametrize(
    ("total", "world", "batch", "accumulate", "steps"),
    [(100, 1, 10, 1, 10), (109, 1, 10, 1, 10), (100, 2, 8, 1, 6), (100, 2, 8, 4, 4), (64, 4, 8, 2, 2)],
)
def test_an_epoch_is_whole_updates(total, world, batch, accumulate, steps):
    source, seen = open_source(f"synthetic:{total}"), []
    options = {"batch_size": batch, "world_size": world, "accumulate": accumulate, "epoch": 1}
    for rank in range(world):
        seen += [b.ids for b in batches_of(source, EVAL, rank=rank, **options)]
    assert [len(ids) for ids in seen] == [batch] * steps * world
    assert len(torch.cat(seen).unique()) == steps * batch * world


@pytest.mark.parametrize(("total", "world", "batch"), [(50, 1, 16), (50, 3, 40), (7, 4, 2), (3, 4, 2)])
def test_evaluation_covers_everything_once(total, world, batch):
    source, seen = open_source(f"synthetic:{total}"), []
    for rank in range(world):
        options = {"batch_size": batch, "rank": rank, "world_size": world, "train": False}
        batches = [b.ids for b in batches_of(source, EVAL, **options)]
        assert len(batches) == len(Loader(source, EVAL, device="cpu", **options))
        assert all(len(b) for b in batches)
        seen += batches
    assert sorted(torch.cat(seen).tolist()) == list(range(total))


def test_arguments_are_checked():
    for key, wrong in {"crop": "centre", "interpolation": "lanczos", "scale": (1, 0.5)}.items():
        with pytest.raises(UserError, match=key):
            replace(EVAL, **{key: wrong})


@needs_dali
@pytest.mark.parametrize("damage", [lambda _: b"text", lambda data: damaged(data).tobytes()])
def test_bad_files_are_named_where_none_may_be_left_out(tmp_path, damage):
    files = {f"{i:02d}.jpg": photo for i, photo in enumerate(small_photos(20))}
    root = write_folder(tmp_path / "bad", files)
    for name in ("05.jpg", "07.jpg"):
        (root / name).write_bytes(damage(files[name]))
    loader = Loader(open_source(str(root)), EVAL, device="cpu", batch_size=5, train=False)
    message = r"^cannot read .*/bad/05\.jpg: .*; repair, replace or remove it$"
    with pytest.raises(UserError, match=message):
        list(loader.batches())
    assert [b.ids[0] for b in loader.batches(start=2)] == [10, 15]
    loader.close()


def test_a_missing_dali_is_explained(folder, monkeypatch):
    for name in ("nvidia.dali", "nvidia.dali.fn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"is not installed \(.*\): pip install nvidia-dali-cuda130"):
        next(Loader(open_source(str(folder)), EVAL, device="cpu", batch_size=2).batches())


def threads_end(name: str = "fastalign") -> bool:
    gc.collect()
    for _ in range(500):
        if not any(thread.name.startswith(name) for thread in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


def test_leaving_early_leaves_no_thread(source):
    loader = Loader(source, TRAIN, device="cpu", batch_size=4)
    next(loader.batches())
    assert threads_end("fastalign-loader")
    old, new = loader.batches(), loader.batches(1)
    assert list(old) == []
    assert next(new).wait >= 0
    loader.close()
    assert threads_end()
    dropped = Loader(source, TRAIN, device="cpu", batch_size=4)
    iterator = dropped.batches()
    next(iterator)
    del dropped, iterator
    assert threads_end()
    iterator = Loader(open_source("synthetic:40"), EVAL, device="cpu", batch_size=4).batches()
    assert len(list(iterator)) == 10, "an iterator outlives its loader"
    assert threads_end()


def test_interpreter_exits_while_a_loader_runs(folder):
    code = f"""
import time
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
source = open_source({str(folder) if HAS_DALI else "synthetic:50"!r})
loader = Loader(source, Transform((16, 16), (0.5,) * 3, (0.5,) * 3), batch_size=4, device="cpu")
batches = loader.batches()
next(batches)
time.sleep(0.5)  # until the loader has worked ahead
print("left")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
