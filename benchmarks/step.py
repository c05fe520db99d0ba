"""Speed of a training step, without data: ``python -m benchmarks.step [--only BACKBONE ...]``.

Our step in modes zero and drop, and zero with an FP8 teacher, against `benchmarks.baseline`, compiled and eager, as
benchmarks/README.md describes. Writes images per second, MFU and peak memory to `step.json` after each round.

``--missing`` measures only rows without a figure of this GPU; ``--warm`` compiles each row with one step, for
Inductor's disk cache, and measures nothing. Exit code 1 if a row fails.

On a CPU, ``--ratios`` compares steps of a ViT-S in fp32 and bf16 by CPU time on one thread, and writes ratios and
shares of the machine's own matmul rate to `step_cpu.json`.
"""

import itertools
import statistics
import sys
from collections.abc import Iterable
from functools import partial

import torch

from benchmarks import record
from benchmarks.step_bench import BACKBONES, FAMILIES, KEY, MODES, PRECISIONS, Measured, Row, measure
from benchmarks.timing import attempt, free, timed
from fastalign.backbones.precision import compute_dtype
from fastalign.training.distributed import keep_freed_memory

COMPILED = ("compiled", "blocks", "eager")
CPU_ROWS = [Row("S/16-224", "baseline", 30.0, "eager", precision) for precision in PRECISIONS]
"""Of --ratios; the first is the reference point."""
CPU_ROWS += [
    Row("S/16-224", mode, 30.0, compiled, precision)
    for precision, compiled, mode in itertools.product(PRECISIONS, ("eager", "compiled"), ("zero", "drop"))
]


def headline(backbone: str) -> list[Row]:
    """The main rows, the most important first. The baseline has the modules of CLIP and SigLIP only."""
    if backbone in FAMILIES:
        return [Row(backbone, "zero"), Row(backbone, "drop"), Row(backbone, "zero", None)]
    compiled = [Row(backbone, mode) for mode in ("zero", "baseline", "drop")]
    return [*compiled, Row(backbone, "baseline", compiled="eager")]


def every_row(backbone: str) -> list[Row]:
    """All rows of a backbone."""
    capped = [Row(backbone, mode, 30.0, compiled) for compiled in COMPILED for mode in MODES]
    absent = {("fp8", "blocks"), ("fp8", "eager"), ("baseline", "blocks")}
    capped = [row for row in capped if (row.mode, row.compiled) not in absent]
    modes = [mode for mode in MODES if mode != "fp8"]
    plain = [Row(backbone, mode, None, compiled) for compiled in ("compiled", "eager") for mode in modes]
    return [*headline(backbone), *(row for row in capped if row not in headline(backbone)), *plain]


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


def warm(rows: Iterable[Row], device: torch.device) -> list[dict]:
    """One step of each row; its seconds or the reason of a failure."""
    found = []
    for row in rows:
        bench, why = attempt(Measured, row, row.default_batch, device)
        found.append({"row": str(row), **({"failed": why} if why else {"first_step_s": bench.first})})
        print(*found[-1].values(), flush=True)
        del bench
        free(device.type)
    return found


def missing(rows: list[Row]) -> list[Row]:
    """The rows without a figure of this GPU."""
    result = record.read("step")
    if result.get("environment", {}).get("gpu") != record.environment()["gpu"]:
        return rows
    had = {tuple(row[key] for key in KEY) for row in result["rows"] if "failed" not in row}
    return [row for row in rows if tuple(row) not in had]


def ratios(tiny: bool) -> list[dict]:
    """Steps of a ViT-S on one CPU thread, compared by CPU time, because other programs share the machine.

    Freed memory is kept as in training, so that the order of allocations does not matter.
    """
    keep_freed_memory()
    threads, device = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    rows = CPU_ROWS
    if compute_dtype("auto", device) != torch.bfloat16:
        print("this CPU has no bf16 instructions: skipping rows in bf16")
        rows = [row for row in rows if row.precision == "fp32"]
    if tiny:  # a CPU's compiler takes half a minute
        rows = [row._replace(backbone="tiny") for row in rows if row.compiled == "eager"]
    try:
        peak = {name: matmul_rate(dtype, 64 if tiny else 1536) for name, dtype in PRECISIONS.items()}
        found = measure(rows, rows[0].default_batch, device, *((1, 1) if tiny else (3, 2)))
    finally:
        torch.set_num_threads(threads)
    results = []
    for row in found:
        result = {key: row[key] for key in (*KEY, "batch", "failed", "steps") if key in row}
        if "failed" not in row:
            result["speedup"] = found[0]["ms"] / row["ms"]
            result["matmul_share"] = row["flops_per_second"] / peak[row["precision"]]
            name = f"{row['mode']:9}{row['compiled']:9}{row['precision']}"
            print(f"{name} {result['speedup']:6.2f}x  {result['matmul_share']:4.0%} of the matmul rate")
        results.append(result)
    if not tiny:
        record.write("step_cpu", results, {"reference": str(rows[0]), "threads": 1})
    return results


def matmul_rate(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product, in CPU time."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, 10, "cpu")[2:])


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = record.parser("step", __doc__, "a tiny model, eager")
    known = [*BACKBONES, *FAMILIES]
    parser.add_argument(
        "--only", nargs="+", choices=known, metavar="BACKBONE", help="its main rows: B/16-224"
    )
    parser.add_argument("--missing", action="store_true", help="only rows without a figure of this GPU")
    parser.add_argument("--warm", action="store_true", help="compile each row and take one step")
    parser.add_argument("--ratios", action="store_true", help="a ViT-S on a CPU, in ratios")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.ratios:
        return ratios(options.tiny)
    if device.type == "cpu" and not options.tiny:
        sys.exit("benchmarks.step needs a GPU; --ratios compares on a CPU")
    if options.tiny:
        rows = [Row("tiny", mode, compiled="eager") for mode in ("zero", "baseline", "drop")]
    elif options.only:
        rows = [row for backbone in options.only for row in headline(backbone)]
    else:
        rows = [row for backbone in BACKBONES for row in every_row(backbone)]
    if options.missing:
        rows = missing(rows)
    if options.warm:
        return warm(rows, device)
    results = []
    # One soft-cap at a time: the rows of a backbone do not fit into memory together.
    for _, rows_of_cap in itertools.groupby(rows, lambda row: (row.backbone, row.softcap)):
        group = list(rows_of_cap)
        how = {"rounds": 2, "steps": 1} if options.tiny else {"save": partial(record.write, "step", key=KEY)}
        found = measure(group, group[0].default_batch, device, **how)
        for row in found:
            show(row)
        results += found
    return results


if __name__ == "__main__":
    sys.exit(any("failed" in row for row in main()))
