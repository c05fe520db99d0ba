"""What a probe reads: tokens against timm, labels of patches by hand and against PIL, each image once."""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastalign.backbones.vit import ViT
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import read_patch_features
from fastalign.evaluation.label_maps import VOID, crop_and_resize, patch_labels
from fastalign.probe import main
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError
from tests.data_helpers import needs_dali
from tests.evaluation.helpers import COUNTS, SINGLE, command_error, models, probe_line


def pil_square(image: Image.Image, size: int, resample: Image.Resampling) -> np.ndarray:
    """The largest centre square, resized."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((size, size), resample))


def pil_input(path: Path, vit) -> torch.Tensor:
    pixels = pil_square(Image.open(path), 32, Image.Resampling.BILINEAR)
    mean, std = (np.array(vit.data[name]) for name in ("mean", "std"))
    return torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)


@needs_dali
def test_features_are_timms_of_pils_pixels(scenes):
    vit, model = models()
    for split in ("val", "test"):
        read = read_patch_features(
            vit.eval(), open_labelled(str(scenes), split), SINGLE, batch_size=3, threads=1
        )
        files = sorted((scenes / split / "images").iterdir())
        images = torch.stack([pil_input(path, vit) for path in files])
        with torch.no_grad():
            expected = model.forward_features(images)
        assert read.tokens[0].dtype == torch.bfloat16
        assert read.tokens[0].shape == expected.shape == (COUNTS[split], 2 + 16, 32)
        error = (read.tokens[0].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        # bf16 costs 0.002. The loader's pixels are within one level of PIL's (0.17 on average), but for the crop's
        # edge, where its filter looks over it. The evaluation crop, which is a pixel off, costs 0.14.
        assert error.mean() < 0.015
        assert error.max() < 0.06, "each token of each image in its place"
        for index, path in enumerate(files):
            labels = Image.open(scenes / split / "labels" / path.name)
            cut = pil_square(labels, 32, Image.Resampling.NEAREST)
            patches = cut.reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
            union = np.stack([(patches == c).any(1) for c in range(4)], 1)
            rows = torch.tensor([index])
            assert np.array_equal(read.labels(rows, "union")[0].numpy(), union)
            assert np.array_equal(read.labels(rows, "global-union")[0, 0].numpy(), union.any(0))
            assert read.labels(rows, "global-in-patch")[0].tolist() == [union.any(0).tolist()] * 16
            counts = np.stack([(patches == c).sum(1) for c in range(4)], 1)
            majority = np.where(counts.any(1), counts.argmax(1), -1)
            assert np.array_equal(read.labels(rows, "majority")[0].numpy(), majority)


def test_skipped_blocks_are_pruned_and_the_final_norm_stays():
    vit, model = models()
    images, blocks = torch.randn(3, 3, 32, 32), model.blocks
    with torch.no_grad():
        found = vit.eval().forward_layers(images, (2, 0, 1))
        for skip, tokens in zip((2, 0, 1), found, strict=True):
            model.blocks = blocks[: 2 - skip]
            torch.testing.assert_close(tokens, model.forward_features(images))


def test_a_label_map_is_cropped_and_resized_as_pil_does():
    rng = np.random.default_rng(0)
    for height, width, size in ((37, 61, 24), (61, 37, 24), (24, 24, 24), (16, 40, 48), (333, 500, 224)):
        labels = rng.integers(0, 200, (height, width)).astype(np.uint8)
        wanted = pil_square(Image.fromarray(labels), size, Image.Resampling.NEAREST)
        assert np.array_equal(crop_and_resize(labels, (size, size)), wanted)
    wide = np.arange(8 * 12).reshape(8, 12)  # the largest crop of the shape
    picked = wide[np.ix_((1, 3, 4, 6), (0, 2, 3, 5, 6, 8, 9, 11))]
    assert np.array_equal(crop_and_resize(wide, (4, 8)), picked)


@pytest.mark.parametrize(
    ("rows", "unlabeled", "union", "majority", "image"),
    [
        (["0011", "0211", "00..", "00.."], None, [{0, 2}, {1}, {0}, set()], [0, 1, 0, VOID], {0, 1, 2}),
        (["0300", "0000"], 0, [{3}, {0}], [0, 0], {0, 3}),  # unlabeled, but not next to another class
        (["210", "120", "000"], None, [{1, 2}], [1], {1, 2}),  # a tie, and a remainder
    ],
)
def test_patch_labels_worked_by_hand(rows, unlabeled, union, majority, image):
    labels = np.array([[VOID if pixel == "." else int(pixel) for pixel in row] for row in rows], np.int16)
    found = patch_labels(labels, size=labels.shape, patch=(2, 2), classes=4, unlabeled=unlabeled)
    assert [set(np.flatnonzero(patch)) for patch in found[0]] == union
    assert found[1].tolist() == majority
    assert set(np.flatnonzero(found[2])) == image


@needs_dali
def test_features_are_read_once_and_leave_nothing_behind(scenes, tmp_path, monkeypatch):
    """One pass for two heads and layers; while heads are fitted the files are gone, whatever ends the command."""
    allocate, forward, fit_head = (
        Mock(wraps=os.posix_fallocate),
        ViT.forward_layers,
        Mock(side_effect=KeyError),
    )
    passes = Mock()
    output, features = tmp_path / "out" / "probe.json", tmp_path / "features"
    more = ["--output", output, "--cache", features, "--heads", "linear", "mlp", "--skip-blocks", "0", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", allocate)
        patch.setattr(ViT, "forward_layers", lambda vit, x, skip: passes(len(x)) and forward(vit, x, skip))
        patch.setattr("fastalign.evaluation.patches.fit_head", fit_head)
        with pytest.raises(KeyError):
            main(probe_line(scenes, *more))
    assert sum(call.args[0] for call in passes.call_args_list) == sum(COUNTS.values())
    allocated = {call.args[2] for call in allocate.call_args_list}
    assert {count * 18 * 32 * 2 for count in COUNTS.values()} < allocated
    assert not list(features.iterdir())
    assert main(probe_line(scenes, *more[:2])) == 0
    assert [path.name for path in output.parent.iterdir()] == ["probe.json"]


def test_ranks_need_files(scenes):
    with pytest.raises(UserError, match="several ranks share features in files"):
        read_patch_features(models()[0], open_labelled(str(scenes), "val"), World(0, 2, SINGLE.device))


def test_a_full_disk(scenes, tmp_path, capsys, monkeypatch):
    """Found before anything is written to the file's map, which would kill the process."""
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    line = probe_line(scenes, "--output", tmp_path / "p.json", "--cache", tmp_path / "c")
    error = command_error(capsys, "probe", line)
    assert f"{tmp_path / 'c'} cannot hold features of 0.0 GB ([Errno 28] No space left)" in error
    assert "name another folder: probe --cache" in error
    assert not list((tmp_path / "c").iterdir())
