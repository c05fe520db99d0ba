"""Speed of a training step, without data: ``python -m benchmarks.step [--only BACKBONE[:MODE:CAP:COMPILED] ...]``.

Forward, backward and AdamW on random images, in bf16 autocast with fp32 trained weights and bf16 frozen ones: our
step in mode zero and drop, and zero with an FP8 teacher, against `benchmarks.baseline`, compiled and eager. All rows
of one backbone and soft-cap run in one process with one batch, in rounds of alternating order. Images a second, model
FLOPs utilization by `fastalign.method.flops`, peak memory. `benchmarks/results/step.json` is written after each
round.

``--missing`` measures only rows that have no figure of this GPU yet; ``--warm`` compiles each row's graphs with one
step, for Inductor's disk cache, and measures nothing. Exit code 1 if a row fails.

On a CPU, ``--ratios`` compares steps of a ViT-S in fp32 and bf16 by processor time on one thread, and writes ratios
and shares of the machine's own matmul rate to `step_cpu.json`.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable
from functools import partial

import torch

from benchmarks import record, step_cpu
from benchmarks.measure import attempt, free
from benchmarks.step_bench import BACKBONES, KEY, MODES, SMALL, TINY_KWARGS, Measured, Row, measure

COMPILED = ("compiled", "blocks", "eager")


def headline(backbone: str) -> list[Row]:
    """The rows that decide, the most important first."""
    compiled = [Row(backbone, mode) for mode in ("zero", "baseline", "drop")]
    return [*compiled, Row(backbone, "baseline", compiled="eager")]


def every_row(backbone: str) -> list[Row]:
    """All rows of a backbone."""
    capped = [Row(backbone, mode, 30.0, compiled) for compiled in COMPILED for mode in MODES]
    capped = [row for row in capped if row.compiled == "compiled" or row.mode != "fp8"]
    capped = [row for row in capped if (row.mode, row.compiled) != ("baseline", "blocks")]
    plain = [
        Row(backbone, mode, None, kind) for kind in ("compiled", "eager") for mode in MODES if mode != "fp8"
    ]
    return [*headline(backbone), *(row for row in capped if row not in headline(backbone)), *plain]


def parse(text: str) -> list[Row]:
    """Rows by their name: B/16-224 (its headline), or B/16-224:zero:30:compiled."""
    backbone, *rest = text.split(":")
    if backbone not in BACKBONES | SMALL:
        raise SystemExit(f"--only: no backbone {backbone}; there are {', '.join(BACKBONES)}")
    if not rest:
        return headline(backbone)
    if len(rest) != 3 or rest[0] not in MODES or rest[2] not in COMPILED:
        wanted = f"BACKBONE:{'|'.join(MODES)}:CAP|none:{'|'.join(COMPILED)}"
        raise SystemExit(f"--only: got {text}, expected {wanted}")
    return [Row(backbone, rest[0], None if rest[1] == "none" else float(rest[1]), rest[2])]


def show(row: dict) -> None:
    """A line of the table."""
    start = f"{row['backbone']:14} {row['mode']:9} cap {row['softcap'] or '-':5} {row['compiled']:9}"
    start += f"{row['precision']} batch {row['batch']:4} "
    if "failed" in row:
        print(f"{start}failed: {row['failed']}", flush=True)
        return
    mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] else "-"
    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else "-"
    print(
        f"{start}{row['images_per_second']:8.1f} images/s  MFU {mfu:6} {memory}  {row['ms']:.1f} ms "
        f"[{row['ms_p20']:.1f}, {row['ms_p80']:.1f}]  first step {row['first_step_s']:.0f} s",
        flush=True,
    )


def warm(rows: Iterable[Row], batch: int | None, device: torch.device, tiny: bool) -> list[dict]:
    """One step of each row; a row with its seconds or why it failed."""
    found = []
    for row in rows:
        size = batch or (BACKBONES | SMALL)[row.backbone][1]
        bench, why = attempt(
            lambda row=row, size=size: Measured(row, size, device, **(TINY_KWARGS if tiny else {}))
        )
        found.append({"row": str(row), **({"failed": why} if why else {"first_step_s": bench.first})})
        print(*found[-1].values(), flush=True)
        del bench
        free(device.type)
    return found


def missing(rows: list[Row]) -> list[Row]:
    """Those of which no figure of this GPU is written."""
    result = record.read("step")
    if result.get("environment", {}).get("gpu") != record.environment()["gpu"]:
        return rows
    had = {tuple(row[key] for key in KEY) for row in result["rows"] if "failed" not in row}
    return [row for row in rows if tuple(row) not in had]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="B/16-224, or B/16-224:zero:30:compiled")
    parser.add_argument("--batch", type=int, help="images a step; default by backbone")
    parser.add_argument("--missing", action="store_true", help="only rows without a figure of this GPU")
    parser.add_argument("--warm", action="store_true", help="compile each row and take one step")
    parser.add_argument("--ratios", action="store_true", help="a ViT-S on a CPU, in ratios")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, eager: checks that it runs")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.ratios:
        return step_cpu.ratios(options.tiny)
    if device.type == "cpu" and not options.tiny:
        sys.exit("benchmarks.step needs a GPU: a CPU's absolute speed means nothing; --ratios compares there")
    if options.tiny:
        rows = [Row("tiny", mode, compiled="eager") for mode in ("zero", "baseline", "drop")]
    elif options.only:
        rows = [row for text in options.only for row in parse(text)]
    else:
        rows = [row for backbone in BACKBONES for row in every_row(backbone)]
    if options.missing:
        rows = missing(rows)
    if options.warm:
        return warm(rows, options.batch, device, options.tiny)
    results = []
    # One soft-cap at a time: a backbone's twelve rows would not fit into memory together.
    for (backbone, _), group in itertools.groupby(rows, lambda row: (row.backbone, row.softcap)):
        batch = options.batch or (BACKBONES | SMALL)[backbone][1]
        if options.tiny:
            found = measure(list(group), batch, device, TINY_KWARGS, 2, 1)
        else:
            found = measure(list(group), batch, device, save=partial(record.write, "step", key=KEY))
        for row in found:
            show(row)
        results += found
    return results


if __name__ == "__main__":
    sys.exit(any("failed" in row for row in main()))
