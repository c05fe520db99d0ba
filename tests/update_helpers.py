"""A run whose updates a test makes itself, on a GPU or the CPU."""

import torch

from fastalign.config import load_config
from fastalign.data.prefetch import Batch
from fastalign.training import build
from fastalign.training.distributed import World
from fastalign.training.run import Run
from tests.numerics import DEVICE


def run_of_batches(tmp_path, *overrides):
    """A run, and finished batches for six updates of two parts."""
    device = torch.device(DEVICE, 0 if DEVICE == "cuda" else None)
    run = Run(load_config(write_recipe(tmp_path), list(overrides)), World(0, 1, device))
    run.model.train()
    dtype, batches = build.precision(run.config, device), []
    for first in range(0, 48, 4):
        images, ids = torch.randn(4, 3, 64, 64, device=device, dtype=dtype), torch.arange(first, first + 4)
        batches.append(Batch(images, ids.to(device), ids.numpy(), 0.0))
    return run, iter(batches)
