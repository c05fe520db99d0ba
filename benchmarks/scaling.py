"""Speed of a training step on several GPUs: ``torchrun --nproc-per-node=4 -m benchmarks.scaling [BACKBONE]``.

Weak scaling: the compiled step of `benchmarks.step` in mode zero under DDP as in training, the same batch on every
rank, random images and no data pipeline. Rank 0 writes images a second over all ranks to
`benchmarks/results/scaling.json`, a row for each number of ranks. Efficiency is that over as many times the row of
one rank.
"""

import argparse
import statistics
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks import record
from benchmarks.step_bench import BACKBONES, SMALL, TINY_KWARGS, WARM_UP, Row, StepBench, timed
from fastalign.training import distributed

STEPS = 20


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("backbone", nargs="?", choices=BACKBONES, default=next(iter(BACKBONES)))
    parser.add_argument("--batch", type=int, help="images a rank; default as in benchmarks.step")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, nothing written")
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit(
            "benchmarks.scaling needs GPUs: ranks that share a CPU do not scale; --tiny shows that it runs"
        )
    name, kwargs = ("tiny", TINY_KWARGS) if options.tiny else (options.backbone, {})
    batch = options.batch or (BACKBONES | SMALL)[name][1]
    world = distributed.start()
    try:
        bench = StepBench(
            Row(name, compiled="eager" if options.tiny else "compiled"), batch, world.device, **kwargs
        )
        bench.ids += world.rank * batch
        if world.size > 1:
            bench.model = DistributedDataParallel(
                bench.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        for _ in range(1 if options.tiny else 1 + WARM_UP):
            bench.step()
        world.barrier()
        seconds = statistics.median(timed(bench, 2 if options.tiny else STEPS))
    finally:
        distributed.stop()
    rate = world.size * batch / seconds
    row = {"backbone": name, "ranks": world.size, "batch_per_rank": batch, "images_per_second": rate}
    if world.main:
        single = [
            one
            for one in record.read("scaling").get("rows", [])
            if (one["backbone"], one["ranks"]) == (name, 1)
        ]
        if single:
            row["efficiency"] = rate / (world.size * single[0]["images_per_second"])
        print(row, flush=True)
        if not options.tiny:
            record.write("scaling", [row], key=("backbone", "ranks"))
    return row


if __name__ == "__main__":
    main()
