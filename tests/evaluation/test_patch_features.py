"""What a probe reads, against timm and PIL."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import frozen_encoder, read_patch_features
from tests.data_helpers import needs_dali
from tests.evaluation.helpers import COUNTS, SINGLE, models


def pil_input(path: Path, vit) -> torch.Tensor:
    """The largest centre square, resized and normalised."""
    image = Image.open(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BILINEAR)
    mean, std = (np.array(vit.data[name]) for name in ("mean", "std"))
    return torch.from_numpy((np.asarray(image) / 255 - mean) / std).float().permute(2, 0, 1)


@needs_dali
def test_features_are_timms_of_pils_pixels(scenes):
    vit, model = models()
    encoder = frozen_encoder(vit, (0, 1))
    for split in ("val", "test"):
        read = read_patch_features(
            encoder, open_labelled(str(scenes), split), SINGLE, batch_size=3, threads=1
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
            side = min(labels.size)
            left, top = (labels.width - side) // 2, (labels.height - side) // 2
            cut = labels.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.NEAREST)
            patches = np.asarray(cut).reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
            union = np.stack([(patches == c).any(1) for c in range(4)], 1)
            rows = np.array([index])
            assert np.array_equal(read.labels(rows, "union")[0].numpy(), union)
            assert np.array_equal(read.labels(rows, "global-union")[0, 0].numpy(), union.any(0))
            assert read.labels(rows, "global-in-patch")[0].tolist() == [union.any(0).tolist()] * 16
            counts = np.stack([(patches == c).sum(1) for c in range(4)], 1)
            majority = np.where(counts.any(1), counts.argmax(1), -1)
            assert np.array_equal(read.labels(rows, "majority")[0].numpy(), majority)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_skipped_blocks_are_pruned_and_the_final_norm_stays(skip):
    vit, model = models()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = frozen_encoder(vit, (2, 0, 1, 0)).encode(images)
        model.blocks = model.blocks[: 2 - skip]
        torch.testing.assert_close(found[(2, 0, 1).index(skip)], model.forward_features(images))
    assert len(found) == 3, "asked for twice, read once"
