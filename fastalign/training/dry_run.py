"""A few updates on synthetic images: does the run fit, and how long will it take?"""

import tempfile
import time
from collections.abc import Callable

import torch

from fastalign.config import Config
from fastalign.data.sources import open_source
from fastalign.training.distributed import World
from fastalign.training.messages import duration, setup_lines
from fastalign.training.metrics import peak_memory
from fastalign.training.run import Run
from fastalign.utils.errors import UserError

UPDATES = 2
"""that are timed, after one that compiles and allocates"""


def dry_run(config: Config, world: World, update: Callable) -> list[str]:
    """Build everything and take updates on synthetic images. Writes nothing that stays.

    Args:
        config: of the run; its training data is counted, not read.
        world: the ranks.
        update: `fastalign.train.update`.

    Returns:
        Lines for the user: what the run would do, its memory, speed and time.
    """
    if config.data.train is None:
        raise UserError("data.train is not set: give it an image folder or tar shards, data.train=PATH")
    images, size = len(open_source(config.data.train, damaged=True)), config.optim.batch_size
    with tempfile.TemporaryDirectory(prefix="fastalign-dry-run-") as folder:
        changes = {
            "output": folder,
            "data": config.data.model_copy(
                update={"train": f"synthetic:{(1 + UPDATES) * size}", "val": None}
            ),
            "probe": type(config.probe)(),
            "faults": config.faults.model_copy(update={"quarantine": None}),
        }
        run = Run(config.model_copy(update=changes), world)
        run.model.train()
        batches = run.train.batches()
        for number in range(1 + UPDATES):
            if number == 1:
                started = _now(world)
            update(run, batches, 0)
        seconds = (_now(world) - started) / UPDATES
        lines = setup_lines(run)
        for loader in (batches, run.train):
            loader.close()
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
