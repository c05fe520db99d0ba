"""What a checkpoint costs in training time: ``python -m benchmarks.checkpoint [--models demo vit_b] [--tiny]``.

In steps: how long the loop stops for the snapshot, how much longer the steps during the write take, and a write that
the loop waits for; and the cost as a share of an epoch. Each checkpoint writes the backbone too.
Writes `benchmarks/results/checkpoint.json`; milliseconds on a GPU only.
"""

import itertools
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.timing import wait
from fastalign.config import Config
from fastalign.train import update
from fastalign.training.checkpoint import save, wait_for_checkpoint
from fastalign.training.distributed import World
from fastalign.training.run import Run

DEMO = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 10, "num_heads": 4}
TINY = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
MODELS = {
    # name, kwargs, images per step on the CPU and on a GPU, steps per epoch
    "demo": ("vit_tiny_patch16_224", DEMO, 64, 64, 125),
    "vit_b": ("vit_base_patch16_224", {}, 1, 64, 1_281_167 // 1024),  # ImageNet-1k in the recipes' batches
    "tiny": ("vit_tiny_patch16_224", TINY, 4, 4, 100),
}


def make_run(model: str, folder: Path, device: torch.device) -> tuple[Run, itertools.repeat]:
    """A run with random weights, and the same batch repeatedly."""
    name, kwargs, on_cpu, on_gpu, _ = MODELS[model]
    batch = on_gpu if device.type == "cuda" else on_cpu
    tree = {
        "output": str(folder),
        "student": {"name": name, "weights": "random", "kwargs": kwargs},
        "data": {"train": f"synthetic:{batch}", "threads": 1},
        "optim": {"batch_size": batch},
    }
    run = Run(Config.model_validate(tree), World(0, 1, device))
    run.model.train()
    return run, itertools.repeat(next(iter(run.train.batches(0))))


def seconds_of(device: torch.device, function, *arguments) -> float:
    """Of a call, the device's work included."""
    wait(device.type)
    before = time.perf_counter()
    function(*arguments)
    wait(device.type)
    return time.perf_counter() - before


def once(run: Run, batches: itertools.repeat, quiet: int) -> dict[str, float]:
    """One checkpoint in the background and one that the loop waits for, between steps without a checkpoint."""
    device = run.world.device

    def step() -> float:
        return seconds_of(device, update, run, batches, 0)

    step()
    alone = [step() for _ in range(quiet)]
    blocked = seconds_of(device, save, run)
    during = []
    while any(thread.name == "checkpoint" for thread in threading.enumerate()) or not during:
        during.append(step())
    wait_for_checkpoint(run)
    alone += [step() for _ in range(quiet)]
    waited = seconds_of(device, lambda: (save(run), wait_for_checkpoint(run)))
    own = statistics.median(alone)
    return {
        "step_ms": 1e3 * own,
        "blocked_ms": 1e3 * blocked,
        "blocked_steps": blocked / own,
        "slowed_steps": sum(during) / own - len(during),
        "steps_beside_the_writer": len(during),
        "synchronous_steps": waited / own,
    }


def measure(model: str, repeats: int, quiet: int, device: torch.device) -> dict:
    """One row: medians in steps over `repeats` checkpoints after one for warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        run, batches = make_run(model, Path(folder), device)
        try:
            found = [once(run, batches, quiet) for _ in range(repeats + 1)][1 if repeats else 0 :]
            size = run.checkpoints.path(run.checkpoints.steps()[-1]).stat().st_size
        finally:
            run.train.close()
    middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
    times = {key: middle.pop(key) for key in ("step_ms", "blocked_ms")}
    epoch = MODELS[model][4]
    return {
        "model": model,
        "device": device.type,
        "checkpoint_mib": size / 2**20,
        **middle,
        "epoch_steps": epoch,
        "share_each_epoch": (middle["blocked_steps"] + middle["slowed_steps"]) / epoch,
        "checkpoints": len(found),
        **(times if device.type == "cuda" else {}),
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = record.parser("checkpoint", __doc__, "a tiny model, one checkpoint")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "vit_b"])
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = []
    for model in ["tiny"] if options.tiny else options.models:
        slow = model == "vit_b" and device.type == "cpu"
        repeats, quiet = (0, 1) if options.tiny else (1, 2) if slow else (3, 20)
        rows.append(measure(model, repeats, quiet, device))
        line = (
            "{model:6} {checkpoint_mib:7.0f} MiB: blocks {blocked_steps:.2f} steps, slows {slowed_steps:.2f} steps "
            "during the write ({steps_beside_the_writer:.0f} steps); synchronous {synchronous_steps:.2f} steps; "
            "{share_each_epoch:.3%} of an epoch"
        )
        print(line.format(**rows[-1]), flush=True)
    if not options.tiny:
        record.write("checkpoint", rows)
    return rows


if __name__ == "__main__":
    main()
