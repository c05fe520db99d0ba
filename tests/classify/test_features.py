"""Features of a frozen backbone: their order, and the file they lie in."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import fastalign as fa
from fastalign.classify import classify
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from fastalign.evaluation.image_features import FeatureLoader, _file, _mapped, extract
from fastalign.evaluation.images import alone
from tests.classify.helpers import QUICK, same_figures


def test_features_come_in_the_order_of_images():
    transform = Transform((8, 8), (0.5,) * 3, (0.5,) * 3)
    for train, epoch, start in ((True, 3, 1), (True, 0, 0), (False, 0, 1)):
        common = {"batch_size": 3, "device": torch.device("cpu"), "seed": 5, "train": train}
        images = Loader(open_source("synthetic:10"), transform, threads=1, **common)
        features = FeatureLoader(torch.arange(10.0), **common)
        expected = [batch.ids.tolist() for batch in images.batches(epoch, start)]
        found = list(features.batches(epoch, start))
        assert [batch.ids.tolist() for batch in found] == expected
        assert [batch.images.tolist() for batch in found] == expected
        assert len(features) == len(images)
        images.close()


def test_features_that_no_disk_can_hold(images, tmp_path, vit, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(fa.UserError, match=r"of 36 images take 0.0 GB, more than .* choose a larger disk"):
        classify(vit, images, output=tmp_path, memory_share=0.0, **QUICK)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_features_for_which_the_disk_proves_too_small(images, tmp_path, vit, monkeypatch, number):
    """A quota, or another command that was quicker: said before anything is written to the file's map."""

    def full(handle, offset, size):
        assert (offset, size) == (0, 36 * 32 * 4)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(fa.UserError, match=r"of 36 images take 0.0 GB, more than .* choose a larger disk"):
        classify(vit, images, output=tmp_path / "out", memory_share=0.0, **QUICK)
    assert not list((tmp_path / "out").iterdir())


def test_a_features_file_has_its_room_and_is_its_commands_own(tmp_path):
    first, second = (_mapped(tmp_path, (3, 1000), torch.float32, 12000, alone()) for _ in range(2))
    first.fill_(1.0)
    assert not second.any()
    assert not list(tmp_path.iterdir()), "a command that is killed leaves nothing"
    path = _file(tmp_path, 10**6)
    assert path.stat().st_size == 10**6
    assert path.stat().st_blocks * 512 >= 10**6, "not sparse"


def test_a_features_file_serves_one_machine(vit, tmp_path, monkeypatch):
    """Two ranks, each the only one of its machine; in the sum over ranks both are short of memory."""
    loader = SimpleNamespace(source=range(36))
    world = SimpleNamespace(size=2, device=torch.device("cpu"), sum=lambda value: value * 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    common = {"dtype": torch.float32, "folder": tmp_path, "share": 0.0}
    with pytest.raises(
        fa.UserError, match=r"^the features of 36 images .* one machine only: raise --memory-sh"
    ):
        extract(vit, "linear", loader, world, **common)
    assert not list(tmp_path.iterdir())


def test_features_in_a_file_are_those_in_memory(images, tmp_path, vit):
    options = {"head": "attention", "epochs": 2, **QUICK}
    memory = classify(vit, images, **options)
    file = classify(vit, images, output=tmp_path / "out", memory_share=0.0, **options)
    assert same_figures(file, memory)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classify.json"]
