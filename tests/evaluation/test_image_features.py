"""Features of images: their order, and the file that they are in."""

from types import SimpleNamespace

import pytest
import torch

import fastalign as fa
from fastalign.classify import classify
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from fastalign.evaluation.features import read_image_features
from fastalign.evaluation.fit import FeatureLoader
from fastalign.utils.random import permutation
from tests.evaluation.helpers import QUICK, same_figures


def test_features_come_in_the_order_of_images():
    transform = Transform((8, 8), (0.5,) * 3, (0.5,) * 3)
    for train, epoch, start in ((True, 3, 1), (True, 0, 0), (False, 0, 1)):
        common = {"batch_size": 3, "device": torch.device("cpu")}
        images = Loader(open_source("synthetic:10"), transform, threads=1, seed=5, train=train, **common)
        order = (lambda epoch: permutation(10, seed=5, epoch=epoch)) if train else None
        features = FeatureLoader(torch.arange(10.0), order=order, **common)
        expected = [batch.ids.tolist() for batch in images.batches(epoch, start)]
        found = list(features.batches(epoch, start))
        assert [batch.ids.tolist() for batch in found] == expected
        assert [batch.images.tolist() for batch in found] == expected
        assert len(features) == len(images)
        images.close()


def test_a_features_file_works_on_one_machine_only(tmp_path, monkeypatch):
    """Two ranks, each the only one of its machine; in the sum over ranks both are short of memory."""
    loader = SimpleNamespace(source=range(36))
    world = SimpleNamespace(size=2, device=torch.device("cpu"), sum=lambda value: value * 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    common = {"dtype": torch.float32, "folder": tmp_path, "share": 0.0}
    with pytest.raises(
        fa.UserError, match=r"the features of 36 images .* one machine only: raise --memory-sh"
    ):
        read_image_features(lambda images: images, loader, (32,), torch.float32, world, **common)
    assert not list(tmp_path.iterdir())


def test_features_in_a_file_are_those_in_memory(images, tmp_path, vit):
    options = {"head": "attention", "epochs": 2, **QUICK}
    memory = classify(vit, images, **options)
    file = classify(vit, images, output=tmp_path / "out", memory_share=0.0, **options)
    assert same_figures(file, memory)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classify.json"]
