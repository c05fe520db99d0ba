"""Updates on synthetic images, which measure memory, micro-batch size, speed and duration of a run."""

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastalign.config import Config, load_config
from fastalign.data.loader import Batch
from fastalign.training.build import training_source
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.metrics import peak_memory
from fastalign.training.reporter import duration, setup_lines
from fastalign.training.run import Run
from fastalign.utils.errors import UserError

UPDATES = 2  # timed, after one that compiles and allocates
GPU_SHARE = 0.85  # of the memory, for a measured micro-batch; decoding and collectives take the rest


def _on_synthetic(config: Config, images: int, **changes) -> Config:
    """The configuration for this many synthetic images, with `changes`."""
    data = config.data.model_copy(update={"train": f"synthetic:{images}", "val": None})
    faults = config.faults.model_copy(update={"quarantine": None})
    changes |= {"data": data, "faults": faults, "probe": type(config.probe)()}
    return config.model_copy(update=changes)


def dry_run(config: Config, world: World, update: Callable, check: Callable) -> list[str]:
    """Build the run, check it, and make updates on synthetic images. Leaves no files.

    `update` and `check` are `update` and `check_exports` of fastalign.train. The training data is counted, not read.
    Returns lines for the user: the run, its memory, speed and time.
    """
    config = set_micro_batch(config, world, update)
    images, size = len(training_source(config, world)), config.optim.batch_size
    with tempfile.TemporaryDirectory(prefix="fastalign-dry-run-") as folder:
        run = Run(_on_synthetic(config, (1 + UPDATES) * size, output=folder), world)
        check(config, run.backbone)
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


def set_micro_batch(config: Config, world: World, update: Callable) -> Config:
    """The configuration with a number instead of `optim.micro_batch=auto`, and the `optim.accumulate` it implies.

    A run that resumes takes the number of its config.yaml again if the number of ranks allows it.
    """
    optim = config.optim
    if optim.micro_batch is None:
        return config
    micro, parts = optim.micro_batch, optim.batch_size // world.size
    if micro == "auto":
        path = Path(config.output) / "config.yaml"
        micro = on_first_rank(world, lambda: path.exists() and load_config(path).optim.micro_batch)
        if type(micro) is not int or parts % micro:
            micro = min(world.gather(_measure_micro_batch(config, parts, world.device, update)))
    if optim.batch_size % (micro * world.size):
        multiple = f"optim.micro_batch x ranks = {micro * world.size}"
        raise UserError(f"optim.batch_size={optim.batch_size}: set it to a multiple of {multiple}")
    optim = optim.model_copy(update={"micro_batch": micro, "accumulate": parts // micro})
    return config.model_copy(update={"optim": optim})


def _measure_micro_batch(config: Config, parts: int, device: torch.device, update: Callable) -> int:
    """The largest micro-batch that fits and divides this rank's `parts` images, measured on this rank alone."""
    if device.type != "cuda":
        raise UserError("optim.micro_batch=auto measures the memory of a GPU: on a CPU set a number or null")
    efficiency = config.efficiency.model_copy(update={"compile": False})
    optim = config.optim.model_copy(update={"batch_size": parts, "accumulate": 1})
    torch.cuda.set_per_process_memory_fraction(GPU_SHARE, device)
    try:
        run = Run(_on_synthetic(config, parts, optim=optim, efficiency=efficiency), World(0, 1, device))
        run.model.train()
        return largest_fitting(run, parts, update)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        run = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def largest_fitting(run: Run, parts: int, update: Callable) -> int:
    """The largest divisor of `parts` for which two updates of a run do not run out of GPU memory."""
    for size in (size for size in range(parts, 0, -1) if parts % size == 0):
        shape = (size, 3, *run.backbone.spec.image_size)
        try:
            for _ in range(2):  # the second one includes the optimizer's state
                images = torch.zeros(shape, device=run.world.device, dtype=run.dtype)
                update(run, iter([Batch(images, torch.arange(size))]), 0)
            run.status.read(everything=True)
            return size
        except torch.cuda.OutOfMemoryError:
            run.optimizer.zero_grad()
        torch.cuda.empty_cache()
    raise UserError("optim.micro_batch=auto: one image does not fit: set efficiency.grad_checkpointing=true")
