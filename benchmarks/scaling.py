"""Speed of a training step on several GPUs: ``torchrun --nproc-per-node=4 -m benchmarks.scaling [BACKBONE]``.

Weak scaling: the compiled step of `benchmarks.step` in mode zero under DDP, the same batch on every rank, random
images, no data pipeline. Rank 0 writes images per second over all ranks to `benchmarks/results/scaling.json`, one row
per number of ranks. Efficiency is relative to the row of one rank.
"""

import statistics
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks import record
from benchmarks.step_bench import BACKBONES, WARM_UP, Row, StepBench
from benchmarks.timing import timed
from fastalign.training import distributed

STEPS = 20


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, write."""
    parser = record.parser("scaling", __doc__, "a tiny model")
    parser.add_argument("backbone", nargs="?", choices=BACKBONES, default=next(iter(BACKBONES)))
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("benchmarks.scaling needs GPUs; --tiny shows on a CPU that it runs")
    model = Row("tiny", compiled="eager") if options.tiny else Row(options.backbone)
    name, batch = model.backbone, model.default_batch
    world = distributed.start()
    try:
        bench = StepBench(model, batch, world.device)
        bench.ids += world.rank * batch
        if world.size > 1:
            options_of_ddp = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
            bench.model = DistributedDataParallel(bench.model, **options_of_ddp)
        for _ in range(1 if options.tiny else 1 + WARM_UP):
            bench.step()
        world.barrier()
        seconds = statistics.median(timed(bench.step, 2 if options.tiny else STEPS, world.device.type))
    finally:
        distributed.stop()
    rate = world.size * batch / seconds
    row = {"backbone": name, "ranks": world.size, "batch_per_rank": batch, "images_per_second": rate}
    if world.main:
        rows = record.read("scaling").get("rows", [])
        if single := [one for one in rows if (one["backbone"], one["ranks"]) == (name, 1)]:
            row["efficiency"] = rate / (world.size * single[0]["images_per_second"])
        print(row, flush=True)
        if not options.tiny:
            record.write("scaling", [row], key=("backbone", "ranks"))
    return row


if __name__ == "__main__":
    main()
