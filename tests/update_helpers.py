"""A run whose updates a test makes itself, on a GPU or the CPU."""

import torch

from fastalign.config import load_config
from fastalign.data.loader import Batch
from fastalign.training.distributed import World
from fastalign.training.run import Run
from tests.numerics import DEVICE


def write_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"output: {tmp_path / 'run'}\n"
        "student: {name: vit_tiny_patch16_224, weights: random, kwargs: {img_size: 64, drop_path_rate: 0.1}}\n"
        "data: {train: 'synthetic:256', val: 'synthetic:64'}\n"
        "optim: {batch_size: 8, epochs: 2, lr: 1.0e-3, accumulate: 2, clip: 1.0, ema: 0.9}\n"
    )
    return str(tmp_path / "recipe.yaml")


def run_of_batches(tmp_path, *overrides):
    """A run, and finished batches for six updates of two parts."""
    device = torch.device(DEVICE, 0 if DEVICE == "cuda" else None)
    run = Run(load_config(write_recipe(tmp_path), list(overrides)), World(0, 1, device))
    run.model.train()
    dtype, batches = run.dtype, []
    for first in range(0, 48, 4):
        images, ids = torch.randn(4, 3, 64, 64, device=device, dtype=dtype), torch.arange(first, first + 4)
        batches.append(Batch(images, ids))
    return run, iter(batches)
