"""Files of features: read once, renewed where they must be, removed."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastalign.evaluation import features as features_module
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import feature_files, probed_backbone, read_features
from fastalign.evaluation.heads import LABELS
from fastalign.probe import main
from fastalign.training.build import named_backbone
from tests.data_helpers import needs_dali
from tests.probe.helpers import ALONE, COUNTS, KWARGS, NAME, command, models, refused, results


@needs_dali
def test_features_are_read_once_and_deleted_unless_they_are_to_stay(data, tmp_path, passes):
    everything, output = sum(COUNTS.values()), tmp_path / "out" / "probe.json"
    assert main(command(data, "--output", output)) == 0
    first = results(output)["results"]
    assert sum(passes) == everything, "one pass for two epochs"
    assert [path.name for path in output.parent.iterdir()] == ["probe.json"]
    cache = tmp_path / "kept"
    assert main(command(data, "--output", output, "--cache", cache, "--keep-features")) == 0
    assert sum(passes) == 2 * everything
    sizes = {path.name: path.stat().st_size - 128 for path in cache.rglob("*.npy")}
    assert sizes.keys() == {"tokens-0.npy", "union.npy", "majority.npy", "whole.npy"}
    (tokens,) = (path for path in cache.rglob("tokens-0.npy") if np.load(path).shape[0] == COUNTS["train"])
    assert tokens.stat().st_size - 128 == COUNTS["train"] * 18 * 32 * 2
    # Found again, by commands that delete only what they made.
    seeds = tmp_path / "seeds.json"
    assert main(command(data, "--output", seeds, "--cache", cache, "--seeds", "0", "1")) == 0
    assert sum(passes) == 2 * everything
    kept = sorted(cache.rglob("*"))
    assert len(list(cache.iterdir())) == 3
    assert results(seeds)["results"][0] == first[0]
    other = ["--output", tmp_path / "layer.json", "--cache", cache, "--skip-blocks", "1"]
    assert main(command(data, *other)) == 0
    assert sorted(cache.rglob("*")) == kept


@needs_dali
def test_interrupted_features_are_read_anew(data, tmp_path, monkeypatch, passes):
    vit, _ = models()
    split = open_labelled(str(data), "train")
    options = {"folder": tmp_path, "batch_size": 4, "threads": 1}
    expected = read_features(probed_backbone(vit), split, ALONE, batch_size=4, threads=1)
    count, whole = len(passes), probed_backbone(vit)

    def breaks(images):
        if len(passes) == count + 2:
            raise KeyboardInterrupt
        return whole.encode(images)

    broken = features_module.Probed(**{**vars(whole), "encode": breaks})
    with pytest.raises(KeyboardInterrupt):
        read_features(broken, split, ALONE, **options)
    assert len(passes) == count + 2
    # Another layer must not make the half-written one look complete.
    read_features(probed_backbone(vit, (1,)), split, ALONE, **options)
    assert len(passes) == count + 2 + 5
    again = read_features(whole, split, ALONE, **options)
    assert len(passes) == count + 2 + 5 + 5
    assert torch.equal(again.tokens[0], expected.tokens[0])
    for kind in LABELS:
        rows = np.arange(len(split))
        assert torch.equal(again.labels(rows, kind), expected.labels(rows, kind))
    files = feature_files(whole, split, tmp_path, torch.float32)
    assert files.complete()
    with (files.place / "tokens-0.npy").open("r+b") as file:
        file.truncate(1000)
    assert not files.complete()


def test_other_weights_data_or_layers_have_other_files(data, tmp_path):
    vit, _ = models()
    split = open_labelled(str(data), "train")
    places = [feature_files(probed_backbone(vit), split, tmp_path, torch.float32).place]
    places.append(feature_files(probed_backbone(vit), split, tmp_path, torch.bfloat16).place)
    places.append(
        feature_files(probed_backbone(vit), open_labelled(str(data), "val"), tmp_path, torch.float32).place
    )
    vit.softcap = 30.0
    places.append(feature_files(probed_backbone(vit), split, tmp_path, torch.float32).place)
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.bias[3] += 1
    places.append(feature_files(probed_backbone(vit), split, tmp_path, torch.float32).place)
    assert len(set(places)) == 5


def test_what_a_second_command_writes_is_not_written_too(data, tmp_path, capsys):
    vit = named_backbone(NAME, weights="random", kwargs=json.dumps(KWARGS))[0]
    split = open_labelled(str(data), "train")
    files = feature_files(probed_backbone(vit), split, tmp_path / "c", torch.float32)
    with files.claimed():
        error = refused(capsys, *command(data, "--output", tmp_path / "p.json", "--cache", tmp_path / "c"))
        files.remove()
        assert files.place.is_dir()
    assert f"--cache {tmp_path / 'c'}: another command is reading" in error
    files.remove()
    assert not files.place.exists()


def test_a_full_disk(data, tmp_path, capsys, monkeypatch):
    line = command(data, "--output", tmp_path / "p.json", "--cache", tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
        assert "the features take 0.0 GB, 0.0 GB are free; name a folder with room" in refused(capsys, *line)
    full = OSError(28, "No space left on device")

    def fallocate(*args):
        raise full

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert "name a folder with room" in refused(capsys, *line)
    assert not list((tmp_path / "c").rglob("*.npy"))
