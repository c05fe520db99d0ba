"""Speed of a training step on several GPUs: ``python -m benchmarks.scaling [BACKBONE] [--ranks 1 2 4] [--resume]``.

Weak scaling: the compiled step of `benchmarks.step` in mode zero with the same batch on every rank, under torchrun
and DDP as in training, random images and no data pipeline. Images a second over all ranks (median of repeated
steps), and efficiency: that over as many times one rank's. Writes `benchmarks/results/scaling.json` after every
number of ranks; ``--budget SECONDS`` ends a run early, ``--resume`` goes on, at last with what failed, unless for
want of memory. ``--tiny`` runs 1 and 2 ranks of a tiny model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks import plots, record
from benchmarks.step import BACKBONES, REPEATS, TINY, WARM_UP, Contestant
from fastalign.ranks import distributed

TIMEOUT = 500
"""Seconds after which ranks that wait for one another are ended."""
GRACE = 45
"""Seconds in which torchrun must have ended its ranks: it gives them 30."""


def rank(name: str, batch: int, tiny: bool) -> None:
    """One rank of several; the first prints its row."""
    world = distributed.start()
    extra = {"img_size": 32, "depth": 2} if tiny else {}
    contestant = Contestant("zero", name, batch, 30.0, not tiny, **extra)
    contestant.ids += world.rank * batch
    if world.size > 1:
        contestant.model = DistributedDataParallel(
            contestant.model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    for _ in range(1 if tiny else 1 + WARM_UP):
        contestant.step()
    world.barrier()
    # Every step ends with all ranks: what one measures, all have waited for.
    seconds = statistics.median(contestant.step() for _ in range(2 if tiny else REPEATS))
    cuda = world.device.type == "cuda"
    row = {"ranks": world.size, "batch_per_rank": batch, "images_per_second": world.size * batch / seconds}
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    distributed.stop()
    if world.main:
        print(json.dumps(row), flush=True)


def measure(ranks: int, name: str, batch: int, tiny: bool) -> dict:
    """One row, from processes of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "benchmarks.scaling", name, "--batch", str(batch), "--rank"] + ["--tiny"] * tiny
    environment = {"OMP_NUM_THREADS": "1" if tiny else "4", **os.environ}
    failed = {"ranks": ranks, "batch_per_rank": batch}
    try:
        code, out, errors = said(command, environment)
    except subprocess.TimeoutExpired:
        return failed | {"failed": f"no result within {TIMEOUT} seconds"}
    if code:
        lines = [line for line in errors.splitlines() if "Error" in line]
        return failed | {"failed": (lines or [f"exit code {code}"])[0].strip()[:300]}
    return json.loads(out.strip().splitlines()[-1])


def said(command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, output and errors of torchrun; whatever ends the wait for it, its ranks end too."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=record.ROOT, **pipes) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT)
        finally:
            end(process)
    return process.returncode, out, errors


def end(process: subprocess.Popen) -> None:
    """End torchrun, if it runs. Its ranks are in sessions of their own: they end only where it can end them."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def fitting_batch(name: str) -> int:
    """The batch with which `benchmarks.step` was measured here; where it was not, the one that it tries first."""
    step = record.read("step")
    same = step and step["environment"]["gpu"] == record.environment()["gpu"]
    found = [
        row["batch"]
        for row in (step["rows"] if same else ())
        if (row["backbone"], row["implementation"], row["compiled"]) == (name, "zero", True)
        and row["softcap"]
        and "failed" not in row
    ]
    return max(found, default=BACKBONES.get(name, 64))


def with_efficiency(rows: list[dict]) -> list[dict]:
    """Rows by number of ranks, each with its speed over that many single ranks."""
    rows = sorted(rows, key=lambda row: row["ranks"])
    alone = next((r["images_per_second"] for r in rows if r["ranks"] == 1 and "failed" not in r), None)
    for row in rows:
        if alone and "failed" not in row:
            row["efficiency"] = row["images_per_second"] / (row["ranks"] * alone)
    return rows


def show(row: dict) -> None:
    """A line of the table."""
    start = f"{row['ranks']:3} ranks, {row['batch_per_rank']:4} images each "
    if "failed" in row:
        print(f"{start}not measured: {row['failed']}", flush=True)
        return
    efficiency = f"  efficiency {100 * row['efficiency']:.1f} %" if "efficiency" in row else ""
    print(f"{start}{row['images_per_second']:10.1f} images/s{efficiency}", flush=True)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("backbone", nargs="?", default=next(iter(BACKBONES)), help="timm's name")
    parser.add_argument("--ranks", nargs="+", type=int, help="default 1, 2, 4... up to the GPUs")
    parser.add_argument("--batch", type=int, help="images a rank; default what fitted benchmarks.step")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; begin none that may end later"
    )
    parser.add_argument("--resume", action="store_true", help="keep the results of earlier parts")
    parser.add_argument("--tiny", action="store_true", help="1 and 2 ranks of a tiny model, nothing written")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    name = next(iter(TINY)) if options.tiny else options.backbone
    batch = options.batch or (TINY[name] if options.tiny else fitting_batch(name))
    if options.rank:
        return rank(name, batch, options.tiny)
    if not torch.cuda.is_available() and not options.tiny:
        sys.exit(
            "benchmarks.scaling needs a GPU: ranks that share a CPU do not scale; --tiny shows that it runs"
        )
    gpus, started, longest = torch.cuda.device_count(), time.perf_counter(), 0.0
    most = gpus or 2
    numbers = options.ranks or sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most})
    if gpus == 1:
        print("one GPU: one rank, and no efficiency to speak of")
    identity = record.identity() | {"gpus": gpus, "backbone": name, "batch": batch}
    rows = record.resume("scaling", identity).get("rows", []) if options.resume else []
    for number in record.left(numbers, rows, lambda row: row["ranks"]):
        before = time.perf_counter()
        if before - started + longest > options.budget:
            print("budget spent: run again with --resume")
            break
        others = [row for row in rows if row["ranks"] != number]
        rows = with_efficiency([*others, measure(number, name, batch, options.tiny)])
        show(next(row for row in rows if row["ranks"] == number))
        if not options.tiny:
            record.write("scaling", rows, {"identity": identity})
        longest = max(longest, time.perf_counter() - before)
    if not options.tiny:
        plots.draw("scaling")
    return rows


if __name__ == "__main__":
    sys.exit(any("failed" in row for row in main() or ()))
