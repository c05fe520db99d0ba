"""Who gets which sample, that everyone gets the same pixels."""

import tarfile
import time

import numpy as np
import pytest
import torch

from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from fastalign.utils.errors import UserError
from fastalign.utils.random import permutation
from tests.data_helpers import (
    CLIP_MEAN,
    CLIP_STD,
    EVAL,
    TRAIN,
    age,
    batches_of,
    needs_dali,
    small_photos,
    write_folder,
)

COUNT = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return write_folder(root, {f"{i % 3}/{i:03d}.jpg": p for i, p in enumerate(small_photos(COUNT))})


def run(source, transform, **options):
    return [(b.ids_host, b.images) for b in batches_of(source, transform, **options)]


def same(left, right):
    assert len(left) == len(right)
    for (ids, images), (other_ids, other_images) in zip(left, right, strict=True):
        np.testing.assert_array_equal(ids, other_ids)
        assert torch.equal(images, other_images)


@needs_dali
def test_every_world_size_sees_the_same(folder):
    source = open_source(str(folder))
    one = run(source, TRAIN, batch_size=16, seed=7, epoch=2)
    assert [len(ids) for ids, _ in one] == [16, 16, 16]
    assert one[0][1].shape == (16, 3, 32, 32)
    assert one[0][1].dtype == torch.float32
    np.testing.assert_array_equal(
        np.concatenate([i for i, _ in one]), permutation(COUNT, seed=7, epoch=2)[:48]
    )
    for world in (2, 4):
        ranks = [
            run(source, TRAIN, batch_size=16 // world, rank=r, world_size=world, seed=7, epoch=2)
            for r in range(world)
        ]
        steps = list(zip(*ranks, strict=True))
        same([(np.concatenate([i for i, _ in s]), torch.cat([x for _, x in s])) for s in steps], one)
    accumulated = run(source, TRAIN, batch_size=4, accumulate=4, seed=7, epoch=2)
    assert len(accumulated) == 12
    assert torch.equal(torch.cat([x for _, x in accumulated]), torch.cat([x for _, x in one]))


@needs_dali
def test_epochs_and_seeds_differ_and_repeat(folder):
    source = open_source(str(folder))
    options = {"batch_size": 8, "seed": 1, "mixup": 0.5, "cutmix": 1.0}
    loader = Loader(source, TRAIN, device="cpu", threads=3, **options)
    first, second = ([(b.ids_host, b.images) for b in loader.batches(e)] for e in (0, 1))
    again = [(b.ids_host, b.images) for b in loader.batches(0)]
    loader.close()
    same(first, again)
    same(first, run(source, TRAIN, **options))
    assert not np.array_equal(first[0][0], second[0][0])
    assert not np.array_equal(first[0][0], run(source, TRAIN, **options | {"seed": 2})[0][0])


@needs_dali
def test_a_start_inside_the_epoch_gives_its_tail(folder):
    source = open_source(str(folder))
    whole = run(source, TRAIN, batch_size=8, epoch=4)
    for start in (0, 2, 5, 6):
        same(run(source, TRAIN, batch_size=8, epoch=4, start=start), whole[start:])
    with pytest.raises(ValueError, match="start=7"):
        run(source, TRAIN, batch_size=8, start=7)


@needs_dali
def test_an_epoch_left_early_does_not_leak_into_the_next(folder):
    source = open_source(str(folder))
    expected = run(source, TRAIN, batch_size=8, epoch=1)
    loader = Loader(source, TRAIN, device="cpu", batch_size=8, threads=2, prefetch=1)
    for taken in range(3):
        iterator = loader.batches(0)
        for _ in range(taken):
            next(iterator)
        time.sleep(0.05)
        same([(b.ids_host, b.images) for b in loader.batches(1)], expected)
    loader.close()


@pytest.mark.parametrize(
    ("total", "world", "batch", "accumulate", "steps"),
    [(100, 1, 10, 1, 10), (109, 1, 10, 1, 10), (100, 2, 8, 1, 6), (100, 2, 8, 4, 4), (64, 4, 8, 2, 2)],
)
def test_an_epoch_is_whole_updates(total, world, batch, accumulate, steps):
    source = open_source(f"synthetic:{total}")
    seen = []
    for rank in range(world):
        options = {"batch_size": batch, "rank": rank, "world_size": world, "accumulate": accumulate}
        loader = Loader(source, EVAL, device="cpu", **options)
        assert len(loader) == steps
        ids = [b.ids_host for b in loader.batches(1)]
        assert [len(i) for i in ids] == [batch] * steps
        seen += ids
        loader.close()
    seen = np.concatenate(seen)
    assert len(set(seen.tolist())) == len(seen) == steps * batch * world


def test_nobody_is_left_out_for_ever():
    loader = Loader(open_source("synthetic:10"), EVAL, device="cpu", batch_size=8)
    seen = {int(i) for epoch in range(20) for b in loader.batches(epoch) for i in b.ids_host}
    loader.close()
    assert seen == set(range(10))


@pytest.mark.parametrize(
    ("total", "world", "batch"), [(50, 1, 16), (50, 4, 8), (50, 3, 40), (7, 4, 2), (3, 4, 2)]
)
def test_evaluation_covers_everything_once(total, world, batch):
    seen = []
    for rank in range(world):
        options = {"batch_size": batch, "rank": rank, "world_size": world, "train": False}
        loader = Loader(open_source(f"synthetic:{total}"), EVAL, device="cpu", **options)
        batches = [b.ids_host for b in loader.batches()]
        assert len(batches) == len(loader)
        assert all(len(b) for b in batches)
        seen += batches
        loader.close()
    assert sorted(np.concatenate(seen).tolist()) == list(range(total))


@needs_dali
def test_evaluation_pixels_do_not_depend_on_anything_else(folder):
    source = open_source(str(folder))
    one = run(source, EVAL, batch_size=16, train=False, dtype=torch.bfloat16)
    assert [len(i) for i, _ in one] == [16, 16, 16, 2]
    assert one[0][1].dtype == torch.bfloat16
    images = torch.cat([x for _, x in one])
    for rank in range(2):
        for ids, part in run(
            source,
            EVAL,
            batch_size=9,
            rank=rank,
            world_size=2,
            train=False,
            epoch=3,
            seed=5,
            dtype=torch.bfloat16,
        ):
            assert torch.equal(part, images[ids])
    random_eval = [run(source, TRAIN, batch_size=16, train=False, epoch=e) for e in (0, 1)]
    same(*random_eval)


@needs_dali
def test_tar_gives_the_same_pixels_as_its_folder(folder, tmp_path):
    source = open_source(str(folder))
    path = tmp_path / "tars" / "all.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for i in range(len(source)):
            tar.add(folder / source.name(i), arcname=source.name(i))
    age(path.parent)
    same(run(open_source(str(path)), TRAIN, batch_size=8), run(source, TRAIN, batch_size=8))


def test_arguments_are_checked():
    source = open_source("synthetic:10")

    def refused(**options):
        with pytest.raises(UserError) as caught:
            Loader(source, EVAL, device="cpu", **{"batch_size": 4} | options)
        return str(caught.value)

    text = refused(world_size=2, accumulate=2)
    assert "has 10 images, one update takes 16 (2 ranks x batch size 4 x accumulate 2)" in text
    assert "batch_size=0" in refused(batch_size=0)
    assert "rank=2" in refused(rank=2, world_size=2)
    assert "alpha" in refused(mixup=-1.0)
    assert "training" in refused(mixup=0.5, train=False)
    for wrong in (
        {"crop": "centre"},
        {"crop_pct": 1.5},
        {"interpolation": "nearest"},
        {"hflip": 2.0},
        {"std": (1, 0, 1)},
        {"size": (32.5, 32)},
        {"size": (0, 32)},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Transform(**{"size": (8, 8), "mean": CLIP_MEAN, "std": CLIP_STD} | wrong)


def test_synthetic_batches_need_no_decoder():
    one = run(open_source("synthetic:64"), TRAIN, batch_size=16, seed=3)
    two = [
        run(open_source("synthetic:64"), TRAIN, batch_size=8, seed=3, rank=r, world_size=2) for r in range(2)
    ]
    assert torch.equal(torch.cat([two[0][0][1], two[1][0][1]]), one[0][1])
    assert one[0][1].shape == (16, 3, 32, 32)


def test_a_gpu_without_index_is_the_callers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    loader = Loader(open_source("synthetic:8"), EVAL, device="cuda", batch_size=4)
    assert loader.device == torch.device("cuda:3")
    loader.close()
