"""Files of features: read once, renewed where they must be, removed."""

import errno
import os
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import frozen_encoder, patch_files, read_patch_features
from fastalign.evaluation.heads import PATCH_LABELS
from fastalign.probe import main
from tests.data_helpers import needs_dali
from tests.evaluation.helpers import COUNTS, SINGLE, command_error, models, probe_line, results


@needs_dali
def test_features_are_read_once_and_deleted_unless_kept(scenes, tmp_path, passes):
    everything, output = sum(COUNTS.values()), tmp_path / "out" / "probe.json"
    assert main(probe_line(scenes, "--output", output)) == 0
    first = results(output)["results"]
    assert sum(passes) == everything, "one pass for two epochs"
    assert [path.name for path in output.parent.iterdir()] == ["probe.json"]
    cache = tmp_path / "kept"
    assert main(probe_line(scenes, "--output", output, "--cache", cache, "--keep-features")) == 0
    assert sum(passes) == 2 * everything
    sizes = {path.stat().st_size - 128 for path in cache.rglob("tokens-0.npy")}
    assert sizes == {count * 18 * 32 * 2 for count in COUNTS.values()}
    kept = sorted(cache.rglob("*"))
    # Found again, by commands that delete only what they made.
    seeds = tmp_path / "seeds.json"
    assert main(probe_line(scenes, "--output", seeds, "--cache", cache, "--seeds", "0", "1")) == 0
    assert sum(passes) == 2 * everything
    assert results(seeds)["results"][0] == first[0]
    other = ["--output", tmp_path / "layer.json", "--cache", cache, "--skip-blocks", "1"]
    assert main(probe_line(scenes, *other)) == 0
    assert sorted(cache.rglob("*")) == kept


@needs_dali
def test_interrupted_features_are_read_again(scenes, tmp_path, passes):
    vit, _ = models()
    split, encoder = open_labelled(str(scenes), "train"), frozen_encoder(vit)
    options = {"folder": tmp_path, "batch_size": 4, "threads": 1}
    expected = read_patch_features(encoder, split, SINGLE, batch_size=4, threads=1)
    passes.clear()

    def breaks(images):
        if len(passes) == 2:
            raise KeyboardInterrupt
        return encoder.encode(images)

    with pytest.raises(KeyboardInterrupt):
        read_patch_features(replace(encoder, encode=breaks), split, SINGLE, **options)
    # Another layer must not make the incomplete one look complete.
    read_patch_features(frozen_encoder(vit, (1,)), split, SINGLE, **options)
    again = read_patch_features(encoder, split, SINGLE, **options)
    assert len(passes) == 2 + 5 + 5
    assert torch.equal(again.tokens[0], expected.tokens[0])
    for kind in PATCH_LABELS:
        rows = np.arange(len(split))
        assert torch.equal(again.labels(rows, kind), expected.labels(rows, kind))
    assert not list(tmp_path.glob(".*")), "nothing is left of the interrupted one"


def test_other_weights_data_or_precision_have_other_files(scenes, tmp_path):
    vit, _ = models()
    train, val = (open_labelled(str(scenes), name) for name in ("train", "val"))

    def folder(split=train, dtype=torch.float32):
        return patch_files(frozen_encoder(vit), split, tmp_path, dtype).folder

    folders = [folder(), folder(dtype=torch.bfloat16), folder(val)]
    vit.softcap = 30.0
    folders.append(folder())
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.bias[3] += 1
    folders.append(folder())
    assert len(set(folders)) == 5


def test_a_full_disk(scenes, tmp_path, capsys, monkeypatch):
    """Found before anything is written to the file's map, which would kill the process."""
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    line = probe_line(scenes, "--output", tmp_path / "p.json", "--cache", tmp_path / "c")
    assert f"{tmp_path / 'c'} has no space for features of 0.0 GB" in command_error(capsys, "probe", line)
    assert not list((tmp_path / "c").rglob("*.npy"))
