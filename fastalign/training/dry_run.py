"""A few updates on synthetic images: does the run fit, and how long will it take?"""

import tempfile
import time
from collections.abc import Callable

import torch

from fastalign.config import Config
from fastalign.data.sources import open_source
from fastalign.training.distributed import World
from fastalign.training.metrics import peak_memory
from fastalign.training.reporter import duration, setup_lines
from fastalign.training.run import Run
from fastalign.utils.errors import UserError

UPDATES = 2
"""that are timed, after one that compiles and allocates"""


def dry_run(config: Config, world: World, update: Callable) -> list[str]:
    """Build everything and take updates (`fastalign.train.update`) on synthetic images. Writes nothing that stays.

    The training data is counted, not read. Returns lines for the user: the run, its memory, speed and time.
    """
    if config.data.train is None:
        raise UserError("data.train is not set: give it an image folder or tar shards, data.train=PATH")
    images, size = len(open_source(config.data.train, damaged=True)), config.optim.batch_size
    data = {"train": f"synthetic:{(1 + UPDATES) * size}", "val": None}
    with tempfile.TemporaryDirectory(prefix="fastalign-dry-run-") as folder:
        changes = {
            "output": folder,
            "data": config.data.model_copy(update=data),
            "probe": type(config.probe)(),
            "faults": config.faults.model_copy(update={"quarantine": None}),
        }
        run = Run(config.model_copy(update=changes), world)
        run.model.train()
        batches = run.train.batches()
        update(run, batches, 0)
        started = _now(world)
        for _ in range(UPDATES):
            update(run, batches, 0)
        seconds = (_now(world) - started) / UPDATES
        lines = setup_lines(run)
        run.train.close()
    updates = min(images // size * config.optim.epochs, config.max_steps or 1 << 62)
    kind = "of each GPU" if world.device.type == "cuda" else "of the process"
    return [
        *lines,
        f"memory: {peak_memory(world.device) / 2**30:.1f} GiB {kind} at the peak",
        f"speed: {size / seconds:.0f} images/s on synthetic images, without reading and decoding",
        f"whole run: {images} images, {updates} updates in about {duration(updates * seconds)}, "
        "without validation, probes and checkpoints",
    ]


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.monotonic()
